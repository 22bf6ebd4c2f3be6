"""Sharing: a run goes to a hub and comes back the same, and what is refused is refused in one line."""

import json
import shutil
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyrovae as pv
from pyrovae.app.card import MARK, card, write_card
from pyrovae.runs import Run
from tests.hub import serving

pytest.importorskip("huggingface_hub")
DIGITS = pv.data.load("digits", binarization="static")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that was trained in Python, and its pair."""
    folder = tmp_path_factory.mktemp("shared") / "run"
    torch.manual_seed(0)
    vae = pv.models.VAE((1, 8, 8), latent_dim=3, hidden=(8,))
    pv.fit(vae.model, vae.guide, DIGITS.train, objective=pv.IWAE(2), epochs=1, device="cpu", run_dir=folder)
    return folder, vae


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained[0], tmp_path / "run")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with serving() as found:
        yield found


def fetch(hub, tmp_path, repo="me/digits", **options):
    return pv.from_pretrained(repo, endpoint=hub.address, cache_dir=tmp_path / "cache", token="right", **options)


def push(hub, run, **options):
    return pv.push_to_hub(run, "me/digits", endpoint=hub.address, token="right", **options)


def test_a_run_comes_back_as_it_was(trained, run, hub, tmp_path):
    (run / "notes.txt").write_text("mine")
    (run / "more").mkdir()
    (run / "more" / "own.png").write_bytes(b"mine")
    assert push(hub, run, private=True) == f"{hub.address}/me/digits"
    held = hub.repositories["me/digits"]
    assert held.keys() == {
        "README.md", "config.json", "metrics.jsonl", "last/weights.safetensors", "last/manifest.json"
    }  # fmt: skip
    assert hub.private["me/digits"]
    assert 'pv.from_pretrained("me/digits")' in held["README.md"].decode()
    loaded, vae = fetch(hub, tmp_path), trained[1]
    assert not loaded.training
    for name, value in vae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    asked = len(hub.requests)
    fetch(hub, tmp_path)
    assert not [line for line in hub.requests[asked:] if line.startswith("GET") and "/resolve/" in line]
    assert push(hub, run)  # again, to the one that is there


def test_what_a_hub_holds_is_verified_and_never_executed(run, hub, tmp_path, monkeypatch):
    push(hub, run)
    held = hub.repositories["me/digits"]
    whole = dict(held)
    held["last/weights.safetensors"] = whole["last/weights.safetensors"][:-1] + b"!"
    with pytest.raises(pv.errors.CheckpointError, match="damaged or was changed"):
        fetch(hub, tmp_path)
    config = json.loads(whole["config.json"])
    config["model"]["class"] = "evil:Pair"
    del config["format_version"], config["run"]
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    monkeypatch.syspath_prepend(str(tmp_path))
    hub.repositories["me/evil"] = whole | {"config.json": json.dumps(config).encode()}
    with pytest.raises(pv.errors.CheckpointError, match="not pyrovae's"):
        fetch(hub, tmp_path, "me/evil")
    assert "evil" not in sys.modules
    hub.repositories["me/other"] = {"README.md": b"a model of someone else's"}
    with pytest.raises(pv.errors.CheckpointError, match="holds no run"):
        fetch(hub, tmp_path, "me/other")


def test_what_a_hub_refuses_is_said_in_one_line(run, hub, tmp_path):
    with pytest.raises(pv.errors.ResourceError, match='"me/none" could not be fetched from the hub: ') as error:
        fetch(hub, tmp_path, "me/none")
    assert "\n" not in str(error.value)
    with pytest.raises(pv.errors.ResourceError, match='"me/digits" could not be pushed to the hub: '):
        pv.push_to_hub(run, "me/digits", endpoint=hub.address, token="wrong")
    with pytest.raises(ValueError, match="unknown checkpoint 'first'"):
        fetch(hub, tmp_path, checkpoint="first")
    hub.refuses = True
    with pytest.raises(pv.errors.ResourceError, match="could not be fetched"):
        fetch(hub, tmp_path)


@pytest.mark.parametrize("damage", ["absent", "changed", "link"])
def test_no_damaged_run_is_shared(run, hub, damage, tmp_path):
    if damage == "absent":
        shutil.rmtree(run)
    elif damage == "changed":
        (run / "last/weights.safetensors").write_bytes(b"no weights")
    else:
        (tmp_path / "secret").write_text("secret")
        (run / "secret.png").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"holds no run|damaged|which no run made"):
        push(hub, run)
    assert not hub.requests


def test_absent_packages_are_named(monkeypatch, run):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for call in (lambda: pv.push_to_hub(run, "me/a"), lambda: pv.from_pretrained("me/a")):
        with pytest.raises(pv.errors.ResourceError, match=r'huggingface_hub.*pip install "pyrovae\[hub\]"'):
            call()


def test_functions_are_shared_with_a_word_on_how_to_load_them(tmp_path, hub):
    layer = nn.Linear(1, 1)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(layer(z.unsqueeze(-1)).squeeze(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    pv.fit(model, guide, torch.randn(20), objective=pv.ELBO(), epochs=1, device="cpu", run_dir=tmp_path / "run")
    push(hub, tmp_path / "run")
    assert 'pv.from_pretrained("me/digits", pair=your_pair)' in hub.repositories["me/digits"]["README.md"].decode()


def test_a_card_says_what_was_measured_and_no_name_is_markup(run, trained):
    config = json.loads((run / "config.json").read_text())
    held = Run(run)
    with held.writing():
        held.amend(config | {"data": {"name": "npz:a`|<script>b", "shape": [1, 8, 8]}})
    results = {
        "likelihood_is": "estimate", "nll": 23.456, "nll_std_error": 0.0123, "num_samples": 5000, "num_images": 360,
        "active_units": {"z": {"active": 2, "of": 3}}, "weights": held.digest(), "warning": "Pareto k <b>high</b>",
    }  # fmt: skip
    (run / "results.json").write_text(json.dumps(results))
    found = card(held, "me/<img>")
    assert "| test NLL, nats per datum | 23.46 (5,000 importance samples, standard error 0.012; 360 data) |" in found
    assert "| active units at `z` | 2 of 3 |" in found
    assert r"# me/\<img\>" in found
    assert "`npz:a'/<script>b`" in found
    assert r"Pareto k \<b\>high" in found
    assert "other weights" not in found
    (run / "results.json").write_text(json.dumps(results | {"weights": 64 * "0"}))
    assert "other weights" in card(held)


def test_a_card_of_ones_own_is_left_alone(run):
    held = Run(run)
    write_card(held)
    assert MARK in (run / "README.md").read_text()
    (run / "README.md").write_text("my own words")
    write_card(held)
    assert (run / "README.md").read_text() == "my own words"
    (run / "README.md").unlink()
    (run / "README.md").symlink_to(run / "config.json")
    before = (run / "config.json").read_bytes()
    write_card(held)
    assert (run / "config.json").read_bytes() == before
