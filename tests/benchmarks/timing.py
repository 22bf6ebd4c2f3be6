"""Timing of contenders that take turns, so that what else runs on the machine hits all of them; and of compilers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

Run = Callable[[], object]
TURN = 0.05  # seconds of one turn; what takes longer is timed one by one
SETTLE = 5  # untimed runs at first, unless one second is over before


@dataclass
class Times:
    """Milliseconds per run, one entry per turn."""

    ms: list[float] = field(default_factory=list)
    spent: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    def summary(self) -> dict[str, float]:
        """Median, quartiles and number of turns."""
        low, _, high = statistics.quantiles(self.ms, n=4) if len(self.ms) > 1 else self.ms * 3
        return {"median": self.median, "lower_quartile": low, "upper_quartile": high, "turns": len(self.ms)}


def synchronise(device: str) -> None:
    """Wait for the device, where it works by itself."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def block(run: Run, count: int, device: str) -> float:
    """Seconds of ``count`` runs in a row."""
    synchronise(device)
    began = time.perf_counter()
    for _ in range(count):
        run()
    synchronise(device)
    return time.perf_counter() - began


def take_turns(runs: Mapping[str, Run], seconds: float, device: str, least: int = 3) -> dict[str, Times]:
    """Time each for about ``seconds``, and at least ``least`` turns; the next turn is for who had least time so far.

    A turn of several runs begins with an untimed one, which fills the caches with the contender's own network again.
    """
    counts = {name: max(1, round(TURN / _settled(run, device))) for name, run in runs.items()}
    times = {name: Times() for name in runs}
    while waiting := [n for n, t in times.items() if t.spent < seconds or len(t.ms) < least]:
        name = min(waiting, key=lambda n: times[n].spent)
        if counts[name] > 1:
            runs[name]()
        took = block(runs[name], counts[name], device)
        times[name].ms.append(1e3 * took / counts[name])
        times[name].spent += took
    return times


def _settled(run: Run, device: str) -> float:
    """Seconds of one run, the shortest of some."""
    took: list[float] = []
    while len(took) < SETTLE and sum(took) < 1.0:
        took.append(block(run, 1, device))
    return min(took)


def timed_compilation(run: Run, device: str) -> tuple[float, str]:
    """Seconds of a first run, and whether the compiler built machine code in it ("cold") or found it "in the cache"."""
    before = _built()
    seconds = block(run, 1, device)
    return seconds, "cold" if _built() - before else "in the cache"


def _built() -> set[Path]:
    """The machine code in Inductor's cache."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return {path for path in Path(cache_dir()).rglob("*") if path.suffix in (".so", ".cubin")}
