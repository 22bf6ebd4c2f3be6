"""What changes while training: the learning rate, the number of particles, the weight of the KL."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import pyro.infer
import torch

from pyrovae.arguments import in_range, positive_int, sizes
from pyrovae.objectives.base import Objective
from pyrovae.schedules import Schedule, make_schedule


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
        if not isinstance(objective, pyro.infer.ELBO):
            raise TypeError(f"objective must be a pyro.infer.ELBO such as pyrovae.IWAE(5), got {objective!r}: pass one")
        name = type(objective).__name__
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
        called = schedule if isinstance(schedule, str) else "custom"
        return cls(objective, copy.copy(objective), epochs, make_schedule(schedule), stages, warmup, called)

    def describe(self) -> dict[str, object]:
        """As JSON can hold it."""
        return {
            "epochs": self.epochs, "schedule": self.schedule_name, "particles": self.particles,
            "kl_warmup": self.kl_warmup,
        }  # fmt: skip

    @property
    def final(self) -> pyro.infer.ELBO:
        """The objective as it is once everything has grown, as an object of its own."""
        return copy.copy(self.at(self.epochs, warm=True))

    def stages(self) -> list[pyro.infer.ELBO]:
        """An objective for each number of particles there will be."""
        found = []
        for number in dict.fromkeys(self.particles or (self.objective.num_particles,)):
            found.append(copy.copy(self.at(0)))
            found[-1].num_particles = number
        return found

    def at(self, epoch: float, *, warm: bool = False) -> pyro.infer.ELBO:
        """The objective after ``epoch`` epochs (a fraction counts): one object, so that it checks its pair only once.

        With ``warm`` the KL's warm-up counts as over.
        """
        if self.particles is not None:
            stage = min(int(epoch * len(self.particles) / self.epochs), len(self.particles) - 1)
            self.current.num_particles = self.particles[stage]
        if self.kl_warmup:
            factor = 1.0 if warm else min(epoch / self.kl_warmup, 1.0)
            # A tensor even where it is 0: the KL's parameters get gradients of 0 then, compiled or not, and never none.
            self.current.kl_weight = torch.as_tensor(self.objective.kl_weight * factor, dtype=torch.float64)  # type: ignore[attr-defined]
        return self.current

    def factor(self, epoch: float) -> float:
        """The factor of the learning rate after ``epoch`` epochs."""
        return self.schedule(epoch / self.epochs)
