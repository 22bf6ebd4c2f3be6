r"""Hamiltonian Monte Carlo: many chains at once, on any log-density that is differentiable in its latents.

.. math:: H(u, p) = -\log f(u) + \tfrac12 \sum_i p_i^2, \qquad
          p \leftarrow p + \tfrac{\varepsilon}{2} \nabla \log f(u), \quad u \leftarrow u + \varepsilon p, \quad
          p \leftarrow p + \tfrac{\varepsilon}{2} \nabla \log f(u)

and the end of :math:`L` such steps is accepted with probability :math:`\min(1, e^{H(u, p) - H(u', p')})`.

Neal (2011), *MCMC using Hamiltonian dynamics*.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor

from pyrovae.engine.particles import Layout

State = dict[str, Tensor]

WARM_UP, VISITS, TRIES = 40, 100, 2  # of the pilot: transitions at first, densities visited, at each
GAINS = 0.5, 0.2  # of log step size per unit of acceptance, at first and later
WINDOW = 5  # visited densities on each side over which log step sizes are averaged


#: At a state of the chains: a log-density and what else goes where the chains go, both ``[C, *plates]``, and the
#: gradient of the log-density in every latent, in order.
LogDensity = Callable[[State], list[Tensor]]


@dataclass(frozen=True)
class HMC:
    """Transitions of chains in unconstrained space.

    :param layout: where chains and data lie in the tensors of a run.
    :param event_dims: of each latent.
    :param leapfrog_steps: L.
    """

    layout: Layout
    event_dims: dict[str, int]
    leapfrog_steps: int

    def transition(self, density: LogDensity, u: State, step: Tensor) -> tuple[State, Tensor, Tensor]:
        """Leave ``density`` invariant, with steps of the sizes ``step``, one for each datum.

        :return: the chains afterwards, what they carry, and which of them were accepted.
        """
        sizes = {name: self.layout.spread(step, self.event_dims[name]) for name in u}
        p = {name: torch.randn_like(point) for name, point in u.items()}
        log_density, before, *slopes = density(u)
        energy = log_density - self.kinetic(p)
        moved = u
        for _ in range(self.leapfrog_steps):
            p = {name: p[name] + 0.5 * sizes[name] * slope for name, slope in zip(u, slopes, strict=True)}
            moved = {name: moved[name] + sizes[name] * p[name] for name in u}
            log_density, after, *slopes = density(moved)
            p = {name: p[name] + 0.5 * sizes[name] * slope for name, slope in zip(u, slopes, strict=True)}
        log_ratio = (log_density - self.kinetic(p) - energy).nan_to_num(-math.inf)
        accepted = torch.rand_like(log_ratio).log() < log_ratio
        taken = {name: self.layout.spread(accepted, self.event_dims[name]) for name in u}
        state = {name: torch.where(taken[name], moved[name], u[name]) for name in u}
        return state, torch.where(accepted, after, before), accepted

    def kinetic(self, momentum: State) -> Tensor:
        """Half the squared momentum of each chain, ``[C, *plates]``."""
        parts = [self.layout.reduce(sum_rightmost(0.5 * p.square(), self.event_dims[n])) for n, p in momentum.items()]
        return self.layout.expand(sum(parts[1:], parts[0]))

    def pilot(
        self, density: Callable[[int], LogDensity], number: int, u: State, log_step: Tensor, target: float
    ) -> Tensor:
        """Step sizes for the densities 1, ..., ``number``, which change slowly: ``[number, *log_step.shape]``.

        Some of them are visited in order; log step sizes follow the acceptance towards ``target``, and are averaged.

        :param log_step: the log step sizes to begin with, ``[1, *plates]``.
        """
        visited = sorted({round(1 + (number - 1) * i / VISITS) for i in range(VISITS + 1)})
        found = []
        for t in visited:
            for _ in range(TRIES if t > 1 else WARM_UP):
                u, _, accepted = self.transition(density(t), u, log_step.exp())
                acceptance = accepted.to(log_step.dtype).mean(0, keepdim=True)
                log_step = log_step + GAINS[t > 1] * (acceptance - target)
            found.append(log_step)
        at = torch.tensor(visited, device=log_step.device)
        index = torch.searchsorted(at, torch.arange(1, number + 1, device=at.device))
        around = [found[max(0, i - WINDOW) : i + WINDOW + 1] for i in range(len(found))]
        return torch.stack([torch.stack(rows).mean(0) for rows in around])[index].exp()
