"""Derivatives of a bound in its log-weights, and the learning signal that stands in for one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def slope(bound: Callable[[Tensor], Tensor], log_w: Tensor) -> tuple[Tensor, Tensor]:
    """The bound at ``log_w``, and d bound / d log_w, shaped like it."""
    with torch.enable_grad():
        leaf = log_w.detach().requires_grad_()
        value = bound(leaf)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def curvature(bound: Callable[[Tensor], Tensor], log_w: Tensor) -> Tensor:
    """The diagonal d^2 bound / d log_w_k^2, shaped like ``log_w``.

    Copy k of the log-weights answers for particle k, so one double backward gives the diagonal without a loop.
    """
    num = log_w.shape[0]
    with torch.enable_grad():
        copies = log_w.detach().unsqueeze(1).repeat(1, num, *[1] * (log_w.dim() - 1)).requires_grad_()
        first = torch.autograd.grad(bound(copies).sum(), copies, create_graph=True)[0]
        if not first.requires_grad:  # a linear bound
            return torch.zeros_like(log_w)
        second = torch.autograd.grad(first.diagonal(dim1=0, dim2=1).sum(), copies, allow_unused=True)[0]
    return torch.zeros_like(log_w) if second is None else second.diagonal(dim1=0, dim2=1).movedim(-1, 0)


def learning_signal(bound: Callable[[Tensor], Tensor], log_w: Tensor, group: int) -> Tensor:
    """L - L_(k): the bound less the bound with log w_k replaced by the mean of the others of its group.

    :param group: particles per group; with one alone there are no others, and the signal is L itself.
    """
    value = bound(log_w)
    if group == 1:
        return value.expand_as(log_w).clone()
    total = log_w.shape[0]
    index = torch.arange(total, device=log_w.device)
    same = index == index.unsqueeze(1)
    others = (index // group == (index // group).unsqueeze(1)) & ~same
    shape = (total, total, *[1] * (log_w.dim() - 1))
    copies = log_w.unsqueeze(1)  # particle, copy: in copy k, particle k is the one replaced
    mean = torch.where(others.view(shape), copies, 0.0).sum(0, keepdim=True) / (group - 1)
    return value - bound(torch.where(same.view(shape), mean, copies))
