r"""Many models at once: R pairs of the same programs, trained side by side in one batched step.

A small network leaves most of a device idle. Here the flat graph of one pair's step is batched over R sets of
parameters, buffers and noise, so that a step of R models costs little more than a step of one. Each replica follows in
law exactly what :func:`pyrovae.fit` alone would do, and is saved as a run of its own.
"""

from __future__ import annotations

import copy
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyrovae import runs
from pyrovae.arguments import in_range, one_of, pick_device, positive_int
from pyrovae.compile.checked import compare, signature, tensors, untouched
from pyrovae.compile.graph import Graph
from pyrovae.compile.inductor import laid_out_as
from pyrovae.compile.noise import CannotCompile, stacked_noise
from pyrovae.compile.precision import PRECISIONS
from pyrovae.compile.recording import Recording, capturable
from pyrovae.data.feed import Feed
from pyrovae.engine.programs import Batch, Program, eval_mode
from pyrovae.engine.randomness import isolated_rng
from pyrovae.objectives.base import Objective
from pyrovae.progress import ProgressBar
from pyrovae.schedules import Schedule
from pyrovae.train.compiled import CHECK_SEED, Captured, CompiledStepper, gathered
from pyrovae.train.log import Fit, Log, describe_pair
from pyrovae.train.loop import describe_training, fit, make_optimizer, prepare, run_epoch
from pyrovae.train.monitor import Monitor
from pyrovae.train.plan import Plan
from pyrovae.train.step import Stepper


def fit_replicas(
    pairs: Sequence[Any],
    data: Any,
    *,
    objective: Objective,
    epochs: int,
    batch_size: int = 100,
    optimizer: Callable[[Iterable[Tensor]], Optimizer] | None = None,
    lr: float | Sequence[float] | None = None,
    kl_weight: Sequence[float] | None = None,
    schedule: str | Schedule = "constant",
    particles: Sequence[int] | None = None,
    kl_warmup: float = 0,
    clip_norm: float | None = None,
    precision: str = "float32",
    device: str | torch.device = "auto",
    seed: int = 0,
    run_dirs: Sequence[str | os.PathLike[str]] | None = None,
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
    programs = [_programs(pair) for pair in pairs]
    number = len(programs)
    if not number:
        raise ValueError("there are no pairs to train: pass one at least")
    epochs, batch_size = positive_int("epochs", epochs), positive_int("batch_size", batch_size)
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * number
    factors = [1.0] * number if kl_weight is None else [in_range("kl_weight", f, 0.0) for f in kl_weight]
    folders = [None] * number if run_dirs is None else list(run_dirs)
    for name, given in (("lr", rates), ("kl_weight", factors), ("run_dirs", folders)):
        if len(given) != number:
            raise ValueError(f"{name} needs one value for each of {number} pairs, got {len(given)}: pass as many")
    if taken := [f'"{folder}"' for folder in folders if folder is not None and runs.Run(folder).exists]:
        raise ValueError(f"{', '.join(taken)} hold runs already: pass other run_dirs")
    if not isinstance(objective, Objective):
        raise TypeError(f"replicas need one of pyrovae's objectives, got {type(objective).__name__}: pass one")
    plan = Plan.make(objective, epochs, schedule, particles, kl_warmup)
    clip = None if clip_norm is None else in_range("clip_norm", clip_norm, 1e-12)
    one_of("precision", precision, PRECISIONS)
    makers = [make_optimizer(optimizer, rate) for rate in rates]
    place = pick_device(device)

    with isolated_rng(seed), ExitStack() as cleanup:
        feed = Feed(data, batch_size, place)
        steppers = []
        for (model, guide), (_, made) in zip(programs, makers, strict=True):
            pair = prepare(model, guide, feed)
            parameters = made(list(pair.parameters.values()))
            steppers.append(
                CompiledStepper(
                    model, guide, pair, parameters, feed.first(),
                    clip_norm=clip, precision=precision, anneals=kl_weight is not None or bool(plan.kl_warmup),
                )
            )  # fmt: skip
        replicas = Replicas(steppers, factors, feed)
        cleanup.callback(replicas.separate)
        for stepper in steppers:
            cleanup.enter_context(eval_mode(stepper.pair.modules, training=True))
        try:
            for stage in plan.stages():
                replicas.function(stage)
        except CannotCompile as error:
            warnings.warn(f"cannot train replicas at once: {error}; training one after the other", stacklevel=2)
        else:
            logs = [Log(folder, s.pair, s.optimizer, False) for folder, s in zip(folders, steppers, strict=True)]
            results = []
            for r, (log, stepper) in enumerate(zip(logs, steppers, strict=True)):
                training = describe_training(plan, feed, stepper, schedule, makers[r][0], batch_size, seed)
                described = describe_pair(*programs[r], _weighted(objective, factors[r]))
                results.append(log.open(described | {"training": training | {"replica": r, "of": number}}))
            _train(replicas, plan, feed, logs, results, progress)
            return results
    return [
        fit(
            *programs[r], data, objective=_weighted(objective, factors[r]), epochs=epochs, batch_size=batch_size,
            optimizer=optimizer, lr=rates[r], schedule=schedule, particles=particles, kl_warmup=kl_warmup,
            clip_norm=clip_norm, precision=precision, device=device, seed=seed + r, run_dir=folders[r],
            progress=progress,
        )
        for r in range(number)
    ]  # fmt: skip


def _train(
    replicas: Replicas, plan: Plan, feed: Feed, logs: Sequence[Log], results: Sequence[Fit], progress: bool | None
) -> None:
    """All epochs of all replicas."""
    steppers = replicas.steppers
    monitors = [Monitor(s.model, s.guide, s.pair.modules, feed) for s in steppers]
    with ProgressBar("epoch", plan.epochs, progress) as bar:
        for epoch in range(plan.epochs):
            losses, metrics = run_epoch(epoch, feed, replicas, plan)
            for r, stepper in enumerate(steppers):
                if not (torch.isfinite(losses[r]) and stepper.finite()):
                    raise FloatingPointError(
                        f"replica {r} became NaN in epoch {epoch + 1}: lower its learning rate, or pass clip_norm"
                    )
                own = {"bound": -float(losses[r]), "kl_weight": metrics["kl_weight"] * replicas.factors[r]}
                results[r].add(metrics | own | stepper.metrics() | monitors[r](), None)
                logs[r].write(results[r])
            bar.update(epoch + 1, f"{-float(losses.mean()):.2f} nats on average")
    for result, log in zip(results, logs, strict=True):
        result.finish(replicas, feed.device)
        log.close(result)


class Replicas:
    """The training step of several pairs at once; as :class:`pyrovae.train.step.Stepper`, with a loss for each."""

    path = "replicas"

    def __init__(self, steppers: Sequence[CompiledStepper], factors: Sequence[float], feed: Feed) -> None:
        self.steppers, self.factors = list(steppers), factors
        self.example, self.precision, self.anneals = steppers[0].example, steppers[0].precision, steppers[0].anneals
        self.images = feed.images if feed.device.type == "cuda" else None
        self.takes_index = self.images is not None
        self.compiled: dict[int, Callable[[Batch], Tensor]] = {}
        self.recorded: dict[int, Recording] = {}
        self.compile_seconds = 0.0
        self.cuda = feed.device.type == "cuda"
        self.slots: Batch = ()
        inputs = [s.inputs for s in steppers]
        shapes = [[(t.shape, t.dtype) for t in own] for own in inputs]
        if any(own != shapes[0] for own in shapes):
            raise ValueError("replicas must be one program, but their parameters differ in shape: build them alike")
        if len({id(t) for own in inputs for t in own}) < sum(map(len, inputs)):
            raise ValueError("replicas share a parameter or buffer: give each pair networks of its own")
        # The pairs live on in the rows of one stack for each tensor.
        self.stacks = [torch.stack([t.detach() for t in same]) for same in zip(*inputs, strict=True)]
        for stack, same in zip(self.stacks, zip(*inputs, strict=True), strict=True):
            for row, tensor in zip(stack, same, strict=True):
                tensor.data = row

    def separate(self) -> None:
        """Give every pair tensors of its own again."""
        for stepper in self.steppers:
            for tensor in stepper.inputs:
                tensor.data = tensor.data.clone()

    def set_lr(self, factor: float) -> None:
        """Scale every learning rate from where it started."""
        for stepper in self.steppers:
            stepper.set_lr(factor)

    def __call__(self, objective: Any, batch: Batch) -> Tensor:
        """One step of all; the losses ``[R]``."""
        if not self.cuda:
            losses = self.gradients(objective, batch)
            self.update()
            return losses
        return self._replayed(objective, batch)

    def gradients(self, objective: Any, batch: Batch) -> Tensor:
        """The losses ``[R]``, their gradients in the parameters' ``.grad``."""
        self._anneal(objective)
        if signature(batch) != signature(self.example):  # the last batch, of another size
            weighted = [_weighted(objective, factor) for factor in self.factors]
            steps = zip(self.steppers, weighted, strict=True)
            return torch.stack([torch.as_tensor(Stepper.gradients(s, own, batch)) for s, own in steps])
        return self.function(objective)(batch)

    def update(self) -> None:
        """Clip and move the parameters of each."""
        for stepper in self.steppers:
            stepper.update()

    def function(self, objective: Any) -> Callable[[Batch], Tensor]:
        """The compiled gradients of all replicas for an objective."""
        if objective.num_particles not in self.compiled:
            began = time.perf_counter()
            self.compiled[objective.num_particles] = self._compile(objective)
            self.compile_seconds += time.perf_counter() - began
        return self.compiled[objective.num_particles]

    def _anneal(self, objective: Any) -> None:
        if self.anneals:
            for stepper, factor in zip(self.steppers, self.factors, strict=True):
                stepper.kl_weight.fill_(objective.kl_weight * factor)

    def _compile(self, objective: Any) -> Callable[[Batch], Tensor]:
        weighted = [_weighted(objective, factor) for factor in self.factors]
        captured = [s.capture(own) for s, own in zip(self.steppers, weighted, strict=True)]
        single = captured[0].graph
        for r, each in enumerate(captured):
            same = all(map(torch.equal, each.graph.constants, single.constants))
            if each.graph.key != single.key or not same:
                raise ValueError(f"replica {r} is not the same program as replica 0: build them alike, but for weights")
        number, data = len(self.steppers), tensors(self.example)
        compiled = single.batched(number, [True] * len(self.stacks) + [False] * len(data)).compiled()
        self._check(captured, compiled)
        parameters = [each.parameters for each in captured]

        def gradients(batch: Batch) -> Tensor:
            losses, *found = compiled(*self.stacks, *tensors(batch))
            for r, (stepper, used) in enumerate(zip(self.steppers, parameters, strict=True)):
                for parameter in stepper.parameters:
                    parameter.grad = None
                for parameter, gradient in zip(used, found, strict=True):
                    parameter.grad = laid_out_as(parameter, gradient[r])
            return losses

        return gradients

    def _check(self, captured: Sequence[Captured], compiled: Callable[..., list[Tensor]]) -> None:
        """Compare every replica's first results with its own eager ones, on the same noise."""
        with isolated_rng(), ExitStack() as undo:
            for stepper in self.steppers:
                undo.enter_context(untouched(stepper.pair))
            noise = stacked_noise([lambda: _same_noise(captured[0].graph)] * len(captured))
            got = compiled(*self.stacks, *tensors(self.example), noise=noise)
            for r, (stepper, each) in enumerate(zip(self.steppers, captured, strict=True)):
                compare(each.expected, [g[r] for g in got], self.precision)
                compare(each.buffers, stepper.buffers, self.precision)

    def _replayed(self, objective: Any, batch: Batch) -> Tensor:
        """One step on CUDA, as a graph recorded whole."""
        if not self.slots:
            self.slots = tuple(a.clone() if isinstance(a, Tensor) else a for a in batch)
        if signature(batch) != signature(self.slots):
            losses = self.gradients(objective, gathered(self.images, batch))
            self.update()
            return losses
        for slot, given in zip(tensors(self.slots), tensors(batch), strict=True):
            slot.copy_(given, non_blocking=True)
        self._anneal(objective)
        self.function(objective)
        number, optimizers = objective.num_particles, [s.optimizer for s in self.steppers]
        whole = all(map(capturable, optimizers))
        if number not in self.recorded:

            def step() -> Tensor:
                losses = self.compiled[number](gathered(self.images, self.slots))
                if whole:
                    self.update()
                return losses

            began = time.perf_counter()
            self.recorded[number] = Recording(step, [s.pair for s in self.steppers], optimizers)
            self.compile_seconds += time.perf_counter() - began
        losses = self.recorded[number].replay()
        if not whole:
            self.update()
        return losses


def _programs(pair: Any) -> tuple[Program, Program]:
    if isinstance(pair, tuple) and len(pair) == 2:
        return pair
    if callable(getattr(pair, "model", None)) and callable(getattr(pair, "guide", None)):
        return pair.model, pair.guide
    raise TypeError(f"a pair is an object with .model and .guide, or a tuple (model, guide), got {type(pair).__name__}")


def _weighted(objective: Any, factor: float) -> Any:
    own = copy.copy(objective)
    own.kl_weight = own.kl_weight * factor
    return own


def _same_noise(graph: Graph) -> tuple[Tensor, ...]:
    torch.manual_seed(CHECK_SEED)
    return graph.noise()
