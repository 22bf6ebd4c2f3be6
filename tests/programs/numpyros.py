"""NumPyro's examples and tutorials, read as Pyro's: dynamics, responses, counts, times to an event, what is missing."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import transforms
from pyro.infer import TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.infer.reparam import LocScaleReparam
from pyro.ops.indexing import Vindex
from torch.distributions import constraints

from tests.programs.registry import Pair, program


def vector(name, size, scale=1.0):
    return pyro.sample(name, dist.Normal(torch.zeros(size), scale).to_event(1))


def positive(name, size=(), scale=1.0):
    return pyro.sample(name, dist.LogNormal(torch.zeros(size), scale).to_event(len(size)))


# --- dynamics ---------------------------------------------------------------------------------------------------------


def runge_kutta(slope, state, step):
    a = slope(state)
    b = slope(state + step / 2 * a)
    c = slope(state + step / 2 * b)
    return state + step / 6 * (a + 2 * b + 2 * c + slope(state + step * c))


def predator_prey(counts, steps=4):
    """Lotka and Volterra's equations, solved within the model, hares and lynxes counted with noise."""
    rates = pyro.sample("theta", dist.LogNormal(torch.tensor([0.0, -1.0, 0.0, -1.0]), 0.2).to_event(1))
    state = pyro.sample("z_init", dist.LogNormal(torch.ones(2), 0.5).to_event(1))
    noise = positive("sigma", (2,), 0.3)

    def slope(z):
        born, eaten, die, grow = rates.unbind(-1)
        hares, lynxes = z.unbind(-1)
        return torch.stack([hares * (born - eaten * lynxes), lynxes * (grow * hares - die)], -1)

    path = []
    for _ in counts:
        path.append(state.log())
        for _ in range(steps):
            state = runge_kutta(slope, state, 0.5 / steps)
    with pyro.plate("time", len(counts)):
        path = torch.cat(path, -2) if state.dim() > 1 else torch.stack(path)
        pyro.sample("y", dist.LogNormal(path, noise).to_event(1), obs=counts)


def hilbert_space_gp(x, y, number=5, edge=1.5):
    """A Gaussian process by the eigenfunctions of its kernel on an interval."""
    amplitude, length = positive("amplitude", (), 0.5).unsqueeze(-1), positive("length", (), 0.5).unsqueeze(-1)
    root = torch.arange(1.0, number + 1) * math.pi / (2 * edge)
    density = amplitude * (2 * math.pi) ** 0.25 * length.sqrt() * (-0.25 * (length * root) ** 2).exp()
    f = ((root * (x[:, None] + edge)).sin() / edge**0.5 * density * vector("beta", number)).sum(-1)
    noise = positive("noise", (), 0.3)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(f, noise), obs=y)


def holt_winters(y, season=3):
    """Level, trend and season, each smoothed by what was seen; every step is a site of its own."""
    smooth = pyro.sample("smoothing", dist.Beta(torch.ones(3), 3.0).to_event(1))
    level, trend, seasons = vector("level", 1), 0.3 * vector("trend", 1), vector("season", season)
    noise = positive("noise", (), 0.3)
    parts, seasons = [s.unsqueeze(-1) for s in smooth.unbind(-1)], list(seasons.split(1, -1))
    for t, seen in enumerate(y):
        now = seasons[t % season]
        pyro.sample(f"y_{t}", dist.Normal((level + trend + now).squeeze(-1), noise), obs=seen)
        new = parts[0] * (seen - now) + (1 - parts[0]) * (level + trend)
        trend = parts[1] * (new - level) + (1 - parts[1]) * trend
        seasons[t % season], level = parts[2] * (seen - new) + (1 - parts[2]) * now, new


@program("predator_prey", "hsgp", "holt_winters")
def dynamics(name):
    if name == "predator_prey":
        counts = torch.tensor([[2.7, 2.5], [3.0, 3.1], [2.6, 3.8], [1.9, 4.0], [1.4, 3.6]])
        return Pair(predator_prey, AutoNormal(predator_prey, init_scale=0.05), (counts,))
    if name == "hsgp":
        x = torch.linspace(-1, 1, 9)
        return Pair(hilbert_space_gp, AutoNormal(hilbert_space_gp), (x, (3 * x).sin() + 0.1 * torch.randn(9)))
    y = torch.arange(7.0) * 0.2 + torch.tensor([0.5, -0.3, 0.0]).repeat(3)[:7]
    return Pair(holt_winters, AutoNormal(holt_winters, init_scale=0.1), (y,))


# --- responses --------------------------------------------------------------------------------------------------------


def item_response(answers):
    """Two parameters an item, one a person: plates that cross."""
    items, people = answers.shape
    with pyro.plate("items", items, dim=-2):
        difficulty, slope = (
            pyro.sample("difficulty", dist.Normal(0.0, 1.0)),
            pyro.sample("slope", dist.LogNormal(0.0, 0.3)),
        )
    with pyro.plate("people", people, dim=-1):
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
        with pyro.plate("items_of_all", items, dim=-2):
            pyro.sample("y", dist.Bernoulli(logits=slope * (ability - difficulty)), obs=answers)


def ordinal_regression(x, y, levels=4):
    """Ordered levels by cutpoints that are ordered, too."""
    slopes = vector("slopes", x.shape[1])
    base = dist.Normal(torch.zeros(levels - 1), 1.0).to_event(1)
    cuts = pyro.sample("cuts", dist.TransformedDistribution(base, [transforms.OrderedTransform()]))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.OrderedLogistic((x * slopes).sum(-1), cuts), obs=y)


def admissions(department, male, applied, admitted, number=3):
    """Intercepts and slopes by department, correlated by a prior of Lewandowski, Kurowicka and Joe."""
    means, sigma = vector("means", 2), positive("sigma", (2,), 0.5)
    corr = pyro.sample("corr", dist.LKJCholesky(2, 2.0))
    with pyro.plate("departments", number):
        v = pyro.sample("v", dist.MultivariateNormal(torch.zeros(2), scale_tril=sigma.unsqueeze(-1) * corr))
    own = means + v[..., department, :]
    with pyro.plate("data", len(applied)):
        pyro.sample("y", dist.Binomial(applied, logits=own[..., 0] + own[..., 1] * male), obs=admitted)


def decentred_as_it_likes(scores):
    """Eight schools, each centred by as much as the guide learns (Gorinova, Moore and Hoffman)."""
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 1.0)), pyro.sample("tau", dist.HalfCauchy(1.0))
    with pyro.plate("schools", len(scores)):
        pyro.sample("y", dist.Normal(pyro.sample("theta", dist.Normal(mu, tau)), 0.5), obs=scores)


@program("item_response", "ordinal_regression", "ucbadmit", "vip")
def responses(name):
    if name == "item_response":
        answers = (torch.rand(4, 6) < torch.linspace(0.2, 0.8, 6)).float()
        return Pair(item_response, AutoNormal(item_response), (answers,))
    if name == "ordinal_regression":
        x = torch.randn(10, 2)
        return Pair(ordinal_regression, AutoNormal(ordinal_regression), (x, (x[:, 0] + 1.5).clamp(0, 3).long()))
    if name == "ucbadmit":
        applied = torch.full((6,), 20.0)
        args = torch.arange(6) // 2, torch.arange(6) % 2, applied, torch.tensor([12.0, 13, 7, 8, 3, 2])
        return Pair(admissions, AutoNormal(admissions), args)
    model = poutine.reparam(decentred_as_it_likes, config={"theta": LocScaleReparam()})
    return Pair(model, AutoNormal(model), (torch.tensor([1.0, 0.3, -0.5, 0.2]),))


# --- counts, angles, places -------------------------------------------------------------------------------------------


def inflated_counts(x, y):
    """A negative binomial with zeros of their own."""
    gate, rate = ((x * vector(name, 2)).sum(-1) for name in ("of_gate", "of_rate"))
    total = positive("total")
    with pyro.plate("data", len(x)):
        counts = dist.ZeroInflatedNegativeBinomial(total, logits=rate - total.log(), gate_logits=gate)
        pyro.sample("y", counts, obs=y)


@config_enumerate
def angles(y, number=3):
    """A mixture of von Mises; who is of which component is summed out."""
    share = pyro.sample("share", dist.Dirichlet(torch.ones(number)))
    loc = pyro.sample("loc", dist.VonMises(0.0, 0.5).expand([number]).to_event(1))
    sharp = positive("sharp", (number,), 0.5)
    with pyro.plate("data", len(y)):
        c = pyro.sample("c", dist.Categorical(share))
        pyro.sample("y", dist.VonMises(Vindex(loc)[..., c], Vindex(sharp)[..., c]), obs=y)


def neighbours(near, y):
    """Counts of places whose effects are conditionally autoregressive."""
    pull, tau = pyro.sample("pull", dist.Beta(2.0, 2.0)), pyro.sample("tau", dist.Gamma(2.0, 1.0))
    precision = tau[..., None, None] * (near.sum(0).diag() - pull[..., None, None] * near)
    phi = pyro.sample("phi", dist.MultivariateNormal(torch.zeros(len(y)), precision_matrix=precision))
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("places", len(y)):
        pyro.sample("y", dist.Poisson((level.unsqueeze(-1) + phi).exp().reshape(*level.shape[:-1], -1)), obs=y)


def factors(x, number=2):
    """Factors of each datum, correlated among each other; loadings are a matrix for all."""
    loadings = pyro.sample("loadings", dist.Normal(torch.zeros(number, x.shape[1]), 1.0).to_event(2))
    corr = pyro.sample("corr", dist.LKJCholesky(number, 1.0))
    noise = positive("noise", (x.shape[1],), 0.5)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(number), scale_tril=corr))
        loc = (z.unsqueeze(-2) @ loadings).squeeze(-2)
        pyro.sample("x", dist.Normal(loc, noise).to_event(1), obs=x)


@program("zero_inflated_negative_binomial", "von_mises_mixture", "car", "factor_model")
def counts(name):
    if name == "zero_inflated_negative_binomial":
        y = torch.tensor([0.0, 0, 3, 1, 0, 7, 0, 2, 1])
        return Pair(inflated_counts, AutoNormal(inflated_counts), (torch.randn(9, 2), y))
    if name == "von_mises_mixture":
        y = torch.tensor([-2.0, -1.9, -2.2, 0.1, 0.0, 0.2, 2.0, 2.1])
        return Pair(angles, AutoNormal(poutine.block(angles, hide=["c"])), (y,), TraceEnum_ELBO)
    if name == "car":
        near = (torch.arange(6)[:, None] - torch.arange(6)).abs().eq(1).float()
        return Pair(neighbours, AutoDiagonalNormal(neighbours), (near, torch.tensor([0.0, 1, 1, 3, 4, 6])))
    return Pair(
        factors, AutoNormal(factors), (torch.randn(8, 3) @ torch.tensor([[1.0, 0.8, 0], [0, 0.6, 0], [0, 0, 1]]),)
    )


# --- times to an event, and what is missing ---------------------------------------------------------------------------


def gompertz(times, ended):
    """Hazards that grow; of who is still there at the end, the survival alone is known, as a factor."""
    a, b = pyro.sample("a", dist.Normal(-1.0, 1.0)), positive("b", (), 0.3)
    with pyro.plate("people", len(times)):
        log_hazard, gone = a + b * times, a.exp() / b * (b * times).expm1()
        pyro.factor("survival", torch.where(ended, log_hazard, torch.zeros(())) - gone)


def censored(x, times, ended):
    """Exponential times, seen under a mask; beyond the end, that it was reached."""
    slopes = vector("slopes", x.shape[1])
    lasts = dist.Exponential((x * slopes).sum(-1).exp())
    with pyro.plate("people", len(x)):
        with poutine.mask(mask=ended):
            pyro.sample("time", lasts, obs=times)
        with poutine.mask(mask=~ended):
            pyro.sample("there", dist.Bernoulli(lasts.cdf(times).neg().add(1).clamp(1e-6, 1)), obs=torch.ones(len(x)))


def completed(age, known, survived):
    """Ages, some of which are latents; what they explain reads all."""
    mean, spread = pyro.sample("mean", dist.Normal(0.0, 1.0)), positive("spread", (), 0.3)
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    missing = (~known).nonzero().squeeze(-1)
    with pyro.plate("missing", len(missing)):
        imputed = pyro.sample("age_missing", dist.Normal(mean, spread))
    own = age.where(known, 0.0) + imputed @ torch.eye(len(age))[missing]
    with pyro.plate("data", len(age)):
        with poutine.mask(mask=known):
            pyro.sample("age", dist.Normal(mean, spread), obs=age.where(known, 0.0))
        pyro.sample("survived", dist.Bernoulli(logits=slope * own), obs=survived)


@config_enumerate
def completed_bits(smokes, known, ill):
    """Bits, of which those that are missing are summed out."""
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    effects = pyro.sample("effects", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(smokes)):
        own = pyro.sample("smokes", dist.Bernoulli(share), obs=smokes, obs_mask=known)
        pyro.sample("ill", dist.Bernoulli(logits=effects[..., 0] + effects[..., 1] * own), obs=ill)


def completed_bits_guide(smokes, known, ill):
    a, b = (pyro.param(n, torch.tensor(2.0), constraint=constraints.positive) for n in ("a", "b"))
    loc, scale = pyro.param("loc", torch.ones(2)), pyro.param("scale", torch.ones(2), constraint=constraints.positive)
    pyro.sample("share", dist.Beta(a, b))
    pyro.sample("effects", dist.Normal(loc, scale).to_event(1))


@program("gompertz", "censored", "imputation", "discrete_imputation")
def events(name):
    known = torch.tensor([True, True, False, True, True, False, True, True])
    x, times = torch.randn(8, 2), torch.tensor([0.5, 1.2, 2.0, 0.3, 0.9, 2.0, 1.1, 0.7])
    if name == "gompertz":
        return Pair(gompertz, AutoNormal(gompertz), (times, known), TraceMeanField_ELBO)
    if name == "censored":
        return Pair(censored, AutoNormal(censored), (x, times, known))
    if name == "imputation":
        age = torch.randn(8).where(known, math.nan)
        return Pair(completed, AutoNormal(completed), (age, known, (torch.rand(8) < 0.5).float()))
    bits = (torch.arange(8) % 2).float()
    return Pair(completed_bits, completed_bits_guide, (bits, known, (torch.arange(8) % 3 == 0).float()), TraceEnum_ELBO)
