"""Where one member is another: equal losses and gradients on the same seed; and the table of coefficients."""

import math

import pytest
import torch

import pyrovae as pv
from tests.laws.gradients import draws, seeded
from tests.laws.objectives import OBJECTIVES
from tests.laws.pairs import GAUSSIAN, HIERARCHY, MIXED, MIXED_LIVE, MULTIVARIATE, NET, PAIRS, POSTERIOR

K = 3
IDENTITIES = {
    "CIWAE(0) = IWAE": (lambda **o: pv.CIWAE(0.0, K, **o), lambda **o: pv.IWAE(K, **o)),
    "CIWAE(1) = ELBO": (lambda **o: pv.CIWAE(1.0, K, **o), lambda **o: pv.ELBO(K, **o)),
    "Renyi(0) = IWAE": (lambda **o: pv.Renyi(0.0, K, **o), lambda **o: pv.IWAE(K, **o)),
    "Renyi(1) = ELBO": (lambda **o: pv.Renyi(1.0, K, **o), lambda **o: pv.ELBO(K, **o)),
    "MIWAE(1, K) = IWAE": (lambda **o: pv.MIWAE(1, K, **o), lambda **o: pv.IWAE(K, **o)),
    "PIWAE(1, K) = IWAE": (lambda **o: pv.PIWAE(1, K, **o), lambda **o: pv.IWAE(K, **o)),
    "VIMCO = IWAE": (lambda **o: pv.VIMCO(K, **o), lambda **o: pv.IWAE(K, **o)),
    **{
        f"{other} = ELBO(1)": (make, lambda **o: pv.ELBO(1, **o))
        for other, make in {
            "IWAE(1)": lambda **o: pv.IWAE(1, **o),
            "Renyi(.5, 1)": lambda **o: pv.Renyi(0.5, 1, **o),
            "MIWAE(1, 1)": lambda **o: pv.MIWAE(1, 1, **o),
            "PIWAE(1, 1)": lambda **o: pv.PIWAE(1, 1, **o),
            "CIWAE(.3, 1)": lambda **o: pv.CIWAE(0.3, 1, **o),
        }.items()
    },
}
MIWAE_IS_ELBO = (lambda **o: pv.MIWAE(K, 1, **o), lambda **o: pv.ELBO(K, **o))


def name(value):
    return value.name


def assert_same(left, right, names=None):
    assert left[0] == pytest.approx(right[0], rel=1e-12)
    for n in names or left[1]:
        torch.testing.assert_close(left[1][n], right[1][n], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"gradient": "stl"}, {"gradient": "dreg"}, {"kl_weight": 0.5}], ids=str)
@pytest.mark.parametrize("identity", IDENTITIES)
def test_endpoints_agree(identity, options):
    left, right = IDENTITIES[identity]
    pairs = [GAUSSIAN, HIERARCHY] + ([] if "gradient" in options else [MIXED_LIVE, NET])
    for pair in pairs:
        assert_same(seeded(left(**options), pair), seeded(right(**options), pair))


@pytest.mark.parametrize("gradient", ["total", "stl", "dreg"])
def test_groups_of_one_are_the_elbo(gradient):
    # The baseline of a lone particle is another, so the gradients are equal where all sites are reparameterised.
    for pair in (GAUSSIAN, HIERARCHY):
        assert_same(*(seeded(make(gradient=gradient), pair) for make in MIWAE_IS_ELBO))


def test_vrmax_of_one_is_the_elbo():
    assert_same(seeded(pv.VRMax(1), MIXED), seeded(pv.ELBO(1), MIXED))


@pytest.mark.parametrize("gradient", ["total", "stl", "dreg"])
@pytest.mark.parametrize(("groups", "each"), [(2, 3), (3, 2), (3, 1)])
def test_piwae_trains_model_by_iwae_and_guide_by_miwae(groups, each, gradient):
    # Regression: the encoder received both losses.
    for pair in (GAUSSIAN, HIERARCHY) if gradient != "total" else (GAUSSIAN, HIERARCHY, MIXED_LIVE, NET):
        both = seeded(pv.PIWAE(groups, each, gradient=gradient), pair)
        assert_same(both, seeded(pv.IWAE(groups * each, gradient=gradient), pair), pair.theta)
        _, guide = seeded(pv.MIWAE(groups, each, gradient=gradient), pair)
        assert_same(both, (both[0], guide), pair.phi)


@pytest.mark.parametrize("pair", [p for p in PAIRS if p.reparameterised], ids=name)
def test_the_model_gradient_is_the_same_under_total_stl_and_dreg(pair):
    for make in (pv.ELBO, pv.IWAE, pv.Renyi, pv.MIWAE, pv.PIWAE, pv.CIWAE):
        total, stl, dreg = (seeded(make(num_particles=3, gradient=g), pair) for g in ("total", "stl", "dreg"))
        assert_same(total, stl, pair.theta)
        assert_same(total, dreg, pair.theta)


def test_renyi_is_continuous_at_alpha_one_and_approaches_vrmax():
    log_w = torch.randn(5, 40)
    elbo = pv.ELBO(5).bound(log_w)
    for step in (1e-4, -1e-4):  # d bound / d alpha at 1 is minus half the variance, at most about 5 here
        assert (pv.Renyi(1 + step, 5).bound(log_w) - elbo).abs().max() < 1e-3
    best = pv.VRMax(5).bound(log_w) - pv.Renyi(-999.0, 5).bound(log_w)
    assert (best >= 0).all()
    assert best.max() <= math.log(5) / 1000 + 1e-12


def test_weights_of_the_log_likelihood_and_of_the_kl_are_one_scale():
    doubled = seeded(pv.ELBO(K, likelihood_weight=2.0), MIXED_LIVE)[0]
    assert doubled == pytest.approx(2 * seeded(pv.ELBO(K, kl_weight=0.5), MIXED_LIVE)[0])
    annealed = torch.tensor(1.0)
    objective = pv.IWAE(K, kl_weight=annealed, gradient="dreg")
    assert_same(seeded(objective, HIERARCHY), seeded(pv.IWAE(K, gradient="dreg"), HIERARCHY))
    annealed.fill_(0.5)
    assert_same(seeded(objective, HIERARCHY), seeded(pv.IWAE(K, kl_weight=0.5, gradient="dreg"), HIERARCHY))


@pytest.mark.parametrize("row", OBJECTIVES, ids=name)
def test_value_is_the_loss_and_gradients_add_over_data(row):
    for pair in [MULTIVARIATE, HIERARCHY, POSTERIOR] + ([MIXED_LIVE, NET] if row.gradient == "total" else []):
        torch.manual_seed(3)
        once = row.objective().differentiable_loss(*pair.programs(pair.params(grad=True)), pair.data)
        torch.manual_seed(3)
        again = row.objective().loss(*pair.programs(pair.params()), pair.data)
        assert (once.dim(), isinstance(again, float)) == (0, True)
        assert once.item() == pytest.approx(again, rel=1e-13)
        _, shared = seeded(row.objective(), pair, seed=5)
        torch.manual_seed(5)
        each = draws(row.objective(), pair, 1)
        for n in each:
            torch.testing.assert_close(-each[n].sum(), shared[n], rtol=1e-10, atol=1e-11)


# --- the coefficients, from the table -------------------------------------------------------------------------------


def softmax(log_w):
    return log_w.exp() / log_w.exp().sum(0)


def groups_of(function, groups, log_w):
    return torch.cat([function(g) for g in log_w.chunk(groups)]) / groups


def table(b):
    """(objective, m, dreg's path) by hand."""
    square = lambda w, c=1.0: (1 - b * c) * w + b * c * w**2  # noqa: E731
    alpha = 0.3
    powers = lambda log_w: softmax((1 - alpha) * log_w)  # noqa: E731
    options = {"kl_weight": b}
    return [
        (pv.ELBO, {"num_particles": 6}, lambda w: torch.ones_like(w) / 6, lambda w: torch.ones_like(w) / 6),
        (pv.IWAE, {"num_particles": 6}, softmax, lambda w: square(softmax(w))),
        (pv.Renyi, {"alpha": alpha, "num_particles": 6}, powers, lambda w: square(powers(w), 1 - alpha)),
        (
            pv.MIWAE, {"num_groups": 2, "num_particles": 3}, lambda w: groups_of(softmax, 2, w),
            lambda w: groups_of(lambda g: square(softmax(g)), 2, w),
        ),
        (
            pv.PIWAE, {"num_groups": 3, "num_particles": 2}, softmax,
            lambda w: groups_of(lambda g: square(softmax(g)), 3, w),
        ),
        (
            pv.CIWAE, {"beta": 0.2, "num_particles": 6}, lambda w: 0.2 / 6 + 0.8 * softmax(w),
            lambda w: 0.2 / 6 + 0.8 * square(softmax(w)),
        ),
    ], options  # fmt: skip


@pytest.mark.parametrize("b", [1.0, 0.4, 0.0])
def test_coefficients_are_those_of_the_table(b):
    log_w = torch.randn(6, 2, 5)
    members, options = table(b)
    for make, kwargs, model, dreg in members:
        total, stl, last = (make(**kwargs, **options, gradient=g).weights(log_w) for g in ("total", "stl", "dreg"))
        path = groups_of(softmax, 3, log_w) if make is pv.PIWAE else model(log_w)
        for weights in (total, stl, last):
            torch.testing.assert_close(weights.model, model(log_w))
            assert not any(c.requires_grad for c in weights)
        for found, wanted in ((total.path, path), (total.score, -path), (stl.path, path), (last.path, dreg(log_w))):
            torch.testing.assert_close(found, wanted)
        assert stl.score.count_nonzero() == last.score.count_nonzero() == 0
    one_hot = torch.nn.functional.one_hot(log_w.argmax(0), 6).movedim(-1, 0).to(log_w)
    torch.testing.assert_close(pv.VRMax(6).weights(log_w).model, one_hot)


@pytest.mark.parametrize("row", [r for r in OBJECTIVES if r.gradient == "total" and not r.weighted], ids=name)
def test_learning_signal_leaves_the_particle_out(row):
    objective = row.objective()
    num, each = objective.total_particles, objective.num_particles
    log_w = torch.randn(num, 7)
    bound = pv.MIWAE(objective.num_groups, each).bound if isinstance(objective, pv.PIWAE) else objective.bound
    signal = objective.weights(log_w).reinforce
    for k in range(num):
        if each == 1:
            torch.testing.assert_close(signal[k], bound(log_w))
            continue
        others = [j for j in range(num) if j // each == k // each and j != k]
        replaced = log_w.clone()
        replaced[k] = log_w[others].mean(0)
        torch.testing.assert_close(signal[k], bound(log_w) - bound(replaced))
