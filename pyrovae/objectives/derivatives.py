"""Derivatives of a bound in its log-weights, and the learning signal that stands in for one.

Power means say theirs in closed form. Of any other function they are found by autograd and by trial, in portions of at
most ``PORTION`` numbers (64 MB of float32; autograd keeps a few such at a time).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pyrovae.objectives.means import PowerMeans, others

Bound = Callable[[Tensor], Tensor]
PORTION = 2**24


def slope(bound: Bound, log_w: Tensor) -> tuple[Tensor, Tensor]:
    """The bound at ``log_w``, and d bound / d log_w, shaped like it."""
    if isinstance(bound, PowerMeans):
        return bound.slope(log_w)
    with torch.enable_grad():
        leaf = log_w.detach().requires_grad_()
        value = bound(leaf)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def curvature(bound: Bound, log_w: Tensor) -> Tensor:
    """The diagonal d^2 bound / d log_w_k^2, shaped like ``log_w``.

    A copy of the log-weights answers for each particle, so one double backward gives a portion of the diagonal.
    """
    if isinstance(bound, PowerMeans):
        return bound.curvature(log_w)
    return torch.cat([second_derivatives(bound, log_w, ones) for ones in portions(log_w)])


def second_derivatives(bound: Bound, log_w: Tensor, ones: Tensor) -> Tensor:
    """Those of the particles ``ones``."""
    own = ones, torch.arange(len(ones), device=log_w.device)
    with torch.enable_grad():
        copies = log_w.detach().unsqueeze(1).repeat(1, len(ones), *[1] * (log_w.dim() - 1)).requires_grad_()
        first = torch.autograd.grad(bound(copies).sum(), copies, create_graph=True)[0]
        if not first.requires_grad:  # a linear bound
            return torch.zeros_like(log_w[ones])
        second = torch.autograd.grad(first[own].sum(), copies, allow_unused=True)[0]
    return torch.zeros_like(log_w[ones]) if second is None else second[own]


def learning_signal(bound: Bound, log_w: Tensor, group: int) -> Tensor:
    """L - L_(k): the bound less the bound with log w_k replaced by the mean of the others of its group.

    :param group: particles per group; with one alone there are no others, and the signal is L itself.
    """
    if group == 1:
        return bound(log_w).expand_as(log_w).clone()
    return -change(bound, log_w, mean_of_others(log_w, group))


def mean_of_others(x: Tensor, group: int) -> Tensor:
    """The mean over the other particles of the group, for each particle."""
    grouped = x.unflatten(0, (-1, group)).transpose(0, 1)
    return (others(torch.cumsum, torch.add, 0.0, grouped) / (group - 1)).transpose(0, 1).flatten(0, 1)


def change(bound: Bound, log_w: Tensor, target: Tensor) -> Tensor:
    """What the bound gains, for each k alone, from ``target`` in the place of log w_k; shaped like ``target``."""
    if isinstance(bound, PowerMeans):
        return bound.change(log_w, target)
    log_w, index = log_w.expand_as(target), torch.arange(len(target), device=target.device)
    replaced = []
    for ones in portions(log_w):
        own = (index.unsqueeze(1) == ones).view(len(index), -1, *[1] * (log_w.dim() - 1))  # particle, copy
        replaced.append(bound(torch.where(own, target[ones], log_w.unsqueeze(1))))
    return torch.cat(replaced) - bound(log_w)


def portions(log_w: Tensor) -> Iterator[Tensor]:
    """The numbers of the particles, as many at a time as may have a copy of the log-weights each."""
    yield from torch.arange(len(log_w), device=log_w.device).split(max(1, PORTION // log_w.numel()))
