"""What is inside a distribution or a constraint: under Independent, masks and other wrappers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from pyro.distributions import Delta, Unit
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch.distributions import Independent, biject_to, constraints


def point_mass(fn: Any) -> Any:
    """The Delta or factor inside a distribution, under any ``Independent`` or mask, or None."""
    while isinstance(fn, Independent | MaskedDistribution):
        fn = fn.base_dist
    return fn if isinstance(fn, Delta | Unit) else None


def _unmasked(fn: torch.distributions.Distribution) -> torch.distributions.Distribution:
    while isinstance(fn, MaskedDistribution):
        fn = fn.base_dist
    return fn


def elementwise(fn: torch.distributions.Distribution) -> torch.distributions.Distribution | None:
    """The distribution of single units, ``[*batch, units]``, if the event is made of independent elements."""
    return _units(_unmasked(fn), len(fn.event_shape))


def _units(fn: torch.distributions.Distribution, event_dim: int) -> torch.distributions.Distribution | None:
    """The elementwise distribution inside, if the whole event is made of independent elements."""
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return fn if event_dim and not fn.event_shape else None


def _innermost(fn: Any) -> Any:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def _elementwise(support: constraints.Constraint) -> constraints.Constraint | None:
    """``support`` without independent (or mixture) wrappers and with numbers for bounds; None if it is dependent."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if constraints.is_dependent(support):
        return None
    support = copy.copy(support)
    for name, widest in (("lower_bound", torch.min), ("upper_bound", torch.max)):
        if isinstance(bound := getattr(support, name, None), Tensor):
            setattr(support, name, widest(bound).item())
    return support


def is_boolean(support: constraints.Constraint) -> bool:
    """Whether a site of this support observes bits."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return isinstance(support, type(constraints.boolean))


def _unconstrained(support: Any) -> Any:
    """The map from all reals onto a support; None where that is the identity."""
    plain = support
    while isinstance(plain, constraints.independent):
        plain = plain.base_constraint
    return None if plain in (constraints.real, constraints.real_vector) else biject_to(support)


def _masked(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        if type(fn).__name__ == "MaskedDistribution":
            return True
        fn = fn.base_dist
    return False
