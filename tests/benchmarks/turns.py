"""Contenders that take turns, each in a process of its own, so that what else runs on the machine hits all of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from tests.benchmarks.children import Child

EXTRA = 'pip install "pyrovae[benchmarks]"'
SHARING = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # JAX takes a card's memory for itself, all at once
NUMPYROS = ("NumPyro", "NumPyro by vmap")
NEEDS = dict.fromkeys(NUMPYROS, ("jax", "numpyro")) | {"Pythae": ("pythae.models",)}


@dataclass
class Run:
    """What one contender's process answered, turn by turn."""

    child: Child
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    about: dict[str, str] = field(default_factory=dict)

    def turn(self) -> None:
        answer = self.child.turn()
        self.seconds.append(answer["seconds"])
        self.cpu.append(answer["cpu"])
        self.losses.append(answer["loss"])
        self.errors.append(answer.get("error", float("nan")))

    @property
    def best(self) -> float:
        """Seconds of the quickest turn but the first: what is added to it comes from elsewhere."""
        return min(self.seconds[1:])


def in_turns(
    module: str, names: Sequence[str], arguments: Sequence[object], rounds: int, absent: dict[str, str], cache: str
) -> dict[str, Run]:
    """One turn of each with compilation, into ``cache``, and ``rounds`` more; ``absent`` tells who does not work."""
    runs: dict[str, Run] = {}
    with ExitStack() as stack:
        for name in names:
            child = Child(module, name, *arguments, environment={"TORCHINDUCTOR_CACHE_DIR": cache} | SHARING)
            runs[name] = Run(stack.enter_context(child))
        for name in names:
            try:
                runs[name].about = runs[name].child.answer()  # its imports are done
            except RuntimeError as error:
                leave_out(name, error, absent)
                del runs[name]
        for turn in range(1 + rounds):
            for name in _rotated(tuple(runs), turn):
                try:
                    runs[name].turn()
                except (RuntimeError, BrokenPipeError) as error:
                    leave_out(name, error, absent)
                    del runs[name]
    return runs


def leave_out(name: str, error: Exception, absent: dict[str, str]) -> None:
    """Say once why a contender is absent; where a package is, say what brings it."""
    reason = EXTRA if name in NEEDS and "ModuleNotFoundError" in str(error) else str(error)
    if absent.get(name) != reason:
        print(f"!! {name} is left out: {reason}", file=sys.stderr)
    absent[name] = reason


def numbers_of_cores(asked: Sequence[int], device: str) -> list[int]:
    """Those that there are; zero, which is all, where a card does the work."""
    if device != "cpu":
        return [0]
    return [n for n in asked if n <= len(os.sched_getaffinity(0))]


def hold_to(cores: int) -> None:
    """Hold this process to the first cores that it has; zero are all of them."""
    if cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def _rotated(names: tuple[str, ...], by: int) -> Iterator[str]:
    """The names in order, from another one on in each round."""
    yield from (names[(i + by) % len(names)] for i in range(len(names)))
