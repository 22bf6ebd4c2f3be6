"""Training: every kind of pair, data and objective reaches its known optimum, and a step is what it is by hand."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pyro.infer as infer
import pytest
import torch
from pyro.infer import autoguide, config_enumerate
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

import pyrovae as pv
from pyrovae.errors import DataError
from pyrovae.train.monitor import Monitor
from tests.pairs import guide_of, model_of
from tests.training import Rows

pytestmark = pytest.mark.seed(23)

# z ~ N(0, 1), x ~ N(w z + a, .5^2); data of mean .5 and variance 1.25, so that the best w is 1.
NOISE = 0.5
_quantiles = dist.Normal(0.0, 1.0).icdf((torch.arange(400) + 0.5) / 400)
X = 0.5 + math.sqrt(1.25) * _quantiles / _quantiles.square().mean().sqrt()
OPTIMUM = {"w": 1.0, "a": 0.5, "m": 0.8, "c": -0.4, "s": math.sqrt(0.2)}
START = {"w": 0.5, "a": 0.0, "m": 0.0, "c": 0.0, "s": 1.0}
BEST = dist.Normal(0.5, math.sqrt(1.25)).log_prob(X).mean().item()


def observe(x, w, a):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(w(z) + a, NOISE), obs=x)


def infer_z(x, loc, s):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, s))


class Methods(nn.Module):
    def __init__(self):
        super().__init__()
        for name, value in START.items():
            setattr(self, name, nn.Parameter(torch.tensor(value)))

    def model(self, x):
        observe(x, lambda z: self.w * z, self.a)

    def guide(self, x):
        infer_z(x, self.m * x + self.c, self.s.abs())

    def read(self):
        return {name: p.item() for name, p in self.named_parameters()} | {"s": self.s.abs().item()}


def methods():
    pair = Methods()
    return pair.model, pair.guide, pair.read


def closures():
    decoder, encoder = nn.Linear(1, 1), nn.Linear(1, 1)
    with torch.no_grad():
        for p, v in zip((*decoder.parameters(), *encoder.parameters()), (0.5, 0.0, 0.0, 0.0), strict=True):
            p.fill_(v)
    log_s = torch.zeros((), requires_grad=True)

    def model(x):
        observe(x, lambda z: decoder(z.unsqueeze(-1)).squeeze(-1), 0.0)

    def guide(x):
        infer_z(x, encoder(x.unsqueeze(-1)).squeeze(-1), log_s.exp())

    def read():
        values = [p.item() for p in (*decoder.parameters(), *encoder.parameters())]
        return dict(zip("wamc", values, strict=True)) | {"s": log_s.exp().item()}

    return model, guide, read


def leaves():
    p = {name: torch.tensor(v, requires_grad=True) for name, v in START.items()}
    return (
        lambda x: observe(x, lambda z: p["w"] * z, p["a"]),
        lambda x: infer_z(x, p["m"] * x + p["c"], p["s"].abs()),
        lambda: {name: v.item() for name, v in p.items()} | {"s": p["s"].abs().item()},
    )


def store():
    def value(name):
        positive = constraints.positive if name == "s" else constraints.real
        return pyro.param(name, torch.tensor(START[name]), constraint=positive)

    return (
        lambda x: observe(x, lambda z: value("w") * z, value("a")),
        lambda x: infer_z(x, value("m") * x + value("c"), value("s")),
        lambda: {name: value(name).item() for name in START},
    )


def pyro_modules():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.w, self.a = PyroParam(torch.tensor(0.5)), PyroParam(torch.tensor(0.0))

        def forward(self, x):
            observe(x, lambda z: self.w * z, self.a)

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.m, self.c = nn.Parameter(torch.tensor(0.0)), PyroParam(torch.tensor(0.0))
            self.s = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

        def forward(self, x):
            infer_z(x, self.m * x + self.c, self.s)

    model, guide = Model(), Guide()
    return model, guide, lambda: {n: getattr(model if n in "wa" else guide, n).item() for n in START}


def handled():
    model, guide, read = methods()
    return pyro.poutine.scale(model, scale=0.5), pyro.poutine.scale(guide, scale=0.5), read


PAIRS = [methods, closures, leaves, store, pyro_modules, handled]
FAST = {"lr": 0.03, "schedule": "cosine", "batch_size": 100, "epochs": 60}


def at_optimum(read, tolerance=0.06):
    """Adam's last steps are of lr / 100 = 3e-4 each: what is left is curvature and noise, well below the tolerance."""
    assert read() == pytest.approx(OPTIMUM, abs=tolerance)


@pytest.mark.parametrize("make", PAIRS, ids=lambda f: f.__name__)
def test_every_kind_of_pair_reaches_the_optimum(make):
    model, guide, read = make()
    stored, state = dict(pyro.get_param_store()), torch.get_rng_state()
    result = pv.fit(model, guide, X, objective=pv.ELBO(5), **FAST)
    at_optimum(read)
    if make is not handled:
        assert result.history[-1]["bound"] == pytest.approx(BEST, abs=0.05)
    assert torch.equal(torch.get_rng_state(), state)
    if make not in (store, pyro_modules):
        assert dict(pyro.get_param_store()) == stored == {}


OBJECTIVES = {
    "IWAE": lambda: pv.IWAE(5, gradient="dreg"),
    "Trace": lambda: infer.Trace_ELBO(5, vectorize_particles=True),
    "TraceMeanField": lambda: infer.TraceMeanField_ELBO(5, vectorize_particles=True),
    "Renyi": lambda: infer.RenyiELBO(0.5, num_particles=5, vectorize_particles=True),
    "TraceGraph": lambda: infer.TraceGraph_ELBO(5, vectorize_particles=True),
    "ReweightedWakeSleep": lambda: infer.ReweightedWakeSleep(10, vectorize_particles=True),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_any_elbo_is_an_objective(name):
    model, guide, read = methods()
    objective = OBJECTIVES[name]()
    before = dict(vars(objective))
    result = pv.fit(model, guide, X, objective=objective, validation=X, **FAST)
    at_optimum(read, 0.12 if name == "ReweightedWakeSleep" else 0.06)
    assert vars(objective) == before
    assert result.history[-1]["bound"] == pytest.approx(BEST, abs=0.06)
    assert result.history[-1]["validation_bound"] == pytest.approx(BEST, abs=0.06)
    assert isinstance(result.history[-1]["validation_bound"], float)  # a tensor of Pyro's would keep its device


@pytest.mark.parametrize(
    "objective",
    [infer.TraceEnum_ELBO(max_plate_nesting=1), pv.ELBO(), pv.IWAE(2)],
    ids=lambda objective: type(objective).__name__,
)
def test_enumerated_latents_train_with_any_objective(objective):
    data = torch.cat([torch.full((300,), -1.0), torch.full((100,), 1.0)]) + 0.3 * _quantiles
    logit = torch.zeros((), requires_grad=True)

    model = config_enumerate(model_of(lambda c: dist.Normal(2 * c - 1, 0.3), lambda x: dist.Bernoulli(logits=logit)))

    result = pv.fit(model, lambda x: None, data, objective=objective, epochs=40, lr=0.1, compile=False)
    assert logit.sigmoid().item() == pytest.approx(0.25, abs=0.03)
    with torch.no_grad():
        each = [dist.Normal(m, 0.3).log_prob(data) for m in (-1.0, 1.0)]
        exact = torch.logaddexp(each[0] + (-logit.sigmoid()).log1p(), each[1] + logit.sigmoid().log()).mean().item()
    assert result.history[-1]["bound"] == pytest.approx(exact, abs=0.01)
    assert result.history[-1]["kl_per_unit"] == {}


def test_autoguides_of_global_and_of_local_latents():
    def shared(x):
        w = pyro.sample("w", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(X), subsample=torch.arange(len(x))):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    guide = autoguide.AutoNormal(shared, init_scale=0.3)
    result = pv.fit(shared, guide, X, objective=pv.ELBO(5), lr=0.1, schedule="cosine", epochs=60)
    precision = 400 + 0.01
    assert guide.locs.w.item() == pytest.approx(400 * 0.5 / precision, abs=0.02)
    assert guide.scales.w.item() == pytest.approx(precision**-0.5, rel=0.2)
    assert result.history[-1]["kl"] * 400 > 1  # per datum, of one latent that all share

    local = model_of(lambda z: dist.Normal(z, 1.0), lambda x: dist.Normal(torch.zeros(len(x)), 1.0))

    guide = autoguide.AutoNormal(local, init_scale=0.5)
    result = pv.fit(local, guide, X, objective=pv.ELBO(5), lr=0.1, schedule="cosine", epochs=150, batch_size=400)
    assert (guide.locs.z - X / 2).square().mean().sqrt() < 0.1  # in shuffled order it would be .56
    assert result.history[-1]["kl"] == pytest.approx(0.284, abs=0.1)  # (.5 + mean x^2 / 4 - 1 + log 2) / 2


# --- one step by hand ------------------------------------------------------------------------------------------------

DATA = torch.tensor([1.0, 2.0, 4.0, 8.0, -1.0, 0.5, 3.0, 2.5, 6.0, 7.0])
PLATES = {
    "len(x)": lambda x: pyro.plate("data", len(x)),
    "subsample": lambda x: pyro.plate("data", 10, subsample=torch.arange(len(x))),
    "subsample_size": lambda x: pyro.plate("data", 10, subsample_size=len(x)),
}
BY_HAND = {k: v for k, v in OBJECTIVES.items() if k != "ReweightedWakeSleep"} | {"ELBO": lambda: pv.ELBO(3)}


@pytest.mark.parametrize("plate", PLATES)
@pytest.mark.parametrize("name", BY_HAND)
def test_a_step_descends_the_loss_per_datum(name, plate):
    """x ~ N(mu, 1): the gradient per datum is mu - mean(batch), the last batch of 2 included; nothing is random."""
    mu = torch.tensor(0.0, requires_grad=True)

    def model(x):
        with PLATES[plate](x):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    loader = DataLoader(TensorDataset(DATA), batch_size=4)
    result = pv.fit(
        model, lambda x: None, loader, objective=BY_HAND[name](), epochs=2, validation=loader,
        optimizer=lambda parameters: SGD(parameters, lr=0.25),
    )  # fmt: skip
    expected, bounds = 0.0, []
    for _ in range(2):
        total = 0.0
        for batch in DATA.split(4):
            total += dist.Normal(expected, 1.0).log_prob(batch).sum().item()
            expected -= 0.25 * (expected - batch.mean().item())
        bounds.append(total / 10)
    assert mu.item() == pytest.approx(expected, rel=1e-5)
    assert [row["bound"] for row in result.history] == pytest.approx(bounds, rel=1e-5)
    validated = dist.Normal(expected, 1.0).log_prob(DATA).mean().item()
    assert result.history[-1]["validation_bound"] == pytest.approx(validated, rel=1e-5)
    assert result.history[-1]["grad_norm"] == pytest.approx(abs(expected - 6.5) / 0.75, rel=1e-4)


def shift_model(parameter):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(parameter, 1.0), obs=x)

    return model


@pytest.mark.parametrize("objective", [pv.ELBO(), infer.RenyiELBO(num_particles=2)])
def test_clipping_bounds_the_step(objective):
    mu = torch.tensor(0.0, requires_grad=True)
    result = pv.fit(
        shift_model(mu), lambda x: None, DATA, objective=objective, epochs=3, clip_norm=0.1,
        optimizer=lambda parameters: SGD(parameters, lr=1.0),
    )  # fmt: skip
    assert mu.item() == pytest.approx(0.3, rel=1e-4)
    assert result.history[-1]["grad_norm"] == pytest.approx(0.1, rel=1e-4)


def test_parameters_outside_the_optimizer_stay_and_do_not_count():
    pair = Methods()
    result = pv.fit(
        pair.model, pair.guide, X, objective=infer.RenyiELBO(num_particles=2, vectorize_particles=True), epochs=3,
        optimizer=lambda parameters: SGD([p for p in parameters if p is pair.a], lr=0.1), clip_norm=1e-3,
    )  # fmt: skip
    assert pair.read() | {"a": 0.0} == START
    assert pair.a.item() == pytest.approx(12 * 0.1 * 1e-3, rel=1e-3)  # 12 steps, each clipped by its own gradient alone
    assert result.history[-1]["grad_norm"] == pytest.approx(1e-3, rel=1e-3)


# --- data ------------------------------------------------------------------------------------------------------------


SOURCES = {
    "tensor": (X, {}),
    "array": (X.numpy(), {}),
    "Images": (pv.data.Images(X), {}),
    "TensorDataset": (TensorDataset(X), {}),
    "Dataset": (Rows(X), {"num_workers": 0}),
    "Dataset, worker": (Rows(X), {"num_workers": 1}),
    "DataLoader": (DataLoader(TensorDataset(X), batch_size=100, shuffle=True), {}),
    "labelled": ((X, torch.arange(400)), {}),
    "pairs": ((X, X.unsqueeze(1)), {"num_workers": 0}),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_kind_of_data_trains(source):
    data, options = SOURCES[source]
    mu = torch.tensor(0.0, requires_grad=True)

    def model(x, *more):
        assert all(len(m) == len(x) for m in more)
        shift_model(mu)(x)

    before = torch.get_rng_state()
    result = pv.fit(
        model, lambda x, *more: None, data, objective=pv.ELBO(), epochs=3, batch_size=100,
        optimizer=lambda parameters: SGD(parameters, lr=0.3), **options,
    )  # fmt: skip
    assert mu.item() == pytest.approx(0.5, abs=0.3)
    assert mu.item() != 0
    assert result.timings["steps"] == 12
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.full((30, 4), 255.0), r"data\[0, 0\] = 255.*rescale"),
        (torch.eye(4) - 0.5, r"data\[0, 0\] = 0.5"),
        (torch.cat([torch.zeros(29, 4), torch.full((1, 4), -1.0)]), r"data\[29, 0\] = -1"),
        (torch.cat([torch.zeros(29, 4), torch.full((1, 4), 0.5)]), r"data\[29, 0\] = 0.5.*binarization"),
        (torch.cat([torch.zeros(29, 4), torch.full((1, 4), math.nan)]), r"\[29, 0\] = nan"),
        (torch.zeros(0, 4), "at least one"),
    ],
)
def test_data_outside_the_support_are_named(x, match):
    vae = pv.models.VAE((4,), latent_dim=1, hidden=())
    arguments = {"objective": pv.ELBO(), "epochs": 1, "batch_size": 10}
    with pytest.raises(DataError, match=match):
        pv.fit(vae.model, vae.guide, x, **arguments)
    if len(x):
        with pytest.raises(DataError, match=match):
            pv.fit(vae.model, vae.guide, torch.zeros(20, 4), validation=x, **arguments)
        with pytest.raises(DataError):
            pv.fit(vae.model, vae.guide, DataLoader(list(x), batch_size=len(x)), **arguments)


def test_the_monitor_changes_nothing(monkeypatch):
    def trained():
        torch.manual_seed(0)
        vae = pv.models.VAE((4,), latent_dim=2, hidden=(3,))
        data = pv.data.Images(torch.rand(50, 4, generator=torch.Generator().manual_seed(1)), binarization="dynamic")
        result = pv.fit(vae.model, vae.guide, data, objective=pv.IWAE(3), epochs=3, batch_size=20)
        return vae.state_dict(), result

    weights, result = trained()
    row = result.history[-1]
    assert len(row["kl_per_unit"]["z"]) == 2
    assert row["kl"] == pytest.approx(sum(row["kl_per_unit"]["z"]))
    assert row["active_units"]["z"] in (0, 1, 2)
    monkeypatch.setattr(Monitor, "__init__", lambda self, *args: None)
    monkeypatch.setattr(Monitor, "__call__", lambda self: {})
    without, result = trained()
    assert result.history[-1].keys() & {"kl", "reconstruction"} == set()
    assert all(torch.equal(weights[name], without[name]) for name in weights)


def test_the_monitor_runs_a_pair_once():
    """After each epoch the guide runs once for KL and active units together."""

    class Counted(pv.models.VAE):
        def guide(self, x):
            runs.append(self.training)
            super().guide(x)

    numbers = {}
    for epochs in (1, 3):
        runs: list[bool] = []
        vae, x = Counted((4,), latent_dim=2, hidden=(3,)), (torch.rand(50, 4) > 0.5).float()
        row = pv.fit(vae.model, vae.guide, x, objective=pv.ELBO(), epochs=epochs, compile=False).history[-1]
        assert row["active_units"]["z"] == pv.active_units(vae.guide, x)["z"].count
        numbers[epochs] = runs.count(False)
    assert numbers[3] == numbers[1] + 2


@pytest.mark.parametrize("objective", [pv.ELBO(), pv.IWAE(3), infer.Trace_ELBO()])
def test_pyros_own_checks_are_made_before_the_first_step(objective):
    scale = torch.nn.Parameter(torch.tensor(-1.0))

    model = model_of(lambda z: dist.Normal(z, 1.0))
    guide = guide_of(lambda x: dist.Normal(x, scale))

    with pytest.raises(ValueError, match="Expected parameter scale"):
        pv.fit(model, guide, torch.zeros(20), objective=objective, epochs=1)
    assert scale.item() == -1.0


def shared_mean(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("data", 300, subsample_size=len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0).to_event(1), obs=x)


def mean_guide(x):
    pyro.sample("mu", dist.Normal(pyro.param("m", torch.zeros(4)), 1.0).to_event(1))


def test_a_pair_is_checked_with_the_particles_it_begins_with():
    options = {"epochs": 1, "batch_size": 10, "compile": False}
    with pytest.raises(ValueError, match="IWAE with 5 particles cannot subsample"):
        pv.fit(shared_mean, mean_guide, torch.zeros(30, 4), objective=pv.IWAE(1), particles=(5,), **options)
    assert pv.fit(shared_mean, mean_guide, torch.zeros(30, 4), objective=pv.IWAE(5), particles=(1,), **options).history


@pytest.mark.parametrize("objective", [pv.ELBO(), infer.Trace_ELBO()])
def test_a_guide_made_for_one_batch_size_trains_without_its_units_being_logged(objective):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.warns(UserWarning, match="KL and active units will not be logged") as caught:
        result = pv.fit(
            model, autoguide.AutoNormal(model), torch.zeros(30), objective=objective, epochs=2, batch_size=10
        )
    assert [w.filename for w in caught if "active units" in str(w.message)] == [__file__]
    assert [("kl" in row, "bound" in row) for row in result.history] == [(False, True)] * 2


def test_latents_of_sequential_plates_belong_to_their_data(recwarn):
    def model(x):
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])

    def guide(x):
        m = pyro.param("m", torch.tensor(0.0))
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z{i}", dist.Normal(m, 1.0))

    pv.fit(model, guide, torch.zeros(10), objective=pv.ELBO(), epochs=1, batch_size=5)
    assert not [w for w in recwarn if "outside the data plate" in str(w.message)]


@pytest.mark.parametrize(("objective", "names"), [(pv.ELBO(), 'model site "z": '), (infer.Trace_ELBO(), 'site "z": ')])
def test_draws_outside_a_priors_support_are_refused_by_the_sites_name(objective, names):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Exponential(1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(-5.0)), 1.0))

    with warnings.catch_warnings(action="ignore"), pytest.raises(ValueError, match=names):
        pv.fit(model, guide, torch.zeros(20), objective=objective, epochs=1)


def test_replicas_stop_at_an_infinite_loss():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("never", x - math.inf)

    def pair():
        m = nn.Parameter(torch.tensor(0.0))

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(m * x, 1.0))

        return model, guide

    with pytest.raises(FloatingPointError, match=r'replica 0: step 1 .*"never" is -inf in all rows'):
        pv.fit_replicas([pair(), pair()], torch.zeros(20), objective=pv.ELBO(), epochs=1)


def test_a_program_that_holds_its_data_takes_none(tmp_path):
    x = torch.tensor([0.4, 1.9, 0.7])

    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide():
        loc, scale = (pyro.param(name, torch.tensor(start)) for name, start in (("loc", 0.0), ("log_scale", 0.0)))
        pyro.sample("mean", dist.Normal(loc, scale.exp()))

    options = {"objective": pv.IWAE(10), "lr": 0.05, "validation": (), "run_dir": tmp_path / "run", "compile": False}
    pv.fit(model, guide, (), epochs=60, **options)
    result = pv.fit(model, guide, (), epochs=120, resume=True, **options)
    exact = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1).log_prob(x)
    assert abs(result.history[-1]["validation_bound"] - exact) < 0.05
    assert abs(pv.log_likelihood(model, guide, num_samples=500, seed=0).log_prob - exact) < 0.01
