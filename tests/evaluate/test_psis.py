"""The Pareto shape: ArviZ's number, datum by datum, on every kind of tail."""

import math

import numpy as np
import pytest
import torch

from pyrovae.engine.weights import pareto_k, tail_size
from tests.arviz_names import OLD, pareto_shape

TAILS = {
    "normal": lambda g, s: torch.randn(s, generator=g),
    "wide normal": lambda g, s: 5 * torch.randn(s, generator=g),
    "exponential": lambda g, s: -torch.rand(s, generator=g).log(),
    "heavy": lambda g, s: -3 * torch.rand(s, generator=g).log(),
    "bounded": lambda g, s: torch.rand(s, generator=g),
    "far below zero": lambda g, s: 3 * torch.randn(s, generator=g) - 40_000,
    "one giant": lambda g, s: torch.where(torch.arange(s) == s // 2, 800.0, torch.randn(s, generator=g)),
    "tied": lambda g, s: (4 * torch.randn(s, generator=g)).round() / 2,
    "two values": lambda g, s: (torch.rand(s, generator=g) < 0.9).double(),
    "equal": lambda g, s: torch.full((s,), -3.0),
    "many dead": lambda g, s: torch.where(torch.arange(s) % 3 > 0, -torch.inf, torch.randn(s, generator=g)),
}


def shape(log_w):
    """k of each row of ``[B, S]``, as the estimator feeds it."""
    num = log_w.shape[1]
    return pareto_k(log_w.topk(min(tail_size(num) + 1, num), 1).values, num)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("num", [25, 100, 1000, 5000])
def test_equal_to_arviz(tail, num):
    generator = torch.Generator().manual_seed(num)
    log_w = torch.stack([TAILS[tail](generator, num).double() for _ in range(6)])
    if not OLD and (num < 100 or tail in ("one giant", "tied", "two values", "equal")):
        pytest.skip("ArviZ 1 has no k of tails that are short or tied")
    with np.errstate(all="ignore"):
        expected = [pareto_shape(row.numpy()) for row in log_w]
    if not OLD:  # which begins the tail at another draw
        np.testing.assert_allclose(shape(log_w).numpy(), expected, atol=0.15)
        return
    if tail in ("two values", "equal"):  # nothing exceeds the largest, where ArviZ says infinite
        assert expected == [math.inf] * 6
        expected = [-math.inf] * 6
    np.testing.assert_allclose(shape(log_w).numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num", [1, 2, 5, 20])
def test_a_tail_of_four_or_fewer_is_infinite(num):
    assert tail_size(num) <= 4
    assert shape(torch.randn(3, num, dtype=torch.float64)).tolist() == [math.inf] * 3


def test_a_tail_full_of_the_largest_weight_is_minus_infinite():
    """So many of 500 are the largest, the others half of it; the tail has 68, and one that they exceed."""
    for largest, k in ((69, -math.inf), (500, -math.inf), (68, None), (4, math.inf), (1, math.inf)):
        log_w = torch.where(torch.arange(500) < largest, 0.0, torch.tensor(0.5, dtype=torch.float64).log())
        found = shape(log_w.unsqueeze(0))
        assert math.isfinite(found) if k is None else found.item() == k


def test_dead_data_are_infinite_not_nan():
    assert shape(torch.full((2, 500), -torch.inf, dtype=torch.float64)).tolist() == [math.inf] * 2


def test_more_data_than_one_pass_holds_and_the_order_of_draws_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    log_w = 2 * torch.randn(1100, 100, generator=generator, dtype=torch.float64)
    shuffled = log_w[:, torch.randperm(100, generator=generator)]
    assert torch.equal(shape(log_w), shape(shuffled))
    assert torch.equal(shape(log_w)[1050], shape(log_w[1050:1051])[0])
    assert torch.allclose(shape(log_w + 700), shape(log_w), atol=1e-9)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_the_shape_of_a_generalised_pareto_is_recovered(k):
    """Tail of 671 exceedances: asymptotic SE (1 + k) / sqrt(671), shrunk by the prior of weight 10 at 0.5; 4.9 SE."""
    generator, num = torch.Generator().manual_seed(1), 50_000
    u = torch.rand(4, num, generator=generator, dtype=torch.float64)
    weights = (u**-k - 1) / k
    found, n = shape((1 + weights).log()), tail_size(num)
    assert ((found - (n * k + 5) / (n + 10)).abs() < 4.9 * (1 + k) / math.sqrt(n) + 0.02).all()
