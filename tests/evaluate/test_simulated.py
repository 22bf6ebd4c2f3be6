"""Data simulated from a model, with latents that must be draws from their posterior: else there is no upper bound."""

from functools import partial

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

import pyrovae as pv
from tests.state import refused

pytestmark = pytest.mark.double(29)

FAST = {"num_temperatures": 3, "num_chains": 2, "leapfrog_steps": 1, "seed": 0, "compile": False}


def simulated(more):
    """z ~ N(0, 1), x ~ N(z, 1), and ``more`` of what z and x bring about, in the plate."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            more(z, x)

    return model


def bracket(more, n=20):
    return pv.bdmc(simulated(more), n, like=torch.zeros(1), **FAST)


def observed(fn, value=1.0):
    pyro.sample("y", fn, obs=torch.as_tensor(value))


@pytest.mark.parametrize(
    ("more", "value"),
    [
        (lambda z, x: pyro.factor("f", torch.tensor(0.7)), lambda x: 0.7),
        (lambda z, x: pyro.factor("f", -x.square()), lambda x: -x.square()),
        (lambda z, x: observed(dist.Normal(x, 2.0)), lambda x: dist.Normal(x, 2.0).log_prob(torch.ones(()))),
        (lambda z, x: pyro.deterministic("d", 2 * z), lambda x: 0.0),
        (lambda z, x: poutine.mask(observed, mask=False)(dist.Normal(z, 1.0)), lambda x: 0.0),
    ],
    ids=["constant factor", "factor of the data", "observation of the data", "deterministic", "masked"],
)
def test_what_depends_on_no_latent_is_counted_and_nothing_else_changes(more, value):
    x = None

    def kept(z, data):
        nonlocal x
        x = data
        more(z, data)

    found, bare = bracket(kept), bracket(lambda z, x: None)
    torch.testing.assert_close(found.lower.log_prob - bare.lower.log_prob, value(x) + torch.zeros(20))
    torch.testing.assert_close(found.upper.log_prob - bare.upper.log_prob, value(x) + torch.zeros(20))


def written_in_place(z, x):
    values = torch.zeros(z.shape)
    values[...] = z
    pyro.factor("y", values)


@pytest.mark.parametrize("n", [1, 20])
@pytest.mark.parametrize(
    "more",
    [
        lambda z, x: pyro.factor("y", z),
        lambda z, x: pyro.factor("y", torch.where(z > 30, 1000.0, 0.0)),
        lambda z, x: pyro.factor("y", pyro.deterministic("d", z + x)),
        lambda z, x: observed(dist.Normal(z, 1.0)),
        lambda z, x: observed(dist.Normal(0.0, 1.0), z),
        lambda z, x: observed(dist.Bernoulli(torch.tensor([0.2, 0.7])[(z > 0).long()])),
        lambda z, x: poutine.mask(observed, mask=z > 0)(dist.Normal(0.0, 1.0)),
        written_in_place,
    ],
    ids=[
        "factor", "one that has never been another", "through a deterministic", "observation", "its value",
        "through an integer", "through a mask", "written in place",
    ],
)  # fmt: skip
def test_what_weighs_the_latents_besides_their_data_is_refused(more, n):
    refused(ValueError, r'site "y", a factor or an observation .*, depends on "z"', bracket, more, n)


def test_the_latent_that_a_factor_depends_on_is_named_wherever_they_lie():
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(w, 1.0)), 1.0), obs=x)
        pyro.factor("f", -w.square())

    refused(ValueError, 'site "f", .* depends on "w": take', partial(pv.bdmc, model, 5, like=torch.zeros(1), **FAST))
