r"""Pyro program -> one static training step.

Pyro's handlers are Python over tensor operations. :func:`pyrovae.compile.graph.capture` runs objective and gradient
once and keeps the operations alone; Inductor compiles them. On CUDA the whole step (gather, binarisation, loss,
gradients, clipping, optimizer) is recorded as one CUDA graph and replayed without work on the host.

A compiled step is never silently wrong. Before its first use, and after 1, 2, 4, 8, ... epochs (of 256 steps in a loop
of one's own), its loss and gradients are compared with the eager program's on the same noise, leaving generators,
parameters and buffers untouched. What cannot be compiled runs eagerly, after one warning that says why. Batches of
another size than the first run eagerly until there were so many that a graph of their own pays: operation by operation
first, compiled where they go on.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pyro.infer
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyrovae import runs
from pyrovae.arguments import in_range
from pyrovae.compile.checked import Checked, distinct, signature, tensors, untouched
from pyrovae.compile.inductor import COMPILATION, FROM_CACHE, has_compiler, laid_out_as
from pyrovae.compile.known import is_known, remember
from pyrovae.compile.noise import CannotCompile
from pyrovae.compile.precision import choose_precision
from pyrovae.data.feed import Feed
from pyrovae.engine.convert import Taken, first_way
from pyrovae.engine.probe import look
from pyrovae.engine.programs import (
    Batch,
    Modes,
    Program,
    in_modes,
    modes_of,
    protected_buffers,
    rows,
    training_modes,
    warn,
    warn_of_eval,
)
from pyrovae.engine.randomness import isolated_rng
from pyrovae.objectives.base import Objective
from pyrovae.ranks import require_alone
from pyrovae.train.checks import lone_datum_advice
from pyrovae.train.optimizers import check_optimizer, check_sparse
from pyrovae.train.plan import Plan, check_objective
from pyrovae.train.step import Eager, Outcome, Recorded, Step

CHECK_SEED = 20
#: Eager steps of one size that take the time that a graph of it saves, after it took that to capture, and to compile
#: (measured on a CPU: .3 to .8 s and 6 to 17 s, for 1 to 2 ms and 2 to 4 ms a step); and how many sizes are looked at.
CAPTURED_AFTER, COMPILED_AFTER, SIZES = 300, 4000, 16
LOOKED_AT = 256  # steps of a loop of one's own that count as an epoch

#: Pyro's objectives that have equals here.
OURS = {"Trace_ELBO": "ELBO", "TraceMeanField_ELBO": "ELBO", "TraceGraph_ELBO": "ELBO", "RenyiELBO": "Renyi"}


class CompiledGraph(NamedTuple):
    """What computes loss and gradients from the tensors of a batch, the parameters that have these, and the others."""

    run: partial[list[Tensor]]  # a Runnable with its state
    reached: list[Tensor]
    others: list[Tensor]


class Compiled:
    """The gradients of one pair by compiled graphs, one a number of particles; graphs for batches of another size.

    :param anneals: whether kl_weight changes while training; it then is an input of the graph.
    """

    def __init__(self, eager: Eager, *, anneals: bool = False) -> None:
        self.eager, self.anneals, self.example, self.states = eager, anneals, eager.example, eager.states
        self.reached = eager.reached
        self.kind, self.compile_seconds = "compiled", 0.0
        self.signature = signature(self.example)
        first = eager.parameters[0]
        self.kl_weight = torch.ones((), dtype=first.dtype, device=first.device)
        self.functions: dict[object, Callable[[Batch], Outcome] | None] = {}
        self.checked: dict[object, Checked] = {}
        self.due: set[object] = set()  # those of them that are to be compared again
        self.epochs = 0
        self.graphs: dict[int, CompiledGraph] = {}
        self.numbers: Numbers = {}

    def __call__(self, objective: pyro.infer.ELBO, batch: Batch) -> Outcome:
        same = signature(batch) == self.signature
        function = self.static(objective) if same else self.further(objective, batch)
        return self.eager(objective, batch) if function is None else function(batch)

    def static(self, objective: pyro.infer.ELBO) -> Callable[[Batch], Outcome] | None:
        """What computes the gradients of an objective; None if that cannot be compiled."""
        return self.function(objective.num_particles, objective, self.example)

    def further(self, objective: pyro.infer.ELBO, batch: Batch) -> Callable[[Batch], Outcome] | None:
        """The same for batches of another size; None while there were too few, or too many sizes."""
        met, size = self.eager.met, f"{objective.num_particles} {signature(batch)}"
        if self.kind == "eager" or (size not in met and len(met) == SIZES):
            return None
        met[size] = met.get(size, 0) + 1
        if met[size] <= CAPTURED_AFTER:
            return None
        lowered = met[size] > COMPILED_AFTER
        return self.function((size, lowered), objective, batch, lowered=lowered)

    def function(
        self, key: object, objective: pyro.infer.ELBO, example: Batch, *, lowered: bool = True
    ) -> Callable[[Batch], Outcome] | None:
        """What :meth:`compile` gives, made once; None, after a warning, where it cannot be made."""
        if key not in self.functions:
            began = time.perf_counter()
            self.look_at_numbers()
            try:
                self.functions[key] = self.compile(objective, example, lowered=lowered, key=key)
            except CannotCompile as error:
                if self.kind == "compiled":
                    warn(f"cannot compile: {error}; running eagerly")
                self.functions[key], self.kind = None, "eager" if example is self.example else self.kind
            self.compile_seconds += time.perf_counter() - began
        self.anneal(objective)
        if key in self.due:
            self.due.remove(key)
            if not self.checked[key].holds(example):
                self.leave("the program has changed since the step was compiled", "the number that did")
        return self.functions[key]

    def compile(
        self, objective: pyro.infer.ELBO, example: Batch, *, lowered: bool = True, key: object = None
    ) -> Callable[[Batch], Outcome]:
        """The graph of an objective, compiled or not; a :class:`CannotCompile` says why it cannot be made."""
        modules = self.eager.state.modules
        if name := differing(self.numbers, numbers_in(modules)):
            raise CannotCompile(f'"{name}" has changed since the step was compiled: keep it in a buffer')
        with steady(modules):
            function, reached = self.differentiated(objective, example)
            run = function.compile(example, lowered=lowered)
        self.checked[key], self.numbers = function, numbers_in(modules)
        others = self.others(reached)

        def gradients(batch: Batch) -> Outcome:
            loss, left_out, *found = run(*tensors(batch))
            put(reached, found, others)
            return Outcome(loss, left_out)

        if example is self.example:
            self.graphs[objective.num_particles] = CompiledGraph(run, reached, others)
            remember(kind_of(objective, objective.num_particles, self.eager, self.anneals))
        return gradients

    def look_again(self) -> None:
        """Leave graphs of modules that have other numbers by now; after 1, 2, 4, 8, ... epochs compare all others."""
        self.look_at_numbers()
        if self.epochs.bit_count() == 1:
            self.due = {key for key, function in self.functions.items() if function is not None}
        self.epochs += 1

    def look_at_numbers(self) -> None:
        """Leave graphs that were made while modules had other numbers than they have now."""
        if any(self.functions.values()) and (name := differing(self.numbers, numbers_in(self.eager.state.modules))):
            self.leave(f'"{name}" has changed since the step was compiled', "it")

    def leave(self, why: str, what: str) -> None:
        """Run eagerly from now on."""
        warn(f"{why}, running eagerly: keep {what} in a buffer")
        self.functions, self.kind = dict.fromkeys(self.functions), "eager"
        self.due.clear()

    def differentiated(self, objective: pyro.infer.ELBO, example: Batch | None = None) -> tuple[Checked, list[Tensor]]:
        """Loss and gradients as a function of a batch; once it ran, the parameters whose gradients follow the loss."""
        objective, example = copy.copy(traceable(objective)), self.example if example is None else example
        for _ in range(2):  # with these particles it may reach more than the look did; what it reaches twice lasts
            with isolated_rng(), protected_buffers(self.eager.model, self.eager.guide):
                self.eager.meet(example, self.eager.loss(objective, example).losses)
        self.anneal(objective)
        if self.anneals:
            objective.kl_weight = self.kl_weight
        parameters: list[Tensor] = []

        def loss_and_gradients(*batch: object) -> list[Tensor]:
            loss, left_out = self.eager.loss(objective, batch)
            gradients = torch.autograd.grad(loss, self.eager.parameters, allow_unused=True)
            if any(g is not None and g.is_sparse for g in gradients):
                raise CannotCompile("an embedding has sparse gradients: build it with sparse=False")
            found = [(p, g) for p, g in zip(self.eager.parameters, gradients, strict=True) if g is not None]
            parameters[:] = [parameter for parameter, _ in found]
            return [loss.detach(), left_out, *(gradient for _, gradient in found)]

        checked = Checked(
            loss_and_gradients, self.inputs, changes=self.buffers, untouched=partial(untouched, self.eager.state),
            precision=self.eager.precision, seed=CHECK_SEED,
        )  # fmt: skip
        return checked, parameters

    def others(self, reached: Iterable[Tensor]) -> list[Tensor]:
        """The pair's parameters that have no gradient."""
        found = set(map(id, reached))
        return [p for p in self.eager.parameters if id(p) not in found]

    def anneal(self, objective: pyro.infer.ELBO, factor: float = 1.0) -> None:
        """Let the graphs find the objective's kl_weight where it changes."""
        if self.anneals:
            self.kl_weight.fill_(objective.kl_weight * factor)  # type: ignore[attr-defined]

    @property
    def buffers(self) -> list[Tensor]:
        """The tensors of the pair that a step may change in place."""
        return [t for t in distinct(self.eager.state.tensors.values()) if not t.requires_grad]

    @property
    def inputs(self) -> list[Tensor]:
        """All that the graph takes besides the batch."""
        return distinct([*self.eager.parameters, *self.buffers, *([self.kl_weight] if self.anneals else [])])


Numbers = dict[tuple[int, str], float]


def numbers_in(modules: Iterable[nn.Module], *, deep: bool = False) -> Numbers:
    """The Python numbers that modules hold, by module and name; where ``deep``, those in their lists too, and such."""
    each = {id(m): m for root in modules for m in root.modules()}.values()
    held = [(m, f".{name}", value) for m in each for name, value in vars(m).items() if name != "training"]
    if deep:
        held += [(m, f"{name}[{part!r}]", inner) for m, name, value in held for part, inner in parts(value)]
    return {(id(m), f"{type(m).__name__}{name}"): value for m, name, value in held if isinstance(value, int | float)}


def parts(value: object) -> Iterable[tuple[object, object]]:
    """What a list, a dict or a plain object holds, by place or name."""
    if isinstance(value, list | dict):
        return value.items() if isinstance(value, dict) else enumerate(value)
    plain = isinstance(value, SimpleNamespace) or is_dataclass(value)
    return getattr(value, "__dict__", {}).items() if plain else ()


@contextmanager
def steady(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Refuse programs that change Python numbers of their modules inside."""
    before = numbers_in(modules, deep=True)
    yield
    if name := differing(before, numbers_in(modules, deep=True)):
        raise CannotCompile(f'"{name}" changes as the program runs, which a graph would not see: keep it in a buffer')


def differing(before: Numbers, now: Numbers) -> str | None:
    """The name of a number that is another one, or new in a module that was there before."""
    known = {module for module, _ in before}
    changed = (key for key, value in now.items() if before.get(key) != value and value == value)
    return next((name for module, name in changed if module in known), None)


def put(reached: Iterable[Tensor], gradients: Iterable[Tensor], others: Iterable[Tensor]) -> None:
    """Put gradients where optimizers find them; none where there are others."""
    for parameter, gradient in zip(reached, gradients, strict=True):
        parameter.grad = laid_out_as(parameter, gradient)
    for parameter in others:
        parameter.grad = None


def training_step(
    model: Program,
    guide: Program,
    objective: Objective,
    optimizer: Optimizer,
    *batch: object,
    clip_norm: float | None = None,
    precision: str = "float32",
) -> TrainingStep:
    r"""One whole training step of a pair as a function of its batch, compiled, for loops of one's own.

    A call computes :math:`-\frac{1}{B} \sum_b L(x_b)`, the objective's loss in nats per datum, and its gradients in one
    static graph, and lets ``optimizer`` move the parameters. :func:`pyrovae.fit` uses the same step.

    :param objective: one of ours; its kl_weight may be a 0-d tensor that is annealed in place.
    :param optimizer: a ``torch.optim`` optimizer over the pair's parameters.
    :param batch: the arguments of model and guide, as an example; batches of another shape run eagerly, until there
        were hundreds. Modules run in the modes in which :func:`pyrovae.fit` would train them, and keep their own.
    :param clip_norm: largest 2-norm of the gradient.
    :param precision: "float32", "bfloat16" for networks that multiply in bfloat16, or "auto".
    :returns: a function ``step(*batch)`` that gives the loss, 0-d, not read back from the device. A step whose loss or
        gradient is not finite moves nothing, and gives NaN; data whose bound is -inf are left out of loss and gradient,
        and ``step.left_out`` says of how many data the last call did so, 0-d as well.
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
    require_alone("training_step is one process's own")
    traceable(check_objective(objective))
    clip_norm = None if clip_norm is None else in_range("clip_norm", clip_norm, 1e-12)
    if not (batch and rows(batch, {})):
        raise ValueError("training_step needs an example of a batch: pass the arguments of model and guide, not empty")
    with in_modes(training_modes(model, guide)), lone_datum_advice():
        taken, seen = first_way(batch, lambda given: look(model, guide, given, validate=False), guide, model)
        batch = taken(batch)
        modes = modes_of(seen.modules)  # a graph keeps those that it was made in, and so does what runs eagerly
        warn_of_eval(seen.modules, model, guide)
        eager = Eager(model, guide, seen, batch)
        check_sparse(check_optimizer(optimizer, eager.parameters), seen.modules)
        device = eager.parameters[0].device
        eager.precision = choose_precision(precision, device, rows(batch, {}) * objective.total_particles)
        gradients, number = Compiled(eager), objective.num_particles
        gradients.functions[number] = gradients.compile(objective, batch, key=number)
    step = Step(gradients, [optimizer], clip_norm)
    return TrainingStep(Recorded(step) if device.type == "cuda" else step, objective, taken, modes)


class TrainingStep:
    """A step of a pair as a function of its batch.

    :ivar left_out: how many data of the last batch had a bound of -inf, 0-d.
    """

    def __init__(self, step: Step | Recorded, objective: Objective, taken: Taken, modes: Modes) -> None:
        self.step, self.objective, self.taken, self.modes, self.steps = step, objective, taken, modes, 0
        self.left_out = torch.zeros((), dtype=torch.long)

    def __call__(self, *batch: object) -> Tensor:
        """The loss, 0-d."""
        if self.steps % LOOKED_AT == 0:
            self.step.gradients.look_again()
        self.steps += 1
        with in_modes(self.modes), lone_datum_advice():
            loss, self.left_out = self.step(self.objective, self.taken(batch))
            return loss


def kind_of(objective: pyro.infer.ELBO, number: int, eager: Eager, anneals: bool) -> object:
    """What is known of a graph before it is traced: the objective with that many particles, shapes and precision."""
    given = {**getattr(objective, "config", {}), "num_particles": number} | ({"kl_weight": None} if anneals else {})
    shapes = [(p.shape, p.dtype, p.device) for p in eager.parameters]
    return (
        type(objective).__qualname__,
        sorted(runs.as_json(given).items()),
        shapes,
        signature(eager.example),
        eager.precision,
    )


def worthwhile(plan: Plan, parameters: Iterable[Tensor], feed: Feed, eager: Eager | None = None) -> bool:
    """Whether compiling promises to shorten the job: steps times what each saves, against the compilations.

    What a step saves grows with the multiplications in it, about one per parameter and particle, from what the Python
    of an eager step costs (measured: 1.4 ms on a CPU, more where a device waits for its launches). A graph of a kind
    that was compiled here before comes from Inductor's cache.
    """
    stages = set(plan.particles or (getattr(plan.objective, "num_particles", 1),))
    kinds = [kind_of(plan.objective, number, eager, bool(plan.kl_warmup)) for number in stages if eager is not None]
    cost = len(stages) * COMPILATION - sum(map(is_known, kinds)) * (COMPILATION - FROM_CACHE)
    largest = max(plan.particles or (getattr(plan.objective, "total_particles", 1),))
    weights = sum(p.numel() for p in parameters)
    saved = 4e-3 if feed.device.type == "cuda" else 1.4e-3 + 1e-11 * weights * feed.batch_size * largest
    return (feed.steps or 0) * plan.epochs * saved > cost and has_compiler(feed.device)


def traceable(objective: pyro.infer.ELBO) -> Objective:
    """Refuse objectives that cannot be traced, and name their equals here."""
    if not isinstance(objective, Objective):
        name = type(objective).__name__
        ours = f": pyrovae.{OURS[name]} can be" if name in OURS else ""
        raise CannotCompile(f"Pyro's {name} reads values on the host and cannot be traced{ours}")
    return objective
