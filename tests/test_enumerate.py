"""Sites that are summed out: log p against brute force, the forward algorithm, closed forms and Pyro's own sums."""

import itertools
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.ops.indexing import Vindex

import pyrovae as pv
from pyrovae.engine.kl import site_kl
from pyrovae.engine.programs import nothing
from pyrovae.engine.runner import Runner
from pyrovae.evaluate.ais import Annealer
from pyrovae.evaluate.measuring import Batches
from tests.laws.exact import expected, mean
from tests.laws.pairs import MIXTURE, NET
from tests.state import double_precision

PARALLEL = {"enumerate": "parallel"}
MARKED = partial(pyro.sample, infer=PARALLEL)
X = torch.tensor([[0.4, -1.2, 0.3, 2.0], [-0.5, 0.1, 1.4, -0.2], [1.1, 0.6, -0.9, 0.8]], dtype=torch.float64)
LENGTHS = torch.tensor([4, 2, 3])
P = {
    "init": torch.tensor([0.2, -0.4, 0.3]),
    "step": torch.tensor([[0.6, -1.0, 0.3], [-0.2, 0.5, 1.1], [0.9, 0.1, -0.7]]),
    "loc": torch.tensor([-1.0, 0.3, 1.2]),
    "pair": torch.tensor([[0.5, -1.1, 0.2], [1.3, 0.4, -0.6], [-0.3, 0.8, 1.5]]),
    "m": torch.tensor(0.4), "r": torch.tensor(-0.3),
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_double():
    with double_precision(3):
        yield


def parameters(grad=False, dtype=torch.float64):
    return {name: p.to(dtype).clone().requires_grad_(grad) for name, p in P.items()}


# --- programs: (parameters, data), all with the same parameters -------------------------------------------------------


def chain(p, x):
    """A hidden Markov model, a sequence for each datum."""
    with pyro.plate("data", len(x)):
        s = None
        for t in pyro.markov(range(x.shape[1])):
            s = MARKED(f"s{t}", dist.Categorical(logits=p["init"] if s is None else p["step"][s]))
            pyro.sample(f"x{t}", dist.Normal(p["loc"][s], 1.0), obs=x[:, t])


def shared_chain(p, x):
    """One chain for all data."""
    s = None
    for t in pyro.markov(range(x.shape[1])):
        s = MARKED(f"s{t}", dist.Categorical(logits=p["init"] if s is None else p["step"][s]))
        with pyro.plate(f"data{t}", len(x)):
            pyro.sample(f"x{t}", dist.Normal(p["loc"][s], 1.0), obs=x[:, t])


def global_and_local(p, x):
    g = MARKED("g", dist.Categorical(logits=p["init"]))
    with pyro.plate("data", len(x)):
        c = MARKED("c", dist.Categorical(logits=p["step"][g]))
        pyro.sample("x", dist.Normal(Vindex(p["pair"])[c, g], 1.0), obs=x[:, 0])


def plates_in_plates(p, x):
    """One class for all, one for each datum, one for each of its numbers."""
    g = MARKED("g", dist.Categorical(logits=p["init"]))
    with pyro.plate("data", len(x), dim=-1):
        c = MARKED("c", dist.Categorical(logits=p["step"][g]))
        with pyro.plate("numbers", x.shape[1], dim=-2):
            d = MARKED("d", dist.Categorical(logits=p["step"][c]))
            pyro.sample("x", dist.Normal(Vindex(p["pair"])[d, g], 1.0), obs=x.T)


def several(p, x):
    """Two independent classes, joined by what they make; and one that hangs on both."""
    with pyro.plate("data", len(x)):
        a, b = (MARKED(name, dist.Categorical(logits=p["init"])) for name in "ab")
        e = MARKED("e", dist.Bernoulli(logits=Vindex(p["pair"])[a, b]))
        pyro.sample("x", dist.Normal(Vindex(p["pair"])[b, a] + e, 1.0), obs=x[:, 0])


def lengths(p, x):
    """Series of several lengths, by masks."""
    with pyro.plate("data", len(x)):
        s = None
        for t in pyro.markov(range(x.shape[1])):
            with poutine.mask(mask=t < LENGTHS):
                s = MARKED(f"s{t}", dist.Categorical(logits=p["init"] if s is None else p["step"][s]))
                pyro.sample(f"x{t}", dist.Normal(p["loc"][s], 1.0), obs=x[:, t])


def capture(p, x):
    """Capture and recapture: alive or dead, seen or not; the dead are never seen."""
    with pyro.plate("data", len(x)):
        alive = torch.ones(())
        for t in pyro.markov(range(x.shape[1])):
            alive = MARKED(f"alive{t}", dist.Bernoulli(alive * p["loc"].sigmoid()[t % 3]))
            seen = dist.Bernoulli(alive * p["init"].sigmoid()[t % 3])
            pyro.sample(f"seen{t}", seen, obs=(x[:, t] > 0).to(x.dtype))


def mixture_vae(p, x):
    with pyro.plate("data", len(x)):
        c = MARKED("c", dist.Categorical(logits=p["init"]))
        z = pyro.sample("z", dist.Normal(p["loc"][c], 1.0))
        pyro.sample("x", dist.Normal(z + p["pair"][0][c], 1.0), obs=x.view(len(x), -1)[:, 0])


def experts(p, x):
    """A mixture of experts: the class hangs on the latent."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        c = MARKED("c", dist.Categorical(logits=z.unsqueeze(-1) * p["loc"]))
        pyro.sample("x", dist.Normal(p["pair"][1][c] * z, 1.0), obs=x[:, 0])


def local_guide(p, x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(p["m"] * x[:, 0], p["r"].exp()))


def locations(p, x):
    """A mixture of normals whose locations are latent, for all data."""
    loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        c = MARKED("c", dist.Categorical(logits=p["init"]))
        pyro.sample("x", dist.Normal(Vindex(loc)[..., c], 1.0), obs=x[:, 0])


def locations_guide(p, x):
    pyro.sample("loc", dist.Normal(p["m"] + p["loc"], p["r"].exp()).to_event(1))


def rows(p, x):
    """A latent for each number of a datum, which share the datum's class; and one for the datum."""
    with pyro.plate("data", len(x), dim=-1):
        c = MARKED("c", dist.Categorical(logits=p["init"]))
        u = pyro.sample("u", dist.Normal(p["loc"][c], 1.0))
        with pyro.plate("numbers", x.shape[1], dim=-2):
            z = pyro.sample("z", dist.Normal(p["loc"][c] + u, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)


def rows_guide(p, x):
    with pyro.plate("data", len(x), dim=-1):
        u = pyro.sample("u", dist.Normal(p["m"] * x.mean(1), p["r"].exp()))
        with pyro.plate("numbers", x.shape[1], dim=-2):
            pyro.sample("z", dist.Normal(p["m"] * x.T + u, p["r"].exp()))


MIXED = [(mixture_vae, local_guide), (experts, local_guide), (locations, locations_guide), (rows, rows_guide)]


# --- brute force ------------------------------------------------------------------------------------------------------


def brute(model, x):
    """log of the sum of p(x, c) over every value that the enumerated sites can have together."""
    sampled = [n for n in poutine.trace(model).get_trace(x).nodes.values() if n["type"] == "sample"]
    sites = [n for n in sampled if n["infer"].get("enumerate")]
    each = [itertools.product(n["fn"].enumerate_support(False).flatten(), repeat=n["value"].numel()) for n in sites]
    terms = []
    for values in itertools.product(*map(list, each)):
        given = {n["name"]: torch.stack(v).view(n["value"].shape) for n, v in zip(sites, values, strict=True)}
        terms.append(poutine.trace(poutine.condition(model, given)).get_trace(x).log_prob_sum())
    return torch.stack(terms).logsumexp(0)


def by_datum(model, x):
    return torch.stack([brute(model, row) for row in x.split(1)])


def of_lengths(model, x):
    """Each series alone, at its length and without masks."""
    p, *_ = model.args
    return torch.stack([brute(partial(chain, p), x[i : i + 1, :n]) for i, n in enumerate(LENGTHS)])


EXACT = [
    (chain, X, by_datum), (shared_chain, X[:, :3], brute), (global_and_local, X, brute),
    (plates_in_plates, X[:2, :2], brute), (several, X, by_datum), (lengths, X, of_lengths), (capture, X, by_datum),
]  # fmt: skip


@pytest.mark.parametrize(("model", "x", "truth"), EXACT, ids=lambda v: getattr(v, "__name__", ""))
def test_log_p_is_the_sum_over_all_values(model, x, truth):
    exact = truth(partial(model, parameters()), x)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-6)):
        torch.set_default_dtype(dtype)
        single = partial(model, parameters(dtype=dtype))
        found = pv.log_likelihood(single, nothing, x.to(dtype), num_samples=2)
        assert ((found.log_prob - exact) / exact).abs().max() < tolerance
        assert (found.std_error == 0).all()


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize(
    ("model", "guide"), [*((model, lambda p, x: None) for model, _, _ in EXACT), *MIXED],
    ids=lambda v: getattr(v, "__name__", ""),
)  # fmt: skip
def test_loss_and_gradients_are_those_of_pyros_sums(model, guide, particles):
    p, found = parameters(grad=True), []
    pyros = TraceEnum_ELBO(particles, max_plate_nesting=2, vectorize_particles=True)
    for objective in (pyros, pv.ELBO(particles)):
        pyro.set_rng_seed(5)
        loss = objective.differentiable_loss(partial(model, p), partial(guide, p), X)
        gradients = torch.autograd.grad(loss, list(p.values()), allow_unused=True, materialize_grads=True)
        found.append((loss.item(), gradients))
    torch.testing.assert_close(*found)


# --- latents besides --------------------------------------------------------------------------------------------------


def in_all(log_w):
    return log_w.reshape(len(log_w), -1).sum(1)


@pytest.mark.parametrize(("model", "guide"), MIXED, ids=lambda v: getattr(v, "__name__", ""))
def test_prior_likelihood_and_kl_are_those_of_the_sums(model, guide):
    """Of each particle, over all data, against brute force."""
    x, model, guide = X[:2, :2], partial(model, parameters()), partial(guide, parameters())
    run = Runner(model, guide)((x,), {}, 3, scaled=False)
    nodes = poutine.trace(guide).get_trace(x).nodes
    shapes = {name: nodes[name]["value"].shape for name in run.guide}
    log_priors, log_joints = [], []
    for k in range(3):
        z = {name: run.guide[name]["value"][k].view(shape) for name, shape in shapes.items()}
        given = poutine.condition(model, z)
        log_joints.append(brute(given, x))
        log_priors.append(brute(poutine.block(given, hide=["x"]), x))
    prior, joint = torch.stack(log_priors), torch.stack(log_joints)
    torch.testing.assert_close(in_all(run.log_prior()), prior)
    torch.testing.assert_close(in_all(run.log_likelihood()), joint - prior)
    if model.func not in (experts, locations):  # there p(z) has no enumerated parent, and a closed form
        kl = sum(in_all(site_kl(run, name)) for name in shapes)
        torch.testing.assert_close(kl, in_all(run.log_guide()) - prior)


def exact_mixture(p, x):
    """log p(x), and p(c | x), of the mixture of autoencoders."""
    each = dist.Normal(p["loc"] + p["pair"][0], 2**0.5).log_prob(x[:, :1]) + p["init"].log_softmax(-1)
    return each.logsumexp(-1), each.softmax(-1)


@pytest.mark.parametrize("how", [{}, {"fold_particles": True}, {"vectorize_particles": False}], ids=repr)
def test_posterior_draws_are_of_the_exact_conditional(how):
    p, number = parameters(), 200 if "vectorize_particles" in how else 1000
    options = {"num_samples": 4 * number, "chunk_size": number, "num_draws": number, "seed": 1} | how
    found = pv.log_likelihood(partial(mixture_vae, p), partial(local_guide, p), X, **options)
    log_p, posterior = exact_mixture(p, X)
    assert ((found.log_prob - log_p).abs() < 5 * found.std_error).all()
    assert found.draws["c"].shape == (number, 3)
    z, c = found.draws["z"].unsqueeze(-1), found.draws["c"].unsqueeze(-1)
    given = p["init"] + dist.Normal(p["loc"], 1.0).log_prob(z)
    given = (given + dist.Normal(z + p["pair"][0], 1.0).log_prob(X[:, :1])).softmax(-1)
    surplus = given.gather(-1, c).squeeze(-1) - given.square().sum(-1)  # 0 in the mean, if c hangs on its own z
    assert surplus.mean().abs() < 5 * surplus.std() / surplus.numel() ** 0.5
    shares = torch.stack([(found.draws["c"] == c).double().mean(0) for c in range(3)], -1)
    assert (shares - posterior).abs().max() < 5 * 0.5 * (2 / number) ** 0.5  # of draws, and of what they are drawn from


@pytest.mark.parametrize(("apart", "known"), [(9.0, 10), (0.0, 1)])
def test_a_sum_has_less_error_than_uniform_draws_where_the_class_is_known(apart, known):
    """Of C classes with posterior p(c | z), relative variances are v and (1 + v) C sum_c p(c | z)^2 - 1."""
    centres = apart * torch.arange(10.0)

    def model(x):
        with pyro.plate("data", len(x)):
            c = MARKED("c", dist.Categorical(logits=torch.zeros(10)))
            z = pyro.sample("z", dist.Normal(centres[c], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, draws=False):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.1))
            if draws:
                pyro.sample("c", dist.Categorical(logits=torch.zeros(10)))

    x = centres + 0.5
    summed, drawn = (
        pv.log_likelihood(model, g, x, num_samples=4000, seed=0) for g in (guide, partial(guide, draws=True))
    )
    v = 4000 * summed.std_error.square()
    ratio = (drawn.std_error / summed.std_error).square()
    torch.testing.assert_close(ratio, (known * (1 + v) - 1) / v, rtol=0.25, atol=0.0)
    truth = dist.Normal(centres, 2**0.5).log_prob(x.unsqueeze(-1)).logsumexp(-1) - math.log(10)
    for found in (summed, drawn):
        assert ((found.log_prob - truth).abs() < 5 * found.std_error).all()


def test_posterior_draws_of_a_chain_are_joint():
    p, number = parameters(), 4000
    draws = pv.log_likelihood(partial(chain, p), nothing, X[:, :3], num_samples=2, num_draws=number, seed=0).draws
    paths = torch.stack([draws[f"s{t}"] for t in range(3)], -1)
    for path in itertools.product(range(3), repeat=3):
        given = {f"s{t}": torch.tensor([s]) for t, s in enumerate(path)}
        for n, row in enumerate(X[:, :3].split(1)):
            log_joint = poutine.trace(poutine.condition(partial(chain, p), given)).get_trace(row).log_prob_sum()
            share = (log_joint - brute(partial(chain, p), row)).exp().item()
            seen = (paths[:, n] == torch.tensor(path)).all(-1).double().mean().item()
            assert abs(seen - share) < 5 * (share * (1 - share) / number) ** 0.5 + 1e-3


def test_posterior_draws_lie_in_their_plates():
    p = parameters()
    model, guide = partial(rows, p), partial(rows_guide, p)
    draws = pv.log_likelihood(model, guide, X, num_samples=20, num_draws=7, seed=0, batch_size=2).draws
    assert {name: d.shape[1:] for name, d in draws.items()} == {"u": (3,), "z": (3, 4), "c": (3,)}
    one = pv.log_likelihood(partial(plates_in_plates, p), nothing, X, num_samples=2, num_draws=7, seed=0).draws
    assert {name: d.shape for name, d in one.items()} == {"g": (7,), "c": (7, 3), "d": (7, 4, 3)}


def test_annealing_moves_what_is_continuous():
    p = parameters()
    found = pv.ais_log_likelihood(partial(mixture_vae, p), X, num_temperatures=20, leapfrog_steps=4, seed=0)
    assert ((found.log_prob - exact_mixture(p, X)[0]).abs() < 5 * found.std_error).all()
    bracket = pv.bdmc(partial(mixture_vae, p), 30, like=X, num_temperatures=20, leapfrog_steps=4, seed=0)
    assert abs(bracket.gap) < 0.1


def test_what_chains_leave_invariant_is_summed():
    """log p(z) and log p(x, z), where chains start and where they end, at any point."""
    p, u = parameters(), {"z": torch.randn(4, 3)}
    model, annealer = partial(mixture_vae, p), Annealer(4, 2, 1, "linear", 0.65, False)
    with Batches(model, None, (X,), {}) as data:
        batch = next(iter(data))
        annealer.prepare(model, None, data.seen, batch, {}, 3)
        start, joint, _ = annealer.ends(batch, u)
    z = u["z"].unsqueeze(-1)
    each = p["init"].log_softmax(-1) + dist.Normal(p["loc"], 1.0).log_prob(z)
    torch.testing.assert_close(start, each.logsumexp(-1))
    each = each + dist.Normal(z + p["pair"][0], 1.0).log_prob(X[:, :1])
    torch.testing.assert_close(joint, each.logsumexp(-1))


def test_what_is_logged_of_a_fit_is_of_the_sums():
    p = parameters()
    p["m"].requires_grad_()
    fitted = pv.fit(partial(mixture_vae, p), partial(local_guide, p), X.repeat(20, 1), objective=pv.ELBO(), epochs=1)
    logged = fitted.history[-1]
    assert logged["bound"] == pytest.approx(logged["reconstruction"] - logged["kl"], abs=0.5)
    assert len(logged["kl_per_unit"]["z"]) == 1


def test_no_sum_underflows():
    """Where factors of one value are all but 0 in turn, their product is not."""
    far = torch.tensor([[0.0, 2e3], [2e3, 0.0]])

    def model(x):
        with pyro.plate("data", len(x)):
            c = MARKED("c", dist.Categorical(torch.ones(2)))
            for i in range(2):
                pyro.sample(f"x{i}", dist.Normal(far[i][c], 1.0), obs=x)

    expected = math.log(0.5) + 2 * dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.0)) - 0.5 * 2e3**2
    for dtype in (torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        far = far.to(dtype)
        loss = pv.ELBO().loss(model, nothing, torch.zeros(1))
        assert -loss == pytest.approx(expected.item() + math.log(2), rel=1e-6)


def test_what_no_value_allows_has_weight_0_and_no_gradient():
    """A latent outside of every component's support, beside one that is inside of some."""
    loc, shift = torch.tensor(0.3, requires_grad=True), torch.tensor(0.0, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            c = MARKED("c", dist.Categorical(torch.ones(2)))
            z = pyro.sample("z", dist.Uniform(2.0 * c, 2.0 * c + 1))
            pyro.sample("x", dist.Normal(z + loc * c, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x + shift, log_density=torch.zeros(len(x))))

    x = torch.tensor([0.5, 1.5])
    log_w = pv.log_weights(model, guide, x, num_particles=2)
    assert log_w[:, 0].isfinite().all()
    assert (log_w[:, 1] == -torch.inf).all()
    for objective in (pv.ELBO(2), pv.IWAE(2)):
        loss = objective.differentiable_loss(model, guide, x)
        assert loss == torch.inf
        of_loc, of_shift = torch.autograd.grad(loss, [loc, shift])
        alone = torch.autograd.grad(objective.differentiable_loss(model, guide, x[:1]), [loc, shift])
        torch.testing.assert_close((of_loc, of_shift), alone)


def test_data_that_some_value_allows_are_data():
    """Counts above what the drawn number of trials would allow; and none does."""

    def model(x):
        with pyro.plate("data", len(x)):
            n = MARKED("n", dist.Categorical(torch.ones(8)))
            pyro.sample("x", dist.Binomial(n, torch.tensor(0.5)), obs=x)

    x = torch.tensor([0.0, 3.0, 7.0])
    exact = torch.stack([dist.Binomial(n, 0.5, validate_args=False).log_prob(x).exp() for n in range(8)]).mean(0).log()
    torch.testing.assert_close(pv.log_likelihood(model, nothing, x, num_samples=1).log_prob, exact)
    assert pv.log_weights(model, nothing, torch.tensor([9.0])).item() == -torch.inf


def test_a_figure_is_summed_in_double():
    """A long chain in single precision, whose sums would lose a digit."""
    p, y = parameters(), 3 * torch.randn(40, 150)
    alpha = p["init"].log_softmax(-1).expand(40, 3)
    for t in range(y.shape[1]):
        alpha = (alpha.unsqueeze(-1) + p["step"].log_softmax(-1)).logsumexp(1) if t else alpha
        alpha = alpha + dist.Normal(p["loc"], 1.0).log_prob(y[:, t, None])
    exact = alpha.logsumexp(-1)
    torch.set_default_dtype(torch.float32)
    found = pv.log_weights(partial(chain, parameters(dtype=torch.float32)), nothing, y.float())
    assert found.dtype == torch.float32
    assert ((found - exact) / exact).abs().max() < 2e-7


def test_labels_that_are_known_in_part():
    """Pyro's obs_mask makes of a label one site that observes and one that is summed out."""
    p, known, labels = parameters(), torch.tensor([True, False, True]), torch.tensor([0, 1, 2])

    @config_enumerate
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=p["init"]), obs=labels, obs_mask=known)
            pyro.sample("x", dist.Normal(p["loc"][c], 1.0), obs=x)

    each = p["init"].log_softmax(-1) + dist.Normal(p["loc"], 1.0).log_prob(X[:, :1])
    exact = torch.where(known, each.gather(1, labels.unsqueeze(1)).squeeze(1), each.logsumexp(1))
    torch.testing.assert_close(pv.log_likelihood(model, nothing, X[:, 0], num_samples=1).log_prob, exact)


def test_classes_may_be_one_hot():
    p = parameters()

    def model(x):
        with pyro.plate("data", len(x)):
            c = MARKED("c", dist.OneHotCategorical(logits=p["init"]))
            pyro.sample("x", dist.Normal(c @ p["loc"], 1.0), obs=x)

    each = p["init"].log_softmax(-1) + dist.Normal(p["loc"], 1.0).log_prob(X[:, :1])
    found = pv.log_likelihood(model, nothing, X[:, 0], num_samples=1, num_draws=1000, seed=0)
    torch.testing.assert_close(found.log_prob, each.logsumexp(1))
    assert found.draws["c"].shape == (1000, 3, 3)
    assert (found.draws["c"].mean(0) - each.softmax(1)).abs().max() < 5 * 0.5 / 1000**0.5


def test_autoguides_of_the_rest():
    p = parameters()
    guide = AutoNormal(poutine.block(partial(locations, p), hide=["c"]))
    guide(X)
    found = []
    for objective in (TraceEnum_ELBO(max_plate_nesting=1), pv.ELBO()):
        pyro.set_rng_seed(2)
        found.append(objective.differentiable_loss(partial(locations, p), guide, X).item())
    assert found[0] == pytest.approx(found[1])


# --- marks in the guide -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [{}, {"kl_weight": 0.5}, {"likelihood_weight": 2.0}], ids=repr)
@pytest.mark.parametrize("pair", [MIXTURE, NET], ids=lambda pair: pair.name)
@pytest.mark.parametrize("particles", [1, 3])
def test_the_elbo_of_marked_guide_sites_is_exact(pair, weights, particles):
    """Its value and every derivative, of one call."""
    bound, gradients = expected(pair, mean, 1, **weights)
    params = pair.params(grad=True)
    model, guide = pair.programs(params)
    loss = pv.ELBO(particles, **weights).differentiable_loss(model, config_enumerate(guide), pair.data)
    loss.backward()
    torch.testing.assert_close(-loss, bound)
    torch.testing.assert_close({name: -p.grad for name, p in params.items()}, gradients)
    with torch.no_grad():
        torch.testing.assert_close(-pv.ELBO(**weights).loss(model, config_enumerate(guide), pair.data), bound.item())


def test_marks_in_the_guide_and_sums_in_the_model_go_together():
    """Pyro's sums of both are those of ours, of values in the guide and of others in the model."""
    p, found = parameters(grad=True), []

    def guide(x):
        with pyro.plate("data", len(x)):
            MARKED("a", dist.Categorical(logits=p["loc"] * x[:, :1]))

    for objective in (TraceEnum_ELBO(max_plate_nesting=1), pv.ELBO()):
        loss = objective.differentiable_loss(partial(several, p), guide, X)
        found.append((loss.item(), torch.autograd.grad(loss, [p["init"], p["pair"], p["loc"]])))
    torch.testing.assert_close(*found)
    log_w = pv.log_weights(
        partial(several, p), guide, X, num_particles=4000
    ).detach()  # where weights are measured a is drawn
    assert log_w.mean(0).sum() == pytest.approx(-found[0][0], abs=0.1)


def marked_guide(x, noise=False):
    if noise:
        pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
    with pyro.plate("data", len(x)):
        MARKED("a", dist.Categorical(logits=torch.zeros(len(x), 3)))


@pytest.mark.parametrize(
    ("objective", "guide", "words"),
    [
        (pv.IWAE(2), marked_guide, r'"a" is marked.*IWAE draws.*mark it in the model.*pyrovae.ELBO'),
        (pv.RWS(2), marked_guide, r'"a" is marked.*RWS draws'),
        (pv.ELBO(free_bits=0.1), marked_guide, r'"a" is marked.*together with free_bits'),
        (pv.ELBO(2, fold_particles=True), marked_guide, r'"a" is marked.*together with fold_particles'),
        (pv.ELBO(kl_weight=0.5), marked_guide, r'"a" is marked.*weights of what the model sums out'),
        (pv.ELBO(), partial(marked_guide, noise=True), r'"a" is marked.*noise of the guide \("u"\)'),
    ],
)
def test_what_marks_in_the_guide_cannot_be_joined_with_is_refused(objective, guide, words):
    with pytest.raises(ValueError, match=words):
        objective.differentiable_loss(partial(several, parameters()), guide, X)


@pytest.mark.parametrize("where", ["model", "guide"])
def test_programs_that_know_only_all_values_at_once_are_refused(where):
    def program(x, role):
        with pyro.plate("data", len(x)):
            c = (pyro.sample if role == "model" else MARKED)("c", dist.Categorical(torch.ones(3)))
            if role == where:
                assert c.shape == (3, 1), f"c has shape {list(c.shape)}"
            if role == "model":
                pyro.sample("x", dist.Normal(c.double(), 1.0), obs=x)

    match = r'guide sites "c" are marked for enumeration, but the programs fail .*c has shape \[4\]'
    with pytest.raises(ValueError, match=match):
        pv.ELBO().loss(partial(program, role="model"), partial(program, role="guide"), torch.zeros(4))


def test_marks_in_a_chain_of_the_guide_are_checked():
    def guide(x):
        s, before = torch.zeros(len(x), dtype=torch.long), torch.zeros(len(x), dtype=torch.long)
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(4)):
                before, s = s, MARKED(f"s{t}", dist.Bernoulli(Vindex(torch.full((2, 2), 0.3))[before, s])).long()

    with pytest.raises(ValueError, match=r'"s2" hangs on.*history'):
        pv.ELBO().differentiable_loss(forgetful, guide, X)


# --- refusals ---------------------------------------------------------------------------------------------------------


def subsampled(x):
    c = MARKED("c", dist.Categorical(torch.ones(2)))
    with pyro.plate("data", 100, subsample=torch.arange(len(x))):
        pyro.sample("x", dist.Normal(c.to(x.dtype), 1.0), obs=x[:, 0])


def scaled(x):
    with pyro.plate("data", len(x)):
        c = MARKED("c", dist.Categorical(torch.ones(2)))
        with poutine.scale(scale=0.5):
            pyro.sample("x", dist.Normal(c.to(x.dtype), 1.0), obs=x[:, 0])


def steered(x):
    c = MARKED("c", dist.Bernoulli(0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(1.0 if c else 0.0, 1.0), obs=x[:, 0])


def marked(**infer):
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Poisson(1.0) if infer.get("endless") else dist.Bernoulli(0.5), infer=infer)
            pyro.sample("x", dist.Normal(c, 1.0), obs=x[:, 0])

    return model


def crossed(x):
    """Of each row and of each column a class, which every number has to do with."""
    rows, columns = pyro.plate("rows", len(x), dim=-2), pyro.plate("columns", x.shape[1], dim=-1)
    with rows:
        a = MARKED("a", dist.Bernoulli(0.5))
    with columns:
        b = MARKED("b", dist.Bernoulli(0.5))
    with rows, columns:
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)


def forgetful(x):
    """A chain of two steps, remembered for one."""
    s, before = torch.zeros(len(x), dtype=torch.long), torch.zeros(len(x), dtype=torch.long)
    with pyro.plate("data", len(x)):
        for t in pyro.markov(range(4)):
            probs = Vindex(torch.full((2, 2), 0.3))[before, s]
            before, s = s, MARKED(f"s{t}", dist.Bernoulli(probs)).long()
            pyro.sample(f"x{t}", dist.Normal(s.to(x.dtype), 1.0), obs=x[:, t])


REFUSED = [
    (subsampled, r'"c" and "x".*summed over "c" together.*scales \[1.0, 33.33.*same subsampled plate'),
    (scaled, r'"c" and "x".*scales \[1.0, 0.5\]'),
    (steered, r'"c" are marked.*all their values at once.*indexing.*guide'),
    (forgetful, r'"s2" hangs on.*further back.*history in pyro.markov'),
    (marked(enumerate="sequential"), r'"c" is not drawn by the guide.*"sequential".*mark it.*"parallel"'),
    (marked(enumerate="parallel", num_samples=3), r'"c".*num_samples, which draws it.*exactly'),
    (marked(enumerate="parallel", endless=True), r'"c".*Poisson does not list its values'),
    (crossed, r'"a", "b".*across plates "rows", "columns".*exponentially many.*sequential'),
]  # fmt: skip


@pytest.mark.parametrize(("model", "words"), REFUSED, ids=lambda v: getattr(v, "__name__", ""))
@pytest.mark.parametrize("objective", [pv.ELBO(), pv.IWAE(3), pv.RWS(2)], ids=repr)
def test_what_has_no_sum_is_refused_by_name(model, words, objective):
    with pytest.raises(ValueError, match=words):
        objective.differentiable_loss(model, nothing, X)


def effects(p, x):
    """A class for each number of each datum, on which the steps of its own chain hang."""
    with pyro.plate("data", len(x), dim=-1), pyro.plate("numbers", 2, dim=-2):
        e = MARKED("e", dist.Categorical(logits=p["init"]))
        s = torch.tensor(0)
        for t in pyro.markov(range(2)):
            s = MARKED(f"s{t}", dist.Categorical(logits=p["step"][s] + Vindex(p["pair"])[e]))
            pyro.sample(f"x{t}", dist.Normal(p["loc"][s], 1.0), obs=x[:, 2 * t : 2 * t + 2].T)


def test_posterior_draws_of_chains_that_hang_on_a_class():
    p, number = parameters(), 4000
    draws = pv.log_likelihood(partial(effects, p), nothing, X, num_samples=2, num_draws=number, seed=0).draws
    assert {name: d.shape for name, d in draws.items()} == dict.fromkeys(("e", "s0", "s1"), (number, 3, 2))
    log_joint = torch.zeros(3, 2, 3, 3, 3)  # datum, number, e, s0, s1
    moves = (p["step"].unsqueeze(0) + p["pair"].unsqueeze(1)).log_softmax(-1)  # e, from, to
    seen = dist.Normal(p["loc"], 1.0).log_prob(X.reshape(3, 2, 2, 1))  # datum, step, number, state
    log_joint += p["init"].log_softmax(-1)[:, None, None] + moves[:, 0, :, None] + moves
    log_joint += seen[:, 0][..., None, :, None] + seen[:, 1][..., None, None, :]
    exact = log_joint.flatten(2).softmax(-1)
    place = 9 * draws["e"] + 3 * draws["s0"] + draws["s1"]
    shares = torch.stack([(place == k).double().mean(0) for k in range(27)], -1)
    assert (shares - exact).abs().max() < 5 * 0.5 / number**0.5


def test_posterior_draws_where_a_latent_is_masked():
    here = torch.tensor([True, False, True])

    def model(p, x):
        with pyro.plate("data", 3), poutine.mask(mask=here):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
            c = MARKED("c", dist.Categorical(logits=z.unsqueeze(-1) * p["loc"]))
            pyro.sample("x", dist.Normal(p["pair"][1][c] * z, 1.0), obs=x)

    def guide(p, x):
        with pyro.plate("data", 3), poutine.mask(mask=here):
            pyro.sample("z", dist.Normal(x, 1.0))

    found = pv.log_likelihood(model, guide, parameters(), X[:, 0], num_samples=50, num_draws=9, seed=0)
    assert found.draws["c"].shape == (9, 3)
    assert torch.equal(found.draws["z"].isnan().all(0), ~here)
    assert found.log_prob[1].abs() < 1e-12
