"""One site of several runs, its distributions and values stacked as if the particles had run together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints


class Stacked(TorchDistribution):
    """The distributions of a site in each run, ``[K, *[size or 1] * nesting]``; None for a run without the site."""

    arg_constraints: ClassVar[dict] = {}

    def __init__(self, parts: Sequence[Any], values: Sequence[Tensor | None], nesting: int) -> None:
        self.parts, self.values, self.nesting = parts, values, nesting
        present = [part for part in parts if part is not None]
        self.base_dist, self.has_rsample = present[0], all(part.has_rsample for part in present)
        inner = self.base_dist.batch_shape
        batch_shape = torch.Size((len(parts), *[1] * (nesting - len(inner)), *inner))
        super().__init__(batch_shape, self.base_dist.event_shape, validate_args=False)
        self.value = stack(values, nesting, self.event_dim)

    @property
    def support(self) -> constraints.Constraint:
        return self.base_dist.support

    def split(self, value: Tensor) -> list[Tensor | None]:
        """The value of each run, shaped as there, with what it carries; what was drawn there is the same tensor."""
        if value is self.value:
            return list(self.values)
        pairs = zip(self.values, value, strict=True)
        found = [None if drawn is None else of_run.reshape(drawn.shape) for drawn, of_run in pairs]
        for name, more in vars(value).items():
            for own, carried in zip(found, self.split(more), strict=True):
                if own is not None:
                    setattr(own, name, carried)
        return found

    def each(self, of: Callable[[Any, Tensor], Tensor], value: Tensor) -> Tensor:
        """What ``of`` says of every run's distribution and value, stacked; 0 for a run without the site."""
        pairs = zip(self.parts, self.split(value), strict=True)
        return stack([None if own is None else of(part, own) for part, own in pairs], self.nesting)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.each(lambda part, own: part.log_prob(own), value)


def stack(values: Sequence[Tensor | None], nesting: int, event_dim: int = 0) -> Tensor:
    """Tensors of several runs, ``[K, *[size or 1] * nesting, *event]``, with what they carry; 0 where there is none."""
    known = [v for v in values if v is not None]
    found = torch.stack([torch.zeros_like(known[0]) if v is None else v for v in values])
    found = found.reshape(len(values), *[1] * (nesting + event_dim - known[0].dim()), *known[0].shape)
    for name in vars(known[0]):
        setattr(found, name, stack([None if v is None else getattr(v, name) for v in values], nesting, event_dim))
    return found
