"""Milliseconds per step over whole epochs, each contender as its users run it, on one core and on two.

Each has a process of its own, held to its cores, and they take turns of one epoch, so that what else runs on the
machine hits all of them; the quickest epoch counts, as what is added to it comes from elsewhere. Ours is ``fit``
itself, NumPyro's one compiled scan over ``svi.update``.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

from tests.benchmarks.options import Options
from tests.benchmarks.tables import Row, Table, ratio
from tests.benchmarks.trainers import FIT, FLOOR, HAND, HAND_COMPILED, NAMES, NUMPYRO
from tests.benchmarks.turns import Run, in_turns, numbers_of_cores

CELLS = ((20, 1), (100, 1), (20, 5), (100, 5), (20, 50))
STEPS = 9000  # of an epoch, times the square root of batch size times particles
IMAGES = 40_000  # at most
ALIKE = 0.05  # by what part two losses after as many steps may differ
COMPILE = (FIT, NUMPYRO, HAND_COMPILED)
AT = ("cores", "batch", "k")


def unlike(runs: dict[str, Run]) -> list[str]:
    """Who does not train as the hand-written step does: its loss does not fall, or ends elsewhere."""
    losses = {name: run.losses for name, run in runs.items() if name != FLOOR}
    right = losses.get(HAND) or next(iter(losses.values()), [])
    return [
        f"{name} does not train as the others: loss {own[0]:.1f} to {own[-1]:.1f}, theirs to {right[-1]:.1f}"
        for name, own in losses.items()
        if not (own[-1] < own[0] and abs(own[-1] - right[-1]) <= ALIKE * abs(right[-1]))
    ]


def run(options: Options) -> list[Table]:
    """Three tables: the best epoch of each, with ratios; compilations; losses."""
    rows: list[Row] = []
    absent: dict[str, str] = {}
    strange: list[str] = []
    for cores in numbers_of_cores(options.cores, options.device):
        for batch, k in options.cells or CELLS:
            print(f"epochs: {cores} cores, batch {batch}, k {k}", file=sys.stderr)
            steps = options.steps or max(20, min(IMAGES // batch, round(STEPS / (batch * k) ** 0.5)))
            arguments = batch, k, cores, steps, options.data_dir or "", options.device
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
                found = in_turns("trainers", options.contenders or NAMES, arguments, options.rounds, absent, cache)
            strange += [f"{cores} cores, batch {batch}, k {k}: {why}" for why in unlike(found)]
            rows.append({**dict(zip(AT, (cores, batch, k), strict=True)), "steps": steps, "runs": found})
    data = ", ".join({run.about["data"] for row in rows for run in row["runs"].values()})
    notes = [
        f"Data: {data}. 784-200-200-50, tanh, Adam, float32; the best of {options.rounds} epochs.",
        *(f"Left out: {name} ({why})." for name, why in absent.items()),
        *(f"!! {why}." for why in strange),
    ]
    return _tables(
        rows, [name for name in options.contenders or NAMES if any(name in row["runs"] for row in rows)], notes
    )


def _tables(rows: list[Row], names: list[str], notes: list[str]) -> list[Table]:
    def each(row: Row, value: Any) -> Row:
        return {key: row[key] for key in (*AT, "steps")} | {name: value(run) for name, run in row["runs"].items()}

    times = [each(row, lambda run, n=row["steps"]: 1e3 * run.best / n) for row in rows]
    others = [name for name in (NUMPYRO, HAND_COMPILED, HAND, FLOOR) if name in names] if FIT in names else []
    for row, found in zip(times, rows, strict=True):
        row["cpu ms"] = {name: 1e3 * min(run.cpu[1:]) / row["steps"] for name, run in found["runs"].items()}
        row |= {f"/ {other}": ratio(row.get(FIT), row.get(other)) for other in others}
    compilations = [each(row, lambda run: run.seconds[0] - run.best) for row in rows]
    losses = [each(row, lambda run: run.losses[-1]) for row in rows]
    first = "The first epoch less the best one, from an empty cache, imports done: also the set-up of the training."
    return [
        Table("Milliseconds per step of whole epochs, and pyrovae's as a ratio", [
            *AT, *names, *(f"/ {other}" for other in others)], times, notes),
        Table("Seconds of compilation", [*AT, *(n for n in COMPILE if n in names)], compilations, [first]),
        Table("Mean loss of the last epoch, nats per image", [*AT, *(n for n in names if n != FLOOR)], losses),
    ]  # fmt: skip
