"""Milliseconds per step over whole epochs, each contender as its users run it, on one core and on two.

Each has a process of its own, held to its cores, and they take turns of one epoch, so that what else runs on the
machine hits all of them; the quickest epoch counts, as what is added to it comes from elsewhere. Ours is ``fit``
itself, NumPyro's one compiled scan over ``svi.update``.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from tests.benchmarks.children import Child
from tests.benchmarks.options import Options
from tests.benchmarks.tables import Row, Table, ratio
from tests.benchmarks.trainers import FIT, FLOOR, HAND, HAND_COMPILED, NAMES, NEEDS, NUMPYRO

CELLS = ((20, 1), (100, 1), (20, 5), (100, 5), (20, 50))
STEPS = 900  # of an epoch, times the square root of batch size times particles: some half a second
ALIKE = 0.05  # by what part two losses after as many steps may differ
COMPILE = (FIT, NUMPYRO, HAND_COMPILED)
EXTRA = 'pip install "pyrovae[benchmarks]"'
AT = ("cores", "batch", "k")


@dataclass
class Run:
    """What one contender's process answered, epoch by epoch."""

    child: Child
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    data: str = ""

    def turn(self) -> None:
        answer = self.child.turn()
        self.seconds.append(answer["seconds"])
        self.cpu.append(answer["cpu"])
        self.losses.append(answer["loss"])

    @property
    def best(self) -> float:
        """Seconds of the quickest epoch but the first."""
        return min(self.seconds[1:])


def measure(options: Options, batch: int, k: int, cores: int, steps: int, absent: dict[str, str]) -> dict[str, Run]:
    """All contenders of a cell, in turns: one epoch with compilation from an empty cache, then ``options.rounds``."""
    runs: dict[str, Run] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        arguments = batch, k, cores, steps, options.data_dir or ""
        for name in options.contenders or NAMES:
            child = Child("trainers", name, *arguments, environment={"TORCHINDUCTOR_CACHE_DIR": folder})
            runs[name] = Run(stack.enter_context(child))
        for name in tuple(runs):
            try:
                runs[name].data = runs[name].child.answer()["data"]  # and its imports are done
            except RuntimeError as error:
                _leave_out(name, error, runs, absent)
        for turn in range(1 + options.rounds):
            for name in _rotated(tuple(runs), turn):
                try:
                    runs[name].turn()
                except RuntimeError as error:
                    _leave_out(name, error, runs, absent)
    return runs


def _leave_out(name: str, error: RuntimeError, runs: dict[str, Run], absent: dict[str, str]) -> None:
    """Say once why a contender is absent; where a package is, say what brings it."""
    del runs[name]
    reason = EXTRA if name in NEEDS and "ModuleNotFoundError" in str(error) else str(error)
    if absent.get(name) != reason:
        print(f"!! {name} is left out: {reason}", file=sys.stderr)
    absent[name] = reason


def _rotated(names: tuple[str, ...], by: int) -> Iterator[str]:
    """The names in order, from another one on in each round."""
    yield from (names[(i + by) % len(names)] for i in range(len(names)))


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
    for cores in (n for n in options.cores if n <= len(os.sched_getaffinity(0))):
        for batch, k in options.cells or CELLS:
            print(f"epochs: {cores} cores, batch {batch}, k {k}", file=sys.stderr)
            steps = options.steps or max(20, round(STEPS / (batch * k) ** 0.5))
            found = measure(options, batch, k, cores, steps, absent)
            strange += [f"{cores} cores, batch {batch}, k {k}: {why}" for why in unlike(found)]
            rows.append({**dict(zip(AT, (cores, batch, k), strict=True)), "steps": steps, "runs": found})
    data = ", ".join({run.data for row in rows for run in row["runs"].values()})
    notes = [
        f"Data: {data}. 784-200-200-50, tanh, Adam, float32; the best of {options.rounds} epochs.",
        *(f"Left out: {name} ({why})." for name, why in absent.items()),
        *(f"!! {why}." for why in strange),
    ]
    return _tables(rows, [name for name in options.contenders or NAMES if name not in absent], notes)


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
