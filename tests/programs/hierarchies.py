"""Programs with latents that all data share: regressions, coins, mixtures, topics, schools."""

from functools import partial

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.distributions import constraints
from pyro.distributions.testing.fakes import NonreparameterizedBeta
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoDiscreteParallel,
    AutoGuideList,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_feasible,
    init_to_mean,
)
from pyro.nn import PyroModule, PyroSample
from pyro.ops.indexing import Vindex
from torch import nn
from torch.nn.functional import softplus

from tests.programs.registry import Pair, program

positive = partial(pyro.param, constraint=constraints.positive)

# --- regressions ------------------------------------------------------------------------------------------------------


class Regression(PyroModule):
    """Weights and biases of a layer are random."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](3, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

    def forward(self, x, y=None):
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
        return mean


def terrain():
    x = torch.stack([(torch.rand(12) < 0.4).float(), torch.rand(12) * 3], -1)
    x = torch.cat([x, x[:, :1] * x[:, 1:]], -1)
    return x, 9 + x @ torch.tensor([-1.8, -0.2, 0.4]) + 0.5 * torch.randn(12)


@program("bayesian_regression", "bayesian_regression_low_rank")
def bayesian_regression(name):
    model = Regression()
    guide = (AutoDiagonalNormal if name == "bayesian_regression" else AutoLowRankMultivariateNormal)(model)
    return Pair(model, guide, terrain())


def rugged(cont, ruggedness, gdp):
    a = pyro.sample("a", dist.Normal(0.0, 10.0))
    b = [pyro.sample(name, dist.Normal(0.0, 1.0)) for name in ("bA", "bR", "bAR")]
    sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
    mean = a + b[0] * cont + b[1] * ruggedness + b[2] * cont * ruggedness
    with pyro.plate("data", len(ruggedness)):
        pyro.sample("obs", dist.Normal(mean, sigma), obs=gdp)


def rugged_guide(cont, ruggedness, gdp):
    pyro.sample("a", dist.Normal(pyro.param("a_loc", torch.tensor(0.0)), positive("a_scale", torch.tensor(1.0))))
    loc, scale = pyro.param("weights_loc", lambda: torch.randn(3)), positive("weights_scale", torch.ones(3))
    for i, name in enumerate(("bA", "bR", "bAR")):
        pyro.sample(name, dist.Normal(loc[i], scale[i]))
    pyro.sample("sigma", dist.Normal(positive("sigma_loc", torch.tensor(1.0)), torch.tensor(0.05)))


@program("bayesian_regression_ii", "bayesian_regression_ii_auto")
def bayesian_regression_ii(name):
    x, y = terrain()
    auto = AutoMultivariateNormal(rugged, init_loc_fn=init_to_mean)
    return Pair(rugged, rugged_guide if name == "bayesian_regression_ii" else auto, (x[:, 0], x[:, 1], y), lr=0.05)


class Line(PyroModule):
    """A line through data that come in batches."""

    def __init__(self, size):
        super().__init__()
        self.size = size
        self.register_buffer("zero", torch.tensor(0.0))

    def forward(self, covariates, data=None):
        coeff = pyro.sample("coeff", dist.Normal(self.zero, 1))
        bias = pyro.sample("bias", dist.Normal(self.zero, 1))
        scale = pyro.sample("scale", dist.LogNormal(self.zero, 1))
        with pyro.plate("data", self.size, len(covariates)):
            return pyro.sample("obs", dist.Normal(bias + coeff * covariates, scale), obs=data)


@program("svi_torch", "svi_torch_minibatch")
def svi_torch(name):
    covariates = torch.randn(12)
    data = 0.5 + 1.5 * covariates + 0.3 * torch.randn(12)
    model = Line(12)
    batch = 12 if name == "svi_torch" else 4
    return Pair(model, AutoNormal(model), (covariates[:batch], data[:batch]))


# --- coins ------------------------------------------------------------------------------------------------------------


def coin(data):
    f = pyro.sample("latent_fairness", dist.Beta(10.0, 10.0))
    for i in range(len(data)):
        pyro.sample(f"obs_{i}", dist.Bernoulli(f), obs=data[i])


def coin_in_plates(size, subsample, data):
    f = pyro.sample("latent_fairness", dist.Beta(10.0, 10.0))
    with pyro.plate("data_plate", size, subsample_size=subsample) as index:
        pyro.sample("obs", dist.Bernoulli(f), obs=data[index])


def coin_guide(family, infer, data):
    a, b = positive("alpha_q", torch.tensor(8.0)), positive("beta_q", torch.tensor(15.0))
    pyro.sample("latent_fairness", family(a, b), infer=infer)


@program("svi_part_i", "svi_part_ii", "svi_part_ii_subsampled", "svi_part_iii")
def coins(name):
    data = torch.tensor([1.0] * 6 + [0.0] * 4)
    if name == "svi_part_iii":
        guide = partial(coin_guide, NonreparameterizedBeta, {"baseline": {"use_decaying_avg_baseline": True}})
        return Pair(partial(coin_in_plates, 10, None), guide, (data,), TraceGraph_ELBO)
    guide = partial(coin_guide, dist.Beta, {})
    model = coin if name == "svi_part_i" else partial(coin_in_plates, 10, 4 if name.endswith("subsampled") else None)
    return Pair(model, guide, (data,))


# --- mixtures ---------------------------------------------------------------------------------------------------------


@config_enumerate
def gaussians(alone, data, k=2):
    """``alone`` as the tutorial has it, which any number of particles would index otherwise."""
    weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(k)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("components", k):
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(data)):
        assignment = pyro.sample("assignment", dist.Categorical(weights))
        loc = locs[assignment] if alone else Vindex(locs)[..., assignment]
        pyro.sample("obs", dist.Normal(loc, scale), obs=data)


GLOBAL = ["weights", "scale", "locs"]


@program("gmm", "gmm_normal", "gmm_low_rank", "gmm_guide_list", "gmm_full_guide")
def gmm(name):
    data = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])
    model = partial(gaussians, name in ("gmm", "gmm_full_guide"))
    exposed = poutine.block(model, expose=GLOBAL)
    if name == "gmm_full_guide":
        point = AutoDelta(exposed)
        point(data)

        @config_enumerate
        def full(data):
            with poutine.block(hide_types=["param"]):
                point(data)
            with pyro.plate("data", len(data)):
                probs = pyro.param("probs", torch.ones(len(data), 2) / 2, constraint=constraints.simplex)
                pyro.sample("assignment", dist.Categorical(probs))

        return Pair(model, full, (data,), TraceEnum_ELBO, lr=0.1, density=False)
    if name == "gmm_guide_list":
        guide = AutoGuideList(model)
        guide.append(AutoNormal(exposed))
        guide.append(AutoDiscreteParallel(poutine.block(model, expose=["assignment"])))
        return Pair(model, guide, (data,), TraceEnum_ELBO)
    auto = {"gmm": AutoDelta, "gmm_normal": AutoNormal, "gmm_low_rank": AutoLowRankMultivariateNormal}[name]
    return Pair(model, auto(exposed), (data,), TraceEnum_ELBO, lr=0.05, density=name != "gmm")


@config_enumerate
def toy(prior, seen_a, seen_c):
    number = len(seen_a)
    p_a = pyro.sample("p_A", dist.Beta(1, 1))
    p_b = pyro.sample("p_B", dist.Beta(torch.ones(2), torch.ones(2)).to_event(1))
    p_c = pyro.sample("p_C", dist.Beta(torch.ones(2), torch.ones(2)).to_event(1))
    with pyro.plate("data_plate", number):
        a = pyro.sample("A", dist.Bernoulli(p_a.expand(number)), obs=seen_a)
        b = pyro.sample("B", dist.Bernoulli(Vindex(p_b)[a.long()]), infer={"enumerate": "parallel"})
        pyro.sample("C", dist.Bernoulli(Vindex(p_c)[b.long()]), obs=seen_c)


def toy_guide(prior, seen_a, seen_c):
    for name, own in prior.items():
        q = positive(name.lower(), own)
        beta = dist.Beta(q[..., 0], q[..., 1])
        pyro.sample(f"p_{name}", beta.to_event(1) if q.dim() > 1 else beta)


@program()
def toy_mixture():
    prior = {"A": torch.tensor([1.0, 10.0]), "B": torch.tensor([[10.0, 1.0], [1.0, 10.0]])}
    prior["C"] = prior["B"].clone()
    seen = (torch.rand(2, 8) < 0.5).float()
    return Pair(partial(toy, prior), partial(toy_guide, prior), tuple(seen), TraceEnum_ELBO)


def stick(beta):
    return F.pad(beta, (0, 1), value=1) * F.pad((1 - beta).cumprod(-1), (1, 0), value=1)


def dirichlet_process(kind, t, data):
    with pyro.plate("beta_plate", t - 1):
        beta = pyro.sample("beta", dist.Beta(1, 1.1))
    with pyro.plate("mu_plate", t):
        mu = pyro.sample("mu", dist.MultivariateNormal(torch.zeros(2), 5 * torch.eye(2))) if kind == "normal" else None
        rate = pyro.sample("lambda", dist.Gamma(3, 0.05)) if kind != "normal" else None
    with pyro.plate("data", len(data)):
        z = pyro.sample("z", dist.Categorical(stick(beta)))
        of_data = dist.MultivariateNormal(mu[z], torch.eye(2)) if kind == "normal" else dist.Poisson(rate[z])
        pyro.sample("obs", of_data, obs=data)


def dirichlet_process_guide(kind, t, data):
    kappa = positive("kappa", lambda: torch.rand(t - 1) * 2)
    phi = pyro.param("phi", lambda: dist.Dirichlet(torch.ones(t)).sample((len(data),)), constraint=constraints.simplex)
    with pyro.plate("beta_plate", t - 1):
        pyro.sample("beta", dist.Beta(torch.ones(t - 1), kappa))
    with pyro.plate("mu_plate", t):
        if kind == "normal":
            pyro.sample("mu", dist.MultivariateNormal(pyro.param("tau", lambda: 2 * torch.randn(t, 2)), torch.eye(2)))
        else:
            tau = (
                positive("tau_0", lambda: 1 + torch.rand(t) * 5),
                positive("tau_1", lambda: torch.rand(t) * 0.2 + 0.02),
            )
            pyro.sample("lambda", dist.Gamma(*tau))
    with pyro.plate("data", len(data)):
        pyro.sample("z", dist.Categorical(phi))


@program("dirichlet_process", "dirichlet_process_poisson")
def dirichlet_processes(name):
    kind = "normal" if name == "dirichlet_process" else "poisson"
    data = (
        torch.randn(6, 2) + 4 * (torch.arange(6) % 2)[:, None] if kind == "normal" else dist.Poisson(40.0).sample((6,))
    )
    return Pair(
        partial(dirichlet_process, kind, 3), partial(dirichlet_process_guide, kind, 3), (data,), TraceGraph_ELBO
    )


# --- topics, factors, schools -----------------------------------------------------------------------------------------


def topics(k, words, docs, data, batch_size=None):
    """Latent Dirichlet allocation, the topic of each word summed out."""
    with pyro.plate("topics", k):
        weights = pyro.sample("topic_weights", dist.Gamma(1.0 / k, 1.0))
        of_words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(words) / words))
    with pyro.plate("documents", docs) as index:
        data = data[:, index]
        mixture = pyro.sample("doc_topics", dist.Dirichlet(weights))
        with pyro.plate("words", len(data)):
            topic = pyro.sample("word_topics", dist.Categorical(mixture), infer={"enumerate": "parallel"})
            pyro.sample("doc_words", dist.Categorical(of_words[topic]), obs=data)


def topics_guide(drawn, predictor, k, words, docs, data, batch_size=None):
    weights = positive("weights_q", lambda: torch.ones(k))
    greater = constraints.greater_than(0.5)
    of_words = pyro.param("words_q", lambda: torch.ones(k, words), constraint=greater)
    with pyro.plate("topics", k):
        pyro.sample("topic_weights", dist.Gamma(weights, 1.0))
        pyro.sample("topic_words", dist.Dirichlet(of_words))
    pyro.module("predictor", predictor)
    with pyro.plate("documents", docs, batch_size) as index:
        data = data[:, index]
        counts = torch.zeros(words, len(index)).scatter_add(0, data, torch.ones(data.shape))
        mixture = predictor(counts.t())
        pyro.sample("doc_topics", dist.Dirichlet(20 * mixture) if drawn else dist.Delta(mixture, event_dim=1))


@program("lda", "lda_minibatch", "lda_drawn")
def lda(name):
    k, words, docs = 2, 5, 6
    predictor = nn.Sequential(nn.Linear(words, 6), nn.Sigmoid(), nn.Linear(6, k), nn.Softmax(-1))
    data = torch.randint(words, (4, docs))
    guide = partial(topics_guide, name == "lda_drawn", predictor, k, words, docs)
    args = (data, 3) if name == "lda_minibatch" else (data,)
    model = partial(topics, k, words, docs)
    return Pair(model, guide, args, TraceEnum_ELBO, lr=0.1, density=name == "lda_drawn")


class SparseGamma:
    """A deep exponential family of sparse gammas."""

    top, mid, bottom, image = 3, 3, 2, 5

    def weights(self):
        return {"top": (self.top, self.mid), "mid": (self.mid, self.bottom), "bottom": (self.bottom, self.image)}

    def model(self, x):
        w = {}
        for name, shape in self.weights().items():
            with pyro.plate(f"w_{name}_plate", shape[0] * shape[1]):
                w[name] = pyro.sample(f"w_{name}", dist.Gamma(0.1, 0.3))
        w = {name: w[name].reshape(*w[name].shape[:-1], *shape) for name, shape in self.weights().items()}
        w = {name: v if v.dim() == 2 else v.reshape(-1, *v.shape[-2:]) for name, v in w.items()}
        with pyro.plate("data", len(x)):
            z = pyro.sample("z_top", dist.Gamma(0.1, 0.1).expand([self.top]).to_event(1))
            z = pyro.sample("z_mid", dist.Gamma(torch.tensor(0.1), 0.1 / (z @ w["top"])).to_event(1))
            z = pyro.sample("z_bottom", dist.Gamma(torch.tensor(0.1), 0.1 / (z @ w["mid"])).to_event(1))
            pyro.sample("obs", dist.Poisson(z @ w["bottom"]).to_event(1), obs=x)

    def guide(self, x):
        def gammas(kind, name, shape, dims):
            alpha = softplus(pyro.param(f"alpha_{kind}_{name}", lambda: 0.5 + 0.1 * torch.randn(shape)))
            mean = softplus(pyro.param(f"mean_{kind}_{name}", lambda: 0.1 * torch.randn(shape)))
            pyro.sample(f"{kind}_{name}", dist.Gamma(alpha, alpha / mean).to_event(dims))

        for name, shape in self.weights().items():
            with pyro.plate(f"w_{name}_plate", shape[0] * shape[1]):
                gammas("w", name, (shape[0] * shape[1],), 0)
        with pyro.plate("data", len(x)):
            for name, width in (("top", self.top), ("mid", self.mid), ("bottom", self.bottom)):
                gammas("z", name, (len(x), width), 1)


class Grouped(EasyGuide):
    """One Gaussian for all weights, one for the latents of each datum."""

    def guide(self, x):
        every = self.group(match="w_.*")
        mean = pyro.param("w_mean", lambda: 0.5 + 0.1 * torch.randn(every.event_shape))
        scale = softplus(pyro.param("w_scale", lambda: 0.1 * torch.randn(every.event_shape)))
        every.sample("ws", dist.Normal(mean, scale).to_event(1))
        local = self.group(match="z_.*")
        shape = x.shape[:1] + local.event_shape
        with self.plate("data", len(x)):
            mean = pyro.param("z_mean", lambda: 0.5 + 0.1 * torch.randn(shape))
            scale = softplus(pyro.param("z_scale", lambda: 0.1 * torch.randn(shape)))
            local.sample("zs", dist.Normal(mean, scale).to_event(1))


@program("sparse_gamma_def", "sparse_gamma_def_auto", "sparse_gamma_def_easy")
def sparse_gamma_def(name):
    own = SparseGamma()
    x = dist.Poisson(4.0).sample((4, own.image))
    if name == "sparse_gamma_def":
        return Pair(own.model, own.guide, (x,), TraceMeanField_ELBO)
    easy = name.endswith("easy")
    guide = Grouped(own.model) if easy else AutoDiagonalNormal(own.model, init_loc_fn=init_to_feasible)
    return Pair(own.model, guide, (x,))


def schools(data):
    y, sigma = data[:, 0], data[:, 1]
    with pyro.plate("data", len(data)):
        eta = pyro.sample("eta", dist.Normal(torch.zeros(len(data)), torch.ones(len(data))))
        mu = pyro.sample("mu", dist.Normal(torch.zeros(1), 10 * torch.ones(1)))
        tau = pyro.sample("tau", dist.HalfCauchy(scale=25 * torch.ones(1)))
        pyro.sample("obs", dist.Normal(mu + tau * eta, sigma), obs=y)


def schools_guide(data):
    q = {
        name: (
            pyro.param(f"loc_{name}", lambda n=n: torch.randn(n)),
            positive(f"scale_{name}", lambda n=n: 0.1 * torch.rand(n)),
        )
        for name, n in (("eta", len(data)), ("mu", 1), ("logtau", 1))
    }
    with pyro.plate("data", len(data)):
        pyro.sample("eta", dist.Normal(*q["eta"]))
        pyro.sample("mu", dist.Normal(*q["mu"]))
        pyro.sample("tau", dist.TransformedDistribution(dist.Normal(*q["logtau"]), dist.transforms.ExpTransform()))


@program()
def eight_schools():
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    return Pair(schools, schools_guide, (torch.stack([y, sigma], 1),))


# --- growth, boosting -------------------------------------------------------------------------------------------------


def growth(kind, counts):
    """The shares of lineages grow as a softmax of lines."""
    time = counts.shape[0]
    lineages = pyro.plate("lineages", counts.shape[-1], dim=-1)
    weeks = torch.arange(float(time)) / 5.5
    if kind == "basic":
        with lineages:
            rate, init = (pyro.sample(name, dist.Normal(0, 1)) for name in ("rate", "init"))
        logits = init + rate * weeks[:, None]
        with pyro.plate("time", time, dim=-2):
            probs = torch.softmax(logits, -1).unsqueeze(-2)
            pyro.sample("obs", dist.Multinomial(probs=probs, validate_args=False), obs=counts.unsqueeze(-2))
        return
    regions = pyro.plate("region", counts.shape[1], dim=-2)
    rate_scale = pyro.sample("rate_scale", dist.LogNormal(-4, 2))
    init_scale = pyro.sample("init_scale", dist.LogNormal(0, 2))
    with lineages:
        rate_loc = pyro.sample("rate_loc", dist.Normal(0, 1))
    with regions, lineages:
        rate = pyro.sample("rate", dist.Normal(rate_loc, rate_scale))
        init = pyro.sample("init", dist.Normal(0, init_scale))
    logits = init + rate * weeks[:, None, None]
    with pyro.plate("time", time, dim=-3), regions:
        pyro.sample("obs", dist.Multinomial(logits=logits.unsqueeze(-2), validate_args=False), obs=counts.unsqueeze(-2))


@program("logistic_growth", "logistic_growth_regional")
def logistic_growth(name):
    kind = "basic" if name == "logistic_growth" else "regional"
    counts = dist.Poisson(5.0).sample((4, 2) if kind == "basic" else (4, 3, 2))
    model = partial(growth, kind)
    return Pair(model, AutoNormal(model, init_scale=0.01), (counts,), lr=0.01)


def squared(data):
    z = pyro.sample("z", dist.Normal(torch.tensor([0.0]), torch.tensor([5.0])))
    with pyro.plate("data", len(data)):
        pyro.sample("x", dist.Normal(z * z, torch.tensor([0.1])), obs=data)


def component(index, data):
    scale = positive(f"scale_{index}", torch.tensor([0.5]))  # at 1 the loss is almost flat
    pyro.sample("z", dist.Normal(pyro.param(f"loc_{index}", torch.tensor([0.5 * index + 0.5])), scale))


def boosted(data):
    """A mixture of components, of which the last is new: which one it was is noise of the guide."""
    which = pyro.sample("assignment", dist.Categorical(torch.tensor([0.6, 0.4])), infer={"is_auxiliary": True})
    component(int(which), data)


@program("boosting_component", "boosting_mixture")
def boosting(name):
    data = 4 + 0.1 * torch.randn(5)
    if name == "boosting_component":
        return Pair(squared, partial(component, 2), (data,))

    class Theirs(Trace_ELBO):
        """Which component it was is no part of log q: given it, the weight is right."""

        def _get_trace(self, model, guide, args, kwargs):
            run, drawn = super()._get_trace(model, guide, args, kwargs)
            drawn.remove_node("assignment")
            return run, drawn

    return Pair(squared, boosted, (data,), Theirs)
