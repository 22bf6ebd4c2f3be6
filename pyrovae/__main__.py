"""``python -m pyrovae``, and the command ``pyrovae``."""

from pyrovae.app.process import begin


def main() -> None:
    """Run the command line, after what must be so before all that takes seconds to import."""
    begin()
    from pyrovae.app.cli import main

    main()


if __name__ == "__main__":
    main()
