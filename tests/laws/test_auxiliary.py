"""What of a guide's run counts in log q: its draws, not the model's observations, nor noise that the model lacks."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide

import pyrovae as pv
from tests.laws.programs import lp, normal, run_of, seeded_loss
from tests.pairs import model_of
from tests.state import refused

Y = torch.tensor([1.3, 0.2, -0.4, 0.9, 2.0, 0.7], dtype=torch.float64)
MESSENGERS = [
    autoguide.AutoNormalMessenger, autoguide.AutoHierarchicalNormalMessenger, autoguide.AutoRegressiveMessenger,
]  # fmt: skip


# --- guides that run their model ------------------------------------------------------------------------------------


def mean_model(y):
    """mean ~ N(0, 1), y ~ N(mean, 1), and a factor besides."""
    mean = pyro.sample("mean", normal(y.new_zeros(())))
    pyro.factor("bonus", y.new_tensor(0.25), has_rsample=True)
    with pyro.plate("data", len(y)):
        pyro.sample("y", normal(mean), obs=y)


EXACT = dist.MultivariateNormal(torch.zeros(6).double(), torch.eye(6).double() + 1).log_prob(Y).item() + 0.25


def messenger(kind, scale=7**-0.5):
    """One whose mean is the posterior's; its scale is the posterior's by default."""
    guide = kind(mean_model, init_scale=scale)
    guide(Y)
    guide.locs.mean = Y.sum() / 7
    return guide


@pytest.mark.parametrize("kind", MESSENGERS)
def test_a_guide_made_by_effects_has_true_weights(kind):
    guide = messenger(kind)
    log_w = pv.log_weights(mean_model, guide, Y, num_particles=5)
    torch.testing.assert_close(log_w, torch.full_like(log_w, EXACT))
    for objective in (pv.ELBO(2), pv.IWAE(3), pv.PIWAE(2, 2), pv.TVO(3), pv.RWS(3)):
        assert objective.loss(mean_model, guide, Y) == pytest.approx(-EXACT)
    estimate = pv.log_likelihood(mean_model, guide, Y, num_samples=50, seed=0)
    assert estimate.log_prob.item() == pytest.approx(EXACT)
    assert pv.posterior_gap(mean_model, guide, Y, num_samples=128).elbo == pytest.approx(EXACT)
    stl = pv.IWAE(3, gradient="stl").differentiable_loss(mean_model, guide, Y)
    for gradient in torch.autograd.grad(stl, list(guide.parameters())):
        assert gradient.abs().max() < 1e-10  # at the posterior it has no noise


def test_parameters_of_the_model_are_not_those_of_a_guide_that_runs_it():
    shift = torch.tensor(0.3, requires_grad=True)

    def shifted(y):
        mean = pyro.sample("mean", normal(y.new_zeros(())))
        with pyro.plate("data", len(y)):
            pyro.sample("y", normal(mean + shift), obs=y)

    guide = autoguide.AutoNormalMessenger(shifted, init_scale=0.5)
    guide(Y)
    found = pv.evaluate.gradient_snr(pv.ELBO(), shifted, guide, Y, repetitions=5)
    assert math.isfinite(found.model)  # NaN of a program without parameters
    assert math.isfinite(found.guide)


def test_free_bits_and_dreams_of_a_guide_made_by_effects():
    guide = messenger(autoguide.AutoNormalMessenger, 0.5)
    q = dist.Normal(guide.locs.mean, guide.scales.mean)
    (loss, _), seen = run_of(partial(seeded_loss, pv.ELBO(3, free_bits=1e-9)), mean_model, guide, Y)
    mean = seen["mean"].flatten()
    kl = q.log_prob(mean) - lp(normal(0.0), mean)  # by its draws: that of its kind has no closed form
    log_w = lp(normal(seen["mean"]), Y).sum(-1) + 0.25 - kl.detach()
    assert loss == pytest.approx(-float(log_w.mean()))
    (loss, _), seen = run_of(partial(seeded_loss, pv.SleepPhi()), mean_model, guide, Y)
    assert loss == pytest.approx(-q.log_prob(seen["mean"]).item())


def test_the_model_may_be_its_own_guide():
    # Likelihood weighting: the prior proposes, and what is left of the weights is the likelihood.
    log_w, seen = run_of(partial(pv.log_weights, num_particles=4), mean_model, mean_model, Y)
    torch.testing.assert_close(log_w, lp(normal(seen["mean"]), Y).sum(-1) + 0.25)


# --- draws that the model lacks -------------------------------------------------------------------------------------

X = torch.tensor([0.4, -0.9, 1.3], dtype=torch.float64)
AUXILIARY = {"is_auxiliary": True}
model = model_of(lambda z: normal(z))


def noisy(noise, spread=0.3, outside=False):
    """z ~ N(x / 2 + spread * u, .9) with noise u of its own, in the plate or outside of it."""

    def guide(x):
        u = pyro.sample("u", noise, infer=AUXILIARY) if outside else None
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", noise, infer=AUXILIARY) if u is None else u
            pyro.sample("z", normal(0.5 * x + spread * (u - 1), 0.9))

    return guide


def by_hand(seen):
    return (
        lp(normal(0.0), seen["z"])
        + lp(normal(seen["z"]), X)
        - lp(normal(0.5 * X + 0.3 * (seen["u"] - 1), 0.9), seen["z"])
    )


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize(
    "noise", [dist.Uniform(0.0, 2.0), dist.Categorical(torch.ones(4))], ids=["uniform", "discrete"]
)
def test_noise_of_the_guide_leaves_the_weights(noise, outside):
    guide = noisy(noise, outside=outside)
    log_w, seen = run_of(partial(pv.log_weights, num_particles=4), model, guide, X)
    assert log_w.shape == (4, 3)
    torch.testing.assert_close(log_w, by_hand(seen))
    (loss, _), seen = run_of(partial(seeded_loss, pv.IWAE(4)), model, guide, X)
    assert loss == pytest.approx(-float((by_hand(seen).logsumexp(0) - math.log(4)).sum()))
    estimate = pv.log_likelihood(model, guide, X, num_samples=4000, seed=0)
    error = (estimate.log_prob - dist.Normal(0.0, 2**0.5).log_prob(X)) / estimate.std_error
    assert error.abs().max() < 5  # false-alarm rate 2e-6


def test_deltas_count_with_the_draw_that_they_are_computed_from_however_far_that_is():
    def guide(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Uniform(0.0, 2.0), infer=AUXILIARY)  # noise of noise
            v = pyro.sample("v", normal(0.5 * x + 0.3 * (u - 1), 0.9), infer=AUXILIARY)
            w = pyro.sample("w", dist.Delta(2 * v, log_density=-torch.tensor(2.0).log()), infer=AUXILIARY)
            pyro.sample("z", dist.Delta(w / 2, log_density=torch.tensor(2.0).log()))

    log_w, seen = run_of(partial(pv.log_weights, num_particles=4), model, guide, X)
    torch.testing.assert_close(log_w, by_hand(seen))


def test_a_site_may_read_such_a_draw_or_its_delta_and_figures_stay():
    def two(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
            b = pyro.sample("b", normal(a.log()))
            pyro.sample("x", normal(b), obs=x)

    def guide(x, direct):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", normal(0.3 * x, 0.8), infer=AUXILIARY)
            a = pyro.sample("a", dist.Delta(u.exp(), log_density=-u))
            pyro.sample("b", normal(0.5 * (u if direct else a.log()), 0.9))

    for direct in (False, True):
        log_w, seen = run_of(partial(pv.log_weights, num_particles=4), two, partial(guide, direct=direct), X)
        u, b = seen["u"], seen["b"]
        joint = lp(normal(0.0), u) + lp(normal(u), b) + lp(normal(b), X)
        torch.testing.assert_close(log_w, joint - lp(normal(0.3 * X, 0.8), u) - lp(normal(0.5 * u, 0.9), b))


def test_a_delta_of_more_random_numbers_than_it_has_is_refused():
    def guide(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", normal(torch.zeros(2)).to_event(1), infer=AUXILIARY)
            pyro.sample("z", dist.Delta(0.5 * x + u.sum(-1)))

    refused(ValueError, '"z" are Deltas of 3 .*"u".* draw 6', pv.log_weights, model, guide, X)


# --- their gradients ------------------------------------------------------------------------------------------------

R = 20_000
PHI = {"c": 0.3, "s": -0.2, "m": 0.7, "l": -0.4}


def phi():
    return {name: torch.full((R,), value, requires_grad=True) for name, value in PHI.items()}


def learned(p, discrete):
    def guide(x):
        with pyro.plate("data", R):
            noise = dist.Bernoulli(logits=p["m"]) if discrete else normal(p["m"], p["l"].exp())
            u = pyro.sample("u", noise, infer=AUXILIARY)
            pyro.sample("z", normal(p["c"] * x + 0.6 * u, p["s"].exp()))

    return guide


def exact_elbo(p, x, discrete):
    """E log p(x, z) - E log q(z | u), from the first two moments of z."""
    u = p["m"].sigmoid() if discrete else p["m"]
    loc, spread = p["c"] * x + 0.6 * u, u * (1 - u) if discrete else (2 * p["l"]).exp()
    square = 0.36 * spread + (2 * p["s"]).exp()
    log_p = -math.log(2 * math.pi) - 0.5 * (loc.square() + square) - 0.5 * ((x - loc).square() + square)
    return log_p + p["s"] + 0.5 * math.log(2 * math.pi * math.e)


@pytest.mark.parametrize(
    ("objective", "discrete"),
    [
        (pv.ELBO(1), False), (pv.ELBO(2, gradient="stl"), False), (pv.ELBO(1), True), (pv.ELBO(3), True),
        (pv.Renyi(1.0, 2, gradient="dreg"), False),
    ],
)  # fmt: skip
def test_noise_has_its_gradient(objective, discrete, agree):
    p, x = phi(), torch.tensor(0.9)
    objective.differentiable_loss(model, learned(p, discrete), x.expand(R)).backward()
    one = {name: torch.tensor(value, requires_grad=True) for name, value in PHI.items()}
    names = [name for name in PHI if p[name].grad is not None]
    truth = torch.autograd.grad(exact_elbo(one, x, discrete), [one[name] for name in names])
    for name, gradient in zip(names, truth, strict=True):
        agree(repr(objective), "noisy guide", f"d/d{name}", -p[name].grad, gradient)
    assert set(names) == {"c", "s", "m"} | ({"l"} if not discrete else set())


@pytest.mark.parametrize("make", [partial(pv.IWAE, 3), partial(pv.PIWAE, 2, 2)], ids=["IWAE", "PIWAE"])
def test_dreg_of_a_noisy_guide_is_the_total_gradient_in_the_mean(make, agree):
    found = []
    for gradient in ("total", "dreg"):
        p = phi()
        make(gradient=gradient).differentiable_loss(model, learned(p, False), torch.tensor(0.9).expand(R)).backward()
        found.append(p)
    for name in PHI:
        agree(repr(make(gradient="dreg")), "noisy guide", f"d/d{name}", found[0][name].grad - found[1][name].grad, 0.0)


def test_noise_without_rsample_is_refused_where_no_score_trains_it():
    p, x = phi(), torch.zeros(R)
    for objective in (pv.IWAE(3, gradient="dreg"), pv.ELBO(gradient="stl"), pv.RWS(2), pv.TVO(2)):
        refused(ValueError, '"u"', objective.differentiable_loss, model, learned(p, True), x)
    assert math.isfinite(pv.RWS(2).differentiable_loss(model, noisy(dist.Categorical(torch.ones(4))), X).item())
