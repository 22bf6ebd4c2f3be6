r"""Sums of weights: the log of their mean, its error, the effective sample size, and the shape of their tail."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TIED = 1e-3  # between logs of weights that are equal but for rounding
SHARE = 0.1  # of a sum, which matters


def log_mean_exp(log_w: Tensor) -> Tensor:
    r""":math:`\log \frac1K \sum_k w_k` over the first axis."""
    return torch.logsumexp(log_w, 0) - math.log(log_w.shape[0])


@dataclass(frozen=True)
class Sums:
    r"""The logs of :math:`\sum_s w_s` and :math:`\sum_s w_s^2` over ``number`` weights, and what follows from them."""

    log_sum: Tensor
    log_sum_squares: Tensor
    number: int

    @classmethod
    def of(cls, log_w: Tensor) -> Sums:
        """The sums over the first axis."""
        return cls(torch.logsumexp(log_w, 0), torch.logsumexp(2 * log_w, 0), len(log_w))

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            torch.logaddexp(self.log_sum, other.log_sum),
            torch.logaddexp(self.log_sum_squares, other.log_sum_squares),
            self.number + other.number,
        )

    @property
    def log_mean(self) -> Tensor:
        r""":math:`\log \frac1S \sum_s w_s`."""
        return self.log_sum - math.log(self.number)

    @property
    def ess(self) -> Tensor:
        r"""The effective sample size :math:`(\sum_s w_s)^2 / \sum_s w_s^2`; 0 where every weight is."""
        return torch.where(torch.isneginf(self.log_sum), 0.0, (2 * self.log_sum - self.log_sum_squares).exp())

    @property
    def std_error(self) -> Tensor:
        r"""The standard error of :attr:`log_mean` by the delta method; infinite where nothing can be said.

        .. math:: \Big(\frac{S / \mathrm{ESS} - 1}{S - 1}\Big)^{1/2}
        """
        if self.number == 1:
            return torch.full_like(self.log_sum, math.inf)
        variance = (self.number / self.ess - 1).clamp(min=0) / (self.number - 1)
        return torch.where(torch.isneginf(self.log_sum), math.inf, variance.sqrt())


@dataclass(frozen=True)
class Top:
    """The log of the largest of some weights, and how many of them are as large, to a thousandth."""

    log_w: Tensor
    number: Tensor

    @classmethod
    def of(cls, log_w: Tensor) -> Top:
        """The largest along the first axis."""
        top = log_w.max(0).values
        return cls(top, (log_w >= top - TIED).sum(0))

    def __add__(self, other: Top) -> Top:
        top = torch.maximum(self.log_w, other.log_w)
        mine, others = (torch.where(t.log_w >= top - TIED, t.number, 0) for t in (self, other))
        return Top(top, mine + others)

    def draws(self, sums: Sums) -> Tensor:
        """How many draws the sum rests on: as many as hold the largest weight, if these are a tenth of it; or the ESS.

        A value that was drawn so few times may as well have been drawn once more, or not at all.
        """
        share = (self.number.double().log() + self.log_w - sums.log_sum).exp()
        return torch.where(share > SHARE, self.number.minimum(sums.ess), sums.ess)


class Tally:
    """Running sums of ``number`` weights in float64, with the largest ones kept for the Pareto fit.

    Of ``discrete`` latents, whose weights are tied, there is none; what counts is how many draws hold the largest one.
    """

    def __init__(self, number: int, *, discrete: bool = False) -> None:
        self.number, self.keep, self.discrete = number, min(tail_size(number) + 1, number), discrete
        self.pending: list[Tensor] = []
        self.merged: Sums | None = None
        self.largest: Tensor | None = None
        self.top: Top | None = None

    def add(self, log_w: Tensor) -> None:
        """Let log-weights ``[some, *plates]`` in."""
        self.pending.append(log_w.double())
        if sum(map(len, self.pending)) >= 4 * self.keep:  # merging is dear in small portions
            self.merge()

    def merge(self) -> None:
        """Add up what has come in."""
        log_w, self.pending = torch.cat(self.pending), []
        self.merged = Sums.of(log_w) if self.merged is None else self.merged + Sums.of(log_w)
        if self.discrete:
            self.top = Top.of(log_w) if self.top is None else self.top + Top.of(log_w)
            return
        candidates = log_w if self.largest is None else torch.cat([self.largest, log_w])
        self.largest = candidates.movedim(0, -1).topk(min(self.keep, len(candidates)), -1).values.movedim(-1, 0)

    def results(self) -> tuple[Sums, Tensor, Tensor]:
        """The sums of all weights, Pareto k (NaN for discrete latents), and the draws they rest on (NaN for others)."""
        if self.pending:
            self.merge()
        assert self.merged is not None
        unknown = torch.full_like(self.merged.log_sum, math.nan)
        if self.top is not None:
            return self.merged, unknown, self.top.draws(self.merged)
        assert self.largest is not None
        k = pareto_k(self.largest.reshape(self.keep, -1).T, self.number)
        return self.merged, k.view_as(self.merged.log_sum), unknown


def tail_size(num_samples: int) -> int:
    """The number of largest weights that the Pareto fit looks at."""
    return math.ceil(min(num_samples / 5, 3 * math.sqrt(num_samples)))


def grid_size(tail: int) -> int:
    """The number of shapes that the Pareto fit of a tail weighs."""
    return 30 + int(math.sqrt(tail))


def fit_bytes(num_samples: int) -> int:
    """What the Pareto fit of one datum takes: its tail at every point of the grid, in three arrays of float64."""
    tail = tail_size(num_samples)
    return 24 * tail * grid_size(tail)


PART = 2**27  # bytes that the fits of several data may take at once


def pareto_k(largest: Tensor, num_samples: int) -> Tensor:
    r"""Shape :math:`\hat k` of the generalised Pareto distribution fitted to the weights' right tail, ``[B]``.

    Above 0.7 the importance-sampling estimate and its standard error cannot be trusted. Equal to ``psislw`` of ArviZ
    0.23; infinite where four or fewer weights make up the tail, but -inf where that is full of the largest weight:
    nothing exceeds it.

    :param largest: the ``tail_size(num_samples) + 1`` largest log-weights of each datum, ``[B, M + 1]``, descending.
    :param num_samples: S, how many weights there were in all.

    Vehtari, Simpson, Gelman, Yao, Gabry (2024), *Pareto smoothed importance sampling*; Zhang and Stephens (2009).

    >>> log_w = torch.arange(100.0).log().flip(0)[None]  # weights 99, 98, ..., 0
    >>> bool(pareto_k(log_w[:, : tail_size(100) + 1], 100) < 0.7)
    True
    """
    x = largest.double() - largest[:, :1].double()
    cutoff = x[:, -1:].clamp(min=math.log(torch.finfo(torch.float64).tiny))
    lengths = (x > cutoff).sum(1)
    full = (lengths == 0) & torch.isfinite(largest[:, 0]) & (x.shape[1] > 5)
    k = torch.where(full, -math.inf, torch.full_like(x[:, 0], math.inf))
    for n in lengths.unique().tolist():  # one length, unless weights are tied
        if n > 4:
            rows = (lengths == n).nonzero().squeeze(1)
            for part in rows.split(min(512, max(1, PART // fit_bytes(num_samples)))):
                tail = x[part, :n].flip(1).exp() - cutoff[part].exp()
                k[part] = generalized_pareto_shape(tail)
    return k


def generalized_pareto_shape(tail: Tensor) -> Tensor:
    """Zhang and Stephens' empirical-Bayes estimate with Vehtari's weak prior, for rows of ascending exceedances."""
    n = tail.shape[1]
    num_grid = grid_size(n)
    grid = torch.arange(1, num_grid + 1, dtype=tail.dtype, device=tail.device)
    quartile = tail[:, int(n / 4 + 0.5) - 1, None]
    b = (1 - torch.sqrt(num_grid / (grid - 0.5))) / (3 * quartile) + 1 / tail[:, -1:]
    k = torch.log1p(-b.unsqueeze(2) * tail.unsqueeze(1)).mean(2)
    profile = n * (torch.log(-b / k) - k - 1)
    weights = torch.softmax(profile, 1)
    weights = torch.where(weights >= 10 * torch.finfo(tail.dtype).eps, weights, 0.0)
    b_mean = (b * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
    shape = torch.log1p(-b_mean * tail).mean(1)
    return (n * shape + 10 * 0.5) / (n + 10)
