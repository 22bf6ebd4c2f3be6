"""Compiled training steps: equal to the eager ones on the same noise, refused where they would not be, never silent.

Every objective meets every pair with ``PYROVAE_FULL=1`` (six minutes); else each meets one of the others in turn.
"""

import math
import os
import re
import warnings
from contextlib import ExitStack, nullcontext
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pyro
import pyro.distributions as dist
import pyro.infer as infer
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.distributions import constraints
from torch.utils.data import DataLoader

import pyrovae as pv
from pyrovae.compile import checked, inductor
from pyrovae.compile import graph as graphs
from pyrovae.compile.checked import Checked, tensors, untouched
from pyrovae.compile.inductor import has_compiler
from pyrovae.compile.noise import CannotCompile, rewritten
from pyrovae.compile.recording import options
from pyrovae.data.feed import Feed
from pyrovae.engine.probe import look
from pyrovae.engine.programs import in_modes, training_modes
from pyrovae.engine.randomness import isolated_rng
from pyrovae.models import CodePrior
from pyrovae.train import compiled as compiling
from pyrovae.train import loop
from pyrovae.train import step as stepping
from pyrovae.train.compiled import Compiled, worthwhile
from pyrovae.train.plan import Plan
from pyrovae.train.replicas import Batched
from pyrovae.train.step import Eager, Recorded, Step
from tests import training
from tests.laws.objectives import OBJECTIVES
from tests.pairs import Noisy, model_of, units
from tests.state import counting, double_precision
from tests.zoo import ZOO

pytestmark = pytest.mark.double(41)

GREY = torch.rand(55, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
X = torch.bernoulli(GREY[:7], generator=torch.Generator().manual_seed(1))


# --- pairs -----------------------------------------------------------------------------------------------------------


class Pair(Noisy):
    """And a parameter that no program uses."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(2))


class TwoLayers(nn.Module):
    """The guide's second layer hangs on its first through dropout: dreg and stl run it again, on the same noise."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 2), nn.Sequential(nn.Linear(2, 5), nn.Dropout(0.4), nn.Linear(5, 2))
        self.decoder = nn.Sequential(nn.Linear(2, 5), nn.Dropout(0.4), nn.Linear(5, 6))
        self.prior = nn.Linear(2, 2)

    def model(self, x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            z = pyro.sample("z", dist.Normal(self.prior(u), 0.7).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.first(x), 0.8).to_event(1))
            pyro.sample("u", dist.Normal(self.second(z), 0.9).to_event(1))


class Belief(nn.Module):
    """Discrete latents: bits, and a class."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder, self.classes = nn.Linear(6, 3), nn.Linear(3, 6), nn.Linear(6, 4)
        self.offsets = nn.Parameter(torch.randn(4, 6))

    def model(self, x):
        with pyro.plate("data", len(x)):
            bits = pyro.sample("bits", dist.Bernoulli(logits=x.new_zeros(3)).to_event(1))
            c = pyro.sample("c", dist.Categorical(logits=x.new_zeros(4)))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(bits) + self.offsets[c]).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("bits", dist.Bernoulli(logits=self.encoder(x)).to_event(1))
            pyro.sample("c", dist.Categorical(logits=self.classes(x)))


class Clusters(nn.Module):
    """A class that is summed out, and two bits that hang on it."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder, self.offsets = nn.Linear(6, 2), nn.Linear(2, 6), nn.Parameter(torch.randn(4, 6))
        self.centres, self.logits = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(4, 2))

    def model(self, x):
        summed = {"infer": {"enumerate": "parallel"}}
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=x.new_zeros(4)), **summed)
            z = pyro.sample("z", dist.Normal(self.centres[c], 1.0).to_event(1))
            one, other = (pyro.sample(f"b{t}", dist.Bernoulli(logits=self.logits[c, t]), **summed) for t in range(2))
            loc = self.decoder(z) + self.offsets[c] * (one - 2 * other).unsqueeze(-1)
            pyro.sample("x", dist.Bernoulli(logits=loc).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 0.8).to_event(1))


class Skewed(nn.Module):
    """Latents whose samplers reject: positive ones, proportions, and one with heavy tails."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 8), nn.Linear(7, 6)

    def model(self, x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(x.new_ones(2), 1.0).to_event(1))
            share = pyro.sample("share", dist.Dirichlet(x.new_ones(3)))
            part = pyro.sample("part", dist.Beta(2.0, x.new_ones(1)).to_event(1))
            far = pyro.sample("far", dist.StudentT(3.0, x.new_zeros(1), 1.0).to_event(1))
            logits = self.decoder(torch.cat([rate, share, part, far], -1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x):
        one, other = self.encoder(x).exp().split([3, 5], -1)
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Gamma(one[..., :2], 1.0 + other[..., :2]).to_event(1))
            pyro.sample("share", dist.Dirichlet(one + 0.2))
            pyro.sample("part", dist.Beta(other[..., 2:3], other[..., 3:4]).to_event(1))
            pyro.sample("far", dist.StudentT(4.0 + one[..., :1], x[..., :1], other[..., 4:]).to_event(1))


class Turning(nn.Module):
    """An angle and a count, of which no draw has a derivative."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 3), nn.Linear(3, 6)

    def model(self, x):
        with pyro.plate("data", len(x)):
            angle = pyro.sample("angle", dist.VonMises(x.new_zeros(()), 0.1))
            count = pyro.sample("count", dist.Poisson(x.new_ones(())))
            logits = self.decoder(torch.stack([angle.cos(), angle.sin(), count], -1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x):
        loc, concentration, rate = self.encoder(x).unbind(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("angle", dist.VonMises(loc, concentration.exp()))
            pyro.sample("count", dist.Poisson(rate.exp()))


def plain_functions():
    """Nothing but pyro.param, constrained and not, and a subsampled plate."""

    def model(x):
        w = pyro.param("w", lambda: torch.randn(2, 6))
        scale = pyro.param("scale", lambda: torch.tensor(0.8), constraint=constraints.positive)
        with pyro.plate("data", 50, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), scale).to_event(1))
            pyro.sample("x", dist.Normal(z @ w, 0.5).to_event(1), obs=x)

    def guide(x):
        m = pyro.param("m", lambda: torch.randn(6, 2))
        with pyro.plate("data", 50, subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Normal(x @ m, 0.6).to_event(1))

    return model, guide


def autoguide():
    decoder = nn.Linear(2, 6)

    model = model_of(lambda z: dist.Bernoulli(logits=decoder(z)).to_event(1), units(2))

    return model, AutoNormal(model, init_scale=0.5)


OWN = {
    "modules": Pair, "two layers": TwoLayers, "discrete": Belief, "pyro.param": plain_functions, "autoguide": autoguide,
    "enumerated": Clusters, "skewed": Skewed, "turning": Turning,
}  # fmt: skip
VARIANTS = {variant.name: variant for variant in ZOO if variant.brief}
PAIRS = [*VARIANTS, *OWN]
LAYERED = [  # whose draws hang on others, or on flows: what is taken apart at fixed draws
    "vae, flow", "vae, iaf", "vae, prior vamp", *(pair for pair in VARIANTS if "hierarchical" in pair), "two layers",
    "autoguide",
]  # fmt: skip


MORE = [  # besides the rows of the laws
    pv.ELBO(1, free_bits=0.3), pv.ELBO(3, free_bits=0.3, kl_weight=0.5), pv.IWAE(3, fold_particles=True),
    pv.IWAE(3, gradient="dreg", fold_particles=True), pv.ELBO(3, free_bits=0.3, fold_particles=True),
    pv.RWS(3), pv.RWS(3, gradient="dreg"), pv.TVO(3), pv.SleepPhi(),
]  # fmt: skip
ALL = [*(row.objective() for row in OBJECTIVES), *MORE]
WITH_LAYERS = pv.IWAE(3, gradient="dreg")  # runs most of what there is
WITH_CODES = pv.ELBO(1)


def codes(pair):
    return pair in VARIANTS and VARIANTS[pair].codes


def plain(pair):
    """Whether one objective is as good as another: point masses, or no latents."""
    return codes(pair) or pair in ("rbm", "code_prior")


def possible(objective, pair):
    if getattr(objective, "free_bits", 0) and (pair == "autoguide" or codes(pair)):
        return False  # its sites are point masses
    if codes(pair) and (objective.needs.fixed or isinstance(objective, pv.SleepPhi)):
        return False  # "log q at fixed z", and data of the model's own, have no meaning for them
    if pair in ("rbm", "code_prior") and isinstance(objective, pv.SleepPhi):
        return False  # its guide draws nothing
    if pair in ("discrete", "turning") and (objective.gradient != "total" or objective.fold_particles):
        return False
    # Folded particles are repeated data, which an autoguide has no parameters for and a subsample no place.
    return not (objective.fold_particles and pair in ("autoguide", "pyro.param"))


def meetings():
    """(objective, pair): all of them, or a sample in which every objective and every pair comes up."""
    if os.environ.get("PYROVAE_FULL"):
        return [(o, p) for o in ALL for p in PAIRS if possible(o, p)]
    kinds = {(type(o), o.gradient, o.kl_weight, o.likelihood_weight, o.fold_particles): o for o in ALL}.values()
    chosen, waiting = [(WITH_LAYERS, p) for p in LAYERED], [p for p in PAIRS if not plain(p) and p not in LAYERED]
    for objective in kinds:
        pair = next((p for p in waiting if possible(objective, p)), "vae")
        chosen.append((objective, pair))
        waiting = [*(p for p in waiting if p != pair), pair]  # the next time it is the last to be asked
    chosen += [(WITH_CODES, p) for p in PAIRS if plain(p)]
    assert {p for _, p in chosen} == set(PAIRS)
    return chosen


def eager_of(name):
    """The eager gradients of a pair on the data that suit it."""
    pair = VARIANTS[name].make() if name in VARIANTS else OWN[name]()
    model, guide = pair if isinstance(pair, tuple) else (pair.model, pair.guide)
    batch = VARIANTS[name].batch() if name in VARIANTS else (X,)
    return Eager(model, guide, look(model, guide, batch, validate=False), batch)


def training_mode(eager):
    return in_modes(training_modes(*eager.state.modules))


def state_of(eager):
    return [t.detach().clone() for t in eager.state.tensors.values()]


def restore(eager, state):
    with torch.no_grad():
        for tensor, value in zip(eager.state.tensors.values(), state, strict=True):
            tensor.copy_(value)


def outcome(eager, gradients, objective, seed=1):
    """Loss, gradients, and what became of the pair's tensors, from one state of generator and pair."""
    before = state_of(eager)
    with isolated_rng(seed), training_mode(eager), pyro.validation_enabled(False):
        loss, _ = gradients(objective, eager.example)
        after = torch.get_rng_state()
    found = [None if p.grad is None else p.grad.clone() for p in eager.parameters]
    changed = state_of(eager)
    restore(eager, before)
    return [loss, *found], changed, after


def assert_equal(eager, other, *, none_is_zero=False, **tolerance):
    (results, state, generator), (got, then, there) = eager, other
    tolerance = {"rtol": 1e-9, "atol": 1e-11} | tolerance
    assert all(r is None for r, g in zip(results, got, strict=True) if g is None)
    assert none_is_zero or all(g is None for r, g in zip(results, got, strict=True) if r is None)
    for expected, found in zip(results, got, strict=True):
        if expected is not None:
            torch.testing.assert_close(found, expected, **tolerance)
        elif found is not None:
            assert not found.any()
    torch.testing.assert_close(then, state, **tolerance)
    assert torch.equal(generator, there)
    assert any(g is not None and g.abs().sum() > 0 for g in got[1:])


def eager_outcome(eager, objective):
    with rewritten():
        return outcome(eager, eager, objective)


@pytest.mark.parametrize(("objective", "pair"), meetings(), ids=repr)
def test_the_captured_step_is_the_eager_one_on_the_same_noise(objective, pair, monkeypatch):
    """Loss, every gradient, every buffer and the generator; captured once only, which is half the time."""
    monkeypatch.setattr(checked, "capture", graphs.capture_once)
    eager = eager_of(pair)
    expected = eager_outcome(eager, objective)
    with training_mode(eager):
        function, parameters = Compiled(eager).differentiated(objective)
        graph = function.capture(eager.example).graph

    def gradients(objective, batch):
        loss, left_out, *found = graph(*function.state, *tensors(batch))
        for parameter in eager.parameters:
            parameter.grad = None
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        return loss, left_out

    assert_equal(expected, outcome(eager, gradients, objective))


COMPILED = [
    ("vae, convolutions", pv.ELBO(2, free_bits=0.3)),
    ("two layers", pv.IWAE(3, gradient="dreg")),
    ("discrete", pv.VIMCO(3)),
    ("skewed", pv.ELBO()),
]


@pytest.mark.parametrize(("pair", "objective"), COMPILED, ids=repr)
def test_the_compiled_step_is_the_eager_one_on_the_same_noise(pair, objective):
    eager = eager_of(pair)
    compiled = Compiled(eager)
    expected = eager_outcome(eager, objective)
    with training_mode(eager), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled.static(objective) is not None
    assert_equal(expected, outcome(eager, compiled, objective))
    assert compiled.kind == "compiled"
    assert compiled.compile_seconds > 0


@pytest.mark.parametrize(
    "objective", [pv.IWAE(3, gradient="dreg"), pv.ELBO(free_bits=0.3, likelihood_weight=2.0)], ids=repr
)
def test_a_weight_of_the_kl_that_is_annealed_needs_no_other_graph(objective, interpreted):
    eager = eager_of("two layers")
    compiled = Compiled(eager, anneals=True)
    for kl_weight in (0.0, 0.3, 1.0):
        objective.kl_weight = kl_weight
        expected = eager_outcome(eager, objective)
        assert_equal(expected, outcome(eager, compiled, objective), none_is_zero=kl_weight == 0)
    assert len(interpreted) == 1


def test_a_weight_of_ones_own_is_read_as_it_is_at_every_step(interpreted):
    kl_weight = torch.tensor(0.2)
    objective = pv.IWAE(3, kl_weight=kl_weight)
    eager = eager_of("vae")
    compiled = Compiled(eager)
    for value in (0.2, 0.9):
        kl_weight.fill_(value)
        expected = eager_outcome(eager, objective)
        assert_equal(expected, outcome(eager, compiled, objective))
    assert len(interpreted) == 1


def test_the_replayed_dropout_of_a_guide_that_runs_again_is_drawn_once():
    objective = pv.IWAE(3, gradient="dreg")
    eager = eager_of("two layers")
    with training_mode(eager):
        graph = Compiled(eager).differentiated(objective)[0].capture(eager.example).graph
    draws = [tuple(noise.shape) for noise in graph.noise()]
    assert sorted(draws) == sorted([(3, 7, 2), (3, 7, 2), (3, 7, 5), (3, 7, 5)])  # z, u, a dropout each


@pytest.mark.parametrize("pair", ["modules", "discrete"])
def test_the_check_before_the_first_step_leaves_no_trace(pair, interpreted):
    objective = pv.ELBO(2)
    eager = eager_of(pair)
    before, state = state_of(eager), torch.get_rng_state()
    with training_mode(eager):
        assert Compiled(eager).static(objective) is not None
    assert len(interpreted) == 1
    assert all(map(torch.equal, state_of(eager), before))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in eager.parameters)


# --- whole trainings -------------------------------------------------------------------------------------------------

SETTINGS = training.SETTINGS | {"lr": 1e-2}


def train(make=Pair, data=None, **options):
    """Train from the same start; warnings of compilation are errors."""
    torch.manual_seed(5)
    pair = make()
    data = pv.data.Images(GREY, binarization="dynamic") if data is None else data
    with warnings.catch_warnings():
        if options.get("compile"):
            warnings.filterwarnings("error", "cannot compile")
        result = pv.fit(pair.model, pair.guide, data, **(SETTINGS | options))
    return pair, result


def assert_same(one, other, **tolerance):
    (pair, result), (there, again) = one, other
    for row, theirs in zip(training.rows(result.history), training.rows(again.history), strict=True):
        assert row.keys() == theirs.keys()
        for key, value in row.items():
            if isinstance(value, float):
                assert theirs[key] == pytest.approx(value, rel=tolerance.get("rtol", 0), abs=tolerance.get("atol", 0))
    torch.testing.assert_close(there.state_dict(), pair.state_dict(), **{"rtol": 0, "atol": 0} | tolerance)


@pytest.fixture(scope="module")
def compiled():
    """A compiled training through Inductor, with the number of its compilations."""
    with double_precision(41), pytest.MonkeyPatch.context() as patch:
        made = counting(patch, inductor.through_inductor)
        yield train(compile=True), made


def test_a_compiled_training_is_the_eager_one(compiled):
    """Epoch by epoch: stages of particles, warm-up, schedule, clipping, BatchNorm, dropout and an odd last batch."""
    assert_same(train(compile=False), compiled[0], rtol=1e-8, atol=1e-10)


def test_one_graph_for_each_number_of_particles_serves_all_rates_and_weights(compiled):
    (_, result), made = compiled
    assert len(made) == 2
    assert len({row["kl_weight"] for row in result.history}) > 2
    assert len({row["learning_rate"] for row in result.history}) == 4
    assert result.timings["path"] == "compiled"
    assert result.timings["compile_seconds"] > 0
    assert result.timings["precision"] == "float32"


def test_an_equal_pair_and_the_pair_itself_share_the_compilation(compiled):
    (pair, _), made = compiled
    assert_same(compiled[0], train(compile=True))
    state = {k: v.clone() for k, v in pair.state_dict().items()}
    pv.fit(pair.model, pair.guide, pv.data.Images(GREY, binarization="dynamic"), **SETTINGS | {"compile": True})
    pair.load_state_dict(state)
    assert len(made) == 2


@pytest.mark.parametrize(("epoch", "compile"), [(1, True), (3, True), (1, False)])
def test_a_compiled_run_that_was_killed_ends_with_the_same_bits(compiled, epoch, compile, tmp_path):
    """In either stage of particles; where it goes on eagerly, to rounding."""
    training.dying_at(loop, "run_epoch", epoch + 1, lambda: train(compile=True, run_dir=tmp_path))
    torch.rand(7)
    resumed = train(compile=compile, run_dir=tmp_path, resume=True)
    assert resumed[1].timings["path"] == ("compiled" if compile else "eager")
    assert_same(compiled[0], resumed, **{} if compile else {"rtol": 1e-8, "atol": 1e-10})
    loaded = pv.load(tmp_path, pair=Pair())
    torch.testing.assert_close(loaded.state_dict(), resumed[0].state_dict(), rtol=0, atol=0)


def test_the_global_generator_is_left_as_it_was(interpreted):
    pair, state = Pair(), torch.get_rng_state()
    pv.fit(pair.model, pair.guide, GREY.round(), **SETTINGS | {"compile": True})
    assert len(interpreted) == 2
    assert torch.equal(torch.get_rng_state(), state)


def test_parameters_that_only_the_kl_reaches_warm_up_as_eagerly(interpreted):
    """At weight 0 they have no gradient: an optimizer passes them over, where a gradient of zero would be a step."""
    options = {"clip_norm": None, "particles": None}
    assert_same(*(train(TwoLayers, compile=how, **options) for how in (False, True)), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("make", [Skewed, Turning])
def test_what_samplers_reject_for_trains_and_is_measured_compiled(make, interpreted):
    """log p(x) at |z| < 6 of the eager one; as good a bound as eagerly, where other noise moves it by .1 or so."""
    data = GREY.round()
    options = {"data": data, "particles": None, "kl_warmup": 0, "epochs": 40, "lr": 2e-2, "clip_norm": 1.0}
    (_, eager), (pair, result) = (train(make, objective=pv.ELBO(5), compile=how, **options) for how in (False, True))
    assert result.timings["path"] == "compiled"
    bounds = [[row["bound"] for row in found.history] for found in (eager, result)]
    assert bounds[1][-1] > bounds[1][0] + 0.3
    assert abs(bounds[0][-1] - bounds[1][-1]) < 0.4
    found = [
        pv.log_likelihood(pair.model, pair.guide, data, num_samples=2000, chunk_size=500, seed=1, compile=how)
        for how in (False, True)
    ]
    assert found[1].path == "compiled"
    error = (found[0].std_error ** 2 + found[1].std_error ** 2).sqrt()
    assert ((found[0].log_prob - found[1].log_prob).abs() < 6 * error).all()


def test_gradients_lie_as_their_parameters_do(interpreted):
    """In float32 those of convolutions come channels last, which the fused optimizer would read in another order."""
    data = torch.arange(300).view(-1, 2, 3) % 5
    options = {"data": data.float(), "objective": pv.ELBO(), "particles": None}
    trained = (train(lambda: CodePrior((2, 3), 5, 4, 2).float(), compile=how, **options) for how in (False, True))
    assert_same(*trained, rtol=1e-4, atol=1e-6)


def test_batches_may_be_tuples(interpreted):
    class Labelled(Pair):
        def model(self, x, y):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)
                pyro.sample("y", dist.Categorical(logits=z * self.unused), obs=y)

        def guide(self, x, y):
            super().guide(x * (1 + y[:, None]))

    data = (GREY.round(), torch.arange(55) % 2)
    results = [train(Labelled, data, compile=how) for how in (False, True)]
    assert_same(*results, rtol=1e-9, atol=1e-11)
    assert results[1][1].timings["path"] == "compiled"
    assert results[1][0].unused.abs().sum() > 0


def test_any_optimizer_moves_the_parameters(interpreted):
    options = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), "lr": None, "particles": None}
    assert_same(*(train(compile=how, **options) for how in (False, True)), rtol=1e-9, atol=1e-11)


# --- what is not compiled, and says so -------------------------------------------------------------------------------


class Branching(Pair):
    def guide(self, x):
        super().guide(x if x.sum() > 0 else -x)


class Drawing(Pair):
    def guide(self, x):
        import numpy as np

        super().guide(x * np.random.uniform(0.5, 1.5))


class Replacing(Pair):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def guide(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        super().guide(x - self.mean)


PLAIN = {"particles": None, "kl_warmup": 0}
SHORT = PLAIN | {"epochs": 1}
FALLBACKS = {
    "control flow": (Branching, PLAIN, r"reads a tensor's value on the host \(\.item\(\), if, float\)"),
    "numpy's generator": (Drawing, PLAIN, "draws from Python's or numpy's generator: draw with torch"),
    "buffer replaced": (Replacing, PLAIN, 'Replacing replaces its buffer "mean": change it in place'),
    "Pyro's ELBO": (Pair, PLAIN | {"objective": infer.Trace_ELBO(2, vectorize_particles=True)}, r"pyrovae\.ELBO can"),
    "Pyro's Renyi": (
        Pair, PLAIN | {"objective": infer.RenyiELBO(0.5, num_particles=2, vectorize_particles=True)},
        r"pyrovae\.Renyi can",
    ),
}  # fmt: skip


def cannot_compile(caught):
    return [str(w.message) for w in caught if "cannot compile" in str(w.message)]


def trained_with_a_warning(make=Pair, **options):
    """A training with compile=True that must warn exactly once, its result, and the warning."""
    torch.manual_seed(5)
    pair = make()
    with pytest.warns(UserWarning, match="cannot compile") as caught:
        result = pv.fit(
            pair.model, pair.guide, pv.data.Images(GREY, binarization="dynamic"),
            **(SETTINGS | {"compile": True} | options),
        )  # fmt: skip
    (message,) = cannot_compile(caught)
    assert message.endswith("; running eagerly")
    assert "\n" not in message
    assert result.timings["path"] == "eager"
    return (pair, result), message


@pytest.mark.parametrize("what", FALLBACKS)
def test_what_cannot_be_compiled_runs_eagerly_after_one_warning(what):
    """To the bits of an eager run: the attempt leaves no trace."""
    make, options, reason = FALLBACKS[what]
    trained, message = trained_with_a_warning(make, **options)
    assert re.search(reason, message)
    assert_same(train(make, compile=False, **options), trained)


def test_one_warning_serves_all_stages_of_particles():
    trained_with_a_warning(Branching, particles=(1, 2, 3, 4))


def test_a_missing_compiler_is_named(monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(inductor, "_compiled", type(inductor._compiled)())
    with config.patch({"cpp.cxx": (None, "/nowhere/g++"), "force_disable_caches": True}):
        assert not has_compiler(torch.device("cpu"))
        trained, message = trained_with_a_warning(**SHORT)
    assert "there is no working C++ compiler: install g++ or clang, or set CXX" in message
    assert_same(train(compile=False, **SHORT), trained)
    assert has_compiler(torch.device("cpu"))


def perturbed(which):
    def wrapped(self):
        def call(*inputs, noise=self.noise):
            results = self(*inputs)
            if which == "buffer":
                next(t for t in inputs if t.shape == (4,) and not t.requires_grad).add_(1e-3)
            elif which == "nan":
                results[-1] = results[-1] * math.nan
            elif which == "count":
                results[1] = results[1] + 1
            elif which == "a small gradient":  # below the norm of all by far, and yet wrong by half
                smallest = min(
                    (i for i in range(2, len(results)) if results[i].norm() > 1e-6), key=lambda i: results[i].norm()
                )
                results[smallest] = results[smallest] * 0.5
            else:
                results[which] = results[which] * (1 + 1e-4)
            return results

        return call

    return wrapped


@pytest.mark.parametrize("which", [0, "count", 2, "a small gradient", "buffer", "nan"])
def test_a_graph_that_computes_something_else_is_refused(which, monkeypatch):
    monkeypatch.setattr(graphs.Graph, "compiled", perturbed(which))
    trained, message = trained_with_a_warning(**SHORT)
    assert "compiled and eager results differ: by" in message
    assert_same(train(compile=False, **SHORT), trained)


def test_what_is_wrong_with_a_pair_is_said_as_ever():
    with pytest.raises(ValueError, match='needs reparameterised sites, but guide site "bits"'):
        train(Belief, GREY.round(), objective=pv.IWAE(2, gradient="stl"), particles=None, compile=True)


def test_sizes_that_go_on_get_a_graph_of_their_own_and_then_a_compiled_one(interpreted, monkeypatch):
    """Each step is the eager one on the same noise, whichever way it is taken; too many sizes run eagerly."""
    monkeypatch.setattr(compiling, "CAPTURED_AFTER", 2)
    monkeypatch.setattr(compiling, "COMPILED_AFTER", 4)
    monkeypatch.setattr(compiling, "SIZES", 2)
    eager = eager_of("discrete")
    compiled, objective, made = Compiled(eager), pv.VIMCO(3), []
    for size in (7, *[3, 5] * 6, 4, 4, 4):
        eager.example = (X[:size],)  # which `outcome` takes
        expected = eager_outcome(eager, objective)
        with rewritten():
            assert_equal(expected, outcome(eager, compiled, objective))
        made.append((len(compiled.functions), len(interpreted)))
    assert made == [(1, 1)] * 5 + [(2, 1)] + [(3, 1)] * 3 + [(4, 2)] + [(5, 3)] * 6
    assert compiled.kind == "compiled"


def test_a_job_that_is_resumed_takes_the_other_sizes_as_it_would_have(interpreted, monkeypatch, tmp_path):
    """What a graph draws is other than what an eager step does, so that both must change at the same step."""
    monkeypatch.setattr(compiling, "CAPTURED_AFTER", 2)

    def job(folder, *epochs):
        torch.manual_seed(3)
        pair = Skewed().float()
        for i, number in enumerate(epochs):
            options = {"objective": pv.ELBO(), "batch_size": 20, "compile": True, "progress": False}
            pv.fit(pair.model, pair.guide, GREY.round().float(), epochs=number, run_dir=folder, resume=i > 0, **options)
        return list(pair.parameters())

    assert_same = partial(torch.testing.assert_close, rtol=0, atol=0)
    whole = job(tmp_path / "whole", 4)
    assert_same(job(tmp_path / "in parts", 1, 4), whole)
    monkeypatch.setattr(compiling, "CAPTURED_AFTER", 9)
    assert any(map(torch.ne, job(tmp_path / "eager", 4)[0].flatten(), whole[0].flatten()))


def test_numbers_are_held_to_those_of_the_first_graph(interpreted):
    """Not to those of a second one, of more particles, before which they changed."""
    eager = eager_of("vae")
    compiled = Compiled(eager)
    compiled.static(pv.ELBO(1))
    eager.state.modules[0].temperature = 0.5
    with pytest.warns(UserWarning, match='temperature" has changed since'):
        assert compiled.static(pv.ELBO(2)) is None
    assert compiled.static(pv.ELBO(1)) is None
    assert compiled.kind == "eager"


class Listed(pv.models.VAE):
    """Tempers its likelihood by a number in a list, where no look at modules finds it."""

    def __init__(self):
        super().__init__((6,), latent_dim=2, hidden=())
        self.numbers = [1.0]

    def model(self, x):
        with pyro.poutine.scale(scale=self.numbers[0]):
            super().model(x)


def test_what_a_program_reads_anywhere_is_seen_after_the_first_epoch(interpreted):
    """Training goes on as if nothing had been compiled."""
    bounds = []
    for compile, told in ((False, nullcontext()), (True, pytest.warns(UserWarning, match="program has changed since"))):
        torch.manual_seed(0)
        pair = Listed()
        with told:
            found = pv.fit(
                pair.model, pair.guide, GREY.round(), objective=pv.IWAE(2), epochs=3, batch_size=20, progress=False,
                compile=compile, on_epoch=lambda _, numbers=pair.numbers: numbers.__setitem__(0, 0.5),
            )  # fmt: skip
        bounds.append([row["bound"] for row in found.history])
        assert found.timings["path"] == "eager"
    assert bounds[0] == pytest.approx(bounds[1])


def test_rounding_that_grows_while_training_is_no_change(interpreted, monkeypatch):
    compiled, objective = Compiled(eager_of("vae")), pv.IWAE(2)
    compiled.look_again()
    function = compiled.static(objective)
    monkeypatch.setattr(checked, "compare", differ := Mock(side_effect=CannotCompile("they differ")))
    compiled.look_again()
    assert compiled.static(objective) is function
    assert differ.call_count == 1


class Holding(Noisy):
    """Takes its data within dicts and lists, new ones at each step."""

    def model(self, batch):
        super().model(batch["parts"][0] + batch["shift"])

    def guide(self, batch):
        super().guide(batch["parts"][0] + batch["shift"])


@pytest.mark.parametrize("compile", [False, True])
def test_arguments_may_hold_the_tensors(compile, interpreted):
    """As those of a pair that takes the sum of both; doubles become what the parameters are."""
    results, x = [], X[:6]
    rows = [({"parts": [a - b], "shift": b},) for a, b in zip(x, x.flip(0), strict=True)]
    for make, data in ((Noisy, DataLoader(x.float(), 3)), (Holding, DataLoader(rows, 3))):
        torch.manual_seed(4)
        pair = make().float()
        options = {"objective": pv.IWAE(2), "epochs": 3, "compile": compile, "progress": False}
        result = pv.fit(pair.model, pair.guide, data, **options)
        results.append([torch.tensor([row["bound"] for row in result.history]), *pair.parameters()])
        assert result.timings["path"] == ("compiled" if compile else "eager")
    torch.testing.assert_close(*results)
    assert len(interpreted) == 2 * compile


# --- recorded steps, as far as they can be without a CUDA device -----------------------------------------------------


class Emulated(stepping.Recording):
    """A recording on the CPU: what it computes it writes into the tensors that it made while it was recorded."""

    def __init__(self, step, states, optimizers, beside=None):
        self.step, self.graph = step, SimpleNamespace(replay=self.again)
        parameters = [p for state in states for p in state.parameters.values()]
        with ExitStack() as stack:
            stack.enter_context(isolated_rng())
            for state in states:
                stack.enter_context(untouched(state))
            self.loss = step()
        self.gradients = [(p, p.grad) for p in parameters]

    def again(self):
        held = [p.grad for p, _ in self.gradients]
        self.loss.copy_(self.step())
        for (parameter, made), grad in zip(self.gradients, held, strict=True):
            if made is not None:
                made.copy_(parameter.grad)
            parameter.grad = grad


STEPS = {  # the sizes of batches, the numbers of particles
    "all alike": ((7,) * 4, (2,) * 4),
    "a batch of another size": ((7, 7, 3, 7, 7), (2,) * 5),
    "another number of particles": ((7,) * 5, (2, 2, 3, 2, 2)),
}


@pytest.mark.parametrize("what", STEPS)
def test_a_recorded_step_moves_by_its_own_gradient(what, interpreted, monkeypatch):
    """Also with an optimizer that is not part of the recording, and so finds the gradients in ``.grad``."""
    monkeypatch.setattr(stepping, "Recording", Emulated)
    results = []
    for how in ("eager", "recorded"):
        torch.manual_seed(5)
        eager = eager_of("vae")
        gradients = eager if how == "eager" else Compiled(eager)
        step = Step(gradients, [torch.optim.SGD(eager.parameters, lr=0.1)])
        run = step if how == "eager" else Recorded(step)
        with isolated_rng(2):
            losses = [run(pv.ELBO(k), (X[:size],)).losses for size, k in zip(*STEPS[what], strict=True)]
        results.append([*losses, *eager.parameters])
    assert sorted(run.recorded) == sorted(set(STEPS[what][1]))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


def test_the_step_of_several_pairs_is_recorded_as_well(interpreted, monkeypatch):
    monkeypatch.setattr(stepping, "Recording", Emulated)
    results = []
    for how in (lambda step: step, Recorded):
        torch.manual_seed(5)
        each = [eager_of("vae") for _ in range(2)]
        gradients = Batched([Compiled(eager, anneals=True) for eager in each], [1.0, 0.5])
        step = how(Step(gradients, [torch.optim.SGD(eager.parameters, lr=0.1) for eager in each], clip_norm=0.5))
        with isolated_rng(2):
            losses = [step(pv.ELBO(2), (X[:size],)).losses for size in (7, 7, 3, 7)]
        assert all(loss.shape == (2,) for loss in losses)
        results.append([*losses, *(p for eager in each for p in eager.parameters)])
    assert list(step.recorded) == [2]
    assert step.kind == "replicas"
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


CHANGES = {
    "weight decay": lambda optimizer: optimizer.param_groups[0].update(weight_decay=0.1),
    "betas": lambda optimizer: optimizer.param_groups[0].update(betas=(0.5, 0.999)),
    "another option": lambda optimizer: optimizer.param_groups[0].update(amsgrad=True),
    "a state that is loaded": lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "more parameters": lambda optimizer: optimizer.add_param_group({"params": [torch.zeros(1)]}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_recording_follows_learning_rates_and_notices_all_else(change):
    optimizer = torch.optim.Adam([torch.zeros(2)], lr=torch.tensor(0.1), foreach=False)
    recording = stepping.Recording.__new__(stepping.Recording)
    recording.optimizers, recording.frozen = [optimizer], [options(optimizer)]
    group, rate = optimizer.param_groups[0], optimizer.param_groups[0]["lr"]
    for new in (0.5, torch.tensor(0.25)):
        group["lr"] = new
        assert recording.follows()
        assert group["lr"] is rate
        assert rate == new
    CHANGES[change](optimizer)
    assert not recording.follows()


def test_compiled_and_eager_are_compared_in_full_float32():
    x, tf32 = torch.ones(3), []

    def function(x):
        tf32.append(torch.backends.cudnn.conv.fp32_precision)
        return [x + 1]

    Checked(function, [])(x)
    assert tf32[0] == "ieee"


# --- whether to compile ----------------------------------------------------------------------------------------------


def job(epochs=10, size=1000, batch_size=100, hidden=(50,), objective=None, particles=None):
    pair = pv.models.VAE((8,), 2, hidden=hidden)
    feed = Feed(torch.ones(size, 8), batch_size, torch.device("cpu"))
    plan = Plan.make(objective or pv.ELBO(), epochs, "constant", particles, 0)
    return plan, list(pair.parameters()), feed


GROWING = {
    "epochs": [{"epochs": 10**n} for n in range(7)],
    "data": [{"size": 100 * 2**n, "epochs": 200} for n in range(10)],
    "particles": [{"objective": pv.IWAE(10**n), "epochs": 100} for n in range(7)],
    "groups": [{"objective": pv.MIWAE(10**n, 2), "epochs": 100} for n in range(7)],
    "weights": [{"hidden": (10 * 4**n,), "epochs": 200, "objective": pv.IWAE(50)} for n in range(6)],
}


@pytest.mark.parametrize("what", GROWING)
def test_auto_compiles_the_larger_jobs(what):
    decisions = [worthwhile(*job(**options)) for options in GROWING[what]]
    assert decisions == sorted(decisions)
    assert set(decisions) == {False, True}


def test_more_stages_are_more_compilations():
    assert worthwhile(*job(epochs=2500))
    assert not worthwhile(*job(epochs=2500, particles=(1, 2, 3, 4, 5, 6, 7, 8)))


def test_auto_asks_nothing_but_counts_and_whether_there_is_a_compiler(monkeypatch):
    monkeypatch.setattr(compiling, "has_compiler", lambda device: False)
    assert not worthwhile(*job(epochs=10**6))


def test_the_main_job_on_digits_stays_eager():
    digits = pv.data.load("digits", binarization="dynamic").train
    pair = pv.models.VAE(digits.event_shape, 10, hidden=(64,)).float()
    feed = Feed(digits, 100, torch.device("cpu"))
    assert not worthwhile(Plan.make(pv.ELBO(), 100, "constant", None, 0), pair.parameters(), feed)


def test_a_short_job_is_eager_by_default_and_a_long_one_compiled(interpreted, monkeypatch):
    assert train(epochs=1, particles=None)[1].timings["path"] == "eager"
    assert not interpreted
    monkeypatch.setattr(compiling, "COMPILATION", 0.0)
    monkeypatch.setattr(compiling, "FROM_CACHE", 0.0)  # what the cache of this machine may hold
    assert train(epochs=1, particles=None)[1].timings["path"] == "compiled"
    assert len(interpreted) == 1


def path(**options):
    return train(**SHORT | options)[1].timings["path"]


def test_auto_compiles_sooner_what_this_machine_compiled_before(interpreted, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiling, "COMPILATION", 1e9)
    monkeypatch.setattr(compiling, "FROM_CACHE", 0.0)
    assert path() == path() == "eager"
    assert path(compile=True) == path() == "compiled"
    others = {"objective": pv.IWAE(7)}, {"batch_size": 7}, {"precision": "bfloat16"}, {"kl_warmup": 1}
    assert {path(**other) for other in others} == {"eager"}
    monkeypatch.setattr(torch, "__version__", "2.0")
    assert path() == "eager"


def test_a_cache_that_takes_no_note_is_as_good_as_none(interpreted, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/dev/null/cache")
    monkeypatch.setattr(compiling, "FROM_CACHE", 0.0)
    assert path(compile=True) == "compiled"
    assert path() == "eager"


@pytest.mark.parametrize("began", ["eager", "compiled"])
def test_a_run_goes_on_as_it_began(began, interpreted, monkeypatch, tmp_path):
    """Whatever "auto" would choose now, for more epochs or with a fuller cache; but as it is told, if it is told."""
    monkeypatch.setattr(loop, "worthwhile", lambda *_: began == "compiled")
    assert path(run_dir=tmp_path) == began
    monkeypatch.setattr(loop, "worthwhile", lambda *_: began == "eager")
    assert path(run_dir=tmp_path, epochs=2, resume=True) == began
    assert path(run_dir=tmp_path, epochs=3, resume=True, compile=began == "eager") != began


def test_any_other_word_for_compile_is_refused():
    with pytest.raises(ValueError, match='compile must be "auto", True or False, got'):
        train(compile="yes")


@pytest.mark.parametrize(("compile", "path"), [(0, "eager"), (1, "compiled")])
def test_zero_and_one_are_false_and_true(compile, path, interpreted):
    assert train(compile=compile, epochs=1, **PLAIN)[1].timings["path"] == path


# --- training_step ---------------------------------------------------------------------------------------------------


def test_training_step_is_the_step_of_a_loop_of_ones_own(interpreted):
    """The example of its docstring, with clipping, beside the same loop written out."""
    weights = []
    for how in ("ours", "by hand"):
        torch.manual_seed(3)
        pair = pv.models.VAE((6,), latent_dim=1, hidden=())
        optimizer, objective = torch.optim.Adam(pair.parameters()), pv.IWAE(5)
        if how == "ours":
            step = pv.training_step(pair.model, pair.guide, objective, optimizer, X, clip_norm=0.3)
        losses = []
        for x in (X, X[:3], X + 0.0):
            if how == "ours":
                loss = step(x)
            else:
                optimizer.zero_grad()
                loss = objective.differentiable_loss(pair.model, pair.guide, x) / len(x)
                loss.backward()
                nn.utils.clip_grad_norm_(pair.parameters(), 0.3)
                optimizer.step()
            assert loss.dim() == 0
            losses.append(loss.detach())
        weights.append([*losses, *pair.parameters()])
    torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-11)
    assert len(interpreted) == 1


def test_training_step_learns_and_follows_an_annealed_weight(interpreted):
    pair = pv.models.VAE((6,), latent_dim=2, hidden=(8,))
    kl_weight = torch.tensor(1.0)
    optimizer = torch.optim.Adam(pair.parameters(), lr=0.02)
    step = pv.training_step(pair.model, pair.guide, pv.ELBO(kl_weight=kl_weight), optimizer, X)
    losses = torch.stack([step(X) for _ in range(200)])
    assert losses[-50:].mean() < losses[:50].mean() - 0.3
    kl_weight.fill_(100.0)
    assert step(X) > losses[-1] + 1


def test_training_step_sees_a_program_that_has_changed(interpreted, monkeypatch):
    monkeypatch.setattr(compiling, "LOOKED_AT", 3)
    pair, x = Listed(), GREY[:20].round()
    step = pv.training_step(pair.model, pair.guide, pv.ELBO(), torch.optim.SGD(pair.parameters(), lr=0.0), x)
    before = step(x)
    pair.numbers[0] = 5.0
    with pytest.warns(UserWarning, match="program has changed since"):
        losses = torch.stack([step(x) for _ in range(3)])
    assert losses[1] < 2 * before < losses[2]


@pytest.mark.parametrize(
    ("make", "objective", "reason"),
    [(Branching, pv.ELBO(), "reads a tensor's value"), (Pair, infer.Trace_ELBO(), r"pyrovae\.ELBO can be")],
)
def test_training_step_raises_what_it_cannot_do(make, objective, reason):
    pair = make()
    with pytest.raises(CannotCompile, match=reason):
        pv.training_step(pair.model, pair.guide, objective, torch.optim.SGD(pair.parameters(), lr=0.1), X)


# --- memory ----------------------------------------------------------------------------------------------------------

ERRORS = {
    "device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    "host": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 80000000000 bytes."),
}


@pytest.mark.parametrize("where", ERRORS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_out_of_memory_says_what_was_asked_for_and_what_to_lower(where, precision, tmp_path, monkeypatch):
    original, calls = Eager.__call__, []

    def failing(self, objective, batch):
        calls.append(batch)
        if len(calls) > 3:  # in the second epoch
            raise ERRORS[where]
        return original(self, objective, batch)

    monkeypatch.setattr(Eager, "__call__", failing)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train(run_dir=tmp_path, objective=pv.MIWAE(3, 2), precision=precision, compile=False, **PLAIN)
    message = str(caught.value)
    assert "asked for batch_size=20 with 6 particles; lower either" in message
    assert ('precision="bfloat16"' in message) == (precision == "float32")
    assert f'the last checkpoint is in "{tmp_path / "last"}"' in message
    assert str(ERRORS[where]) in message
    monkeypatch.setattr(Eager, "__call__", original)
    _, result = train(
        run_dir=tmp_path, resume=True, objective=pv.MIWAE(3, 2), precision=precision, compile=False, **PLAIN
    )
    assert len(result.history) == 4


def test_other_errors_are_left_alone(monkeypatch):
    def failing(self, objective, batch):
        raise RuntimeError("something else")

    monkeypatch.setattr(Eager, "__call__", failing)
    with pytest.raises(RuntimeError, match=r"^something else$"):
        train(compile=False)
