"""A site's part of a density in which others are summed out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyrovae.engine.stacked import Stacked


class Marginal(TorchDistribution):
    """What a site of a sum brings to it.

    :param share: what counts as its log-probability: of the sites of one sum, one has it all.
    :param given: computes the log-probability of a latent given the latents before it.
    """

    arg_constraints: ClassVar[dict] = {}

    def __init__(self, fn: Any, share: Tensor, given: Callable[[], Tensor] | None = None) -> None:
        self.base_dist, self.share, self.given = fn, share, given
        super().__init__(share.shape, fn.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return self.base_dist.support

    def log_prob(self, value: Tensor) -> Tensor:
        return self.share


def conditional(fn: Distribution) -> Distribution:
    """A latent's distribution given the latents before it: its own, but where others are summed out."""
    if isinstance(fn, Stacked):
        parts = [None if part is None else conditional(part) for part in fn.parts]
        return Stacked(parts, fn.values, fn.nesting) if any(isinstance(p, Marginal) for p in parts) else fn
    return Marginal(fn.base_dist, fn.given()) if isinstance(fn, Marginal) and fn.given else fn
