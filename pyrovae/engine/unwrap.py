"""What is inside a distribution or a constraint: under Independent, masks, and the bounds that depend on data."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from pyro.distributions import Delta, Unit
from pyro.distributions import Independent as PyroIndependent
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, Transform, biject_to, constraints

from pyrovae.engine.stacked import Stacked

# --- distributions ---------------------------------------------------------------------------------------------------


def layers(fn: Distribution) -> Iterator[Distribution]:
    """A distribution, the one that it wraps (as Independent, a mask or a transform does), and so on inwards."""
    yield fn
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
        yield fn


def innermost(fn: Distribution) -> Distribution:
    """The distribution inside all wrappers, transforms included."""
    *_, inner = layers(fn)
    return inner


def unwrapped(fn: Distribution) -> Distribution:
    """The distribution under any ``Independent`` or mask; of several runs the first's."""
    return next(layer for layer in layers(fn) if not isinstance(layer, Independent | MaskedDistribution | Stacked))


def point_mass(fn: Distribution) -> Delta | Unit | None:
    """The Delta or factor inside a distribution, or None."""
    inner = unwrapped(fn)
    return inner if isinstance(inner, Delta | Unit) else None


def of_libraries(fn: Distribution) -> bool:
    """Whether a distribution and all inside it are torch's, Pyro's or of this library, and none is its user's."""
    return all(type(layer).__module__.partition(".")[0] in ("torch", "pyro", "pyrovae") for layer in layers(fn))


def is_masked(fn: Distribution) -> bool:
    """Whether a mask is among a distribution's wrappers."""
    return any(isinstance(layer, MaskedDistribution) for layer in layers(fn))


def is_discrete(fn: Distribution) -> bool:
    """Whether all values of a distribution are known to be discrete."""
    try:
        return bool(getattr(fn.support, "is_discrete", False))
    except NotImplementedError:
        return False


def unmasked(fn: Distribution) -> Distribution:
    """A distribution without masks, those inside of ``Independent`` included."""
    if isinstance(fn, MaskedDistribution):
        return unmasked(fn.base_dist)
    if not isinstance(fn, Independent):
        return fn
    inner = unmasked(fn.base_dist)
    return fn if inner is fn.base_dist else PyroIndependent(inner, fn.reinterpreted_batch_ndims)


def unvalidated(fn: Distribution) -> Distribution:
    """A distribution that scores whatever it is given, as do those inside, whatever attributes hold them."""
    fn = copy.copy(fn)
    parts = {name: unvalidated(part) for name, part in vars(fn).items() if isinstance(part, Distribution)}
    vars(fn).update(parts)
    fn._validate_args = False  # last: Pyro's Independent passes it on to the one inside
    if isinstance(fn, Stacked):
        fn.parts = [None if part is None else unvalidated(part) for part in fn.parts]
    return fn


def elementwise(fn: Distribution) -> Distribution | None:
    """The distribution of single units, ``[*batch, units]``, if the event is made of independent elements."""
    if isinstance(fn, Stacked):
        parts = [None if part is None else elementwise(part) for part in fn.parts]
        apart = all(part is None or inner is not None for part, inner in zip(fn.parts, parts, strict=True))
        return Stacked(parts, fn.values, fn.nesting + fn.event_dim) if apart else None
    fn = unmasked(fn)
    inner = next(layer for layer in layers(fn) if not isinstance(layer, Independent))
    return inner if fn.event_shape and not inner.event_shape else None


def finite_mean(fn: Distribution) -> Tensor | None:
    """The mean of a distribution, if it has one in closed form that is finite."""
    try:
        mean = fn.mean
    except (NotImplementedError, AttributeError):
        return None
    return mean if torch.isfinite(mean).all() else None


# --- constraints -----------------------------------------------------------------------------------------------------


def plain(support: constraints.Constraint) -> constraints.Constraint:
    """A constraint without independent (or mixture) wrappers."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def is_boolean(support: constraints.Constraint) -> bool:
    """Whether a site of this support observes bits."""
    return isinstance(plain(support), type(constraints.boolean))


def widest(support: constraints.Constraint) -> constraints.Constraint | None:
    """The constraint of single values, with numbers for bounds that vary; None if it is dependent."""
    support = plain(support)
    if constraints.is_dependent(support):
        return None
    if isinstance(support, constraints.multinomial):
        return constraints.nonnegative_integer  # other data may have other numbers of trials
    support = copy.copy(support)
    for name, extreme in (("lower_bound", torch.min), ("upper_bound", torch.max)):
        if isinstance(bound := getattr(support, name, None), Tensor):
            setattr(support, name, extreme(bound).item())
    return support


def inner_value(fn: Distribution) -> float | None:
    """A number well inside of the support of a distribution over reals, bits or counts, where it is known."""
    try:
        support = widest(fn.support)  # type: ignore[arg-type]
    except NotImplementedError:
        return None
    low, high = (getattr(support, name, None) for name in ("lower_bound", "upper_bound"))
    if isinstance(support, type(constraints.real) | type(constraints.boolean)):
        return 0.0
    if isinstance(support, constraints.integer_interval | type(constraints.nonnegative_integer)):
        return low
    if not isinstance(support, constraints.interval | constraints.greater_than | constraints.greater_than_eq):
        return None
    return low + 1 if high is None else (low + high) / 2  # type: ignore[no-any-return, operator]


def unconstrained(support: constraints.Constraint) -> Transform | None:
    """The map from all reals onto a support; None where that is the identity."""
    inside = support
    while isinstance(inside, constraints.independent):
        inside = inside.base_constraint
    return None if inside in (constraints.real, constraints.real_vector) else biject_to(support)
