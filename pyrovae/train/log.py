"""What a training job writes down: the outcome of one call of fit, and what its run says of the pair."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro.infer
import torch

from pyrovae import runs
from pyrovae.engine.programs import Program, roots
from pyrovae.html import table
from pyrovae.objectives.base import Objective
from pyrovae.train.plan import Setup
from pyrovae.train.step import Recorded, Step

SHOWN = ("bound", "validation_bound", "reconstruction", "kl", "active_units", "grad_norm", "learning_rate")


@dataclass
class Fit:
    """What came of training: one dict per epoch, and how long it took.

    ``history`` has, per epoch, ``bound`` (mean over the epoch, nats per datum), ``left_out`` (data whose bound was
    -inf), ``skipped`` (steps that were no number), ``reconstruction``, ``kl``,
    ``kl_per_unit``, ``active_units``, ``grad_norm``, ``learning_rate``, ``kl_weight``, ``seconds``, ``cpu_seconds`` (of
    this process, all threads together), and ``validation_bound`` if asked for. ``timings`` has ``ms_per_step``,
    ``images_per_second``, ``seconds``, ``path`` ("eager", "compiled", "cuda graph" or "replicas"), ``compile_seconds``
    (not part of ``seconds``), ``precision``, ``threads``, ``processes`` and ``device``.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    timings: dict[str, Any] = field(default_factory=dict)
    best_epoch: int | None = None
    finished: bool = False

    def _repr_html_(self) -> str:
        called = (
            {0: "first"} | ({self.best_epoch - 1: "best"} if self.best_epoch else {}) | {len(self.history) - 1: "last"}
        )
        shown = [name for name in SHOWN if any(name in row for row in self.history)]
        rows = [
            (f"{called[i]} ({i + 1})", *(cell(row.get(name)) for name in shown))
            for i, row in enumerate(self.history) if i in called
        ]  # fmt: skip
        speed = f", {self.timings['ms_per_step']:.2f} ms a step, {self.timings['path']}" if self.timings else ""
        return table(f"{len(self.history)} epochs{speed}", ["epoch", *shown], rows)

    def add(self, metrics: Mapping[str, object], patience: int | None, growing: int = 0) -> None:
        """Take in one epoch; training is finished if the validation bound has not improved for ``patience`` epochs.

        Of the first ``growing`` epochs, in which the objective changes, none is the best, and none counts.
        """
        self.history.append(dict(metrics))
        best = self.best_epoch or 0
        if "validation_bound" in metrics and len(self.history) > growing:
            if best <= growing or validation_bound(metrics) > validation_bound(self.history[best - 1]):
                self.best_epoch = len(self.history)
            self.finished = self.stops(patience, growing)

    def stops(self, patience: int | None, growing: int = 0) -> bool:
        """Whether the last epochs were no better than the best, so many that training ends."""
        best = self.best_epoch or 0
        return patience is not None and best > growing and len(self.history) - best >= patience

    def extend(self, epochs: int, patience: int | None, growing: int = 0) -> bool:
        """Take a new total of epochs; whether training has stopped early before it."""
        stopped = self.stops(patience, growing)
        self.finished = stopped or len(self.history) >= epochs
        return stopped and len(self.history) < epochs

    def finish(self, step: Step | Recorded, setup: Setup) -> None:
        """Sum up the timings."""
        known = ("seconds", "steps", "images_per_second")  # of rows in a file that was edited, perhaps not
        rows = [tuple(float(row.get(name) or 0.0) for name in known) for row in self.history]
        seconds, steps = sum(row[0] for row in rows), int(sum(row[1] for row in rows))
        images = sum(rate * taken for taken, _, rate in rows)
        self.timings = {
            "ms_per_step": 1e3 * seconds / max(steps, 1), "images_per_second": images / max(seconds, 1e-9),
            "seconds": seconds, "steps": steps, "path": step.kind, "compile_seconds": step.gradients.compile_seconds,
            "precision": setup.precision, "threads": torch.get_num_threads(), "processes": setup.ranks.size,
            "device": str(setup.device),
        }  # fmt: skip


def describe_job(
    model: Program, guide: Program, objective: pyro.infer.ELBO, training: Mapping[str, object]
) -> dict[str, object]:
    """What a run's config says of a pair and of how it is trained."""
    owners = roots(model, guide)  # one object, where both are programs of one
    return {
        "model": runs.describe(owners[0] if len(owners) == 1 else None), "objective": describe_objective(objective),
        "versions": runs.versions(), "training": training,
    }  # fmt: skip


def describe_objective(objective: pyro.infer.ELBO) -> dict[str, object]:
    """Class and arguments of an objective, as JSON can hold them."""
    names = objective.defaults() if isinstance(objective, Objective) else ("num_particles",)
    arguments = {name: getattr(objective, name) for name in names if hasattr(objective, name)}
    arguments = {name: value for name, value in arguments.items() if not inspect.ismethod(value)}
    return {"class": runs.class_path(type(objective)), "arguments": arguments}


def validation_bound(row: Mapping[str, Any]) -> float:
    """An epoch's validation bound; what is not finite was read back from JSON as None."""
    bound = row.get("validation_bound")
    return -math.inf if bound is None or math.isnan(bound) else bound


def cell(value: object) -> object:
    """A metric in a table, that of each site where it has several."""
    if isinstance(value, Mapping):
        return ", ".join(f"{number} at {site}" for site, number in value.items())
    return "" if value is None else value
