"""The run directory: what is written reads back, no crash leaves half of it, nothing damaged or hostile is believed."""

import json
import math
import pickle
import random
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pyrovae as pv
from pyrovae import runs
from pyrovae.engine.randomness import restore_rng, rng_snapshot
from pyrovae.errors import CheckpointError
from pyrovae.runs import Run
from tests.state import refused
from tests.training import Killed, dying_at

WEIGHTS = {"a": torch.randn(3, 2), "b": torch.tensor(2, dtype=torch.int64), "c": torch.randn(4, dtype=torch.float64)}


def state(epoch=1):
    return {"epoch": epoch, "best_epoch": None, "finished": False, "optimizer": {}, "rng": rng_snapshot()}


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run")
    run.start({"seed": 0})
    return run


def value_of(weights):
    return {name: tensor.tolist() for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"a": (1, 2.5), 3: None}, {"a": [1, 2.5], "3": None}),
        ([math.inf, -math.inf, math.nan, True], [None, None, None, True]),
        (
            {"t": torch.tensor([1.0, math.inf]), "n": np.float64(2), "i": np.int64(3)},
            {"t": [1.0, None], "n": 2.0, "i": 3},
        ),
        ({"p": Path("a/b"), "f": nn.Linear, "o": object()}, {"p": "a/b", "f": "Linear", "o": "object"}),
    ],
)
def test_json_is_strict_and_holds_everything(tmp_path, content, expected):
    runs.write_json(tmp_path / "x.json", content)
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail) == expected
    assert runs.as_json(runs.as_json(content)) == expected
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_weights_and_state_read_back(run):
    run.save("last", WEIGHTS, state(7))
    loaded = run.weights()
    assert {k: (v.dtype, v.tolist()) for k, v in loaded.items()} == {
        k: (v.dtype, v.tolist()) for k, v in WEIGHTS.items()
    }
    assert run.state()["epoch"] == 7
    assert sorted(p.name for p in run.path.iterdir()) == ["config.json", "last"]


def test_tied_and_strided_tensors_can_be_saved(run):
    a = torch.arange(6.0).view(2, 3)
    run.save("last", {"a": a, "tied": a, "t": a.T, "part": a[:, 1]})
    assert value_of(run.weights()) == value_of({"a": a, "tied": a, "t": a.T, "part": a[:, 1]})


OPERATIONS = [
    (shutil, "rmtree"), (Path, "replace"), (Path, "mkdir"), (runs.run, "save_file"), (torch, "save"),
]  # fmt: skip


def dying_in(patch, instant):
    """Let the ``instant``-th file operation from now on kill the process, so to say, before it happens."""
    calls = []

    def dying(original):
        def operation(*args, **kwargs):
            calls.append(original)
            if len(calls) == instant:
                raise Killed
            return original(*args, **kwargs)

        return operation

    for owner, name in OPERATIONS:
        patch.setattr(owner, name, dying(getattr(owner, name)))


@pytest.mark.parametrize("first", range(1, 10))
@pytest.mark.parametrize("second", range(1, 10))
def test_no_two_kills_in_saves_lose_the_checkpoint(run, monkeypatch, first, second):
    """Killed at these operations of two saves in a row: the old or the new one is there, whole, each time."""
    run.save("last", {"v": torch.tensor(0)}, state(0))
    before = 0
    for attempt, instant in ((1, first), (2, second)):
        with monkeypatch.context() as patch, suppress(Killed):
            dying_in(patch, instant)
            run.save("last", {"v": torch.tensor(attempt)}, state(attempt))
        found = run.weights()["v"].item()
        assert found in (before, attempt)
        assert run.state()["epoch"] == found
        before = found
    run.save("last", {"v": torch.tensor(99)}, state(99))
    assert run.state()["epoch"] == run.weights()["v"].item() == 99
    assert sorted(p.name for p in run.path.iterdir()) == ["config.json", "last"]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_last_line_cut_short_is_left_out(run, cut):
    for epoch in (1, 2, 3):
        run.log({"epoch": epoch, "bound": -90.0 / epoch})
    path = run.path / runs.METRICS
    path.write_bytes(path.read_bytes()[:-cut])
    assert [row["epoch"] for row in run.history()] == ([1, 2, 3] if cut == 1 else [1, 2])
    assert [row["epoch"] for row in run.rewind(2)] == [1, 2]
    run.log({"epoch": 3})
    assert [row["epoch"] for row in run.history()] == [1, 2, 3]


@pytest.mark.parametrize(
    "text", ["", '{"epoch": 1}\n', '{"epoch": 1}\n{"epoch": 3}\n', "\xff\xfe\n", '{"epoch": 1}\n[2]\n']
)
def test_metrics_that_lag_behind_the_checkpoint_are_refused(run, text):
    (run.path / runs.METRICS).write_bytes(text.encode("latin1"))
    refused(CheckpointError, "epochs do not run from 1 to 2", run.rewind, 2)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "3", b"\xff\xfe"])
def test_a_bad_config_is_one_clear_error(run, text):
    path = run.path / runs.CONFIG
    path.unlink() if text is None else path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(CheckpointError, rf"config\.json is {'absent;' if text is None else 'unreadable'}", run.config)
    refused(CheckpointError, "holds no run", pv.load, run.path)


@pytest.mark.parametrize("damage", [b"", b"\0" * 7, None, b"garbage" * 100])
@pytest.mark.parametrize("file", [runs.WEIGHTS, runs.STATE])
def test_damaged_checkpoints_are_data_errors(run, file, damage):
    run.save("last", WEIGHTS, state())
    path = run.path / "last" / file
    path.write_bytes(path.read_bytes()[:-20] if damage is None else damage)
    with pytest.raises(CheckpointError, match=rf'{file}" is damaged'):
        run.weights() if file == runs.WEIGHTS else run.state()


def test_a_state_without_its_parts_is_damaged(run):
    run.save("last", WEIGHTS, {"epoch": 1})
    refused(CheckpointError, "no state of a run", run.state)


def test_no_checkpoint_is_said_so(run):
    assert run.state() is None
    refused(CheckpointError, 'no checkpoint "best"', run.weights, "best")


# --- loading ---------------------------------------------------------------------------------------


def saved(path, model=None, described=None):
    model = model or pv.models.VAE((4,), latent_dim=2, hidden=(3,))
    run = Run(path)
    run.start({"model": runs.describe(model) if described is None else described})
    run.save("last", model.state_dict(), state())
    return run, model


def test_load_builds_the_model_again_and_leaves_the_generator(tmp_path):
    run, model = saved(tmp_path)
    before = torch.get_rng_state()
    loaded = pv.load(run.path)
    assert torch.equal(torch.get_rng_state(), before)
    assert value_of(loaded.state_dict()) == value_of(model.state_dict())
    assert not loaded.training


class Bomb:
    def __reduce__(self):
        return print, ("BOOM",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("file", [runs.WEIGHTS, runs.STATE])
def test_a_pickle_in_a_run_is_never_executed(tmp_path, capsys, file):
    run, _ = saved(tmp_path)
    (run.path / "last" / file).write_bytes(pickle.dumps(Bomb()))
    torch.save(Bomb(), run.path / "last" / "more.pt")
    with pytest.raises(CheckpointError):
        run.state() if file == runs.STATE else pv.load(run.path)
    torch.save({"epoch": Bomb()}, run.path / "last" / runs.STATE)
    with pytest.raises(CheckpointError):
        run.state()
    assert "BOOM" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "path",
    [
        "os:system", "builtins:exec", "torch:save", "torch.nn:functional", "no.such:Model", "os", ":", ".os:system",
        "json:",
    ],
)  # fmt: skip
def test_only_modules_are_built(tmp_path, path):
    run, _ = saved(tmp_path, described={"class": path, "arguments": {}})
    refused(CheckpointError, "is not pyrovae's", pv.load, run.path)
    refused(CheckpointError, r"no model class|cannot import", pv.load, run.path, trust=True)


@pytest.mark.parametrize("described", [[], "VAE", {"class": "pyrovae.models.vae:VAE"}, {}])
def test_a_run_that_does_not_describe_its_model_asks_for_the_pair(tmp_path, described):
    run, model = saved(tmp_path, described=described)
    refused(ValueError, "pass pair=", pv.load, run.path)
    if not described:
        other = pv.models.VAE((4,), latent_dim=2, hidden=(3,))
        assert value_of(pv.load(run.path, pair=other).state_dict()) == value_of(model.state_dict())


#: A config.json as version 0.1.0 wrote it, which named classes by the files they were in.
OLD_CONFIG = """{
  "model": {
    "class": "pyrovae.models.vae:VAE",
    "arguments": {
      "input_shape": [4], "latent_dim": 2, "hidden": [3], "likelihood": "bernoulli", "scale": "learned", "levels": null,
      "prior": "normal", "posterior": "diagonal", "components": null, "flows": null, "flow_hidden": null,
      "network": "mlp", "activation": "tanh", "channels": null
    }
  },
  "objective": {
    "class": "pyrovae.objectives.bounds:IWAE",
    "arguments": {
      "num_particles": 3, "kl_weight": 1.0, "likelihood_weight": 1.0, "gradient": "total", "fold_particles": false,
      "vectorize_particles": true
    }
  },
  "versions": {"pyrovae": "0.1.0", "python": "3.11.7", "torch": "2.14.1", "pyro-ppl": "1.9.2", "numpy": "2.4.6"},
  "training": {
    "epochs": 2, "batch_size": 100, "lr": 0.001, "optimizer": "Adam", "schedule": "constant", "particles": null,
    "kl_warmup": 0.0, "clip_norm": null, "precision": "float32", "device": "cpu", "seed": 0, "threads": 2,
    "num_data": 20, "patience": null, "compile": "auto", "num_validation": null
  }
}
"""


def test_a_run_of_an_older_version_is_opened_and_resumed(tmp_path):
    x = torch.arange(80.0).view(20, 4) % 2

    def train(objective=None, **options):
        torch.manual_seed(0)
        pair = pv.models.VAE((4,), latent_dim=2, hidden=(3,))
        result = pv.fit(pair.model, pair.guide, x, objective=objective or pv.IWAE(3), epochs=2, device="cpu", **options)
        return pair, [row["bound"] for row in result.history]

    whole, bounds = train()
    dying_at(Run, "log", 2, lambda: train(run_dir=tmp_path))
    assert len(Run(tmp_path).history()) == 1
    (tmp_path / runs.CONFIG).write_text(OLD_CONFIG)
    (tmp_path / "last" / runs.MANIFEST).unlink()
    assert value_of(pv.load(tmp_path).state_dict()) == value_of(Run(tmp_path).weights())
    assert pv.load(tmp_path, pair=pv.models.VAE((4,), latent_dim=2, hidden=(3,)))
    refused(ValueError, "begun with objective", train, pv.MIWAE(3, 1), run_dir=tmp_path, resume=True)
    resumed, again = train(run_dir=tmp_path, resume=True)
    assert again == bounds
    assert value_of(resumed.state_dict()) == value_of(whole.state_dict())


@pytest.mark.parametrize("cls", [*pv.models.MODELS.values(), *pv.objectives.OBJECTIVES.values()])
def test_classes_are_named_by_the_package_that_exports_them(cls):
    module, name = runs.class_path(cls).split(":")
    assert module in ("pyrovae.models", "pyrovae.objectives")
    assert getattr(sys.modules[module], name) is cls


class Tuples(nn.Linear):
    def __init__(self, sizes=(1, 2)):
        super().__init__(*sizes)
        self.config = {"sizes": tuple(sizes)}


def test_a_config_with_tuples_is_the_same_after_json(tmp_path):
    run, model = saved(tmp_path, Tuples())
    assert value_of(pv.load(run.path, pair=Tuples()).state_dict()) == value_of(model.state_dict())
    refused(CheckpointError, "pass the same model", pv.load, run.path, pair=Tuples((2, 2)))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: w.pop("decoder.0.bias"), r"missing decoder\.0\.bias"),
        (lambda w: w.update(extra=torch.zeros(1)), "unknown extra"),
        (lambda w: w.update({"decoder.0.bias": torch.zeros(99)}), r"of other shape decoder\.0\.bias"),
    ],
)
def test_weights_of_another_model_are_refused_whole(tmp_path, change, match):
    run, _ = saved(tmp_path)
    weights = run.weights()
    change(weights)
    run.save("last", weights, state())
    other = pv.models.VAE((4,), latent_dim=2, hidden=(3,))
    before = value_of(other.state_dict())
    refused(CheckpointError, match, pv.load, run.path, pair=other)
    assert value_of(other.state_dict()) == before


def test_the_generators_come_back(run):
    run.save("last", WEIGHTS, state())
    snapshot = run.state()["rng"]

    def draws():
        return (
            torch.rand(2).tolist(),
            np.random.rand(2).tolist(),
            np.random.randn(),
            random.random(),
            random.gauss(0, 1),
        )

    restore_rng(snapshot)
    first = draws()
    restore_rng(snapshot)
    assert draws() == first
