"""Programs by name: each is made anew, on a small data set of its own, as a model, a guide and their arguments."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.infer

Theirs = Callable[..., Any]  # an objective of Pyro's


@dataclass(frozen=True)
class Pair:
    """A program as its users have it.

    :ivar args: what model and guide are called with: a batch.
    :ivar theirs: the objective of Pyro's that the program is trained on.
    :ivar lr: of Adam, for the few steps after which the fit must be better.
    :ivar density: whether the latents have densities in the guide, so that log p(x) is defined.
    :ivar aside: a pattern of parameters that Pyro's objective trains besides: baselines.
    :ivar options: of ours: ``vectorize_particles``, ``fold_particles``.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...] = ()
    theirs: Theirs = pyro.infer.Trace_ELBO
    lr: float = 0.02
    density: bool = True
    aside: str = ""
    options: dict[str, Any] = field(default_factory=dict)


PROGRAMS: dict[str, Callable[[], Pair]] = {}
FILES: dict[str, str] = {}  # where each is written


def program(*names: str) -> Callable[[Callable[..., Pair]], Callable[..., Pair]]:
    """Enter a function that makes a program, or one of each of several names, which it then takes."""

    def enter(make: Callable[..., Pair]) -> Callable[..., Pair]:
        for name in names or (make.__name__,):
            FILES[name] = make.__module__.rpartition(".")[2]
            PROGRAMS[name] = (lambda name=name: make(name)) if names else make
        return make

    return enter


def make(name: str, seed: int = 0) -> Pair:
    """A program from a known state, its parameters in Pyro's store, where it keeps them, made."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    return PROGRAMS[name]()
