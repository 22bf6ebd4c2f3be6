r"""Many models at once: R pairs of the same programs, trained side by side in one batched step.

Each replica follows in law exactly what :func:`pyrovae.fit` alone would do, and is saved as a run of its own.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyrovae import runs
from pyrovae.arguments import in_range
from pyrovae.compile.noise import CannotCompile
from pyrovae.data.feed import Feed
from pyrovae.engine.programs import Program
from pyrovae.engine.randomness import isolated_rng
from pyrovae.objectives.base import Objective
from pyrovae.schedules import Schedule
from pyrovae.train.batched import Batched
from pyrovae.train.compiled import Compiled
from pyrovae.train.log import Fit
from pyrovae.train.loop import fit, train, train_mode
from pyrovae.train.plan import Plan
from pyrovae.train.recorded import on_device
from pyrovae.train.setup import Setup, optimizer_maker
from pyrovae.train.step import Step
from pyrovae.train.trainee import Trainee


def fit_replicas(
    pairs: Sequence[object],
    data: object,
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
    replicas = replicas_of(pairs, lr, kl_weight, run_dirs)
    if not isinstance(objective, Objective):
        raise TypeError(f"replicas need one of pyrovae's objectives, got {type(objective).__name__}: pass one")
    setup = Setup(
        Plan.make(objective, epochs, schedule, particles, kl_warmup), batch_size=batch_size, clip_norm=clip_norm,
        precision=precision, device=device, seed=seed, progress=progress,
    )  # fmt: skip
    makers = [optimizer_maker(optimizer, replica.lr) for replica in replicas]

    with isolated_rng(setup.seed), ExitStack() as cleanup:
        feed = Feed(data, setup.batch_size, setup.device)
        trainees = [
            Trainee(*replica.pair, replica.weighted(objective), setup, feed, maker, replica.kl_factor)
            for replica, maker in zip(replicas, makers, strict=True)
        ]
        try:
            gradients = cleanup.enter_context(at_once(trainees, setup.plan))
        except CannotCompile as error:
            warnings.warn(f"cannot train replicas at once: {error}; training one after the other", stacklevel=2)
        else:
            step = on_device(Step(gradients, [trainee.optimizer for trainee in trainees], setup.clip_norm), feed)
            for r, (replica, trainee) in enumerate(zip(replicas, trainees, strict=True)):
                training = trainee.describe(setup, feed) | {"replica": r, "of": len(replicas)}
                trainee.open(replica.run_dir, training, {})
            return train(trainees, step, setup, feed)
    return [
        fit(
            *replica.pair, data, objective=replica.weighted(objective), epochs=epochs, batch_size=batch_size,
            optimizer=optimizer, lr=replica.lr, schedule=schedule, particles=particles, kl_warmup=kl_warmup,
            clip_norm=clip_norm, precision=precision, device=device, seed=seed + r, run_dir=replica.run_dir,
            progress=progress,
        )
        for r, replica in enumerate(replicas)
    ]  # fmt: skip


class Replica(NamedTuple):
    """What one replica has of its own."""

    pair: tuple[Program, Program]
    lr: float | None
    kl_factor: float
    run_dir: str | os.PathLike[str] | None

    def weighted(self, objective: Objective) -> Objective:
        """The objective with the replica's own weight of the KL."""
        own = copy.copy(objective)
        own.kl_weight = own.kl_weight * self.kl_factor
        return own


def replicas_of(
    pairs: Sequence[object],
    lr: float | Sequence[float] | None,
    kl_weight: Sequence[float] | None,
    run_dirs: Sequence[str | os.PathLike[str]] | None,
) -> list[Replica]:
    """The replicas from the arguments of :func:`fit_replicas`, which are checked."""
    programs, number = [programs_of(pair) for pair in pairs], len(pairs)
    if not number:
        raise ValueError("there are no pairs to train: pass one at least")
    rates = lr if isinstance(lr, Sequence) else [lr] * number
    weights = [1.0] * number if kl_weight is None else [in_range("kl_weight", w, 0.0) for w in kl_weight]
    folders = [None] * number if run_dirs is None else run_dirs
    for name, given in (("lr", rates), ("kl_weight", weights), ("run_dirs", folders)):
        if len(given) != number:
            raise ValueError(f"{name} needs one value for each of {number} pairs, got {len(given)}: pass as many")
    if taken := [f'"{folder}"' for folder in folders if folder is not None and runs.Run(folder).exists]:
        raise ValueError(f"{', '.join(taken)} hold runs already: pass other run_dirs")
    return [Replica(*own) for own in zip(programs, rates, weights, folders, strict=True)]


@contextmanager
def at_once(trainees: Sequence[Trainee], plan: Plan) -> Iterator[Batched]:
    """The gradients of all pairs in one function, compiled for every number of particles there will be.

    :raises CannotCompile: with the reason.
    """
    anneals = bool(plan.kl_warmup) or any(trainee.kl_factor != 1.0 for trainee in trainees)
    each = [Compiled(trainee.eager, anneals=anneals) for trainee in trainees]
    gradients = Batched(each, [trainee.kl_factor for trainee in trainees])
    try:
        with train_mode(trainees):
            for stage in plan.stages():
                gradients.static(stage)
        yield gradients
    finally:
        gradients.separate()


def programs_of(pair: object) -> tuple[Program, Program]:
    """Model and guide of an object that has both, or that is both."""
    if isinstance(pair, tuple) and len(pair) == 2:
        return pair
    model, guide = getattr(pair, "model", None), getattr(pair, "guide", None)
    if callable(model) and callable(guide):
        return model, guide
    raise TypeError(f"a pair is an object with .model and .guide, or a tuple (model, guide), got {type(pair).__name__}")
