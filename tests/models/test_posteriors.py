"""Richer posteriors: a start at the diagonal one, gradients of every kind, exact bounds, diagnostics, options."""

import pytest
import torch
from torch.distributions import MultivariateNormal

import pyrovae as pv
from pyrovae.models import VAE
from pyrovae.parts import POSTERIORS, PRIORS, centre, make_posterior, share_options
from tests.state import scrambled

pytestmark = pytest.mark.double(3)

FLOWS = ("flow", "iaf")
each_flow = pytest.mark.parametrize("posterior", FLOWS)
SCALE = 0.7


def linear_vae(posterior, **options):
    """A linear Gaussian VAE, its flow bent, and its exact p(x)."""
    vae = VAE((4,), 2, (), "gaussian", SCALE, posterior=posterior, **options)
    scrambled(vae.decoder, 0.5)
    scrambled(vae.encoder, 0.2)
    scrambled(vae.posterior_family, 0.15)
    w, b = vae.decoder.output.weight.detach(), vae.decoder.output.bias.detach()
    return vae, MultivariateNormal(b, w @ w.T + SCALE**2 * torch.eye(4))


def gradients(vae, objective, x, seed=1):
    vae.zero_grad()
    torch.manual_seed(seed)
    objective.differentiable_loss(vae.model, vae.guide, x).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in vae.named_parameters()}


@each_flow
def test_a_flow_starts_as_the_diagonal_posterior(posterior):
    """The same encoder's output, and the same noise, give the same draw and density; centre is then the mean."""
    rich, plain = make_posterior(posterior, 3), make_posterior("diagonal", 3)
    params = torch.randn(5, sum(rich.heads))
    q, p = rich(params), plain(params[:, :6])
    torch.manual_seed(0)
    z = q.rsample()
    torch.manual_seed(0)
    torch.testing.assert_close(z, p.rsample())
    torch.testing.assert_close(q.log_prob(z), p.log_prob(z))
    torch.testing.assert_close(centre(q), centre(p))


@each_flow
def test_options_make_the_steps(posterior):
    family = make_posterior(posterior, 3, flows=2, flow_hidden=[7, 5])
    assert [step.__class__.__name__ for step in family.steps] == [family.step.__name__] * 2
    shapes = [tuple(p.shape) for p in family.steps[0].parameters() if p.ndim == 2]
    assert [shape[0] for shape in shapes][:2] == [7, 5]
    wide = make_posterior(posterior, 80)
    assert len(wide.steps) == 4
    assert next(wide.parameters()).shape[0] == 160


@each_flow
@pytest.mark.parametrize("gradient", ["stl", "dreg"])
def test_gradients_at_fixed_z_are_taken_at_fixed_z(posterior, gradient):
    """For one particle the engine's total gradient less the other is - d/dphi log q(z) at fixed z, on equal noise."""
    vae, _ = linear_vae(posterior)
    x = torch.randn(6, 4)
    total = gradients(vae, pv.ELBO(1), x)
    without = gradients(vae, pv.ELBO(1, gradient=gradient), x)
    vae.zero_grad()
    torch.manual_seed(1)
    q = vae.posterior(x)
    q.log_prob(q.rsample().detach()).sum().backward()
    assert sum(p.grad.abs().sum() for p in vae.encoder.parameters()) > 1
    for name, p in vae.named_parameters():
        score = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(total[name] - without[name], score, rtol=1e-6, atol=1e-8)


@each_flow
def test_gradients_of_every_kind_agree_in_the_mean(posterior):
    """IWAE(3), total and dreg, on 20 times 200 copies of one datum."""
    vae, _ = linear_vae(posterior, flows=2, flow_hidden=(3,))
    x = torch.randn(1, 4).expand(200, 4)
    differences = []
    for seed in range(20):
        total, dreg = (gradients(vae, pv.IWAE(3, gradient=g), x, seed) for g in ("total", "dreg"))
        differences.append(torch.cat([(total[name] - dreg[name]).flatten() for name in total]) / 200)
    differences = torch.stack(differences)
    error = differences.std(0) / 20**0.5
    assert (error > 0).any()
    # With 19 degrees of freedom, |t| > 7.5 has probability 4e-7.
    assert (differences.mean(0).abs() <= 7.5 * error + 1e-12).all()


@each_flow
def test_bounds_are_ordered_and_reach_log_p(posterior):
    """ELBO <= IWAE <= log p; importance sampling finds log p within its error."""
    vae, exact = linear_vae(posterior, flows=2, flow_hidden=(5,))
    with torch.no_grad():
        vae.encoder.output.bias[2:4] += 0.7  # wider than the posterior: bounded weights
    x = exact.sample((20,))
    log_p = exact.log_prob(x)
    with torch.no_grad():
        log_w = pv.log_weights(vae.model, vae.guide, x, num_particles=4000)
    elbo, iwae = log_w.mean(0), log_w.unflatten(0, (-1, 20)).logsumexp(1).mean(0) - torch.tensor(20.0).log()
    assert elbo.mean() < iwae.mean() < log_p.mean() + 0.01
    found = pv.log_likelihood(vae.model, vae.guide, x, num_samples=5000, seed=0, progress=None)
    reliable = found.pareto_k < 0.7
    assert reliable.sum() >= 15
    assert ((found.log_prob - log_p).abs() < 5 * found.std_error)[reliable].all()


@each_flow
def test_the_codes_variance_is_found_by_monte_carlo(posterior):
    """Active units of a guide that says nothing of the data: none; of one that says the data: those it says."""
    vae, _ = linear_vae(posterior)
    x = torch.randn(1000, 4)
    with torch.no_grad():
        vae.encoder.output.weight.zero_()
    assert pv.active_units(vae.guide, x)["z"].count == 0
    with torch.no_grad():
        vae.encoder.output.weight[0] = torch.tensor([3.0, 0, 0, 0])
    assert pv.active_units(vae.guide, x)["z"].count >= 1


@each_flow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_logs_the_kl_of_the_whole_latent(posterior, precision):
    torch.set_default_dtype(torch.float32)
    vae = VAE((6,), 3, (4,), posterior=posterior, prior="flow", flows=2)
    x = torch.rand(100, 6).round()
    result = pv.fit(vae.model, vae.guide, x, objective=pv.IWAE(3), epochs=2, precision=precision, compile=False)
    row = result.history[-1]
    assert len(row["kl_per_unit"]["z"]) == 1
    assert row["kl"] == pytest.approx(row["kl_per_unit"]["z"][0])
    assert 0 <= row["active_units"]["z"] <= 3
    assert pv.fit(vae.model, vae.guide, x, objective=pv.ELBO(2, free_bits=0.1), epochs=1, compile=False).history
    found = pv.log_likelihood(vae.model, vae.guide, x, num_samples=50, seed=0, progress=None)
    assert found.log_prob.isfinite().all()


def test_options_are_shared_out():
    both = share_options({"flows": 2, "components": None}, prior=("flow", PRIORS), posterior=("iaf", POSTERIORS))
    assert both == ({"flows": 2}, {"flows": 2})
    one = share_options({"flows": 2, "components": 5}, prior=("vamp", PRIORS), posterior=("iaf", POSTERIORS))
    assert one == ({"components": 5}, {"flows": 2})
    with pytest.raises(ValueError, match="unknown option 'flow': did you mean 'flows'"):
        make_posterior("iaf", 3, flow=2)
