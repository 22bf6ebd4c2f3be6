"""How pairs are to be trained: what changes while they are, and the other arguments of fit and fit_replicas."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pyro.infer
import torch
from torch import Tensor
from torch.optim import Optimizer

from pyrovae.arguments import check_seed, in_range, one_of, pick_device, positive_int, shown, sizes
from pyrovae.compile.precision import choose_precision
from pyrovae.data.feed import Feed
from pyrovae.engine.programs import warn
from pyrovae.objectives.base import Objective
from pyrovae.ranks import ranks
from pyrovae.schedules import Schedule, make_schedule

MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]


def check_objective(objective: object) -> pyro.infer.ELBO:
    """An objective, or one clear error."""
    if not isinstance(objective, pyro.infer.ELBO):
        got = f"the class {objective.__name__}" if isinstance(objective, type) else shown(objective)
        raise TypeError(f"objective must be a pyro.infer.ELBO such as pyrovae.IWAE(5), got {got}: pass one")
    return objective


@dataclass(frozen=True)
class Plan:
    """What changes while training: learning rate, particles and kl_weight, as functions of progress."""

    objective: pyro.infer.ELBO  # the caller's, never changed
    current: pyro.infer.ELBO
    epochs: int
    schedule: Schedule
    particles: tuple[int, ...] | None
    kl_warmup: float
    schedule_name: str = "custom"

    @classmethod
    def make(
        cls,
        objective: pyro.infer.ELBO,
        epochs: int,
        schedule: str | Schedule = "constant",
        particles: Sequence[int] | None = None,
        kl_warmup: float = 0,
    ) -> Plan:
        """A plan from the arguments of fit, which are checked."""
        name = type(check_objective(objective)).__name__
        if not isinstance(objective, Objective) and (particles is not None or kl_warmup):
            raise ValueError(
                f"particles and kl_warmup need one of pyrovae's objectives, got {name}: "
                "leave them out, or take pyrovae's equal of it"
            )
        if kl_warmup and isinstance(objective, Objective) and not objective.weighs_kl:
            raise ValueError(f"{name} has no kl_weight to warm up, got kl_warmup={kl_warmup}: leave it out")
        stages = None if particles is None else sizes("particles", particles)
        if stages == ():
            raise ValueError("particles is empty: give a number for each stage, or leave it out")
        if isinstance(objective, Objective) and type(objective).__module__.startswith("pyrovae."):
            for number in stages or ():  # some objectives need two at least
                type(objective)(**objective.config | {"num_particles": number})
        epochs, warmup = positive_int("epochs", epochs), in_range("kl_warmup", kl_warmup, 0.0)
        if warmup > epochs:
            ends = torch.as_tensor(getattr(objective, "kl_weight", 1.0)).item() * epochs / warmup
            warn(f"kl_warmup={warmup:g} is longer than epochs={epochs}: kl_weight ends at {ends:.3g}")
        called = schedule if isinstance(schedule, str) else "custom"
        return cls(objective, copy.copy(objective), epochs, make_schedule(schedule), stages, warmup, called)

    @property
    def final(self) -> pyro.infer.ELBO:
        """The objective as it is once everything has grown, as an object of its own."""
        return copy.copy(self.at(max(self.epochs, self.kl_warmup)))

    @property
    def growing(self) -> int:
        """How many epochs begin before warm-up and stages are over; the last epoch counts as final in any case."""
        stages = len(self.particles or (1,))
        return min(math.ceil(max(self.kl_warmup, self.epochs * (stages - 1) / stages)), self.epochs - 1)

    def at(self, epoch: float) -> pyro.infer.ELBO:
        """The objective after ``epoch`` epochs (a fraction counts): one object, so that it looks at its pair once."""
        if self.particles is not None:
            stage = min(int(epoch * len(self.particles) / self.epochs), len(self.particles) - 1)
            self.current.num_particles = self.particles[stage]
        if self.kl_warmup:
            factor = min(epoch / self.kl_warmup, 1.0)
            # A tensor even where it is 0: the KL's parameters get gradients of 0 then, compiled or not, and never none.
            self.current.kl_weight = torch.as_tensor(self.objective.kl_weight * factor, dtype=torch.float64)  # type: ignore[attr-defined]
        return self.current

    def factor(self, epoch: float) -> float:
        """The factor of the learning rate after ``epoch`` epochs."""
        given = self.schedule(epoch / self.epochs)
        factor = math.nan if given is None else float(given)
        if not 0 <= factor < math.inf:
            raise ValueError(f"schedule must give factors in [0, inf), got {given}: pass a function that gives such")
        return factor

    def check(self, steps: int | None) -> None:
        """Refuse more stages than steps, an epoch having so many: the last stages would never come."""
        if (number := len(self.particles or ())) > (total := self.epochs * (steps or 1)):
            raise ValueError(f"particles has {number} stages for {total} steps: pass more epochs, or fewer stages")


class Setup:
    """What all pairs of one training share, besides their data."""

    def __init__(
        self,
        plan: Plan,
        *,
        batch_size: int,
        clip_norm: float | None,
        precision: str,
        device: str | torch.device,
        seed: int,
        progress: bool | None,
        on_nan: str,
    ) -> None:
        self.plan = plan
        self.batch_size = positive_int("batch_size", batch_size)
        self.clip_norm = None if clip_norm is None else in_range("clip_norm", clip_norm, 1e-12)
        self.device = pick_device(device)
        self.rows = self.batch_size * max(plan.particles or (getattr(plan.objective, "total_particles", 1),))
        self.precision = choose_precision(precision, self.device, self.rows)
        self.ranks = ranks()
        self.seed, self.threads = check_seed(seed), torch.get_num_threads()
        self.progress = progress if self.ranks.first else False
        self.skips = one_of("on_nan", on_nan, ("raise", "skip")) == "skip"

    def place(self) -> AbstractContextManager[object]:
        """The context in which "cuda" is the device asked for, with its streams and generators."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def describe(self, feed: Feed) -> dict[str, object]:
        """As JSON can hold it."""
        plan = self.plan
        return {
            "epochs": plan.epochs, "schedule": plan.schedule_name, "particles": plan.particles,
            "kl_warmup": plan.kl_warmup, "batch_size": self.batch_size, "clip_norm": self.clip_norm,
            "precision": self.precision, "device": str(self.device), "seed": self.seed,
            "threads": torch.get_num_threads(), "processes": self.ranks.size, "num_data": feed.size,
            "on_nan": "skip" if self.skips else "raise",
        }  # fmt: skip

    def advice(self, checkpoint: Path | None) -> str:
        """What to lower where memory runs out."""
        particles = getattr(self.plan.current, "total_particles", 1)
        bfloat = "" if self.precision == "bfloat16" else ', or pass precision="bfloat16"'
        kept = "" if checkpoint is None else f'; the last checkpoint is in "{checkpoint}"'
        return f"asked for batch_size={self.batch_size} with {particles} particles; lower either{bfloat}{kept}"
