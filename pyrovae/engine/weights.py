r"""Sums of weights: the log of their mean, its error, the effective sample size, and the shape of their tail."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_mean_exp(log_w: Tensor) -> Tensor:
    r""":math:`\log \frac1K \sum_k w_k` over the first axis."""
    return torch.logsumexp(log_w, 0) - math.log(log_w.shape[0])


class _Tally:
    """Running sums of weights in float64, with the largest ones kept for the Pareto fit."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples, self.keep = num_samples, min(tail_size(num_samples) + 1, num_samples)
        self.pending: list[Tensor] = []
        self.log_sum = self.log_sum_squares = torch.tensor(-math.inf, dtype=torch.float64)
        self.largest: Tensor | None = None

    def add(self, log_w: Tensor) -> None:
        self.pending.append(log_w.double())
        if sum(map(len, self.pending)) >= 4 * self.keep:  # merging is dear in small portions
            self._merge()

    def _merge(self) -> None:
        log_w = torch.cat(self.pending)
        self.pending = []
        sums = torch.logsumexp(log_w, 0), torch.logsumexp(2 * log_w, 0)
        self.log_sum = torch.logaddexp(self.log_sum.to(log_w.device), sums[0])
        self.log_sum_squares = torch.logaddexp(self.log_sum_squares.to(log_w.device), sums[1])
        candidates = log_w if self.largest is None else torch.cat([self.largest, log_w])
        self.largest = candidates.movedim(0, -1).topk(min(self.keep, len(candidates)), -1).values.movedim(-1, 0)

    def results(self) -> tuple[Tensor, ...]:
        if self.pending:
            self._merge()
        assert self.largest is not None
        num, dead = self.num_samples, torch.isneginf(self.log_sum)
        ess = torch.where(dead, 0.0, (2 * self.log_sum - self.log_sum_squares).exp())
        variance = (num / ess - 1).clamp(min=0) / max(num - 1, 1)
        std_error = torch.where(dead, math.inf, variance.sqrt()) if num > 1 else torch.full_like(ess, math.inf)
        k = pareto_k(self.largest.reshape(self.keep, -1).T, num).view_as(ess)
        return self.log_sum - math.log(num), std_error, ess, k


_DATA_PER_PASS = 512  # bounds the [data, grid, tail] array of the fit


def tail_size(num_samples: int) -> int:
    """The number of largest weights that the Pareto fit looks at."""
    return math.ceil(min(num_samples / 5, 3 * math.sqrt(num_samples)))


def pareto_k(largest: Tensor, num_samples: int) -> Tensor:
    r"""Shape :math:`\hat k` of the generalised Pareto distribution fitted to the weights' right tail, ``[B]``.

    Above 0.7 the importance-sampling estimate and its standard error cannot be trusted. Equal to ArviZ's ``psislw``;
    infinite where four or fewer weights make up the tail.

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
    k = torch.full_like(x[:, 0], math.inf)
    for n in lengths.unique().tolist():  # one length, unless weights are tied
        if n > 4:
            rows = (lengths == n).nonzero().squeeze(1)
            for part in rows.split(_DATA_PER_PASS):
                tail = x[part, :n].flip(1).exp() - cutoff[part].exp()
                k[part] = _generalized_pareto_shape(tail)
    return k


def _generalized_pareto_shape(tail: Tensor) -> Tensor:
    """Zhang and Stephens' empirical-Bayes estimate with Vehtari's weak prior, for rows of ascending exceedances."""
    n = tail.shape[1]
    num_grid = 30 + int(math.sqrt(n))
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
