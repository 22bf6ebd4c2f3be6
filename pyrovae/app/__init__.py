"""The command line: settings to a job, a job to a trained and measured run, a run to tables and pictures."""
