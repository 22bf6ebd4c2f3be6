"""Replicas: several pairs trained at once, each as it would be alone."""

import warnings
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pyro.infer as infer
import pytest
import torch
from torch import nn

import pyrovae as pv
from pyrovae.compile import graph as graphs
from pyrovae.compile.noise import stacked_noise
from pyrovae.engine.probe import look
from pyrovae.engine.programs import in_modes, training_modes
from pyrovae.engine.randomness import isolated_rng
from pyrovae.runs import Run
from pyrovae.train import replicas
from pyrovae.train.compiled import Compiled
from pyrovae.train.replicas import Batched
from pyrovae.train.step import Eager
from tests.pairs import Noisy
from tests.state import double_precision

pytestmark = pytest.mark.double(43)

# Data in two clusters: there is something to learn, a nat per datum and more.
CENTRES = torch.tensor([[0.9] * 3 + [0.1] * 3, [0.1] * 3 + [0.9] * 3], dtype=torch.float64)
DATA = torch.bernoulli(CENTRES[torch.arange(205) % 2], generator=torch.Generator().manual_seed(0))


def vaes(number=2, **variant):
    return [pv.models.VAE((6,), **{"latent_dim": 2, "hidden": (4,)} | variant) for _ in range(number)]


SETTINGS = {"objective": pv.IWAE(2), "epochs": 4, "batch_size": 50, "lr": 0.02}


def train(pairs, data=DATA, **options):
    """Train at once; a warning that it was not is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "cannot train replicas at once")
        return pv.fit_replicas(pairs, data, **(SETTINGS | options))


# --- one step --------------------------------------------------------------------------------------------------------


def owned(pairs):
    """Whether every tensor of the pairs has a storage of its own, of its own size."""
    tensors = [t for pair in pairs for t in pair.state_dict().values()]
    whole = all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors)
    return whole and len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


def eager(pair):
    """Its eager gradients, made for batches of 50."""
    batch = (DATA[:50],)
    return Eager(pair.model, pair.guide, look(pair.model, pair.guide, batch), batch)


STEPS = {
    "vae": (vaes, pv.IWAE(3, gradient="dreg"), [0.5, 2.0]),
    "modules": (lambda: [Noisy() for _ in range(2)], pv.ELBO(2, kl_weight=0.7), [1.0, 0.0]),
}


@pytest.mark.parametrize("what", STEPS)
def test_on_the_same_noise_each_has_the_gradients_it_has_alone(what, interpreted):
    """Alone: a graph of the pair by itself, run on that replica's share of the noise; buffers and all."""
    make, objective, factors = STEPS[what]
    pairs, x = make(), DATA[50:100]
    twins = make()
    for pair, twin in zip(pairs, twins, strict=True):
        twin.load_state_dict(pair.state_dict())

    alone = []
    for r, (pair, factor) in enumerate(zip(twins, factors, strict=True)):
        own = type(objective)(**objective.config | {"kl_weight": objective.kl_weight * factor})
        with in_modes(training_modes(pair)), isolated_rng(r):
            loss, _ = eager(pair)(own, (x,))  # nothing here draws what `rewritten` would change
        alone.append([loss, *(p.grad for p in pair.parameters())])

    def drawn(source, seed):
        def draw():
            torch.manual_seed(seed)
            return source()

        return draw

    with in_modes(training_modes(*pairs)):
        replicas = Batched([Compiled(eager(pair), anneals=True) for pair in pairs], factors)
        source = replicas.each[0].differentiated(objective)[0].capture((x,)).graph.noise
        original = graphs.Graph.batched

        def batched(self, number, stacked):
            graph = original(self, number, stacked)
            graph.noise = stacked_noise([drawn(source, r) for r in range(number)])
            return graph

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(graphs.Graph, "batched", batched)
            replicas.static(objective)
        losses, _ = replicas(objective, (x,))
    for r, (pair, expected) in enumerate(zip(pairs, alone, strict=True)):
        got = [losses[r], *(p.grad for p in pair.parameters())]
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(pair.state_dict(), twins[r].state_dict(), rtol=1e-9, atol=1e-11)
    assert len(interpreted) == 1


def test_the_last_batch_is_a_step_of_each_with_its_own_weight(interpreted):
    pairs = vaes(2)
    replicas = Batched([Compiled(eager(pair), anneals=True) for pair in pairs], [0.0, 100.0])
    losses, _ = replicas(pv.ELBO(20), (DATA[:5],))
    assert losses.shape == (2,)
    assert losses[1] > losses[0] + 5
    assert all(p.grad is not None for p in pairs[1].parameters())


@pytest.mark.parametrize("what", STEPS)
def test_a_last_batch_that_comes_often_is_one_step_of_all(what, interpreted, monkeypatch):
    """On the same noise what it is eagerly, gradients, buffers and generators; and each pair is not called for it."""
    make, objective, factors = STEPS[what]
    results = []
    for price in (0, 1000):
        monkeypatch.setattr(replicas, "WORTHWHILE", price)
        torch.manual_seed(1)
        pairs = make()
        with in_modes(training_modes(*pairs)):
            batched = Batched([Compiled(eager(pair), anneals=True) for pair in pairs], factors)
            for size in (5, 7, 5):
                with monkeypatch.context() as patch:
                    patch.setattr(Eager, "__call__", lambda *_: pytest.fail("it runs eagerly")) if not price else None
                    losses, _ = batched(objective, (DATA[:size],))
        gradients = [p.grad for pair in pairs for p in pair.parameters()]
        results.append([losses, *gradients, *(t for pair in pairs for t in pair.state_dict().values()), torch.rand(1)])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


def test_a_last_batch_that_cannot_be_batched_stays_eager(interpreted, monkeypatch):
    monkeypatch.setattr(replicas, "WORTHWHILE", 0)
    pairs = vaes(2)
    for pair in pairs:
        likelihood = pair.model
        pair.model = lambda x, run=likelihood: run(x) if len(x) == 50 else (x.sum().item(), run(x))[1]
    batched = Batched([Compiled(eager(pair)) for pair in pairs], [1.0, 1.0])
    for _ in range(2):
        assert batched(pv.ELBO(), (DATA[:5],)).losses.shape == (2,)
    assert list(batched.functions.values()) == [None]


def test_replicas_that_change_between_epochs_run_eagerly(interpreted):
    """One of them is another program by now, as a number tells that no graph of theirs sees."""
    scale = [1.0]
    pairs = vaes(2)
    pairs[1].model = lambda x, run=pairs[1].model: pyro.poutine.scale(run, scale=scale[0])(x)
    batched = Batched([Compiled(eager(pair)) for pair in pairs], [1.0, 1.0])
    for changed in (False, False, True):
        scale[0] = 0.5 if changed else 1.0
        batched.look_again()
        with pytest.warns(UserWarning, match="program has changed since") if changed else nullcontext():
            assert (batched.static(pv.ELBO()) is None) == changed
    assert batched.kind == "eager"
    assert batched(pv.ELBO(), (DATA[:50],)).losses.shape == (2,)


# --- whole trainings -------------------------------------------------------------------------------------------------


LONG = {"epochs": 40, "schedule": lambda progress: 1.0 if progress < 0.8 else 0.3, "clip_norm": 5.0}


@pytest.fixture(scope="module")
def trained():
    """Replicas through Inductor, and what came of them."""
    with double_precision(43):
        pairs = vaes()
        start = [{k: v.clone() for k, v in p.state_dict().items()} for p in pairs]
        results = train(pairs, **LONG)
        yield pairs, start, results


def test_each_learns_as_much_as_it_would_alone(trained):
    """The bounds of the last epochs lie where the single run's does.

    A mean of 5 epochs of 205 data with a standard deviation of a nat has error .03; seeds differ by more: 0.25.
    """
    _, start, results = trained
    for r, result in enumerate(results):
        assert result.timings["path"] == "replicas"
        alone = vaes(1)[0]
        alone.load_state_dict(start[r])
        single = pv.fit(alone.model, alone.guide, DATA, compile=False, **SETTINGS | LONG | {"seed": r})
        bounds = [torch.tensor([row["bound"] for row in h.history[-5:]]).mean() for h in (result, single)]
        assert bounds[0] == pytest.approx(bounds[1], abs=0.25)
        assert bounds[0] > result.history[0]["bound"] + 0.5
        assert result.history[-1].keys() == single.history[-1].keys()
        assert [row["learning_rate"] for row in result.history] == pytest.approx(
            [row["learning_rate"] for row in single.history]
        )
    assert len({result.history[-1]["bound"] for result in results}) == 2


def test_afterwards_every_pair_has_tensors_of_its_own(trained):
    assert owned(trained[0])


def test_a_replica_that_is_fitted_again_leaves_the_others_alone(trained):
    pairs, _, _ = trained
    before = {k: v.clone() for k, v in pairs[1].state_dict().items()}
    pv.fit(pairs[0].model, pairs[0].guide, DATA, **SETTINGS | {"epochs": 1})
    assert all(torch.equal(v, before[k]) for k, v in pairs[1].state_dict().items())


def test_the_seed_decides_and_the_global_generator_does_not(interpreted):
    state, results = torch.get_rng_state(), []
    for seed in (0, 0, 1):
        torch.manual_seed(7)
        pairs = [Noisy(), Noisy()]
        torch.set_rng_state(state)
        torch.rand(len(results))
        train(pairs, epochs=1, seed=seed)
        results.append([t for pair in pairs for t in pair.state_dict().values()])
        torch.set_rng_state(state)
    assert all(map(torch.equal, results[0], results[1]))
    assert not all(map(torch.equal, results[0], results[2]))


def test_replicas_of_equal_weights_part_by_their_noise(interpreted):
    pairs = [Noisy(), Noisy()]
    pairs[1].load_state_dict(pairs[0].state_dict())
    train(pairs, epochs=1)
    assert not torch.equal(pairs[0].log_scale, pairs[1].log_scale)
    assert not torch.equal(pairs[0].encoder[1].running_mean, pairs[1].encoder[1].running_mean)
    assert [p.encoder[1].num_batches_tracked.item() for p in pairs] == [5, 5]


def test_each_has_its_own_learning_rate(interpreted):
    pairs = vaes(3)
    start = [{k: v.clone() for k, v in p.state_dict().items()} for p in pairs]
    results = train(pairs, lr=[0.0, 1e-3, 1e-2], schedule=lambda progress: 0.5, epochs=1)
    assert [r.history[-1]["learning_rate"] for r in results] == [0.0, 0.5e-3, 0.5e-2]
    moved = [sum(float((v - start[r][k]).abs().sum()) for k, v in p.state_dict().items()) for r, p in enumerate(pairs)]
    assert moved[0] == 0
    assert moved[2] > 3 * moved[1] > 0


def test_each_has_its_own_weight_of_the_kl(interpreted):
    pairs = vaes(3)
    results = train(
        pairs, kl_weight=[0.0, 1.0, 20.0], objective=pv.ELBO(kl_weight=0.5), kl_warmup=4, epochs=20, lr=0.05
    )
    assert [r.history[-1]["kl_weight"] for r in results] == [0.0, 0.5, 10.0]
    assert results[1].history[0]["kl_weight"] == pytest.approx(0.5 * 4 / 5 / 4)  # at its last of five steps
    kls = [r.history[-1]["kl"] for r in results]
    assert kls[0] > kls[1] + 0.5
    assert kls[1] > kls[2]
    assert kls[2] < 0.05
    assert len(interpreted) == 1


def test_stages_of_particles_and_any_optimizer(interpreted):
    """And pairs that are tuples of programs."""
    results = train(
        [(p.model, p.guide) for p in vaes()], particles=(1, 3), lr=None,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.5),
    )  # fmt: skip
    assert [row["num_particles"] for row in results[0].history] == [1, 1, 3, 3]
    assert len(interpreted) == 2


def test_networks_may_multiply_in_bfloat16(interpreted):
    pairs = [pair.float() for pair in vaes()]
    results = train(pairs, DATA.float(), precision="bfloat16", epochs=2)
    assert [r.timings["precision"] for r in results] == ["bfloat16"] * 2
    assert results[0].history[-1]["bound"] > results[0].history[0]["bound"]


def test_each_is_saved_as_a_run_of_its_own(tmp_path, interpreted):
    pairs, folders = vaes(likelihood="gaussian"), [tmp_path / str(r) for r in range(2)]
    results = train(pairs, run_dirs=folders, lr=[1e-3, 2e-3], kl_weight=[0.5, 2.0], epochs=2)
    for r, (pair, folder, result) in enumerate(zip(pairs, folders, results, strict=True)):
        loaded = pv.load(folder)
        assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in pair.state_dict().items())
        config = Run(folder).config()
        assert (config["training"]["replica"], config["training"]["of"]) == (r, 2)
        assert config["training"]["lr"] == [1e-3, 2e-3][r]
        assert config["objective"]["arguments"]["kl_weight"] == [0.5, 2.0][r]
        assert [row["bound"] for row in Run(folder).history()] == [row["bound"] for row in result.history]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1"]


# --- what cannot be trained at once ----------------------------------------------------------------------------------


class Branching(Noisy):
    def guide(self, x):
        super().guide(x if x.sum() > 0 else -x)


class Refused(nn.Module):
    """Cannot be batched: it changes what all replicas share, in place."""

    def __init__(self, shared):
        super().__init__()
        self.pair, self.shared = vaes(1)[0], [shared]

    def model(self, x):
        self.pair.model(x)

    def guide(self, x):
        self.shared[0].add_(self.pair.encoder.output.bias.detach().sum())
        self.pair.guide(x)


class Counted(pv.models.VAE):
    """Counts its calls in a list."""

    def __init__(self):
        super().__init__((6,), latent_dim=2, hidden=(4,))
        self.numbers = [0]

    def guide(self, x):
        self.numbers[0] += 1
        super().guide(x)


@pytest.mark.parametrize(
    "make",
    [Branching, lambda: Refused(torch.zeros(())), Counted],
    ids=["one graph", "a batched graph", "a number that changes"],
)
def test_what_cannot_be_batched_trains_one_after_the_other_after_a_warning(make, interpreted, tmp_path):
    pairs = [make(), make()]
    start = [{k: v.clone() for k, v in p.state_dict().items()} for p in pairs]
    folders = [tmp_path / "a", tmp_path / "b"]
    with pytest.warns(UserWarning, match="cannot train replicas at once: .*; training one after the other"):
        results = pv.fit_replicas(
            pairs, DATA, **SETTINGS | {"lr": [0.0, 0.02], "seed": 3}, kl_weight=[1.0, 0.5], run_dirs=folders
        )
    assert [r.timings["path"] for r in results] == ["eager"] * 2
    assert [r.history[-1]["kl_weight"] for r in results] == [1.0, 0.5]
    assert all(torch.equal(p, start[0][k]) for k, p in pairs[0].named_parameters())
    alone = make()
    alone.load_state_dict(start[1])
    pv.fit(
        alone.model, alone.guide, DATA, **SETTINGS | {"objective": pv.IWAE(2, kl_weight=0.5), "seed": 4},
        compile=False,
    )  # fmt: skip
    torch.testing.assert_close(pairs[1].state_dict(), alone.state_dict(), rtol=0, atol=0)
    assert torch.equal(Run(folders[1]).weights()[next(iter(start[1]))], next(iter(pairs[1].state_dict().values())))
    assert owned(pairs)


def test_a_replica_that_becomes_nan_is_named_and_gets_its_tensors_back(interpreted):
    pairs = vaes()
    with torch.no_grad():
        pairs[1].decoder.output_bias.fill_(torch.nan)
    message = 'replica 1: step 1 of epoch 1 was not taken, because parameter "decoder.2.bias" is nan'
    with pyro.validation_enabled(False), pytest.raises(FloatingPointError, match=message):
        train(pairs)
    assert owned(pairs)


def shared():
    first, second = vaes(2)
    second.decoder = first.decoder
    return [first, second]


class Closed(nn.Module):
    """A pair that closes over a number that is not a parameter."""

    def __init__(self, temperature):
        super().__init__()
        self.pair, self.temperature = vaes(1)[0], temperature

    def model(self, x):
        self.pair.model(x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            posterior = self.pair.posterior(x).base_dist
            pyro.sample("z", dist.Normal(posterior.mean, posterior.scale * self.temperature).to_event(1))


ANOTHER = "not the same program as replica 0: build them alike"
ERRORS = {
    "no pairs": (list, {}, ValueError, "there are no pairs to train"),
    "shapes": (lambda: [*vaes(1), *vaes(1, hidden=(5,))], {}, ValueError, "parameters differ in shape: build them"),
    "likelihoods": (lambda: [*vaes(1), *vaes(1, likelihood="continuous_bernoulli")], {}, ValueError, ANOTHER),
    "activations": (lambda: [*vaes(2), *vaes(1, activation="relu")], {}, ValueError, "replica 2 is " + ANOTHER),
    "numbers": (lambda: [Noisy(0.3), Noisy(0.2)], {}, ValueError, "replica 1 is " + ANOTHER),
    "attributes": (lambda: [Closed(1.0), Closed(0.5)], {}, ValueError, ANOTHER),
    "tensors closed over": (lambda: [Closed(torch.tensor([1.0, t])) for t in (1.0, 0.5)], {}, ValueError, ANOTHER),
    "shared networks": (shared, {}, ValueError, "replicas share a parameter or buffer"),
    "the same pair": (lambda: vaes(1) * 2, {}, ValueError, "replicas share a parameter or buffer"),
    "rates": (vaes, {"lr": [0.1]}, ValueError, "lr needs one value for each of 2 pairs, got 1"),
    "weights": (vaes, {"kl_weight": [1.0] * 4}, ValueError, "kl_weight needs one value for each of 2 pairs, got 4"),
    "a weight": (vaes, {"kl_weight": [1.0, -1.0]}, ValueError, "kl_weight must be a number in"),
    "folders": (vaes, {"run_dirs": ["a"]}, ValueError, "run_dirs needs one value for each of 2 pairs, got 1"),
    "Pyro's ELBO": (vaes, {"objective": infer.Trace_ELBO()}, TypeError, "one of pyrovae's objectives, got Trace_ELBO"),
    "not pairs": (lambda: [nn.Linear(2, 2)], {}, TypeError, "a pair is an object with .model and .guide"),
    "precision": (vaes, {"precision": "float16"}, ValueError, "unknown precision 'float16'"),
    "optimizer": (vaes, {"optimizer": torch.optim.SGD}, ValueError, "belongs to the default optimizer"),
}  # fmt: skip


@pytest.mark.parametrize("what", ERRORS)
def test_what_is_no_set_of_replicas_is_one_clear_error(what, interpreted):
    make, options, error, match = ERRORS[what]
    pairs, state = make(), torch.get_rng_state()
    with pytest.raises(error, match=match) as caught:
        train(pairs, **options)
    assert "\n" not in str(caught.value)
    assert torch.equal(torch.get_rng_state(), state)
    assert owned(pairs) or what in ("shared networks", "the same pair", "not pairs")
