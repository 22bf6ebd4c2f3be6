"""Training: modes, early stopping, callbacks, and what users hand to fit, fit_replicas and training_step."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.optim import SGD

import pyrovae as pv
from tests.faults.matrix import fault, small_run

X = torch.rand(30, 4, generator=torch.Generator().manual_seed(0))


class Trunk(nn.Module):
    """A pair with a trunk below its encoder; in eval mode its BatchNorm is the identity there."""

    def __init__(self, trunk: nn.Module | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.trunk = trunk or nn.BatchNorm1d(4, eps=1e-12, affine=False)
            self.head = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
            self.decoder = nn.Linear(2, 4)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.head(self.trunk(x)), 1.0).to_event(1))

    @property
    def modes(self) -> list[bool]:
        return [module.training for module in self.modules()]


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Graphs run operation by operation, without a compiler, which takes too long here."""
    from pyrovae.compile import checked, inductor
    from pyrovae.compile import graph as graphs

    with (
        patch.object(checked, "capture", graphs.capture_once),
        patch.object(inductor, "through_inductor", lambda module: module),
    ):
        yield


def fitted(*pairs: Any, data: object = X, compile: bool = False, **options: Any) -> list[pv.Fit]:
    """Train each, with plain gradient descent."""
    settings = {"objective": pv.ELBO(), "epochs": 2, "batch_size": 10, "optimizer": lambda p: SGD(p, 0.05)} | options
    with interpreted():
        return [pv.fit(*programs(pair), data, compile=compile, **settings) for pair in pairs]


def at_once(*pairs: Any) -> None:
    with interpreted():
        pv.fit_replicas(pairs, X, objective=pv.ELBO(), epochs=2, batch_size=10, optimizer=lambda p: SGD(p, 0.05))


def stepped(*pairs: Any) -> None:
    """Steps of one's own: three of the size that was compiled, three of another."""
    for pair in pairs:
        torch.manual_seed(0)
        model, guide = programs(pair)
        with interpreted():
            step = pv.training_step(model, guide, pv.ELBO(), SGD(pair.parameters(), 0.05), X[:10])
        for size, _ in itertools.product((10, 7), range(3)):
            step(X[:size])


def programs(pair: Any) -> tuple[Any, Any]:
    return pair if isinstance(pair, tuple) else (pair.model, pair.guide)


def streamed(*pairs: Any) -> None:
    fitted(*pairs, data=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), 10))


TRAINED = {
    "fit": fitted, "fit compiled": lambda *pairs: fitted(*pairs, compile=True), "fit of a loader": streamed,
    "fit_replicas": at_once, "training_step": stepped,
}  # fmt: skip


# --- A9: modes -------------------------------------------------------------------------------------------------------


@fault("A9", "fit", each=TRAINED)
def a_frozen_trunk_stays_frozen(folder: Path, train: Any):
    frozen, other, plain = Trunk(), Trunk(), Trunk(nn.Identity())
    frozen.trunk.eval(), other.trunk.eval()
    modes = frozen.modes
    outcome = yield lambda: (train(frozen, other), train(plain, Trunk(nn.Identity())))
    assert "eval mode" not in outcome.message, "it is what was wanted"
    assert frozen.trunk.num_batches_tracked == 0
    assert frozen.head[1].num_batches_tracked == 6
    assert frozen.modes == modes
    for one, other in zip(frozen.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@fault("A9", "fit", each=TRAINED)
def a_pair_in_eval_mode_trains_in_train_mode(folder: Path, train: Any):
    pair, plain = Trunk().eval(), Trunk()
    outcome = yield lambda: (train(pair, Trunk().eval()), train(plain, Trunk()))
    assert "eval mode" not in outcome.message, "as load leaves it"
    assert pair.trunk.num_batches_tracked == plain.trunk.num_batches_tracked == 6
    assert not any(pair.modes)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(pair.state_dict()[name], tensor)


class Functions(tuple[Any, Any]):
    """Two plain functions, and what an optimizer needs to know of them."""

    def __new__(cls, pair: Trunk) -> Functions:
        return super().__new__(cls, (lambda x: Trunk.model(pair, x), lambda x: Trunk.guide(pair, x)))

    def __init__(self, pair: Trunk) -> None:
        self.parameters = pair.parameters


@fault("A9", "fit", 0, r"BatchNorm1d.* stay in eval mode.*\.train\(\)", each=TRAINED)
def modules_of_plain_functions_stay_as_found(folder: Path, train: Any):
    pair, plain = Trunk(), Trunk(nn.Identity())
    pair.trunk.eval()
    outcome = yield lambda: train(Functions(pair))
    assert outcome.message.count("stay in eval mode") == 1, outcome.message
    assert pair.trunk.num_batches_tracked == 0
    assert pair.head[1].num_batches_tracked == 6
    train(plain)
    for one, other in zip(pair.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@fault("A9", "fit", each=TRAINED)
def modules_of_plain_functions_in_train_mode_train(folder: Path, train: Any):
    pair = Trunk()
    outcome = yield lambda: train(Functions(pair))
    assert "eval mode" not in outcome.message
    assert pair.trunk.num_batches_tracked == 6


@fault("A9", "fit", 0, r"BatchNorm1d stay in eval mode")
def what_only_later_batches_reach_stays_as_found(folder: Path):
    pair = Trunk()
    late = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()

    def guide(x: Tensor) -> None:
        pair.guide(x if len(x) == 10 else late[1](late[0](x)))

    yield lambda: fitted((pair.model, guide), data=X[:25])
    assert late[1].num_batches_tracked == 0
    assert late[0].weight.grad is not None


@fault("A9", "fit", 1, "a user's error", each=TRAINED)
def modes_come_back_after_an_error(folder: Path, train: Any):
    pair = Trunk().eval()
    pair.head[1].train()
    modes = pair.modes

    def fail(*_: object) -> None:
        assert pair.trunk.training
        raise RuntimeError("a user's error")

    pair.head[2].register_forward_hook(fail)
    yield lambda: train(pair)
    assert pair.modes == modes


@fault(
    "A9", "log_likelihood",
    each={
        "log_likelihood": lambda m, g: pv.log_likelihood(m, g, X, num_samples=5),
        "ais_log_likelihood": lambda m, g: pv.ais_log_likelihood(m, X[:2], num_chains=2, num_temperatures=3),
        "active_units": lambda m, g: pv.active_units(g, X),
        "posterior_gap": lambda m, g: pv.posterior_gap(m, g, X[:3], num_samples=64),
        "sample": lambda m, g: pv.sample(m, 3, like=X[:1]),
    },
)  # fmt: skip
def what_measures_puts_all_in_eval_mode_and_back(folder: Path, measure: Any):
    pair, seen = Trunk(), set()
    pair.trunk.eval()
    modes = pair.modes
    pair.decoder.register_forward_hook(lambda *_: seen.update(pair.modes))
    pair.trunk.register_forward_hook(lambda *_: seen.update(pair.modes))
    yield lambda: measure(pair.model, pair.guide)
    assert seen == {False}
    assert pair.modes == modes


@fault("A9", "fit", each={"eager": False, "compiled": True})
def a_loaded_pair_goes_on_in_train_mode(folder: Path, compile: bool):
    pair = pv.load(small_run(folder / "run", "--set", "likelihood=gaussian"))
    assert not pair.training
    seen = set()
    pair.decoder.register_forward_hook(lambda *_: seen.add(pair.decoder.training))
    yield lambda: fitted(pair, data=torch.rand(20, 1, 8, 8), compile=compile, epochs=1)
    assert True in seen
    assert not any(module.training for module in pair.modules())


# --- A8: early stopping ----------------------------------------------------------------------------------------------

#: Schedules, and the first epoch that has the final objective throughout: with nothing learned it is the best.
GROWING = {
    "nothing": ({}, 1), "a warm-up": ({"kl_warmup": 6}, 7), "a warm-up to within an epoch": ({"kl_warmup": 2.5}, 4),
    "stages": ({"particles": (1, 2)}, 7), "thirds": ({"particles": (1, 2, 3)}, 9),
    "both, stages longer": ({"particles": (1, 2), "kl_warmup": 3}, 7),
    "both, warm-up longer": ({"particles": (1, 2), "kl_warmup": 8}, 9),
}  # fmt: skip


def idle(folder: Path | None = None, patience: int | None = 2, **options: Any) -> pv.Fit:
    """A training that learns nothing, so that the first validation bound that counts is never beaten."""
    pair = pv.models.VAE((4,), latent_dim=1, hidden=(), likelihood="gaussian")
    settings = {"objective": pv.ELBO(), "epochs": 12, "batch_size": 30, "compile": False, "lr": 0.0} | options
    return pv.fit(pair.model, pair.guide, X, validation=X, patience=patience, run_dir=folder, **settings)


@fault("A8", "fit", each=GROWING)
def patience_waits_for_the_final_objective(folder: Path, growing: Any):
    options, best = growing
    outcome = yield lambda: idle(folder / "run", **options)
    assert outcome.value.best_epoch == best
    assert [row["epoch"] for row in outcome.value.history] == [*range(1, min(best + 2, 12) + 1)]
    assert (folder / "run" / "best").exists()


@fault("A8", "fit", each=GROWING)
def the_best_is_of_the_final_objective(folder: Path, growing: Any):
    options, best = growing
    outcome = yield lambda: idle(patience=None, **options)
    assert (outcome.value.best_epoch, len(outcome.value.history)) == (best, 12)


@fault("A8", "fit")
def a_better_epoch_starts_patience_anew(folder: Path):
    """Nothing is learned in three epochs of warm-up, something in four more, and nothing again."""
    rates = [0.0] * 3 + [0.01] * 4 + [0.0] * 5
    outcome = yield lambda: idle(lr=1.0, patience=3, kl_warmup=3, schedule=lambda t: rates[round(12 * t)])
    bounds = [row["validation_bound"] for row in outcome.value.history]
    assert bounds[3:] == sorted(bounds[3:])
    assert (outcome.value.best_epoch, len(bounds)) == (7, 10)


@fault("A8", "fit", each={"before the end of warm-up": 2, "after it": 5, "at its end": 4})
def patience_is_the_same_after_an_interruption(folder: Path, last: int):
    whole = idle(folder / "whole", kl_warmup=4)

    def broken(result: pv.Fit) -> None:
        if len(result.history) == last:
            raise RuntimeError("a user's error")

    with contextlib.suppress(RuntimeError):
        idle(folder / "run", kl_warmup=4, on_epoch=broken)
    assert pv.runs.Run(folder / "run").state()["epoch"] == last
    outcome = yield lambda: idle(folder / "run", kl_warmup=4, resume=True)
    assert (outcome.value.best_epoch, len(outcome.value.history)) == (whole.best_epoch, len(whole.history)) == (5, 7)
    assert outcome.value.finished


@fault("A8", "fit", 0, "kl_warmup=20 is longer than epochs=12: kl_weight ends at 0.6")
def warm_up_is_longer_than_training(folder: Path):
    outcome = yield lambda: idle(folder / "run", kl_warmup=20)
    assert outcome.value.best_epoch == len(outcome.value.history) == 12
    assert outcome.value.history[-1]["kl_weight"] < 0.6


@fault("A8", "train", 0, "trained 6 epochs")
def patience_waits_on_the_command_line(folder: Path):
    settings = ("kl_warmup=4", "patience=1", "hidden=[]", "validation=100")
    options = itertools.chain.from_iterable(("--set", setting) for setting in settings)
    yield "train", "vae", "--epochs", "9", "--lr", "0", "--samples", "5", *options, "--run-dir", folder / "run"


# --- D: on_epoch -----------------------------------------------------------------------------------------------------


@fault("D", "fit", each={"eager": False, "compiled": True})
def what_a_callback_does_leaves_training_as_it_is(folder: Path, compile: bool):
    plain, watched, seen = Trunk(), Trunk(), []
    expected = fitted(plain, compile=compile, epochs=3)[0]

    def look(result: pv.Fit) -> None:
        seen.append((result.history[-1]["epoch"], len(result.history), watched.training))
        watched.eval()
        torch.rand(5)
        pv.log_likelihood(watched.model, watched.guide, X[:3], num_samples=2)
        watched.zero_grad()

    outcome = yield lambda: fitted(watched, compile=compile, epochs=3, on_epoch=look)
    assert seen == [(1, 1, True), (2, 2, True), (3, 3, True)]
    assert [row["bound"] for row in outcome.value[0].history] == [row["bound"] for row in expected.history]
    for name, tensor in plain.state_dict().items():
        assert torch.equal(watched.state_dict()[name], tensor), name
    assert watched.training


@fault("D", "fit", each={"None": None, "0": 0, "True": True})
def only_false_ends_training(folder: Path, answer: object):
    outcome = yield lambda: fitted(Trunk(), on_epoch=lambda _: answer)
    assert len(outcome.value[0].history) == 2


@fault("D", "fit")
def a_callback_ends_training(folder: Path):
    pair, calls = Trunk(), []

    def stop(result: pv.Fit) -> bool:
        calls.append(len(result.history))
        return len(result.history) < 2

    outcome = yield lambda: fitted(pair, epochs=5, run_dir=folder / "run", on_epoch=stop)[0]
    assert outcome.value.finished
    assert calls == [1, 2]
    assert outcome.value.timings["steps"] == 6
    state = pv.runs.Run(folder / "run").state()
    assert (state["epoch"], state["finished"]) == (2, True)
    again = fitted(pair, epochs=5, run_dir=folder / "run", resume=True, on_epoch=calls.append)[0]
    assert (calls, len(again.history)) == ([1, 2], 2)


@fault("D", "fit", 1, "a user's error")
def a_callback_fails(folder: Path):
    def fail(result: pv.Fit) -> None:
        if len(result.history) == 2:
            raise RuntimeError("a user's error")

    whole, broken, calls = Trunk(), Trunk(), []
    fitted(whole, epochs=4)
    yield lambda: fitted(broken, epochs=4, run_dir=folder / "run", on_epoch=fail)
    assert broken.training
    fitted(
        broken, epochs=4, run_dir=folder / "run", resume=True, on_epoch=lambda result: calls.append(len(result.history))
    )
    assert calls == [3, 4]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(broken.state_dict()[name], tensor), name


@fault("D", "fit", 2, "on_epoch must be a function of a Fit, got int: pass one", each={"5": 5})
def a_callback_is_no_function(folder: Path, value: object):
    yield lambda: fitted(Trunk(), on_epoch=value, run_dir=folder / "run")
    assert not (folder / "run").exists()
