"""A progress bar with time left; silent where there is no terminal."""

from __future__ import annotations

import random


class ProgressBar:
    """Shows how much of ``total`` is done, with a note; ``shown=None`` shows on terminals only."""

    def __init__(self, what: str, total: int | None, shown: bool | None = None) -> None:
        before = random.getstate()
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        random.setstate(before)  # from which rich, while it is imported, draws names of its styles
        console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(), console=console, disable=not (console.is_terminal if shown is None else shown),
        )  # fmt: skip
        self.task = self.bar.add_task(what, total=total, note="")

    def __enter__(self) -> ProgressBar:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def update(self, done: int, note: str = "") -> None:
        self.bar.update(self.task, completed=done, note=note)
