"""Weights of discrete latents: no tail to fit, but draws to count."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrovae as pv
from pyrovae.engine.weights import Tally
from tests.pairs import guide_of, model_of

pytestmark = pytest.mark.double(31)

X = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
NOISE = 0.8
Z = 4.9  # two-sided false-alarm rate 1e-6


def test_the_draws_of_the_largest_weight_are_counted_over_all_passes():
    """Three values of weights 1, e, e^3 (to rounding), so many times each; the largest first comes late, or early."""
    times = torch.tensor([[940, 60, 0], [500, 480, 20], [900, 90, 10], [993, 5, 2], [0, 1000, 0]])
    rows = [torch.cat([torch.full((n,), v) for n, v in zip(t.tolist(), (0.0, 1.0, 3.0), strict=True)]) for t in times]
    log_w = torch.stack(rows, 1) + 1e-6 * torch.randn(1000, 5, generator=torch.Generator().manual_seed(0)) - 800
    w = log_w.sub(log_w.max()).exp()
    ess = w.sum(0) ** 2 / w.square().sum(0)
    expected = torch.tensor([60.0, 20.0, 10.0, 0.0, 1000.0])
    expected[3] = ess[3]  # two draws that hold a fortieth
    assert (times[3, 2] * math.exp(3) / (993 + 5 * math.e + 2 * math.exp(3))) < 0.1
    for flip in (False, True):
        for size in (7, 300, 1000):
            tally = Tally(1000, discrete=True)
            for part in (log_w.flip(0) if flip else log_w).split(size):
                tally.add(part)
            _, k, draws = tally.results()
            assert k.isnan().all()
            torch.testing.assert_close(draws, expected.minimum(ess))


def coin(prior, **likelihood):
    """z ~ Bernoulli(prior), x ~ N(z likelihood, 1)."""
    return model_of(
        lambda z: dist.Normal(likelihood.get("gain", 1.0) * z, 1.0), lambda x: dist.Bernoulli(x.new_tensor(prior))
    )


def coin_guide(probability):
    return guide_of(lambda x: dist.Bernoulli(x.new_tensor(probability)))


@pytest.mark.parametrize("options", [{}, {"chunk_size": 300}, {"compile": True}])
def test_discrete_latents_of_few_values_are_reliable_where_each_is_drawn(options, interpreted):
    x = torch.tensor([0.7, -0.3])
    exact = torch.logaddexp(
        math.log(0.3) + dist.Normal(1.0, 1.0).log_prob(x), math.log(0.7) + dist.Normal(0.0, 1.0).log_prob(x)
    )
    found = pv.log_likelihood(coin(0.3), coin_guide(0.4), x, num_samples=4000, seed=0, **options)
    assert found.pareto_k.isnan().all()
    assert found.unreliable == 0
    assert found.warning() is None
    assert ((found.log_prob - exact).abs() < Z * found.std_error).all()
    assert (found.carrying_draws > 1000).all()


def test_a_rare_value_that_carries_log_p_is_unreliable():
    """p(x) is that of z = 1 almost alone, which 2.5 of 5000 draws are."""
    x = torch.tensor([10.0, 0.0])
    found = pv.log_likelihood(coin(0.5, gain=10.0), coin_guide(0.0005), x, num_samples=5000, seed=0)
    assert found.carrying_draws[0] < 10
    assert found.carrying_draws[1] > 4000  # there the other value carries it
    assert found.unreliable == 0.5
    assert "fewer than 100 draws carry the weight for 50.0% of the data" in found.warning()
    assert found.to_arviz().sample_stats.carrying_draws.values[0] == found.carrying_draws[0]


def test_discrete_latents_of_many_values_go_by_the_effective_sample_size():
    """2^40 values, each drawn once at most: no single one carries anything."""
    bits = torch.full((40,), 0.5)
    model = model_of(lambda z: dist.Normal(z.sum(-1) / 40, 1.0), lambda x: dist.Bernoulli(bits.to(x.dtype)).to_event(1))
    guide = guide_of(lambda x: dist.Bernoulli(bits.to(x.dtype).expand(len(x), 40)).to_event(1))
    found = pv.log_likelihood(model, guide, X, num_samples=2000, seed=0)
    torch.testing.assert_close(found.carrying_draws, found.ess)
    assert found.unreliable == 0
    assert pv.log_likelihood(model, guide, X, num_samples=50, seed=0).unreliable == 1


def test_a_code_beside_a_continuous_latent_has_a_pareto_k():
    def program(x, observe):
        with pyro.plate("data", len(x)):
            code = pyro.sample("code", dist.Bernoulli(x.new_tensor(0.5)))
            z = pyro.sample("z", dist.Normal(code, 1.0))
            if observe:
                pyro.sample("x", dist.Normal(z, NOISE), obs=x)

    found = pv.log_likelihood(
        partial(program, observe=True), partial(program, observe=False), X, num_samples=200, seed=0
    )
    assert not found.pareto_k.isnan().any()
    assert found.carrying_draws.isnan().all()
