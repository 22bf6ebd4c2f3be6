"""Compiled functions that are never silently wrong: compared with the eager ones on the same noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyrovae.compile.noise import CannotCompile
from pyrovae.engine.probe import Reach


def check_compile(compile: bool | str) -> None:
    """Refuse anything but "auto", True and False."""
    if compile not in ("auto", True, False):
        raise ValueError(f'compile must be "auto", True or False, got {compile!r}: pass one of these')


def compare(expected: list[Tensor], got: list[Tensor], precision: str = "float32") -> None:
    """Refuse a compiled function whose results differ from the eager ones by more than rounding explains.

    The first result is a loss (or the only result); the norm of all the others sets the scale on which each counts.
    """
    total = math.sqrt(sum(float(e.double().square().sum()) for e in expected[1:]))
    for e, g in zip(expected, got, strict=True):
        if not e.is_floating_point():
            e, g = e.double(), g.double()
        if not torch.isfinite(e).all():
            continue  # there is nothing to compare; training reports it
        tolerance = 0.1 if precision == "bfloat16" else 10 * math.sqrt(torch.finfo(e.dtype).eps)
        error, size = float((e - g).double().norm()), float(e.double().norm())
        if not error <= tolerance * max(size, 1e-3 * total):
            raise CannotCompile(f"compiled and eager results differ: by {error:.3g} in a tensor of norm {size:.3g}")


def signature(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a graph is made for: the kinds of the tensors, and all else as it is."""
    return tuple((a.shape, a.dtype, a.device) if isinstance(a, Tensor) else a for a in batch)


def tensors(batch: tuple[Any, ...]) -> list[Tensor]:
    """The tensors of a batch."""
    return [a for a in batch if isinstance(a, Tensor)]


def _distinct(many: Iterable[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in many}.values())


@contextmanager
def untouched(pair: Reach) -> Iterator[None]:
    """Leave parameters and buffers as they were: their values, and which tensors they are."""
    buffers = [(m, dict(m._buffers)) for root in pair.modules for m in root.modules() if m._buffers]
    owned = [b for _, named in buffers for b in named.values() if b is not None]
    values = [(t, t.detach().clone()) for t in _distinct([*pair.tensors.values(), *owned])]
    try:
        yield
        for module, named in buffers:
            for name, then in named.items():
                if module._buffers.get(name) is not then:
                    raise CannotCompile(f'{type(module).__name__} replaces its buffer "{name}": change it in place')
    finally:
        for module, named in buffers:
            module._buffers.update(named)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
