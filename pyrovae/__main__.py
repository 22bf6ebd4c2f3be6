"""``python -m pyrovae``."""

from pyrovae.app.cli import main

main()
