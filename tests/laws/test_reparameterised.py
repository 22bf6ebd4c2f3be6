"""Reparameterised models, whose latents are point masses that carry their density: a conjugate update, a split."""

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer.reparam import ConjugateReparam, SplitReparam
from torch.distributions import kl_divergence

import pyrovae as pv
from tests.laws.objectives import OBJECTIVES
from tests.laws.programs import lp, run_of
from tests.state import refused

X = torch.tensor([0.0, 2.0, 5.0], dtype=torch.float64)
SHAPE, RATE = torch.tensor(1.5, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)


def rates(x, shape=SHAPE, rate=RATE):
    """z ~ Gamma, x ~ Poisson(z): x is negative binomial."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(shape.expand(len(x)), rate))
        pyro.sample("x", dist.Poisson(z), obs=x)


def updated(model, share=1.0):
    """The model with z drawn from its posterior as if x were ``share * x``, seen for a time ``share``."""

    def seen(x, *_):
        return dist.Gamma(1 + share * x, torch.full_like(x, share))

    return poutine.reparam(model, {"z": ConjugateReparam(seen)})


def nothing(*_):
    """A guide without latents."""


BOUNDS = [row for row in OBJECTIVES if not row.weighted]
FURTHER = [pv.RWS(3), pv.RWS(3, gradient="dreg"), pv.TVO(3), pv.ELBO(2, free_bits=0.1)]


@pytest.mark.parametrize("objective", [*(row.objective() for row in BOUNDS), *FURTHER], ids=repr)
def test_a_conjugate_update_makes_every_weight_log_p_of_x(objective):
    shape, rate = SHAPE.clone().requires_grad_(), RATE.clone().requires_grad_()
    exact = -dist.GammaPoisson(shape, rate).log_prob(X).sum()
    loss = objective.differentiable_loss(updated(rates), nothing, X, shape, rate)
    assert loss.item() == pytest.approx(exact.item())
    expected = torch.autograd.grad(exact, (shape, rate))
    torch.testing.assert_close(torch.autograd.grad(loss, (shape, rate)), expected)


def test_an_approximate_update_is_a_proposal():
    exact = dist.GammaPoisson(SHAPE, RATE).log_prob(X)
    found = pv.log_likelihood(updated(rates, 0.8), nothing, X, num_samples=5_000, seed=0)
    assert ((found.log_prob - exact).abs() < 5 * found.std_error).all()  # false alarms: 2e-6
    sure = pv.log_likelihood(updated(rates), nothing, X, num_samples=2, seed=0)
    torch.testing.assert_close(sure.log_prob, exact)


@pytest.mark.parametrize("options", [{}, {"free_bits": 1e-9}])
def test_kl_weight_weighs_the_update_against_the_prior(options, agree):
    drawn = dist.Gamma(SHAPE + 0.8 * X, RATE + 0.8)
    likelihood = X * (drawn.concentration.digamma() - drawn.rate.log()) - drawn.mean - torch.lgamma(X + 1)
    exact = (likelihood - 0.3 * kl_divergence(drawn, dist.Gamma(SHAPE.expand(3), RATE))).sum()
    objective = pv.ELBO(500, kl_weight=0.3, **options)
    losses = torch.tensor([objective.loss(updated(rates, 0.8), nothing, X) for _ in range(200)])
    agree(repr(objective), "conjugate update", "loss", losses, -exact)


def test_the_history_counts_the_update_as_kl():
    exact = dist.GammaPoisson(SHAPE, RATE).log_prob(X).mean().item()
    shape = SHAPE.clone().requires_grad_()
    fitted = pv.fit(
        updated(lambda x: rates(x, shape)), nothing, X, objective=pv.ELBO(), epochs=1, batch_size=3, compile=False,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
    )  # fmt: skip
    last = fitted.history[-1]
    assert last["reconstruction"] - last["kl"] == pytest.approx(exact)


POINTS = torch.tensor([[0.3, -1.0, 0.5], [1.0, 0.2, -0.4]], dtype=torch.float64)


def points(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.7).to_event(1), obs=x)


def parts(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z_split_0", dist.Normal(0.4 * x[:, :1], 0.6).to_event(1))
        pyro.sample("z_split_1", dist.Normal(0.4 * x[:, 1:], 0.6).to_event(1))


SPLIT = poutine.reparam(points, {"z": SplitReparam([1, 2], -1)})


@pytest.mark.parametrize("kl_weight", [1.0, 0.3])
def test_the_prior_of_a_latent_in_parts_is_weighed_as_one(kl_weight):
    loss, seen = run_of(pv.IWAE(4, kl_weight=kl_weight).loss, SPLIT, parts, POINTS)
    z = torch.cat([seen["z_split_0"], seen["z_split_1"]], -1)
    kl = lp(dist.Normal(0.4 * POINTS, 0.6), z, 1) - lp(dist.Normal(0.0, 1.0), z, 1)
    log_w = lp(dist.Normal(z, 0.7), POINTS, 1) - kl_weight * kl
    assert loss == pytest.approx(-log_w.exp().mean(0).log().sum().item())


def test_what_needs_draws_from_the_prior_is_refused():
    model, args = updated(rates), {"like": X}
    match = 'the model draws "z_updated" from a distribution updated by its data'
    refused(ValueError, match, pv.sample, model, 3, **args)
    refused(ValueError, match, pv.bdmc, model, 3, **args)
    refused(ValueError, match, pv.ais_log_likelihood, model, X)
    refused(ValueError, match, pv.SleepPhi().loss, model, nothing, X)
    refused(
        ValueError, "otherwise than in the other, or has an improper", pv.ELBO(free_bits=0.1).loss, SPLIT, parts, POINTS
    )


def test_a_flow_of_data_is_trained_step_after_step_on_the_same_tensor():
    """Such transforms keep what they computed for a tensor, with the parameters of then."""
    flow, x = dist.transforms.spline(2, count_bins=4), torch.randn(6, 2)

    def model(x):
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
            pyro.sample("x", dist.TransformedDistribution(base, [flow]), obs=x)

    objective, losses = pv.ELBO(), []
    for _ in range(3):
        with torch.no_grad():
            measured = objective.loss(model, nothing, x)
        losses.append(objective.loss_and_grads(model, nothing, x))
        assert measured == losses[-1]
        slopes = [p.grad for p in flow.parameters() if p.grad is not None]
        assert any(slope.any() for slope in slopes)
        with torch.no_grad():
            for p in flow.parameters():
                if p.grad is not None:
                    p -= 0.01 * p.grad
                    p.grad = None
    assert losses[0] > losses[1] > losses[2]
