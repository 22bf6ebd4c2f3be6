"""One optimisation step: gradients of one pair or several, and the optimizers that follow them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import pyro.infer
import torch
from pyro.poutine.runtime import effectful
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer

from pyrovae.compile.precision import networks_in
from pyrovae.engine.probe import Look, PairState
from pyrovae.engine.programs import Batch, Program

T = TypeVar("T")


class Gradients(Protocol):
    """What fills the parameters' ``.grad``: of one pair eagerly or compiled, or of several at once."""

    kind: str  # "eager", "compiled" or "replicas"
    compile_seconds: float
    example: Batch  # of the kind that it is made for
    states: list[PairState]  # of each pair

    def __call__(self, objective: pyro.infer.ELBO, batch: Batch) -> Tensor | float:
        """The loss per datum, 0-d or one for each pair; nothing is read back from the device."""

    def static(self, objective: pyro.infer.ELBO) -> Callable[[Batch], Tensor] | None:
        """The same for batches like the example, as operations on the device alone; None where there are none such."""


class Eager:
    """The gradients of one pair, by autograd or as one of Pyro's own objectives takes them.

    :param seen: a look at the pair; it is not kept.
    :param example: a batch as they will be.
    :raises ValueError: where there is nothing to train.
    """

    kind = "eager"
    compile_seconds = 0.0

    def __init__(
        self, model: Program, guide: Program, seen: Look, example: Batch, *, precision: str = "float32"
    ) -> None:
        self.model, self.guide, self.state, self.states = model, guide, seen.state, [seen.state]
        self.example, self.precision, self.full_size = example, precision, seen.full_size
        self.parameters = list(seen.state.parameters.values())
        if not self.parameters:
            raise ValueError(
                "the pair has no parameters to train: use modules, pyro.param or tensors that require grad"
            )
        self.announcing_model = announcing(model, self.parameters[0])

    def __call__(self, objective: pyro.infer.ELBO, batch: Batch) -> Tensor | float:
        for parameter in self.parameters:
            parameter.grad = None
        if hasattr(objective, "differentiable_loss"):
            loss = self.loss(objective, batch)
            loss.backward()
            return loss.detach()
        size, loss_and_grads = self.size(batch), objective.loss_and_grads  # type: ignore[attr-defined]
        with networks_in(self.precision):
            found = first_loss(loss_and_grads(self.announcing_model, self.guide, *batch))
        torch._foreach_div_([p.grad for p in self.parameters if p.grad is not None], size)
        return found / size

    def static(self, objective: pyro.infer.ELBO) -> None:
        """Nothing: Python runs at every step."""

    def loss(self, objective: pyro.infer.ELBO, batch: Batch) -> Tensor:
        """The loss per datum, to be differentiated."""
        with networks_in(self.precision):
            loss = objective.differentiable_loss(self.model, self.guide, *batch)  # type: ignore[attr-defined]
            return loss / self.size(batch)

    def size(self, batch: Batch) -> int:
        """What a loss summed over data is divided by."""
        return self.full_size or len(batch[0])


class Step:
    """One step of one pair or several: gradients, clipping and an optimizer for each pair."""

    takes_index = False  # batches, not the indices of data that live on the device

    def __init__(self, gradients: Gradients, optimizers: Sequence[Optimizer], clip_norm: float | None = None) -> None:
        self.gradients, self.optimizers, self.clip_norm = gradients, list(optimizers), clip_norm
        self.base_lr = [float(group["lr"]) for group in self.groups()]
        self.parameters: list[list[Tensor]] = [
            [p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers
        ]

    def __call__(self, objective: pyro.infer.ELBO, batch: Batch) -> Tensor | float:
        """The losses per datum of one step; nothing is read back from the device."""
        self.clear()
        losses = self.gradients(objective, batch)
        self.update()
        return losses

    def clear(self) -> None:
        """Drop the last gradients, those too of parameters that the pair does not reach."""
        for own in self.parameters:
            for parameter in own:
                parameter.grad = None

    def update(self) -> None:
        """Clip the gradients and move the parameters."""
        for optimizer, own in zip(self.optimizers, self.parameters, strict=True):
            if self.clip_norm is not None:
                clip_grad_norm_(own, self.clip_norm)
            optimizer.step()

    def groups(self) -> Iterator[dict[str, Any]]:
        """The groups of parameters of all optimizers, as they are now: a checkpoint puts others in their place."""
        return (group for optimizer in self.optimizers for group in optimizer.param_groups)

    def set_lr(self, factor: float) -> None:
        """Scale every learning rate from where it started."""
        for group, base in zip(self.groups(), self.base_lr, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(base * factor)
            else:
                group["lr"] = base * factor

    @property
    def kind(self) -> str:
        """How it runs: "eager", "compiled" or "replicas"."""
        return self.gradients.kind

    @property
    def compile_seconds(self) -> float:
        """What compiling has taken so far."""
        return self.gradients.compile_seconds

    def metrics(self, number: int = 0) -> dict[str, float]:
        """``grad_norm``, the 2-norm of a pair's last gradient (after clipping), and its ``learning_rate``."""
        norm = get_total_norm([p.grad for p in self.parameters[number] if p.grad is not None])
        return {"grad_norm": float(norm), "learning_rate": float(self.optimizers[number].param_groups[0]["lr"])}

    def finite(self, number: int = 0) -> bool:
        """Whether all parameters of a pair still are."""
        return all(torch.isfinite(p).all().item() for p in self.parameters[number])


def first_loss(loss: T | tuple[T, ...]) -> T:
    """A loss; the model's, where an objective gives one each for model and guide (Pyro's ReweightedWakeSleep)."""
    return loss[0] if isinstance(loss, tuple) else loss


def announcing(model: Program, parameter: Tensor) -> Program:
    """The model with one param site in front; without any, Pyro's ``loss_and_grads`` leaves out the backward pass."""
    announce = effectful(lambda: parameter, type="param")

    def announced(*args: object, **kwargs: object) -> object:
        announce(name="pyrovae.parameters")
        return model(*args, **kwargs)

    return announced
