"""Annealed importance sampling and its bracket, on models whose log p(x) is known.

Many copies of one datum are independent repetitions: the mean of their weights over p(x) must be 1.
"""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyrovae as pv
from pyrovae.evaluate.ais import make_betas
from tests.pairs import model_of, units

pytestmark = pytest.mark.double(5)

W = torch.tensor([[1.0, -0.5], [0.3, 0.8], [0.0, 1.2]], dtype=torch.float64)
NOISE = 0.5
FAST = {"num_temperatures": 20, "leapfrog_steps": 3, "seed": 0, "compile": False}
LIMIT = 4.9  # standard errors: a false-alarm rate of 1e-6
linear = model_of(lambda z: dist.Normal(z @ W.T, NOISE).to_event(1), units(2))


def linear_log_prob(x):
    return dist.MultivariateNormal(torch.zeros(3), W @ W.T + NOISE**2 * torch.eye(3)).log_prob(x)


def posterior(x):
    precision = torch.eye(2) + W.T @ W / NOISE**2
    with pyro.plate("data", len(x)):
        mean = x @ W @ precision.inverse() / NOISE**2
        pyro.sample("z", dist.MultivariateNormal(mean, precision_matrix=precision))


def layers(x):
    with pyro.plate("data", len(x)):
        top = pyro.sample("top", dist.Normal(torch.zeros(()), 1.0))
        z = pyro.sample("z", dist.Normal(0.8 * top, 0.6))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def layers_log_prob(x):
    return dist.Normal(0.0, (0.8**2 + 0.6**2 + NOISE**2) ** 0.5).log_prob(x)


def positive(x):
    """A rate with a Gamma prior, counts that are Poisson: p(x) is negative binomial."""
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(3.0), 2.0))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def positive_log_prob(x):
    return dist.NegativeBinomial(torch.tensor(3.0), probs=torch.tensor(1 / 3)).log_prob(x)


def shared(x):
    """A mean that all data share: one weight for them together."""
    mean = pyro.sample("mean", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, NOISE), obs=x)


CASES = {
    "linear": (linear, linear_log_prob, [[0.5, -1.0, 2.0]]),
    "layers": (layers, layers_log_prob, [1.3]),
    "positive": (positive, positive_log_prob, [4.0]),
}
each_case = pytest.mark.parametrize(("model", "exact", "datum"), CASES.values(), ids=CASES)


def copies(datum, number):
    """One datum many times over, and by itself."""
    one = torch.tensor(datum)
    return one.repeat(number, *[1] * (one.dim() - 1)), one


@each_case
@pytest.mark.parametrize("schedule", ["sigmoid", "linear", (0.0, 0.01, 0.05, 0.2, 0.6, 1.0)], ids=str)
def test_weights_are_unbiased(model, exact, datum, schedule):
    x, datum = copies(datum, 3000)
    found = pv.ais_log_likelihood(model, x, num_chains=4, **FAST | {"schedule": schedule})
    relative = (found.log_prob - exact(datum)).exp()
    error = relative.std() / len(x) ** 0.5
    assert error < 0.05
    assert abs(relative.mean() - 1) < LIMIT * error


@each_case
def test_the_stated_error_is_honest(model, exact, datum):
    x, datum = copies(datum, 400)
    found = pv.ais_log_likelihood(model, x, num_chains=32, **FAST)
    covered = ((found.log_prob - exact(datum)).abs() < 1.96 * found.std_error).double().mean()
    assert 0.91 < covered < 0.985


def test_acceptance_is_what_was_asked_for():
    x = torch.randn(40, 3)
    for target in (0.5, 0.8):
        settings = FAST | {"num_temperatures": 60, "target_acceptance": target}
        found = pv.ais_log_likelihood(linear, x, num_chains=16, **settings)
        assert found.acceptance.mean() == pytest.approx(target, abs=0.08)


def test_from_the_exact_posterior_every_chain_weighs_p_of_x():
    x = torch.randn(5, 3)
    found = pv.ais_log_likelihood(linear, x, guide=posterior, **FAST)
    torch.testing.assert_close(found.log_prob, linear_log_prob(x))
    assert found.std_error.max() < 1e-6


def test_joint_weights_of_a_shared_latent():
    x = torch.tensor([0.3, 1.1, -0.4])
    exact = dist.MultivariateNormal(torch.zeros(3), torch.ones(3, 3) + NOISE**2 * torch.eye(3)).log_prob(x)
    found = pv.ais_log_likelihood(shared, x, num_chains=200, **FAST)
    assert found.log_prob.shape == ()
    assert abs(found.log_prob - exact) < LIMIT * found.std_error
    assert found.std_error < 0.08


def test_bdmc_brackets_log_p():
    few, many = (
        pv.bdmc(linear, 400, like=torch.zeros(1, 3), num_chains=4, **FAST | {"num_temperatures": t}) for t in (3, 30)
    )
    assert 0 < many.gap < few.gap
    for found in (few, many):
        error = (found.upper.log_prob - found.lower.log_prob).std() / 20
        assert found.gap > -LIMIT * error


def apart(x):
    """The same data, a site for each number of a datum."""
    with pyro.plate("data", len(x)):
        loc = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1)) @ W.T
        for t in range(3):
            pyro.sample(f"x{t}", dist.Normal(loc[..., t], NOISE), obs=x[:, t])


def test_bdmc_simulates_data_that_several_sites_observe():
    """The same model by one site: the means of both ends agree, and so does the gap."""
    one, other = (pv.bdmc(model, 400, like=torch.zeros(1, 3), num_chains=4, **FAST) for model in (linear, apart))
    for a, b in ((one.lower, other.lower), (one.upper, other.upper)):
        error = (a.log_prob.var() / 400 + b.log_prob.var() / 400).sqrt()
        assert abs(a.log_prob.mean() - b.log_prob.mean()) < LIMIT * error
    assert 0 < other.gap < 2 * one.gap


def test_bdmc_bounds_lie_on_their_sides_of_the_truth():
    """The data are the first thing that a seed draws, whatever the temperatures: the truth is known."""
    pyro.set_rng_seed(0)
    x = pv.sample(linear, 2000, like=torch.zeros(1, 3), returns="draws")
    bracket = pv.bdmc(linear, 2000, like=torch.zeros(1, 3), num_chains=2, **FAST | {"num_temperatures": 3})
    exact = linear_log_prob(x)
    below, above = exact - bracket.lower.log_prob, bracket.upper.log_prob - exact
    assert below.mean() > LIMIT * below.std() / len(x) ** 0.5
    assert above.mean() > LIMIT * above.std() / len(x) ** 0.5


def test_compiled_and_eager_agree(interpreted):
    vae = pv.models.VAE((6,), latent_dim=2, hidden=(4,))
    x = torch.rand(5, 6).round()
    eager, compiled = (
        pv.ais_log_likelihood(vae, x, num_temperatures=5, leapfrog_steps=2, seed=3, compile=c) for c in (False, True)
    )
    assert (eager.path, compiled.path) == ("eager", "compiled")
    torch.testing.assert_close(eager.log_prob, compiled.log_prob)
    assert len(interpreted) >= 1


def test_data_sets_come_in_batches_and_agree_with_quadrature():
    torch.manual_seed(0)
    vae = pv.models.VAE((6,), latent_dim=2, hidden=(8,))
    x = torch.rand(30, 6).round()
    found = pv.ais_log_likelihood(vae, pv.data.Images(x), batch_size=20, num_chains=32, **FAST)
    line = torch.linspace(-7, 7, 141)
    z = torch.cartesian_prod(line, line)
    log_mass = vae.prior(x).log_prob(z) + 2 * math.log(0.1)
    with torch.no_grad():
        exact = torch.logsumexp(vae.likelihood(z.unsqueeze(1)).log_prob(x) + log_mass.unsqueeze(1), 0)
    assert found.log_prob.shape == (30,)
    assert ((found.log_prob - exact).abs() < LIMIT * found.std_error).all()
    assert found.std_error.max() < 0.2
    assert "AIS, 32 chains, median ESS" in str(found)


@pytest.mark.parametrize("schedule", ["sigmoid", "linear"])
def test_schedules_rise_from_0_to_1(schedule):
    betas = make_betas(schedule, 100)
    assert len(betas) == 101
    assert (betas[0], betas[-1]) == (0, 1)
    assert all(a < b for a, b in itertools.pairwise(betas))
    if schedule == "sigmoid":
        assert betas[1] < 0.002


discrete = model_of(lambda bit: dist.Normal(bit, 1.0), lambda x: dist.Bernoulli(torch.tensor(0.5)), site="bit")
flat = model_of(lambda z: dist.Normal(z, 1.0), lambda x: dist.Normal(torch.zeros(()), 1.0).mask(False))


def exact(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(torch.zeros(()), 1.0), obs=x)


def delta(x):
    with pyro.plate("data", len(x)):
        pyro.sample("top", dist.Delta(x))
        pyro.sample("z", dist.Normal(x, 1.0))


@pytest.mark.parametrize(
    ("model", "options", "match"),
    [
        (discrete, {}, 'latent site "bit" is discrete'),
        (flat, {}, 'latent site "z" has no prior density: the model has no log p'),
        (exact, {}, "no latents to anneal"),
        (layers, {"guide": delta}, "must draw \"top\", \"z\" from densities"),
        (layers, {"guide": lambda x: None}, "it has none: leave guide out"),
    ],
)  # fmt: skip
def test_errors(model, options, match):
    with pytest.raises(ValueError, match=match):
        pv.ais_log_likelihood(model, torch.zeros(4, 3) if model is linear else torch.zeros(4), **options)


def test_a_network_on_float32_data():
    with torch.random.fork_rng():
        torch.set_default_dtype(torch.float32)
        decoder = nn.Linear(2, 6)

        model = model_of(lambda z: dist.Bernoulli(logits=decoder(z)).to_event(1), units(2))
        found = pv.ais_log_likelihood(model, torch.ones(4, 6), **FAST)
    assert found.dtype == "float32"
    assert found.log_prob.dtype == torch.float64
    assert math.isfinite(found.nll)


STEPS = torch.tensor([[True, True], [True, False], [False, True]])


def padded(x, hide=True):
    """A latent and an observation a step, of which some data have only one."""
    with pyro.plate("data", len(x)):
        for t in range(2):
            here = STEPS[:, t].repeat(len(x) // 3)
            z = pyro.sample(f"z{t}", dist.Normal(torch.zeros(len(x), 1), 1.0).mask(here[:, None]).to_event(1))
            with pyro.poutine.mask(mask=here if hide else torch.ones(len(x), dtype=torch.bool)):
                pyro.sample(f"x{t}", dist.Normal(z.squeeze(-1), NOISE), obs=x[:, t])


def test_latents_that_are_masked_where_nothing_hangs_on_them():
    x = torch.randn(60, 2)
    found = pv.ais_log_likelihood(padded, x, **FAST)
    exact = (dist.Normal(0.0, (1 + NOISE**2) ** 0.5).log_prob(x) * STEPS.repeat(20, 1)).sum(-1)
    ratio = (found.log_prob - exact).exp()
    assert abs(ratio.mean() - 1) < LIMIT * ratio.std() / 60**0.5
    with pytest.raises(ValueError, match=r'"z0", "z1" are masked.*hangs? on those'):
        pv.ais_log_likelihood(padded, x, hide=False, **FAST)


def test_chains_of_a_program_for_one_run_one_after_the_other():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z[torch.arange(len(x))], NOISE), obs=x)  # of one chain only

    x = torch.randn(60)
    with pytest.warns(UserWarning, match="chains run one after the other"):
        found = pv.ais_log_likelihood(model, x, num_chains=3, **FAST)
    exact = dist.Normal(0.0, (1 + NOISE**2) ** 0.5).log_prob(x)
    ratio = (found.log_prob - exact).exp()
    assert abs(ratio.mean() - 1) < LIMIT * ratio.std() / 60**0.5
