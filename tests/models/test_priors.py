"""Richer priors: densities, draws, exact marginals of linear models, pseudo-inputs, round trips, options."""

import copy
import pickle

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal

import pyrovae as pv
from pyrovae.models import VAE
from pyrovae.parts import POSTERIORS, PRIORS, NormalMixture, StandardNormal, make_prior
from tests.state import grid, scrambled

pytestmark = pytest.mark.double(3)

RICH = [name for name in PRIORS if name != "normal"]
each_prior = pytest.mark.parametrize("prior", PRIORS)
SCALE = 0.7
SMALL = {"mixture": {"components": 4}, "vamp": {"components": 4}, "flow": {"flows": 3, "flow_hidden": [8]}}


def vae_with(prior, shape=(4,), dim=2, hidden=(), **arguments):
    """A Gaussian VAE with that prior, far from its start."""
    options = SMALL.get(prior, {}) | arguments
    return scrambled(VAE(shape, dim, hidden, "gaussian", SCALE, prior=prior, **options), 0.5)


def mixture(count=4, dim=3):
    logits, loc, scale = torch.randn(count), 2 * torch.randn(count, dim), torch.rand(count, dim) + 0.1
    oracle = dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(loc, scale).to_event(1))
    return NormalMixture(logits, loc, scale), oracle


# --- the mixture ---------------------------------------------------------------------------------------------------


def test_a_mixture_is_the_one_of_its_components():
    ours, oracle = mixture()
    z = torch.randn(5, 6, 3, requires_grad=True)
    torch.testing.assert_close(ours.log_prob(z), oracle.log_prob(z))
    torch.testing.assert_close(ours.mean, oracle.mean)
    torch.testing.assert_close(ours.variance, oracle.variance)
    (slope,) = torch.autograd.grad(ours.log_prob(z).sum(), z)
    torch.testing.assert_close(slope, torch.autograd.grad(oracle.log_prob(z).sum(), z)[0])


def test_a_mixture_expands():
    ours, oracle = mixture()
    wide = ours.expand((2, 7))
    assert wide.batch_shape == (2, 7)
    assert wide.sample((5,)).shape == (5, 2, 7, 3)
    assert wide.mean.shape == wide.variance.shape == (2, 7, 3)
    z = torch.randn(7, 3)
    torch.testing.assert_close(wide.log_prob(z), oracle.log_prob(z).expand(2, 7))


def test_a_narrow_mixture_loses_nothing_in_float32():
    """At z / scale = 3,000 the squares cancel to 1e-1 in float32; the result is right to its own rounding."""
    loc, scale = torch.full((2, 3), 3.0), torch.full((2, 3), 1e-3)
    z = loc[0] + 1e-3 * torch.randn(50, 3)
    exact = NormalMixture(torch.zeros(2), loc, scale)
    rounded = NormalMixture(*(t.float() for t in (torch.zeros(2), loc, scale)))
    expected = exact.log_prob(z.float().double())
    torch.testing.assert_close(rounded.log_prob(z.float()).double(), expected, rtol=1e-4, atol=1e-3)


@each_prior
def test_a_density_integrates_to_one_and_draws_have_it(prior):
    """On a grid; then moments of 20,000 draws within 5 standard errors, false alarm 6e-7 each."""
    p = vae_with(prior).prior(torch.zeros(()))
    assert p.batch_shape == ()
    assert p.event_shape == (2,)
    points, cell = grid()
    mass = (p.log_prob(points).exp() * cell).detach()
    assert float(mass.sum()) == pytest.approx(1, abs=1e-3)
    z = p.sample((20_000,)).detach()
    for moment in (lambda v: v, torch.square, torch.tanh, lambda v: v.prod(-1, keepdim=True)):
        expected, draws = mass @ moment(points), moment(z)
        assert ((draws.mean(0) - expected).abs() < 5 * draws.std(0) / 20_000**0.5).all()


def test_a_mixture_in_one_dimension():
    p = scrambled(make_prior("mixture", 1, components=3), 0.5).distribution(torch.zeros(()))
    axis = torch.linspace(-20, 20, 4001)
    assert (p.log_prob(axis.unsqueeze(-1)).exp().sum() * 0.01).item() == pytest.approx(1, abs=1e-6)


# --- in the model ----------------------------------------------------------------------------------------------------


def marginal(vae, x):
    """log p(x) of a linear VAE whose prior is a mixture of normals."""
    prior = vae.prior(x)
    w, b = vae.decoder.output.weight, vae.decoder.output.bias
    components = MultivariateNormal(
        prior.loc @ w.T + b, w @ prior.scale.square().diag_embed() @ w.T + SCALE**2 * torch.eye(len(b))
    )
    return (prior.logits.log_softmax(-1) + components.log_prob(x.unsqueeze(-2))).logsumexp(-1).detach()


def integrated(vae, x):
    """log p(x) by the trapezoid rule over two latent units."""
    points, cell = grid(limit=12, number=161)
    log_joint = vae.prior(x).log_prob(points) + vae.likelihood(points.unsqueeze(1)).log_prob(x).mT
    return (log_joint.logsumexp(-1) + cell.log()).detach()


@pytest.mark.parametrize("prior", RICH)
def test_log_likelihood_is_the_exact_marginal(prior):
    vae = vae_with(prior, hidden=())
    x = pv.sample(vae, 10, returns="draws", seed=0)
    exact = integrated(vae, x)
    if prior != "flow":
        torch.testing.assert_close(exact, marginal(vae, x), rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # a guide as wide as need be: the weights are bounded
        vae.encoder.output.weight.zero_()
        vae.encoder.output.bias.copy_(torch.tensor([0.0, 0.0, 1.0, 1.0]))
    if prior == "vamp":
        exact = marginal(vae, x)  # its components moved with the guide
    found = pv.log_likelihood(vae.model, vae.guide, x, num_samples=4000, seed=0, progress=None)
    assert (found.std_error < 0.3).all()
    assert ((found.log_prob - exact).abs() < 5 * found.std_error).all()
    assert found.std_error.max() > 0


@each_prior
def test_generation_follows_the_prior(prior):
    vae = vae_with(prior)
    z = pv.sample(vae, 4000, site="z", returns="draws", seed=0)
    points, cell = grid()
    mean = (vae.prior(z).log_prob(points).exp() * cell).detach() @ points
    assert ((z.mean(0) - mean).abs() < 5 * z.std(0) / 4000**0.5).all()


def test_the_plain_prior_is_unchanged():
    """The default draws the same weights and holds the same parameters as without the choice."""
    vae = VAE((6,), 3, (4,))
    assert isinstance(vae.prior_family, StandardNormal)
    assert not list(vae.prior_family.parameters()) + list(vae.posterior_family.parameters())
    assert vae.prior(torch.zeros((), dtype=torch.float32)).base_dist.loc.dtype == torch.float32
    assert {name.split(".")[0] for name in vae.state_dict()} == {"encoder", "decoder"}


# --- pseudo-inputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_a_vampprior_is_the_mean_of_the_posteriors_of_its_pseudo_inputs(posterior):
    vae = vae_with("vamp", posterior=posterior)
    z = torch.randn(3, 5, 2)
    each = torch.stack([vae.posterior(u).log_prob(z) for u in vae.prior_family.pseudo_inputs])
    torch.testing.assert_close(vae.prior(z).expand((3, 5)).log_prob(z), each.logsumexp(0) - torch.tensor(4.0).log())


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_a_vampprior_can_be_annealed(posterior):
    """By Hamiltonian moves, whatever its components, to log p(x) within 4.9 standard errors (false alarm 1e-6)."""
    flows = {"flows": 1} if posterior in ("flow", "iaf") else {}
    vae, x = scrambled(vae_with("vamp", posterior=posterior, **flows), 0.15), torch.randn(3, 4)
    settings = {"num_chains": 32, "num_temperatures": 12, "leapfrog_steps": 2, "seed": 0, "compile": False}
    found = pv.ais_log_likelihood(vae, x, **settings)
    assert ((found.log_prob - integrated(vae, x)).abs() < 4.9 * found.std_error).all()
    assert found.std_error.max() < 0.15


def test_pseudo_inputs_start_from_data_and_stay_within_its_range():
    vae = VAE((6,), 2, (4,), prior="vamp", components=5)
    start = vae.prior_family.pseudo_inputs.detach()
    assert ((start > 0) & (start < 1)).all()
    assert start.mean().item() == pytest.approx(0.5, abs=5 * 0.1 / 30**0.5)
    x = torch.rand(9, 6).round()
    vae.initialise(x)
    torch.testing.assert_close(vae.prior_family.pseudo_inputs, x[[0, 2, 4, 6, 8]].clamp(0.01, 0.99))


def test_pseudo_inputs_of_real_data_are_real():
    vae = VAE((6,), 2, (4,), "gaussian", prior="vamp", components=2)
    x = 10 * torch.randn(9, 6)
    assert torch.equal(vae.initialise(x).prior_family.pseudo_inputs, x[[0, 8]])


def test_fewer_data_than_pseudo_inputs_leave_the_rest_at_random():
    vae = VAE((6,), 2, (4,), prior="vamp", components=5)
    before = vae.prior_family.pseudo_inputs.detach().clone()
    after = vae.initialise(torch.ones(2, 6)).prior_family.pseudo_inputs
    assert torch.equal(after[2:], before[2:])
    torch.testing.assert_close(after[:2], torch.full((2, 6), 0.99))


@each_prior
def test_a_copys_prior_hangs_on_the_copys_encoder(prior):
    vae, z = vae_with(prior), torch.randn(5, 2)
    vae.model(torch.randn(3, 4))
    expected = vae.prior(z).log_prob(z)
    copies = copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))
    with torch.no_grad():
        for p in vae.parameters():
            p.zero_()
    for other in copies:
        assert torch.equal(other.prior(z).log_prob(z), expected)
        assert len(list(other.parameters())) == len(list(vae.parameters()))


def test_a_posterior_that_is_a_module_stays_its_owners():
    encoder = torch.nn.Sequential(torch.nn.Linear(4, 4), POSTERIORS["diagonal"](2))
    prior = make_prior("vamp", 2, posterior=encoder, pseudo_shape=(4,), components=3)
    assert list(prior.state_dict()) == ["raw"]
    assert prior.distribution(torch.zeros(())).event_shape == (2,)


def test_a_vampprior_without_a_posterior_is_refused():
    with pytest.raises(ValueError, match="give posterior and pseudo_shape"):
        make_prior("vamp", 3)
