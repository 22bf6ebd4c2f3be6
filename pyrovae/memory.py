"""Memory: keeping it where that saves time, and what to do when it runs out."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on any device."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


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


@contextmanager
def memory_advice(advice: Callable[[], str]) -> Iterator[None]:
    """Say what to lower where memory runs out; what was asked for is in the error's own words."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        free = ""
        if torch.cuda.is_initialized():
            free = " ({:.1f} of {:.1f} GiB were free)".format(*(b / 2**30 for b in torch.cuda.mem_get_info()))
        raise torch.OutOfMemoryError(f"out of memory{free}: {advice()}. {error}") from error
