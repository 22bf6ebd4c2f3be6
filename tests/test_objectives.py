"""Objectives as Pyro citizens: training, refusals by name, state left as found, dead particles, free bits."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

import pyrovae as pv
from tests.pairs import guide_of

pytestmark = pytest.mark.double(11)

X = torch.tensor([[0.5, -1.0], [1.5, 0.2], [-0.3, 0.8], [0.9, 0.1]], dtype=torch.float64)


def lp(fn, value):
    return fn.log_prob(value).sum(-1)


class Pair(nn.Module):
    """Two stochastic layers as a user writes them; batch norm and dropout in the guide on request."""

    def __init__(self, batch_norm=False, dropout=0.0):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(2, 4), nn.BatchNorm1d(4) if batch_norm else nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 2)
        )
        self.top = nn.Sequential(nn.Dropout(dropout), nn.Linear(2, 1))
        self.decoder = nn.Linear(2, 2)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(z2.expand(*z2.shape[:-1], 2), 0.8).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z1), 0.7).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(self.encoder(x), 0.6).to_event(1))
            pyro.sample("z2", dist.Normal(self.top(z1), 0.9).to_event(1))


OBJECTIVES = [
    pv.ELBO(2), pv.ELBO(1, gradient="stl"), pv.IWAE(3), pv.IWAE(3, gradient="stl"), pv.IWAE(3, gradient="dreg"),
    pv.Renyi(0.5, 3, gradient="dreg"), pv.VRMax(3), pv.MIWAE(2, 3, gradient="dreg"), pv.PIWAE(2, 3), pv.CIWAE(0.5, 3),
    pv.VIMCO(3), pv.ELBO(2, free_bits=0.1), pv.RWS(3), pv.RWS(3, gradient="dreg"), pv.TVO(3),
]  # fmt: skip


def seeded(objective, pair, x=X, seed=3):
    pair.zero_grad()
    pyro.set_rng_seed(seed)
    loss = objective.loss_and_grads(pair.model, pair.guide, x)
    return loss, {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in pair.named_parameters()}


# --- training -------------------------------------------------------------------------------------------------------


def test_is_a_pyro_elbo_and_trains_param_store_programs_with_svi():
    def model(x):
        w = pyro.param("w", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(w * z, 0.5), obs=x)

    def guide(x):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)) * x, scale))

    x = dist.Normal(0.0, 1.3).sample((500,))
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=pv.IWAE(5))
    assert isinstance(pv.IWAE(5), pyro.infer.ELBO)
    losses = [svi.step(x) for _ in range(120)]
    assert math.isfinite(svi.evaluate_loss(x))
    # The best fit has w^2 + .25 = mean x^2: the marginal's entropy in the sample, 0.02 nats from it.
    variance = x.square().mean()
    best = 0.5 * float((2 * math.pi * variance).log() + 1)
    assert losses[0] / 500 > best + 0.1
    assert sum(losses[-20:]) / 20 / 500 == pytest.approx(best, abs=0.02)
    assert pyro.param("w").item() ** 2 + 0.25 == pytest.approx(float(variance), rel=0.1)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_pair_called_as_a_module_owns_the_parameters_and_adds_nothing_to_the_store(objective):
    pair = Pair()
    loss = objective(pair.model, pair.guide)
    assert {id(p) for p in loss.parameters()} == {id(p) for p in pair.parameters()}
    pyro.param("mine", torch.tensor(1.0))
    pyro.set_rng_seed(3)
    value = loss(X)
    value.backward()
    assert all(p.grad is not None for p in pair.parameters())
    assert value.item() == pytest.approx(seeded(objective, pair)[0])
    assert list(pyro.get_param_store().keys()) == ["mine"]


def test_pyro_modules_and_bayesian_networks_are_programs():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.w = PyroParam(torch.tensor(0.5))
            self.linear = PyroModule[nn.Linear](2, 2)
            self.linear.bias = PyroSample(dist.Normal(0.0, 1.0).expand([2]).to_event(1))

        def forward(self, x):
            loc = self.linear(x) * self.w
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(loc, 0.7).to_event(1), obs=x)

    model = Model()

    def guide(x):
        pyro.sample("linear.bias", dist.Normal(torch.zeros(2), 0.8).to_event(1))

    loss = pv.ELBO(1)(model, guide)
    loss(X).backward()
    assert model.linear.weight.grad is not None
    assert all(p.grad is not None for p in model.parameters())


def test_kl_weight_tensor_is_annealed_in_place():
    weight = torch.tensor(0.0)
    objective, pair = pv.IWAE(3, kl_weight=weight), Pair()
    for value in (0.0, 0.3, 1.0):
        weight.fill_(value)
        assert seeded(objective, pair)[0] == pytest.approx(seeded(pv.IWAE(3, kl_weight=value), pair)[0], rel=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_repr_shows_what_it_is_made_of_and_objectives_pickle(objective):
    again = eval(repr(objective), vars(pv))
    assert repr(again) == repr(objective) == repr(pickle.loads(pickle.dumps(objective)))
    assert seeded(again, pair := Pair())[0] == seeded(objective, pair)[0]


# --- state left as found --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_first_call_equals_later_ones_and_probing_leaves_no_trace(objective):
    pair, fresh = Pair(batch_norm=True, dropout=0.3), copy.copy(objective)
    first = seeded(fresh, pair)
    state = torch.get_rng_state()
    second = seeded(fresh, pair)
    assert torch.equal(state, torch.get_rng_state())
    assert first[0] == second[0]
    for n, g in first[1].items():
        torch.testing.assert_close(g, second[1][n], rtol=0, atol=0)


@pytest.mark.parametrize("enabled", [True, False])
def test_pyros_validation_flag_is_restored(enabled):
    pair = Pair()
    with pyro.validation_enabled(enabled):
        pv.IWAE(3, gradient="dreg").differentiable_loss(pair.model, pair.guide, X)
        pv.log_weights(pair.model, pair.guide, X)
        assert pyro.poutine.runtime is not None
        assert pyro.infer.util.is_validation_enabled() is enabled
        assert torch.distributions.Distribution._validate_args is enabled


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_batch_norm_moves_once_per_step(objective):
    pair, once = Pair(batch_norm=True), Pair(batch_norm=True)
    once.load_state_dict(pair.state_dict())
    for steps in (1, 2):
        objective.loss_and_grads(pair.model, pair.guide, X)
        once.encoder(X)
        for name, buffer in pair.named_buffers():
            torch.testing.assert_close(buffer, once.get_buffer(name))
        assert pair.encoder[1].num_batches_tracked == steps


@pytest.mark.parametrize("gradient", ["total", "stl"])
def test_second_run_of_the_guide_replays_dropout(gradient):
    pair = Pair(dropout=0.4)
    loss, found = seeded(pv.ELBO(1, gradient=gradient), pair)
    # By hand, consuming the generator in the guide's order: mask, noise, mask, noise.
    pyro.set_rng_seed(3)
    noise = [
        nn.functional.dropout(torch.ones(4, 4), 0.4),
        torch.randn(4, 2),
        nn.functional.dropout(torch.ones(4, 2), 0.4),
    ]
    noise.append(torch.randn(4, 1))

    def guide(net, z1=None):
        h = net.encoder[1](net.encoder[0](X)) * noise[0]
        loc1 = net.encoder[3](h)
        z1 = loc1 + 0.6 * noise[1] if z1 is None else z1
        return dist.Normal(loc1, 0.6), dist.Normal(net.top[1](z1 * noise[2]), 0.9), z1

    q1, q2, z1 = guide(pair)
    z2 = q2.loc + 0.9 * noise[3]
    joint = lp(dist.Normal(0.0, 1.0), z2) + lp(dist.Normal(z2.expand(4, 2), 0.8), z1)
    joint = joint + lp(dist.Normal(pair.decoder(z1), 0.7), X)
    if gradient == "stl":  # the guide's parameters are cut from log q, the samples inside of it are not
        frozen = copy.deepcopy(pair).requires_grad_(False)
        q1, q2, _ = guide(frozen, z1)
    by_hand = -(joint - lp(q1, z1) - lp(q2, z2)).sum()
    assert loss == pytest.approx(by_hand.item())
    for (n, p), g in zip(pair.named_parameters(), torch.autograd.grad(by_hand, list(pair.parameters())), strict=True):
        torch.testing.assert_close(found[n], g, msg=lambda m, n=n, p=p: f"{n} {tuple(p.shape)}: {m}")


# --- refusals, each by name -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: pv.IWAE(0), "num_particles"), (lambda: pv.ELBO(-1), "num_particles"),
        (lambda: pv.IWAE(2.5), "num_particles"), (lambda: pv.IWAE(True), "num_particles"),
        (lambda: pv.MIWAE(0, 3), "num_groups"), (lambda: pv.PIWAE(2, 0), "num_particles"),
        (lambda: pv.VIMCO(1), "num_particles"), (lambda: pv.CIWAE(-0.1, 3), "beta"),
        (lambda: pv.CIWAE(1.1, 3), "beta"), (lambda: pv.Renyi(math.inf, 3), "alpha"),
        (lambda: pv.Renyi(math.nan, 3), "alpha"), (lambda: pv.VRMax(3, gradient="dreg"), "dreg"),
        (lambda: pv.IWAE(3, gradient="drag"), "dreg"), (lambda: pv.IWAE(3, kl_weight=-1.0), "kl_weight"),
        (lambda: pv.IWAE(3, kl_weight=math.nan), "kl_weight"), (lambda: pv.ELBO(free_bits=-0.1), "free_bits"),
        (lambda: pv.ELBO(free_bits=0.1, gradient="stl"), "free_bits"),
        (lambda: pv.ELBO(free_bits=0.1).bound(torch.zeros(1, 2)), "free_bits"),
    ],
)  # fmt: skip
def test_impossible_objectives_are_refused_at_construction(make, words):
    with pytest.raises(ValueError, match=words):
        make()


PARAMETER = torch.tensor(0.3, requires_grad=True, dtype=torch.float64)


def program(*sites):
    """A program with one data plate and these (name, distribution maker) in it; "x" is observed."""

    def run(x):
        with pyro.plate("data", len(x)):
            for name, make in sites:
                pyro.sample(name, make(), obs=torch.zeros(4) if name == "x" else None)

    return run


def noise():
    return dist.Normal(torch.zeros(4), 1.0)


def enumerated(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def with_factor(**options):
    def run(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", noise())
            pyro.factor("penalty", PARAMETER.expand(4), **options)

    return run


LATENT = program(("z", noise), ("x", noise))


@pytest.mark.parametrize(
    ("objective", "model", "guide", "words"),
    [
        *[
            (pv.IWAE(3, gradient=gradient), LATENT, program(("z", make)), r'"z".*total')
            for gradient in ("stl", "dreg")
            for make in (
                lambda: dist.Bernoulli(logits=PARAMETER.expand(4)),
                lambda: dist.Delta(PARAMETER.expand(4)),
                lambda: dist.Delta(torch.zeros(4), log_density=PARAMETER.expand(4)),
            )
        ],
        (pv.IWAE(3, gradient="dreg"), LATENT, with_factor(has_rsample=True), r'"penalty".*total'),
        (pv.ELBO(), LATENT, with_factor(), r'"penalty".*has_rsample'),
        (pv.ELBO(), LATENT, program(), r'model site "z".*guide'),
        (pv.ELBO(), enumerated, program(), r'model site "x"'),
        (pv.IWAE(2), program(("x", noise)), program(("y", noise)), r'guide site "y"'),
        (pv.ELBO(), LATENT, program(("z", noise), ("y", noise)), r'guide site "y"'),
        (pv.ELBO(), program(), program(), "no sample site"),
        (pv.ELBO(), program(("z", noise), ("z", noise), ("x", noise)), program(("z", noise)), '"z"'),
        (pv.ELBO(free_bits=0.1), LATENT, program(("z", lambda: dist.Delta(torch.zeros(4)))), r'"z".*Delta'),
    ],
)  # fmt: skip
def test_impossible_pairs_are_refused_at_the_first_call_by_name(objective, model, guide, words):
    with pytest.raises(ValueError, match=words):
        objective.differentiable_loss(model, guide, X)


# --- dead particles -------------------------------------------------------------------------------------------------


def walled(theta, phi, walls):
    """A pair whose weight is zero where z is beyond a datum's wall."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(theta.expand(len(x)), 1.0))
            pyro.factor("wall", torch.where(z > walls, -math.inf, 0.0))
            pyro.sample("x", dist.Normal(theta * z, 1.0), obs=x)

    guide = guide_of(lambda x: dist.Normal(phi * x, 0.7))

    return model, guide


@pytest.mark.parametrize(
    "objective", [pv.IWAE(4), pv.IWAE(4, gradient="dreg"), pv.PIWAE(1, 4), pv.Renyi(0.3, 4), pv.VRMax(4)], ids=repr
)
def test_dead_particles_get_no_gradient(objective):
    x, walls = X[:, 0], torch.tensor([0.5, 0.0, -0.2, 9.0])
    params = [torch.tensor(0.8, requires_grad=True), torch.tensor(0.6, requires_grad=True)]
    pyro.set_rng_seed(3)
    log_w = pv.log_weights(*walled(*params, walls), x, num_particles=4)
    dead = log_w == -math.inf
    assert (dead.any(0) & ~dead.all(0)).any()
    weights = objective.weights(log_w)
    assert all(c.isfinite().all() for c in weights)
    assert all((c[dead] == 0).all() for c in weights[:3])
    pyro.set_rng_seed(3)
    loss = objective.differentiable_loss(*walled(*params, walls), x)
    loss.backward()
    # By hand: the same draws, the dead left out of the sums.
    pyro.set_rng_seed(3)
    theta, phi = (p.detach().requires_grad_() for p in params)
    free = pv.log_weights(*walled(theta, phi, torch.tensor(math.inf)), x, num_particles=4)
    assert loss.item() == pytest.approx(-float(objective.bound(free.detach().masked_fill(dead, -math.inf)).sum()))
    if objective.gradient == "total":
        by_hand = -(weights.model * free.masked_fill(dead, 0.0)).sum()
        grads = torch.autograd.grad(by_hand, (theta, phi))
        torch.testing.assert_close([p.grad for p in params], list(grads))
    assert all(p.grad.isfinite() for p in params)


@pytest.mark.parametrize("gradient", ["total", "dreg", "stl"])
@pytest.mark.parametrize("make", [pv.ELBO, pv.IWAE, pv.PIWAE, pv.MIWAE, pv.CIWAE])
def test_a_hopeless_datum_is_reported_and_leaves_the_others_alone(make, gradient):
    x, objective = X[:, 0], make(num_particles=3, gradient=gradient)
    free = torch.full((4,), math.inf)
    walls = free.clone()
    walls[1] = -math.inf
    results = []
    for wall, keep in ((walls, torch.ones(4, dtype=torch.bool)), (free, torch.arange(4) != 1)):
        params = [torch.tensor(0.8, requires_grad=True), torch.tensor(0.6, requires_grad=True)]
        model, guide = (pyro.poutine.mask(program, keep) for program in walled(*params, wall))
        pyro.set_rng_seed(3)
        loss = objective.differentiable_loss(model, guide, x)
        loss.backward()
        results.append((loss.item(), [p.grad for p in params]))
    assert results[0][0] == math.inf
    assert math.isfinite(results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
