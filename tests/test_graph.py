"""Graphs of tensor operations: what they compute, where their noise comes from, and what cannot become one."""

import _ctypes
import os
import random
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pyrovae.compile import inductor
from pyrovae.compile.graph import Composed, capture
from pyrovae.compile.inductor import channels_last
from pyrovae.compile.libraries import found_quickly, is_whole
from pyrovae.compile.noise import CannotCompile, rewritten
from pyrovae.engine.randomness import isolated_rng, replayed_rng, rng_state
from tests.state import counting, double_precision

X = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).view(4, 3)


@pytest.fixture(autouse=True)
def clean_state():
    with double_precision(7), pyro.validation_enabled(False):
        yield


@contextmanager
def generators_as_they_were():
    """Torch's, Python's and numpy's."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    yield
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()


def pair(seed, eager, captured):
    """What the eager and the captured function give from the same state of the generator, and where they leave it."""
    results = []
    for run in (eager, captured):
        with isolated_rng(seed):
            results.append((list(run()), torch.get_rng_state()))
    return results


def assert_equal_on_the_same_noise(function, inputs):
    """Bit for bit, on several seeds, and the generator goes on from the same state."""
    graph = capture(function, inputs)
    for seed in (0, 1):
        with rewritten():
            (expected, after), _ = pair(seed, function, list)
        _, (got, then) = pair(seed, list, lambda: graph(*inputs))
        assert len(got) == len(expected)
        for e, g in zip(expected, got, strict=True):
            assert e.dtype == g.dtype
            assert torch.equal(e, g)
        assert torch.equal(after, then)
    return graph


# --- what a graph computes -------------------------------------------------------------------------------------------


def test_loss_and_gradients_are_those_of_the_eager_function_on_the_same_noise():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 1)), X.clone()
    parameters = list(net.parameters())

    def function():
        loss = (net(x) + torch.randn(4, 1)).square().mean()
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    graph = assert_equal_on_the_same_noise(function, [*parameters, x])
    assert not any(t.requires_grad for t in graph(*parameters, x))


def test_inputs_are_what_is_passed_and_not_what_was_captured():
    x = X.clone()
    graph = capture(lambda: [x.exp().sum(0)], [x])
    assert torch.equal(graph(x + 1)[0], (x + 1).exp().sum(0))


def test_capturing_leaves_every_generator_as_it_was():
    x = X.clone()
    with generators_as_they_were():
        capture(lambda: [x + torch.randn_like(x) + F.dropout(x)], [x])


def test_a_call_draws_new_noise_and_goes_on_with_the_generator():
    x = X.clone()
    graph = capture(lambda: [torch.randn_like(x)], [x])
    torch.manual_seed(3)
    first, second = graph(x)[0], graph(x)[0]
    torch.manual_seed(3)
    assert torch.equal(torch.stack([first, second]), torch.stack([torch.randn(4, 3), torch.randn(4, 3)]))


def test_in_place_changes_of_inputs_are_part_of_the_graph():
    total, count, x = torch.zeros(3), torch.zeros((), dtype=torch.long), X.clone()

    def function():
        total.add_(x.sum(0))
        count.add_(1)
        return [total * 2]

    graph = capture(function, [total, count, x])
    total.zero_()
    count.zero_()
    for calls in (1, 2, 3):
        assert torch.equal(graph(total, count, x)[0], calls * 2 * x.sum(0))
        assert count.item() == calls
    torch.testing.assert_close(total, 3 * x.sum(0))


def test_batchnorm_moves_its_buffers_as_eagerly():
    norm, x = nn.BatchNorm1d(3), X.clone()
    start = {k: v.clone() for k, v in norm.state_dict().items()}
    expected = norm(x).detach()
    moved = {k: v.clone() for k, v in norm.state_dict().items()}
    state = list(norm.state_dict(keep_vars=True).values())
    graph = capture(lambda: [norm(x).detach()], [*state, x])
    norm.load_state_dict(start)
    assert torch.equal(graph(*state, x)[0], expected)
    assert all(torch.equal(v, moved[k]) for k, v in norm.state_dict().items())


def test_tensors_closed_over_are_read_as_they_are_at_every_call():
    x, weight, mask = X.clone(), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, False, True])
    graph = capture(lambda: [torch.where(mask, x * weight, 0.0).sum(0)], [x])
    assert {id(t) for t in graph.constants} == {id(weight), id(mask)}
    before = graph(x)[0]
    weight.mul_(10)
    torch.testing.assert_close(graph(x)[0], before * 10)
    mask.fill_(False)
    assert torch.equal(graph(x)[0], torch.zeros(3))


def test_constants_made_inside_are_made_anew():
    x = X.clone()
    graph = capture(lambda: [x * torch.tensor([1.0, 2.0, 3.0]) + torch.arange(3)], [x])
    for _ in range(2):
        assert torch.equal(graph(x)[0], x * torch.tensor([1.0, 2.0, 3.0]) + torch.arange(3))


def test_a_tensor_given_twice_is_refused():
    with pytest.raises(CannotCompile, match="given twice"):
        capture(lambda: [X + X], [X, X])


# --- noise -----------------------------------------------------------------------------------------------------------


def truncated_normal(p):
    """Above -1, from its own inverse."""
    below = dist.Normal(p, 1.0).cdf(torch.tensor(-1.0))
    quantiles = dist.transforms.CumulativeDistributionTransform(dist.Normal(p, 1.0)).inv
    return dist.TransformedDistribution(dist.Uniform(below, 1.0, validate_args=False), [quantiles])


DISTRIBUTIONS = {
    "Normal": lambda p: dist.Normal(p, p.exp()),
    "Uniform": lambda p: dist.Uniform(p, p + 2),
    "LogNormal": lambda p: dist.LogNormal(p, 0.5),
    "Laplace": lambda p: dist.Laplace(p, 0.5),
    "Cauchy": lambda p: dist.Cauchy(p, 0.5),
    "Exponential": lambda p: dist.Exponential(p.exp()),
    "Gumbel": lambda p: dist.Gumbel(p, 1.0),
    "Logistic": lambda p: dist.Logistic(p, 1.0),
    "MultivariateNormal": lambda p: dist.MultivariateNormal(p, torch.eye(3)),
    "RelaxedBernoulli": lambda p: dist.RelaxedBernoulliStraightThrough(torch.tensor(0.7), logits=p),
    "RelaxedOneHot": lambda p: dist.RelaxedOneHotCategorical(torch.tensor(0.7), logits=p),
    "Bernoulli": lambda p: dist.Bernoulli(logits=p),
    "Categorical": lambda p: dist.Categorical(logits=p),
    "OneHotCategorical": lambda p: dist.OneHotCategorical(logits=p),
    "MixtureOfDiagNormals": lambda p: dist.MixtureOfDiagNormals(
        torch.stack([p, -p], -2), torch.ones(4, 2, 3), p[:, :2]
    ),
    "Gamma": lambda p: dist.Gamma(0.3 * p.exp(), 1.0),
    "Beta": lambda p: dist.Beta(p.exp(), 1.0),
    "Dirichlet": lambda p: dist.Dirichlet(p.exp()),
    "StudentT": lambda p: dist.StudentT(p.exp() + 1),
    "Chi2": lambda p: dist.Chi2(p.exp()),
    "InverseGamma": lambda p: dist.InverseGamma(p.exp() + 1, 1.0),
    "FisherSnedecor": lambda p: dist.FisherSnedecor(p.exp() + 1, p.exp() + 3),
    "MultivariateStudentT": lambda p: dist.MultivariateStudentT(p.exp()[:, 0] + 2, p, torch.eye(3)),
    "LKJCholesky": lambda p: dist.LKJCholesky(3, p[0].exp()),
    "Poisson": lambda p: dist.Poisson(p.exp()),
    "ZeroInflatedPoisson": lambda p: dist.ZeroInflatedPoisson(p.exp(), gate=p.sigmoid()),
    "Binomial": lambda p: dist.Binomial(5, logits=p),
    "BetaBinomial": lambda p: dist.BetaBinomial(p.exp(), p.exp(), 5),
    "NegativeBinomial": lambda p: dist.NegativeBinomial(5.0, logits=p),
    "GammaPoisson": lambda p: dist.GammaPoisson(p.exp(), p.exp()),
    "Multinomial": lambda p: dist.Multinomial(7, logits=p),
    "VonMises": lambda p: dist.VonMises(p, p.exp()),
    "MixtureSameFamily": lambda p: dist.MixtureSameFamily(dist.Categorical(logits=p), dist.Gamma(p.exp(), 1.0)),
    "MaskedMixture": lambda p: dist.MaskedMixture(p > 0, dist.Normal(p, 1.0), dist.Gamma(p.exp(), 1.0)),
    "Weibull": lambda p: dist.Weibull(p.exp(), 1.5),
    "Kumaraswamy": lambda p: dist.Kumaraswamy(p.exp(), p.exp()),
    "Pareto": lambda p: dist.Pareto(p.exp(), p.exp()),
    "HalfCauchy": lambda p: dist.HalfCauchy(p.exp()),
    "Geometric": lambda p: dist.Geometric(logits=p),
    "ContinuousBernoulli": lambda p: dist.ContinuousBernoulli(logits=p),
    "LogisticNormal": lambda p: dist.LogisticNormal(p, p.exp()),
    "ProjectedNormal": lambda p: dist.ProjectedNormal(p),
    "TruncatedNormal": truncated_normal,
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_noise_of_a_distribution_is_an_input_drawn_as_the_program_draws_it(name):
    p = X.clone().requires_grad_()

    def function():
        d = DISTRIBUTIONS[name](p)
        d = d.expand((2, *d.batch_shape))  # two particles
        z = d()
        loss = (z * torch.arange(1.0, 1.0 + z.shape[-1])).sum() + d.log_prob(z.detach()).sum()
        return [z.detach(), *torch.autograd.grad(loss, [p])]

    graph = assert_equal_on_the_same_noise(function, [p])
    targets = [str(node.target) for node in graph.module.graph.nodes]
    assert not any(word in target for word in ("rand", "bernoulli", "exponential", "normal_") for target in targets)
    assert not torch.equal(graph(p)[0], graph(p)[0])


PLAIN = {
    "randn": lambda p: p + torch.randn(4, 3),
    "rand_like": lambda p: p * torch.rand_like(p),
    "randn_like of a transpose": lambda p: p.T + torch.randn_like(p.T),
    "normal": lambda p: torch.normal(p, p.exp()),
    "normal, fixed mean": lambda p: torch.normal(0.5, p.exp()),
    "normal, fixed deviation": lambda p: torch.normal(p, 2.0),
    "bernoulli": lambda p: torch.bernoulli(p.sigmoid()),
    "bernoulli of integers": lambda p: torch.bernoulli(torch.zeros(5), 0.4) + p.sum(),
    "multinomial": lambda p: torch.multinomial(p.softmax(-1), 1) + p,
    "dropout": lambda p: F.dropout(p, 0.3),
    "alpha dropout": lambda p: F.alpha_dropout(p, 0.3, training=True),
    "feature dropout": lambda p: F.dropout1d(p, 0.3),
    "gumbel softmax": lambda p: F.gumbel_softmax(p, hard=True),
    "uniform in place": lambda p: p + torch.empty(3).uniform_(-2, 5),
    "exponential in place": lambda p: p + torch.empty(3).exponential_(2.0),
    "one number in place": lambda p: p + torch.empty(()).normal_() * torch.empty(1).uniform_(-2, 5),
    "order": lambda p: p[torch.randperm(4)],
    "integers": lambda p: p * torch.randint(2, 9, (3,)),
}


@pytest.mark.parametrize("name", PLAIN)
def test_the_noise_of_an_operation_is_an_input_drawn_as_the_program_draws_it(name):
    p = X.clone()
    graph = assert_equal_on_the_same_noise(lambda: [PLAIN[name](p)], [p])
    assert any(not torch.equal(graph(p)[0], graph(p)[0]) for _ in range(9))


UNREWRITTEN = ["Normal", "Uniform", "Laplace", "Exponential", "Gumbel", "RelaxedBernoulli"]


@pytest.mark.parametrize("name", UNREWRITTEN)
def test_draws_that_are_not_rewritten_are_those_of_the_program_itself(name):
    p = X.clone()

    def function():
        return [DISTRIBUTIONS[name](p).rsample()]

    graph = capture(function, [p])
    (expected, after), (got, then) = pair(5, function, lambda: graph(p))
    assert torch.equal(expected[0], got[0])
    assert torch.equal(after, then)


def test_noise_that_depends_on_parameters_is_refused_by_name():
    """Of an operation that has no form as a function of a seed."""
    p = X.clone()
    with pytest.raises(CannotCompile, match=r'".*" draws from a distribution whose noise depends on its parameters'):
        capture(lambda: [p + torch.empty(4, 3).bernoulli_(p.sigmoid())], [p])


def moments(make, square):
    """The mean of x, and derivatives of the mean of x or x^2, drawn through a graph and exact, with standard errors."""
    p = torch.linspace(-0.5, 1.0, 3).expand(20000, 3).clone().requires_grad_()

    def function():
        x = make(p).rsample()
        return [x.detach(), *torch.autograd.grad((x**2 if square else x).sum(), [p])]

    x, slopes = capture(function, [p])(p)
    one = p[0].detach().requires_grad_()
    fn = make(one)
    mean = fn.mean
    (slope,) = torch.autograd.grad((fn.variance + mean**2 if square else mean).sum(), [one])
    return [(found.mean(0), found.std(0) / 20000**0.5, e.detach()) for found, e in ((x, mean), (slopes, slope))]


PATHWISE = {
    "Gamma": (lambda p: dist.Gamma(p.exp(), 2.0), True),
    "Beta": (lambda p: dist.Beta(p.exp(), 1.5), True),
    "Dirichlet": (lambda p: dist.Dirichlet(p.exp()), False),
    "StudentT": (lambda p: dist.StudentT(8 + p.exp(), p, p.exp()), True),
    "InverseGamma": (lambda p: dist.InverseGamma(6 + p.exp(), 1.0), False),
}


@pytest.mark.parametrize("name", PATHWISE)
def test_derivatives_of_seeded_draws_are_those_of_the_moments(name):
    """12 figures at |z| < 6: false alarm below 1e-7."""
    for found, error, expected in moments(*PATHWISE[name]):
        assert ((found - expected).abs() < 6 * error + 1e-12).all()


SEEDED = {
    "Poisson": lambda p: dist.Poisson(p.exp()),
    "Binomial": lambda p: dist.Binomial(5, logits=p),
    "NegativeBinomial": lambda p: dist.NegativeBinomial(5.0, logits=p),
    "Multinomial": lambda p: dist.Multinomial(7, logits=p),
}


@pytest.mark.parametrize("name", SEEDED)
def test_seeded_draws_have_the_law_of_the_program(name):
    """Means and variances of 20,000 draws, |z| < 6, with fourth moments as they are found."""
    p = torch.linspace(-0.5, 1.0, 3)
    draws = capture(lambda: [SEEDED[name](p).expand([20000] + [3] * (name != "Multinomial")).sample()], [p])(p)[0]
    fn = SEEDED[name](p)
    squares = (draws - fn.mean) ** 2
    assert ((draws.mean(0) - fn.mean).abs() < 6 * (fn.variance / 20000).sqrt()).all()
    assert ((squares.mean(0) - fn.variance).abs() < 6 * squares.std(0) / 20000**0.5).all()


def test_angles_have_the_law_of_the_program():
    """The mean of cos(x - loc) is 1 minus the circular variance."""
    p = torch.linspace(-2.0, 2.0, 5)
    draws = capture(lambda: [dist.VonMises(p, p.exp()).expand([20000, 5]).sample()], [p])(p)[0]
    assert (draws.abs() <= torch.pi).all()
    for found, expected in (
        ((draws - p).cos(), 1 - dist.VonMises(p, p.exp()).variance), ((draws - p).sin(), torch.zeros(5))
    ):  # fmt: skip
        assert ((found.mean(0) - expected).abs() < 6 * found.std(0) / 20000**0.5).all()


def test_copies_of_seeded_draws_are_on_noise_of_their_own():
    p = X.clone()
    graph = capture(lambda: [dist.Gamma(p.exp(), 1.0).sample(), dist.VonMises(p, p.exp()).sample()], [p])
    stack = torch.stack([p, p + 1, p])
    torch.manual_seed(2)
    expected = [graph(row) for row in stack]
    torch.manual_seed(2)
    got = graph.batched(3, [True])(stack)
    for r in range(3):
        torch.testing.assert_close([g[r] for g in got], expected[r])
    assert not torch.equal(got[0][0], got[0][2])


# A mean of N draws of variance v has standard error sqrt(v / N); 60 comparisons at |z| < 6: false alarm below 2e-7.
P = torch.tensor([0.02, 0.3, 0.5, 0.95])
LAWS = {
    "bernoulli": (lambda: [torch.bernoulli(P.expand(20000, 4))], P),
    "dropout": (lambda: [F.dropout(torch.ones(20000, 4), 0.2) * 0.8], torch.full((4,), 0.8)),
    "categorical": (lambda: [dist.Categorical(P).expand([20000]).sample()[:, None] == torch.arange(4)], P / P.sum()),
    "one-hot": (lambda: [dist.OneHotCategorical(P).expand([20000]).sample()], P / P.sum()),
}


@pytest.mark.parametrize("name", LAWS)
def test_rewritten_draws_have_the_law_of_the_program(name):
    function, mean = LAWS[name]
    graph, unused = capture(function, [X]), X
    with rewritten():
        eager = function()[0].double()
    for draws in (graph(unused)[0].double(), eager):
        assert ((draws == 0) | (draws - 1).abs().lt(1e-12)).all()
        z = (draws.mean(0) - mean) / (mean * (1 - mean) / 20000).sqrt()
        assert z.abs().max() < 6
        covariance = torch.cov(draws.T)
        expected = torch.diag(mean) - torch.outer(mean, mean) if "cat" in name or "hot" in name else None
        if expected is not None:
            assert (covariance - expected).abs().max() < 6 * 0.5 / 20000**0.5
        lag = ((draws[1:] - mean) * (draws[:-1] - mean)).mean(0) / (mean * (1 - mean))
        assert lag.abs().max() < 6 / 20000**0.5  # one draw knows nothing of the next


def test_a_draw_that_is_replayed_is_the_same_noise():
    x = X.clone()

    def function():
        state = rng_state()
        first = F.dropout(x, 0.5)
        between = torch.randn(3)
        with replayed_rng(*state):
            again = F.dropout(x, 0.5)
        return [first, again, between, torch.randn(3)]

    graph = assert_equal_on_the_same_noise(function, [x])
    first, again, between, after = graph(x)
    assert torch.equal(first, again)
    assert not torch.equal(between, after)
    assert len(graph.noise()) == 3


def test_a_replay_that_draws_something_else_is_not_the_same_noise():
    x = X.clone()

    def function():
        state = rng_state()
        first = torch.empty(50).uniform_(0.0, 1.0)
        with replayed_rng(*state):
            again = torch.empty(50).uniform_(5.0, 6.0)
        return [first, again]

    first, again = capture(function, [x])(x)
    assert ((first >= 0) & (first <= 1)).all()
    assert ((again >= 5) & (again <= 6)).all()


# --- what cannot become a graph --------------------------------------------------------------------------------------


class Counter:
    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return x * self.calls


def remembering():
    memory = []

    def function(x):
        memory.append(torch.randn(3))
        return x * memory[0] if len(memory) == 1 else x * memory[-2]

    return function


def seen_through(x):
    mask = torch.ones(len(x))
    mask.view(-1)[:2].copy_(x[:2, 0])
    return mask


HOST = r"reads a tensor's value on the host"
REFUSED = {
    "item": (lambda x: x * x.sum().item(), HOST),
    "float": (lambda x: x * float(x.sum()), HOST),
    "if": (lambda x: x if x.sum() > 0 else -x, HOST),
    "bool": (lambda x: x * bool((x > 0).all()), HOST),
    "int as a size": (lambda x: x.new_zeros(int(x.abs().max())), HOST),
    "item of a scalar closed over": (lambda x: x * CONSTANT.item(), HOST),  # or it would stay as it was
    "item of noise": (lambda x: x * torch.randn(()).item(), HOST),
    "if of noise": (lambda x: x if torch.rand(()) > 0.5 else -x, HOST),
    "numpy": (lambda x: x * torch.from_numpy(x.detach().numpy() ** 2), HOST),
    "asarray": (lambda x: x * torch.as_tensor(np.asarray(x.detach())), HOST),
    "tolist": (lambda x: x * x.sum(0).tolist()[0], HOST),
    "tolist of integers": (lambda x: torch.cat(x.split((x > 0).sum(-1).clamp(1, 1).tolist())), HOST),
    "equal": (lambda x: x * torch.equal(x, 2 * x), HOST),
    "allclose": (lambda x: x * torch.allclose(x, 2 * x), HOST),
    "mask": (lambda x: x[x > 0].sum(), "shape that depends on values"),
    "mask of rows": (lambda x: x[x.sum(-1) > 0].sum(), "shape that depends on values"),
    "a mask that is changed": (
        lambda x: x[torch.ones(len(x)).copy_(x[:, 0]) > 0].sum(),
        "shape that depends on values",
    ),
    "a mask through a view": (lambda x: x[seen_through(x) > 0].sum(), "shape that depends on values"),
    "masked_select": (lambda x: x.masked_select(x > 0).sum(), "shape that depends on values"),
    "nonzero": (lambda x: x.nonzero().sum(), "shape that depends on values"),
    "where": (lambda x: torch.where(x > 0)[0].sum(), "shape that depends on values"),
    "unique": (lambda x: x.unique().sum(), "shape that depends on values"),
    "numpy's generator": (lambda x: x * float(np.random.rand()), "Python's or numpy's generator"),
    "Python's generator": (lambda x: x * random.random(), "Python's or numpy's generator"),
    "a counter": (Counter(), "something else at every call"),
    "a memory": (remembering(), "something else at every call"),
    "an error": (lambda x: x @ x, "RuntimeError: .*mat1 and mat2 shapes cannot be multiplied"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_static_graph_would_freeze_is_refused_with_the_reason(what):
    program, reason = REFUSED[what]
    x = X.clone()
    with generators_as_they_were(), pytest.raises(CannotCompile, match=reason) as caught:
        capture(lambda: [program(x)], [x])
    assert "\n" not in str(caught.value)


ALLOWED = {
    "a constant's item": lambda x: x * torch.tensor(2.0).item(),
    "shapes": lambda x: x.sum(0) / x.numel() if len(x) > 3 else x.sum(0),
    "integer indices": lambda x: x[torch.tensor([0, 2])].sum(0),
    "indices from values": lambda x: x[x.argmax(0)],
    "a mask of its own": lambda x: x[:, torch.arange(x.shape[1]) > 0].sum(0),
    "a triangle": lambda x: torch.distributions.CorrCholeskyTransform().inv(
        torch.distributions.CorrCholeskyTransform()(0.1 * x.flatten()[:3])
    ),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "a distribution that validates": lambda x: dist.Normal(x.mean(0), 1.0, validate_args=True).log_prob(x).sum(0),
    "a loop": lambda x: sum(row * i for i, row in enumerate(x)),
    "a view": lambda x: x.detach().view(-1)[:2],
}


@pytest.mark.parametrize("what", ALLOWED)
def test_what_looks_like_it_but_is_static_is_captured(what):
    x = X.clone()
    assert_equal_on_the_same_noise(lambda: [ALLOWED[what](x)], [x])


# --- compilation and batching ----------------------------------------------------------------------------------------


@pytest.fixture
def compilations(monkeypatch):
    """The graphs that were handed to Inductor, which is replaced by the graph itself."""
    return counting(monkeypatch, lambda module: module)


def scaled(factor, x, weight):
    return capture(lambda: [x * factor * weight + torch.randn(3)], [x])


def test_equal_graphs_share_one_compilation_and_keep_their_own_constants(compilations):
    x, y = X.clone(), X.clone() + 1
    first, second = scaled(2.0, x, torch.tensor(3.0)), scaled(2.0, y, torch.tensor(5.0))
    assert first.key == second.key
    results = []
    for graph in (first, second):
        torch.manual_seed(0)
        results.append(graph.compiled()(X)[0])
    assert len(compilations) == 1
    torch.testing.assert_close(results[1] - results[0], X * 2 * (5 - 3))


OTHERS = {
    "number": lambda x: scaled(3.0, x, torch.tensor(3.0)),
    "shape": lambda x: scaled(2.0, x[:2].clone(), torch.tensor(3.0)),
    "dtype": lambda x: scaled(2.0, x.float(), torch.tensor(3.0)),
    "stride": lambda x: scaled(2.0, x.T.contiguous().T, torch.tensor(3.0)),
    "constant's shape": lambda x: scaled(2.0, x, torch.tensor([3.0])),
    "noise": lambda x: capture(lambda: [x * 2.0 * CONSTANT + torch.empty(3).normal_(1.0, 2.0)], [x]),
}
CONSTANT = torch.tensor(3.0, dtype=torch.float64)


@pytest.mark.parametrize("what", OTHERS)
def test_graphs_that_differ_do_not_share(what, compilations):
    x = X.clone()
    first, second = scaled(2.0, x, torch.tensor(3.0)), OTHERS[what](x)
    assert first.key != second.key
    first.compiled(), second.compiled()
    assert len(compilations) == 2


def test_compilations_are_kept_up_to_a_number(compilations, monkeypatch):
    monkeypatch.setattr(inductor, "REMEMBERED", 2)
    x, graph = X.clone(), scaled(1.0, X, torch.tensor(1.0))
    graph.compiled()
    for factor in (2.0, 3.0):
        scaled(factor, x, torch.tensor(1.0)).compiled()
    assert len(compilations) == 3
    graph.compiled()
    assert len(compilations) == 4


def test_inductor_computes_what_the_graph_does_and_changes_buffers_in_place():
    net, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)), X.clone()
    weight, state = torch.tensor(2.0), list(net.state_dict(keep_vars=True).values())

    def function():
        loss = (net(x) * weight + dist.Bernoulli(logits=x).sample()).square().mean()
        return [loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))]

    start = {k: v.clone() for k, v in net.state_dict().items()}
    graph = capture(function, [*state, x])
    compiled = graph.compiled()
    for factor in (2.0, 5.0):
        weight.fill_(factor)
        results, buffers = [], []
        for run in (graph, compiled):
            net.load_state_dict(start)
            torch.manual_seed(1)
            results.append(run(*state, x))
            buffers.append({k: v.clone() for k, v in net.state_dict().items()})
        torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(buffers[1], buffers[0], rtol=1e-10, atol=1e-12)
        assert not torch.equal(buffers[1]["1.running_mean"], start["1.running_mean"])


def convolve_activations(hidden, weight):
    return [F.conv2d(hidden.tanh(), weight).flatten(1)]


def change_before_convolving(hidden, weight):
    hidden = F.conv2d(hidden.tanh(), weight)
    hidden.clamp_(0.0)
    return [F.conv2d(hidden, weight).flatten(1), hidden]


def change_through_views_after_convolving(hidden, weight):
    hidden = F.conv2d(hidden.tanh(), weight)
    convolved = F.conv2d(hidden, weight)
    for values in (hidden, convolved):
        values.flatten(1).mul_(2.0)
    return [convolved + 1.0, hidden + 1.0]


@pytest.mark.parametrize(
    "function", [convolve_activations, change_before_convolving, change_through_views_after_convolving]
)
def test_convolutions_find_their_inputs_channels_last_whatever_changes_in_place(function):
    inputs = [torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3)]
    graph = capture(lambda: function(*inputs), inputs)
    nodes = channels_last(graph.module, inputs).graph.nodes
    convolved = [node.args[0] for node in nodes if node.target is torch.ops.aten.convolution.default]
    assert convolved
    assert all(node.kwargs.get("memory_format") is torch.channels_last for node in convolved)
    for expected, got in zip(function(*inputs), graph.compiled()(*inputs), strict=True):
        torch.testing.assert_close(got, expected)


def test_what_inductor_cannot_do_is_a_reason(monkeypatch):
    from torch._inductor import config

    graph = capture(lambda: [X * 2], [X])
    monkeypatch.setattr(inductor, "_compiled", type(inductor._compiled)())
    without = {"cpp.cxx": (None, "/nowhere/g++"), "force_disable_caches": True}
    reason = r"no working C\+\+ compiler: install g\+\+ or clang, or set CXX"
    with config.patch(without), pytest.raises(CannotCompile, match=reason):
        graph.compiled()
    for name in ("compile", "standalone_compile"):
        monkeypatch.setattr(torch._inductor, name, lambda *args, **options: [][0])
    with pytest.raises(CannotCompile, match=r"Inductor failed with .*IndexError"):
        graph.compiled()


@pytest.mark.parametrize("where", ["their cache", "another cache", "a file for each kernel"])
def test_a_graph_is_compiled_where_the_cache_serves_nothing(where, monkeypatch):
    """A cache that is damaged, read-only or of another version is left aside, and so is one file where it cannot be."""
    tried, cache = [], os.environ.get("TORCHINDUCTOR_CACHE_DIR")

    def compiler(module, example, **options):
        tried.append("a file for each kernel" if not config.cpp_wrapper else where)
        aside = os.environ.get("TORCHINDUCTOR_CACHE_DIR") != cache
        if aside < (where != "their cache") or config.cpp_wrapper > (where != "a file for each kernel"):
            raise OSError("read-only")
        return module

    from torch._inductor import config

    monkeypatch.setattr(inductor, "_compiled", type(inductor._compiled)())
    monkeypatch.setattr(torch._inductor, "standalone_compile", compiler)
    assert capture(lambda: [X * 2], [X]).compiled()(X)[0].equal(X * 2)
    assert len(tried) == {"their cache": 1, "another cache": 2, "a file for each kernel": 4}[where]
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == cache


def test_no_library_is_loaded_that_is_half_written(tmp_path):
    """One that ends early kills the process that loads it."""
    whole = Path(_ctypes.__file__)
    content = whole.read_bytes()
    assert is_whole(whole)
    library = tmp_path / "library.so"
    for held in (content[:-1], content[: len(content) // 2], content[:-64] + bytes(64), content[:64]):
        library.write_bytes(held)
        assert not is_whole(library)
    from torch._inductor.codecache import CppCodeCache

    with found_quickly(), pytest.raises(OSError, match="half-written"):
        CppCodeCache._load_library(str(library), "key")


def test_attention_is_looked_for_where_there_is_a_softmax(monkeypatch):
    """Its forms are traced for no other graph."""
    from torch._inductor.fx_passes import joint_graph
    from torch._inductor.utils import fresh_cache

    seen = []
    monkeypatch.setattr(inductor, "_compiled", type(inductor._compiled)())
    monkeypatch.setattr(joint_graph, "lazy_init", lambda *of: seen.append(of))
    with fresh_cache():  # a graph that is found was looked through before
        for run, times in ((lambda: [X.exp() / 7], 0), (lambda: [X.softmax(-1) / 7], 1)):
            torch.testing.assert_close(capture(run, [X]).compiled()(X), run())
            assert len(seen) == times


def test_a_batched_graph_is_a_loop_over_copies_each_on_its_own_noise():
    net, x, weight = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)), X.clone(), torch.tensor(2.0)
    state = list(net.state_dict(keep_vars=True).values())

    def function():
        loss = (net(x) * weight + dist.Categorical(logits=x).sample()[:, None]).square().mean()
        return [loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))]

    graph = capture(function, [*state, x])
    batched = graph.batched(3, [True] * len(state) + [False])
    copies = [[t.detach() + 0.1 * r if t.is_floating_point() else t + r for t in state] for r in range(3)]
    stacks = [torch.stack(same) for same in zip(*copies, strict=True)]
    torch.manual_seed(2)
    expected = [graph(*copy, x) for copy in copies]
    torch.manual_seed(2)
    got = batched(*stacks, x)
    for r in range(3):
        torch.testing.assert_close([g[r] for g in got], expected[r], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close([s[r] for s in stacks], copies[r], rtol=1e-10, atol=1e-12)  # buffers moved as well
    assert not torch.equal(got[0][0], got[0][1])
    torch.testing.assert_close(stacks[4], torch.stack([c[4] for c in copies]))


def test_a_pyro_program_is_captured_with_its_handlers():
    x = X.clone()
    loc = torch.zeros(3, requires_grad=True)

    def model(x):
        with pyro.plate("data", 8, subsample=x), pyro.poutine.scale(scale=0.5):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def function():
        trace = pyro.poutine.trace(model).get_trace(x)
        loss = trace.log_prob_sum()
        return [loss.detach(), *torch.autograd.grad(loss, [loc])]

    assert_equal_on_the_same_noise(function, [loc, x])


class Seeing(TorchDispatchMode):
    """Notes whether cuDNN is on, at each operation."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(torch.backends.cudnn.enabled)
        return func(*args, **(kwargs or {}))


RECURRENT = {kind.__name__: kind(3, 2).double() for kind in (nn.LSTM, nn.GRU, nn.RNN)}
RECURRENT["relu"] = nn.RNN(3, 2, nonlinearity="relu").double()


@pytest.mark.parametrize("name", [*RECURRENT, "linear"])
def test_recurrent_layers_are_composed_where_a_function_is_captured(name, monkeypatch):
    """Without cuDNN, that is, whose operations count as random; nothing else is without it. Its flags may be frozen."""
    monkeypatch.setattr(torch.backends.cudnn, "enabled", True)
    flags, allowed = torch.backends.flags_frozen.__globals__, "__allow_nonbracketed_mutation_flag"
    with mock.patch.dict(flags, {allowed: False}), Composed(), Seeing() as seeing:
        assert torch.backends.flags_frozen()
        (RECURRENT | {"linear": nn.Linear(3, 2).double()})[name](X)
    assert (False in seeing.seen) == (name in RECURRENT)
    assert torch.backends.cudnn.enabled


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_are_captured(name):
    layer = RECURRENT[name]
    parameters = list(layer.parameters())

    def function():
        loss = layer(X)[0].square().sum()
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    got = capture(function, [*parameters, X])(*parameters, X)
    for e, g in zip(function(), got, strict=True):
        torch.testing.assert_close(g, e)
