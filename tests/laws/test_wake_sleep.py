"""RWS, TVO and the sleep phase: mean gradients against exact ones, values by hand, limits and order of the bounds.

What their guides follow is no gradient of a bound, so the oracle sums the design's formulas, written out here, over all
K-tuples of nodes of an integration grid.
"""

import itertools
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)

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
        drawn = poutine.trace(pair.exact_programs({n: p.detach() for n, p in each.items()})[1]).get_trace(x)
    values = {name: drawn.nodes[name]["value"] for name in pair.latents}
    model, guide = (poutine.trace(poutine.condition(p, values)).get_trace(x) for p in pair.exact_programs(each))

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


def test_several_dreams_are_averaged():
    programs, x = MIXTURE.programs(MIXTURE.params()), MIXTURE.data
    pyro.set_rng_seed(3)
    three = pv.SleepPhi(3).loss(*programs, x)
    pyro.set_rng_seed(3)
    assert three == pytest.approx(sum(pv.SleepPhi().loss(*programs, x) for _ in range(3)) / 3)


def entropy_and_distance(scale, distance):
    """E log N(z; m, scale^2), where E (z - m)^2 is ``distance``."""
    return -0.5 * math.log(2 * math.pi) - scale.log() - distance / (2 * scale**2)


@pytest.mark.parametrize("num", [1, 4])
def test_sleep_of_a_global_latent_is_exact_however_many_dreams(num, agree):
    """g ~ N(0, 1), five x ~ N(g, 1); guide g ~ N(m mean(x), r^2)."""
    m, r = (torch.tensor(v, requires_grad=True) for v in (0.7, 0.6))

    def model(x):
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(g, 1.0), obs=x)

    def guide(x):
        pyro.sample("g", dist.Normal(m * x.mean(), r))

    exact = -entropy_and_distance(r, (1 - m) ** 2 + m**2 / 5)
    check_sleep(num, (model, guide, torch.zeros(5)), exact, {"m": m, "r": r}, agree)


@pytest.mark.parametrize("how", ["rows of all", "a batch of all"])
@pytest.mark.parametrize("num", [1, 3])
def test_sleep_of_a_subsampled_plate_is_exact_however_many_dreams(how, num, agree):
    """Twelve z ~ N(0, 1), x ~ N(z, 1), of which four are taken; guide z ~ N(m x, r^2)."""
    m, r = (torch.tensor(v, requires_grad=True) for v in (0.7, 0.6))

    def rows(x):
        return pyro.plate("data", 12, subsample_size=4, subsample=None if how == "rows of all" else torch.arange(4))

    def model(x):
        with rows(x) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x):
        with rows(x) as index:
            pyro.sample("z", dist.Normal(m * x[index], r))

    exact = -12 * entropy_and_distance(r, (1 - m) ** 2 + m**2)
    x = torch.full((12 if how == "rows of all" else 4,), 100.0)  # which no dream comes near
    check_sleep(num, (model, guide, x), exact, {"m": m, "r": r}, agree)


@pytest.mark.parametrize("read", [0.0, 0.8])
@pytest.mark.parametrize("kind", ["normal", "bernoulli"])
def test_an_auxiliary_draw_of_the_guide_learns_only_by_what_reads_it(kind, read, agree):
    """z ~ N(0, 1), x ~ N(z, 1); guide u auxiliary, z ~ N(m x + read u, r^2)."""
    m, r, s = (torch.full((REPETITIONS,), v, requires_grad=True) for v in (0.5, 0.6, 0.7))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            fn = dist.Normal(0.0, s) if kind == "normal" else dist.Bernoulli(s)
            u = pyro.sample("u", fn, infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(m * x + read * u, r))

    loss = pv.SleepPhi(2).differentiable_loss(model, guide, torch.zeros(REPETITIONS))
    square = s**2 if kind == "normal" else s
    exact = -entropy_and_distance(r, (1 - m) ** 2 + m**2 + read**2 * square).sum()
    for name, p in {"m": m, "r": r, "s": s}.items():
        found, truth = (torch.autograd.grad(of, p, allow_unused=True, retain_graph=True)[0] for of in (loss, exact))
        if truth is None and kind == "normal":
            assert found is None or (found == 0).all()
        else:
            agree("SleepPhi", f"auxiliary {kind}", f"d/d{name}", found, 0.0 if truth is None else truth[0])


def check_sleep(num, pair, exact, params, agree):
    """Reported loss and gradients of 150 calls against the exact loss."""
    objective, names = pv.SleepPhi(num), list(params)
    calls = []
    for _ in range(150):
        loss = objective.differentiable_loss(*pair)
        grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        calls.append([loss.detach(), *(torch.zeros(()) if g is None else g for g in grads)])
    found, truth = torch.tensor(calls).T, torch.autograd.grad(exact, list(params.values()), allow_unused=True)
    agree("SleepPhi", "by hand", "loss", found[0], exact.detach())
    for name, draws_of_it, gradient in zip(names, found[1:], truth, strict=True):
        agree("SleepPhi", "by hand", f"d/d{name}", draws_of_it, 0.0 if gradient is None else gradient)


MOMENTS, SPREAD = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 1.0, 0.2], [0.5, 0.5, 0.3]))


def two_sites(x):
    """Two z ~ N(1, .5^2) and s ~ LogNormal(.2, .3): log s has moments as z has."""
    pyro.sample("z", dist.Normal(torch.ones(2), 0.5).to_event(1))
    s = pyro.sample("s", dist.LogNormal(0.2, 0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, s), obs=x)


def placed(family, loc):
    """An autoguide of two_sites with these means, and the prior's scales."""
    guide = family(two_sites)
    guide(torch.zeros(2))
    if family is AutoNormal:
        guide.locs.z, guide.locs.s, guide.scales.z, guide.scales.s = loc[:2], loc[2], SPREAD[:2], SPREAD[2]
    else:
        guide.loc.data, guide.scale = loc.clone(), SPREAD
    return guide


@pytest.mark.parametrize("family", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal], ids=lambda f: f.__name__)
@pytest.mark.parametrize("start", [torch.zeros(3, dtype=torch.float64), MOMENTS], ids=["elsewhere", "moments"])
def test_sleep_leads_an_autoguide_to_the_moments_of_the_prior(family, start, agree):
    guide, objective, calls = placed(family, start), pv.SleepPhi(2), []
    of_loc = [p for name, p in guide.named_parameters() if name.startswith("loc")]
    others = [p for p in guide.parameters() if all(p is not each for each in of_loc)]
    for _ in range(80):
        loss = objective.differentiable_loss(two_sites, guide, torch.zeros(2))
        grads = torch.autograd.grad(loss, [*of_loc, *others])
        calls.append(torch.cat([loss.detach().reshape(1), *(g.reshape(-1) for g in grads)]))
    found = torch.stack(calls).T
    log_q = entropy_and_distance(SPREAD, (MOMENTS - start).square() + SPREAD.square()).sum()
    agree("SleepPhi", family.__name__, "loss", found[0], 0.2 - log_q)  # E log s, the mean log of ds / d log s
    for mean, exact in zip(found[1:4], (start - MOMENTS) / SPREAD.square(), strict=True):
        agree("SleepPhi", family.__name__, "d/dloc", mean, exact)
    for mean in found[4:] if torch.equal(start, MOMENTS) else ():
        agree("SleepPhi", family.__name__, "d/dscale", mean, 0.0)


def reparameterised_by_hand(x):
    eps = pyro.sample("eps", dist.Normal(torch.zeros(3), 1.0).to_event(1), infer={"is_auxiliary": True})
    pyro.sample("z", dist.Delta(0.5 * eps[:2], event_dim=1))
    pyro.sample("s", dist.Delta(eps[2].exp(), -eps[2]))


@pytest.mark.parametrize(
    ("guide", "match"),
    [
        (AutoDelta(two_sites), "is a Delta that carries parameters"),
        (AutoStructured(two_sites), "is a Delta that carries parameters"),
        (reparameterised_by_hand, 'guide site "eps", from which Deltas are computed'),
    ],
    ids=["AutoDelta", "AutoStructured", "by hand"],
)
def test_sleep_refuses_deltas_that_it_cannot_invert(guide, match):
    with pytest.raises(ValueError, match=match):
        pv.SleepPhi().differentiable_loss(two_sites, guide, torch.zeros(2))


@pytest.mark.parametrize("beside", ["factor", "label of z", "label", "factor of none"])
def test_sleep_refuses_what_its_dreams_do_not_follow(beside):
    labels = torch.tensor([0.0, 1.0, 1.0])

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.4))  # no gradient tells of it
            z = pyro.sample("z", dist.Normal(k, 1.0))
            if beside.startswith("factor"):
                pyro.factor("f", 0.3 * (k if beside == "factor" else x))
            else:
                pyro.sample("y", dist.Bernoulli(logits=k if beside == "label of z" else torch.tensor(0.2)), obs=labels)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(logits=x))
            pyro.sample("z", dist.Normal(x + k, 1.0))

    if beside in ("label", "factor of none"):
        pv.SleepPhi().loss(model, guide, torch.zeros(3))
    else:
        why = "dreams do not follow factors" if beside == "factor" else 'sites "y" depend on latents and observe'
        with pytest.raises(ValueError, match=why):
            pv.SleepPhi().loss(model, guide, torch.zeros(3))


def flat(x, index=slice(None), noise=dist.Normal):
    """Observes rows of x as vectors, by a copy."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        seen = x.flatten(1)[:, index].clone()
        pyro.sample("x", noise(z.unsqueeze(-1), torch.ones(seen.shape[-1])).to_event(1), obs=seen)


def of_images(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("w", torch.zeros(())) * x.mean((-1, -2)), 1.0))


class Unsampled(dist.Normal):
    """Has no sampler."""

    def rsample(self, sample_shape=()):
        raise NotImplementedError("TODO")


def test_sleep_dreams_what_a_site_observes_in_another_shape():
    objective, x = pv.SleepPhi(), torch.randn(5, 2, 2)
    assert math.isfinite(objective.loss_and_grads(flat, of_images, x))
    with pytest.raises(ValueError, match='site "x", or after it, from a distribution that has no sampler'):
        objective.loss(partial(flat, noise=Unsampled), of_images, x)


def test_sleep_says_that_a_guide_fails_on_dreams():
    table = torch.zeros(3)

    def counts(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(pyro.sample("z", dist.Gamma(100.0, 1.0))), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(table[x.long()], 1.0))

    with pytest.raises(ValueError, match=r'the guide fails on what the model dreams at "x" \(index'):
        pv.SleepPhi().loss(counts, guide, torch.ones(5))


def pixels():
    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", 3, subsample_size=2, dim=-1) as index:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, index])

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    return model, guide


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
        refused(
            "pass what they observe as an argument",
            lambda: pv.SleepPhi().loss(*(partial(program, torch.zeros(5, 3)) for program in pixels())),
        ),
        refused('plate "pixels" of site "x" takes 2 of', lambda: pv.SleepPhi().loss(*pixels(), torch.zeros(5, 3))),
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
