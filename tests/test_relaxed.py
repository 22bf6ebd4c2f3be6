"""Relaxed one-hot latents at temperatures at which their values underflow."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyrovae as pv
from pyrovae.engine.run import run
from pyrovae.engine.sites import log_prob
from tests.pairs import guide_of, model_of

COLD = torch.tensor(0.1)
X = torch.bernoulli(torch.full((40, 6), 0.5), generator=torch.Generator().manual_seed(0))


class Cold(nn.Module):
    """Ten classes, of which most draws give nothing to most."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 10), nn.Linear(10, 6)
        nn.init.normal_(self.encoder.weight, std=4.0, generator=torch.Generator().manual_seed(1))
        prior = dist.RelaxedOneHotCategorical(COLD, logits=torch.zeros(10))
        self.model = model_of(lambda z: dist.Bernoulli(logits=self.decoder(z)).to_event(1), lambda x: prior)
        self.guide = guide_of(lambda x: dist.RelaxedOneHotCategorical(COLD, logits=self.encoder(x)))


def test_the_density_of_draws_that_underflow_is_that_of_their_logarithms():
    """In float64, by hand."""
    pair = Cold()
    torch.manual_seed(0)
    found = run(pair.model, pair.guide, (X,), {}, num_particles=5, nesting=1)
    site = found.guide["z"]
    assert (site["value"] == 0).any(-1).all()
    torch.testing.assert_close(site["value"].sum(-1), torch.ones(5, 40))
    x, t = vars(site["value"])["logarithm"].double(), COLD.double()
    scores = pair.encoder(X).double() - t * x
    constant = torch.lgamma(torch.tensor(10.0)) + 9 * t.log()
    expected = constant + scores.sum(-1) - 10 * scores.logsumexp(-1) - x.sum(-1)
    torch.testing.assert_close(log_prob(site).double(), expected, rtol=1e-4, atol=0.05)


def test_weights_of_draws_that_underflow_have_a_mean_of_one():
    """Without data p / q has; |z| < 5."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.RelaxedOneHotCategorical(COLD, logits=torch.zeros(3)))
            pyro.sample("x", dist.Normal(x, 1.0), obs=x)

    guide = guide_of(lambda x: dist.RelaxedOneHotCategorical(COLD, logits=torch.tensor([0.5, -0.5, 0.0])))
    log_w = pv.log_weights(model, guide, torch.zeros(1), num_particles=20_000)
    w = (log_w - dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.0))).exp()
    assert abs(w.mean() - 1) < 5 * w.std() / 20_000**0.5


@pytest.mark.parametrize("gradient", ["total", "stl", "dreg"])
def test_cold_latents_are_trained_under_every_gradient(gradient):
    pair = Cold()
    found = pv.fit(pair.model, pair.guide, X, objective=pv.IWAE(3, gradient=gradient), epochs=5, lr=0.05)
    assert found.history[-1]["bound"] > found.history[0]["bound"]


def test_cold_latents_are_measured_compiled_as_eagerly(interpreted):
    pair = Cold()
    found = [pv.log_likelihood(pair.model, pair.guide, X, num_samples=50, seed=0, compile=how) for how in (False, True)]
    assert found[1].path == "compiled"
    torch.testing.assert_close(found[0].log_prob, found[1].log_prob, rtol=1e-4, atol=1e-3)
