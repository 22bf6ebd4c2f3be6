"""Steps of ``fit`` that C++ takes many at once beside those that Python takes, epochs in turns in one run."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import pyrovae as pv
from pyrovae.train.ahead import Ahead
from tests.benchmarks import images
from tests.benchmarks.contenders import Setting, objective
from tests.benchmarks.options import Options
from tests.benchmarks.tables import Row, Table, ratio

CELLS = ((20, 1), (100, 1))
STEPS = 300  # of an epoch
PYTHON, CPP = "by Python", "by C++"


def decaying(own: Iterable[Tensor]) -> torch.optim.Optimizer:
    """As users write it."""
    return torch.optim.AdamW(own, lr=1e-3)


def moving(own: Iterable[Tensor]) -> torch.optim.Optimizer:
    """With momentum."""
    return torch.optim.SGD(own, lr=1e-4, momentum=0.9)


WAYS: dict[str, dict[str, Any]] = {
    "fused Adam": {},
    "fused Adam, clip_norm": {"clip_norm": 10.0},
    "AdamW, clip_norm": {"optimizer": decaying, "clip_norm": 10.0},
    "SGD": {"optimizer": moving},
}


def in_turns(setting: Setting, way: str, options: Options) -> Row:
    """The best epoch of each."""
    vae, take, steps = setting.vae(), Ahead.__call__, options.steps or STEPS
    data = images.load(options.data_dir)[0].subset(slice(steps * setting.batch))

    def now_and_then(self: Ahead, order: Tensor) -> int:
        return take(self, order) if self.epoch % 2 else 0

    with mock.patch.object(Ahead, "__call__", now_and_then):
        fitted = pv.fit(
            vae.model, vae.guide, data, objective=objective(setting.k), epochs=2 * options.rounds + 2,
            batch_size=setting.batch, compile=True, progress=False, device="cpu", **WAYS[way],
        )  # fmt: skip
    each = [1e3 * row["seconds"] / row["steps"] for row in fitted.history[2:]]
    python, cpp = min(each[::2]), min(each[1::2])
    return {PYTHON: python, CPP: cpp, "C++ / Python": ratio(cpp, python)}


def run(options: Options) -> list[Table]:
    """Milliseconds of a step, by network, sizes and optimizer."""
    rows: list[Row] = []
    for network in options.networks:
        for batch, k in options.cells or CELLS:
            for way in options.contenders or WAYS:
                print(f"ahead: {network}, batch {batch}, k {k}, {way}", file=sys.stderr)
                found = in_turns(Setting(network, batch, k), way, options)
                rows.append({"network": network, "batch": batch, "k": k, "optimizer": way, **found})
    note = f"The best of {options.rounds} epochs, at most {torch.get_num_threads()} threads."
    return [Table("Steps", ["network", "batch", "k", "optimizer", PYTHON, CPP, "C++ / Python"], rows, [note])]
