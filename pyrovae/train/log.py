"""What a training job writes down: the outcome of one call of fit, and its run directory."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro.infer
import torch
from torch.optim import Optimizer

from pyrovae import runs
from pyrovae.compile.recording import uncapturable
from pyrovae.engine.probe import PairState
from pyrovae.engine.programs import Program, roots
from pyrovae.engine.randomness import restore_rng, rng_snapshot
from pyrovae.objectives.base import Objective
from pyrovae.train.recorded import Recorded
from pyrovae.train.step import Step

MAY_CHANGE = ("threads", "device", "compile")  # between a run and its resumption


@dataclass
class Fit:
    """What came of training: one dict per epoch, and how long it took.

    ``history`` has, per epoch, ``bound`` (mean over the epoch, nats per datum), ``reconstruction``, ``kl``,
    ``kl_per_unit``, ``active_units``, ``grad_norm``, ``learning_rate``, ``kl_weight``, ``seconds``, and
    ``validation_bound`` if asked for. ``timings`` has ``ms_per_step``, ``images_per_second``, ``seconds``, ``path``
    ("eager", "compiled", "cuda graph" or "replicas"), ``compile_seconds`` (not part of ``seconds``), ``precision``,
    ``threads`` and ``device``.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    timings: dict[str, Any] = field(default_factory=dict)
    best_epoch: int | None = None
    finished: bool = False

    def add(self, metrics: Mapping[str, object], patience: int | None) -> None:
        """Take in one epoch; training is finished if the validation bound has not improved for ``patience`` epochs."""
        self.history.append(dict(metrics))
        if "validation_bound" in metrics:
            best = max(self.history, key=validation_bound)["epoch"]
            self.best_epoch = best
            self.finished = patience is not None and len(self.history) - best >= patience

    def finish(self, step: Step | Recorded, precision: str, device: torch.device) -> None:
        """Sum up the timings."""
        seconds = sum(row["seconds"] for row in self.history)
        steps = sum(row["steps"] for row in self.history)
        images = sum(row["images_per_second"] * row["seconds"] for row in self.history)
        self.timings = {
            "ms_per_step": 1e3 * seconds / max(steps, 1),
            "images_per_second": images / max(seconds, 1e-9),
            "seconds": seconds,
            "steps": steps,
            "path": step.kind,
            "compile_seconds": step.compile_seconds,
            "precision": precision,
            "threads": torch.get_num_threads(),
            "device": str(device),
        }


class Log:
    """The run directory of one call of :func:`fit`, if it has one."""

    def __init__(
        self, run_dir: str | os.PathLike[str] | None, state: PairState, optimizer: Optimizer, *, resume: bool = False
    ) -> None:
        self.run = None if run_dir is None else runs.Run(run_dir)
        self.state, self.optimizer, self.resume = state, optimizer, resume

    def open(self, config: Mapping[str, object]) -> Fit:
        """Start the run, or take up its last checkpoint."""
        run = self.run
        if run is None:
            return Fit()
        if run.exists and not self.resume:
            raise ValueError(f'"{run.path}" holds a run already: pass resume=True to go on with it, or another run_dir')
        saved = run.state() if self.resume and run.exists else None
        if saved is None:
            run.start(config)
            return Fit()
        check_same(run, config)
        history = run.rewind(saved["epoch"])
        runs.restore(self.state.tensors, run.weights(), where=str(run.path))
        self.optimizer.load_state_dict(saved["optimizer"])
        uncapturable(self.optimizer)
        restore_rng(saved["rng"])
        return Fit(history, best_epoch=saved["best_epoch"], finished=saved["finished"])

    @property
    def checkpoint(self) -> Path | None:
        """The last checkpoint, if there is one."""
        return None if self.run is None else self.run.checkpoint()

    def write(self, result: Fit) -> None:
        """Log the epoch just done and write its checkpoints."""
        if self.run is None:
            return
        self.run.log(result.history[-1])
        epoch = len(result.history)
        if result.best_epoch == epoch:
            self.run.save("best", self.state.tensors)
        self.save(result)

    def close(self, result: Fit) -> None:
        """Mark the run as finished."""
        already, result.finished = result.finished, True
        if self.run is not None and not already:
            self.save(result)

    def save(self, result: Fit) -> None:
        """Write the last checkpoint."""
        state = {
            "epoch": len(result.history), "best_epoch": result.best_epoch, "finished": result.finished,
            "optimizer": self.optimizer.state_dict(), "rng": rng_snapshot(),
        }  # fmt: skip
        self.run.save("last", self.state.tensors, state)  # type: ignore[union-attr]


def check_same(run: runs.Run, config: Mapping[str, object]) -> None:
    """A run goes on under the settings it began with, or its result would be neither one's nor the other's."""
    then = run.config()
    for part in ("model", "objective", "training", "data"):
        old, new = runs.as_json(then.get(part)) or {}, runs.as_json(config.get(part)) or {}
        changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and k not in MAY_CHANGE]
        if changed:
            was, now = ({k: settings.get(k) for k in changed} for settings in (old, new))
            raise ValueError(f'"{run.path}" was begun with {part} {was}, got {now}: resume with the same settings')


def describe_pair(model: Program, guide: Program, objective: pyro.infer.ELBO) -> dict[str, object]:
    """What is trained, on what objective, with which versions, as JSON can hold it."""
    owners = roots(model, guide)  # one object, where both are programs of one
    return {
        "model": runs.describe(owners[0] if len(owners) == 1 else None),
        "objective": describe_objective(objective),
        "versions": runs.versions(),
    }


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
