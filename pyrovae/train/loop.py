"""The one visible training loop, of one pair or of several."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import pyro.infer
import torch
from torch import Tensor
from torch.optim import Optimizer

from pyrovae.arguments import DataError
from pyrovae.data.feed import Feed
from pyrovae.engine.programs import Program, eval_mode
from pyrovae.engine.randomness import isolated_rng
from pyrovae.memory import memory_advice
from pyrovae.progress import ProgressBar
from pyrovae.schedules import Schedule
from pyrovae.train.compiled import choose_gradients
from pyrovae.train.log import Fit
from pyrovae.train.plan import Plan
from pyrovae.train.recorded import Recorded, on_device
from pyrovae.train.setup import Setup, check_options, optimizer_maker
from pyrovae.train.step import Step
from pyrovae.train.trainee import Trainee


def fit(
    model: Program,
    guide: Program,
    data: object,
    *,
    objective: pyro.infer.ELBO,
    epochs: int,
    batch_size: int = 100,
    optimizer: Callable[[Iterable[Tensor]], Optimizer] | None = None,
    lr: float | None = None,
    schedule: str | Schedule = "constant",
    particles: Sequence[int] | None = None,
    kl_warmup: float = 0,
    clip_norm: float | None = None,
    validation: object = None,
    patience: int | None = None,
    compile: bool | str = "auto",
    precision: str = "float32",
    device: str | torch.device = "auto",
    num_workers: int | None = None,
    seed: int = 0,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    config: Mapping[str, object] | None = None,
    progress: bool | None = None,
) -> Fit:
    r"""Train a pair of Pyro programs on an objective, minimising its loss in nats per datum.

    Any pair: modules, bound methods, plain functions, ``pyro.param`` programs, Pyro's autoguides; parameters are found
    wherever they live. Any objective: ours, or any :class:`pyro.infer.ELBO`. The pair ends with the last weights;
    fitting it again goes on from them with a fresh optimizer and schedule.

    :param data: a tensor ``[N, ...]``, :class:`pyrovae.data.Images`, a tuple of tensors, a Dataset or a DataLoader;
        batches that are tuples become ``model(*batch)``. What is held in tensors lives on the device; other data sets
        stream through a DataLoader with ``num_workers``.
    :param objective: for instance ``pyrovae.IWAE(5)``.
    :param epochs: passes over the data.
    :param batch_size: data per step (a DataLoader has its own).
    :param optimizer: parameters -> ``torch.optim`` optimizer; by default fused Adam with learning rate ``lr`` (1e-3).
    :param schedule: "constant", "cosine", "linear", "iwae" (the paper's stages), or a function of progress in [0, 1)
        that gives the factor of the learning rate.
    :param particles: numbers of particles for equal parts of the epochs, for instance ``(1, 5, 20, 50)``.
    :param kl_warmup: epochs over which kl_weight rises linearly from 0 to the objective's own.
    :param clip_norm: largest 2-norm of the gradient.
    :param validation: data on which the bound is measured after each epoch, always on the same noise.
    :param patience: stop after that many epochs without a better validation bound.
    :param compile: True for one static training step (see :mod:`pyrovae.compile`); what cannot be compiled runs eagerly
        after a warning. "auto" compiles where the number and size of the steps promise a shorter job.
    :param precision: "float32", or "bfloat16": networks multiply in bfloat16, all else stays float32.
    :param device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ...
    :param seed: of the noise, the order of the data and the binarisation; torch's global generator is left as found.
    :param run_dir: a folder for config, metrics and checkpoints (every epoch; with ``validation`` the best as well).
    :param resume: go on from the last checkpoint in ``run_dir``, on CPU to the same bits as if never interrupted.
    :param config: more entries for the run's config.json.
    :param progress: show a progress bar; None shows it on terminals only.
    :raises DataError: for data outside the observed sites' support, saying where.
    :raises ValueError: for arguments out of range.
    :raises FloatingPointError: where the loss becomes NaN, naming the site; the last checkpoint is kept.

    >>> import pyrovae as pv
    >>> digits = pv.data.load("digits", binarization="dynamic").train
    >>> vae = pv.models.VAE(digits.event_shape, latent_dim=2, hidden=(32,)).initialise(digits.x)
    >>> result = pv.fit(vae.model, vae.guide, digits, objective=pv.IWAE(5), epochs=2)
    >>> result.history[1]["bound"] > result.history[0]["bound"]
    True
    """
    setup = Setup(
        Plan.make(objective, epochs, schedule, particles, kl_warmup), batch_size=batch_size, clip_norm=clip_norm,
        precision=precision, device=device, seed=seed, progress=progress,
    )  # fmt: skip
    maker = optimizer_maker(optimizer, lr)
    check_options(validation, patience, compile, run_dir, resume)

    with isolated_rng(setup.seed):
        feed = Feed(data, setup.batch_size, setup.device, num_workers)
        trainee = Trainee(model, guide, objective, setup, feed, maker)
        gradients = choose_gradients(compile, setup.plan, trainee.eager, feed)
        step = on_device(Step(gradients, [trainee.optimizer], setup.clip_norm), feed)
        held_out = None if validation is None else Feed(validation, setup.batch_size, setup.device, num_workers)
        if held_out is not None:
            trainee.validate_on(held_out, setup.plan.final, patience)
        training = trainee.describe(setup, feed) | {
            "patience": patience, "compile": compile, "num_validation": None if held_out is None else held_out.size,
        }  # fmt: skip
        trainee.open(run_dir, training, config or {}, resume=resume)
        return train([trainee], step, setup, feed)[0]


def train(trainees: Sequence[Trainee], step: Step | Recorded, setup: Setup, feed: Feed) -> list[Fit]:
    """All epochs of all pairs, from where their runs are."""
    plan, first = setup.plan, trainees[0]
    with train_mode(trainees), ProgressBar("epoch", plan.epochs, setup.progress) as bar:
        for epoch in range(len(first.result.history), 0 if first.result.finished else plan.epochs):
            with memory_advice(lambda: setup.advice(first.log.checkpoint)):
                losses, metrics = run_epoch(epoch, feed, step, plan)
            for r, trainee in enumerate(trainees):
                if math.isnan(losses[r]) or not step.finite(r):
                    alone = len(trainees) == 1
                    raise FloatingPointError(trainee.blame(feed.first(), epoch + 1, None if alone else r))
                trainee.add(metrics | step.metrics(r), losses[r].item())
            mean = "" if len(trainees) == 1 else " on average"
            bar.update(epoch + 1, f"{-losses.mean():.2f} nats{mean}, {metrics['images_per_second']:,.0f} images/s")
            if all(trainee.result.finished for trainee in trainees):
                break
    return [trainee.close(step, setup) for trainee in trainees]


def train_mode(trainees: Sequence[Trainee]) -> AbstractContextManager[None]:
    """Networks in train mode; each one's own mode comes back afterwards."""
    return eval_mode((module for trainee in trainees for module in trainee.eager.state.modules), training=True)


def run_epoch(epoch: int, feed: Feed, step: Step | Recorded, plan: Plan) -> tuple[Tensor, dict[str, float]]:
    """One pass over the data: each pair's mean loss, read back once at its end, and what the epoch was."""
    total: Tensor | float = 0.0
    began, steps, data = time.perf_counter() - step.compile_seconds, 0, 0
    for batch in feed.indices() if step.takes_index else feed:
        now = epoch + (steps / feed.steps if feed.steps else 0.0)
        step.set_lr(plan.factor(now))
        # What Pyro's own checks can find they find at the first step; later they cost time, and hide what became NaN.
        with nullcontext() if epoch == steps == 0 else pyro.validation_enabled(False):
            total = total + step(plan.at(now), batch) * len(batch[0])
        steps, data = steps + 1, data + len(batch[0])
    if not data:
        raise DataError("there are no data to train on: the data set is empty")
    losses = torch.as_tensor(total / data).cpu().reshape(-1)
    seconds = time.perf_counter() - step.compile_seconds - began
    return losses, {
        "epoch": epoch + 1,
        "kl_weight": float(getattr(plan.at(now), "kl_weight", 1.0)),
        "num_particles": plan.at(now).num_particles,
        "seconds": seconds,
        "steps": steps,
        "images_per_second": data / seconds,
    }
