"""What distributions share: types, and the expansion of those whose parameters broadcast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from pyro.distributions import TorchDistribution
from torch.distributions.constraints import Constraint

#: The shape of a sample or a batch, as torch takes it.
Shape = list[int] | tuple[int, ...]
#: Constraints of arguments, by name.
Constraints = dict[str, Constraint]


class Broadcasting(TorchDistribution):
    """A distribution whose parameters keep their shapes when it is expanded, but for the one that ``wide`` names.

    A scale is often one number, and what depends on it alone is then computed once, not once per pixel.
    """

    wide: ClassVar[str | None] = None
    arg_constraints: ClassVar[Constraints] = {}

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> Self:
        new = self._get_checked_instance(type(self), _instance)
        new.__dict__.update(self.__dict__)
        if self.wide is not None:
            setattr(new, self.wide, getattr(self, self.wide).expand(batch_shape))
        TorchDistribution.__init__(new, torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new
