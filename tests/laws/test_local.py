r"""Discrete sites inside plates beside a global one: unbiased gradients, element by element, and how noisy they are.

x_i ~ N(w z_i + g, s^2) with z_i | g and g binary. R repetitions lie in an outer plate, each with parameters of its own;
exact answers come from all states of g and z, all K-tuples of them.
"""

import itertools
import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO

import pyrovae as pv
from tests.laws.objectives import Pessimist
from tests.laws.programs import run_of, seeded_loss

X = torch.tensor([0.4, -0.9], dtype=torch.float64)
R = 20_000
THETA = {"a": 0.3, "b": 0.7, "w": 0.8}
PHI = {"c": -0.4, "m": 0.6, "d": 0.5}
BIT = torch.tensor([0.0, 1.0], dtype=torch.float64)


def parameters(size=None):
    """Of each repetition its own, ``[size, 1]``, or numbers."""
    shape = () if size is None else (size, 1)
    return {n: torch.full(shape, v, dtype=torch.float64, requires_grad=True) for n, v in (THETA | PHI).items()}


def logits(p, late):
    """Of g and z under the guide, which draws z first where ``late``, and then g by the sum of them."""
    of_z = lambda g: p["m"] * X + (0.0 if late else p["d"] * (2 * g - 1))  # noqa: E731
    of_g = lambda z: p["c"] + (p["d"] * z.sum(-1, keepdim=True) if late else 0.0)  # noqa: E731
    return of_g, of_z


def programs(p, size=1, late=False, full=2):
    """The pair of so many repetitions, its data of so many in full."""
    plate = {"name": "data", "size": full, "subsample": torch.arange(len(X)), "dim": -1}

    def model():
        with pyro.plate("repetitions", size, dim=-2):
            g = pyro.sample("g", dist.Bernoulli(logits=p["a"].expand(size, 1)))
            with pyro.plate(**plate):
                z = pyro.sample("z", dist.Bernoulli(logits=p["b"] * (2 * g - 1)))
                pyro.sample("x", dist.Normal(p["w"] * z + g, 0.8), obs=X)

    def guide():
        of_g, of_z = logits(p, late)
        with pyro.plate("repetitions", size, dim=-2):
            if late:
                with pyro.plate(**plate):
                    z = pyro.sample("z", dist.Bernoulli(logits=of_z(None).expand(size, len(X))))
            g = pyro.sample("g", dist.Bernoulli(logits=of_g(z if late else None) + torch.zeros(size, 1)))
            if not late:
                with pyro.plate(**plate):
                    pyro.sample("z", dist.Bernoulli(logits=of_z(g)))

    return model, guide


def exact(bound, num, late=False, kl_weight=1.0, likelihood_weight=1.0, full=2):
    """The gradient of the expected bound, by all tuples of states."""
    p, of = parameters(), lambda l, v: dist.Bernoulli(logits=l).log_prob(v)  # noqa: E741
    of_g, of_z = logits(p, late)
    states = torch.cartesian_prod(*[BIT] * (1 + len(X)))
    g, z = states[:, :1], states[:, 1:]
    log_q = of(of_g(z), g).sum(-1) + of(of_z(g), z).sum(-1)
    likelihood = dist.Normal(p["w"] * z + g, 0.8).log_prob(X).sum(-1)
    kl_of_z = (of(of_z(g), z) - of(p["b"] * (2 * g - 1), z)).sum(-1)
    log_w = kl_weight * (of(p["a"], g) - of(of_g(z), g)).sum(-1)
    log_w = log_w + full / len(X) * (likelihood_weight * likelihood - kl_weight * kl_of_z)
    tuples = torch.tensor(list(itertools.product(range(len(states)), repeat=num))).T
    expectation = (log_q[tuples].sum(0).exp() * bound(log_w[tuples])).sum()
    return dict(zip(p, torch.autograd.grad(expectation, list(p.values())), strict=True))


def found(objective, size, **options):
    p = parameters(size)
    objective.differentiable_loss(*programs(p, size, **options)).backward()
    return {name: -value.grad[:, 0] for name, value in p.items()}


class Own(pv.IWAE):
    """IWAE's bound as a function of which nothing is known."""

    def bound(self, log_w):
        return torch.logsumexp(log_w, 0) - math.log(log_w.shape[0])


OBJECTIVES = [
    pv.ELBO(1), pv.ELBO(3), pv.ELBO(2, free_bits=1e-9), pv.ELBO(1, free_bits=1e-9), pv.IWAE(1), pv.IWAE(2), pv.IWAE(3),
    pv.IWAE(2, kl_weight=0.5), pv.ELBO(2, likelihood_weight=2.0), pv.Renyi(0.5, 2), pv.VRMax(2), pv.MIWAE(1, 2),
    pv.MIWAE(2, 1), pv.CIWAE(0.4, 2), Pessimist(2), Pessimist(1), Own(2),
]  # fmt: skip


@pytest.mark.parametrize("late", [False, True], ids=["global first", "global last"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_mean_gradient_is_exact(objective, late, agree):
    options = {"kl_weight": objective.kl_weight, "likelihood_weight": objective.likelihood_weight}
    bound = pv.ELBO(1).bound if isinstance(objective, pv.ELBO) else objective.bound
    truth, draws = exact(bound, objective.total_particles, late, **options), found(objective, R, late=late)
    for name in truth:
        agree(repr(objective), "local-last" if late else "local", f"d/d{name}", draws[name], truth[name])


def test_a_subsample_has_the_mean_of_its_scaled_data(agree):
    for objective in (pv.ELBO(1), pv.ELBO(3)):
        truth, draws = exact(pv.ELBO(1).bound, 1, full=6), found(objective, R, full=6)
        for name in truth:
            agree(repr(objective), "local, subsampled", f"d/d{name}", draws[name], truth[name])


def test_groups_have_the_mean_of_theirs(agree):
    for objective in (pv.MIWAE(2, 2), pv.PIWAE(2, 2)):
        truth, draws = exact(pv.IWAE(2).bound, 2), found(objective, R)
        for name in PHI:
            agree(repr(objective), "local", f"d/d{name}", draws[name], truth[name])


@pytest.mark.parametrize("objective", [pv.ELBO(1), pv.ELBO(4), pv.IWAE(4), pv.IWAE(3, kl_weight=0.3)], ids=repr)
def test_joint_weights_are_those_of_one_repetition(objective):
    p, q = parameters(1), parameters()

    def model():
        g = pyro.sample("g", dist.Bernoulli(logits=q["a"]))
        with pyro.plate("data", len(X)):
            z = pyro.sample("z", dist.Bernoulli(logits=q["b"] * (2 * g - 1)))
            pyro.sample("x", dist.Normal(q["w"] * z + g, 0.8), obs=X)

    def guide():
        g = pyro.sample("g", dist.Bernoulli(logits=q["c"]))
        with pyro.plate("data", len(X)):
            pyro.sample("z", dist.Bernoulli(logits=q["m"] * X + q["d"] * (2 * g - 1)))

    inside = seeded_loss(objective, *programs(p), params=list(p.values()))
    joint = seeded_loss(objective, model, guide, params=list(q.values()))
    assert joint[0] == pytest.approx(inside[0])
    torch.testing.assert_close([g.sum() for g in inside[1]], list(joint[1]))


# --- signals, by hand -----------------------------------------------------------------------------------------------

FIRST = torch.tensor([[True], [False], [False]])
PIXELS = torch.tensor([[0.2, 1.0, -0.4], [0.9, -1.0, 0.3]], dtype=torch.float64)  # two data of three pixels


def pixel_pair(logit, dead=0.0, plate="pixels"):
    """A latent bit for each pixel of a datum, and one for the datum; ``dead`` is added where it and the first are 1."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.4)))
            with pyro.plate("pixels", 3, dim=-2):
                z = pyro.sample("z", dist.Bernoulli(x.new_tensor(0.3)))
                pyro.factor("apart", torch.where((z == 1) & (c == 1) & FIRST, dead, 0.0))
                pyro.sample("x", dist.Normal(z + c, 0.7), obs=x.T)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("c", dist.Bernoulli(logits=x.sum(-1)))
            with pyro.plate(plate, 3, dim=-2):
                pyro.sample("z", dist.Bernoulli(logits=logit))

    return model, guide


def terms(c, z, dead):
    """Of every pixel, [K, 3, 2], and of the datum, [K, 1, 2]: the log-weight's terms, log q(z)."""
    of = lambda fn, v: fn.log_prob(v)  # noqa: E731
    pixel = of(dist.Normal(z + c, 0.7), PIXELS.T) + of(dist.Bernoulli(torch.tensor(0.3)), z) - of(Q, z)
    pixel = pixel + torch.where((z == 1) & (c == 1) & FIRST, dead, 0.0)
    return pixel, of(dist.Bernoulli(torch.tensor(0.4)), c) - of(dist.Bernoulli(logits=PIXELS.sum(-1)), c)


LOGIT = torch.tensor([[0.2, -0.3], [0.5, 0.1], [-0.6, 0.4]], dtype=torch.float64)  # of every pixel of every datum
Q = dist.Bernoulli(logits=LOGIT)


@pytest.mark.parametrize("dead", [0.0, -math.inf], ids=["alive", "dead"])
@pytest.mark.parametrize("fold", [False, True], ids=["plate", "folded"])
@pytest.mark.parametrize("make", [pv.ELBO, pv.IWAE, Own, pv.Renyi, pv.VRMax], ids=lambda make: make.__name__)
def test_signal_replaces_what_an_element_reaches(make, fold, dead):
    objective, K = make(num_particles=4, fold_particles=fold), 4
    logit = LOGIT.clone().requires_grad_()

    def free(x):  # pixels of folded particles as well
        return logit.repeat(1, len(x) // 2)

    def call(model, guide, x):
        return seeded_loss(objective, model, guide, x, params=[logit])

    pair = pixel_pair(logit, dead)
    if fold:
        pair = pair[0], lambda x: pixel_pair(free(x))[1](x)
    (loss, (gradient,)), seen = run_of(call, *pair, PIXELS)
    shaped = {n: seen[n].unflatten(-1, (K, 2)).movedim(-2, 0) if fold else seen[n] for n in ("c", "z")}
    c, z = shaped["c"].reshape(K, 1, 2), shaped["z"].reshape(K, 3, 2)
    pixel, datum = terms(c, z, dead)
    log_w = (pixel.sum(1, keepdim=True) + datum).squeeze(1)
    bound = objective.bound(log_w)
    assert loss == pytest.approx(-float(bound.sum()))
    leaf = log_w.clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective.bound(leaf).nan_to_num(neginf=0.0).sum(), leaf)
    slope = slope * (make is not pv.ELBO)  # where it is a number, that has mean 0 and is left out
    expected = torch.zeros(3, 2)
    score = z - LOGIT.sigmoid()
    for k, i, b in itertools.product(range(K), range(3), range(2)):
        others = [j for j in range(K) if j != k]
        mean = sum(pixel[j, i, b] + datum[j, 0, b] for j in others) / (K - 1)
        replaced = log_w.clone()
        replaced[k, b] = mean + sum(pixel[k, j, b] for j in range(3) if j != i)
        gain = bound[b] - objective.bound(replaced)[b]
        if bound[b].isfinite():  # the signal, and the slope of the bound in log w, which has -log q in it
            expected[i, b] += (gain.nan_to_num(posinf=0.0) - slope[k, b]) * score[k, i, b]
    if dead:  # one alone, so that what replaces it is not dead as well
        assert (torch.isneginf(log_w).sum(0) == 1).any()
    torch.testing.assert_close(-gradient, expected)


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor([0.5, 3.0])], ids=["one", "each"])
@pytest.mark.parametrize("objective", [pv.ELBO(3), pv.IWAE(3), pv.ELBO(1)], ids=repr)
def test_a_scale_of_the_data_is_one_of_their_gradients(objective, scale):
    grads = []
    for factor in (torch.tensor(1.0), scale):
        logit = LOGIT.clone().requires_grad_()
        pair = (poutine.scale(program, factor) for program in pixel_pair(logit))
        grads.append(seeded_loss(objective, *pair, PIXELS, params=[logit])[1][0])
    torch.testing.assert_close(grads[1], scale * grads[0])


def test_a_plate_of_another_name_is_not_taken_for_the_same(agree):
    # It has the right mean, as it had, by the whole datum's signal.
    logit = LOGIT.clone().requires_grad_()
    mean = []
    for plate in ("pixels", "other"):
        model, guide = pixel_pair(logit, plate=plate)
        draws = torch.stack([seeded(pv.ELBO(50), model, guide, logit, s) for s in range(60)])
        mean.append(draws)
    for i, b in itertools.product(range(3), range(2)):
        agree("ELBO(50)", "plates by another name", f"pixel {i}, {b}", (mean[0] - mean[1])[:, i, b], 0.0)
    assert (mean[0].var(0) < mean[1].var(0)).all()


def seeded(objective, model, guide, parameter, seed):
    pyro.set_rng_seed(seed)
    return torch.autograd.grad(objective.differentiable_loss(model, guide, PIXELS), parameter)[0]


# --- noise ----------------------------------------------------------------------------------------------------------


def test_gradients_are_no_noisier_than_pyros():
    x = torch.randn(1000)
    slope = torch.tensor(0.3, requires_grad=True)

    def model(x):
        g = pyro.sample("g", dist.Normal(x.new_tensor(0.0), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_tensor(0.4)))
            pyro.sample("x", dist.Normal(g + z, 1.0), obs=x)

    def guide(x):
        pyro.param("slope", slope)
        pyro.sample("g", dist.Normal(x.new_tensor(0.1), 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=slope * x))

    spread = {}
    for objective in (Trace_ELBO(), pv.ELBO(), pv.ELBO(5), pv.IWAE(5)):
        draws = []
        for seed in range(60):
            pyro.set_rng_seed(seed)
            slope.grad = None
            objective.loss_and_grads(model, guide, x)
            draws.append(slope.grad)
        spread[repr(objective)] = float(torch.stack(draws).std())
    pyros, one, five, weighted = spread.values()
    assert one == pytest.approx(pyros, rel=1e-6)  # the same estimator, on the same draws
    assert five < one / 2
    assert weighted < one
