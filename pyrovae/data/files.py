"""The files that data are read from: regular ones, found, read and fetched whole."""

from __future__ import annotations

import errno
import math
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pyrovae.arguments import one_line
from pyrovae.errors import DataError, ResourceError
from pyrovae.memory import require_memory

OTHER_ROOT = "name another root (--data-dir, $PYROVAE_DATA)"
DEFLATED = 1032  # to one: more than deflate can ever make of a byte
KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip
LACKING = {
    getattr(errno, name)
    for name in ("EACCES", "EPERM", "EIO", "EMFILE", "ENFILE", "ENOMEM", "ENOSPC", "EDQUOT", "EROFS")
    if hasattr(errno, name)
}


def is_lacking(error: BaseException) -> bool:
    """Whether the machine is at fault: memory, permission, disk; not what a file holds."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in LACKING)


@contextmanager
def reading(path: object, fix: str) -> Iterator[None]:
    """Turn whatever a parser raises on a damaged file into one DataError that names the file."""
    try:
        yield
    except (DataError, ResourceError):
        raise
    except Exception as error:
        why = one_line(f"{type(error).__name__}: {error}")
        if is_lacking(error):
            raise ResourceError(f"{path} cannot be read ({why}): see to memory, permissions and disk") from error
        raise DataError(f"{path} cannot be read ({why}): {fix}") from error


def status(path: Path, fix: str) -> os.stat_result:
    """What the system says of a file, links followed; nothing is opened, so that no pipe is waited for."""
    try:
        return path.stat()
    except (OSError, ValueError) as error:
        name = one_line(path, 500)
        if is_lacking(error):
            raise ResourceError(f"{name} cannot be read ({type(error).__name__}): see to its permissions") from error
        link = "a link that leads nowhere" if os.path.islink(path) else "absent"
        raise DataError(f"{name} is {link}: {fix}") from error


def regular(path: Path, fix: str) -> Path:
    """A path, if it is that of a regular file, or of a link to one."""
    if not stat.S_ISREG(mode := status(path, fix).st_mode):
        raise DataError(f"{path} must be a regular file, but is {KINDS.get(stat.S_IFMT(mode), 'none')}: {fix}")
    return path


def find_file(name: str, root: Path, *places: str) -> Path:
    """The first of ``places`` under ``root`` where something is."""
    place = next((place for place in places if os.path.lexists(root / place)), places[0])
    return regular(root / place, f"put {name}'s file there, or {OTHER_ROOT}")


def require(path: Path, declared: Iterable[tuple[tuple[int, ...], int]], stored: int, fix: str) -> None:
    """Refuse arrays, given as shapes and bytes a value, that so many bytes of a file cannot hold, or the memory."""
    values, size = 0, 0
    for shape, item in declared:
        values, size = values + math.prod(shape), size + math.prod(shape) * item
    if size > DEFLATED * stored:
        raise DataError(
            f"{path} cannot be read (its {stored:,} bytes cannot hold the {size:,} that it declares): {fix}"
        )
    floats = torch.get_default_dtype().itemsize
    require_memory(size + floats * values, f"what {path} declares", "take fewer data, or a machine with more memory")


def content_of(path: Path, fix: str) -> bytes:
    """All that a regular file holds, if there is memory for it and for the reals that are made of it."""
    size = regular(path, fix).stat().st_size
    require(path, [((size,), 1)], size, fix)
    return path.read_bytes()
