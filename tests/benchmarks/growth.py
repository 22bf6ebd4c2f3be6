"""How the time of a step grows with the sizes of batch, particles, network and latent space."""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from typing import Any

from tests.benchmarks import steps
from tests.benchmarks.contenders import COMPILED, HAND, OURS, Setting
from tests.benchmarks.options import Options
from tests.benchmarks.tables import Table, ratio

BASE = Setting(k=5)
SWEEPS: dict[str, dict[int, dict[str, Any]]] = {
    "batch": {n: {"batch": n} for n in (10, 100, 1000)},
    "k": {n: {"k": n} for n in (1, 5, 20, 80)},
    "width": {n: {"hidden": (n, n)} for n in (100, 200, 400, 800)},
    "latent_dim": {n: {"latent_dim": n} for n in (5, 50, 200)},
    "depth": {n: {"hidden": (200,) * n} for n in (1, 2, 4, 8)},
}
NAMES = (OURS, COMPILED, HAND)


def run(options: Options) -> list[Table]:
    """One table: each sweep varies one size of the MLP at batch 100 and k = 5, all else as in the sections above."""

    @functools.cache
    def measured(setting: Setting) -> steps.Measured:
        print(f"growth: {setting}", file=sys.stderr)
        return steps.measure(setting, options, NAMES)

    rows = []
    for size, points in SWEEPS.items():
        for n, change in points.items():
            result = measured(replace(BASE, **change))
            ms = {name: result.ms(name) for name in NAMES}
            over = {f"{name} / {HAND}": ratio(ms[name], ms[HAND]) for name in (OURS, COMPILED)}
            details = {name: times.summary() for name, times in result.times.items()}
            rows.append({"size": size, "value": n, **ms, **over, "details": details})
    columns = ["size", "value", *NAMES, *(f"{name} / {HAND}" for name in (OURS, COMPILED))]
    notes = [
        f"Milliseconds per step; where not varied: batch {BASE.batch}, k {BASE.k}, hidden {BASE.hidden}, latent 50."
    ]
    return [Table("Growth", columns, rows, notes)]
