"""One optimisation step of a pair on an objective, in nats per datum."""

from __future__ import annotations

from typing import Any

import torch
from pyro.poutine.runtime import effectful
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer

from pyrovae.compile.precision import networks_in
from pyrovae.engine.probe import Reach, full_size
from pyrovae.engine.programs import Batch, Program


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
