"""What this machine compiled before: an empty file for each kind of graph, beside the cache that Inductor keeps."""

from __future__ import annotations

import getpass
import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path

import torch


def is_known(kind: object) -> bool:
    """Whether a graph of a kind was compiled here, by these versions and for as many threads."""
    with suppress(OSError, KeyError):
        return note_of(kind).is_file()
    return False


def remember(kind: object) -> None:
    """Note that a graph of a kind was compiled; a disk that takes no note is as good as none."""
    with suppress(OSError, KeyError):
        note = note_of(kind)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()


def note_of(kind: object) -> Path:
    """The file that says so."""
    from pyrovae import __version__

    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}"
    said = repr(
        (__version__, torch.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), kind)
    )
    return Path(cache, "pyrovae", hashlib.sha256(said.encode()).hexdigest())
