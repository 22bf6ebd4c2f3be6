"""One optimisation step of a pair on an objective, and one pass of validation; both in nats per datum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.poutine.runtime import effectful
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer

from pyrovae import data as datasets
from pyrovae.feed import Feed
from pyrovae.precision import networks_in
from pyrovae.programs import Program, Reach, eval_mode, isolated_rng, protected_buffers, reach
from pyrovae.sites import Sites, counts, log_prob, record_pair

Batch = tuple[Any, ...]


def find_parameters(
    model: Program, guide: Program, batch: Batch, check: Callable[[Sites], None] = lambda joint: None
) -> Reach:
    """What a pair reaches when it runs on ``batch``; ``check`` sees the model's sites."""

    def log_joint() -> Tensor:
        drawn, joint = record_pair(model, guide, batch, {})
        check(joint)
        terms = [log_prob(s, in_guide=run is drawn) for run in (drawn, joint) for s in run.values() if counts(s)]
        return torch.stack([term.sum() for term in terms]).sum() if terms else torch.zeros(())

    with isolated_rng(), pyro.validation_enabled(False), torch.enable_grad():
        pair = reach(model, guide, log_joint)
    if not pair.parameters:
        raise ValueError("the pair has no parameters to train: use modules, pyro.param or tensors that require grad")
    return pair


class Stepper:
    """One optimisation step, run eagerly: loss in nats per datum, gradients, clipping, optimizer."""

    path = "eager"
    compile_seconds = 0.0
    takes_index = False  # batches, not the indices of data that live on the device

    def __init__(
        self,
        model: Program,
        guide: Program,
        pair: Reach,
        optimizer: Optimizer,
        batch: Batch,
        *,
        clip_norm: float | None = None,
        precision: str = "float32",
    ) -> None:
        self.model, self.guide, self.pair, self.optimizer = model, guide, pair, optimizer
        self.example, self.clip_norm, self.precision = batch, clip_norm, precision
        self.reached = list(pair.parameters.values())
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]  # maybe not all reached ones
        self.announcing_model = _announcing(model, self.parameters[0])
        self.base_lr = [float(group["lr"]) for group in optimizer.param_groups]
        self.full_size = full_size(model, guide, batch)

    def set_lr(self, factor: float) -> None:
        """Scale every group's learning rate from where it started."""
        for group, base in zip(self.optimizer.param_groups, self.base_lr, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(base * factor)
            else:
                group["lr"] = base * factor

    def __call__(self, objective: Any, batch: Batch) -> Tensor | float:
        """The loss per datum of one step; nothing is read back from the device."""
        loss = self.gradients(objective, batch)
        self.update()
        return loss

    def gradients(self, objective: Any, batch: Batch) -> Tensor | float:
        """The loss per datum, its gradients in the parameters' ``.grad``."""
        for parameter in (*self.reached, *self.parameters):
            parameter.grad = None
        if hasattr(objective, "differentiable_loss"):
            loss = self.loss(objective, batch)
            loss.backward()
            return loss.detach()
        with networks_in(self.precision):
            loss = first_loss(objective.loss_and_grads(self.announcing_model, self.guide, *batch)) / self.size(batch)
        torch._foreach_div_([p.grad for p in self.parameters if p.grad is not None], self.size(batch))
        return loss

    def loss(self, objective: Any, batch: Batch) -> Tensor:
        """The loss per datum, to be differentiated."""
        with networks_in(self.precision):
            return objective.differentiable_loss(self.model, self.guide, *batch) / self.size(batch)

    def size(self, batch: Batch) -> int:
        """What a loss summed over data is divided by."""
        return self.full_size or len(batch[0])

    def update(self) -> None:
        """Clip the gradients and move the parameters."""
        if self.clip_norm is not None:
            clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimizer.step()

    def metrics(self) -> dict[str, float]:
        """``grad_norm``, the 2-norm of the last gradient (after clipping), and ``learning_rate``."""
        norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        return {"grad_norm": float(norm), "learning_rate": float(self.optimizer.param_groups[0]["lr"])}

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


def full_size(model: Program, guide: Program, batch: Batch) -> int | None:
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
