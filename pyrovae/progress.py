"""A progress bar with nats, images per second and time left; silent where there is no terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar:
    """Shows epochs done; ``shown=None`` shows on terminals only."""

    def __init__(self, epochs: int, shown: bool | None = None) -> None:
        console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[nats]}"),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (console.is_terminal if shown is None else shown),
        )
        self.task = self.bar.add_task("epoch", total=epochs, nats="", speed="")

    def __enter__(self) -> ProgressBar:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def update(self, epoch: int, bound: float, images_per_second: float) -> None:
        """Say that ``epoch`` epochs are done, with the bound in nats per datum."""
        speed = f"{images_per_second:,.0f} images/s"
        self.bar.update(self.task, completed=epoch, nats=f"{bound:.2f} nats", speed=speed)
