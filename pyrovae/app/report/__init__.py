"""The report on a run and the comparison of several, each one page that needs no network."""
