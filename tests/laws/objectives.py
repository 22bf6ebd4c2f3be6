"""Every member of the family, one row each. A new objective joins the laws by adding its row.

A row says, without the engine, what the bound is (``hand``), what it is in expectation for theta and for phi
(``expectation`` and ``phi_expectation`` of K independent particles) and whether its gradient is unbiased.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import pyrovae as pv
from tests.laws.exact import Expectation, maximum, mean, power_mean


class Pessimist(pv.Objective):
    """A user's own objective: one method, everything else derived. (It is Renyi's bound at alpha = 1.25.)"""

    def bound(self, log_w: Tensor) -> Tensor:
        return 4 * (math.log(log_w.shape[0]) - torch.logsumexp(-log_w / 4, 0))


def hand_power(alpha: float) -> Callable[[Tensor], Tensor]:
    return lambda log_w: ((1 - alpha) * log_w).exp().mean(0).log() / (1 - alpha)


def hand_groups(groups: int) -> Callable[[Tensor], Tensor]:
    return lambda log_w: sum(g.exp().mean(0).log() for g in log_w.chunk(groups)) / groups


def hand_mean(log_w: Tensor) -> Tensor:
    return log_w.sum(0) / len(log_w)


iwae, hand_iwae = power_mean(0.0), hand_power(0.0)


@dataclass(frozen=True, eq=False)
class Row:
    """A member: how it is made, and what is true of it."""

    make: Callable[..., pv.Objective]
    kwargs: dict
    hand: Callable[[Tensor], Tensor]
    expectation: Expectation
    particles: int  # that the expectation is over
    phi: tuple[Expectation, int] | None = None  # where the guide follows another bound
    below: bool = True  # a lower bound of log p(x), in expectation

    @property
    def name(self) -> str:
        return repr(self.objective())

    def objective(self) -> pv.Objective:
        return self.make(**self.kwargs)

    @property
    def gradient(self) -> str:
        return self.kwargs.get("gradient", "total")

    @property
    def weighting(self) -> dict[str, float]:
        return {
            "kl_weight": self.kwargs.get("kl_weight", 1.0),
            "likelihood_weight": self.kwargs.get("likelihood_weight", 1.0),
        }

    @property
    def biased(self) -> bool:
        """Whether phi's gradient is known to be biased: stl of a bound that is not linear."""
        return self.gradient == "stl" and self.expectation is not mean and self.particles > 1

    @property
    def weighted(self) -> bool:
        return self.weighting != {"kl_weight": 1.0, "likelihood_weight": 1.0}


def rows(
    make: Callable, kwargs: dict, hand: Callable, expectation: Expectation, particles: int, *options: dict, **more
) -> list[Row]:
    return [Row(make, kwargs | option, hand, expectation, particles, **more) for option in ({}, *options)]


STL, DREG = {"gradient": "stl"}, {"gradient": "dreg"}
KL, LIKELIHOOD = {"kl_weight": 0.5}, {"likelihood_weight": 2.0}

OBJECTIVES: list[Row] = [
    *rows(pv.ELBO, {"num_particles": 1}, hand_mean, mean, 1, STL, KL),
    *rows(pv.ELBO, {"num_particles": 3}, hand_mean, mean, 3, STL, DREG, KL, LIKELIHOOD, KL | STL),
    *rows(pv.IWAE, {"num_particles": 1}, hand_iwae, iwae, 1, DREG),
    *rows(pv.IWAE, {"num_particles": 2}, hand_iwae, iwae, 2),
    *rows(
        pv.IWAE, {"num_particles": 3}, hand_iwae, iwae, 3,
        STL, DREG, KL, LIKELIHOOD, KL | DREG, LIKELIHOOD | DREG, KL | STL,
    ),
    *rows(pv.IWAE, {"num_particles": 8}, hand_iwae, iwae, 8, DREG),
    *rows(pv.Renyi, {"alpha": 0.5, "num_particles": 3}, hand_power(0.5), power_mean(0.5), 3, STL, DREG, KL, KL | DREG),
    *rows(pv.Renyi, {"alpha": 0.0, "num_particles": 3}, hand_iwae, iwae, 3),
    *rows(pv.Renyi, {"alpha": 1.0, "num_particles": 3}, hand_mean, mean, 3, DREG),
    *rows(pv.Renyi, {"alpha": -0.5, "num_particles": 3}, hand_power(-0.5), power_mean(-0.5), 3, DREG, below=False),
    *rows(pv.VRMax, {"num_particles": 3}, lambda log_w: log_w.amax(0), maximum, 3, STL, KL, below=False),
    *rows(pv.MIWAE, {"num_groups": 2, "num_particles": 3}, hand_groups(2), iwae, 3, STL, DREG, KL, KL | DREG),
    *rows(pv.MIWAE, {"num_groups": 3, "num_particles": 2}, hand_groups(3), iwae, 2),
    *rows(pv.PIWAE, {"num_groups": 2, "num_particles": 3}, hand_iwae, iwae, 6, STL, DREG, KL, KL | DREG, phi=(iwae, 3)),
    *rows(pv.PIWAE, {"num_groups": 3, "num_particles": 2}, hand_iwae, iwae, 6, phi=(iwae, 2)),
    *rows(
        pv.CIWAE, {"beta": 0.3, "num_particles": 3}, lambda log_w: 0.3 * hand_mean(log_w) + 0.7 * hand_iwae(log_w),
        lambda mass, log_w, num: 0.3 * mean(mass, log_w, num) + 0.7 * iwae(mass, log_w, num), 3,
        STL, DREG, KL, KL | DREG,
    ),
    *rows(pv.VIMCO, {"num_particles": 3}, hand_iwae, iwae, 3),
    *rows(Pessimist, {"num_particles": 2}, hand_power(1.25), power_mean(1.25), 2, DREG),
]  # fmt: skip
