"""Refinement, the posterior's gap and the gradient's signal, on pairs whose posterior is known."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from signal_to_noise import Gaussian

import pyrovae as pv
from pyrovae.engine.sites import Record
from tests.pairs import guide_of, model_of, units

pytestmark = pytest.mark.double(9)

NOISE = 0.6
X = torch.tensor([[0.5], [-1.5], [2.0]], dtype=torch.float64)
model = model_of(lambda z: dist.Normal(z, NOISE).to_event(1), units(1))


SLOPE, SPREAD = 1 / (1 + NOISE**2), NOISE / (1 + NOISE**2) ** 0.5


def exact_log_prob(x):
    return dist.Normal(0.0, (1 + NOISE**2) ** 0.5).log_prob(x).sum(-1)


def normal_guide(slope, scale):
    def guide(x):
        with pyro.plate("data", len(x)):
            return pyro.sample("z", dist.Normal(slope * x, scale).to_event(1))

    return guide


def kl(slope, scale, x):
    """KL of the guide from the posterior N(SLOPE x, SPREAD^2)."""
    return torch.distributions.kl_divergence(
        dist.Normal(slope * x, torch.tensor(scale)), dist.Normal(SLOPE * x, SPREAD)
    ).sum(-1)


def test_inflation_widens_normals_and_keeps_the_estimate():
    narrow = normal_guide(SLOPE, 0.5 * SPREAD)
    wide = pv.inflate(narrow, 2.0)
    torch.testing.assert_close(
        pv.log_weights(model, wide, X, num_particles=20), exact_log_prob(X).expand(20, 3)
    )  # it is the posterior again
    found = [pv.log_likelihood(model, guide, X, num_samples=2000, seed=0) for guide in (narrow, wide)]
    assert found[0].pareto_k.min() > 0.4
    assert found[1].std_error.max() < 1e-6


def test_inflation_of_full_covariances():
    def guide(x):
        with pyro.plate("data", len(x)):
            return pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), scale_tril=torch.eye(2)))

    assert pv.inflate(guide, 3.0)(torch.zeros(20_000)).std() == pytest.approx(3, rel=0.03)


def test_a_defensive_mixture_has_the_density_of_its_draws():
    mean, spread, wide, share = SLOPE * X[:1], 0.5 * SPREAD, 2.0 * SPREAD, 0.3
    guide = pv.inflate(normal_guide(SLOPE, spread), 4.0, weight=share)
    z = torch.linspace(-3, 3, 50).reshape(50, 1)
    with Record({"z": z}) as seen:
        guide(X[:1].expand(50, 1))
    usual, wider = (dist.Normal(mean, scale).log_prob(z).exp() for scale in (spread, wide))
    by_hand = (1 - share) * usual + share * wider
    torch.testing.assert_close(seen.sites["z"]["fn"].log_prob(z).exp(), by_hand.squeeze(-1))
    draws = guide(X[:1].expand(40_000, 1))
    assert draws.var() == pytest.approx((1 - share) * spread**2 + share * wide**2, rel=0.05)


@pytest.mark.parametrize("compile", [False, True])
def test_a_defensive_mixture_mends_light_tails(compile):
    narrow = normal_guide(SLOPE, 0.5 * SPREAD)
    mixed = pv.inflate(narrow, 3.0, weight=0.2)
    plain, found = (
        pv.log_likelihood(model, guide, X, num_samples=4000, seed=0, compile=compile) for guide in (narrow, mixed)
    )
    assert plain.unreliable > 0
    assert found.unreliable == 0
    assert found.path == ("compiled" if compile else "eager")
    assert ((found.log_prob - exact_log_prob(X)).abs() < 5 * found.std_error).all()


def test_inflation_refuses_other_sites_by_name():
    with pytest.raises(ValueError, match=r'guide site "bit" .* cannot be inflated'):
        pv.inflate(discrete)(X)


def test_an_estimate_says_that_its_guide_was_refined():
    guide = normal_guide(0.1, 1.4)
    plain, refined = (
        pv.log_likelihood(model, guide, pv.data.Images(X), num_samples=200, seed=0, refine_steps=s) for s in (0, 150)
    )
    assert "guide refined by 150 steps per datum" in str(refined)
    assert "refined" not in str(plain)
    assert refined.std_error.max() < 0.3 * plain.std_error.max()
    assert ((refined.log_prob - exact_log_prob(X)).abs() < 5 * refined.std_error + 1e-6).all()


def test_refinement_finds_the_posterior():
    refined = pv.refine(model, normal_guide(0.1, 1.4), X, steps=300, lr=0.05, seed=0)
    assert refined.shifts["z"].shape == (3, 1)
    log_w = pv.log_weights(model, refined, X, num_particles=200)
    torch.testing.assert_close(log_w, exact_log_prob(X).expand(200, 3), atol=0.02, rtol=0)


def layers(x):
    with pyro.plate("data", len(x)):
        top = pyro.sample("top", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
        z = pyro.sample("z", dist.Normal(0.8 * top, 0.5).to_event(1))
        pyro.sample("x", dist.Normal(z, NOISE).to_event(1), obs=x)


def layers_guide(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.3 * x, 0.9).to_event(1))
        pyro.sample("top", dist.Normal(0.2 * z, 1.0).to_event(1))


def test_refinement_of_a_hierarchy_tightens_the_bound_and_keeps_the_estimate():
    refined = pv.refine(layers, layers_guide, X, steps=200, lr=0.05, seed=0)
    before, after = (pv.log_weights(layers, g, X, num_particles=4000) for g in (layers_guide, refined))
    assert (after.mean(0) > before.mean(0) + 0.1).all()
    exact = dist.Normal(0.0, (0.8**2 + 0.5**2 + NOISE**2) ** 0.5).log_prob(X).sum(-1)
    found = pv.log_likelihood(layers, refined, X, num_samples=4000, seed=0)
    assert ((found.log_prob - exact).abs() < 5 * found.std_error).all()


discrete = guide_of(lambda x: dist.Bernoulli(torch.tensor(0.5)), "bit")
positive = guide_of(lambda x: dist.LogNormal(torch.tensor(0.0), 1.0), "rate")


def nothing(x):
    pass


@pytest.mark.parametrize(
    ("guide", "match"),
    [(discrete, 'guide site "bit" .* cannot be refined'), (positive, 'guide site "rate"'), (nothing, "draws nothing")],
)
def test_refinement_refuses_by_name(guide, match):
    with pytest.raises(ValueError, match=match):
        pv.refine(model, guide, X)


def test_an_exact_guide_has_no_gap():
    found = pv.posterior_gap(model, normal_guide(SLOPE, SPREAD), X, num_samples=640)
    assert found.log_p == pytest.approx(exact_log_prob(X).mean().item())
    assert found.gap == pytest.approx(0, abs=1e-9)


def test_the_gap_of_a_bad_guide_is_amortisation_and_of_a_bad_family_approximation():
    slope, scale = 0.2, 1.2
    found = pv.posterior_gap(model, normal_guide(slope, scale), X.repeat(20, 1), num_samples=2000, refine_steps=200)
    truth = exact_log_prob(X).mean().item()
    assert found.log_p == pytest.approx(truth, abs=0.01)
    assert found.elbo == pytest.approx(truth - kl(slope, scale, X).mean().item(), abs=0.02)
    assert found.elbo < found.iwae < found.log_p
    assert found.amortisation == pytest.approx(kl(slope, scale, X).mean().item(), abs=0.05)
    assert found.approximation == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize(("gradient", "slope", "repetitions"), [("total", -0.5, 1000), ("dreg", 0.5, 400)])
def test_signal_to_noise_has_rainforths_slopes(gradient, slope, repetitions):
    torch.manual_seed(0)
    pair, x = Gaussian(), torch.randn(8, 2) * 1.5
    few, many = (
        pv.gradient_snr(pv.IWAE(k, gradient=gradient), pair.model, pair.guide, x, repetitions=repetitions)
        for k in (4, 64)
    )
    # Standard errors of 0.01 and 0.1 at most; the theory is of large K.
    assert math.log(many.model / few.model, 16) == pytest.approx(0.5, abs=0.12)
    assert math.log(many.guide / few.guide, 16) == pytest.approx(slope, abs=0.2)


def test_snr_without_parameters_is_refused():
    with pytest.raises(ValueError, match="the pair has no parameters"):
        pv.gradient_snr(pv.ELBO(), model, normal_guide(0.5, 1.0), X)
