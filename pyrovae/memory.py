"""Memory: what fits, keeping it where that saves time, and what to do when it runs out."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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


MEMORY = 2 * 2**30  # bytes that one evaluation may take


WORKING_SET = {"cpu": 48 * 2**20, "cuda": 2**30}  # larger passes gain nothing: they leave the caches


class _PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.holders: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            pointer = tensor.untyped_storage().data_ptr() if isinstance(tensor, Tensor) else 0
            if pointer and (pointer in self.holders or pointer not in given):  # not a view of a parameter, say
                self._hold(tensor)
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        self.now += 0 if self.holders.get(pointer) else size
        self.holders[pointer] = self.holders.get(pointer, 0) + 1
        self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self._release, pointer, size)

    def _release(self, pointer: int, size: int) -> None:
        self.holders[pointer] -= 1
        if not self.holders[pointer]:
            del self.holders[pointer]
            self.now -= size


def _fitting_chunk(bytes_per_particle: float, memory: int, batch: tuple[Any, ...]) -> int:
    device = next((a.device.type for a in batch if isinstance(a, Tensor)), "cpu")
    budget = min(memory, WORKING_SET.get(device, WORKING_SET["cpu"]))
    return max(1, int(budget / max(bytes_per_particle, 1)))
