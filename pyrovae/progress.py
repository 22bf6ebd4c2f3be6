"""A progress bar with time left, on terminals and in notebooks; silent elsewhere."""

from __future__ import annotations

import random
import sys
import time
from html import escape
from typing import Any
from uuid import uuid4

OFTEN = 0.1  # seconds between two pictures of a notebook's bar


class ProgressBar:
    """Shows how much of ``total`` is done, with a note; ``shown=None`` shows on terminals and in notebooks only."""

    def __init__(self, what: str, total: int | None, shown: bool | None = None) -> None:
        self.bar = Page(what, total) if shown is not False and in_notebook() else Terminal(what, total, shown)

    def __enter__(self) -> ProgressBar:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def update(self, done: int, note: str = "") -> None:
        self.bar.update(done, note)


class Terminal:
    """A bar that rich draws."""

    def __init__(self, what: str, total: int | None, shown: bool | None) -> None:
        before = random.getstate()
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        random.setstate(before)  # from which rich, while it is imported, draws names of its styles
        console = Console(stderr=True, force_jupyter=False)
        shown = console.is_terminal if shown is None else shown
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(), console=console, disable=not shown,
        )  # fmt: skip
        self.task = self.bar.add_task(what, total=total, note="")
        # rich before 14.3 ends a bar that is not shown by an empty line.
        self.start = self.bar.start if shown else lambda: None
        self.stop = self.bar.stop if shown else lambda: None

    def update(self, done: int, note: str) -> None:
        self.bar.update(self.task, completed=done, note=note)


class Page:
    """A bar in the output of a notebook's cell, one element that changes; it goes away at the end."""

    def __init__(self, what: str, total: int | None) -> None:
        self.what, self.total, self.name = what, total, f"pyrovae-{uuid4()}"
        self.began = self.drawn = time.monotonic()

    def start(self) -> None:
        self.draw(self.what, update=False)

    def stop(self) -> None:
        self.draw("")

    def update(self, done: int, note: str) -> None:
        now = time.monotonic()
        if now - self.drawn < OFTEN and done != self.total:
            return
        self.drawn, left = now, ""
        if self.total and done:
            left = f", {(now - self.began) * (self.total - done) / done:.0f} s left"
        self.draw(f"{self.what} {done}{f'/{self.total}' if self.total else ''} {note}{left}", done)

    def draw(self, said: str, done: int = 0, *, update: bool = True) -> None:
        """Show a line, beside a bar; nothing for an empty one."""
        from IPython.display import display

        known = f' value="{done}" max="{self.total}"' if self.total else ""
        shown = {"text/plain": said, "text/html": f"<progress{known}></progress> {escape(said)}" if said else ""}
        display(shown, raw=True, display_id=self.name, update=update)


def in_notebook() -> bool:
    """Whether what is displayed goes to a notebook; nothing is imported to find out."""
    shell: Any = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")
