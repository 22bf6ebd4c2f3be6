"""A guide whose Deltas are computed by parameters has the gradients of the same guide written as densities."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import ExpTransform
from pyro.infer import autoguide
from torch.distributions import StickBreakingTransform

import pyrovae as pv
from tests.laws.programs import normal, seeded_loss
from tests.state import refused

Y = torch.tensor([1.3, 0.2, -0.4], dtype=torch.float64)
OBJECTIVES = [
    pv.IWAE(3), pv.ELBO(2, gradient="stl"), pv.IWAE(3, gradient="stl"), pv.IWAE(3, gradient="dreg"),
    pv.IWAE(1, gradient="stl"), pv.PIWAE(2, 2, gradient="dreg"), pv.RWS(3), pv.RWS(3, gradient="dreg"), pv.TVO(3),
]  # fmt: skip


def agree(objective, model, computed, plain, parameters, *args):
    ours, theirs = (seeded_loss(objective, model, guide, *args, params=parameters) for guide in (computed, plain))
    assert ours[0] == pytest.approx(theirs[0])
    for found, expected in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(found, expected)


def scattered(guide, *args):
    """The parameters of an autoguide, at values that nothing cancels at."""
    guide(*args)
    for number, parameter in enumerate(guide.parameters()):
        parameter.data += 0.2 * torch.sin(torch.arange(1.0, 1 + parameter.numel()) + number).view_as(parameter)
    return list(guide.parameters())


# --- autoguides of global latents: a vector, a positive number, a point of the simplex ------------------------------


def three(y):
    a = pyro.sample("a", normal(torch.zeros(2)).to_event(1))
    s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
    c = pyro.sample("c", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", normal(a.sum(-1) + c[..., 0] - c[..., 2], s), obs=y)


def mapped(base, transform):
    return dist.TransformedDistribution(base, [transform])


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_autostructured(objective):
    auto = autoguide.AutoStructured(
        three, conditionals={"a": "mvn", "s": "normal", "c": "normal"}, dependencies={"s": {"a": "linear"}}
    )
    parameters = scattered(auto, Y)

    def plain(y):
        tril = auto.scales.a.diag() @ auto.scale_trils.a
        a = pyro.sample("a", dist.MultivariateNormal(auto.locs.a, scale_tril=tril))
        pyro.sample("c", mapped(normal(auto.locs.c, auto.scales.c).to_event(1), StickBreakingTransform()))
        loc = auto.locs.s + auto.deps.s.a(a - auto.locs.a)
        pyro.sample("s", mapped(normal(loc.squeeze(-1), auto.scales.s.squeeze(-1)), ExpTransform()))

    agree(objective, three, auto, plain, parameters, Y)


def one(y):
    a = pyro.sample("a", normal(torch.zeros(3)).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", normal(a.sum(-1), 0.7), obs=y)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_autogaussian(objective):
    auto = autoguide.AutoGaussian(one)
    parameters = scattered(auto, Y)

    def plain(y):
        white = auto._dense_get_mvn()
        tril = auto.scales.a.diag() @ white.scale_tril
        pyro.sample("a", dist.MultivariateNormal(auto.locs.a + auto.scales.a * white.loc, scale_tril=tril))

    agree(objective, one, auto, plain, parameters, Y)


# --- a Delta of each datum, and a density that reads it -------------------------------------------------------------


def local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", normal(x.new_zeros(2)).to_event(1))
        w = pyro.sample("w", normal(z.sum(-1)))
        pyro.sample("x", normal(w, 0.6), obs=x)


PHI = {"m": 0.4, "c": 0.3, "t": -0.2, "d": 0.5}


def computed(p, x):
    """z = c + (1, e^t) (u + (0, d u_1)), with u ~ N(m x, 1)."""
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", normal(p["m"] * x[:, None].expand(-1, 2)).to_event(1), infer={"is_auxiliary": True})
        z = p["c"] + torch.stack([u[..., 0], p["t"].exp() * (u[..., 1] + p["d"] * u[..., 0])], -1)
        z = pyro.sample("z", dist.Delta(z, log_density=-p["t"].expand(z.shape[:-1]), event_dim=1))
        pyro.sample("w", normal(p["d"] * z.sum(-1), 0.8))


def plain(p, x):
    tril = torch.stack(
        [torch.stack([x.new_ones(()), x.new_zeros(())]), p["t"].exp() * torch.stack([p["d"], p["d"] ** 0])]
    )
    loc = p["c"] + (p["m"] * x)[:, None] * tril.sum(-1)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=tril))
        pyro.sample("w", normal(p["d"] * z.sum(-1), 0.8))


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_deltas_of_every_datum(objective, fold):
    objective = type(objective)(**objective.config | {"fold_particles": fold})
    p = {name: torch.tensor(value, requires_grad=True) for name, value in PHI.items()}
    agree(objective, local, partial(computed, p), partial(plain, p), list(p.values()), Y)


# --- Deltas of more numbers than are drawn for them -----------------------------------------------------------------


def test_deltas_that_lack_draws_train_by_their_total_derivative_alone():
    auto = autoguide.AutoStructured(
        three, conditionals={"a": "normal", "s": "delta", "c": "delta"}, dependencies={"s": {"a": "linear"}}
    )
    parameters = scattered(auto, Y)
    ours = seeded_loss(pv.ELBO(), three, auto, Y, params=parameters)
    theirs = seeded_loss(pyro.infer.Trace_ELBO(), three, auto, Y, params=parameters)
    assert ours[0] == pytest.approx(theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])
    for objective in (pv.ELBO(gradient="stl"), pv.RWS(2)):
        refused(ValueError, '"a", "s" are Deltas of more numbers', objective.differentiable_loss, three, auto, Y)
    refused(ValueError, '"a", "s" are Deltas of more numbers', pv.log_likelihood, three, auto, Y)
