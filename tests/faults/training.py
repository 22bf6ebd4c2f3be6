"""Training: modes, early stopping, callbacks, and what users hand to fit, fit_replicas and training_step."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

import pyrovae as pv
from pyrovae.data import Splits
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
    pv.runs.Run.due = True  # each epoch is saved

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
        torch.set_grad_enabled(False)
        result.history.clear()

    outcome = yield lambda: fitted(watched, compile=compile, epochs=3, on_epoch=look)
    assert seen == [(1, 1, True), (2, 2, True), (3, 3, True)]
    assert [row["bound"] for row in outcome.value[0].history] == [row["bound"] for row in expected.history]
    for name, tensor in plain.state_dict().items():
        assert torch.equal(watched.state_dict()[name], tensor), name
    assert watched.training


@fault("A9", "fit", each={"fit": fitted, "fit_replicas": at_once})
def training_is_called_without_gradients(folder: Path, train: Any):
    one, other = Trunk(), Trunk()
    with torch.no_grad():
        yield lambda: train(one, Trunk())
    assert torch.is_grad_enabled()
    train(other, Trunk())
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@fault("A9", "fit")
def one_datum_is_enough_to_validate_batchnorm(folder: Path):
    outcome = yield lambda: fitted(Trunk(), validation=X[:1])
    assert len([row["validation_bound"] for row in outcome.value[0].history]) == 2


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
    assert calls[-2:] == [3, 4]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(broken.state_dict()[name], tensor), name


@fault("D", "fit", 2, "on_epoch must be a function of a Fit, got int: pass one", each={"5": 5})
def a_callback_is_no_function(folder: Path, value: object):
    yield lambda: fitted(Trunk(), on_epoch=value, run_dir=folder / "run")
    assert not (folder / "run").exists()


# --- C: what users hand in -------------------------------------------------------------------------------------------

LABELS = torch.arange(30) % 3


def vae(**options: Any) -> pv.models.VAE:
    torch.manual_seed(1)
    return pv.models.VAE((4,), latent_dim=2, hidden=(), likelihood="gaussian", **options)


def bits() -> pv.models.VAE:
    return pv.models.VAE((4,), latent_dim=2, hidden=())


def conditional() -> pv.models.ConditionalVAE:
    return pv.models.ConditionalVAE((4,), 3, latent_dim=2, hidden=(), likelihood="gaussian")


def fit(pair: Any = None, data: object = X, **options: Any) -> pv.Fit:
    settings = {"objective": pv.ELBO(), "epochs": 2, "batch_size": 10, "compile": False} | options
    return pv.fit(*programs(pair or vae()), data, **settings)


def replicas(pairs: Any = None, data: object = X, **options: Any) -> list[pv.Fit]:
    with interpreted():
        settings = {"objective": pv.ELBO(), "epochs": 2, "batch_size": 10} | options
        return pv.fit_replicas([vae(), vae()] if pairs is None else pairs, data, **settings)


def step(pair: Any = None, optimizer: Any = None, *batch: object, objective: Any = None, **options: Any) -> Any:
    pair = pair or vae()
    optimizer = optimizer or SGD(pair.parameters(), 0.1)
    with interpreted():
        batch = batch or (X[:10],)
        return pv.training_step(*programs(pair), objective or pv.ELBO(), optimizer, *batch, **options)(*batch)


def measured(pair: Any, *data: object, **options: Any) -> Any:
    return pv.log_likelihood(*programs(pair), *data, num_samples=5, seed=0, **options)


class Rows(Dataset[Any]):
    """Thirty rows, each from a function of its number."""

    def __init__(self, row: Any) -> None:
        self.row = row

    def __len__(self) -> int:
        return 30

    def __getitem__(self, i: int) -> Any:
        return self.row(i)


TWICE = {"fit": fit, "fit_replicas": replicas}


@fault("C", "fit", 2, "LBFGS evaluates the loss several times a step.*pass Adam", each=TWICE | {"training_step": None})
def an_optimizer_needs_a_closure(folder: Path, train: Any):
    pair = vae()
    before = pair.decoder.output_bias.detach().clone()
    if train is None:
        yield lambda: step(pair, torch.optim.LBFGS(pair.parameters()))
    else:
        options = {"run_dir": folder / "run"} if train is fit else {"run_dirs": [folder / "run", folder / "two"]}
        yield lambda: train(
            pair if train is fit else [pair, vae()], optimizer=lambda p: torch.optim.LBFGS(p), **options
        )
    assert torch.equal(pair.decoder.output_bias, before)
    assert not (folder / "run").exists(), "it is refused before anything is written"


@fault("C", "fit", each={"Adam": "Adam", "SGD": "SGD", "AdamW": "AdamW"})
def pyros_optimizer_is_taken_as_torchs(folder: Path, name: str):
    one, other = vae(), vae()
    yield lambda: fit(one, optimizer=getattr(pyro.optim, name)({"lr": 0.05}))
    fit(other, optimizer=lambda p: getattr(torch.optim, name)(p, lr=0.05))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@fault("C", "fit_replicas")
def pyros_optimizer_is_of_each_replica(folder: Path):
    pairs = [vae(), vae()]
    outcome = yield lambda: replicas(pairs, optimizer=pyro.optim.SGD({"lr": 0.05}))
    assert [result.history[-1]["learning_rate"] for result in outcome.value] == [0.05, 0.05]
    assert not torch.equal(*(pair.decoder.output_bias for pair in pairs)), "each has noise of its own"


ADAM = torch.optim.Adam
SCHEDULER = torch.optim.lr_scheduler.StepLR
NO_ADVICE = "one of torch.optim over the pair's parameters, got"
OPTIMIZERS = {  # each made when it is needed: the first of all takes seconds
    "per parameter": (lambda: pyro.optim.Adam(lambda name: {"lr": 0.1}), "pyro.optim with arguments for.*got Adam"),
    "clipping": (lambda: pyro.optim.Adam({"lr": 0.1}, {"clip_norm": 1.0}), "clipping by pyro.optim.*pass clip_norm="),
    "Pyro's scheduler": (
        lambda: pyro.optim.ExponentialLR({"optimizer": ADAM, "optim_args": {"lr": 0.1}, "gamma": 0.1}),
        "pass schedule= instead",
    ),
    "not called": (lambda: pyro.optim.Adam, r"pyro\.optim\.Adam is called with its arguments"),
    "an instance": (lambda: ADAM([torch.zeros(2)]), "optimizer must be a function of the parameters, got Adam: pass"),
    "a name": (lambda: "adam", "optimizer must be a function of the parameters, got str: pass"),
    "a scheduler": (lambda: lambda p: SCHEDULER(ADAM(p), 1), "got StepLR: pass schedule= for it"),
    "nothing": (lambda: lambda p: None, f"{NO_ADVICE} NoneType: pass"),
    "of others": (lambda: lambda p: ADAM([torch.zeros(2)]), "Adam holds none of the pair's parameters: make it of"),
    "at no rate": (lambda: lambda p: SGD(p, torch.nan), "a learning rate must be a number in .*, got nan in SGD"),
    "at infinite rate": (lambda: lambda p: SGD(p, torch.inf), "a learning rate must be a number in .*, got inf in SGD"),
    "for sparse ones": (lambda: torch.optim.SparseAdam, "SparseAdam takes sparse gradients only.*pass Adam"),
}  # fmt: skip


@fault("C", "fit", 2, each=OPTIMIZERS)
def an_optimizer_cannot_be_used(folder: Path, case: Any):
    optimizer, says = case
    outcome = yield lambda: fit(optimizer=optimizer(), run_dir=folder / "run")
    assert re.search(says, outcome.message), outcome.message
    assert not (folder / "run").exists()


STEP_OPTIMIZERS = {
    "of Pyro": (lambda pair: pyro.optim.Adam({"lr": 0.1}), f"{NO_ADVICE} PyroOptim"),
    "a function": (lambda pair: lambda p: ADAM(p), f"{NO_ADVICE} function"),
    "of others": (lambda pair: ADAM([torch.zeros(2)]), "Adam holds none of the pair's parameters"),
    "at no rate": (lambda pair: SGD(pair.parameters(), torch.nan), "a learning rate must be a number.*got nan in SGD"),
}  # fmt: skip


@fault("C", "training_step", 2, each=STEP_OPTIMIZERS)
def an_optimizer_cannot_take_a_step(folder: Path, case: Any):
    optimizer, says = case
    pair = vae()
    outcome = yield lambda: step(pair, optimizer(pair))
    assert re.search(says, outcome.message), outcome.message


SCHEDULES = {
    "torch's class": (SCHEDULER, "schedule must be a name or a function of progress.*got torch's StepLR: pass such as"),
    "torch's": (None, "schedule must be a name or a function.*got torch's StepLR"),
    "nan": (lambda t: torch.nan, r"schedule must give factors in \[0, inf\), got nan"),
    "negative": (lambda t: -1.0, r"schedule must give factors in \[0, inf\), got -1"),
    "None": (lambda t: None, r"schedule must give factors in \[0, inf\), got None"),
    "misspelt": ("cosin", "unknown schedule 'cosin': did you mean 'cosine'"),
}  # fmt: skip


@fault("C", "fit", 2, each=SCHEDULES)
def a_schedule_is_none(folder: Path, case: Any):
    schedule, says = case
    pair = vae()
    before = pair.decoder.output_bias.clone()
    outcome = yield lambda: fit(pair, schedule=schedule or SCHEDULER(ADAM([torch.zeros(2)]), 1))
    assert re.search(says, outcome.message), outcome.message
    assert torch.equal(pair.decoder.output_bias, before)


class Sparse(Trunk):
    """With an embedding whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.embedding = nn.Embedding(5, 4, sparse=True)

    def guide(self, x: Tensor) -> None:
        super().guide(x + self.embedding(torch.zeros(len(x), dtype=torch.long)))


@fault(
    "C", "fit", 2, "an embedding has sparse gradients, which Adam does not take: build it with sparse=False", each=TWICE
)
def gradients_are_sparse(folder: Path, train: Any):
    yield lambda: train(Sparse() if train is fit else [Sparse(), Sparse()])


@fault("C", "fit", 0, "cannot compile: an embedding has sparse gradients")
def gradients_are_sparse_and_compiled(folder: Path):
    one, other = Sparse(), Sparse()
    other.load_state_dict(one.state_dict())
    yield lambda: fitted(one, compile=True)
    fitted(other)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


LONE = "a batch has one datum.*BatchNorm cannot be trained: pass another batch_size.*drop_last=True"


@fault(
    "C", "fit", 2, LONE,
    each={
        "at the end": lambda p: fit(p, X[:21]),
        "of a data set": lambda p: fit(p, Rows(X.__getitem__), batch_size=29, num_workers=0),
        "of a loader": lambda p: fit(p, DataLoader(TensorDataset(X[:21]), 10)),
        "of all": lambda p: fit(p, X[:1]),
        "always": lambda p: fit(p, batch_size=1),
        "of replicas": lambda p: replicas([p, Trunk()], X[:21]),
        "of one's own": lambda p: step(p, None, X[:1]),
    },
)  # fmt: skip
def batchnorm_meets_one_datum(folder: Path, train: Any):
    pair = Trunk()
    before = {name: tensor.clone() for name, tensor in pair.state_dict().items()}
    yield lambda: train(pair)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pair.state_dict().items()), "no step was taken"


@fault("C", "fit", 2, LONE)
def batchnorm_meets_one_datum_in_a_stream(folder: Path):
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(X[:21])

    yield lambda: fit(Trunk(), Stream(), num_workers=0)


SOUND = {"two": (X[:22], 6), "dropped": (DataLoader(TensorDataset(X[:21]), 10, drop_last=True), 4)}


@fault("C", "fit", each=SOUND)
def batchnorm_can_be_trained(folder: Path, case: Any):
    (data, steps), pair = case, Trunk()
    outcome = yield lambda: fit(pair, data)
    assert outcome.value.timings["steps"] == pair.head[1].num_batches_tracked == steps


@fault("C", "fit")
def a_frozen_batchnorm_takes_one_datum(folder: Path):
    pair = Trunk()
    pair.trunk.eval(), pair.head[1].eval()
    outcome = yield lambda: fit(pair, X[:21])
    assert outcome.value.timings["steps"] == 6


DICT = r"data must be a tensor \[batch, \*input_shape\], got a dict: let a collate_fn give tuples of its tensors"


@fault(
    "C", "fit", 3, DICT,
    each={
        "a loader": lambda rows: fit(conditional(), DataLoader(rows, 10)),
        "a data set": lambda rows: fit(conditional(), rows, num_workers=0),
        "for replicas": lambda rows: replicas([conditional(), conditional()], DataLoader(rows, 10)),
        "for validation": lambda rows: fit(conditional(), (X, LABELS), validation=DataLoader(rows, 10)),
        "for log_likelihood": lambda rows: measured(conditional(), DataLoader(rows, 10)),
    },
)  # fmt: skip
def batches_are_dicts(folder: Path, train: Any):
    yield lambda: train(Rows(lambda i: {"x": X[i], "y": LABELS[i]}))
    rows = Rows(lambda i: {"x": X[i], "y": LABELS[i]})
    loader = DataLoader(rows, 10, collate_fn=lambda many: tuple(default_collate(many).values()))
    assert len(fit(conditional(), loader).history) == 2, "the advice is right"


NO_DATA = {
    "a dict of words": ({"x": ["a"] * 30}, "received dict: let its columns be tensors or arrays of numbers of one"),
    "a list": (list(X), "received list.*: convert it, for instance with torch.stack"),
    "a name": ("digits", r"received str: read it, pyrovae\.data\.load\('digits'\)\.train"),
    "a generator": ((row for row in X), "received generator: it ends after one epoch; collect it"),
    "an iterator": (iter(X), "it ends after one epoch; collect it"),
    "splits": (Splits(pv.data.Images(X), None, pv.data.Images(X)), r"received Splits.*: pass its part \.train"),
    "nothing": (None, "received NoneType"),
    "words in a list": ((X, ["a", "b", "c"] * 10), "received tuple of list: number them with numpy.unique"),
}


@fault("C", "fit", 2, each=NO_DATA)
def data_are_none(folder: Path, case: Any):
    data, says = case
    outcome = yield lambda: fit(data=data, run_dir=folder / "run")
    assert re.search(says, outcome.message), outcome.message
    assert not (folder / "run").exists()


LABELLED = (
    r"guide\(x\) was called with \(Tensor, Tensor\): too many.*pass data without labels, or a model that takes them"
)


@fault(
    "C", "fit", 2, LABELLED,
    each={
        "fit": lambda: fit(data=(X, LABELS)),
        "fit of images": lambda: fit(data=pv.data.Images(X, LABELS)),
        "fit of a loader": lambda: fit(data=DataLoader(TensorDataset(X, LABELS), 10)),
        "validation": lambda: fit(validation=(X, LABELS)),
        "fit_replicas": lambda: replicas(data=(X, LABELS)),
        "training_step": lambda: step(None, None, X, LABELS),
        "log_likelihood": lambda: measured(vae(), X, LABELS),
        "log_weights": lambda: pv.log_weights(*programs(vae()), X, LABELS, num_particles=2),
        "active_units": lambda: pv.active_units(vae().guide, (X, LABELS)),
    },
)  # fmt: skip
def labels_go_to_a_model_without(folder: Path, train: Any):
    yield train


@fault("C", "log_likelihood", 2, r"guide\(x\) was called with \(Tensor, num_sample=int\): .*unexpected.*leave that out")
def an_option_is_misspelt(folder: Path):
    yield lambda: pv.log_likelihood(*programs(vae()), X, num_sample=5)


@fault("C", "log_likelihood", 2, r"guide\(x\) was called with \(\): missing a required argument: 'x'; pass")
def data_are_forgotten(folder: Path):
    yield lambda: pv.log_likelihood(*programs(vae()))


@fault("C", "log_likelihood", 2, r"\(x, y\) was called with \(tuple\): missing .*what the tuple holds")
def data_are_given_as_a_tuple(folder: Path):
    yield lambda: pv.log_likelihood(lambda x, y: None, lambda x, y: None, (X, LABELS), num_samples=1)


@fault("C", "fit", 2, "a program must be callable, got None: pass such as vae.model", each={"fit": fit, "step": step})
def a_program_is_none(folder: Path, train: Any):
    yield lambda: train((vae().model, None)) if train is fit else step((vae().model, None), SGD([X], 0.1))


ONE_HOT = nn.functional.one_hot(LABELS, 3)
WORDS: Any = np.array(["a", "b", "c"] * 10)
BAD_LABELS = {
    "one-hot of floats": (
        ONE_HOT.float(),
        r"got torch.float32: convert with y.long\(\), or one-hot rows with y.argmax",
    ),
    "one-hot": (ONE_HOT, r"labels of shape \[\d+, 3\] do not go with.*of one-hot rows y.argmax\(-1\)"),
    "floats": (LABELS.float(), r"labels must be integers.*got torch.float32: convert with y.long"),
    "words": (WORDS, "must be an array of numbers, received <U1: number them with numpy.unique"),
}


@fault("C", "fit", 3, each=BAD_LABELS)
def labels_are_no_class_numbers(folder: Path, case: Any):
    labels, says = case
    outcome = yield lambda: fit(conditional(), (X, labels))
    assert re.search(says, outcome.message), outcome.message
    numbers = np.unique(WORDS, return_inverse=True)[1]
    for advised in (ONE_HOT.argmax(-1), LABELS.float().long(), numbers):
        assert len(fit(conditional(), (X, advised)).history) == 2


@fault("C", "fit", 3, "labels must be numbers, got .*: number them with numpy.unique")
def a_loader_gives_words_for_labels(folder: Path):
    yield lambda: fit(conditional(), Rows(lambda i: (X[i], "abc"[i % 3])), num_workers=0)


@fault(
    "C", "fit", 3, "labels missing", each={"fit": lambda: fit(conditional()), "ll": lambda: measured(conditional(), X)}
)
def a_conditional_model_gets_no_labels(folder: Path, train: Any):
    yield train


SHAPES = {"784": (784,), "28x28": (28, 28), "28x28x1": (28, 28, 1)}


@fault("C", "fit", 3, r"input_shape=\(1, 28, 28\), got \(.*\): reshape it, or build the model", each=SHAPES)
def images_have_another_shape(folder: Path, shape: Any):
    pair = pv.models.VAE((1, 28, 28), latent_dim=2, hidden=())
    yield lambda: fit(pair, torch.zeros(20, *shape))


@fault("C", "fit")
def a_batch_is_larger_than_the_data(folder: Path):
    outcome = yield lambda: fit(batch_size=1000)
    assert outcome.value.timings["steps"] == 2


ARGUMENTS = {
    "epochs=0": ({"epochs": 0}, "epochs must be an integer of at least 1, got 0: pass 1 or more"),
    "epochs=1.5": ({"epochs": 1.5}, "epochs must be an integer of at least 1, got 1.5"),
    "lr=-1": ({"lr": -1}, r"lr must be a number in \[0, inf\), got -1"),
    "lr=nan": ({"lr": torch.nan}, r"lr must be a number in \[0, inf\), got nan"),
    "lr of tensors": ({"lr": torch.ones(3)}, r"lr must be a number in \[0, inf\), got a Tensor of shape \[3\]"),
    "kl_warmup=nan": ({"kl_warmup": torch.nan}, "kl_warmup must be a number in .*, got nan"),
    "kl_warmup=-1": ({"kl_warmup": -1}, "kl_warmup must be a number in .*, got -1"),
    "clip_norm=0": ({"clip_norm": 0}, "clip_norm must be a number in .*, got 0"),
    "stages": ({"particles": tuple(range(1, 9))}, "particles has 8 stages for 6 steps: pass more epochs"),
    "no stages": ({"particles": ()}, "particles is empty"),
    "seed=2**70": ({"seed": 2**70}, r"seed must be an integer of 64 bits, got 1180591620717411303424"),
    "seed=None": ({"seed": None}, "seed must be an integer of 64 bits, got None"),
    "compile of tensors": ({"compile": torch.ones(2)}, r"compile must be .*, got a Tensor of shape \[2\]"),
    "precision": ({"precision": "float16"}, "unknown precision 'float16': did you mean 'bfloat16'"),
    "device": ({"device": "gpu"}, "unknown device 'gpu': pass"),
    "an objective's class": ({"objective": pv.ELBO}, "objective must be a pyro.infer.ELBO.*got the class ELBO"),
    "an objective's name": ({"objective": "elbo"}, "objective must be a pyro.infer.ELBO.*got 'elbo'"),
    "num_workers=-1": ({"num_workers": -1, "data": Rows(X.__getitem__)}, "num_workers must be an integer"),
    "patience alone": ({"patience": 3}, "patience needs data to validate on"),
    "patience=0": ({"patience": 0, "validation": X}, "patience must be an integer of at least 1, got 0"),
    "resume alone": ({"resume": True}, "resume=True needs the folder"),
}  # fmt: skip


@fault("C", "fit", 2, each=ARGUMENTS)
def an_argument_is_out_of_range(folder: Path, case: Any):
    options, says = case
    outcome = yield lambda: fit(**({"run_dir": folder / "run"} if "resume" not in options else {}) | options)
    assert re.search(says, outcome.message), outcome.message
    assert not (folder / "run").exists()


STEP_ARGUMENTS = {
    "an objective's name": ({"objective": "elbo"}, "objective must be a pyro.infer.ELBO.*got 'elbo'"),
    "an objective's class": ({"objective": pv.ELBO}, "got the class ELBO"),
    "clip_norm=-1": ({"clip_norm": -1}, "clip_norm must be a number in .*, got -1"),
    "precision": ({"precision": "half"}, "unknown precision 'half'"),
}  # fmt: skip


@fault("C", "training_step", 2, each=STEP_ARGUMENTS)
def an_argument_of_a_step_is_out_of_range(folder: Path, case: Any):
    options, says = case
    outcome = yield lambda: step(**options)
    assert re.search(says, outcome.message), outcome.message


@fault("D", "training_step", each={"float64": torch.float64, "float16": torch.float16, "uint8": torch.uint8})
def data_of_a_step_are_of_another_type(folder: Path, dtype: torch.dtype):
    one, other = vae(), vae()
    bits = X[:10].round()

    def losses(pair: Any, x: Tensor) -> list[float]:
        torch.manual_seed(0)
        with interpreted():
            taken = pv.training_step(*programs(pair), pv.ELBO(), SGD(pair.parameters(), 0.1), x)
        return [taken(x).item(), taken(x[:7]).item()]

    outcome = yield lambda: losses(one, bits.to(dtype))
    assert outcome.value == losses(other, bits)


@fault("C", "log_likelihood", 3, "got a dict: let a collate_fn give tuples of its tensors")
def a_batch_is_a_dict(folder: Path):
    yield lambda: measured(vae(), {"x": X})


@fault("C", "training_step", 2, "training_step needs an example", each={"none": (), "an empty one": (X[:0],)})
def a_step_has_no_example(folder: Path, batch: Any):
    pair = vae()
    yield lambda: pv.training_step(*programs(pair), pv.ELBO(), SGD(pair.parameters(), 0.1), *batch)


def sharing() -> list[pv.models.VAE]:
    one, other = vae(), vae()
    other.decoder = one.decoder
    return [one, other]


REPLICAS = {
    "a pair alone": (lambda: replicas(vae()), "pairs must be a sequence of pairs, got one VAE: pass several in a list"),
    "none": (lambda: replicas([]), "there are no pairs to train: pass one at least"),
    "the same twice": (lambda: replicas([vae()] * 2), "replicas share a parameter or buffer"),
    "shared parts": (lambda: replicas(sharing()), "replicas share a parameter or buffer: give each pair networks"),
    "rates": (lambda: replicas(lr=[0.1]), "lr needs one value for each of 2 pairs, got 1: pass as many"),
    "a rate of nan": (lambda: replicas(lr=[0.1, torch.nan]), "lr must be a number in .*, got nan"),
    "a weight": (lambda: replicas(kl_weight=0.5), "kl_weight needs one value for each of 2 pairs, got 0.5"),
    "a folder": (lambda: replicas(run_dirs="run"), "run_dirs needs one value for each of 2 pairs, got 'run'"),
    "a folder twice": (lambda: replicas(run_dirs=["run", "./run"]), "run_dirs must be 2 folders, got 1: give each"),
    "Pyro's objective": (lambda: replicas(objective=pyro.infer.Trace_ELBO()), "need one of pyrovae's.*got Trace_ELBO"),
}  # fmt: skip


@fault("C", "fit_replicas", 2, each=REPLICAS)
def an_argument_of_replicas_is_out_of_range(folder: Path, case: Any):
    train, says = case
    outcome = yield train
    assert re.search(says, outcome.message), outcome.message
    assert not list(folder.iterdir())


@fault("C", "fit_replicas", each={"an array": np.array([0.1, 0.2]), "a generator": None})
def rates_come_in_any_order_of_numbers(folder: Path, rates: Any):
    outcome = yield lambda: replicas(
        (vae() for _ in range(2)), epochs=1, lr=(r for r in (0.1, 0.2)) if rates is None else rates
    )
    assert [result.history[-1]["learning_rate"] for result in outcome.value] == [0.1, 0.2]


def nothing(x: Tensor) -> None:
    pass


def wide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("w", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))


def array(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[:, :1].expand(-1, 4), 1.0).to_event(1), obs=x.numpy())


def classes(x: Tensor, how: str = "parallel", size: int | None = None, steered: bool = False) -> None:
    """A class for all data, of which there may be more."""
    logits = pyro.param("logits", torch.zeros(2))
    c = pyro.sample("c", dist.Categorical(logits=logits), infer={"enumerate": how})
    with pyro.plate("data", size or len(x), subsample=torch.arange(len(x))):
        loc = (1.0 if c else 0.0) if steered else c.unsqueeze(-1).to(x.dtype)
        pyro.sample("x", dist.Normal(x.new_zeros(x.shape) + loc, 1.0).to_event(1), obs=x)


PROGRAMS = {
    "a sum of two scales": (lambda: (partial(classes, size=100), nothing), '"c" and "x", which are summed.*scales'),
    "a sum of control flow": (lambda: (partial(classes, steered=True), nothing), '"c" are marked.*all their values at'),
    "a sum one by one": (lambda: (partial(classes, how="sequential"), nothing), '"c" is not drawn.*"sequential"'),
    "a site too many": (lambda: (vae().model, wide), 'guide site "w" is not a latent site of the model.*rename it'),
    "a site too few": (lambda: (vae().model, nothing), 'model site "z" is neither observed nor drawn by the guide'),
    "nothing at all": (lambda: (nothing, nothing), "the model has no sample site: it must observe something"),
    "no tensor": (lambda: (array, vae().guide), 'values of sites "x" are no tensors: convert them by torch.as_tensor'),
    "nothing to train": (lambda: vae().requires_grad_(False), "the pair has no parameters to train"),
    "nothing in memory": (lambda: vae().to("meta"), "parameters on the device meta have no values"),
}  # fmt: skip


@fault("C", "fit", 2, each=PROGRAMS)
def programs_do_not_go_together(folder: Path, case: Any):
    pair, says = case
    outcome = yield lambda: fit(pair(), run_dir=folder / "run")
    assert re.search(says, outcome.message), outcome.message
    assert not (folder / "run").exists()


def unobserved(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


@fault(
    "C", "fit", 0, "the model observes nothing, so that the data do not count: pass obs=",
    each={"obs forgotten": lambda: (unobserved, vae().guide), "swapped": lambda: (vae().guide, vae().model)},
)  # fmt: skip
def the_model_observes_nothing(folder: Path, pair: Any):
    yield lambda: fit(pair())


@fault("C", "fit", 2, "Once gives the same iterator each time", each={"data": "data", "validation": "validation"})
def a_stream_ends_after_one_epoch(folder: Path, name: str):
    class Once(IterableDataset[Tensor]):
        def __init__(self) -> None:
            self.rows = iter(X)

        def __iter__(self) -> Iterator[Tensor]:
            return self.rows

    yield lambda: fit(**{name: Once()}, num_workers=0)


@fault("C", "fit", 3, "epoch 2 had no data: pass a data set that gives them in every epoch")
def a_stream_is_empty_in_its_second_epoch(folder: Path):
    class Fading(IterableDataset[Tensor]):
        begun = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.begun += 1
            yield from X[: 30 if self.begun < 2 else 0]

    yield lambda: fit(data=Fading(), num_workers=0, run_dir=folder / "run")
    assert pv.runs.Run(folder / "run").state()["epoch"] == 1


@fault("C", "fit")
def a_stream_changes_its_length(folder: Path):
    class Changing(IterableDataset[Tensor]):
        lengths = iter((30, 30, 30, 10, 25))  # two are looks at it

        def __iter__(self) -> Iterator[Tensor]:
            return iter(X[: next(self.lengths)])

    outcome = yield lambda: fit(data=Changing(), num_workers=0, epochs=2)
    assert outcome.value.timings["steps"] in (4, 6)


class Later(Dataset[Tensor]):
    """Bits at first; from an epoch on, what is no bit."""

    def __init__(self, bad: float, place: int = 17) -> None:
        self.bad, self.place, self.given = bad, place, 0

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> Tensor:
        self.given += 1
        x = X[i].round()
        return torch.full_like(x, self.bad) if i == self.place and self.given > 70 else x  # 30 of an epoch, 10 looks


class LaterStream(IterableDataset[Tensor]):
    def __init__(self, bad: float) -> None:
        self.rows = Later(bad)

    def __iter__(self) -> Iterator[Tensor]:
        return (self.rows[i] for i in range(len(X)))


def later_collated(rows: list[Tensor], given: list[int] = []) -> Tensor:  # noqa: B006
    x = default_collate(rows)[0].round()
    given += [0] * len(rows)
    return x + 0.3 if len(given) > 70 else x


OTHERS = {
    "a stream": lambda: LaterStream(0.3), "a data set": lambda: Later(0.3), "far away": lambda: Later(1e30),
    "a collate_fn": lambda: DataLoader(TensorDataset(X), 10, shuffle=True, collate_fn=later_collated),
    "NaN": lambda: LaterStream(float("nan")),
}  # fmt: skip


@fault("A1", "fit", 3, r'^data\[\d+, 0\] = (0\.3|1\.3|1e\+30|nan) .*site "x"', each={
    f"{name}, {where}": (make, where) for name, make in OTHERS.items() for where in ("data", "validation")
})  # fmt: skip
def later_epochs_have_other_data(folder: Path, case: tuple[Any, str]):
    make, where = case
    given = {"data": X.round()} | {where: make()}
    yield lambda: fit(bits(), **given, num_workers=0, epochs=6, run_dir=folder / "run")
    assert pv.runs.Run(folder / "run").history()


@fault("A1", "fit")
def data_in_tensors_are_looked_at_once(folder: Path):
    from pyrovae.engine.observed import Observed

    looked = []
    seen = Observed.fine
    with patch.object(Observed, "fine", lambda self, batch: (looked.append(len(batch[0])), seen(self, batch))[1]):
        loader = DataLoader(TensorDataset(X.round()), 10, shuffle=True)
        yield lambda: fit(bits(), data=loader, epochs=4)
    assert sum(looked) == len(X)


EMPTY = {
    "tensors": lambda: fit(data=X[:0]),
    "a loader": lambda: fit(data=DataLoader(TensorDataset(X[:0]), 10)),
    "validation": lambda: fit(validation=X[:0]),
    "replicas": lambda: replicas(data=X[:0]),
    "log_likelihood": lambda: measured(vae(), X[:0]),
    "ais_log_likelihood": lambda: pv.ais_log_likelihood(vae().model, X[:0]),
    "active_units": lambda: pv.active_units(vae().guide, X[:0]),
}


@fault("C", "fit", 3, "pass at least one datum", each=EMPTY)
def there_are_no_data(folder: Path, train: Any):
    yield train


@fault("C", "fit", 3, "there are no data to train on: pass a DataLoader that does not drop its only batch")
def a_loader_drops_its_only_batch(folder: Path):
    yield lambda: fit(data=DataLoader(TensorDataset(X), 100, drop_last=True))


@fault("C", "fit")
def there_is_one_datum(folder: Path):
    outcome = yield lambda: fit(data=X[:1])
    assert outcome.value.timings["steps"] == 2


def broken(i: int) -> Any:
    raise ValueError(f"row {i} is broken")


def heavy(i: int) -> Any:
    raise MemoryError(f"row {i} is too large")


def deadly(i: int) -> Any:
    os._exit(9)


def working(row: Any) -> DataLoader[Any]:
    """A loader with one worker."""
    return DataLoader(Rows(row), 10, num_workers=1, multiprocessing_context="fork")


WORKERS = {
    "fails": (broken, "in a worker of the DataLoader: ValueError: row 0 is broken; num_workers=0 shows where"),
    "fails in log_likelihood": (None, "in a worker of the DataLoader: ValueError: row 0 is broken"),
}


@fault("C", "fit", 2, each=WORKERS)
def a_worker_fails(folder: Path, case: Any):
    row, says = case
    loader = working(row or broken)
    outcome = yield lambda: fit(data=loader) if row else measured(vae(), loader)
    assert re.search(says, outcome.message), outcome.message


@fault(
    "C", "fit", 6, r"a training step of 100,000 data with 1,000,000 particles takes .* GiB.*lower batch_size",
    each={"at once": None, "in the end": (10, 1_000_000)},
)  # fmt: skip
def a_step_is_more_than_memory(folder: Path, stages: Any):
    pair, x = Trunk(nn.Identity()), X[:1].expand(100_000, 4)
    before = {name: value.clone() for name, value in pair.state_dict().items()}
    iwae = pv.IWAE(10 if stages else 1_000_000)
    yield lambda: pv.fit(pair.model, pair.guide, x, objective=iwae, epochs=2, batch_size=10**6, particles=stages)
    assert all(torch.equal(value, before[name]) for name, value in pair.state_dict().items())


@fault("C", "fit", 6, "in a worker of the DataLoader: MemoryError: row 0 is too large")
def a_worker_lacks_memory(folder: Path):
    yield lambda: fit(data=working(heavy))


@fault("C", "fit", 6, r"DataLoader worker .* exited unexpectedly: free memory, or pass num_workers=0")
def a_worker_dies(folder: Path):
    yield lambda: fit(data=working(deadly))


@fault("C", "fit", 6, "row 0 is too large")
def a_row_lacks_memory(folder: Path):
    yield lambda: fit(data=DataLoader(Rows(heavy), 10))


@fault("C", "fit", 3, r"input_shape=\(4,\), got \(4,\): reshape it")
def a_loader_does_not_batch(folder: Path):
    yield lambda: fit(data=DataLoader(TensorDataset(X), batch_size=None))


@fault("C", "fit")
def a_loader_gives_whole_batches(folder: Path):
    rows = Subset(Rows(lambda i: X[10 * i : 10 * i + 10]), [0, 1, 2])
    outcome = yield lambda: fit(data=DataLoader(rows, batch_size=None))
    assert outcome.value.timings["steps"] == 6


# --- Threads, and rows that are no batch -----------------------------------------------------------------------------


def bounds(pair: pv.models.VAE) -> list[float]:
    return [row["bound"] for row in fit(copy.deepcopy(pair), X, epochs=8).history]


@fault("A9", "fit")
def two_threads_train_at_once(folder: Path):
    pair = vae()
    alone, before = bounds(pair), torch.get_rng_state()
    with ThreadPoolExecutor(2) as threads:
        outcome = yield lambda: list(threads.map(bounds, [pair] * 3))
    assert outcome.value == [alone] * 3
    assert torch.equal(torch.get_rng_state(), before)


@fault("A9", "log_likelihood")
def two_threads_measure_at_once(folder: Path):
    pair = vae()
    alone = measured(pair, X).nll
    with ThreadPoolExecutor(3) as threads:
        outcome = yield lambda: [f.nll for f in threads.map(lambda _: measured(pair, X), range(6))]
    assert outcome.value == [alone] * 6


@fault("C", "fit", 6, "another thread of this process trains or measures.*use processes")
def a_callback_waits_for_a_thread_that_measures(folder: Path):
    def wait(_: pv.Fit) -> None:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(measured, vae(), X).result()

    with patch("pyrovae.engine.randomness.PATIENCE", 0.1):
        yield lambda: fit(data=X, on_epoch=wait)


ROWS_THAT_DIFFER = {
    "none": lambda i: None if i == 17 else X[i],
    "longer": lambda i: X[i, : 3 if i == 17 else 4],
    "objects": lambda i: object(),
}


@fault("C", "fit", 3, "rows of the data set do not go into one batch", each=ROWS_THAT_DIFFER)
def rows_do_not_go_into_a_batch(folder: Path, row: Any):
    yield lambda: fit(data=working(row))


@fault("C", "log_likelihood", 3, "rows of the data set do not go into one batch", each=ROWS_THAT_DIFFER)
def rows_to_measure_do_not_go_into_a_batch(folder: Path, row: Any):
    yield lambda: measured(vae(), Rows(row))


NO_DATA = {
    "a list of tensors": lambda: list(X), "a name": lambda: "digits", "a generator": lambda: iter(X.split(10)),
    "splits": lambda: pv.data.load("digits"), "sparse": lambda: X.to_sparse(),
    "complex": lambda: X.to(torch.complex64),
}  # fmt: skip


@fault("D", "log_likelihood", 2, "data must be a tensor|must be a dense, real tensor", each=NO_DATA)
def what_is_measured_is_no_data(folder: Path, make: Any):
    yield lambda: measured(vae(), make())


@fault("D", "fit", 2, "data must be a tensor|must be a dense, real tensor", each=NO_DATA)
def what_is_trained_on_is_no_data(folder: Path, make: Any):
    yield lambda: fit(data=make())


@fault("D", "log_likelihood")
def data_were_made_in_inference_mode(folder: Path):
    with torch.inference_mode():
        made = X.clone()
    outcome = yield lambda: measured(vae(), made).nll
    assert outcome.value == measured(vae(), X).nll


@fault("D", "fit", each=TWICE)
def training_is_called_in_inference_mode(folder: Path, train: Any):
    alone, pair, other = vae(), vae(), vae()
    train([alone, vae()] if train is replicas else alone)
    with torch.inference_mode():
        yield lambda: train([pair, other] if train is replicas else pair)
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), pair.parameters(), strict=True))


@fault("D", "fit", 2, "was made under torch.inference_mode\\(\\).*build or load the pair outside", each=TWICE)
def a_pair_was_made_in_inference_mode(folder: Path, train: Any):
    with torch.inference_mode():
        pairs = vae(), vae()
    yield lambda: train(pairs if train is replicas else pairs[0])
