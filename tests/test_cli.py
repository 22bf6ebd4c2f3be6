"""The command line as its users meet it: outputs, files, exit codes, one-line errors."""

import contextlib
import functools
import io
import json
import math
import platform
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import pyrovae as pv
from pyrovae.app.cli import main

SMALL = ["--epochs", "2", "--samples", "20", "--set", "hidden=[16]", "--latent-dim", "3", "--device", "cpu"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture
def run(capsys):
    """Run the command line; return exit code, standard output and standard error."""

    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

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


def test_evaluate_repeats_the_results_of_train(run, tmp_path, a):
    trained = json.loads((tmp_path / "a/results.json").read_text())
    code, out, _ = run("evaluate", "a", "--samples", 20)
    evaluated = json.loads((tmp_path / "a/results.json").read_text())
    assert code == 0
    assert "test NLL" in out
    assert evaluated["nll"] == trained["nll"]


def test_evaluate_in_full(run, tmp_path, monkeypatch, a):
    short = functools.partial(pv.ais_log_likelihood, num_temperatures=10, num_chains=4, leapfrog_steps=2)
    monkeypatch.setattr("pyrovae.app.measure.ais_log_likelihood", short)
    monkeypatch.setattr("pyrovae.app.measure.CLOSER", 10)
    code, out, err = run("evaluate", "a", "--samples", 70, "--ais", "--diagnostics")
    assert code == 0, err
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
    code, out, _ = run("sample", "a", "-n", 9, "--output", "nine.png", "--draws")
    assert code == 0
    assert "nine.png" in out
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
        code, _, err = run("train", *SMALL, "--run-dir", "cut")
        assert code == 130
        assert "--resume" in err
    code, _, _ = run("train", "--resume", "--run-dir", "cut")
    assert code == 0
    results = [json.loads((tmp_path / name / "results.json").read_text())["nll"] for name in ("a", "cut")]
    assert results[0] == results[1]


def test_resume_of_a_finished_run_does_nothing(run, tmp_path, a):
    before = (tmp_path / "a/results.json").read_bytes(), (tmp_path / "a/last/weights.safetensors").read_bytes()
    code, out, _ = run("train", "--resume", "--run-dir", "a")
    assert code == 0
    assert "finished" in out
    assert before == (
        (tmp_path / "a/results.json").read_bytes(),
        (tmp_path / "a/last/weights.safetensors").read_bytes(),
    )


def test_resume_refuses_other_settings(run, a):
    code, _, err = run("train", "--resume", "--run-dir", "a", "--lr", 0.5)
    assert code == 2
    assert "begun with" in err


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
    code, _, err = run(*arguments, "--objective", "iwae", "--particles", 3)
    assert code == 0, err
    assert run("evaluate", "mine", "--samples", 10)[0] == 0
    assert run("sample", "mine", "-n", 4)[0] == 0


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
    code, _, err = run("train", "own:Plain", *TINY, "--run-dir", "p")
    assert code == 0, err
    assert (tmp_path / "p/manifold.png").is_file()
    assert 0 < json.loads((tmp_path / "p/results.json").read_text())["ink"] < 1
    pair = pv.load("p", pair=__import__("own").Plain((1, 8, 8)))
    assert pair.seen.item() == 1437
    rate = pv.data.load("digits").train.x.mean(0).clamp(0.01, 0.99).flatten()
    assert (pair.decoder.bias.sigmoid() - rate).abs().max() < 0.1
    code, _, err = run("train", "own:Conditional", *TINY, "--run-dir", "c")
    assert code == 0, err
    assert not (tmp_path / "c/manifold.png").exists()
    assert json.loads((tmp_path / "c/results.json").read_text())["largest"] == 9
    assert run("sample", "c", "-n", 3, "--label", 9)[0] == 0
    assert run("evaluate", "c", "--samples", 5)[0] == 0
    code, _, err = run("train", "own:NoGuide", *TINY, "--run-dir", "n")
    assert (code, "NoGuide has no .guide(x)" in err) == (2, True)


TINY = ["--epochs", "1", "--samples", "5", "--device", "cpu"]


def test_a_conditional_model_is_trained_sampled_and_compared(run, tmp_path):
    assert run("train", "conditional", *TINY, "--set", "hidden=[8]", "--run-dir", "c")[0] == 0
    assert run("sample", "c", "-n", 20, "--label", 3, "--temperature", 0.5)[0] == 0
    assert run("sample", "c", "-n", 20)[0] == 0
    code, _, err = run("sample", "c", "--label", 12)
    assert (code, "label must be one of 0 ... 9, got '12'" in err) == (2, True)
    run("train", "vae", *TINY, "--set", "hidden=[8]", "--run-dir", "v")
    code, _, err = run("sample", "v", "--label", 1)
    assert (code, "not conditional" in err) == (2, True)
    code, out, _ = run("compare", "c", "v")
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()[1:3]] == [["c", "digits"], ["v", "digits"]]


def test_a_semi_supervised_model_reports_its_accuracy(run, tmp_path):
    arguments = ["train", "semi_supervised", *TINY, "--set", "hidden=[8]", "--set", "labels_per_class=5"]
    code, out, err = run(*arguments, "--run-dir", "s")
    assert code == 0, err
    assert "accuracy" in out
    assert 0 <= json.loads((tmp_path / "s/results.json").read_text())["accuracy"] <= 1
    code, _, err = run(*arguments[:-1], "labels_per_class=1000", "--run-dir", "t")
    assert code == 3
    assert "per_class=1000 asked for" in err


def test_pca_is_fitted_measured_exactly_and_opened_again(run, tmp_path):
    code, out, err = run("train", "pca", "--latent-dim", 5, "--run-dir", "p")
    assert code == 0, err
    assert "exactly" in out
    trained = json.loads((tmp_path / "p/results.json").read_text())
    assert trained["nll_std_error"] == 0
    code, out, _ = run("train", "pca", "--latent-dim", 5, "--run-dir", "p", "--resume")
    assert (code, "finished" in out) == (0, True)
    assert run("evaluate", "p")[0] == 0
    assert json.loads((tmp_path / "p/results.json").read_text())["nll"] == trained["nll"]
    pca = pv.load("p")
    x = pv.data.load("digits").test.x
    assert -pca.log_prob(x).mean().item() == pytest.approx(trained["nll"])
    for extra, says in ((["--epochs", 3], "PCA has no epochs"), (["--objective", "iwae"], "a rule of its own")):
        code, _, err = run("train", "pca", *extra, "--run-dir", "q")
        assert (code, says in err) == (2, True)


def test_an_rbm_trains_on_bits(run, tmp_path):
    code, out, err = run("train", "rbm", "--epochs", 2, "--set", "num_hidden=5", "--run-dir", "r")
    assert code == 0, err
    assert "exactly" in out
    config = json.loads((tmp_path / "r/config.json").read_text())
    assert config["data"]["binarization"] == "dynamic"
    assert run("sample", "r", "-n", 4)[0] == 0
    assert (tmp_path / "r/curves.png").is_file()
    large = ["--set", "num_hidden=21", "--set", "ais_steps=20", "--set", "burn_in=5"]
    code, out, err = run("train", "rbm", "--epochs", 1, *large, "--run-dir", "l")
    assert code == 0, err
    assert "by annealing" in out
    assert json.loads((tmp_path / "l/results.json").read_text())["nll_std_error"] > 0


def test_an_autoencoder_has_no_log_p_but_samples(run, tmp_path):
    code, out, err = run("train", "autoencoder", *TINY, "--set", "hidden=[8]", "--latent-dim", 3, "--run-dir", "a")
    assert code == 0, err
    assert "not a generative model" in out
    assert (tmp_path / "a/samples.png").is_file()
    assert run("sample", "a", "-n", 4)[0] == 0
    code, _, err = run("evaluate", "a", "--ais")
    assert (code, "nothing to anneal" in err) == (2, True)
    assert "none" in run("compare", "a")[1]


def test_a_vqvae_gets_a_learned_prior(run, tmp_path):
    small = ["--set", "num_codes=4", "--set", "code_dim=2", "--set", "channels=4", "--set", "residual_layers=1"]
    code, out, err = run("train", "vqvae", *TINY, *small, "--run-dir", "v")
    assert code == 0, err
    assert "as a bound" in out
    assert "perplexity" in out
    code, out, err = run("train", "code_prior", "--data", "codes:v", *TINY, "--set", "channels=4", "--run-dir", "p")
    assert code == 0, err
    assert "exactly" in out
    assert run("evaluate", "p/vqvae", "--samples", 1)[0] == 0
    assert run("sample", "p/vqvae", "-n", 4)[0] == 0
    bounds = [json.loads((tmp_path / f"{name}/results.json").read_text())["nll"] for name in ("v", "p", "p/vqvae")]
    uniform = 4 * math.log(4)
    assert bounds[2] == pytest.approx(bounds[0] - uniform + bounds[1], rel=1e-4)
    run("train", "pca", "--latent-dim", 2, "--run-dir", "q")
    code, _, err = run("train", "code_prior", "--data", "codes:q", *TINY)
    assert (code, "needs the run of a VQVAE, got PCA" in err) == (2, True)


def test_list_names_every_model_objective_and_data_set(run):
    code, out, _ = run("list")
    assert code == 0
    for name in (*pv.models.MODELS, *pv.objectives.OBJECTIVES, *pv.data.DATASETS):
        assert name in out


@pytest.mark.parametrize("command", ["train", "evaluate", "sample", "list"])
def test_help(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Usage" in out


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
    code, _, err = run(*arguments)
    assert code == 2
    assert says.lower() in err.lower()
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()  # nothing is started


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_asked_for_and_absent_is_refused(run):
    code, _, err = run("train", *SMALL[:-2], "--device", "cuda")
    assert code == 2
    assert "CUDA" in err


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
    code, _, err = run("train", "--data", "npz:data.npz", *SMALL, *settings)
    assert code == 3, err
    assert says.replace('"', "'").lower() in err.replace('"', "'").lower()
    assert err.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short"])
def test_corrupt_file(run, content, tmp_path):
    (tmp_path / "data.npz").write_bytes(content)
    code, _, err = run("train", "--data", "npz:data.npz", *SMALL)
    assert code == 3
    assert "data.npz" in err


def test_absent_files_say_what_to_put_where(run, tmp_path):
    code, _, err = run("train", "--data", "npz:nowhere.npz", *SMALL)
    assert (code, "nowhere.npz" in err) == (3, True)
    code, _, err = run("train", "--data", "omniglot28", "--data-dir", tmp_path, *SMALL)
    assert (code, "chardata.mat" in err) == (3, True)


def test_evaluating_a_folder_without_a_run(run, tmp_path):
    code, _, err = run("evaluate", tmp_path)
    assert code == 3
    assert "holds no run" in err


def test_debug_shows_the_traceback(run):
    assert "Traceback" in run("train", "vea", "--debug")[2]
    assert "Traceback" not in run("train", "vea")[2]


def test_python_raises_what_the_command_line_prints(run):
    _, _, err = run("train", "--objective", "ciwae", "--set", "beta=1.5")
    with pytest.raises(ValueError) as error:
        pv.CIWAE(1.5)
    assert err == f"error: {error.value}\n"


FAULTS = """
import resource
from pyrovae.memory import keep_freed_memory
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
