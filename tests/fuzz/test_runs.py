"""Damaged, edited and mixed run directories: an error of ours in one line, or the same as before; nothing executed."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pyrovae as pv
from pyrovae.runs import Run
from tests.fuzz.damage import ANY_JSON, answer, damaged

BITS = (torch.rand(20, 6, generator=torch.Generator().manual_seed(0)) > 0.5).float()
ERRORS = (ValueError, OSError)  # CheckpointError is a ValueError, ResourceError an OSError
FILES = ("config.json", "metrics.jsonl", "last/weights.safetensors", "last/state.pt", "last/manifest.json")


def fit(folder: Path, epochs: int, **more: Any) -> pv.models.VAE:
    """A pair that is always the same, trained into a run or on from it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pair = pv.models.VAE((6,), latent_dim=2, hidden=(3,))
    pv.fit(
        pair.model, pair.guide, BITS, objective=pv.ELBO(1), epochs=epochs, batch_size=10, run_dir=folder, device="cpu",
        compile=False, progress=False, **more,
    )  # fmt: skip
    return pair


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    fit(folder, 2)
    return folder


def weights(pair: torch.nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in pair.state_dict().values()]


def same(mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


def copied(whole: Path, factory: pytest.TempPathFactory) -> Path:
    folder = factory.mktemp("copy") / "run"
    shutil.copytree(whole, folder)
    return folder


def opened(folder: Path, *, override: bool = False) -> torch.nn.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if override else "error")
        return answer(lambda: pv.load(folder, override=override), *ERRORS)


def resumed(folder: Path) -> pv.models.VAE | None:
    return answer(lambda: fit(folder, 2, resume=True), *ERRORS)


@pytest.mark.parametrize("file", FILES)
@given(data=st.data())
def test_damage_to_any_file_is_refused_or_harmless(file, data, whole, tmp_path_factory):
    folder, kept = copied(whole, tmp_path_factory), weights(pv.load(whole))
    (folder / file).write_bytes(data.draw(damaged((whole / file).read_bytes())))
    if (pair := opened(folder)) is not None:
        assert same(weights(pair), kept)
    if (again := resumed(folder)) is not None:
        assert same(weights(again), kept)
        assert Run(folder).history() == Run(whole).history()


@pytest.mark.parametrize("file", FILES)
@given(data=st.data())
def test_damage_to_any_file_brings_no_other_error_even_where_it_is_overridden(file, data, whole, tmp_path_factory):
    folder = copied(whole, tmp_path_factory)
    (folder / file).write_bytes(data.draw(damaged((whole / file).read_bytes())))
    opened(folder, override=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer(lambda: fit(folder, 2, resume=True, override=True), *ERRORS)


def places(content: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to every value in nested lists and dicts."""
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


@st.composite
def edited(draw: st.DrawFn, content: Any) -> Any:
    """Nested values of which one is another, or absent."""
    content = copy.deepcopy(content)
    *above, last = draw(st.sampled_from([path for path in places(content) if path]))
    inner = content
    for key in above:
        inner = inner[key]
    if draw(st.booleans()) or isinstance(inner, list):
        inner[last] = draw(ANY_JSON | st.sampled_from([0, -1, 10**9, 1e400, "../x", "os:system", "gaussian", [], {}]))
    else:
        del inner[last]
    return content


@given(data=st.data(), override=st.booleans())
def test_an_edited_config_is_refused_and_imports_nothing(data, override, whole, tmp_path_factory):
    folder, kept = copied(whole, tmp_path_factory), weights(pv.load(whole))
    config = json.loads((whole / "config.json").read_text())
    made = data.draw(edited(config) | ANY_JSON)
    (folder / "config.json").write_text(json.dumps(made))
    pair = opened(folder, override=override)
    if pair is not None and not override:
        assert same(weights(pair), kept)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer(lambda: fit(folder, 2, resume=True, override=override), *ERRORS)


DTYPES = st.sampled_from([torch.int8, torch.float64, torch.bool, torch.complex64, torch.bfloat16])


@given(data=st.data())
def test_an_edited_state_is_refused_or_harmless(data, whole, tmp_path_factory):
    folder = copied(whole, tmp_path_factory)
    state = torch.load(whole / "last" / "state.pt", weights_only=True) | {"finished": False, "epoch": 1}
    other = torch.zeros(data.draw(st.lists(st.integers(0, 3), max_size=3)), dtype=data.draw(DTYPES))
    made = data.draw(edited(state) | ANY_JSON.map(lambda value: state | {"epoch": value}) | st.just(other))
    torch.save(made, folder / "last" / "state.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer(lambda: fit(folder, 2, resume=True, override=True), *ERRORS)


@given(data=st.data())
def test_moments_of_another_shape_or_type_are_refused(data, whole, tmp_path_factory):
    folder = copied(whole, tmp_path_factory)
    state = torch.load(whole / "last" / "state.pt", weights_only=True) | {"finished": False, "epoch": 1}
    slots = [(i, key) for i, slot in state["optimizer"]["state"].items() for key in slot]
    i, key = data.draw(st.sampled_from(slots))
    old = state["optimizer"]["state"][i][key]
    shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
    dtype = data.draw(DTYPES)
    state["optimizer"]["state"][i][key] = torch.ones(shape, dtype=dtype)
    torch.save(state, folder / "last" / "state.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = answer(lambda: fit(folder, 2, resume=True, override=True), *ERRORS)
    assert found is None or (list(old.shape) == shape and old.dtype == dtype)


@given(data=st.data())
def test_files_that_are_missing_moved_or_of_another_run_are_named(data, whole, tmp_path_factory):
    folder, kept = copied(whole, tmp_path_factory), weights(pv.load(whole))
    names = sorted(str(path.relative_to(whole)) for path in whole.rglob("*") if not path.name.startswith("."))
    for _ in range(data.draw(st.integers(1, 2))):
        victim = folder / data.draw(st.sampled_from(names))
        how = data.draw(st.sampled_from(["gone", "folder", "link", "empty", "other"]))
        if not victim.parent.is_dir():
            continue
        if victim.is_dir() and not victim.is_symlink():
            shutil.rmtree(victim)
        else:
            victim.unlink(missing_ok=True)
        match how:
            case "folder":
                victim.mkdir()
            case "link":
                victim.symlink_to(victim)
            case "empty":
                victim.write_bytes(b"")
            case "other":
                other = whole / data.draw(st.sampled_from([n for n in names if (whole / n).is_file()]))
                shutil.copy(other, victim)
    if (pair := opened(folder)) is not None:
        assert same(weights(pair), kept)
    rows = (folder / "metrics.jsonl").read_bytes() if (folder / "metrics.jsonl").is_file() else None
    again = resumed(folder)
    if again is None and rows is not None:
        assert (folder / "metrics.jsonl").read_bytes() == rows
    if again is not None:
        assert same(weights(again), kept)
