"""A lock that names the process that writes to a run; the system lets go of it when that process ends, however."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import stat
import time
from pathlib import Path

from pyrovae.errors import ResourceError

try:
    import fcntl
except ImportError:  # a system without: there the file's words alone count
    fcntl = None  # type: ignore[assignment]

FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
HANDLES: set[int] = set()  # of the locks that this process holds


class Lock:
    """A file that one process holds at a time.

    Its words name the holder: host, process, and when that began. What counts is the system's own lock on the file,
    which ends with the process; where a file system has none, a process that the words name and that is alive.

    :raises ResourceError: when it is entered, if another holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.handle = path, -1

    def __enter__(self) -> Lock:
        while not self.in_place:
            self.close()  # of a file that its last holder has just taken away
            self.handle = os.open(self.path, FLAGS, 0o644)  # no link is followed, no pipe waited for
            if not stat.S_ISREG(os.fstat(self.handle).st_mode):
                self.close()
                raise ResourceError(f'"{self.path}" is no lock of a run, as no regular file is: take it away')
            if not self.locks():
                words = os.read(self.handle, 1000).decode("utf-8", errors="replace")
                self.close()
                raise ResourceError(
                    f'"{self.path.parent}" is being written to by another process ({words.strip() or "unnamed"}): wait '
                    "until it ends, or take another folder"
                )
        HANDLES.add(self.handle)
        let_go_in_children()
        with contextlib.suppress(OSError):  # a full disk takes no words, but it takes the lock
            os.ftruncate(self.handle, 0)
            os.lseek(self.handle, 0, os.SEEK_SET)
            os.write(self.handle, json.dumps(this_process()).encode())
        return self

    def __exit__(self, *_: object) -> None:
        if self.in_place:  # the folder may have been moved, and another run be here
            with contextlib.suppress(PermissionError):  # of a system that keeps open files
                self.path.unlink()
        self.close()

    @property
    def in_place(self) -> bool:
        """Whether the file that is held is the one at the path."""
        with contextlib.suppress(OSError):
            return self.handle >= 0 and os.path.samestat(os.fstat(self.handle), os.stat(self.path))
        return False

    def locks(self) -> bool:
        """Whether this process now holds the file."""
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except (AttributeError, OSError):  # a system, or a file system, without locks
            alive = lives(os.read(self.handle, 1000))
            os.lseek(self.handle, 0, os.SEEK_SET)
            return not alive
        return True

    def close(self) -> None:
        if self.handle >= 0:
            os.close(self.handle)
            HANDLES.discard(self.handle)
            self.handle = -1


@functools.cache
def let_go_in_children() -> None:
    """Let no process that is forked from this one, such as a loader's workers, hold its locks after its end."""

    def close() -> None:
        while HANDLES:
            os.close(HANDLES.pop())

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=close)


def this_process() -> dict[str, object]:
    """What names this process among all there ever were."""
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"host": platform.node(), "pid": os.getpid(), "started": started(os.getpid()), "since": now}


def started(pid: int) -> str:
    """When a process began, in ticks since its machine did; nothing where there is no such process, or no /proc."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def lives(words: bytes) -> bool:
    """Whether the process that a lock's words name is alive on this machine, as far as /proc tells."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        said = json.loads(words)
        here = said["host"] == platform.node() and bool(said["started"])
        return here and started(int(said["pid"])) == said["started"]
    return False
