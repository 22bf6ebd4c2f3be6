"""One step: gradients of one pair or several, the optimizers that follow them, and on CUDA both as one graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, Protocol, TypeVar

import pyro.infer
import torch
from pyro.poutine.runtime import effectful
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from pyrovae.compile.checked import signature, tensors
from pyrovae.compile.precision import networks_in
from pyrovae.compile.recording import CannotRecord, Recording, Replays, capturable
from pyrovae.data.feed import Feed, as_batch
from pyrovae.data.images import Images
from pyrovae.engine.brief import Brief
from pyrovae.engine.devices import beside
from pyrovae.engine.guard import Guard
from pyrovae.engine.left_out import leaving_out
from pyrovae.engine.probe import Look, PairState
from pyrovae.engine.programs import Batch, Program, before_backward, new_leaves, rows, warn
from pyrovae.engine.sites import quoted
from pyrovae.engine.updates import Update
from pyrovae.train.late import Reach
from pyrovae.train.plan import MakeOptimizer

WATCHED, WATCH_EVERY = 500, 8  # steps whose graphs are gone through, which takes some 30 us, and which after those

T = TypeVar("T")


class Outcome(NamedTuple):
    """What a step comes to, of each pair, 0-d or ``[R]``; nothing is read back from the device.

    :ivar losses: per datum, of those not left out over the number of all; NaN where the step is withheld.
    :ivar left_out: the number of data whose bound is -inf.
    """

    losses: Tensor
    left_out: Tensor


class Gradients(Protocol):
    """What fills the parameters' ``.grad``: of one pair eagerly or compiled, or of several at once."""

    kind: str  # "eager", "compiled" or "replicas"
    compile_seconds: float  # what compiling and recording have taken so far
    example: Batch  # of the kind that it is made for
    states: list[PairState]  # of each pair
    reached: list[Reach]

    def __call__(self, objective: pyro.infer.ELBO, batch: Batch) -> Outcome:
        """The losses, and how many data are left out."""

    def static(self, objective: pyro.infer.ELBO) -> Callable[[Batch], Outcome] | None:
        """The same for batches like the example, as operations on the device alone; None where there are none such."""

    def look_again(self) -> None:
        """Before an epoch: leave what was made of a pair that is another by now."""


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
        self.reach = Reach(model, guide, seen.state)
        self.reached, self.parameters = [self.reach], self.reach.parameters
        self.steps, self.sizes = 0, set[int]()
        self.met: dict[str, int] = {}  # steps of a compiled job on batches of other sizes than the example, by kind
        self.sharing: Callable[[], AbstractContextManager[object]] = nullcontext  # where batches are parts of others
        if not self.parameters:
            raise ValueError(
                "the pair has no parameters to train: use modules, pyro.param or tensors that require grad"
            )

    def __call__(self, objective: pyro.infer.ELBO, batch: Batch) -> Outcome:
        for parameter in self.parameters:
            parameter.grad = None
        if hasattr(objective, "differentiable_loss"):
            made = torch.autograd._get_sequence_nr()
            loss, left_out = self.loss(objective, batch)
            if self.watches(torch.autograd._get_sequence_nr() - made) and self.meet(batch, loss):
                loss, left_out = self.loss(objective, batch)  # with what a checkpoint held of what is reached only now
            loss.backward()
            return Outcome(loss.detach(), left_out)
        size, loss_and_grads = self.size(batch), objective.loss_and_grads  # type: ignore[attr-defined]
        with (
            networks_in(self.precision), beside(batch), before_backward(partial(self.meet, batch)), Brief(),
            self.sharing(),
        ):  # fmt: skip
            found = first_loss(loss_and_grads(self.announced, self.guide, *batch))
        if gradients := [p.grad for p in self.parameters if p.grad is not None]:
            torch._foreach_div_(gradients, size)
        loss = torch.tensor(float(found) / size, device=self.parameters[0].device)
        return Outcome(loss, torch.zeros_like(loss))

    def meet(self, batch: Batch, loss: Tensor) -> bool:
        """Take in what a step reaches for the first time; whether any of it got a saved value just now."""
        waiting = len(self.reach.new)
        restored = self.reach.meet(batch, new_leaves(loss, self.reach.known))
        for parameter in self.reach.new[waiting:]:
            parameter.grad = None
        return restored

    def watches(self, size: int) -> bool:
        """Whether to go through a graph of so many operations: the first ones, new kinds, and now and then one more."""
        self.steps += 1
        if self.steps > WATCHED and self.steps % WATCH_EVERY and size in self.sizes:
            return False
        self.sizes.add(size)
        return True

    def static(self, objective: pyro.infer.ELBO) -> None:
        """Nothing: Python runs at every step."""

    def look_again(self) -> None:
        """Nothing: Python sees what changes."""

    def loss(self, objective: pyro.infer.ELBO, batch: Batch) -> Outcome:
        """The loss per datum, to be differentiated."""
        with networks_in(self.precision), beside(batch), leaving_out() as counts, Brief(), self.sharing():
            loss = objective.differentiable_loss(self.model, self.guide, *batch)  # type: ignore[attr-defined]
            left_out = counts[0] if counts else torch.zeros((), dtype=torch.long, device=loss.device)
            return Outcome(loss / self.size(batch), left_out)

    def announced(self, *args: object, **kwargs: object) -> object:
        """The model with one param site in front; without any, Pyro's ``loss_and_grads`` omits the backward pass."""
        effectful(lambda: self.parameters[0], type="param")(name="pyrovae.parameters")
        return self.model(*args, **kwargs)

    def size(self, batch: Batch) -> int:
        """What a loss summed over data is divided by."""
        return self.full_size or rows(batch)


class Step:
    """One step of one pair or several: gradients, clipping and an optimizer for each pair."""

    takes_index = False  # batches, not the indices of data that live on the device

    def __init__(
        self,
        gradients: Gradients,
        optimizers: Sequence[Optimizer],
        clip_norm: float | None = None,
        makers: Sequence[MakeOptimizer] = (),
        *,
        lasting: bool = False,
    ) -> None:
        self.gradients, self.optimizers, self.clip_norm, self.makers = gradients, list(optimizers), clip_norm, makers
        self.factor, self.base_lr = 1.0, [[float(group["lr"]) for group in o.param_groups] for o in optimizers]
        self.parameters, self.joined = [in_order(optimizer) for optimizer in optimizers], 0
        self.norms: list[Tensor] = []
        modules = [state.modules for state in gradients.states]
        self.updates = [Update(optimizer) for optimizer in optimizers]
        self.guard = Guard(modules, self.parameters[0][0].device, lasting=lasting)

    def __call__(self, objective: pyro.infer.ELBO, batch: Batch) -> Outcome:
        """One step; nothing is read back from a CUDA device."""
        self.begin()
        outcome = self.gradients(objective, batch)
        self.join()
        self.judge(outcome.losses)
        self.update()
        return outcome

    def join(self) -> None:
        """Give the optimizers what was reached for the first time, under the options that its group has now."""
        for r, reach in enumerate(self.gradients.reached):
            if not reach.new:
                continue
            optimizer, rates = self.optimizers[r], self.base_lr[r]
            if any(p is q for p in reach.new for own in self.parameters for q in own):
                raise ValueError("replicas share a parameter or buffer: give each pair networks of its own")
            if not self.makers:
                names = quoted(n for n, p in reach.state.parameters.items() if any(p is q for q in reach.new))
                warn(f"a step reached {names} first: add what is not yet in the optimizer")
                reach.new.clear()
                continue
            self.joined += 1
            reach.join(optimizer, self.makers[r])
            rates += [float(group["lr"]) for group in optimizer.param_groups[len(rates) :]]
            self.parameters[r] = in_order(optimizer)
            self.set_lr(self.factor)

    def begin(self) -> None:
        """Drop the last gradients, those too of parameters that the pair does not reach."""
        self.guard.begin()
        for own in self.parameters:
            for parameter in own:
                parameter.grad = None

    def judge(self, losses: Tensor) -> None:
        """Withhold the step, before it is clipped, where its loss or a gradient (or their norm) is not finite."""
        gradients = [[p.grad for p in own if p.grad is not None] for own in self.parameters]
        if self.clip_norm is not None:
            self.norms = [get_total_norm(own) for own in gradients]
            gradients = [[norm] for norm in self.norms]
        self.guard.judge(losses, gradients)

    def update(self) -> None:
        """Clip the gradients and move the parameters."""
        for r, (update, own) in enumerate(zip(self.updates, self.parameters, strict=True)):
            if self.clip_norm is not None and not self.guard.idle(r):
                clip_grads_with_norm_(own, self.clip_norm, self.norms[r])
            self.guard.move(r, update)

    def gathered(self, batch: Batch) -> Batch:
        """The data of a batch."""
        return batch

    def groups(self) -> Iterator[dict[str, Any]]:
        """The groups of parameters of all optimizers, as they are now: a checkpoint puts others in their place."""
        return (group for optimizer in self.optimizers for group in optimizer.param_groups)

    def set_lr(self, factor: float) -> None:
        """Scale every learning rate from where it started."""
        self.factor = factor
        for group, base in zip(self.groups(), chain.from_iterable(self.base_lr), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(base * factor)
            else:
                group["lr"] = base * factor

    @property
    def kind(self) -> str:
        """How it runs: "eager", "compiled" or "replicas"."""
        return self.gradients.kind

    def metrics(self, number: int = 0) -> dict[str, float]:
        """``grad_norm``, the 2-norm of a pair's last gradient (after clipping), and its ``learning_rate``."""
        norm = get_total_norm([p.grad for p in self.parameters[number] if p.grad is not None])
        return {"grad_norm": float(norm), "learning_rate": float(self.optimizers[number].param_groups[0]["lr"])}


class Recorded:
    """A step recorded whole as one CUDA graph: gather, binarisation, loss, gradients, clipping, optimizer.

    Batches of another size, and what has no static gradients, take the step itself.

    :param images: the data, if they live on the device; a step then takes the index of its batch and gathers (and
        binarises) it within the graph.
    """

    def __init__(self, step: Step, images: Images | None = None) -> None:
        self.step, self.gradients, self.images = step, step.gradients, images
        self.takes_index, example = images is not None, step.gradients.example
        self.whole = all(map(capturable, step.optimizers))
        self.recorded: dict[int, Recording | None] = {}
        self.replays: dict[int, Replays | None] = {}
        self.joined = step.joined
        if images is None:
            self.slots: Batch = tree_map_only(Tensor, Tensor.clone, example)
        else:
            self.slots = (torch.arange(len(example[0]), device=images.x.device),)
        self.set_lr, self.metrics, self.guard = step.set_lr, step.metrics, step.guard

    @property
    def kind(self) -> str:
        """How it runs: as the step does, but "cuda graph" where that is compiled."""
        whole = self.step.kind == "compiled" and None not in self.recorded.values()
        return "cuda graph" if whole else self.step.kind

    def __call__(self, objective: pyro.infer.ELBO, batch: Batch) -> Outcome:
        """One step on a batch, or on the index of one where the data live on the device."""
        same = signature(batch) == signature(self.slots)
        gradients = self.gradients.static(objective) if same else None
        if gradients is None:
            return self.step(objective, self.gathered(batch))
        for slot, given in zip(tensors(self.slots), tensors(batch), strict=True):
            slot.copy_(given, non_blocking=True)
        self.join()
        number = objective.num_particles
        self.follow()
        if number not in self.recorded:
            self.recorded[number] = self.record(lambda: self.body(gradients, self.slots))
        recording = self.recorded[number]
        if recording is None:
            return self.step(objective, self.gathered(batch))
        losses, left_out = recording.replay()
        if not self.whole:
            self.step.update()
        return Outcome(losses, left_out)

    def in_a_row(self, objective: pyro.infer.ELBO, kl_weight: Sequence[Tensor]) -> Replays | None:
        """What takes many steps like one that was recorded, on data of the device; None where nothing can.

        :param kl_weight: the tensor that it is, if it changes from step to step.
        """
        self.follow()
        number, groups = objective.num_particles, list(self.step.groups())
        recording, gradients = self.recorded.get(number), self.gradients.static(objective)
        if not (self.whole and recording and gradients and self.images and len(groups) == 1):
            return None
        if number not in self.replays:
            try:
                self.replays[number] = Replays(
                    lambda index: self.body(gradients, (index,)),
                    lambda body: self.recording(body, recording), len(self.slots[0]), [groups[0]["lr"], *kl_weight],
                )  # fmt: skip
            except CannotRecord:
                self.replays[number] = None
        return self.replays[number]

    def follow(self) -> None:
        """Leave what was recorded under other options than the optimizers have now."""
        known = [*self.recorded.values(), *(many.recording for many in self.replays.values() if many)]
        if self.whole and not all(recording.follows() for recording in known if recording):
            self.whole = False  # who changes options once may do so again
            self.recorded.clear()
            self.replays.clear()

    def join(self) -> None:
        """As the step does; what was recorded moves the former parameters only."""
        self.step.join()
        if self.joined < self.step.joined:
            self.joined = self.step.joined
            self.recorded.clear()
            self.replays.clear()

    def body(self, gradients: Callable[[Batch], Outcome], given: Batch) -> Tensor:
        """The step to be recorded, without its optimizers where they read on the host or change options."""
        self.step.begin()
        outcome = gradients(self.gathered(given))
        self.step.judge(outcome.losses)
        if self.whole:
            self.step.update()
        return torch.stack([outcome.losses, outcome.left_out.to(outcome.losses.dtype)])

    def record(self, body: Callable[[], Tensor]) -> Recording | None:
        """What a step does, or None, after a warning, where it cannot be recorded."""
        try:
            return self.recording(body)
        except CannotRecord as error:
            warn(f"cannot record the step: {error}; running it compiled, but not as a CUDA graph")
            return None

    def recording(self, body: Callable[[], Tensor], beside: Recording | None = None) -> Recording:
        """What a step does; a :class:`CannotRecord` says why it cannot be recorded."""
        began, withheld = time.perf_counter(), self.step.guard.withheld.clone()
        try:
            return Recording(body, self.gradients.states, self.step.optimizers, beside)
        finally:
            self.step.guard.withheld.copy_(withheld)
            self.gradients.compile_seconds += time.perf_counter() - began

    def gathered(self, batch: Batch) -> Batch:
        """A batch of data from its index, where the data live on the device; else the batch as it is."""
        return batch if self.images is None else as_batch(self.images.batch(batch[0]))


def in_order(optimizer: Optimizer) -> list[Tensor]:
    """The parameters of an optimizer."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def on_device(step: Step, feed: Feed) -> Step | Recorded:
    """The step as a job takes it: recorded where there is a CUDA device, and gradients that are compiled."""
    return Recorded(step, feed.images) if feed.device.type == "cuda" and step.kind != "eager" else step


def first_loss(loss: T | tuple[T, ...]) -> T:
    """A loss; the model's, where an objective gives one each for model and guide (Pyro's ReweightedWakeSleep)."""
    return loss[0] if isinstance(loss, tuple) else loss
