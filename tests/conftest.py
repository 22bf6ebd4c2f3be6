"""For all tests: no CUDA device unless one is asked for, a known state, digits."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from typing import Any

import pyro
import pytest
import torch
from sklearn.datasets import load_digits

from tests.state import counting, double_precision


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "seed(number): what every generator is seeded with; 0 by default")
    config.addinivalue_line("markers", "double(number): the same, and float64 by default")
    if not re.search(r"(?<!not )\bcuda\b", config.getoption("markexpr")):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks for one
    if config.getoption("numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers, which share the cores, inherit it


@pytest.fixture(autouse=True)
def known_state(request: pytest.FixtureRequest) -> Iterator[None]:
    """One seed, which a module may choose, its dtype, an empty parameter store."""
    if double := request.node.get_closest_marker("double"):
        with double_precision(*double.args):
            yield
        return
    seed = request.node.get_closest_marker("seed")
    pyro.clear_param_store()
    pyro.set_rng_seed(*seed.args if seed else (0,))
    yield
    pyro.clear_param_store()


@pytest.fixture(autouse=True)
def every_epoch_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs as short as those of tests would else share a checkpoint."""
    monkeypatch.setattr("pyrovae.runs.run.SHARE", math.inf)


@pytest.fixture(autouse=True)
def freed_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that runs in the process of the tests is not to change malloc for all that follow in it."""
    monkeypatch.setattr("pyrovae.app.cli.keep_freed_memory", lambda: None)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Graphs run operation by operation, captured once, not compiled; the list of those that would be compiled."""
    from pyrovae.compile import checked
    from pyrovae.compile import graph as graphs

    monkeypatch.setattr(checked, "capture", graphs.capture_once)
    return counting(monkeypatch, lambda module: module)


@pytest.fixture(scope="session")
def digits() -> torch.Tensor:
    """1,797 grey digits, ``[N, 1, 8, 8]``."""
    return torch.tensor(load_digits().images / 16, dtype=torch.float32).unsqueeze(1)
