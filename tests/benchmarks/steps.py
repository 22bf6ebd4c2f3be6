"""Milliseconds per training step of every contender, for several batches and numbers of particles."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch

from tests.benchmarks import contenders, images
from tests.benchmarks.contenders import (
    BFLOAT16,
    COMPILED,
    CONTENDERS,
    FLOOR,
    HAND,
    HAND_COMPILED,
    OURS,
    SVI_FAST,
    Setting,
)
from tests.benchmarks.options import Options
from tests.benchmarks.tables import Row, Table, ratio
from tests.benchmarks.timing import Run, Times, block, take_turns, timed_compilation

GRID = ((20, 1), (20, 5), (20, 50), (100, 1), (100, 50), (1000, 1))
RATIOS = {
    f"{ours.removeprefix('pyrovae ')} / {other}": (ours, other)
    for ours, others in {
        COMPILED: (HAND, HAND_COMPILED, SVI_FAST, FLOOR), BFLOAT16: (HAND, SVI_FAST, FLOOR), OURS: (HAND, SVI_FAST),
    }.items()
    for other in others
}  # fmt: skip


@dataclass
class Measured:
    """What one setting gave: times by contender, compilations (seconds, cold or not), and who is absent, and why."""

    times: dict[str, Times] = field(default_factory=dict)
    compilations: dict[str, tuple[float, str]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def ms(self, name: str) -> float | None:
        """Median milliseconds, None for who is absent."""
        return self.times[name].median if name in self.times else None


def measure(setting: Setting, options: Options, names: Iterable[str] = CONTENDERS) -> Measured:
    """Every contender trains its own copy of the network on the same stream of batches, taking turns."""
    load_compiler(options.device)
    torch._dynamo.reset()
    pyro.clear_param_store()
    torch.manual_seed(0)
    batches = images.pool(options.data_dir, setting.batch, options.device)
    result, runs = Measured(), dict[str, Run]()
    result.weights = contenders.tiny_weights(contenders.start(setting, options), batches, setting.k)
    for name in names:
        with contenders.left_out(name, result.absent):
            runs[name] = _ready(name, setting, options, batches, result)
    result.times = take_turns(runs, options.seconds, options.device)
    return result


def _ready(name: str, setting: Setting, options: Options, batches: list[torch.Tensor], result: Measured) -> Run:
    """The contender's step on its next batch; a compiler has done its work."""
    vae, data = contenders.start(setting, options), images.stream(batches)
    mode = {"mode": options.compile_mode} if name == HAND_COMPILED else {}
    if name not in (COMPILED, BFLOAT16, HAND_COMPILED):
        step = CONTENDERS[name](vae, setting.k, batches[0])
        return lambda: step(next(data))
    made: list[contenders.Step] = []

    def first() -> None:
        made.append(CONTENDERS[name](vae, setting.k, batches[0], **mode))
        made[0](next(data))

    result.compilations[name] = timed_compilation(first, options.device)
    return lambda: made[0](next(data))


@functools.cache
def load_compiler(device: str) -> None:
    """Load the compiler, which whoever compiles first would pay for."""
    x = torch.ones(3, device=device, requires_grad=True)
    try:
        block(lambda: torch.compile(lambda x: (x.sin() * 2).sum())(x).backward(), 1, device)
    except Exception as error:  # no C++ compiler, say; each contender that needs it will say so again
        print(f"!! torch.compile does not work here: {error}", file=sys.stderr)


def run(options: Options) -> list[Table]:
    """Three tables: times, ratios, compilations."""
    rows: list[Row] = []
    compilations: list[Row] = []
    absent: dict[str, str] = {}
    for network in options.networks:
        for batch, k in options.cells or GRID:
            print(f"steps: {network}, batch {batch}, k {k}", file=sys.stderr)
            result = measure(Setting(network, batch, k), options)
            absent |= result.absent
            where = {"network": network, "batch": batch, "k": k}
            rows.append(where | _row(result))
            compilations += [
                where | {"contender": name, "seconds": seconds, "cache": cache}
                for name, (seconds, cache) in result.compilations.items()
            ]
    data = images.load(options.data_dir)[2]
    notes = [
        f"Data: {data}. All start from the same weights, after {options.warmup} training steps with batches of 20.",
        *(f"Left out: {name} ({why})." for name, why in absent.items()),
    ]
    at = ["network", "batch", "k"]
    return [
        Table("Milliseconds per training step", [*at, *CONTENDERS], rows, notes),
        Table("Ratios of these times", [*at, *RATIOS, "denormal or zero", "below eps^2"], rows, [_SHARES]),
        Table("Compilation, with the first step", [*at, "contender", "seconds", "cache"], compilations),
    ]


_SHARES = (
    'The last two columns are the shares of particles whose normalised weight is "denormal or zero", "below eps^2".'
)


def _row(result: Measured) -> dict[str, Any]:
    return (
        {name: result.ms(name) for name in CONTENDERS}
        | {name: ratio(result.ms(of), result.ms(to)) for name, (of, to) in RATIOS.items()}
        | result.weights
        | {"details": {name: times.summary() for name, times in result.times.items()}}
    )
