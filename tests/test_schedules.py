"""Schedules: factors at stage boundaries, particles by stage, the KL's warm-up, the caller's objective left alone."""

from itertools import pairwise

import pytest
import torch
from pyro.infer import Trace_ELBO

import pyrovae as pv
from pyrovae.schedules import SCHEDULES, make_schedule
from pyrovae.train.plan import Plan


def plan(objective=None, epochs=8, schedule="constant", particles=None, kl_warmup=0):
    return Plan.make(objective or pv.IWAE(5), epochs, schedule, particles, kl_warmup)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_schedule_starts_at_one_and_never_rises(name):
    factors = [SCHEDULES[name](i / 1000) for i in range(1000)]
    assert factors[0] == pytest.approx(1.0)
    assert all(a >= b > 0 for a, b in pairwise(factors))


def test_iwae_stages_begin_at_the_papers_epochs():
    """3^i epochs of 10^(-i/7), i = 0 ... 7: 3280 in all; of any other number, as large shares."""
    begins = {0: 1.0, 1: 0.7197, 4: 0.5179, 13: 0.3728, 40: 0.2683, 121: 0.1931, 364: 0.1389, 1093: 0.1}
    for stretch in (1, 7):
        factor = plan(epochs=3280 * stretch, schedule="iwae").factor
        for (first, rate), (following, lower) in pairwise([*begins.items(), (3280, None)]):
            assert factor(first * stretch) == factor(following * stretch - 0.001) == pytest.approx(rate, abs=5e-5)
            assert lower is None or factor(following * stretch) == pytest.approx(lower, abs=5e-5)


def test_the_line_ends_at_nothing():
    assert [SCHEDULES["linear"](t) for t in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]


def test_the_cosine_ends_at_a_hundredth():
    assert SCHEDULES["cosine"](0.5) == pytest.approx(0.505)
    assert SCHEDULES["cosine"](1 - 1e-9) == pytest.approx(0.01)


def test_a_function_of_progress_is_a_schedule():
    assert make_schedule(max) is max
    assert [plan(epochs=4, schedule=lambda t: 1 - t).factor(e) for e in range(4)] == [1, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(
    ("epochs", "particles", "expected"),
    [
        (8, (1, 5, 20, 50), [1, 1, 5, 5, 20, 20, 50, 50]),
        (4, (3,), [3, 3, 3, 3]),
        (5, (1, 2), [1, 1, 1, 2, 2]),
        (2, (1, 2, 3, 4), [1, 3]),
    ],
)
def test_particles_grow_by_equal_parts(epochs, particles, expected):
    made = plan(epochs=epochs, particles=particles)
    assert [made.at(epoch).num_particles for epoch in range(epochs)] == expected
    assert made.at(epochs - 1e-9).num_particles == made.final.num_particles == particles[-1]


@pytest.mark.parametrize("weight", [1.0, 4.0, torch.tensor(2.0)])
def test_warm_up_is_linear_up_to_the_objectives_own_weight(weight):
    made = plan(pv.ELBO(kl_weight=weight), kl_warmup=4)
    assert [float(made.at(e).kl_weight) for e in (0, 1, 3, 4, 7)] == [float(weight) * f for f in (0, 0.25, 0.75, 1, 1)]
    assert float(plan(pv.ELBO(kl_weight=weight), epochs=2, kl_warmup=40).final.kl_weight) == float(weight)


def test_a_weight_annealed_in_place_is_followed():
    weight = torch.tensor(1.0)
    made = plan(pv.ELBO(kl_weight=weight))
    weight.fill_(0.25)
    assert float(made.at(3).kl_weight) == 0.25


def test_the_callers_objective_is_not_touched():
    objective = pv.MIWAE(3, 7, kl_weight=2.0)
    made = plan(objective, particles=(1, 2), kl_warmup=3)
    made.at(0), made.final
    assert (objective.num_particles, objective.kl_weight, objective.num_groups) == (7, 2.0, 3)


def test_at_returns_one_object_so_that_a_pair_is_checked_once():
    made = plan(particles=(1, 2), kl_warmup=3)
    assert made.at(0) is made.at(7)
    assert made.final is not made.at(0)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "objective must be", {"objective": pv.IWAE}),
        (ValueError, "num_particles .* at least 2", {"objective": pv.VIMCO(3), "particles": (1, 3)}),
        (ValueError, "pyrovae's objectives", {"objective": Trace_ELBO(), "kl_warmup": 3}),
        (ValueError, "pyrovae's objectives", {"objective": Trace_ELBO(), "particles": (1,)}),
    ],
)
def test_refusals(error, match, arguments):
    with pytest.raises(error, match=match):
        plan(**arguments)
