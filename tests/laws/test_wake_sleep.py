"""RWS, TVO and the sleep phase: mean gradients against exact ones, values by hand, limits and order of the bounds.

What their guides follow is no gradient of a bound, so the oracle sums the design's formulas, written out here, over all
K-tuples of nodes of an integration grid.
"""

import itertools
import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

import pyrovae as pv
from pyrovae.train.plan import Plan
from tests.laws.exact import Noise, _axes
from tests.laws.gradients import draws
from tests.laws.pairs import GAUSSIAN, MIXTURE, NET, NOISE, PAIRS, mixture_prior

REPETITIONS = 20_000
BETAS = (0.0, 0.3, 0.6, 1.0)


def wake(log_w):
    """The coefficients of RWS: model, score."""
    w = log_w.exp() / log_w.exp().sum(0)
    return w, w


def thermodynamic(betas):
    """The coefficients of TVO."""

    def coefficients(log_w):
        num, model, score = len(log_w), 0.0, 0.0
        for low, high in itertools.pairwise(betas):
            v = (low * log_w).exp() / (low * log_w).exp().sum(0)
            above = log_w - (v * log_w).sum(0)
            model = model + (high - low) * v * (1 + low * above)
            score = score + (high - low) * v * (num / (num - 1) * above - 1 - low * above)
        return model, score

    return coefficients


def nodes(pair, params, datum):
    """Of every node of the grid: its log mass, log p(x, z) live in theta and log q(z | x) live in phi, at fixed z."""
    noise, log_mass = _axes(pair, 0.1 if sum(h for h in pair.latents.values() if isinstance(h, int)) < 2 else 0.35)
    size = len(log_mass)
    x = datum.expand(size, *datum.shape)
    each = {n: p.expand(size) for n, p in params.items()}
    with Noise(noise):
        drawn = poutine.trace(pair.programs({n: p.detach() for n, p in each.items()})[1]).get_trace(x)
    values = {name: drawn.nodes[name]["value"] for name in pair.latents}
    model, guide = (poutine.trace(poutine.condition(p, values)).get_trace(x) for p in pair.programs(each))

    def total(trace, names):
        return sum(trace.nodes[n]["fn"].log_prob(trace.nodes[n]["value"]) for n in names)

    log_q = {name: total(guide, [name]) for name in pair.latents}
    discrete = [log_q[name].detach() for name, how in pair.latents.items() if isinstance(how, torch.Tensor)]
    return log_mass + sum(discrete), total(model, ["x", *pair.latents]), sum(log_q.values())


def truth(pair, coefficients, num):
    """The mean of what theta and phi follow, summed over the pair's data, by all ``num``-tuples of nodes."""
    params, total = pair.params(grad=True), 0.0
    for datum in pair.data:
        log_mass, log_p, log_q = nodes(pair, params, datum)
        index = torch.cartesian_prod(*[torch.arange(len(log_mass))] * num).T
        mass = log_mass[index].sum(0).exp()
        model, score = coefficients((log_p - log_q).detach()[index])
        # All particles are alike: the first stands for every one of them.
        along = [torch.zeros_like(log_mass).index_add(0, index[0], mass * c[0]) * num for c in (model, score)]
        total = total + (along[0] * log_p).sum() + (along[1] * log_q).sum()
    found = torch.autograd.grad(total, list(params.values()), allow_unused=True)
    return dict(zip(params, found, strict=True))


ROWS = [
    (pv.RWS(2), wake, 2),
    (pv.RWS(2, gradient="dreg"), wake, 2),
    (pv.TVO(2, partitions=1), thermodynamic((0, 1)), 2),
    (pv.TVO(2, BETAS), thermodynamic(BETAS), 2),
]
CASES = [(row, pair) for row in ROWS for pair in PAIRS if row[0].gradient == "total" or pair.reparameterised]
CASES += [((pv.RWS(4), wake, 4), pair) for pair in (MIXTURE, NET)]
CASES += [((pv.TVO(4, BETAS), thermodynamic(BETAS), 4), pair) for pair in (MIXTURE, NET)]


@pytest.mark.parametrize(("row", "pair"), CASES, ids=lambda v: getattr(v, "name", None) or repr(v[0]))
def test_mean_gradient_is_exact(row, pair, agree):
    objective, coefficients, num = row
    exact, found = truth(pair, coefficients, num), draws(objective, pair, REPETITIONS)
    for name in pair.theta | pair.phi:
        agree(repr(objective), pair.name, f"d/d{name}", found[name], exact[name])


@pytest.mark.parametrize("pair", [GAUSSIAN, MIXTURE], ids=lambda pair: pair.name)
def test_one_partition_is_the_elbo_in_value_and_mean_gradient(pair, agree):
    tvo, elbo = pv.TVO(3, partitions=1), pv.ELBO(3)
    log_w = torch.randn(3, 50)
    torch.testing.assert_close(tvo.bound(log_w), elbo.bound(log_w))
    a, b = (draws(objective, pair, REPETITIONS) for objective in (tvo, elbo))
    for name in a:
        agree(repr(tvo), pair.name, f"d/d{name} less the ELBO's", a[name] - b[name], 0.0)


def test_tvo_lies_between_elbo_and_iwae_and_reaches_iwae():
    log_w = 3 * torch.randn(6, 400)
    bounds = [pv.TVO(6, partitions=p).bound(log_w) for p in (1, 2, 5, 50)]
    ends = pv.ELBO(6).bound(log_w), pv.IWAE(6).bound(log_w)
    for bound in bounds:
        assert (ends[0] <= bound + 1e-12).all()
        assert (bound <= ends[1] + 1e-12).all()
    even = [i / 4000 for i in range(4001)]
    torch.testing.assert_close(pv.TVO(6, even).bound(log_w), ends[1], atol=5e-3, rtol=0)


def test_tvo_model_coefficients_are_the_derivative_of_its_bound():
    log_w = torch.randn(4, 7, requires_grad=True)
    tvo = pv.TVO(4, BETAS)
    (slope,) = torch.autograd.grad(tvo.bound(log_w).sum(), log_w)
    torch.testing.assert_close(tvo.weights(log_w).model, slope)


def test_partitions_are_log_spaced():
    assert pv.TVO(2, partitions=1).points == [0, 1]
    points = pv.TVO(2, partitions=3).points
    torch.testing.assert_close(torch.tensor(points), torch.tensor([0, 0.025, 0.025**0.5, 1.0]))
    assert pv.TVO(2).points == pv.TVO(2, partitions=5).points


@pytest.mark.parametrize("objective", [pv.RWS(3), pv.RWS(3, gradient="dreg"), pv.TVO(3, BETAS)], ids=repr)
def test_impossible_particles_give_no_nan(objective):
    log_w = torch.tensor([[-math.inf, -math.inf], [0.0, -math.inf], [1.0, -math.inf]])
    weights = objective.weights(log_w)
    assert all(w.isfinite().all() for w in weights)
    assert all((w[:, 1] == 0).all() for w in weights)
    assert objective.bound(log_w)[1] == -math.inf


def test_sleep_of_the_gaussian_is_exact(agree):
    p = GAUSSIAN.params(grad=True)
    square = p["w"] ** 2 + p["a"] ** 2 + NOISE**2
    distance = 1 - 2 * p["m"] * p["w"] + p["m"] ** 2 * square + 2 * p["m"] * p["c"] * p["a"] + p["c"] ** 2
    exact = len(GAUSSIAN.data) * (-p["r"] - 0.5 * (-2 * p["r"]).exp() * distance)
    found = draws(pv.SleepPhi(), GAUSSIAN, REPETITIONS)
    assert found.keys() == GAUSSIAN.phi.keys()  # the model learns nothing
    for name, gradient in zip(found, torch.autograd.grad(exact, [p[n] for n in found]), strict=True):
        agree("SleepPhi", "gaussian", f"d/d{name}", found[name], gradient)


def test_sleep_of_a_mixture_is_exact(agree):
    p = MIXTURE.params(grad=True)
    bits = torch.cartesian_prod(torch.arange(2.0), torch.arange(2.0))
    total = 0.0
    for z in range(3):
        values = {"z": torch.full((4,), float(z))}
        model, guide = (poutine.trace(poutine.condition(f, values)).get_trace(bits) for f in MIXTURE.programs(p))
        log_joint = model.nodes["x"]["fn"].log_prob(bits) + mixture_prior(p).log_softmax(-1)[z]
        total = total + (log_joint.detach().exp() * guide.nodes["z"]["fn"].log_prob(values["z"])).sum()
    exact = torch.autograd.grad(len(MIXTURE.data) * total, [p[n] for n in MIXTURE.phi])
    found = draws(pv.SleepPhi(), MIXTURE, REPETITIONS)
    for name, gradient in zip(MIXTURE.phi, exact, strict=True):
        agree("SleepPhi", "bernoulli-mixture", f"d/d{name}", found[name], gradient)


def test_several_dreams_are_a_larger_batch():
    programs, x = MIXTURE.programs(MIXTURE.params()), MIXTURE.data
    pyro.set_rng_seed(3)
    three = pv.SleepPhi(3).loss(*programs, x)
    pyro.set_rng_seed(3)
    assert three == pytest.approx(pv.SleepPhi().loss(*programs, x.repeat(3, 1)) / 3)


def refused(match, make):
    return pytest.param(make, match, id=match)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        refused("RWS has no kl_weight but 1, got 0.5", lambda: pv.RWS(2, kl_weight=0.5)),
        refused("TVO has no kl_weight but 1", lambda: pv.TVO(2, kl_weight=torch.tensor(1.0))),
        refused('RWS has no gradient="stl"', lambda: pv.RWS(2, gradient="stl")),
        refused("TVO has one gradient", lambda: pv.TVO(2, gradient="dreg")),
        refused("at least 2, got 1", lambda: pv.TVO(1)),
        refused("betas must rise from 0 to 1", lambda: pv.TVO(2, (0.0, 0.7, 0.4, 1.0))),
        refused("betas must rise from 0 to 1", lambda: pv.TVO(2, (0.1, 1.0))),
        refused("give betas or partitions", lambda: pv.TVO(2, (0.0, 1.0), partitions=1)),
        refused("every beta must be a number", lambda: pv.TVO(2, (0.0, 1.5))),
        refused("RWS has no kl_weight to warm up", lambda: Plan.make(pv.RWS(2), 3, "constant", None, 2)),
        refused("it has no bound", lambda: pv.SleepPhi().bound(torch.zeros(2))),
    ],
)
def test_refusals(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_wake_sleep_refuses_a_guide_that_carries_parameters_in_a_point_mass():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(pyro.param("m", torch.tensor(0.1)) * x))

    model = GAUSSIAN.programs(GAUSSIAN.params())[0]
    with pytest.raises(ValueError, match='guide site "z" is a Delta that carries parameters'):
        pv.RWS(2).differentiable_loss(model, guide, GAUSSIAN.data)
