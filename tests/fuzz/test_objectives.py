"""Objectives on log-weights of any size: their bounds by hand in exact arithmetic, their coefficients by their laws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import pyrovae as pv

INF = math.inf
Weights = list[float]


def mean(log_w: Sequence[float]) -> float:
    """The mean in the extended reals, without rounding; NaN where it is undefined."""
    infinite = {x for x in log_w if math.isinf(x)}
    if infinite:
        return infinite.pop() if len(infinite) == 1 else math.nan
    return float(sum(map(Fraction, log_w)) / len(log_w))


def power_mean(c: float, log_w: Sequence[float]) -> float:
    """The log of the power mean of weights in [0, inf], whichever of the limits they are at."""
    best = max(log_w) if c > 0 else min(log_w)
    if math.isinf(best):
        return best
    share = math.fsum(math.exp(c * (x - best)) for x in log_w) / len(log_w)
    return best + math.log(share) / c


def groups(number: int, log_w: Weights) -> list[Weights]:
    size = len(log_w) // number
    return [log_w[i * size : (i + 1) * size] for i in range(number)]


def mixed(parts: Sequence[tuple[float, float]]) -> float:
    """A weighted sum in the extended reals."""
    infinite = {x for _, x in parts if not math.isfinite(x)}
    if infinite:
        return infinite.pop() if len(infinite) == 1 else math.nan
    return math.fsum(a * x for a, x in parts)


def softmax(log_w: Sequence[float]) -> Weights:
    best = max(log_w)
    each = [math.exp(x - best) for x in log_w]
    return [x / math.fsum(each) for x in each]


def riemann(points: Sequence[float], log_w: Weights) -> float:
    """The left sum over inverse temperatures of the mean log-weight."""
    if INF in log_w or all(x == -INF for x in log_w):
        return math.nan
    parts = [(points[1], mean(log_w))]
    for beta, following in pairwise(points[1:]):
        shares = softmax([beta * x for x in log_w])
        parts.append((following - beta, math.fsum(s * x for s, x in zip(shares, log_w, strict=True) if s)))
    return mixed(parts)


Row = tuple[pv.Objective, Callable[[Weights], float]]
ROWS: dict[str, Row] = {
    "elbo": (pv.ELBO(6), mean),
    "one": (pv.IWAE(1), mean),
    "iwae": (pv.IWAE(6), lambda w: power_mean(1.0, w)),
    "vimco": (pv.VIMCO(6), lambda w: power_mean(1.0, w)),
    "dreg": (pv.IWAE(6, gradient="dreg"), lambda w: power_mean(1.0, w)),
    "rws": (pv.RWS(6), lambda w: power_mean(1.0, w)),
    "alpha .5": (pv.Renyi(0.5, 6), lambda w: power_mean(0.5, w)),
    "alpha 1": (pv.Renyi(1.0, 6), mean),
    "alpha 1.001": (pv.Renyi(1.001, 6), lambda w: power_mean(1 - 1.001, w)),
    "alpha 2": (pv.Renyi(2.0, 6), lambda w: power_mean(-1.0, w)),
    "alpha -3": (pv.Renyi(-3.0, 6), lambda w: power_mean(4.0, w)),
    "max": (pv.VRMax(6), max),
    "miwae": (pv.MIWAE(2, 3), lambda w: mean([power_mean(1.0, g) for g in groups(2, w)])),
    "piwae": (pv.PIWAE(3, 2), lambda w: power_mean(1.0, w)),
    "ciwae": (pv.CIWAE(0.25, 6), lambda w: mixed([(0.25, mean(w)), (0.75, power_mean(1.0, w))])),
    "tvo": (pv.TVO(6, betas=[0.0, 0.1, 0.5, 1.0]), lambda w: riemann([0.0, 0.1, 0.5, 1.0], w)),
    "tvo 1": (pv.TVO(6, partitions=1), mean),
}

ANY = st.one_of(
    st.floats(-800, 800), st.sampled_from([-INF, INF, 0.0, -0.0, 88.8, -104.0, 709.8, -746.0, 1e30, -1e30, 1e-300]),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
)  # fmt: skip
EQUAL = ANY.map(lambda x: [x] * 6)
LOG_W = st.one_of(st.lists(ANY, min_size=6, max_size=6), EQUAL)
HUGE = st.lists(st.sampled_from([1e308, -1e308, 1.7e308, -INF, INF, 0.0]), min_size=6, max_size=6)


def found(objective: pv.Objective, log_w: Weights, dtype: torch.dtype) -> tuple[float, list[Tensor]]:
    """The bound and the coefficients of one datum beside an ordinary one, which must not notice."""
    count = objective.total_particles
    beside = torch.linspace(-1, 1, count, dtype=dtype)
    both = torch.stack([torch.tensor(log_w[:count], dtype=dtype), beside], 1)
    bound, weights = objective.bound(both), objective.weights(both)
    torch.testing.assert_close(bound[1], objective.bound(beside))
    for each, alone in zip(weights, objective.weights(beside[:, None]), strict=True):
        torch.testing.assert_close(each[:, 1], alone[:, 0])
        assert torch.isfinite(each).all()
    return bound[0].item(), [each[:, 0].double() for each in weights]


@pytest.mark.parametrize("name", ROWS)
@given(log_w=LOG_W, double=st.booleans())
@example(log_w=[-INF] * 6, double=True)
@example(log_w=[INF] * 6, double=False)
@example(log_w=[-INF, 0.0, -INF, 1.0, -INF, INF], double=True)
@example(log_w=[3e38] * 6, double=False)
def test_a_bound_is_what_it_is_by_hand(name, log_w, double):
    objective, by_hand = ROWS[name]
    log_w = log_w[: objective.total_particles]
    dtype = torch.float64 if double else torch.float32
    log_w = torch.tensor(log_w, dtype=dtype).tolist()  # what is too large for the type is infinite in it
    exact = by_hand(log_w)
    bound, coefficients = found(objective, log_w, dtype)
    if math.isnan(exact):
        assert all(not each.any() for each in coefficients)
        return
    if math.isinf(exact):
        assert bound == exact
        assert all(not each.any() for each in coefficients)
        return
    size = max((abs(x) for x in log_w if math.isfinite(x)), default=0.0)
    if size > torch.finfo(dtype).max / 64:  # sums and differences of such are beyond the type's range
        assert not math.isnan(bound)
        return
    assert bound == pytest.approx(exact, rel=0, abs=64 * torch.finfo(dtype).eps * max(size, abs(exact), 1.0))
    assert coefficients[0].sum().item() == pytest.approx(1.0, abs=64 * torch.finfo(dtype).eps)
