"""Runs of the training loop: seeds, modes, schedules in the history, checkpoints, resume to the same bits, refusals."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.utils.data import Dataset

import pyrovae as pv
from pyrovae import runs
from pyrovae.errors import CheckpointError
from pyrovae.train import loop, monitor, trainee
from pyrovae.train.log import describe_objective
from tests import training
from tests.pairs import Noisy, guide_of
from tests.state import refused
from tests.training import dying_at, rows

pytestmark = pytest.mark.seed(31)

GREY = torch.rand(55, 6, generator=torch.Generator().manual_seed(0))


class Pair(Noisy):
    """Always from the same start; it notes in which modes it is run."""

    def __init__(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            super().__init__()
        self.modes = set()

    def guide(self, x):
        self.modes.add(self.encoder.training)
        super().guide(x)


class Streamed(Dataset):
    """Draws its own bits, from the worker's generator."""

    def __len__(self):
        return len(GREY)

    def __getitem__(self, i):
        return torch.bernoulli(GREY[i])


def images():
    return pv.data.Images(GREY, binarization="dynamic")


SETTINGS = training.SETTINGS | {"validation": pv.data.Images(GREY.round())}


def train(data=None, **options):
    pair = Pair()
    result = pv.fit(pair.model, pair.guide, data or images(), **(SETTINGS | options))
    return pair, result


def same(a, b):
    """Weights, buffers and history, to the bit."""
    (pair, result), (other, again) = a, b
    theirs = other.state_dict()
    return rows(result.history) == rows(again.history) and all(
        torch.equal(v, theirs[k]) for k, v in pair.state_dict().items()
    )


# --- seeds, modes, what changes over the epochs ----------------------------------------------------


@pytest.mark.parametrize(
    ("data", "options"), [(images, {}), (Streamed, {"num_workers": 0}), (Streamed, {"num_workers": 1})]
)
def test_the_seed_decides_and_the_global_generator_does_not(data, options):
    first = train(data(), **options)
    state = torch.get_rng_state()
    torch.rand(9)
    assert same(first, train(data(), **options))
    assert not same(first, train(data(), seed=1, **options))
    torch.set_rng_state(state)
    train(data(), **options)
    assert torch.equal(torch.get_rng_state(), state)


def test_networks_train_in_train_mode_are_measured_in_eval_mode_and_get_their_own_back():
    pair = Pair().eval()
    pair.decoder.train()
    before = pair.encoder[1].running_mean.clone()
    pv.fit(pair.model, pair.guide, images(), objective=pv.ELBO(), epochs=1, validation=GREY.round())
    assert pair.modes == {True, False}
    assert [m.training for m in pair.children()] == [False, True]
    assert not torch.equal(pair.encoder[1].running_mean, before)
    counted = pair.encoder[1].num_batches_tracked.item()
    assert counted == 1, "only the steps of training move the averages"


def test_the_history_says_what_changed():
    objective = pv.IWAE(3, kl_weight=0.5)
    _, result = train(objective=objective)
    assert [row["epoch"] for row in result.history] == [1, 2, 3, 4]
    assert [row["num_particles"] for row in result.history] == [1, 1, 4, 4]
    assert [row["kl_weight"] for row in result.history] == pytest.approx([0.5 * 2 / 6, 0.5 * 5 / 6, 0.5, 0.5])
    last = [(e + 2 / 3) / 4 for e in range(4)]
    expected = [1e-3 * (0.01 + 0.99 * (1 + math.cos(math.pi * t)) / 2) for t in last]
    assert [row["learning_rate"] for row in result.history] == pytest.approx(expected)
    assert (objective.num_particles, objective.kl_weight) == (3, 0.5)
    assert all(0 < row["grad_norm"] <= 1.0 + 1e-6 for row in result.history)
    assert result.finished
    assert result.timings["steps"] == 12
    assert result.timings["ms_per_step"] > 0


def test_a_pair_runs_once_before_the_first_step_and_once_a_step():
    """However the objective changes; by the runs of a plain function that the objective finds at each of its steps."""
    runs_before, calls = [], []

    class Noting(pv.IWAE):
        def differentiable_loss(self, *args):
            runs_before.append(len(calls))
            return super().differentiable_loss(*args)

    weight = torch.zeros(6, requires_grad=True)

    def model(x):
        calls.append(len(x))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z.unsqueeze(-1) + weight).to_event(1), obs=x)

    guide = guide_of(lambda x: dist.Normal(x @ weight, 1.0))

    pv.fit(model, guide, images(), **SETTINGS | {"objective": Noting(), "validation": None})
    assert len(runs_before) == 12
    # three steps an epoch, one run to measure after each, and before the first a look at what is measured: more data
    assert runs_before == [1 + step + step // 3 + (step >= 3) for step in range(12)]


def test_fitting_again_goes_on_with_a_fresh_optimizer():
    pair, _ = train(epochs=1)
    before = {k: v.clone() for k, v in pair.state_dict().items()}
    result = pv.fit(pair.model, pair.guide, images(), objective=pv.ELBO(), epochs=1, lr=0.0, batch_size=20)
    assert len(result.history) == 1
    assert all(torch.equal(p, before[k]) for k, p in pair.named_parameters())


def test_progress_is_silent_where_there_is_no_terminal(capfd):
    train(epochs=1)
    assert capfd.readouterr() == ("", "")
    train(epochs=1, progress=True)
    assert "nats" in capfd.readouterr().err


# --- validation, early stopping, files -------------------------------------------------------------


@pytest.mark.parametrize(
    ("grows", "bounds", "patience", "best", "stops"),
    [
        ({}, [-3.0, -1.0, -2.0, -2.0], 2, 2, 4),
        ({}, [-3.0, -1.0, -2.0, -2.0], 1, 2, 3),
        ({}, [-3.0, -2.0, -1.0, -0.5], 1, 4, 4),
        ({}, [-1.0, -1.0, -1.0, -1.0], 3, 1, 4),
        ({}, [math.nan, -2.0, -math.inf, -3.0], None, 2, 4),
        ({"kl_warmup": 1}, [-1.0, -2.0, -3.0, -3.0], 1, 2, 3),
        ({"kl_warmup": 1.5}, [-1.0, -2.0, -4.0, -3.0], 1, 4, 4),
        ({"particles": (1, 3)}, [-1.0, -2.0, -3.0, -4.0], 1, 3, 4),
        ({"kl_warmup": 9}, [-1.0, -2.0, -3.0, -4.0], 1, 4, 4),
    ],
)
def test_early_stopping_and_the_best_checkpoint(tmp_path, monkeypatch, grows, bounds, patience, best, stops):
    """Neither the best nor a stop is before the objective is its final one; the last epoch is taken for that."""
    options = {"particles": None, "kl_warmup": 0, "patience": patience, "run_dir": tmp_path} | grows
    remaining, weights = iter(bounds), []

    def validated(self):
        weights.append(self.modules[0].log_scale.detach().clone())
        return next(remaining)

    monkeypatch.setattr(monitor.Validation, "__call__", validated)
    pair, result = train(**options)
    assert (result.best_epoch, len(result.history), result.finished) == (best, stops, True)
    run = runs.Run(tmp_path)
    assert torch.equal(run.weights("best")["log_scale"], weights[best - 1])
    assert torch.equal(run.weights("last")["log_scale"], pair.log_scale)
    assert torch.equal(pair.log_scale, weights[-1])
    pair, again = train(**options, resume=True)
    assert (again.best_epoch, len(again.history)) == (best, stops)


def test_a_run_holds_all_that_matters(tmp_path):
    pair, result = train(run_dir=tmp_path / "a" / "run", config={"data": {"name": "grey"}})
    run = runs.Run(tmp_path / "a" / "run")
    config = run.config()
    assert config["data"] == {"name": "grey"}
    assert config["objective"] == describe_objective(pv.IWAE(3)) | {"class": "pyrovae.objectives:IWAE"}
    assert (config["training"]["particles"], config["training"]["num_data"]) == ([1, 4], 55)
    assert {"torch", "pyro-ppl", "numpy", "pyrovae", "python"} <= config["versions"].keys()
    assert rows(run.history()) == rows(result.history)
    assert run.weights().keys() == pair.state_dict().keys()
    assert all(torch.equal(run.weights()[k], v) for k, v in pair.state_dict().items())
    assert sorted(p.name for p in run.path.iterdir()) == ["best", "config.json", "last", "metrics.jsonl"]
    loaded = pv.load(run.path, pair=Pair())
    assert torch.equal(loaded.encoder[1].running_var, pair.encoder[1].running_var)


def test_an_objective_of_ones_own_is_described_as_far_as_it_says(tmp_path):
    class Mine(pv.Objective):
        def __init__(self, temperature, weights):
            super().__init__(2)
            self.weights_, self.temperature = weights, temperature

        def bound(self, log_w):
            return log_w.mean(0)

    train(objective=Mine(torch.tensor([1.0, 2.0]), max), run_dir=tmp_path, particles=None, kl_warmup=0)
    assert runs.Run(tmp_path).config()["objective"]["arguments"] == {"temperature": [1.0, 2.0]}


# --- resume ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted():
    return train()


INSTANTS = [
    *((loop, "run_epoch", n, False) for n in (1, 2, 4)),
    *((runs.Run, "log", n, after) for n in (1, 3) for after in (False, True)),
    *((Path, "replace", n, after) for n in range(1, 8) for after in (False, True)),
    *((runs.Run, "save", n, True) for n in (1, 2, 4, 6)),
    *((runs.run, "write_json", 1, after) for after in (False, True)),
]


@pytest.mark.parametrize(("owner", "name", "call", "after"), INSTANTS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_a_run_killed_at_any_instant_ends_with_the_same_bits(tmp_path, uninterrupted, owner, name, call, after):
    dying_at(owner, name, call, lambda: train(run_dir=tmp_path / "run"), after=after)
    torch.rand(7)  # the process that goes on is another one
    resumed = train(run_dir=tmp_path / "run", resume=True)
    assert same(resumed, uninterrupted)
    assert resumed[1].best_epoch == uninterrupted[1].best_epoch
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["best", "config.json", "last", "metrics.jsonl"]


def test_a_run_of_a_device_that_is_not_here_goes_on(tmp_path, uninterrupted, monkeypatch):
    """Its optimizer lay there, and it had generators of four devices."""
    snapshot = trainee.rng_snapshot
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
        patch.setattr(trainee, "rng_snapshot", lambda: snapshot() | {"cuda": 4 * [torch.zeros(16, dtype=torch.uint8)]})
        dying_at(loop, "run_epoch", 3, lambda: train(run_dir=tmp_path / "run"))
    assert same(train(run_dir=tmp_path / "run", resume=True), uninterrupted)


SCRIPT = """if True:
    import sys, torch, pyro, pyrovae as pv
    torch.manual_seed(0)
    vae = pv.models.VAE((6,), latent_dim=2, hidden=(4,))
    data = pv.data.Images(torch.rand(100, 6), binarization="dynamic")
    pv.fit(vae.model, vae.guide, data, objective=pv.IWAE(2), epochs=40, batch_size=20, run_dir=sys.argv[1], resume=True)
"""


def test_a_process_that_is_killed_resumes_to_the_same_bits(tmp_path):
    def start(folder):
        command = [sys.executable, "-c", SCRIPT, str(folder)]
        return subprocess.Popen(command, cwd=Path(__file__).parents[1], env=os.environ | {"OMP_NUM_THREADS": "1"})

    whole, killed = start(tmp_path / "whole"), start(tmp_path / "killed")
    run, deadline = runs.Run(tmp_path / "killed"), time.monotonic() + 300
    while len(run.history()) < 3:
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert len(run.history()) < 40
    assert start(tmp_path / "killed").wait() == whole.wait() == 0
    first, second = runs.Run(tmp_path / "whole"), run
    assert all(torch.equal(v, second.weights()[k]) for k, v in first.weights().items())
    assert len(first.history()) == 40
    assert rows(first.history()) == rows(second.history())


def test_a_finished_run_is_left_as_it_is(tmp_path, monkeypatch):
    finished = train(run_dir=tmp_path)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.suffix in (".json", ".pt", ".safetensors")}
    monkeypatch.setattr(loop, "run_epoch", lambda *args: pytest.fail("a finished run was trained"))
    again = train(run_dir=tmp_path, resume=True)
    assert same(again, finished)
    assert again[1].finished
    assert {p: p.stat().st_mtime_ns for p in files} == files


def test_a_run_that_is_there_is_not_overwritten(tmp_path):
    train(run_dir=tmp_path, epochs=1)
    refused(ValueError, "holds a run already: pass resume=True", train, run_dir=tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 10}, {"lr": 0.1}, {"seed": 1}, {"kl_warmup": 0}, {"objective": pv.IWAE(4)},
        {"objective": pv.VIMCO(3), "particles": None},
        {"data": pv.data.Images(GREY[:54].round())}, {"validation": None},
        {"config": {"data": {"name": "other"}}}, {"optimizer": lambda p: torch.optim.SGD(p, lr=1e-3)},
    ],
    ids=lambda c: next(iter(c)),
)  # fmt: skip
def test_settings_that_changed_are_refused_on_resume(tmp_path, change):
    train(run_dir=tmp_path, epochs=4)
    before = (tmp_path / runs.CONFIG).read_text()
    match = "changed since it was begun|resume with the same settings"
    refused(ValueError, match, train, run_dir=tmp_path, resume=True, **change)
    assert (tmp_path / runs.CONFIG).read_text() == before


@pytest.mark.parametrize("file", ["config.json", "last/weights.safetensors", "last/state.pt", "metrics.jsonl"])
def test_a_damaged_run_is_not_resumed(tmp_path, file):
    train(run_dir=tmp_path, epochs=2)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-30])
    with pytest.raises(CheckpointError):
        train(run_dir=tmp_path, epochs=2, resume=True)


# --- what cannot be trained ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("objective", [pv.ELBO(), pv.IWAE(2), Trace_ELBO()])
@pytest.mark.parametrize(("how", "where"), [("loss", 'site "z"'), ("gradient", 'parameter "log_scale"')])
def test_what_becomes_nan_is_named_and_the_last_checkpoint_is_finite(tmp_path, objective, how, where):
    class Sick(Pair):
        epoch = 0

        def guide(self, x):
            if self.encoder.training and torch.is_grad_enabled():
                self.epoch += 1
            sick = self.epoch > 3 and how == "loss"
            scale = self.log_scale.exp() * (math.nan if sick else 1.0)
            if self.epoch > 3 and how == "gradient":
                scale = scale + (self.log_scale * 0).abs().sqrt()  # value 0, gradient 0 / 0
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.encoder(x), scale).to_event(1))

    pair = Sick()
    with pytest.raises(FloatingPointError, match=rf"step 1 of epoch 3 .*{where}.* is nan.*checkpoint"):
        pv.fit(pair.model, pair.guide, GREY.round(), objective=objective, epochs=9, run_dir=tmp_path)
    assert all(torch.isfinite(v).all() for v in runs.Run(tmp_path).weights().values())


def test_a_loss_that_is_nan_at_once_promises_no_checkpoint(tmp_path):
    pair = Pair()
    with torch.no_grad():
        pair.decoder.bias.fill_(math.nan)
    with (
        pyro.validation_enabled(False),
        pytest.raises(FloatingPointError, match=r"step 1 of epoch 1 .* \"decoder.bias\" is nan") as caught,
    ):
        pv.fit(pair.model, pair.guide, GREY.round(), objective=pv.ELBO(), epochs=1, run_dir=tmp_path)
    assert "checkpoint" not in str(caught.value)


BAD = [
    ({"lr": 0.1, "optimizer": torch.optim.SGD}, ValueError, "lr=0.1 belongs to the default optimizer"),
    ({"optimizer": torch.optim.SGD([torch.zeros(1)], lr=0.1)}, TypeError, "function of the parameters"),
    ({"optimizer": lambda parameters: None}, TypeError, "must be one of torch.optim over the pair"),
    ({"validation": None, "patience": 3}, ValueError, "patience needs data"),
    ({"resume": True}, ValueError, "pass run_dir"),
    ({"device": "cuda:99"}, ValueError, "CUDA devices are here"),
    ({"objective": pv.ELBO}, TypeError, "objective must be"),
    ({"data": "mnist"}, TypeError, "data must be"),
]


@pytest.mark.parametrize(("options", "error", "match"), BAD, ids=lambda v: getattr(v, "__name__", str(v)[:30]))
def test_bad_arguments_are_one_clear_error(tmp_path, options, error, match):
    state = torch.get_rng_state()
    with pytest.raises(error, match=match) as caught:
        train(**options)
    assert "\n" not in str(caught.value)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_asked_for_is_never_the_cpu():
    refused(ValueError, '"cuda" was asked for, but 0 CUDA devices are here', train, device="cuda")


def test_nothing_to_train():
    def fixed(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([6]).to_event(1), obs=x)

    refused(ValueError, "no parameters to train", pv.fit, fixed, lambda x: None, GREY, objective=pv.ELBO(), epochs=1)
