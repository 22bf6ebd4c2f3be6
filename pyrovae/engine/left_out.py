"""Data without a bound: a training step leaves them out, and counts them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

LOSSES: ContextVar[list[Tensor] | None] = ContextVar("LOSSES", default=None)


@contextmanager
def leaving_out() -> Iterator[list[Tensor]]:
    """Inside, losses leave out the data whose bound is -inf; of each loss, how many they were."""
    counts: list[Tensor] = []
    token = LOSSES.set(counts)
    try:
        yield counts
    finally:
        LOSSES.reset(token)


def kept(bound: Tensor) -> Tensor:
    """The bounds ``[*plates]`` of a training step's data, 0 for those left out; NaN for these where none is left.

    The others' loss stays a sum over all data, each of them with the weight that it would have beside any others: a
    mean over those that are left would weigh them by what the rest of their batch is like.
    """
    counts = LOSSES.get()
    if counts is None:
        return bound
    dead = bound == -math.inf
    counts.append((dead.reshape(-1, dead.shape[-1]).any(0) if dead.dim() > 1 else dead).sum())
    return torch.where(dead, 0.0 * bound.detach().amax(), bound)
