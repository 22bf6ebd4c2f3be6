"""Files that are replaced whole: written aside, then renamed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside ``path`` to write to; at the end it is on disk, and takes the place of ``path`` in one move.

    A reader, and a crash, meet the file of before or the new one. A link is followed, and goes on to point to the file.
    Where something fails, ``path`` is as it was and nothing is left beside it.

    :raises ValueError: ``path`` is there and is no regular file: a folder, a device, a pipe, a circle of links.

    >>> import tempfile
    >>> place = Path(tempfile.mkdtemp(), "notes.txt")
    >>> with replacing(place) as aside:
    ...     _ = aside.write_text("all or nothing")
    >>> place.read_text(), len(list(place.parent.iterdir()))
    ('all or nothing', 1)
    """
    place = Path(os.path.realpath(path))
    if not replaceable(place):
        raise ValueError(f'"{path}" is there and is no regular file, which alone is replaced: name another file')
    aside = place.with_name(f".{place.name[:200]}.{os.getpid()}")
    try:
        yield aside
        sync(aside)
        aside.replace(place)
    finally:
        aside.unlink(missing_ok=True)
    sync(place.parent)


def replaceable(place: Path) -> bool:
    """Whether nothing is there, or a regular file; what is still a link has no end."""
    try:
        return stat.S_ISREG(os.lstat(place).st_mode)
    except FileNotFoundError:
        return True


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    if path.is_dir() and os.name == "nt":  # where no folder can be opened
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
