r"""Power means of weights, of which most bounds are made, and their derivatives in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PowerMeans:
    r"""A weighted sum of power means, each the mean over M groups of neighbours.

    .. math:: L = \sum_c a_c\, \frac1M \sum_m \frac1c \log \frac1K \sum_k w_{mk}^c

    c = 0 is the mean of the log-weights, c = 1 the log of the mean weight, c = inf the largest log-weight. Called with
    log-weights ``[M * K, ...]``, group after group, it is the bound ``[...]``.

    :ivar weights: :math:`a_c` by c.
    :ivar groups: M.
    """

    weights: Mapping[float, float]
    groups: int = 1

    def __call__(self, log_w: Tensor) -> Tensor:
        return self.slope(log_w)[0]

    def linear(self, particles: int) -> bool:
        """Whether, of so many particles, it is the mean of the log-weights."""
        return particles == self.groups or not any(self.weights)

    def slope(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        """L, and d L / d log w_k, shaped like ``log_w``."""
        grouped = self.grouped(log_w)
        value, slope = map(self.total, zip(*(value_and_share(power, grouped) for power in self.weights), strict=True))
        return (value if self.groups == 1 else value.mean(0)), self.flat(slope)

    def curvature(self, log_w: Tensor) -> Tensor:
        """The diagonal d^2 L / d log w_k^2, shaped like ``log_w``."""
        grouped = self.grouped(log_w)
        return self.flat(self.total(bend(power, grouped) for power in self.weights))

    def change(self, log_w: Tensor, target: Tensor) -> Tensor:
        """What L gains, for each k alone, from ``target`` in the place of log w_k; shaped like ``target``."""
        grouped = self.grouped(log_w), self.grouped(target)
        return self.flat(self.total(gain(power, *grouped) for power in self.weights))

    def grouped(self, log_w: Tensor) -> Tensor:
        """Particles of a group first, groups second, where there are several."""
        return log_w if self.groups == 1 else log_w.unflatten(0, (self.groups, -1)).transpose(0, 1)

    def flat(self, each: Tensor) -> Tensor:
        """Of one value per particle of a group, the share of each group in the mean, group after group."""
        return each if self.groups == 1 else each.transpose(0, 1).flatten(0, 1) / self.groups

    def total(self, parts: Iterable[Tensor]) -> Tensor:
        """The weighted sum of one part for each power."""
        weighted = [part if a == 1 else a * part for a, part in zip(self.weights.values(), parts, strict=True)]
        return sum(weighted[1:], weighted[0])


def value_and_share(power: float, log_w: Tensor) -> tuple[Tensor, Tensor]:
    """The power mean over the first axis, and its slope w_k^c / sum_j w_j^c."""
    number = log_w.shape[0]
    if power == 0:
        return log_w.mean(0), torch.full_like(log_w, 1 / number)
    if power == math.inf:
        value, best = log_w.max(0, keepdim=True)
        return value.squeeze(0), torch.zeros_like(log_w).scatter(0, best, 1.0)
    scaled = powers(power, log_w)
    log_sum = scaled.logsumexp(0)
    value = near_mean(power, log_w) if abs(power) < 0.1 else powers(1 / power, log_sum - math.log(number))
    return value, scaled.softmax(0)


def near_mean(power: float, log_w: Tensor) -> Tensor:
    """The power mean at a small power, to the precision of the log-weights themselves."""
    best = (log_w.amax(0) if power > 0 else log_w.amin(0)).detach()
    best = torch.where(torch.isfinite(best), best, 0.0)
    below = power * (log_w - best)  # at most 0, so that neither mean below cancels
    less = below.expm1().mean(0)
    near = less > -0.5
    log_mean = torch.where(
        near, torch.where(near, less, 0.0).log1p(), torch.where(near, 1.0, below.exp().mean(0)).log()
    )
    return best + log_mean / power


def powers(power: float, log_w: Tensor) -> Tensor:
    """The logs of w^c."""
    return log_w if power == 1 else power * log_w


def bend(power: float, log_w: Tensor) -> Tensor:
    """The second derivatives of the power mean."""
    _, s = value_and_share(power, log_w)
    return power * (s - s.square())


def gain(power: float, log_w: Tensor, target: Tensor) -> Tensor:
    """What the power mean gains from ``target`` in the place of log w_k, for each k alone."""
    if power == 0:
        return (target - log_w) / log_w.shape[0]
    if power == math.inf:
        return torch.maximum(target, others(largest, torch.maximum, -math.inf, log_w)) - log_w.amax(0)
    scaled, dead = powers(power, log_w), torch.isneginf(log_w)
    log_sum = scaled.logsumexp(0)
    log_share, step = scaled - log_sum, powers(power, torch.where(dead, 0.0, target - log_w))
    log_new = torch.where(dead, powers(power, target) - log_sum, log_share + step)
    more = torch.where(dead, log_new.exp(), log_share.exp() * step.expm1())
    rest = others(torch.logcumsumexp, torch.logaddexp, -math.inf, log_share)
    return torch.where(more.abs() < 0.5, more.log1p(), torch.logaddexp(rest, log_new)) / power


def others(
    cumulative: Callable[[Tensor, int], Tensor], join: Callable[[Tensor, Tensor], Tensor], empty: float, x: Tensor
) -> Tensor:
    """For each along the first axis the total of all others: of those before and those after, never a difference."""
    edge = torch.full_like(x[:1], empty)
    before = cumulative(torch.cat([edge, x[:-1]]), 0)
    after = cumulative(torch.cat([edge, x[1:].flip(0)]), 0).flip(0)
    return join(before, after)


def largest(x: Tensor, dim: int) -> Tensor:
    """The running maximum."""
    return x.cummax(dim).values
