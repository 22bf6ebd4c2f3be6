r"""Many models at once: R pairs of the same programs, trained side by side in one batched step.

Each replica follows in law exactly what :func:`pyrovae.fit` alone would do, and is saved as a run of its own. A small
network leaves most of a device idle; with the flat graph of one pair's loss and gradients batched over R sets of
parameters, buffers and noise, a step of R models costs little more than a step of one.
"""

from __future__ import annotations

import copy
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import pyro.infer
import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn

from pyrovae import runs
from pyrovae.arguments import in_range, shown
from pyrovae.compile.checked import Checked, compare, signature, still, tensors, untouched
from pyrovae.compile.graph import Graph
from pyrovae.compile.noise import CannotCompile, stacked_noise
from pyrovae.compile.precision import full_float32
from pyrovae.data.feed import Feed
from pyrovae.engine.programs import Batch, Program, in_modes, training_modes, warn
from pyrovae.engine.randomness import isolated_rng
from pyrovae.objectives.base import Objective
from pyrovae.ranks import require_alone
from pyrovae.schedules import Schedule
from pyrovae.train.checks import derivable
from pyrovae.train.compiled import CHECK_SEED, Compiled, put, steady, traceable
from pyrovae.train.log import Fit
from pyrovae.train.loop import fit, train
from pyrovae.train.optimizers import optimizer_maker
from pyrovae.train.plan import MakeOptimizer, Plan, Setup
from pyrovae.train.resuming import with_fingerprints
from pyrovae.train.step import Outcome, Step, on_device
from pyrovae.train.threads import threads, threads_for
from pyrovae.train.trainee import Trainee

WORTHWHILE = 100  # eager steps of one pair, about, for the price of a graph
Differentiated = tuple[Checked, list[Tensor]]


class Together(NamedTuple):
    """What puts the gradients of all pairs in their places, and whether the pairs still are what it was made of."""

    gradients: Callable[[Batch], Outcome]
    holds: Callable[[], bool]


def fit_replicas(
    pairs: Iterable[object],
    data: object,
    *,
    objective: Objective,
    epochs: int,
    batch_size: int = 100,
    optimizer: MakeOptimizer | PyroOptim | None = None,
    lr: float | Iterable[float] | None = None,
    kl_weight: Iterable[float] | None = None,
    schedule: str | Schedule = "constant",
    particles: Sequence[int] | None = None,
    kl_warmup: float = 0,
    clip_norm: float | None = None,
    precision: str = "float32",
    device: str | torch.device = "auto",
    seed: int = 0,
    run_dirs: Iterable[str | os.PathLike[str]] | None = None,
    on_nan: str = "raise",
    progress: bool | None = None,
) -> list[Fit]:
    r"""Train R pairs of the same programs at once: R seeds, R learning rates, or R weights of the KL.

    The replicas see the same batches in the same order, each with parameters, buffers, optimizer state and noise of its
    own; what comes out of each has the law of :func:`pyrovae.fit`. What cannot be batched is trained one pair after the
    other, after a warning that says why.

    :param pairs: R objects with ``.model`` and ``.guide``, or tuples ``(model, guide)``; they may differ in their
        weights and buffers, in nothing else.
    :param lr: one learning rate for all, or one for each.
    :param kl_weight: for each replica a factor of the objective's own kl_weight.
    :param run_dirs: a folder for each replica, as ``run_dir`` of :func:`pyrovae.fit`.
    :returns: one :class:`pyrovae.Fit` for each replica, in order.
    :raises ValueError: where the pairs are not the same program, share parameters, or lists have another length.

    All else is as for :func:`pyrovae.fit`.

    >>> import pyrovae as pv
    >>> digits = pv.data.load("digits", binarization="dynamic").train
    >>> pairs = [pv.models.VAE(digits.event_shape, latent_dim=2, hidden=()) for _ in range(3)]
    >>> results = fit_replicas(pairs, digits, objective=pv.ELBO(), epochs=1, lr=[1e-3, 3e-3, 1e-2])
    >>> [result.history[-1]["learning_rate"] for result in results]
    [0.001, 0.003, 0.01]
    """
    require_alone("fit_replicas trains pairs side by side")
    replicas = replicas_of(pairs, lr, kl_weight, run_dirs)
    if not isinstance(objective, Objective):
        raise TypeError(f"replicas need one of pyrovae's objectives, got {type(objective).__name__}: pass one")
    setup = Setup(
        Plan.make(objective, epochs, schedule, particles, kl_warmup), batch_size=batch_size, clip_norm=clip_norm,
        precision=precision, device=device, seed=seed, progress=progress, on_nan=on_nan,
    )  # fmt: skip
    makers = [optimizer_maker(optimizer, replica.lr) for replica in replicas]

    programs = [program for replica in replicas for program in replica.pair]
    with (
        isolated_rng(setup.seed),
        setup.place(),
        derivable(),
        in_modes(training_modes(*programs)),
        ExitStack() as cleanup,
    ):
        for replica in replicas:
            if replica.run is not None:
                cleanup.enter_context(replica.run.writing())
        if taken := [f'"{own.run.path}"' for own in replicas if own.run is not None and own.run.exists]:
            raise ValueError(f"{', '.join(taken)} hold runs already: pass other run_dirs")
        feed = Feed(data, setup.batch_size, setup.device)
        trainees = [
            Trainee(*replica.pair, replica.weighted(objective), setup, feed, maker, replica.kl_factor)
            for replica, maker in zip(replicas, makers, strict=True)
        ]
        modules = [module for trainee in trainees for module in trainee.eager.state.modules]
        cleanup.enter_context(threads(threads_for(modules, setup.rows)))
        anneals = bool(kl_warmup) or any(replica.kl_factor != 1.0 for replica in replicas)
        each = [Compiled(trainee.eager, anneals=anneals) for trainee in trainees]
        gradients = Batched(each, [replica.kl_factor for replica in replicas])
        cleanup.callback(gradients.separate)
        try:
            for number in dict.fromkeys(setup.plan.particles or (objective.num_particles,)):
                stage = setup.plan.at(0)
                stage.num_particles = number
                gradients.static(stage)
        except CannotCompile as error:
            warn(f"cannot train replicas at once: {error}; training one after the other")
        else:
            optimizers, make = [trainee.optimizer for trainee in trainees], [trainee.make for trainee in trainees]
            step = on_device(Step(gradients, optimizers, setup.clip_norm, make, lasting=not setup.skips), feed)
            described = with_fingerprints({}, train=feed) if run_dirs is not None else {}
            for r, (replica, trainee) in enumerate(zip(replicas, trainees, strict=True)):
                if replica.run is not None:
                    trainee.open(replica.run, {"replica": r, "of": len(replicas)}, described, step)
            return train(trainees, step)
    return [
        fit(
            *replica.pair, data, objective=replica.weighted(objective), epochs=epochs, batch_size=batch_size,
            optimizer=optimizer, lr=replica.lr, schedule=schedule, particles=particles, kl_warmup=kl_warmup,
            clip_norm=clip_norm, precision=precision, device=device, seed=seed + r, run_dir=replica.run,
            on_nan=on_nan, progress=progress,
        )
        for r, replica in enumerate(replicas)
    ]  # fmt: skip


class Replica(NamedTuple):
    """What one replica has of its own."""

    pair: tuple[Program, Program]
    lr: float | None
    kl_factor: float
    run: runs.Run | None

    def weighted(self, objective: Objective) -> Objective:
        """The objective with the replica's own weight of the KL."""
        own = copy.copy(objective)
        own.kl_weight = own.kl_weight * self.kl_factor
        return own


def replicas_of(
    pairs: Iterable[object],
    lr: float | Iterable[float] | None,
    kl_weight: Iterable[float] | None,
    run_dirs: Iterable[str | os.PathLike[str]] | None,
) -> list[Replica]:
    """The replicas from the arguments of :func:`fit_replicas`, which are checked."""
    if isinstance(pairs, nn.Module) or not isinstance(pairs, Iterable):
        raise TypeError(f"pairs must be a sequence of pairs, got one {type(pairs).__name__}: pass several in a list")
    programs = [programs_of(pair) for pair in pairs]
    if not (number := len(programs)):
        raise ValueError("there are no pairs to train: pass one at least")

    def each(name: str, given: Any) -> list[Any]:
        if isinstance(given, str | os.PathLike) or not isinstance(given, Iterable):
            raise TypeError(f"{name} needs one value for each of {number} pairs, got {shown(given)}: pass as many")
        if len(values := list(given)) != number:
            raise ValueError(f"{name} needs one value for each of {number} pairs, got {len(values)}: pass as many")
        return values

    rates = [lr] * number if lr is None or isinstance(lr, float | int | str) else each("lr", lr)
    weights = each("kl_weight", [1.0] * number if kl_weight is None else kl_weight)
    factors = [in_range("kl_weight", weight, 0.0) for weight in weights]
    own_runs = [None] * number if run_dirs is None else [runs.Run.of(folder) for folder in each("run_dirs", run_dirs)]
    given = [run for run in own_runs if run is not None]
    if len(places := {os.path.realpath(run) for run in given}) < len(given):
        raise ValueError(f"run_dirs must be {len(given)} folders, got {len(places)}: give each pair its own")
    return [Replica(*own) for own in zip(programs, rates, factors, own_runs, strict=True)]


def programs_of(pair: object) -> tuple[Program, Program]:
    """Model and guide of an object that has both, or that is both."""
    if isinstance(pair, tuple) and len(pair) == 2:
        return pair
    model, guide = getattr(pair, "model", None), getattr(pair, "guide", None)
    if callable(model) and callable(guide):
        return model, guide
    raise TypeError(f"a pair is an object with .model and .guide, or a tuple (model, guide), got {type(pair).__name__}")


class Batched:
    """The gradients of several pairs at once: one pair's flat graph, batched over parameters, buffers and noise.

    The pairs live on in the rows of one stack for each tensor; :meth:`separate` gives them tensors of their own again.

    :param factors: for each pair a factor of the objective's kl_weight.
    :raises ValueError: where the pairs differ in shape, or share a parameter or buffer.
    """

    def __init__(self, each: Sequence[Compiled], factors: Sequence[float]) -> None:
        self.each, self.factors, self.example = list(each), factors, each[0].example
        self.states, self.reached = [own.eager.state for own in each], [own.eager.reach for own in each]
        self.kind, self.compile_seconds = "replicas", 0.0
        self.functions: dict[object, Together | None] = {}
        self.due: set[object] = set()  # those of them that are to be compared again
        self.epochs = 0
        self.met: Counter[object] = Counter()  # eager steps, by number of particles and kind of batch
        self.stacked = [True] * len(each[0].inputs) + [False] * len(tensors(self.example))
        self.objectives: list[Objective] = []
        self.tensors = [own.inputs for own in each]
        shapes = [[(t.shape, t.dtype) for t in own] for own in self.tensors]
        if any(own != shapes[0] for own in shapes):
            raise ValueError("replicas must be one program, but their parameters differ in shape: build them alike")
        if len({id(t) for own in self.tensors for t in own}) < sum(map(len, self.tensors)):
            raise ValueError("replicas share a parameter or buffer: give each pair networks of its own")
        self.stacks = [torch.stack([t.detach() for t in same]) for same in zip(*self.tensors, strict=True)]
        for stack, same in zip(self.stacks, zip(*self.tensors, strict=True), strict=True):
            for row, tensor in zip(stack, same, strict=True):
                tensor.data = row

    def separate(self) -> None:
        for own in self.tensors:
            for tensor in own:
                tensor.data = tensor.data.clone()

    def __call__(self, objective: pyro.infer.ELBO, batch: Batch) -> Outcome:
        other = None if signature(batch) == self.each[0].signature else batch  # the last one of an epoch
        kind = objective.num_particles, signature(batch)
        self.met[kind] += len(self.each)
        function = self.static(objective, other) if other is None or self.met[kind] > WORTHWHILE else None
        if function is not None:
            return function(batch)
        own = zip(self.each, self.weighted(objective), strict=True)
        return Outcome(*map(torch.stack, zip(*(one.eager(weighted, batch) for one, weighted in own), strict=True)))

    def static(self, objective: pyro.infer.ELBO, example: Batch | None = None) -> Callable[[Batch], Outcome] | None:
        """What computes the gradients of an objective, made once for a number of particles.

        It is compiled, but for an example of another size, where a graph may also be refused.
        """
        kind = objective.num_particles, None if example is None else signature(example)
        if kind not in self.functions:
            began = time.perf_counter()
            try:
                self.functions[kind] = self.compile(objective) if example is None else self.other(objective, example)
            except CannotCompile:
                if example is None:
                    raise
                self.functions[kind] = None
            self.compile_seconds += time.perf_counter() - began
        for one, factor in zip(self.each, self.factors, strict=True):
            one.anneal(objective, factor)
        together = self.functions[kind]
        if kind in self.due:
            self.due.remove(kind)
            if together is not None and not together.holds():
                warn("the program has changed since the step was compiled, running eagerly: keep what did in a buffer")
                self.functions, self.kind, together = dict.fromkeys(self.functions), "eager", None
        return together and together.gradients

    def look_again(self) -> None:
        """After 1, 2, 4, 8, ... epochs compare with the pairs once more."""
        if self.epochs.bit_count() == 1:
            self.due = set(self.functions)
        self.epochs += 1

    def weighted(self, objective: pyro.infer.ELBO) -> list[Objective]:
        """Every pair's own objective; one object each, so that it looks at its pair only once."""
        ours = traceable(objective)
        self.objectives = self.objectives or [copy.copy(ours) for _ in self.each]
        for own, factor in zip(self.objectives, self.factors, strict=True):
            own.num_particles, own.kl_weight = ours.num_particles, ours.kl_weight * factor
        return self.objectives

    def differentiated(self, objective: pyro.infer.ELBO) -> list[Differentiated]:
        """Loss and gradients of every pair, and the parameters whose gradients follow the loss."""
        own = [one.differentiated(w) for one, w in zip(self.each, self.weighted(objective), strict=True)]
        if any(len(one.inputs) > len(stacked) for one, stacked in zip(self.each, self.tensors, strict=True)):
            raise CannotCompile("a step reaches parameters that the first look did not")
        return own

    def compile(self, objective: pyro.infer.ELBO) -> Together:
        """One compiled function for all pairs, which are found to be one program."""
        with steady([module for state in self.states for module in state.modules]):
            own = self.differentiated(objective)
            captured = [function.capture(self.example) for function, _ in own]
        single = captured[0].graph
        for r, (graph, *_) in enumerate(captured):
            if not single.same(graph):
                raise ValueError(f"replica {r} is not the same program as replica 0: build them alike, but for weights")
        together = single.batched(len(self.each), self.stacked).compiled()
        return self.checked(together, single, own, [results for _, *results in captured], self.example)

    def other(self, objective: pyro.infer.ELBO, example: Batch) -> Together:
        """One function for batches of another size, operation by operation, as they come but once an epoch."""
        own = self.differentiated(objective)
        single = own[0][0].capture(example).graph
        together = single.batched(len(self.each), self.stacked)
        return self.checked(together, single, own, [function.expected(example) for function, _ in own], example)

    def checked(
        self,
        together: Callable[..., list[Tensor]],
        single: Graph,
        own: Sequence[Differentiated],
        results: Sequence[Sequence[list[Tensor]]],
        example: Batch,
    ) -> Together:
        """A function for all pairs, after a check of each pair's gradients against its own eager results."""
        functions = [function for function, _ in own]

        def same_noise() -> tuple[Tensor, ...]:
            torch.manual_seed(CHECK_SEED)
            return single.noise()

        def check(results: Iterable[Sequence[list[Tensor]]]) -> None:
            with isolated_rng(), full_float32(), ExitStack() as undo:
                for state in self.states:
                    undo.enter_context(untouched(state))
                got = together(*self.stacks, *tensors(example), noise=stacked_noise([same_noise] * len(own)))
                for r, (function, (expected, changed)) in enumerate(zip(functions, results, strict=True)):
                    compare(expected, [g[r] for g in got], function.precision)
                    compare(changed, function.changes, function.precision)

        check(results)
        others = [one.others(reached) for one, (_, reached) in zip(self.each, own, strict=True)]

        def gradients(batch: Batch) -> Outcome:
            losses, left_out, *found = together(*self.stacks, *tensors(batch))
            for r, (_, reached) in enumerate(own):
                put(reached, [g[r] for g in found], others[r])
            return Outcome(losses, left_out)

        def holds() -> bool:
            return still(single, lambda: check([one.expected(example) for one in functions]), functions, example)

        return Together(gradients, holds)
