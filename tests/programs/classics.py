"""Statistics as textbooks have it: players, annotators, volatility; programs that name, nest, scope and factor."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib.autoname import named, scope
from pyro.contrib.timeseries import IndependentMaternGP
from pyro.infer import TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoIAFNormal, AutoNormal
from pyro.infer.reparam import LocScaleReparam, NeuTraReparam, TransformReparam
from pyro.ops.indexing import Vindex
from torch import nn
from torch.distributions import constraints

from tests.programs.registry import Pair, program

MARKED = {"infer": {"enumerate": "parallel"}}

# --- players and schools ----------------------------------------------------------------------------------------------


def players(kind, at_bats, hits):
    one = at_bats.new_ones(())
    if kind == "partially_pooled":
        m, kappa = pyro.sample("m", dist.Uniform(0 * one, one)), pyro.sample("kappa", dist.Pareto(one, 1.5 * one))
    elif kind == "logit":
        loc, scale = pyro.sample("loc", dist.Normal(-one, one)), pyro.sample("scale", dist.HalfCauchy(one))
    elif kind == "fully_pooled":
        phi = pyro.sample("phi", dist.Uniform(0 * one, one))
    with pyro.plate("num_players", len(at_bats)):
        if kind == "logit":
            alpha = pyro.sample("alpha", dist.Normal(loc, scale))
            return pyro.sample("obs", dist.Binomial(at_bats, logits=alpha), obs=hits)
        if kind == "not_pooled":
            phi = pyro.sample("phi", dist.Uniform(0 * one, one))
        elif kind == "partially_pooled":
            phi = pyro.sample("phi", dist.Beta(m * kappa, (1 - m) * kappa))
        return pyro.sample("obs", dist.Binomial(at_bats, phi), obs=hits)


@program("baseball_fully_pooled", "baseball_not_pooled", "baseball_partially_pooled", "baseball_logit")
def baseball(name):
    model = partial(players, name.removeprefix("baseball_"))
    at_bats = torch.tensor([45.0, 45.0, 40.0, 50.0, 45.0])
    return Pair(model, AutoNormal(model), (at_bats, torch.tensor([18.0, 12.0, 9.0, 14.0, 7.0])))


def funnel(x):
    y = pyro.sample("y", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), (y / 2).exp()))
        pyro.sample("obs", dist.Normal(z, 0.5), obs=x)


@program("funnel", "funnel_decentred", "funnel_transformed")
def funnels(name):
    model = funnel
    if name == "funnel_decentred":
        model = poutine.reparam(funnel, config={"z": LocScaleReparam(0.0)})
    x = torch.randn(6)
    return Pair(model, AutoDiagonalNormal(model) if name == "funnel_transformed" else AutoNormal(model), (x,))


def moons(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    radius = z.norm(dim=-1)
    pyro.factor("ring", -0.5 * ((radius - 2.0) / 0.4).square())


@program()
def neutra():
    """A density by a factor alone, in the space that a guide has straightened."""
    first = AutoIAFNormal(moons, hidden_dim=[4])
    first(torch.zeros(1))
    model = poutine.reparam(moons, config={"z": NeuTraReparam(first.requires_grad_(False))})
    return Pair(model, AutoNormal(model), (torch.zeros(1),))


# --- regression -------------------------------------------------------------------------------------------------------


def correlated(y):
    theta = pyro.sample("theta", dist.HalfCauchy(torch.ones(y.shape[1])).to_event(1))
    l_omega = pyro.sample("L_omega", dist.LKJCholesky(y.shape[1], torch.ones(())))
    scale_tril = theta.sqrt().diag_embed() @ l_omega
    with pyro.plate("observations", len(y)):
        pyro.sample("obs", dist.MultivariateNormal(torch.zeros(y.shape[1]), scale_tril=scale_tril), obs=y)


@program()
def lkj():
    return Pair(correlated, AutoNormal(correlated), (torch.randn(8, 3),))


def interactions(x, y):
    n, p = x.shape
    sigma = pyro.sample("sigma", dist.HalfNormal(3.0))
    eta1 = pyro.sample("eta1", dist.HalfCauchy(sigma * (2 / math.sqrt(n)) / (p - 2)))
    msq = pyro.sample("msq", dist.InverseGamma(3.0, 1.0))
    xisq = pyro.sample("xisq", dist.InverseGamma(3.0, 1.0))
    eta2 = eta1.square() * xisq.sqrt() / msq
    lam = pyro.sample("lambda", dist.HalfCauchy(torch.ones(p)).to_event(1))
    kappa = msq.sqrt()[..., None] * lam / (msq[..., None] + (eta1[..., None] * lam).square()).sqrt()
    kx, eta1, eta2 = kappa.unsqueeze(-2) * x, eta1[..., None, None], eta2[..., None, None]
    dot, squares = kx @ kx.mT, kx.square() @ kx.square().mT
    k = 0.5 * eta2.square() * ((1 + dot).square() - squares) + (eta1.square() - eta2.square()) * dot + 1.0
    k = k - 0.5 * eta2.square() + (sigma.square()[..., None, None] + 1e-2) * torch.eye(n)
    pyro.sample("Y", dist.MultivariateNormal(torch.zeros(n), covariance_matrix=k), obs=y)


@program("sparse_regression", "sparse_regression_map")
def sparse_regression(name):
    guide = AutoDelta if name.endswith("map") else AutoNormal
    x = torch.randn(8, 4)
    return Pair(
        interactions, guide(interactions), (x, x[:, 0] + 0.1 * torch.randn(8)), density=not name.endswith("map")
    )


def horseshoe(x, y):
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    with pyro.plate("features", x.shape[1]):
        lam = pyro.sample("lambda", dist.HalfCauchy(1.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 1.0)) * lam * tau
    prec = pyro.sample("prec", dist.Gamma(3.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((beta.unsqueeze(-2) * x).sum(-1), prec.rsqrt()), obs=y)


@program("horseshoe")
def horseshoes(name):
    x = torch.randn(8, 3)
    return Pair(horseshoe, AutoNormal(horseshoe), (x, x[:, 0] + 0.1 * torch.randn(8)))


def layers(x, y, width=3):
    """A Bayesian network of one hidden layer, by hand."""
    w1 = pyro.sample("w1", dist.Normal(torch.zeros(x.shape[1], width), 1.0).to_event(2))
    w2 = pyro.sample("w2", dist.Normal(torch.zeros(width, 1), 1.0).to_event(2))
    loc = ((x.unsqueeze(-2) @ w1).tanh() @ w2)[..., 0, 0]
    prec = pyro.sample("prec", dist.Gamma(3.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(loc, prec.rsqrt()), obs=y)


@program()
def bnn():
    x = torch.linspace(-1, 1, 8)[:, None]
    return Pair(layers, AutoNormal(layers), (x, x[:, 0].sin()))


def inflated(x, y):
    b1, b2 = (pyro.sample(n, dist.Normal(torch.zeros(2), 1.0).to_event(1)) for n in ("b1", "b2"))
    gate, rate = (x * b1).sum(-1), (x * b2).sum(-1).exp()
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.ZeroInflatedPoisson(rate, gate_logits=gate), obs=y)


@program()
def zero_inflated_poisson():
    return Pair(inflated, AutoNormal(inflated), (torch.randn(8, 2), dist.Poisson(1.0).sample((8,))))


# --- observers --------------------------------------------------------------------------------------------------------


def annotators(labels, classes=3):
    """Dawid and Skene: what each annotator says of each item, whose class is summed out."""
    items, people = labels.shape
    with pyro.plate("people", people, dim=-2), pyro.plate("class", classes, dim=-1):
        confusion = pyro.sample("beta", dist.Dirichlet(torch.ones(classes)))
    share = pyro.sample("pi", dist.Dirichlet(torch.ones(classes)))
    with pyro.plate("item", items, dim=-1):
        c = pyro.sample("c", dist.Categorical(share), **MARKED)
        with pyro.plate("position", people, dim=-2) as position:
            says = Vindex(confusion)[..., position[:, None], c, :]
            pyro.sample("y", dist.Categorical(says), obs=labels.T)


@program()
def annotation():
    labels = torch.randint(3, (6,))[:, None].expand(6, 4).clone()
    labels[::3, 1] = 0
    return Pair(annotators, AutoNormal(poutine.block(annotators, hide=["c"])), (labels,), TraceEnum_ELBO)


def trials(length, y):
    with pyro.plate_stack("plate", length.shape[:-1]):
        theta = pyro.sample("theta", dist.Normal(7.0, 2.0))
        pyro.sample("y", dist.Bernoulli(logits=theta.unsqueeze(-1) - length).to_event(1), obs=y)


def trials_guide(length, y):
    mean = pyro.param("posterior_mean", torch.tensor(7.0))
    sd = pyro.param("posterior_sd", torch.tensor(2.0), constraint=constraints.positive)
    with pyro.plate_stack("plate", length.shape[:-1]):
        pyro.sample("theta", dist.Normal(mean, sd))


@program("working_memory", "working_memory_alone")
def working_memory(name):
    length = torch.arange(1.0, 11.0)
    length = length if name.endswith("alone") else length.expand(3, 10).clone()
    return Pair(trials, trials_guide, (length, (length < 6).float()))


def fair(how, data):
    prior = dist.Beta(10.0, 10.0)
    if how == "mle":
        f = pyro.param("latent_fairness", torch.tensor(0.5), constraint=constraints.unit_interval)
    else:
        f = pyro.sample("latent_fairness", prior.mask(False) if how == "masked" else prior)
    with pyro.plate("data", len(data)):
        pyro.sample("obs", dist.Bernoulli(f), obs=data)


def nothing(*args):
    """Draws nothing."""


@program("mle", "map", "mle_masked")
def mle_map(name):
    model = partial(fair, {"mle": "mle", "map": "map", "mle_masked": "masked"}[name])
    guide = nothing if name == "mle" else AutoDelta(model)
    return Pair(model, guide, (torch.tensor([1.0] * 6 + [0.0] * 4),), density=name == "mle")


def pixels(observe, on):
    p_x, p_y = (pyro.param(n, torch.tensor(0.2), constraint=constraints.unit_interval) for n in ("p_x", "p_y"))
    x_axis, y_axis = pyro.plate("x_axis", 3, dim=-2), pyro.plate("y_axis", 4, dim=-1)
    with x_axis:
        x = pyro.sample("x_active", dist.Bernoulli(p_x))
    with y_axis:
        y = pyro.sample("y_active", dist.Bernoulli(p_y))
    p = 0.1 + 0.5 * x * y
    seen = p.new_zeros(torch.broadcast_shapes(p.shape, (3, 4)))
    seen[..., 1, 2] = seen[..., 2, 0] = 1
    if observe:
        with x_axis, y_axis:
            pyro.sample("pixels", dist.Bernoulli(p), obs=seen)


@program("pixels_drawn", "pixels_enumerated")
def tensor_shapes(name):
    guide = partial(pixels, False)
    if name == "pixels_enumerated":
        return Pair(partial(pixels, True), config_enumerate(guide, "parallel"), (torch.ones(1),), TraceEnum_ELBO)
    return Pair(partial(pixels, True), guide, (torch.ones(1),), TraceGraph_ELBO)


@config_enumerate
def features(x):
    data, of, components = (pyro.plate(n, s, dim=d) for n, s, d in (("data", 6, -1), ("of", 5, -2), ("parts", 4, -1)))
    with of, components:
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    with data:
        c = pyro.sample("c", dist.Categorical(torch.ones(4)))
        with of as index:
            pyro.sample("x", dist.Categorical(Vindex(p)[..., index[:, None], c, :]), obs=x)


def features_guide(x):
    alpha = pyro.param("alpha", torch.ones(5, 4, 3), constraint=constraints.positive)
    with pyro.plate("of", 5, dim=-2), pyro.plate("parts", 4, dim=-1):
        pyro.sample("p", dist.Dirichlet(alpha))


@program()
def enumeration_features():
    return Pair(features, features_guide, (torch.randint(3, (5, 6)),), TraceEnum_ELBO)


# --- names ------------------------------------------------------------------------------------------------------------


def objects(data, k):
    latent = named.Object("latent")
    latent.probs.param_(torch.ones(k) / k, constraint=constraints.simplex)
    latent.locs.param_(torch.arange(float(k)))
    latent.scales.param_(torch.ones(k), constraint=constraints.positive)
    latent.local = named.List()
    for x in data:
        local = latent.local.add()
        i = local.id.sample_(dist.Categorical(latent.probs))
        local.x.sample_(dist.Normal(latent.locs[i], latent.scales[i]), obs=x)


def objects_guide(data, k):
    latent = named.Object("latent")
    latent.local = named.List()
    for _ in data:
        local = latent.local.add()
        local.probs.param_(torch.ones(k) / k, constraint=constraints.positive)
        local.id.sample_(dist.Categorical(local.probs))


@scope(prefix="local")
def scoped(weights, locs, scale, data):
    c = pyro.sample("assignment", dist.Categorical(weights).expand_by([len(data)]))
    return pyro.sample("obs", dist.Normal(locs[c], scale), obs=data)


def scoping(data, k):
    weights = pyro.param("weights", torch.ones(k) / k, constraint=constraints.simplex)
    locs = pyro.param("locs", 10 * torch.randn(k))
    scale = pyro.param("scale", torch.tensor(5.0), constraint=constraints.positive)
    with pyro.plate("data"):
        return scoped(weights, locs, scale, data)


def scoping_guide(data, k):
    probs = pyro.param("assignment_probs", torch.ones(len(data), k) / k, constraint=constraints.unit_interval)
    with pyro.plate("data"), scope(prefix="local"):
        return pyro.sample("assignment", dist.Categorical(probs))


@program("autoname_mixture", "autoname_scoping", "autoname_scoping_enumerated")
def autoname(name):
    data = torch.tensor([0.0, 1.0, 2.0, 20.0, 30.0, 40.0])
    if name == "autoname_mixture":
        return Pair(objects, objects_guide, (data, 2), TraceGraph_ELBO)
    guide = config_enumerate(scoping_guide) if name.endswith("enumerated") else scoping_guide
    return Pair(scoping, guide, (data, 2), TraceEnum_ELBO if name.endswith("enumerated") else TraceGraph_ELBO)


def tree(data):
    latent = named.Object("latent")
    latent.z.sample_(dist.Normal(0.0, 1.0))
    branches(data, latent)


def branches(data, latent):
    if isinstance(data, torch.Tensor):
        latent.x.sample_(dist.Normal(latent.z, 1.0), obs=data)
    elif isinstance(data, list):
        latent.prior_scale.param_(torch.tensor(1.0), constraint=constraints.positive)
        latent.list = named.List()
        for part in data:
            below = latent.list.add()
            below.z.sample_(dist.Normal(latent.z, latent.prior_scale))
            branches(part, below)
    else:
        latent.dict = named.Dict()
        for key, part in data.items():
            latent.dict[key].z.sample_(dist.Normal(latent.z, 1.0))
            branches(part, latent.dict[key])


def tree_guide(data):
    guide_branches(data, named.Object("latent"))


def guide_branches(data, latent):
    latent.post_loc.param_(torch.tensor(0.0))
    latent.post_scale.param_(torch.tensor(1.0), constraint=constraints.positive)
    latent.z.sample_(dist.Normal(latent.post_loc, latent.post_scale))
    if isinstance(data, list):
        latent.list = named.List()
        for part in data:
            guide_branches(part, latent.list.add())
    elif isinstance(data, dict):
        latent.dict = named.Dict()
        for key, part in data.items():
            guide_branches(part, latent.dict[key])


@program("autoname_tree")
def tree_data(name):
    data = {"foo": torch.tensor(1.0), "bar": [torch.tensor(2.0), torch.tensor(3.0), torch.tensor(4.0)]}
    return Pair(tree, tree_guide, (data,))


# --- time -------------------------------------------------------------------------------------------------------------


def slides(observed):
    """A simulator that takes as many steps as its latent asks for."""
    mu = pyro.sample("mu", dist.Uniform(0.0, 1.0))
    acceleration = 9.8 * (math.sin(math.pi / 6) - math.cos(math.pi / 6) * mu)
    if float(acceleration) <= 0.05:
        time = torch.tensor(20.0)
    else:
        velocity = displacement = time = torch.zeros(())
        while float(displacement) < 2.0:
            displacement, velocity, time = displacement + velocity * 0.05, velocity + acceleration * 0.05, time + 0.05
    for i, seen in enumerate(observed):
        pyro.sample(f"obs_{i}", dist.Normal(time + 0.1 * mu, 0.2), obs=seen)


def slides_guide(observed):
    """Scored, as the simulator's density jumps where one more step is taken."""
    a, b = (pyro.param(n, torch.tensor(v), constraint=constraints.positive) for n, v in (("a", 2.0), ("b", 40.0)))
    pyro.sample("mu", dist.Beta(a, b).has_rsample_(False))


@program()
def inclined_plane():
    return Pair(slides, slides_guide, (1.1 + 0.1 * torch.randn(4),))


class Harmonic:
    """A state that moves; the guide proposes each step from the one before."""

    A = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])

    def model(self, y):
        z = pyro.sample("z_init", dist.Delta(torch.tensor([1.0, 0.0]), event_dim=1))
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Normal(z @ self.A, torch.tensor([1.0, 1.0])).to_event(1))
            pyro.sample(f"y_{t}", dist.Normal(z[..., 0], 0.5), obs=y[t])

    def guide(self, y):
        gain = pyro.param("gain", torch.zeros(()))
        z = pyro.sample("z_init", dist.Delta(torch.tensor([1.0, 0.0]), event_dim=1))
        for t in pyro.markov(range(len(y))):
            step = z @ self.A
            loc = torch.stack([step[..., 0] + gain * (y[t] - step[..., 0]), step[..., 1]], -1)
            z = pyro.sample(f"z_{t}", dist.Normal(loc, torch.tensor([1.0, 1.0])).to_event(1))


@program()
def smcfilter():
    own = Harmonic()
    return Pair(own.model, own.guide, (torch.tensor([0.1, -0.9, 0.2, 1.1]),))


class Compiled(nn.Module):
    """A network that reads what is observed, as keyword arguments have it."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 2))

    def model(self, prior_mean, observations):
        x = pyro.sample("z", dist.Normal(prior_mean, 5**0.5))
        for name in ("x1", "x2"):
            pyro.sample(name, dist.Normal(x, 2**0.5), obs=observations[name])

    def guide(self, prior_mean, observations):
        pyro.module("guide", self)
        v = self.net(torch.stack([observations["x1"], observations["x2"]])[None])
        pyro.sample("z", dist.Normal(v[0, 0], v[0, 1].exp()))


@program()
def csis():
    own = Compiled()
    return Pair(own.model, own.guide, (torch.tensor(1.0), {"x1": torch.tensor(8.0), "x2": torch.tensor(9.0)}))


class Volatile(nn.Module):
    def model(self, returns):
        nu = pyro.sample("nu", dist.Exponential(0.1))
        sigma = pyro.sample("sigma", dist.Exponential(50.0))
        walk = dist.GaussianRandomWalk(sigma, len(returns)) if hasattr(dist, "GaussianRandomWalk") else None
        if walk is None:
            steps = pyro.sample("steps", dist.Normal(torch.zeros(len(returns)), 1.0).to_event(1))
            s = sigma.unsqueeze(-1) * steps.cumsum(-1)
        else:
            s = pyro.sample("s", walk)
        s = s.reshape(*nu.shape[:-1], -1)
        with pyro.plate("time", len(returns)):
            pyro.sample("r", dist.StudentT(nu + 2, 0.0, s.exp()), obs=returns)


@program()
def stochastic_volatility():
    own = Volatile()
    return Pair(own.model, AutoNormal(own.model), (torch.randn(6),))


def autoregressive(y):
    """The second order, unrolled; the first two are given."""
    alpha = pyro.sample("alpha", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    const, sigma = pyro.sample("const", dist.Normal(0.0, 1.0)), pyro.sample("sigma", dist.HalfNormal(1.0))
    for t in range(2, len(y)):
        loc = const + alpha[..., 0] * y[t - 1] + alpha[..., 1] * y[t - 2]
        pyro.sample(f"y_{t}", dist.Normal(loc, sigma), obs=y[t])


@program()
def ar2():
    return Pair(autoregressive, AutoNormal(autoregressive), (torch.randn(7).cumsum(0),))


class Matern(nn.Module):
    """A Gaussian process that scores its data by itself."""

    def __init__(self):
        super().__init__()
        self.gp = IndependentMaternGP(nu=1.5, obs_dim=2, length_scale_init=1.5 * torch.ones(2))

    def model(self, y):
        pyro.module("gp", self.gp)
        pyro.factor("y", self.gp.log_prob(y).sum())

    def guide(self, y):
        """Draws nothing."""


@program()
def gp_models():
    own = Matern()
    return Pair(own.model, own.guide, (torch.randn(6, 2),))


def transformed(x):
    """A log-normal latent, moved to where it is normal."""
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.LogNormal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Poisson(rate), obs=x)


@program("reparam_transform", "reparam_structured")
def reparam(name):
    model = poutine.reparam(transformed, config={"rate": TransformReparam()})
    x = dist.Poisson(2.0).sample((6,))
    if name == "reparam_transform":
        return Pair(model, AutoNormal(model), (x,))
    return Pair(model, AutoDiagonalNormal(model), (x,))
