r"""Pyro program -> one static training step.

Pyro's handlers are Python over tensor operations. :func:`pyrovae.compile.graph.capture` runs objective and gradient
once and keeps the operations alone; Inductor compiles them. On CUDA the whole step (gather, binarisation, loss,
gradients, clipping, optimizer) is recorded as one CUDA graph and replayed without work on the host.

A compiled step is never silently wrong. Before its first use its loss and gradients are compared with the eager
program's on the same noise, leaving generators, parameters and buffers untouched. What cannot be compiled runs eagerly,
after one warning that says why; so does a batch of another size than the first.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor
from torch.optim import Optimizer

from pyrovae.compile.checked import compare, distinct, signature, tensors, untouched
from pyrovae.compile.graph import Graph, capture
from pyrovae.compile.inductor import COMPILATION, has_compiler, laid_out_as
from pyrovae.compile.noise import CannotCompile, rewritten
from pyrovae.compile.recording import Recording, capturable
from pyrovae.data.feed import Feed
from pyrovae.data.images import Images
from pyrovae.engine.probe import Reach, find_parameters
from pyrovae.engine.programs import Batch, Program
from pyrovae.engine.randomness import isolated_rng
from pyrovae.objectives.base import Objective
from pyrovae.train.plan import Plan
from pyrovae.train.step import Stepper

CHECK_SEED = 20


_OURS = {
    "Trace_ELBO": "ELBO",
    "TraceMeanField_ELBO": "ELBO",
    "TraceGraph_ELBO": "ELBO",
    "RenyiELBO": "Renyi",
}


class Captured(NamedTuple):
    """The graph of a pair's loss and gradients, and what it is to be checked with."""

    graph: Graph
    inputs: list[Tensor]  # of the pair, in the graph's order; the batch follows
    parameters: list[Tensor]  # whose gradients follow the loss
    expected: list[Tensor]  # loss and gradients of the eager program at CHECK_SEED
    buffers: list[Tensor]  # and the buffers as it leaves them


class CompiledStepper(Stepper):
    """A :class:`pyrovae.train.step.Stepper` whose gradients come from compiled graphs, one a number of particles.

    :param anneals: whether kl_weight changes while training; it then is an input of the graph.
    """

    path = "compiled"

    def __init__(self, *args: Any, anneals: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.anneals = anneals
        self.kl_weight = torch.ones((), dtype=self.reached[0].dtype, device=self.reached[0].device)
        self.signature = signature(self.example)
        self.compiled: dict[int, Callable[[Batch], Tensor] | None] = {}
        self.reason: str | None = None

    def gradients(self, objective: Any, batch: Batch) -> Tensor | float:
        """The loss per datum, its gradients in the parameters' ``.grad``."""
        function = self.function(objective) if signature(batch) == self.signature else None
        if function is None:
            return super().gradients(objective, batch)
        if self.anneals:
            self.kl_weight.fill_(objective.kl_weight)
        return function(batch)

    def function(self, objective: Any) -> Callable[[Batch], Tensor] | None:
        """What computes the gradients of an objective; None if that cannot be compiled."""
        number = objective.num_particles
        if number not in self.compiled:
            began = time.perf_counter()
            try:
                self.compiled[number] = self._compile(objective)
            except CannotCompile as error:
                if self.reason is None:
                    warnings.warn(f"cannot compile: {error}; running eagerly", stacklevel=2)
                self.compiled[number], self.path, self.reason = None, "eager", str(error)
            self.compile_seconds += time.perf_counter() - began
        return self.compiled[number]

    def capture(self, objective: Any) -> Captured:
        """The graph of loss and gradients.

        The step is first run eagerly, so that whatever is wrong with pair and data is said in plain words.
        """
        check_objective(objective)
        objective = copy.copy(objective)
        if self.anneals:
            self.kl_weight.fill_(objective.kl_weight)
            objective.kl_weight = self.kl_weight
        reached: list[bool] = []

        def loss_and_gradients() -> list[Tensor]:
            loss = self.loss(objective, self.example)
            gradients = torch.autograd.grad(loss, self.reached, allow_unused=True)
            reached[:] = [g is not None for g in gradients]
            return [loss.detach(), *(g for g in gradients if g is not None)]

        with isolated_rng(CHECK_SEED), untouched(self.pair), rewritten():
            expected, buffers = loss_and_gradients(), [t.clone() for t in self.buffers]
        with untouched(self.pair), pyro.validation_enabled(False):
            graph = capture(loss_and_gradients, [*self.inputs, *tensors(self.example)])
        parameters = [p for p, used in zip(self.reached, reached, strict=True) if used]
        return Captured(graph, self.inputs, parameters, expected, buffers)

    @property
    def buffers(self) -> list[Tensor]:
        """The tensors of the pair that a step may change in place."""
        return [t for t in distinct(self.pair.tensors.values()) if not t.requires_grad]

    @property
    def inputs(self) -> list[Tensor]:
        """All that the graph takes besides the batch."""
        return distinct([*self.reached, *self.buffers, *([self.kl_weight] if self.anneals else [])])

    def _compile(self, objective: Any) -> Callable[[Batch], Tensor]:
        graph, inputs, parameters, expected, buffers = self.capture(objective)
        compiled = graph.compiled()
        with isolated_rng(CHECK_SEED), untouched(self.pair):
            compare(expected, compiled(*inputs, *tensors(self.example)), self.precision)
            compare(buffers, self.buffers, self.precision)
        others = distinct([*self.reached, *self.parameters])

        def gradients(batch: Batch) -> Tensor:
            loss, *found = compiled(*inputs, *tensors(batch))
            for parameter in others:
                parameter.grad = None
            for parameter, gradient in zip(parameters, found, strict=True):
                parameter.grad = laid_out_as(parameter, gradient)
            return loss

        return gradients


class RecordedStepper(CompiledStepper):
    """A compiled step on CUDA, recorded whole as a CUDA graph: one launch a step, and nothing read back.

    :param images: the data, if they live on the device; a step then takes the index of its batch and gathers (and
        binarises) it within the graph.
    """

    path = "cuda graph"

    def __init__(self, *args: Any, images: Images | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.images, self.takes_index = images, images is not None
        self.recorded: dict[int, Recording] = {}
        if images is None:
            self.slots: Batch = tuple(a.clone() if isinstance(a, Tensor) else a for a in self.example)
        else:
            self.slots = (torch.arange(len(self.example[0]), device=images.x.device),)

    def __call__(self, objective: Any, batch: Batch) -> Tensor | float:
        """One step on a batch, or on the index of one where the data live on the device."""
        if signature(batch) != signature(self.slots) or self.function(objective) is None:
            return super().__call__(objective, gathered(self.images, batch))
        for slot, given in zip(tensors(self.slots), tensors(batch), strict=True):
            slot.copy_(given, non_blocking=True)
        if self.anneals:
            self.kl_weight.fill_(objective.kl_weight)
        number = objective.num_particles
        if number not in self.recorded:
            self.recorded[number] = self._record(objective)
        loss = self.recorded[number].replay()
        if not capturable(self.optimizer):
            self.update()
        return loss

    def _record(self, objective: Any) -> Recording:
        gradients = self.function(objective)  # not self.gradients: what that fills, a recording would fill for ever
        assert gradients is not None

        def step() -> Tensor:
            loss = gradients(gathered(self.images, self.slots))
            if capturable(self.optimizer):
                self.update()
            return loss

        began = time.perf_counter()
        recording = Recording(step, [self.pair], [self.optimizer])
        self.compile_seconds += time.perf_counter() - began
        return recording


def gathered(images: Images | None, batch: Batch) -> Batch:
    """A batch of data from its index, where the data live on the device; else the batch as it is."""
    if images is None:
        return batch
    found = images.batch(batch[0])
    return found if isinstance(found, tuple) else (found,)


def training_step(
    model: Program,
    guide: Program,
    objective: Objective,
    optimizer: Optimizer,
    *batch: Any,
    clip_norm: float | None = None,
    precision: str = "float32",
) -> Callable[..., Tensor]:
    r"""One whole training step of a pair as a function of its batch, compiled, for loops of one's own.

    A call computes :math:`-\frac{1}{B} \sum_b L(x_b)`, the objective's loss in nats per datum, and its gradients in one
    static graph, and lets ``optimizer`` move the parameters. :func:`pyrovae.fit` uses the same step.

    :param objective: one of ours; its kl_weight may be a 0-d tensor that is annealed in place.
    :param optimizer: a ``torch.optim`` optimizer over the pair's parameters.
    :param batch: the arguments of model and guide, as an example; batches of another shape run eagerly.
    :param clip_norm: largest 2-norm of the gradient.
    :param precision: "float32", or "bfloat16" for networks that multiply in bfloat16.
    :returns: a function ``step(*batch)`` that gives the loss, 0-d, not read back from the device.
    :raises CannotCompile: with the reason, for a pair that cannot become a static graph.

    >>> import pyrovae as pv
    >>> vae = pv.models.VAE((4,), latent_dim=1, hidden=())
    >>> x = torch.ones(8, 4)
    >>> optimizer = torch.optim.Adam(vae.parameters(), lr=0.05)
    >>> step = training_step(vae.model, vae.guide, pv.IWAE(5), optimizer, x)
    >>> losses = [step(x).item() for _ in range(100)]
    >>> losses[-1] < losses[0]
    True
    """
    check_objective(objective)
    pair = find_parameters(model, guide, batch)
    kind = RecordedStepper if next(iter(pair.parameters.values())).is_cuda else CompiledStepper
    stepper = kind(model, guide, pair, optimizer, batch, clip_norm=clip_norm, precision=precision)
    stepper.compiled[objective.num_particles] = stepper._compile(objective)
    return lambda *batch: stepper(objective, batch)  # type: ignore[return-value]


def choose_stepper(compile: bool | str, plan: Plan, pair: Reach, feed: Feed) -> Callable[..., Stepper]:
    """The kind of step for a job; for "auto" from counts alone, so that the same call always takes the same path."""
    if not compile or (compile == "auto" and not worthwhile(plan, pair, feed)):
        return Stepper
    anneals = bool(plan.kl_warmup)
    if feed.device.type == "cuda":
        return partial(RecordedStepper, images=feed.images, anneals=anneals)
    return partial(CompiledStepper, anneals=anneals)


def worthwhile(plan: Plan, pair: Reach, feed: Feed) -> bool:
    """Whether compiling promises to shorten the job: steps times what each saves, against the compilations.

    What a step saves grows with the multiplications in it, about one per parameter and particle, from what the Python
    of an eager step costs (measured: 1.4 ms on a CPU, more where a device waits for its launches).
    """
    stages = len(set(plan.particles or (1,)))
    steps = (feed.steps or 0) * plan.epochs / stages
    largest = max(plan.particles or (getattr(plan.objective, "total_particles", 1),))
    weights = sum(p.numel() for p in pair.parameters.values())
    saved = 4e-3 if feed.device.type == "cuda" else 1.4e-3 + 1e-11 * weights * feed.batch_size * largest
    return steps * saved > COMPILATION and has_compiler(feed.device)


def check_objective(objective: Any) -> None:
    """Refuse objectives that cannot be traced, and name their equals here."""
    if not isinstance(objective, Objective):
        name = type(objective).__name__
        ours = f": pyrovae.{_OURS[name]} can be" if name in _OURS else ""
        raise CannotCompile(f"Pyro's {name} reads values on the host and cannot be traced{ours}")
