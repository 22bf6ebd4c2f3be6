"""The command line as its users meet it: outputs, files, exit codes, one-line errors."""

import contextlib
import functools
import io
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyrovae as pv
from pyrovae.app.cli import main
from pyrovae.app.job import as_bits, load_data, observes_bits
from pyrovae.app.parts import Parts
from pyrovae.app.pictures import beside, vectors_of
from pyrovae.app.settings import Settings
from pyrovae.models.base import as_pair

SMALL = ["--epochs", "2", "--samples", "20", "--set", "hidden=[16]", "--latent-dim", "3", "--device", "cpu"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture
def run(capsys):
    """Run the command line, which must end with ``code``; return standard output and standard error."""

    def call(*arguments, code=0):
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        captured = capsys.readouterr()
        assert stop.value.code == code, captured.err
        return captured

    return call


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder in which one small run stands under ``runs``, and what its training printed."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(folder)
        with pytest.raises(SystemExit) as stop:
            main(["train", *SMALL])
    assert stop.value.code == 0
    return folder / "runs" / "vae-digits-elbo", out.getvalue()


@pytest.fixture
def a(trained, tmp_path):
    """A copy of that run, called a."""
    return shutil.copytree(trained[0], tmp_path / "a")


def test_train_without_a_model_name_trains_measures_and_draws(trained):
    folder, out = trained
    assert "test NLL" in out
    assert "active units" in out
    for name in ("config.json", "metrics.jsonl", "results.json", "last/weights.safetensors", "last/state.pt"):
        assert (folder / name).is_file()
    for name in ("curves", "samples", "reconstructions", "latent_plane"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((folder / "results.json").read_text())
    assert results["num_samples"] == 20
    assert results["num_images"] == 360
    assert results["nll_std_error"] > 0
    assert [row["epoch"] for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())] == [1, 2]


def test_the_first_run_has_settings_of_its_own_for_what_is_not_given(run, tmp_path):
    short = ["--epochs", 1, "--samples", 5, "--device", "cpu"]
    run("train", *short, "--run-dir", "first")
    run("train", *short, "--set", "hidden=[8]", "--set", "latent_dim=2", "--lr", 0.02, "--run-dir", "own")
    run("train", "vae", *short, "--run-dir", "named")
    found = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "own", "named")]
    models = [config["model"]["arguments"] for config in found]
    assert [(model["latent_dim"], model["hidden"]) for model in models] == [(4, [64, 64]), (2, [8]), (50, [200, 200])]
    assert [config["settings"]["lr"] for config in found] == [0.01, 0.02, 1e-3]
    assert [config["training"]["schedule"] for config in found] == ["cosine", "cosine", "constant"]
    assert [config["settings"]["epochs"] for config in found] == [1, 1, 1]


def test_the_manifold_is_drawn_for_the_prior_that_lays_it_out(run, tmp_path):
    for prior in ("normal", "mixture"):
        run("train", *TINY, "--latent-dim", 2, "--set", f"prior={prior}", "--run-dir", prior)
        assert (tmp_path / prior / "manifold.png").exists() == (prior == "normal")


def test_labels_and_bits_are_drawn_in_a_plane_where_nothing_else_is():
    y, z, grid = torch.eye(4), torch.rand(4, 2), torch.rand(4, 2, 2)
    assert vectors_of({"grid": grid, "y": y, "z": z}) is z
    assert vectors_of({"y": y}) is y
    assert vectors_of({"grid": grid}) is None


def test_data_stand_beside_samples_by_class():
    labels = torch.arange(30).remainder(4).clamp(max=2)  # two of four are of the last class
    images = pv.data.Images(torch.arange(30.0).view(30, 1, 1, 1) / 30, labels)
    shown = (30 * beside(images, 12, 3).flatten()).round().long()
    assert labels[shown].tolist() == [0, 1, 2] * 4
    assert len(set(shown.tolist())) == 12
    few = images.subset([0, 1, 2, 5])
    assert (30 * beside(few, 6, 3)).flatten().round().tolist() == [0, 1, 2, 0, 5, 2]
    for other, columns in ((images.unlabelled(), 3), (images, 4), (images, None)):
        assert torch.equal(beside(other, 12, columns), images.x[:12])


def test_evaluate_repeats_the_results_of_train(run, tmp_path, a):
    trained = json.loads((tmp_path / "a/results.json").read_text())
    assert "test NLL" in run("evaluate", "a", "--samples", 20).out
    assert json.loads((tmp_path / "a/results.json").read_text())["nll"] == trained["nll"]


def test_evaluate_in_full(run, tmp_path, monkeypatch, a):
    short = functools.partial(pv.ais_log_likelihood, num_temperatures=10, num_chains=4, leapfrog_steps=2)
    monkeypatch.setattr("pyrovae.app.measure.ais_log_likelihood", short)
    monkeypatch.setattr("pyrovae.app.measure.CLOSER", 10)
    out = run("evaluate", "a", "--samples", 70, "--ais", "--diagnostics").out
    for words in ("NLL by AIS", "posterior gap", "amortisation", 'units of "z"', "active, averaged"):
        assert words in out
    results = json.loads((tmp_path / "a/results.json").read_text())
    assert results["ais"]["num_images"] == 10
    assert abs(results["ais"]["nll"] - results["ais"]["importance_nll"]) < 5
    assert len(results["diagnostics"]["information"]["z"]["kl"]) == 3
    gap = results["diagnostics"]["posterior_gap"]
    assert gap["gap"] == pytest.approx(gap["iwae"] - gap["log_p"])
    assert gap["refined_elbo"] > gap["elbo"]


def test_sample_writes_a_picture(run, tmp_path, a):
    assert "nine.png" in run("sample", "a", "-n", 9, "--output", "nine.png", "--draws").out
    assert (tmp_path / "nine.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_run_takes_a_new_folder(run, tmp_path, trained):
    shutil.copytree(trained[0], tmp_path / "runs/vae-digits-elbo")
    run("train", *SMALL)
    assert (tmp_path / "runs/vae-digits-elbo-2/results.json").is_file()


def test_resume_of_an_interrupted_run_ends_where_an_uninterrupted_one_does(run, tmp_path, monkeypatch, a):
    save, calls = pv.runs.Run.save, []

    def save_once(self, *args, **kwargs):
        calls.append(args[0])
        if len(calls) > 1:
            raise KeyboardInterrupt
        save(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pv.runs.Run, "save", save_once)
        assert "--resume" in run("train", *SMALL, "--run-dir", "cut", code=130).err
    run("train", "--resume", "--run-dir", "cut")
    results = [json.loads((tmp_path / name / "results.json").read_text())["nll"] for name in ("a", "cut")]
    assert results[0] == results[1]


def test_resume_of_a_finished_run_does_nothing(run, tmp_path, a):
    before = (tmp_path / "a/results.json").read_bytes(), (tmp_path / "a/last/weights.safetensors").read_bytes()
    assert "finished" in run("train", "--resume", "--run-dir", "a").out
    assert before == (
        (tmp_path / "a/results.json").read_bytes(),
        (tmp_path / "a/last/weights.safetensors").read_bytes(),
    )


def test_resume_refuses_other_settings(run, a):
    assert "begun with" in run("train", "--resume", "--run-dir", "a", "--lr", 0.5, code=2).err


def test_a_users_own_class_trains_and_comes_back(run, tmp_path):
    (tmp_path / "my_pair.py").write_text(
        textwrap.dedent(
            """
            import pyro, pyro.distributions as dist
            from torch import nn

            class MyPair(nn.Module):
                def __init__(self, latent_dim=2, width=8):
                    super().__init__()
                    self.latent_dim = latent_dim
                    self.decoder = nn.Sequential(nn.Linear(latent_dim, width), nn.Tanh(), nn.Linear(width, 64))
                    self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 2 * latent_dim))

                def model(self, x):
                    with pyro.plate("data", len(x)):
                        z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
                        logits = self.decoder(z).unflatten(-1, (1, 8, 8))
                        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=x)

                def guide(self, x):
                    with pyro.plate("data", len(x)):
                        mean, log_scale = self.encoder(x).chunk(2, -1)
                        pyro.sample("z", dist.Normal(mean, log_scale.exp()).to_event(1))
            """
        )
    )
    arguments = ["train", "my_pair:MyPair", "--epochs", 1, "--samples", 10, "--set", "width=4", "--run-dir", "mine"]
    run(*arguments, "--objective", "iwae", "--particles", 3)
    run("evaluate", "mine", "--samples", 10, "--trust")
    run("sample", "mine", "-n", 4, "--trust")


OWN = """
import torch, pyro, pyro.distributions as dist
from torch import nn

class Plain(nn.Module):
    num_classes = 0

    def __init__(self, input_shape):
        super().__init__()
        self.input_shape = tuple(input_shape)
        self.decoder, self.encoder = nn.Linear(2 + self.num_classes, 64), nn.Linear(64, 2)
        self.register_buffer("seen", torch.zeros(()))

    def joined(self, z, y=None):
        if y is None:
            return z
        code = nn.functional.one_hot(y, self.num_classes).to(z)
        return torch.cat([z, code.expand(*z.shape[:-1], -1)], -1)

    def decode(self, z, y=None):
        return self.decoder(self.joined(z, y)).sigmoid().unflatten(-1, self.input_shape)

    def initialise(self, x):
        with torch.no_grad():
            self.decoder.bias.copy_(x.mean(0).clamp(0.01, 0.99).logit().flatten())

    def metrics(self, x, *labels):
        return {"ink": x.mean().item()}

    def after_training(self, data):
        self.seen.fill_(len(data))
        return True

    def model(self, x, y=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(self.decode(z, y)).to_event(3), obs=x)

    def guide(self, x, y=None):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x.flatten(1)), 1.0).to_event(1))

class Conditional(Plain):
    conditional = True

    def __init__(self, input_shape, num_classes):
        self.num_classes = num_classes
        super().__init__(input_shape)

    @property
    def config(self):
        return {"input_shape": list(self.input_shape), "num_classes": self.num_classes}

    def score_labels(self, x, labels):
        return {"largest": labels.max().item()}

class NoGuide(nn.Module):
    def model(self, x): ...
"""


def test_a_users_own_class_says_what_it_can(run, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    run("train", "own:Plain", *TINY, "--run-dir", "p")
    assert (tmp_path / "p/manifold.png").is_file()
    assert 0 < json.loads((tmp_path / "p/results.json").read_text())["ink"] < 1
    pair = pv.load("p", pair=__import__("own").Plain((1, 8, 8)))
    assert pair.seen.item() == 1437
    rate = pv.data.load("digits").train.x.mean(0).clamp(0.01, 0.99).flatten()
    assert (pair.decoder.bias.sigmoid() - rate).abs().max() < 0.1
    run("train", "own:Conditional", *TINY, "--run-dir", "c")
    assert not (tmp_path / "c/manifold.png").exists()
    assert json.loads((tmp_path / "c/results.json").read_text())["largest"] == 9
    run("sample", "c", "-n", 3, "--label", 9, "--trust")
    run("evaluate", "c", "--samples", 5, "--trust")
    assert "NoGuide has no .guide(x)" in run("train", "own:NoGuide", *TINY, "--run-dir", "n", code=2).err


TINY = ["--epochs", "1", "--samples", "5", "--device", "cpu"]


def test_a_conditional_model_is_trained_sampled_and_compared(run, tmp_path):
    run("train", "conditional", *TINY, "--set", "hidden=[8]", "--run-dir", "c")
    run("sample", "c", "-n", 20, "--label", 3, "--temperature", 0.5)
    run("sample", "c", "-n", 20)
    assert "label must be one of 0 ... 9, got '12'" in run("sample", "c", "--label", 12, code=2).err
    run("train", "vae", *TINY, "--set", "hidden=[8]", "--run-dir", "v")
    assert "not conditional" in run("sample", "v", "--label", 1, code=2).err
    out = run("compare", "c", "v").out
    assert [line.split()[:2] for line in out.splitlines()[1:3]] == [["c", "digits"], ["v", "digits"]]


def test_a_semi_supervised_model_reports_its_accuracy(run, tmp_path):
    arguments = ["train", "semi_supervised", *TINY, "--set", "hidden=[8]", "--set", "labels_per_class=5"]
    assert "accuracy" in run(*arguments, "--run-dir", "s").out
    assert 0 <= json.loads((tmp_path / "s/results.json").read_text())["accuracy"] <= 1
    assert "per_class=1000 asked for" in run(*arguments[:-1], "labels_per_class=1000", "--run-dir", "t", code=3).err


def test_pca_is_fitted_measured_exactly_and_opened_again(run, tmp_path):
    assert "exactly" in run("train", "pca", "--latent-dim", 5, "--run-dir", "p").out
    trained = json.loads((tmp_path / "p/results.json").read_text())
    assert trained["nll_std_error"] == 0
    assert "finished" in run("train", "pca", "--latent-dim", 5, "--run-dir", "p", "--resume").out
    run("evaluate", "p")
    assert json.loads((tmp_path / "p/results.json").read_text())["nll"] == trained["nll"]
    pca = pv.load("p")
    x = pv.data.load("digits").test.x
    assert -pca.log_prob(x).mean().item() == pytest.approx(trained["nll"])
    for extra, says in ((["--epochs", 3], "PCA has no epochs"), (["--objective", "iwae"], "a rule of its own")):
        refused = run("train", "pca", *extra, "--run-dir", "q", code=2)
        assert says in refused.err
        assert ("PCA on" in refused.out) == ("--epochs" in extra)  # an objective is refused before data are read


def test_an_rbm_trains_on_bits(run, tmp_path):
    assert "exactly" in run("train", "rbm", "--epochs", 2, "--set", "num_hidden=5", "--run-dir", "r").out
    config = json.loads((tmp_path / "r/config.json").read_text())
    assert config["data"]["binarization"] == "dynamic"
    run("sample", "r", "-n", 4)
    assert (tmp_path / "r/curves.png").is_file()
    large = ["--set", "num_hidden=21", "--set", "ais_steps=20", "--set", "burn_in=5"]
    assert "by annealing" in run("train", "rbm", "--epochs", 1, *large, "--run-dir", "l").out
    assert json.loads((tmp_path / "l/results.json").read_text())["nll_std_error"] > 0


def test_an_autoencoder_has_no_log_p_but_samples(run, tmp_path):
    small = ["--set", "hidden=[8]", "--latent-dim", 3]
    assert "not a generative model" in run("train", "autoencoder", *TINY, *small, "--run-dir", "a").out
    assert (tmp_path / "a/samples.png").is_file()
    run("sample", "a", "-n", 4)
    assert "nothing to anneal" in run("evaluate", "a", "--ais", code=2).err
    assert "none" in run("compare", "a").out


def test_a_vqvae_gets_a_learned_prior(run, tmp_path):
    small = ["--set", "num_codes=4", "--set", "code_dim=2", "--set", "channels=4", "--set", "residual_layers=1"]
    out = run("train", "vqvae", *TINY, *small, "--run-dir", "v").out
    assert "as a bound" in out
    assert "perplexity" in out
    learned = ["train", "code_prior", "--data", "codes:v", *TINY, "--set", "channels=4"]
    assert "exactly" in run(*learned, "--run-dir", "p").out
    run("evaluate", "p/vqvae", "--samples", 1)
    run("sample", "p/vqvae", "-n", 4)
    bounds = [json.loads((tmp_path / f"{name}/results.json").read_text())["nll"] for name in ("v", "p", "p/vqvae")]
    uniform = 4 * math.log(4)
    assert bounds[2] == pytest.approx(bounds[0] - uniform + bounds[1], rel=1e-4)
    run("train", "pca", "--latent-dim", 2, "--run-dir", "q")
    assert "needs the run of a VQVAE, got PCA" in run("train", "code_prior", "--data", "codes:q", *TINY, code=2).err


def test_tensorboard_has_every_epoch_once_though_a_run_went_on(run, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    run("train", *SMALL, "--tensorboard", "--run-dir", "t")
    run("train", "--run-dir", "t", "--resume", "--epochs", 3, "--tensorboard")
    run("train", "pca", "--latent-dim", 2, "--tensorboard", "--run-dir", "p")
    events = accumulator(str(tmp_path / "t/tensorboard")).Reload()
    rows = [json.loads(line) for line in (tmp_path / "t/metrics.jsonl").read_text().splitlines()]
    for name, values in (
        ("bound", [r["bound"] for r in rows]),
        ("active_units/z", [r["active_units"]["z"] for r in rows]),
    ):
        assert [event.step for event in events.Scalars(name)] == [1, 2, 3]
        assert [event.value for event in events.Scalars(name)] == pytest.approx(values)
    assert "tensorboard" not in json.loads((tmp_path / "t/config.json").read_text())["settings"]


def test_tensorboard_that_is_not_installed_is_named_before_anything_is_trained(run, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'pip install "pyrovae[tensorboard]"' in run("train", *SMALL, "--tensorboard", code=6).err
    assert not (tmp_path / "runs").exists()


def test_export_writes_the_networks_of_a_run(run, tmp_path, a):
    pytest.importorskip("onnxruntime")
    assert run("export", "a", "--output", "networks").out.splitlines() == [
        f"wrote {Path('networks', name)}" for name in ("encoder.onnx", "decoder.onnx")
    ]
    assert sorted(path.name for path in (tmp_path / "networks").iterdir()) == ["decoder.onnx", "encoder.onnx"]


def test_a_measured_run_has_a_model_card(run, tmp_path, a):
    assert "| test NLL, nats per datum |" in (a / "README.md").read_text()
    (a / "README.md").write_text("mine")
    run("evaluate", "a", "--samples", 5)
    assert (a / "README.md").read_text() == "mine"


@pytest.fixture
def completed(run, monkeypatch):
    """What bash is offered for the last of some words."""

    def call(*words):
        monkeypatch.setenv("_PYROVAE_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", " ".join(("pyrovae", *words)))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        found = run().out.split()
        monkeypatch.delenv("_PYROVAE_COMPLETE")
        return found

    return call


def test_a_shell_completes_models_and_runs(completed, tmp_path):
    for name in ("runs/vae-digits-elbo", "runs/pca-digits", "elsewhere/vae-mine", "[odd]/run"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
    (tmp_path / "runs" / "no-run").mkdir()
    under = ["runs/no-run/", "runs/pca-digits", "runs/vae-digits-elbo"]
    assert completed("train", "hier") == ["hierarchical"]
    assert completed("evaluate", "''") == ["[odd]/", "elsewhere/", "runs/", *under]
    assert completed("compare", "runs/pca-digits", "runs/") == [
        "runs/no-run/",
        "runs/pca-digits",
        "runs/vae-digits-elbo",
    ]
    assert completed("sample", "elsew") == ["elsewhere/"]
    assert completed("report", "elsewhere/") == ["elsewhere/vae-mine"]
    assert completed("export", "[odd]/") == ["[odd]/run"]
    assert completed("evaluate", f"{tmp_path}/else") == [f"{tmp_path}/elsewhere/"]
    assert completed("train", "--run-dir", "r") == ["runs/", *under]


def test_a_new_model_of_images_trains_at_once_and_comes_back(run, tmp_path):
    assert run("new", "my_images.py").out.splitlines()[1] == "train it: pyrovae train my_images:MyPair"
    out = run("train", "my_images:MyPair", *TINY, "--run-dir", "i").out
    assert "test NLL" in out
    assert (tmp_path / "i/samples.png").is_file()
    run(*out.rstrip().rpartition("pyrovae ")[2].split())  # what the last line tells to do
    assert (tmp_path / "i/report.html").is_file()
    assert json.loads((tmp_path / "i/config.json").read_text())["data"]["binarization"] == "dynamic"
    run("evaluate", "i", "--samples", 5, "--trust")
    assert "not pyrovae's" in run("evaluate", "i", code=4).err


def test_a_new_model_of_a_table_trains_and_gives_rows(run, tmp_path):
    script = (
        "import sys; sys.path = [p for p in sys.path if p]; from pyrovae.app.cli import main; main()"  # as installed
    )
    shell = functools.partial(subprocess.run, check=True, cwd=tmp_path, capture_output=True, text=True)
    assert "table.npz" in run("new", "sub/my_table.py", "--table").out
    folder = tmp_path / "sub"
    shell([sys.executable, "my_table.py"], cwd=folder)
    options = ["--data", "npz:table.npz", *TINY, "--lr", "0.01", "--run-dir", "t"]
    environment = os.environ | {"PYTHONPATH": str(Path(pv.__file__).parents[1])}
    shell([sys.executable, "-P", "-c", script, "train", "my_table:MyPair", *options], cwd=folder, env=environment)
    sys.path.append(str(folder))
    try:
        run("sample", folder / "t", "-n", 7, "--trust", "--draws", "--output", "rows.csv")
        assert f"wrote {folder / 't' / 'samples-0.npz'}" in run("sample", folder / "t", "-n", 7, "--trust").out
    finally:
        sys.path.remove(str(folder))
    rows = np.loadtxt(tmp_path / "rows.csv", delimiter=",", skiprows=1)
    with np.load(folder / "table.npz") as held:
        assert rows.shape == (7, held["x"].shape[1])
        assert (np.abs(rows.mean(0) - held["x"].mean(0)) < 4 * held["x"].std(0)).all()


def test_a_new_model_replaces_nothing(run, tmp_path):
    (tmp_path / "mine.py").write_text("mine")
    (tmp_path / "link.py").symlink_to("nowhere.py")
    for name, says in (
        ("mine.py", "is there already"), ("link.py", "is there already"), ("torch.py", 'a module "torch" already'),
        ("my-model.py", "imported by the name of its file"), ("model.txt", "imported by the name of its file"),
    ):  # fmt: skip
        assert says in run("new", name, code=2).err
    assert (tmp_path / "mine.py").read_text() == "mine"
    assert not (tmp_path / "nowhere.py").exists()


def test_list_names_every_model_objective_and_data_set(run):
    out = run("list").out
    for name in (*pv.models.MODELS, *pv.objectives.OBJECTIVES, *pv.data.DATASETS):
        assert name in out


@pytest.mark.parametrize("command", ["train", "evaluate", "sample", "report", "compare", "export", "new", "list"])
def test_help(run, command):
    assert "Usage" in run(command, "--help").out


LIGHT = """
import json, os, sys
from pyrovae.app.cli import app, main
verbs = [command.name or command.callback.__name__ for command in app.registered_commands]
lines = [[], ["--help"], ["--version"], *([verb, "--help"] for verb in verbs), ["trian"], ["train", "vea"],
    ["train", "--data", "mnits"], ["train", "--epochs", "many"], ["train", "--set", "hidden"]]
os.environ["COMP_CWORD"] = "3"
words = ["train --objective i", "train --data om", "train --data np", "evaluate --checkpoint b"]
codes = []
for shell, line in [*((None, line) for line in lines), *(("complete_bash", word) for word in words)]:
    if shell:
        os.environ |= {"_PYROVAE_COMPLETE": shell, "COMP_WORDS": "pyrovae " + line}
    try:
        main([] if shell else line)
    except SystemExit as stop:
        codes.append(stop.code)
heavy = {"torch", "pyro", "numpy", "matplotlib", "scipy", "sklearn"} & sys.modules.keys()
print(json.dumps([sorted(heavy), verbs, codes]))
"""


def test_what_needs_no_work_imports_nothing_heavy():
    root = Path(pv.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True, cwd=root)
    *said, last = done.stdout.splitlines()
    heavy, verbs, codes = json.loads(last)
    assert heavy == []
    assert verbs == ["train", "evaluate", "sample", "report", "compare", "export", "new", "list"]
    assert codes == [2, 0, 0, *[0] * len(verbs), *[2] * 5, *[0] * 4]
    assert said[-5:] == ["iwae", "omniglot", "omniglot28", "npz:", "best"]
    assert f"pyrovae {pv.__version__}" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "vea"], "did you mean 'vae'"),
        (["train", "--objective", "iwea"], "did you mean 'iwae'"),
        (["train", "--data", "mnits"], "did you mean 'mnist'"),
        (["train", "--set", "likelihod=gaussian"], "did you mean 'likelihood'"),
        (["train", "--set", "hidden"], "KEY=VALUE"),
        (["train", "--objective", "vimco", "--particles", "1"], "at least 2"),
        (["train", "--objective", "ciwae", "--set", "beta=1.5"], "[0, 1]"),
        (["train", "--objective", "elbo", "--groups", "3"], "num_groups"),
        (["train", "--epochs", "0"], "epochs"),
        (["train", "--epochs", "many"], "epochs"),
        (["train", "--device", "gpu"], "unknown device"),
        (["train", "no_such_module:Pair"], "cannot import"),
        (["train", "json:dumps"], "no model class"),
        (["trian"], "train"),
        (["train", "--objectiv", "iwae"], "--objective"),
        (["evaluate"], "RUN"),
    ],
)
def test_bad_arguments_give_one_line_and_exit_code_2(run, arguments, says, tmp_path):
    err = run(*arguments, code=2).err
    assert says.lower() in err.lower()
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()  # nothing is started


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_asked_for_and_absent_is_refused(run):
    assert "CUDA" in run("train", *SMALL[:-2], "--device", "cuda", code=2).err


GREY = np.linspace(0, 1, 20 * 16, dtype=np.float32).reshape(20, 1, 4, 4)


@pytest.mark.parametrize(
    ("arrays", "settings", "says"),
    [
        ({"x": GREY * 255}, [], "255"),
        ({"x": GREY - 0.5}, [], "-0.5"),
        ({"x": np.where(GREY > 0.9, np.nan, GREY)}, [], "nan"),
        ({"x": GREY}, ["--set", "binarization=none"], "binarization"),
        ({"x": GREY * 255}, ["--set", "likelihood=continuous_bernoulli"], "255"),
        ({"x": GREY[:0]}, [], "at least one datum"),
        ({"x": GREY, "y": np.arange(7)}, [], "labels"),
        ({"x": np.array([{"a": 1}], dtype=object)}, [], "object"),
        ({"z": GREY}, [], '"x"'),
    ],
)
def test_bad_data_give_one_line_and_exit_code_3(run, arrays, settings, says, tmp_path):
    np.savez("data.npz", **arrays)
    err = run("train", "--data", "npz:data.npz", *SMALL, *settings, code=3).err
    assert says.replace('"', "'").lower() in err.replace('"', "'").lower()
    assert err.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short"])
def test_corrupt_file(run, content, tmp_path):
    (tmp_path / "data.npz").write_bytes(content)
    assert "data.npz" in run("train", "--data", "npz:data.npz", *SMALL, code=3).err


def test_absent_files_say_what_to_put_where(run, tmp_path):
    assert "nowhere.npz" in run("train", "--data", "npz:nowhere.npz", *SMALL, code=3).err
    assert "chardata.mat" in run("train", "--data", "omniglot28", "--data-dir", tmp_path, *SMALL, code=3).err


def test_evaluating_a_folder_without_a_run(run, tmp_path):
    assert "holds no run" in run("evaluate", tmp_path, code=4).err


def test_debug_shows_the_traceback(run):
    assert "Traceback" in run("train", "vea", "--debug", code=2).err
    assert "Traceback" not in run("train", "vea", code=2).err


def test_python_raises_what_the_command_line_prints(run):
    err = run("train", "--objective", "ciwae", "--set", "beta=1.5", code=2).err
    with pytest.raises(ValueError) as error:
        pv.CIWAE(1.5)
    assert err == f"error: {error.value}\n"


FAULTS = """
import resource
from pyrovae.app.process import keep_freed_memory
keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * (64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is told to keep memory")
@pytest.mark.parametrize("keeps", [True, False])
def test_freed_memory_is_kept(keeps):
    script = FAULTS if keeps else FAULTS.replace("keep_freed_memory()", "")
    root = Path(pv.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root)
    assert (int(done.stdout) < 100) == keeps


@pytest.mark.parametrize("columns", [1, 2])
def test_data_become_bits_where_bits_are_all_that_is_observed(columns):
    """Not where one column of a table is of bits, be the others between 0 and 1 as well."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("bit", dist.Bernoulli(x.new_full((), 0.5)), obs=x[:, 0])
            if columns == 2:
                pyro.sample("real", dist.Normal(x.new_zeros(()), 1.0), obs=x[:, 1])

    pair = as_pair(SimpleNamespace(model=model, guide=lambda x: None))
    assert observes_bits(pair, pv.data.Images(torch.full((3, columns), 0.5))) == (columns == 1)


@pytest.mark.parametrize("settings", [{}, {"validation": 0.2}, {"labels_per_class": 3}])
def test_grey_data_are_made_bits_as_they_would_be_loaded(settings):
    job = Settings(data="digits", seed=3, settings=settings)
    parts = Parts.of(job, trust=False)
    grey, loaded = load_data(job, parts, None), load_data(job, parts, None, "dynamic")
    for made, expected in zip(as_bits(grey, job, parts), loaded, strict=True):
        assert repr(made) == repr(expected)
        if made is not None:
            assert all(map(torch.equal, made.columns, expected.columns))
    own = Parts.of(replace(job, settings={"binarization": "none"}), trust=False)
    assert as_bits(grey, job, own) is grey
