"""Runs to report on: small ones, trained once by the command line."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from pyrovae.app.cli import main

FAST = ["--samples", "20", "--device", "cpu", "--epochs", "2"]
Make = Callable[[str], Path]
KINDS = {
    "plane": ["vae", "--latent-dim", "2", "--set", "hidden=[16]"],
    "sliders": ["vae", "--latent-dim", "5", "--set", "hidden=[16]", "--objective", "iwae", "--particles", "3"],
    "conditional": ["conditional", "--latent-dim", "2", "--set", "hidden=[16]"],
    "vqvae": ["vqvae", "--set", "channels=8", "--set", "num_codes=16", "--set", "code_dim=4"],
    "autoencoder": ["autoencoder", "--latent-dim", "3", "--set", "hidden=[16]"],
    "rbm": ["rbm", "--set", "num_hidden=8"],
}


def pyrovae(*arguments: object) -> str:
    """Run the command line, which must succeed; what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code == 0
    return out.getvalue()


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, digits: torch.Tensor) -> Make:
    """A finished run of a kind on some digits, which tests only read."""
    folder = tmp_path_factory.mktemp("runs")
    x, y = digits[:360].numpy(), load_digits().target[:360]
    np.savez(folder / "some.npz", x=x[:300], y=y[:300], x_test=x[300:], y_test=y[300:])

    def of(kind: str) -> Path:
        run = folder / kind
        if not run.exists():
            pyrovae("train", *KINDS[kind], *FAST, "--data", f"npz:{folder}/some.npz", "--run-dir", run)
        return run

    return of


@pytest.fixture(scope="session")
def written(made: Make) -> Callable[[str], tuple[Path, str]]:
    """The page on a run of a kind, and what was printed when it was written."""
    done: dict[str, tuple[Path, str]] = {}

    def of(kind: str) -> tuple[Path, str]:
        if kind not in done:
            printed = pyrovae("report", made(kind))
            done[kind] = made(kind) / "report.html", printed
        return done[kind]

    return of


@pytest.fixture
def copied(made: Make, tmp_path: Path) -> Callable[..., Path]:
    """A run of a kind that a test may change, under a name."""
    return lambda kind, name="run": shutil.copytree(made(kind), tmp_path / name)
