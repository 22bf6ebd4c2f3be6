"""The types of numbers that programs take: data are matched to them, alike wherever programs are run on data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyrovae.engine.programs import Batch, Program, held_by, leaves
from pyrovae.errors import is_out_of_memory

T = TypeVar("T")


@dataclass(frozen=True)
class Taken:
    """How programs take data: reals of one type, and integers as they come or, where they lead a batch, as reals.

    :ivar dtype: of reals; None leaves them as they are.
    :ivar integers: of integers and booleans in the first argument; None keeps them.

    >>> Taken(torch.float32, torch.float32)((torch.tensor([0, 255], dtype=torch.uint8), torch.tensor([3, 1])))
    (tensor([  0., 255.]), tensor([3, 1]))
    """

    dtype: torch.dtype | None = None
    integers: torch.dtype | None = None

    def __call__(self, batch: Batch) -> Batch:
        given, structure = (batch, None) if all(type(a) is Tensor for a in batch) else tree_flatten(batch)
        taken = [self.matched(a, first=i == 0) if isinstance(a, Tensor) else a for i, a in enumerate(given)]
        return tuple(taken) if structure is None else tree_unflatten(taken, structure)

    def matched(self, a: Tensor, *, first: bool = True) -> Tensor:
        """One argument, as it is taken."""
        kind = self.dtype if a.is_floating_point() else self.integers if first and not a.is_complex() else None
        return a if kind is None else a.to(kind)


def ways(*programs: Program) -> Iterator[Taken]:
    """How programs may take data, the likeliest first: as reals like most of their parameters, where those are known.

    Integers become reals but for programs that need them: those that embed what they are given.
    """
    default = torch.get_default_dtype()
    held = Counter[torch.dtype]()
    for tensor in held_by(*programs):
        if tensor.is_floating_point():
            held[tensor.dtype] += 0 if is_lazy(tensor) else tensor.numel()
    unknown: list[torch.dtype | None] = [None, default, torch.float32, torch.float64]
    known = [dtype for dtype, _ in held.most_common()] or unknown
    yield from (Taken(dtype, dtype or default) for dtype in known)
    yield from (Taken(dtype, integers) for integers in (torch.int64, None) for dtype in known)


def first_way(batch: Batch, run: Callable[[Batch], T], *programs: Program) -> tuple[Taken, T]:
    """The first way in which programs take a batch without an error of types, and what running them so gives.

    Where there is none, the error of the likeliest way is raised.
    """
    failed: dict[tuple[object, ...], Exception] = {}
    for taken in ways(*programs):
        given = taken(batch)
        kinds = tuple(a.dtype for a in leaves(given) if isinstance(a, Tensor))
        if kinds in failed:
            continue
        try:
            return taken, run(given)
        except (RuntimeError, IndexError, TypeError) as error:
            if is_out_of_memory(error):
                raise
            failed[kinds] = error
    raise next(iter(failed.values()))


def listed(data: object) -> object:
    """A list of numbers, or of rows of them, as an array; anything else as it is."""
    if not isinstance(data, list) or any(isinstance(row, Tensor) for row in data):
        return data
    with suppress(ValueError):  # rows of different lengths
        array = np.asarray(data)
        return array if array.size and array.dtype.kind in "buif" else data
    return data


def exactly(data: object) -> object:
    """Arrays and lists of numbers as tensors that hold the same numbers, columns of those too; the rest as it is."""
    if type(data) is tuple:
        return tuple(map(exactly, data))
    if isinstance(data, Mapping):
        return {name: exactly(a) if isinstance(a, np.ndarray | Tensor) else a for name, a in data.items()}
    array = listed(data)
    if isinstance(array, Tensor) and array.is_inference():  # through which no derivative may go
        return array.clone()
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "buif" or np.ma.is_masked(array):
        return array
    if array.dtype in (np.longdouble, np.uint64):
        return array
    kept = array.dtype.newbyteorder("=") if array.dtype.kind in "bf" or array.dtype == np.uint8 else np.int64
    return torch.from_numpy(np.array(array, kept, order="C"))
