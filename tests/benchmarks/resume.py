"""A run that is interrupted and goes on, beside one that is not; and what an epoch costs outside of its steps.

python -m tests.benchmarks.resume cuda [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import pyrovae as pv
from tests.benchmarks import images
from tests.benchmarks.options import Options
from tests.benchmarks.run import environment
from tests.benchmarks.tables import Row, Table

EPOCHS, STOPS = 6, 3


class Interrupted(Exception):
    """As by a user."""


def interrupted(fit: pv.Fit) -> None:
    if len(fit.history) == STOPS:
        raise Interrupted


def trained(data: pv.data.Images, device: str, **options: Any) -> tuple[pv.models.VAE, pv.Fit]:
    torch.manual_seed(0)
    vae = pv.models.VAE(images.SHAPE, 50)
    settings = {"objective": pv.IWAE(5), "epochs": EPOCHS, "batch_size": 100, "device": device, "compile": True}
    return vae, pv.fit(vae.model, vae.guide, data, **settings | options)


def resuming(data: pv.data.Images, device: str, folder: Path) -> Table:
    """The bounds of both after each epoch, and how far their weights are apart in the end."""
    whole, unbroken = trained(data, device, run_dir=folder / "whole")
    with suppress(Interrupted):
        trained(data, device, run_dir=folder / "parts", on_epoch=interrupted)
    parts, resumed = trained(data, device, run_dir=folder / "parts", resume=True)
    pairs = zip(whole.parameters(), parts.parameters(), strict=True)
    apart = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
    rows: list[Row] = [
        {"epoch": i + 1, "uninterrupted": a["bound"], "interrupted": b["bound"]}
        for i, (a, b) in enumerate(zip(unbroken.history, resumed.history, strict=True))
    ]
    notes = [f"Interrupted after epoch {STOPS}. Weights are apart by {apart:.1e} of the largest. {resumed.timings}"]
    return Table("Bound after each epoch, nats", ["epoch", "uninterrupted", "interrupted"], rows, notes)


def overhead(data: pv.data.Images, held_out: pv.data.Images, device: str, folder: Path) -> Table:
    """Seconds of an epoch in its steps and outside of them, with validation and checkpoints."""
    rows: list[Row] = []
    for batch in (100, 128):  # 128 leaves a last batch of another size
        ends: list[float] = []
        validation = {"validation": held_out, "run_dir": folder / str(batch), "batch_size": batch}
        _, fit = trained(data, device, on_epoch=lambda _, ends=ends: ends.append(time.perf_counter()), **validation)
        seconds = fit.history[-1]["seconds"]
        rows.append({
            "batch": batch, "path": fit.timings["path"], "ms a step": 1e3 * seconds / fit.history[-1]["steps"],
            "s in steps": seconds, "s beside": (ends[-1] - ends[1]) / (EPOCHS - 2) - seconds,
            "compilation, s": fit.timings["compile_seconds"],
        })  # fmt: skip
    return Table("An epoch with validation and checkpoints", list(rows[0]), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    train, test, name = images.load(None)
    if asked.quick:
        train, test = train.subset(slice(450)), test.subset(slice(50))
    with tempfile.TemporaryDirectory() as folder:
        tables = [
            make(device=asked.device, folder=Path(folder), data=train.unlabelled(), **more)
            for make, more in ((resuming, {}), (overhead, {"held_out": test.unlabelled()}))
        ]
    tables[0].notes.append(f"Data: {name}.")
    print("\n".join(table.markdown() for table in tables))
    if asked.json:
        about, sections = environment(Options(device=asked.device)), {"resume": [vars(table) for table in tables]}
        asked.json.write_text(json.dumps({"environment": about, "sections": sections}, indent=1) + "\n")


if __name__ == "__main__":
    main()
