r"""Pareto tail shape of importance weights, for a whole batch of data at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
