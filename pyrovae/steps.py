"""One optimisation step of a pair on an objective, and one pass of validation; both in nats per datum."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro.poutine.runtime import effectful
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer

from pyrovae import data as datasets
from pyrovae.feed import Feed
from pyrovae.programs import Program, Reach, eval_mode, isolated_rng, protected_buffers
from pyrovae.sites import counts, record_pair


class Stepper:
    """One optimisation step: loss in nats per datum, gradients, clipping, optimizer."""

    def __init__(
        self, model: Program, guide: Program, pair: Reach, optimizer: Optimizer, feed: Feed, clip_norm: float | None
    ) -> None:
        self.model, self.guide, self.optimizer, self.clip_norm = model, guide, optimizer, clip_norm
        self.reached = list(pair.parameters.values())
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]  # maybe not all reached ones
        self.announcing_model = _announcing(model, self.parameters[0])
        self.base_lr = [float(group["lr"]) for group in optimizer.param_groups]
        self.full_size = full_size(model, guide, feed.first())

    def set_lr(self, factor: float) -> None:
        """Scale every group's learning rate from where it started."""
        for group, base in zip(self.optimizer.param_groups, self.base_lr, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(base * factor)
            else:
                group["lr"] = base * factor

    def __call__(self, objective: Any, batch: tuple[Any, ...]) -> Tensor | float:
        """The loss per datum of one step; nothing is read back from the device."""
        size = self.full_size or len(batch[0])
        for parameter in (*self.reached, *self.parameters):
            parameter.grad = None
        if hasattr(objective, "differentiable_loss"):
            loss = objective.differentiable_loss(self.model, self.guide, *batch) / size
            loss.backward()
            loss = loss.detach()
        else:
            loss = first_loss(objective.loss_and_grads(self.announcing_model, self.guide, *batch)) / size
            torch._foreach_div_([p.grad for p in self.parameters if p.grad is not None], size)
        if self.clip_norm is not None:
            clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()
        return loss

    def grad_norm(self) -> float:
        """The 2-norm of the gradient of the last step (after clipping)."""
        return float(get_total_norm([p.grad for p in self.parameters if p.grad is not None]))

    def finite(self) -> bool:
        """Whether all parameters still are."""
        return all(torch.isfinite(p).all().item() for p in self.parameters)


def first_loss(loss: Any) -> Any:
    """A loss; the model's, where an objective gives one each for model and guide (Pyro's ReweightedWakeSleep)."""
    return loss[0] if isinstance(loss, tuple) else loss


def _announcing(model: Program, parameter: Tensor) -> Program:
    """The model with one param site in front; without any, Pyro's ``loss_and_grads`` leaves out the backward pass."""
    announce = effectful(lambda: parameter, type="param")

    def announced(*args: Any, **kwargs: Any) -> Any:
        announce(name="pyrovae.parameters")
        return model(*args, **kwargs)

    return announced


def full_size(model: Program, guide: Program, batch: tuple[Any, ...]) -> int | None:
    """The full size of the rightmost plate around the observed sites if it is subsampled, else None."""
    with torch.no_grad(), isolated_rng(), protected_buffers(), pyro.validation_enabled(False):
        _, joint = record_pair(model, guide, batch, {})
    observed = [s for s in joint.values() if counts(s) and s["is_observed"]]
    plates = {f.name: f for s in observed for f in s["cond_indep_stack"] if f.dim in (-1, None)}
    return next((f.full_size for f in plates.values() if f.full_size and f.full_size > f.size), None)


class Validation:
    """The bound on held-out data, in nats per datum, in eval mode and on the same noise every time."""

    def __init__(
        self, model: Program, guide: Program, modules: list[torch.nn.Module], feed: Feed, objective: Any
    ) -> None:
        self.model, self.guide, self.modules, self.feed, self.objective = model, guide, modules, feed, objective
        self.full_size = full_size(model, guide, feed.first())

    def __call__(self) -> float:
        data: Any = self.feed.images if self.feed.images is not None else self.feed.loader
        total = count = 0.0
        with torch.no_grad(), isolated_rng(0), eval_mode(self.modules):
            for batch in datasets.batches((data,), self.feed.batch_size, device=self.feed.device):
                loss = first_loss(self.objective.loss(self.model, self.guide, *batch))
                total -= loss / (self.full_size or len(batch[0])) * len(batch[0])
                count += len(batch[0])
        return total / count
