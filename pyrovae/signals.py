"""Signals that end a process, kept until what must not be cut in two is done."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
Handler = Callable[[int, FrameType | None], object]


def install(handler: Handler) -> dict[signal.Signals, object]:
    """Handle the signals that are not ignored (as under nohup) by ``handler``; what did before."""
    if threading.current_thread() is not threading.main_thread():  # which alone may
        return {}
    heard = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    return {number: signal.signal(number, handler) for number in heard}


def restore(before: dict[signal.Signals, object]) -> None:
    """Handle signals again as before :func:`install`."""
    for number, handler in before.items():
        signal.signal(number, handler)  # type: ignore[arg-type]


def apart() -> None:
    """Put this process, a worker of a loader, into a group of its own.

    A terminal and torchrun send signals to all processes of a group, and torch would have it that a worker was lost, at
    any line of ours. What is sent to a worker alone, as when it is told to leave, it hears. Windows has no groups.
    """
    if hasattr(os, "setpgrp"):
        os.setpgrp()


class Interrupted(KeyboardInterrupt):
    """A signal came, which will do once it is obeyed what it does where nothing keeps it."""


class Signals:
    """The first signal waits until it is obeyed, where ``waits``; a second one does what it does without this.

    :ivar number: of the one that waits, or 0.
    """

    def __init__(self) -> None:
        self.number, self.waits = 0, False
        self.before: dict[signal.Signals, object] = {}

    @contextmanager
    def kept(self) -> Iterator[Signals]:
        """Keep signals inside."""
        self.before = install(self.hear)
        try:
            yield self
            if self.number:
                self.obey()
        except Interrupted:
            self.obey()
            raise
        finally:
            self.release()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let them interrupt what is inside."""
        waits, self.waits = self.waits, False
        try:
            yield
        finally:
            self.waits = waits

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Take a signal in."""
        then = self.before[signal.Signals(number)]
        if not self.waits and callable(then):
            then(number, frame)
            return
        self.release()
        self.number = number
        if not self.waits:
            raise Interrupted

    def release(self) -> None:
        """Handle signals as before, but for those that another handles by now."""
        restore({n: then for n, then in self.before.items() if signal.getsignal(n) == self.hear})

    def obey(self, number: int = 0) -> None:
        """Let the signal that waits do what it does, or the one that another process has heard.

        Where a program goes on after it, those that follow are kept.
        """
        self.release()
        number, self.number = number or self.number, 0
        signal.raise_signal(number)
        self.before = install(self.hear)
