"""What is reported: each bound is its formula, has its exact mean, is below log p(x), and is ordered in K and alpha."""

import math
from functools import cache

import pytest
import torch

import pyrovae as pv
from tests.laws.exact import expected, grid, mean, power_mean, simulate
from tests.laws.objectives import OBJECTIVES
from tests.laws.pairs import GAUSSIAN, MIXTURE, NET, PAIRS, POSTERIOR

REPETITIONS = 12_000
TOTAL = [row for row in OBJECTIVES if row.gradient == "total"]
UNWEIGHTED = [row for row in TOTAL if not row.weighted]


@cache
def particles(pair):
    return simulate(pair, 8, REPETITIONS)


def name(value):
    return value.name


@pytest.mark.parametrize("row", OBJECTIVES, ids=name)
def test_bound_is_its_formula(row):
    objective = row.objective()
    log_w = 2 * torch.randn(objective.total_particles, 4, 3) - 1
    torch.testing.assert_close(objective.bound(log_w), row.hand(log_w), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(objective.bound(log_w - 800), objective.bound(log_w) - 800, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("pair", PAIRS, ids=name)
@pytest.mark.parametrize("row", TOTAL, ids=name)
def test_reported_bound_has_its_exact_mean(row, pair, agree):
    # The standard error of the one loss comes from our own simulation: z = (loss - exact) / (its sd / sqrt(R)).
    size, weights = len(pair.data), row.weighting
    x = pair.data.repeat(REPETITIONS, *[1] * (pair.data.dim() - 1))
    params = pair.params()
    objective = row.objective()
    reported = -objective.loss(*pair.programs({n: p.expand(len(x)) for n, p in params.items()}), x) / REPETITIONS
    truth, _ = expected(pair, row.expectation, row.particles, **weights)
    own = row.hand(particles(pair).log_w(**weights)[: objective.total_particles]).view(-1, size).sum(1)
    agree(row.name, pair.name, "reported bound", own - own.mean() + reported, truth)
    if row.below and not row.weighted:
        assert truth <= pair.log_px().sum() + 1e-9
        if not pair.posterior:
            assert truth < pair.log_px().sum() - 1e-3


@pytest.mark.parametrize("pair", PAIRS, ids=name)
def test_log_weights_are_log_p_minus_log_q(pair, agree):
    x = pair.data.repeat(REPETITIONS, *[1] * (pair.data.dim() - 1))
    log_w = pv.log_weights(*pair.programs(pair.params(len(x))), x, num_particles=3)
    assert log_w.shape == (3, len(x))
    truth, _ = expected(pair, mean, 1)
    agree("log_weights", pair.name, "mean log w", log_w.mean(0).view(-1, len(pair.data)).sum(1), truth)
    # E w = p(x), datum by datum
    for b, log_px in enumerate(pair.log_px()):
        each = log_w.view(3, -1, len(pair.data))[:, :, b]
        agree("log_weights", pair.name, f"mean w / p(x) of datum {b}", (each - log_px).exp().mean(0), 1.0)


@pytest.mark.parametrize("row", [row for row in UNWEIGHTED if row.make is not pv.PIWAE], ids=name)
def test_all_bounds_are_log_px_where_the_guide_is_the_posterior(row):
    loss = row.objective().loss(*POSTERIOR.programs(POSTERIOR.params()), POSTERIOR.data)
    assert loss == pytest.approx(-float(POSTERIOR.log_px().sum()), abs=1e-11)


# --- order, particle by particle: Jensen's inequality holds on every set of log-weights -----------------------------


@pytest.fixture
def log_w():
    return 3 * torch.randn(6, 500)


@pytest.mark.parametrize(
    "family",
    [pv.IWAE, *(lambda k, a=a: pv.Renyi(a, k) for a in (-0.5, 0.0, 0.5, 0.9))],
    ids=["IWAE", -0.5, 0.0, 0.5, 0.9],
)
def test_bounds_grow_with_particles(family, log_w):
    # The mean of L_{K-1} over the K subsets never exceeds L_K on the same particles.
    for num in range(2, 7):
        smaller = [family(num - 1).bound(torch.cat([log_w[:k], log_w[k + 1 : num]])) for k in range(num)]
        gain = family(num).bound(log_w[:num]) - torch.stack(smaller).mean(0)
        assert (gain >= -1e-12).all()
        assert (gain > 1e-6).float().mean() > 0.99


def test_renyi_falls_as_alpha_grows_between_the_best_and_the_worst_particle(log_w):
    alphas = [-50.0, -1.0, 0.0, 0.3, 0.9, 1.0, 1.1, 2.0, 50.0]
    bounds = torch.stack([pv.VRMax(6).bound(log_w), *(pv.Renyi(a, 6).bound(log_w) for a in alphas), log_w.amin(0)])
    assert (bounds.diff(dim=0) < 0).all()


@pytest.mark.parametrize(("groups", "each"), [(2, 3), (3, 2)])
def test_groups_and_mixtures_lie_between_elbo_and_iwae(groups, each, log_w):
    elbo, top = pv.ELBO(6).bound(log_w), pv.IWAE(6).bound(log_w)
    assert (elbo < pv.MIWAE(groups, each).bound(log_w)).all()
    assert (pv.MIWAE(groups, each).bound(log_w) < top).all()
    steps = torch.stack([pv.CIWAE(beta, 6).bound(log_w) for beta in (0.0, 0.2, 0.7, 1.0)])
    assert (steps.diff(dim=0) < 0).all()
    torch.testing.assert_close(steps[1], 0.2 * elbo + 0.8 * top)


def test_groups_are_made_of_neighbours():
    # Regression: normalising over the wrong axis is invisible while M = K.
    log_w = torch.arange(6.0).mul(2).unsqueeze(1)
    found = pv.MIWAE(num_groups=2, num_particles=3).bound(log_w)
    assert found.item() == pytest.approx(
        sum(math.log(sum(math.exp(2 * k) for k in g) / 3) for g in ((0, 1, 2), (3, 4, 5))) / 2
    )


# --- rates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [GAUSSIAN, MIXTURE, NET], ids=name)
def test_bias_falls_as_one_over_k(pair, agree):
    """K (log p(x) - L_K) tends to Var(w / p(x)) / 2. The mean of w / p(x) - 1, known to be 0, takes most noise off."""
    log_px, variance = pair.log_px(), torch.tensor(0.0)
    for datum, log_p in zip(pair.data, log_px, strict=True):
        parts = grid(pair, pair.params(), datum)
        variance += (parts.log_mass + 2 * (parts.log_w(1.0, 1.0) - log_p)).exp().sum() - 1
    rates = []
    for num, size in ((4, 20_000), (16, 10_000), (64, 4_000)):
        x = pair.data.repeat(size, *[1] * (pair.data.dim() - 1))
        log_w = pv.log_weights(*pair.programs(pair.params(len(x))), x, num_particles=num) - log_px.repeat(size)
        gap = (log_w.exp().mean(0) - 1 - pv.IWAE(num).bound(log_w)).view(size, -1).sum(1)
        truth = log_px.sum() - expected(pair, power_mean(0.0), num)[0]
        agree(f"IWAE({num})", pair.name, "log p(x) - L_K", gap, truth)
        rates.append(num * truth / (variance / 2))
    errors = [abs(rate - 1) for rate in rates]
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.05
