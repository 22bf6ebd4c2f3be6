r"""The thermodynamic variational objective."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Unpack

import torch
from torch import Tensor

from pyrovae.arguments import positive_int, rising_betas
from pyrovae.engine.gradient import Needs, ParticleWeights, finite_weights
from pyrovae.objectives.base import Objective, Options

_SMALLEST = 0.025  # the first point above 0, in the middle of the range that the paper found best


class TVO(Objective):
    r"""Thermodynamic variational objective: a left Riemann sum of the thermodynamic integral of log p(x).

    .. math:: \log p(x) = \int_0^1 \mathbb E_{\pi_\beta}[\log w]\, d\beta \;\ge\;
              \sum_j (\beta_{j+1} - \beta_j) f_j, \qquad f_j = \sum_k v_{jk} \log w_k, \quad
              v_j = \mathrm{softmax}_k(\beta_j \log w), \quad \pi_\beta \propto q^{1 - \beta} p^\beta

    One partition is the ELBO, many come near IWAE: :math:`\mathrm{ELBO} \le \mathrm{TVO} \le L_K`. Needs no
    reparameterised samples, so that it suits discrete latents: with :math:`D_j = \beta_{j+1} - \beta_j`,

    .. math:: \text{model}_k &= \sum_j D_j v_{jk} [1 + \beta_j (\log w_k - f_j)] \\
              \text{score}_k &= \sum_j D_j v_{jk} \big[{-1} - \beta_j (\log w_k - f_j)
              + \tfrac{K}{K - 1} (\log w_k - f_j)\big]

    The first is the exact gradient of the expected bound; the second is consistent, and exact for one partition.

    :param num_particles: K, at least 2.
    :param betas: increasing, from 0 to 1; or else
    :param partitions: P, for 0 and P log-spaced points from .025 to 1 (P = 1: 0 and 1); 5 by default.
    :raises ValueError: for betas out of order, or given together with partitions; with a gradient other than "total",
        or a kl_weight other than 1.

    >>> TVO(num_particles=2, partitions=1).bound(torch.tensor([[0.0], [-2.0]]))
    tensor([-1.])

    Masrani, Le and Wood (2019), *The thermodynamic variational objective*.
    """

    weighs_kl = False
    needs = Needs(copies="fixed", fixed=True, reinforce=False)  # the guide follows its score alone

    def __init__(
        self,
        num_particles: int = 5,
        betas: Sequence[float] | None = None,
        partitions: int | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(positive_int("num_particles", num_particles, 2), **options)
        if self.gradient != "total":
            raise ValueError(f'TVO has one gradient, got gradient="{self.gradient}": leave it out')
        if betas is not None and partitions is not None:
            raise ValueError(f"give betas or partitions, got {betas} and {partitions}: drop one of the two")
        self.betas = None if betas is None else rising_betas(betas)
        self.partitions = None if partitions is None else positive_int("partitions", partitions)
        self.points = self.betas or _log_spaced(self.partitions or 5)

    @property
    def linear(self) -> bool:
        return len(self.points) == 2

    def bound(self, log_w: Tensor) -> Tensor:
        return sum(step * mean for step, _, _, mean in self._terms(log_w))  # type: ignore[return-value]

    def weights(self, log_w: Tensor) -> ParticleWeights:
        """As in the equations; ``path`` and ``reinforce`` are 0."""
        bound, best = self.bound(log_w.detach()), log_w.detach().amax(0)
        log_w = log_w.detach() - torch.where(torch.isfinite(best), best, 0.0)  # that differences are not rounded
        correction = log_w.shape[0] / (log_w.shape[0] - 1)
        model, score = torch.zeros_like(log_w), torch.zeros_like(log_w)
        for step, beta, v, mean in self._terms(log_w):
            above = torch.where(v > 0, log_w - mean, 0.0)
            model = model + step * v * (1 + beta * above)
            score = score + step * v * (correction * above - 1 - beta * above)
        zero = torch.zeros_like(log_w)
        return finite_weights(ParticleWeights(model, zero, score, zero), bound)

    def _terms(self, log_w: Tensor) -> list[tuple[float, float, Tensor, Tensor]]:
        """D_j, beta_j, v_j and f_j of every partition; a particle of weight 0 counts only where all count alike."""
        terms = []
        for beta, following in pairwise(self.points):
            v = (beta * log_w).softmax(0) if beta else torch.full_like(log_w, 1 / log_w.shape[0])
            terms.append((following - beta, beta, v, torch.where(v > 0, v * log_w, 0.0).sum(0)))
        return terms


def _log_spaced(partitions: int) -> list[float]:
    """0 and P points from the smallest to 1, evenly spaced in their logarithm."""
    last = partitions - 1
    return [0.0, *(_SMALLEST ** ((last - i) / last) if last else 1.0 for i in range(partitions))]
