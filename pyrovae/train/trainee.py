"""One pair while it is trained: what it reaches, its optimizer, what is measured and written of it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping

import pyro.infer
import torch
from torch import Tensor

from pyrovae.data.feed import Feed
from pyrovae.engine.probe import Look, check_pair, look
from pyrovae.engine.programs import Batch, Program, device_of
from pyrovae.engine.sites import Sites, counted, counts, log_prob
from pyrovae.objectives.base import Objective
from pyrovae.train.log import Fit, Log, describe_pair
from pyrovae.train.monitor import Monitor, Validation
from pyrovae.train.recorded import Recorded
from pyrovae.train.setup import MakeOptimizer, Setup
from pyrovae.train.step import Eager, Step


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
        seen = look_on(feed, model, guide)
        self.monitor: Monitor | None = None
        try:
            check_pair(seen)
        except Exception as error:  # for instance a latent that only Pyro's enumeration knows; training may go on
            reason = " ".join(str(error).split())
            warnings.warn(f"KL and active units will not be logged: {reason}", stacklevel=3)
        else:
            self.monitor = Monitor(model, guide, seen, feed)
            if isinstance(setup.plan.current, Objective):
                setup.plan.current.meet(model, guide, seen)
        warn_of_batches(seen, feed)
        seen.state.to(feed.device)
        self.eager = Eager(model, guide, seen, feed.first(), precision=setup.precision)
        self.rate, make = maker
        self.optimizer = make(self.eager.parameters)
        self.log, self.result = Log(None, seen.state, self.optimizer), Fit()
        self.validation: Validation | None = None
        self.patience: int | None = None

    def validate_on(self, held_out: Feed, objective: pyro.infer.ELBO, patience: int | None) -> None:
        """Measure a bound on held-out data after every epoch, and stop where it no longer improves."""
        seen = look_on(held_out, self.model, self.guide)
        self.validation = Validation(self.model, self.guide, seen, held_out, objective)
        self.patience = patience

    def describe(self, setup: Setup, feed: Feed) -> dict[str, object]:
        """How it is trained, as JSON can hold it."""
        return setup.describe(feed) | {"lr": self.rate, "optimizer": type(self.optimizer).__name__}

    def open(
        self,
        run_dir: str | os.PathLike[str] | None,
        training: Mapping[str, object],
        more: Mapping[str, object],
        *,
        resume: bool = False,
    ) -> None:
        """Start its run, or take up its last checkpoint."""
        self.log = Log(run_dir, self.eager.state, self.optimizer, resume=resume)
        described = describe_pair(self.model, self.guide, self.objective)
        self.result = self.log.open({**described, "training": training, **more})

    def add(self, metrics: Mapping[str, float], loss: float) -> None:
        """Take in an epoch."""
        own = {"bound": -loss, "kl_weight": metrics["kl_weight"] * self.kl_factor}
        row = {**metrics, **own, **(self.monitor() if self.monitor is not None else {})}
        if self.validation is not None:
            row["validation_bound"] = self.validation()
        self.result.add(row, self.patience)
        self.log.write(self.result)

    def close(self, step: Step | Recorded, setup: Setup) -> Fit:
        """What came of it."""
        self.result.finish(step, setup.precision, setup.device)
        self.log.close(self.result)
        return self.result

    def blame(self, batch: Batch, epoch: int, replica: int | None = None) -> str:
        """Say which replica is not finite any more; of a pair alone, where the first such value came from."""
        if replica is not None:
            return f"replica {replica} became NaN in epoch {epoch}: lower its learning rate, or pass clip_norm"
        seen = look(self.model, self.guide, batch, validate=False)
        where = next(
            (
                f'{role} site "{name}" has the first value or log-probability that is not finite'
                for role, sites in (("guide", seen.guide), ("model", seen.model))
                for name, s in sites.items()
                if counts(s) and not (torch.isfinite(log_prob(s)).all() and torch.isfinite(s["value"]).all())
            ),
            "every site is finite on the first batch",
        )
        checkpoint = self.log.checkpoint
        kept = f'; the last good checkpoint is in "{checkpoint}"' if checkpoint is not None else ""
        return f"the loss or a parameter became NaN in epoch {epoch}: {where}{kept}; lower lr, or pass clip_norm"


def look_on(feed: Feed, model: Program, guide: Program) -> Look:
    """A look at a pair on the first of the data, which are checked against its observed sites."""
    home = device_of(model, guide)
    batch = tuple(a.to(home) if home and isinstance(a, Tensor) else a for a in feed.first())
    try:
        seen = look(model, guide, batch)
    except ValueError:  # by Pyro's checks; where the data are at fault, they are told of in plainer words
        check_observed(look(model, guide, batch, validate=False).model, batch, feed)
        raise
    check_observed(seen.model, batch, feed)
    return seen


def check_observed(sites: Sites, batch: Batch, feed: Feed) -> None:
    """Check that the data lie where the sites that observe them have their support."""
    for name, site in sites.items():
        if not (counts(site) and site["is_observed"] and site["value"].numel()):
            continue
        for position, argument in enumerate(batch):
            if isinstance(argument, Tensor) and argument.data_ptr() == site["value"].data_ptr():
                feed.check(position, site["fn"].support, name, site["fn"].event_shape)


def warn_of_batches(seen: Look, feed: Feed) -> None:
    """Say so if latents are shared by all data, and yet each batch would count as all of them."""
    sites = (*counted(seen.guide), *counted(seen.model))
    plates = [f for site in sites for f in site["cond_indep_stack"]]
    subsampled = any(f.full_size and f.full_size > f.size for f in plates)
    if feed.steps != 1 and seen.joint and plates and not subsampled:
        warnings.warn(
            "latents outside the data plate are shared by all data, but each batch will count as all of them: pass "
            'batch_size=len(data), or give the plate its full size, pyro.plate("data", N, subsample_size=...)',
            stacklevel=4,
        )
