"""Contrastive divergence: chains of a restricted Boltzmann machine that stand for its distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from pyrovae.data.feed import Feed
from pyrovae.models.partition import bits

if TYPE_CHECKING:
    from pyrovae.models.rbm import RBM


class Equilibrium(TorchDistribution):
    r"""The marginal p(v) of an :class:`RBM`.

    ``sample`` runs one chain per draw, from noise through ``rbm.burn_in`` Gibbs steps; an approximation, like all of a
    chain's draws. ``mean`` is P(v | h) at the last step of the chains drawn last (of new ones, where none were): what
    to look at, less noisy than a draw, and not the mean over chains.

    >>> from pyrovae.models import RBM
    >>> Equilibrium(RBM((1, 4, 4), 8), torch.Size([5])).sample().shape
    torch.Size([5, 1, 4, 4])
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, rbm: RBM, batch_shape: torch.Size, validate_args: bool | None = None) -> None:
        self.rbm = rbm
        self._last: Tensor | None = None
        super().__init__(batch_shape, torch.Size(rbm.input_shape), validate_args=validate_args)

    @property
    def support(self) -> Any:
        """Zeros and ones."""
        return constraints.independent(constraints.boolean, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> Equilibrium:
        return Equilibrium(self.rbm, torch.Size(batch_shape), validate_args=self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(v), in nats."""
        if self._validate_args:
            self.rbm._check_bits(value)
        log_p = self.rbm._log_prob(value)
        return log_p.expand(torch.broadcast_shapes(log_p.shape, self.batch_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """One chain per draw."""
        shape = self._extended_shape(sample_shape)
        noise = torch.rand(shape, dtype=self.rbm.weight.dtype, device=self.rbm.weight.device).round()
        v = self.rbm.gibbs(noise, self.rbm.burn_in)
        self._last = self.rbm.decode(bits(self.rbm.encode(v)))
        return bits(self._last)

    @property
    def mean(self) -> Tensor:
        """P(v | h) of the chains drawn last."""
        if self._last is None:
            self.sample()
        assert self._last is not None
        return self._last


def _mean(feed: Feed) -> Tensor:
    """The data's mean, ``[num_visible]``, in float64."""
    total, number = 0.0, 0
    for v, *_ in feed:
        total, number = total + v.flatten(1).sum(0, dtype=torch.float64), number + len(v)
    return torch.as_tensor(total / number)
