"""How many threads a training step gets: as many as have work in it, of those that torch may use."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

#: Multiplications of a step that are worth one thread more: half a millisecond. It gains little from fewer where each
#: has a core for itself, and loses a multiple of the time where another process has it.
PER_THREAD = 2.5e7


def threads_for(modules: Iterable[nn.Module], rows: int, processes: int = 1) -> int:
    """The threads that a step on so many rows (data times particles) keeps busy, beside as many other processes.

    Its two passes multiply each weight of a linear layer three times a row. Layers of other kinds use theirs more
    often; with one of them, as without any layer, the number is torch's.
    """
    layers = {m for root in modules for m in root.modules() if any(map(is_weight, m.parameters(recurse=False)))}
    most = torch.get_num_threads() if processes == 1 else min(torch.get_num_threads(), max(1, cores() // processes))
    if not layers or any(type(layer) is not nn.Linear for layer in layers):
        return most
    multiplications = 3 * rows * sum(p.numel() for layer in layers for p in layer.parameters())
    return min(most, 1 + int(multiplications / PER_THREAD))


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_weight(parameter: Tensor) -> bool:
    """Whether something is multiplied by it, as far as one can say before it is made."""
    return is_lazy(parameter) or parameter.dim() > 1


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Let torch use so many inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
