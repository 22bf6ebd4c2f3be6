"""The command as a process: signals, memory, its standard streams. Nothing here takes time to import."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from pyrovae.signals import install, restore

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
SPELT = {"±": "+/-", "≤": "<=", "…": "..."}  # where a stream's encoding lacks it
NARROW = 20  # columns


def begin() -> None:
    """Let a signal end the process in one line, and open a standard stream that is closed on nothing.

    Else the next file that is opened would be taken for that stream. Threads that wait for each other are to sleep
    soon: those that turn in circles hold up others where they share cores, and those that sleep at once wake up late.
    """
    install(end_at_once)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if os.environ.get("COLUMNS", "").isdigit() and int(os.environ["COLUMNS"]) < NARROW:
        del os.environ["COLUMNS"]  # nothing can be printed in such a width
    while os.open(os.devnull, os.O_RDWR) <= 2:
        pass


def end_at_once(number: int, _: object) -> None:
    """Say that a signal ended the process, and end it."""
    with suppress(OSError):
        os.write(2, f"error: {WORDS.get(signal.Signals(number), 'stopped')}\n".encode())
    os._exit(128 + number)


@contextmanager
def at_once() -> Iterator[None]:
    """Let a signal end the process meanwhile: while modules are imported, an exception may go unheard."""
    before = install(end_at_once)
    try:
        yield
    finally:
        restore(before)


def keep_freed_memory() -> None:
    """Let this process keep what it frees, for a step to find it again in the next: each new page costs a fault.

    It is what ``MALLOC_TRIM_THRESHOLD_`` and ``MALLOC_MMAP_MAX_`` set before a process starts; for glibc only.
    """
    trim_threshold, mmap_max = -1, -4  # mallopt(3)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, another system
        return
    mallopt(trim_threshold, -1)
    mallopt(mmap_max, 0)


class Stopped(KeyboardInterrupt):
    """A signal came. (Where it is a plain KeyboardInterrupt, caught or not, Python may end as if by SIGINT.)"""


class Stop:
    """The signal that stopped a command, if one did: the first raises :class:`Stopped`, a second ends the process."""

    def __init__(self) -> None:
        self.number = 0

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        before = install(self.hear)
        try:
            yield self
        finally:
            restore(before)

    def hear(self, number: int, _: object) -> None:
        install(end_at_once)
        self.number = number
        raise Stopped

    @property
    def code(self) -> int:
        return 128 + (self.number or signal.SIGINT)

    @property
    def word(self) -> str:
        return WORDS.get(signal.Signals(self.number or signal.SIGINT), "stopped")


class Patient:
    """A standard stream for work that must not stop where nobody listens: what went wrong is kept in ``error``.

    What its encoding cannot say, such as a path that is no text, is spelt out.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        self.error: OSError | None = None if stream is not None else OSError(errno.EBADF, os.strerror(errno.EBADF))

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def isatty(self) -> bool:
        return self.stream is not None and self.stream.isatty()

    def write(self, text: str) -> int:
        if self.stream is not None and self.error is None:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                self.write("".join(map(self.spelt, text)))
            except OSError as error:
                self.fail(error)
        return len(text)

    def spelt(self, character: str) -> str:
        """A character as the stream's encoding can say it."""
        encoding = getattr(self.stream, "encoding", None) or "ascii"
        try:
            return character.encode(encoding).decode(encoding)
        except UnicodeEncodeError:
            return SPELT.get(character) or character.encode(encoding, "backslashreplace").decode(encoding)

    def flush(self) -> None:
        if self.stream is not None and self.error is None:
            try:
                self.stream.flush()
            except OSError as error:
                self.fail(error)

    def fail(self, error: OSError) -> None:
        """Keep the error; what the stream still holds goes nowhere, or the interpreter would complain at its end."""
        self.error = error
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())  # type: ignore[union-attr]
            os.close(nowhere)

    @property
    def lost(self) -> OSError | None:
        """The error, unless it is only that the reader has seen enough, as ``head`` has."""
        self.flush()
        return None if self.error is None or self.error.errno == errno.EPIPE else self.error
