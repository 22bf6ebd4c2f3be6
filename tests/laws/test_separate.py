"""Particles that run one after the other are what they are together, and take programs that know only one at a time."""

import math
import warnings
from functools import partial
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from pyro.poutine.messenger import Messenger

import pyrovae as pv
from tests.laws.objectives import OBJECTIVES
from tests.laws.pairs import GAUSSIAN, HIERARCHY, MIXED, MIXED_LIVE, MULTIVARIATE, NET, SUMMED
from tests.laws.programs import lp, normal
from tests.state import refused

X = torch.tensor([0.4, -0.9, 1.3], dtype=torch.float64)
APART = {"vectorize_particles": False}


class Table(Messenger):
    """Draw all latents from a table of noise, for all particles at once or for one after the other."""

    def __init__(self, together):
        super().__init__()
        self.together, self.noise, self.run = together, {}, -1

    def counted(self, guide):
        def run(*args):
            self.run += 1
            guide(*args)

        return run

    def _pyro_sample(self, msg):
        if msg["value"] is not None or type(msg["fn"]).__name__ == "_Subsample":
            return
        fn, name = msg["fn"], msg["name"]
        if self.together and fn.shape()[:1] == (4,):  # a trial with one more than the data are
            return
        if name not in self.noise:
            generator = torch.Generator().manual_seed(len(self.noise))
            shape = fn.shape() if self.together else (3, *fn.shape())
            self.noise[name] = torch.rand(shape, generator=generator)
        u = self.noise[name] if self.together else self.noise[name][self.run % 3]
        if fn.has_rsample:
            base = getattr(fn, "base_dist", fn)
            msg["value"] = base.loc + base.scale * torch.special.ndtri(u)
        else:
            probs = fn.probs if isinstance(fn, dist.Categorical) else torch.stack([1 - fn.probs, fn.probs], -1)
            msg["value"] = (u.unsqueeze(-1) > probs.cumsum(-1)).sum(-1).to(torch.get_default_dtype())
        msg["done"] = True


ROWS = {
    (row.make, row.gradient): row for row in OBJECTIVES if row.objective().total_particles == 3 and not row.weighted
}


@pytest.mark.parametrize("pair", [MULTIVARIATE, HIERARCHY, NET, MIXED, MIXED_LIVE, SUMMED], ids=lambda pair: pair.name)
@pytest.mark.parametrize("row", [*ROWS.values(), None], ids=lambda row: row.name if row else "free bits")
def test_one_after_the_other_is_together(row, pair):
    if row and row.gradient != "total" and not pair.reparameterised:
        return
    found = []
    for together in (True, False):
        options = {} if together else APART
        objective = row.make(**row.kwargs, **options) if row else pv.ELBO(3, free_bits=0.2, **options)
        params, table = pair.params(grad=True), Table(together)
        model, guide = pair.programs(params)
        guide = table.counted(guide)
        objective.runner(model, guide).look((pair.data,), {})
        table.run = -1
        with table:
            loss = objective.differentiable_loss(model, guide, pair.data)
        found.append((loss, torch.autograd.grad(loss, list(params.values()))))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gradient", ["total", "stl", "dreg"])
def test_deltas_of_auxiliary_draws_are_alike(gradient):
    found = []
    for options in ({}, APART):
        loc = torch.tensor(0.3, requires_grad=True)

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.LogNormal(x.new_zeros(3), 1.0))
                pyro.sample("x", normal(z), obs=x)

        def guide(x, loc=loc):
            with pyro.plate("data", len(x)):
                u = pyro.sample("u", normal(x.new_zeros(3)), infer={"is_auxiliary": True})
                pyro.sample("z", dist.Delta((loc + u).exp(), log_density=-(loc + u)))

        pyro.set_rng_seed(3)  # one draw is drawn alike
        loss = pv.IWAE(3, gradient=gradient, **options).differentiable_loss(model, guide, X)
        found.append((loss, torch.autograd.grad(loss, loc)[0]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("mask", [torch.tensor([True, False, True]), False])
def test_masks_are_those_of_each_run(mask):
    masked = [partial(poutine.mask(program, mask), GAUSSIAN.params()) for program in (GAUSSIAN.model, GAUSSIAN.guide)]
    found = []
    for options in ({}, APART):
        pyro.set_rng_seed(3)  # one latent is drawn alike
        found.append(pv.log_weights(*masked, X, num_particles=4, **options).expand(4, 3))
    torch.testing.assert_close(*found)
    assert torch.equal(found[0] == 0, torch.as_tensor(mask).logical_not().expand(4, 3))


# --- programs that know one particle only -----------------------------------------------------------------------------


def branching(x, prior=0.4):
    """c ~ Bernoulli: then x is that of a latent z, else noise; other particles have other sites."""
    c = pyro.sample("c", dist.Bernoulli(x.new_tensor(prior)))
    with pyro.plate("data", len(x)):
        if c:
            z = pyro.sample("z", normal(0.0))
            pyro.sample("x", normal(z), obs=x)
        else:
            pyro.sample("noise", normal(0.0, 0.5), obs=x)


def branching_guide(x, q=0.7):
    c = pyro.sample("c", dist.Bernoulli(torch.as_tensor(q)))
    with pyro.plate("data", len(x)):
        if c.item():
            pyro.sample("z", normal(x / 2, 0.5**0.5))  # the posterior given c


def log_joint():
    """log p(x, c) of c = 0 and 1, z integrated out."""
    each = [lp(normal(0.0, 0.5), X).sum() + math.log(0.6), lp(normal(0.0, 2**0.5), X).sum() + math.log(0.4)]
    return torch.stack(each)


def log_q(q):
    return torch.stack([torch.log1p(-q), q.log()])


def test_control_flow_has_true_weights_and_is_told_once():
    log_ratio = log_joint() - log_q(torch.tensor(0.7))
    objective = pv.IWAE(4)
    with pytest.warns(UserWarning, match=r"one after the other.*RuntimeError.*vectorize_particles=False") as told:
        losses = [objective.loss(branching, branching_guide, X) for _ in range(3)]
    assert len(told) == 1
    assert told[0].filename == __file__
    assert all(math.isfinite(loss) for loss in losses)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_w = pv.log_weights(branching, branching_guide, X, num_particles=6, **APART)
        estimate = pv.log_likelihood(branching, branching_guide, X, num_samples=60, seed=0, **APART)
    assert all(v in [pytest.approx(r) for r in log_ratio.tolist()] for v in log_w.tolist())
    exact = log_joint().logsumexp(0)
    assert abs(estimate.log_prob - exact) < 5 * estimate.std_error
    kept = partial(pv.log_likelihood, num_samples=8, seed=0, num_draws=3, **APART)
    refused(ValueError, 'num_draws.*"z"', kept, branching, branching_guide, X)


class Given(Messenger):
    """The states of c, run by run."""

    def __init__(self, states):
        super().__init__()
        self.states = list(states)

    def _pyro_sample(self, msg):
        if msg["name"] == "c" and msg["value"] is None and self.states:
            msg["value"], msg["done"] = torch.tensor(float(self.states.pop(0))), True


@pytest.mark.parametrize("make", [pv.ELBO, pv.IWAE])
def test_the_gradient_of_control_flow_is_that_of_its_mean(make):
    objective = make(2, **APART)
    q = torch.tensor(0.7, requires_grad=True)
    guide = partial(branching_guide, q=q)
    objective.runner(branching, guide).look((X,), {})
    bound, found = 0.0, 0.0
    for states in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        mass = log_q(q)[list(states)].sum().exp()
        with Given(states):
            loss = objective.differentiable_loss(branching, guide, X)
        log_w = (log_joint() - log_q(q))[list(states)]
        bound = bound + mass * objective.bound(log_w)
        assert loss.item() == pytest.approx(-objective.bound(log_w).item())
        found = found - mass.detach() * torch.autograd.grad(loss, q)[0]
    torch.testing.assert_close(found, torch.autograd.grad(bound, q)[0])


class Bayesian(PyroModule):
    """Linear regression whose weights are random: y ~ N(x w, 1), w ~ N(0, 1)."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](2, 1, bias=False)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.offset = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, y):
        mean = self.linear(x).squeeze(-1) + self.offset
        with pyro.plate("data", len(x)):
            pyro.sample("y", normal(mean), obs=y)


def weight_guide(x, y):
    """The posterior of the weights."""
    precision = torch.eye(2) + x.T @ x
    mean = torch.linalg.solve(precision, x.T @ y)
    w = pyro.sample("w", dist.MultivariateNormal(mean, precision_matrix=precision), infer={"is_auxiliary": True})
    pyro.sample("linear.weight", dist.Delta(w.unsqueeze(-2), event_dim=2))


def test_networks_of_random_weights_take_particles():
    x, y = torch.randn(5, 2), torch.randn(5)
    exact = dist.MultivariateNormal(torch.zeros(5), torch.eye(5) + x @ x.T).log_prob(y)
    model = Bayesian()
    with pytest.warns(UserWarning, match="one after the other"):
        log_w = pv.log_weights(model, weight_guide, x, y, num_particles=3)
    torch.testing.assert_close(log_w, exact.expand(3))
    for gradient in ("total", "stl", "dreg"):
        loss = pv.IWAE(3, gradient=gradient, **APART).differentiable_loss(model, weight_guide, x, y)
        assert loss.item() == pytest.approx(-exact.item())
        (slope,) = torch.autograd.grad(loss, model.offset)
        assert slope.isfinite()
    estimate = pv.log_likelihood(model, weight_guide, x, y, num_samples=10, seed=0, num_draws=4, **APART)
    assert estimate.log_prob.item() == pytest.approx(exact.item())
    assert estimate.draws["linear.weight"].shape == (4, 1, 2)


def test_a_network_of_random_weights_is_trained_by_fit():
    x, y = torch.randn(5, 2), torch.randn(5)
    model, guide = Bayesian(), pyro.infer.autoguide.AutoNormal(Bayesian())
    guide(x, y)
    result = pv.fit(model, guide, (x, y), objective=pv.IWAE(3, **APART), epochs=3, batch_size=5, lr=0.05, compile=False)
    assert len(result.history) == 3
    assert all(math.isfinite(row["bound"]) for row in result.history)


def test_what_cannot_be_is_refused():
    def shapes(x):
        c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.5)))
        pyro.sample("z", normal(torch.zeros(1 + int(c))).to_event(1))
        pyro.sample("x", normal(0.0), obs=x[0])

    with Given((0, 0, 1, 0, 0, 1)):
        refused(ValueError, '"z" has another shape', pv.log_weights, shapes, shapes, X, num_particles=2, **APART)
    refused(ValueError, "fold_particles", pv.IWAE(2, fold_particles=True, **APART).loss, branching, branching_guide, X)

    def unmatched(x):
        pyro.sample("c", dist.Bernoulli(x.new_tensor(0.5)))

    with Given((0, 0, 1)):
        refused(ValueError, '"z" is neither', pv.log_weights, branching, unmatched, X, num_particles=2, **APART)


def test_what_failed_together_leaves_no_trace_in_the_generator():
    def model(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
            pyro.sample("x", dist.Normal(z[torch.arange(3)], 1.0), obs=x)  # of one particle only

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(x, 1.0))

    objective, losses = pv.IWAE(4), []
    for _ in range(2):
        pyro.set_rng_seed(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses.append(objective.loss(model, guide, X))
    assert losses[0] == losses[1]


def beside_plates(how, x):
    """e ~ N(0, I), c in {0, 1}, x ~ N(e_0 + e_1 c, 1); e is read as its one particle would let it be."""
    e = pyro.sample("e", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    start, step = {
        "rightly": (e[..., 0], e[..., 1]), "with a dim more": (e[..., 0:1], e[..., 1:2]),
        "flat": (e[..., 0].reshape(-1), e[..., 1].reshape(-1)),
    }[how]  # fmt: skip
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(start + step * c, 1.0), obs=x)


def beside_guide(x):
    pyro.sample("e", dist.Normal(torch.zeros(2), 1.0).to_event(1))


@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("number", [2, 3, 4])
@pytest.mark.parametrize("how", ["with a dim more", "flat"])
def test_particles_never_lie_where_data_or_values_do(how, number, summed):
    """Of three data, and of two values: where as many particles fit, nothing would fail."""
    x, found = torch.tensor([0.3, -1.0, 2.0]), []
    for way in ("rightly", how):
        model = partial(beside_plates, way)
        model = model if summed else poutine.condition(model, {"c": torch.tensor([1.0, 0.0, 1.0])})
        pyro.set_rng_seed(0)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found.append(pv.log_weights(model, beside_guide, x, num_particles=number))
        told = [str(w.message) for w in said if "one after the other" in str(w.message)]
        assert len(told) == (way != "rightly"), told
    torch.testing.assert_close(found[1], found[0])
    with pytest.warns(UserWarning, match="chains run one after the other"):
        apart = pv.ais_log_likelihood(model, x, num_chains=number, num_temperatures=2, leapfrog_steps=1, seed=0)
    assert apart.log_prob.isfinite().all()


class Gained(dist.TorchDistribution):
    """A density of the user's own, N(x; loc, 1)^gain, which is lined up rightly where its gain is one number."""

    arg_constraints: ClassVar[dict[str, object]] = {}

    def __init__(self, loc, gain, rightly):
        super().__init__(loc.shape, (2,), validate_args=False)
        self.loc, self.gain, self.rightly = loc, gain, rightly

    def log_prob(self, x):
        each = dist.Normal(self.loc.unsqueeze(-1), 1.0).log_prob(x).unsqueeze(-1)
        return (each * self.gain[(..., None, None) if self.rightly else (..., None)]).sum((-1, -2))


@pytest.mark.parametrize("number", [2, 3, 4])
def test_a_density_that_knows_no_particles_is_computed_for_one_at_a_time(number):
    """It fails, or with as many particles as data would be wrong without a word."""

    def model(x, rightly):
        e = pyro.sample("e", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", Gained(z, e, rightly), obs=x)

    def guide(x, rightly):
        pyro.sample("e", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    x = torch.tensor([[0.3, 1.0], [-1.0, 0.5], [2.0, 0.1]])
    pyro.set_rng_seed(0)
    with pytest.warns(UserWarning, match="one after the other"):
        apart = pv.log_weights(model, guide, x, False, num_particles=number)
    pyro.set_rng_seed(0)
    torch.testing.assert_close(apart, pv.log_weights(model, guide, x, True, num_particles=number, **APART))
    with pytest.warns(UserWarning, match="one after the other"):
        assert pv.log_likelihood(model, guide, x, False, num_samples=5, seed=0).log_prob.isfinite()
