"""A pair that is trained: made ready, measured, saved, taken up again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro.infer
import torch
from torch import Tensor

from pyrovae import runs
from pyrovae.compile.recording import settle
from pyrovae.data.feed import Feed
from pyrovae.engine.probe import check_pair
from pyrovae.engine.programs import Program, cut, in_modes, modes_of, rows, warn
from pyrovae.engine.randomness import isolated_rng, restore_rng, rng_snapshot
from pyrovae.objectives.base import Objective
from pyrovae.runs.reading import Within
from pyrovae.train.checks import check_derivable, check_last_batch, check_memory, lone_datum_advice, warn_of_data
from pyrovae.train.log import Fit, describe_job
from pyrovae.train.monitor import Monitor, Validation, look_on, warn_unlogged
from pyrovae.train.optimizers import check_sparse
from pyrovae.train.plan import MakeOptimizer, Setup
from pyrovae.train.resuming import begun, state_of
from pyrovae.train.shared import check_shareable
from pyrovae.train.step import Eager, Recorded, Step
from pyrovae.train.threads import threads

OnEpoch = Callable[[Fit], object]


class Trainee:
    """A pair that is made ready: its data are checked against its observed sites, and it is where they are.

    :param maker: the learning rate, where it is known, and what makes the optimizer.
    :param kl_factor: of the objective's kl_weight, where the pair has one of its own.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        objective: pyro.infer.ELBO,
        setup: Setup,
        feed: Feed,
        maker: tuple[float | None, MakeOptimizer],
        kl_factor: float = 1.0,
    ) -> None:
        self.model, self.guide, self.objective, self.kl_factor = model, guide, objective, kl_factor
        self.setup, self.feed, self.result = setup, feed, Fit()
        setup.plan.check(feed.steps)
        check_derivable(model, guide)
        with lone_datum_advice():
            seen = look_on(feed, model, guide, validate=not setup.skips)
        check_last_batch(model, guide, seen, feed)
        self.monitor: Monitor | None = None
        own = setup.plan.at(0)
        try:
            check_pair(seen)
        except Exception as error:  # for instance a latent that only Pyro's enumeration knows; training may go on
            if isinstance(own, Objective):
                raise
            warn_unlogged(error)
            seen = look_on(feed, model, guide, validate=False)
        else:
            self.monitor = Monitor(model, guide, seen, feed)
            if isinstance(own, Objective):
                own.meet(model, guide, seen)
        warn_of_data(seen, feed)
        seen.state.to(feed.device)
        if not setup.ranks.alone:
            check_shareable(seen, own, feed, setup.ranks)
        example = cut(feed.first(), setup.ranks.share(rows(feed.first())))
        self.eager = Eager(model, guide, seen, example, precision=setup.precision)
        check_memory(self.eager, setup.plan, example)
        self.rate, self.make = maker
        self.optimizer = self.make(self.eager.parameters)
        check_sparse(self.optimizer, seen.modules)
        self.run: runs.Run | None = None
        self.within: Within | None = None  # the epoch that its checkpoint is in
        self.best: dict[str, Tensor] = {}  # weights that are not saved yet
        self.validation: Validation | None = None
        self.patience: int | None = None

    def open(
        self,
        run: runs.Run | None,
        training: Mapping[str, object],
        more: Mapping[str, object],
        step: Step | Recorded,
    ) -> None:
        """Start its run, or take up its last checkpoint; its config.json says ``training`` of that, and ``more``.

        Processes without a run take up what the first one's holds.
        """
        self.run, team = run, self.setup.ranks
        own = {"lr": self.rate, "optimizer": type(self.optimizer).__name__}
        settings = {**self.setup.describe(self.feed), **own, **training}
        config = {**describe_job(self.model, self.guide, self.objective, settings), **more}
        with team.together():
            found = None if run is None else begun(run, config)
        found = team.same(found)
        if found is None:
            return
        place, saved, weights, amended = found
        with team.together(), runs.undamaged(place / "last" / runs.STATE):
            self.eager.met.update(saved.get("met", {}))
            self.eager.reach.find(saved.get("examples", []), self.feed.device)
            step.join()
            self.eager.reach.restore(weights, saved.get("late", []), run or runs.Run(place))
            self.eager.reach.load(self.optimizer, saved["optimizer"], saved.get("order"))
            settle(self.optimizer)
            restore_rng(saved["rng"])
            if "place" in saved:
                self.within, self.feed.source.epoch = saved.get("within"), saved["epoch"]
                behind = self.within["data"] if self.within else 0
                self.feed.source.resume(saved["place"], behind, (run or runs.Run(place)).doubt)
        history = team.same([] if run is None else run.rewind(saved["epoch"]))
        self.result = Fit(history, best_epoch=saved["best_epoch"], finished=saved["finished"])
        if amended is not None:
            if run is not None:
                run.amend(amended)
            if self.result.extend(self.setup.plan.epochs, self.patience, self.setup.plan.growing):
                warn(f'"{place}" stopped early, {self.patience} epochs after its best: it has no more to train')

    def measured(self, metrics: Mapping[str, float], loss: float) -> dict[str, object]:
        """What is known of an epoch, once the pair as it is now was measured."""
        own = {"bound": -loss, "kl_weight": metrics["kl_weight"] * self.kl_factor}
        row = {**metrics, **own, **(self.monitor() if self.monitor is not None else {})}
        if self.validation is not None:
            row["validation_bound"] = bound = self.validation()
            if math.isnan(bound):
                warn(f"the validation bound of epoch {len(self.result.history) + 1} is NaN, and counts as -inf")
        return row

    def add(self, row: Mapping[str, object]) -> None:
        """Take in an epoch: log and save it."""
        self.within = None
        self.result.add(row, self.patience, self.setup.plan.growing)
        team = self.setup.ranks
        with team.together({} if team.alone else state_of(self.eager.parameters)):
            if self.run is not None:
                self.write(self.run, row)

    def write(self, run: runs.Run, row: Mapping[str, object]) -> None:
        """Log an epoch, and save it where that is due."""
        run.log(row)
        if self.result.best_epoch == len(self.result.history):
            self.best = {name: tensor.detach().clone() for name, tensor in self.eager.reach.tensors.items()}
        if run.due or self.result.finished:
            self.save(run)

    def show(self, on_epoch: OnEpoch) -> bool:
        """Show what came of it so far, whatever is drawn or put in another mode there; whether to go on."""
        shown = replace(self.result, history=list(self.result.history))
        modes = modes_of(self.eager.state.modules)
        with isolated_rng(), torch.enable_grad(), in_modes(modes), threads(self.setup.threads):
            return on_epoch(shown) is not False

    def save(self, run: runs.Run, within: Within | None = None, place: dict[str, Any] | None = None) -> None:
        """Write the last checkpoint, and the best one where it is another than is there."""
        result = self.result
        if self.best:
            run.save("best", self.best)
            self.best = {}
        state = {
            "epoch": len(result.history), "best_epoch": result.best_epoch, "finished": result.finished,
            "rng": rng_snapshot(), "met": self.eager.met, "within": within,
            "place": self.feed.source.between() if place is None else place, **self.eager.reach.saved(self.optimizer),
        }  # fmt: skip
        run.save("last", self.eager.reach.tensors, state)

    def close(self, step: Step | Recorded) -> Fit:
        """What came of it; its run is marked as finished."""
        self.result.finish(step, self.setup)
        already, self.result.finished = self.result.finished, True
        if self.run is not None and not already:
            self.save(self.run)
        return self.result

    @property
    def checkpoint(self) -> Path | None:
        """The last checkpoint, if there is one."""
        return None if self.run is None else self.run.checkpoint()
