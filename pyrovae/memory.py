"""What to do when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed, on any device."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


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
