"""Settings as words of a command line, and names of files: taken as they are meant, or refused in one line."""

from __future__ import annotations

import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pyrovae as pv
from pyrovae.app.job import build
from pyrovae.app.parts import Parts
from pyrovae.app.settings import Settings, parse_settings
from pyrovae.runs import Run
from tests.fuzz.damage import ANY_JSON, answer

DATA = pv.data.Images((torch.arange(48.0).reshape(12, 1, 2, 2) % 2), torch.arange(12) % 3)
KEYS = [
    "hidden", "likelihood", "scale", "levels", "prior", "posterior", "components", "flows", "flow_hidden", "network",
    "activation", "channels", "latent_dim", "num_particles", "kl_weight", "gradient", "free_bits", "schedule",
    "binarization", "validation", "nonsense", "",
]  # fmt: skip
SMALL = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats(width=16) | st.sampled_from(
        ["gaussian", "bernoulli", "flow", "iaf", "vamp", "mixture", "conv", "relu", "learned", "dreg", "x", "", 2**70]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


@given(key=st.text("abc_", min_size=1), value=ANY_JSON)
def test_json_is_read_as_json(key, value):
    text = json.dumps(value)
    found = parse_settings([f"{key}={text}"])
    assert json.dumps(found[key]) == text


@given(words=st.lists(st.text(), max_size=3))
def test_any_words_are_settings_or_are_refused(words):
    found = answer(lambda: parse_settings(words), ValueError)
    assert found is None or all(isinstance(key, str) and key for key in found)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_json_that_is_too_deep_is_no_crash(opening):
    found = answer(lambda: parse_settings(["a=" + opening * 100_000]), ValueError)
    assert found is None or isinstance(found["a"], str)


@given(model=st.sampled_from(["vae", "hierarchical", "conditional", "vqvae", "rbm"]),
       objective=st.sampled_from(["elbo", "iwae", "tvo", "renyi", "miwae"]),
       settings=st.dictionaries(st.sampled_from(KEYS), SMALL, min_size=1, max_size=2))  # fmt: skip
def test_a_setting_builds_a_model_or_is_refused(model, objective, settings):
    def made() -> pv.models.base.Pair:
        return build(Parts.of(Settings(model=model, objective=objective, settings=settings)), DATA, 0)

    pair = answer(made, ValueError, TypeError, OSError)
    assert pair is None or isinstance(pair, torch.nn.Module)


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1).filter(
    lambda name: name not in (".", "..") and len(name.encode()) < 80
)


@given(name=NAMES)
def test_a_run_may_have_any_name(name, tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("names") / name)
    with run.writing():
        run.start({"seed": 0})
        run.save("last", {"weight": torch.ones(3)})
    again = Run(os.fspath(run.path))
    assert again.config()["seed"] == 0
    assert torch.equal(again.weights()["weight"], torch.ones(3))
    assert [path.name for path in run.path.parent.iterdir()] == [name]


@given(name=NAMES)
def test_a_picture_may_have_any_name(name, tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / f"{name}.png"
    written = answer(lambda: pv.plots.image_grid(DATA.x, path), ValueError, OSError)
    assert written is not None
    assert [p.name for p in path.parent.iterdir()] == [path.name]
