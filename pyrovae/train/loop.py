"""The one visible training loop, of one pair or of several."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import pyro.infer
import torch
from pyro.optim import PyroOptim

from pyrovae import runs
from pyrovae.arguments import positive_int
from pyrovae.compile.checked import check_compile
from pyrovae.data.feed import Feed, number_in
from pyrovae.data.streams import Indexed
from pyrovae.engine.programs import Program, in_modes, training_modes, warn_of_eval
from pyrovae.engine.randomness import isolated_rng
from pyrovae.errors import DataError
from pyrovae.memory import memory_advice
from pyrovae.progress import ProgressBar
from pyrovae.ranks import ALONE, Ranks, ranks
from pyrovae.schedules import Schedule
from pyrovae.signals import Signals
from pyrovae.train.ahead import Ahead
from pyrovae.train.checks import derivable, lone_datum_advice
from pyrovae.train.compiled import Compiled, worthwhile
from pyrovae.train.log import Fit
from pyrovae.train.monitor import Validation
from pyrovae.train.optimizers import optimizer_maker
from pyrovae.train.outcomes import Outcomes, Watch
from pyrovae.train.plan import MakeOptimizer, Plan, Setup
from pyrovae.train.resuming import begun_with, facts_of, known_by, with_fingerprints
from pyrovae.train.shared import Shared
from pyrovae.train.step import Gradients, Recorded, Step, on_device
from pyrovae.train.threads import threads, threads_for
from pyrovae.train.trainee import OnEpoch, Trainee
from pyrovae.train.within import Progress


def fit(
    model: Program,
    guide: Program,
    data: object,
    *,
    objective: pyro.infer.ELBO,
    epochs: int,
    batch_size: int = 100,
    optimizer: MakeOptimizer | PyroOptim | None = None,
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
    on_nan: str = "raise",
    config: Mapping[str, object] | None = None,
    override: bool = False,
    progress: bool | None = None,
    on_epoch: OnEpoch | None = None,
) -> Fit:
    r"""Train a pair of Pyro programs on an objective, minimising its loss in nats per datum.

    Any pair: modules, bound methods, plain functions, ``pyro.param`` programs, Pyro's autoguides; parameters are found
    wherever they live, also those that only some batches reach. Any objective: ours, or any :class:`pyro.infer.ELBO`.
    The pair ends with the last weights; fitting it again goes on from them with a fresh optimizer and schedule. Modules
    that programs are, or are methods of, run in train mode, but what is in eval mode below one that is not stays so, as
    do the modules of plain functions, after a warning. All get their modes back. Processes of a group of
    ``torch.distributed``, or that torchrun has started, share every batch, and end with what one would.

    :param data: a tensor ``[N, ...]``, :class:`pyrovae.data.Images`, a tuple of tensors, a Dataset or a DataLoader;
        batches that are tuples become ``model(*batch)``. ``()`` is for programs that hold their data: a step an epoch.
        What is held in tensors lives on the device; other data sets stream through a DataLoader with ``num_workers``.
    :param objective: for instance ``pyrovae.IWAE(5)``.
    :param epochs: passes over the data.
    :param batch_size: data per step (a DataLoader has its own).
    :param optimizer: parameters -> ``torch.optim`` optimizer, or one of ``pyro.optim`` with one dict of arguments; by
        default fused Adam with learning rate ``lr`` (1e-3).
    :param schedule: "constant", "cosine", "linear", "iwae" (the paper's stages), or a function of progress in [0, 1)
        that gives the factor of the learning rate.
    :param particles: numbers of particles for equal parts of the epochs, for instance ``(1, 5, 20, 50)``.
    :param kl_warmup: epochs over which kl_weight rises linearly from 0 to the objective's own.
    :param clip_norm: largest 2-norm of the gradient.
    :param validation: data on which the bound is measured after each epoch, always on the same noise.
    :param patience: stop after that many epochs without a better validation bound; those before the end of
        ``kl_warmup`` and of all stages of ``particles`` but the last do not count, and none of them is the best.
    :param compile: True for one static training step (see :mod:`pyrovae.compile`); what cannot be compiled runs eagerly
        after a warning. "auto" compiles where the number and size of the steps promise a shorter job, sooner where
        such a step was compiled on this machine before; what is resumed goes on as it began.
    :param precision: "float32", or "bfloat16": networks multiply in bfloat16, all else stays float32; "auto" is that
        where the processor has units for it and batch_size times particles is at least 100.
    :param device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ...
    :param seed: of the noise, the order of the data and the binarisation; torch's global generator is left as found.
    :param run_dir: a folder for config, metrics and checkpoints (as often as takes 1% of the time, within epochs too,
        at the end, and before a signal ends the process; with ``validation`` the best as well). One process at a time
        writes to it.
    :param resume: go on from the last checkpoint in ``run_dir``, on CPU to the same bits as if never interrupted; a
        finished run too, to more ``epochs``. Data that are held in tensors must be those of before.
    :param on_nan: what follows a step whose loss or gradient is not finite. It never moves anything: parameters, the
        optimizer's state and buffers stay as they were. "raise" ends the training, "skip" goes on with the next step
        and counts it (10 in a row are an error all the same). Data whose bound is -inf are left out of their step and
        counted, under either; the others keep the weight 1/B that they have in a batch of B.
    :param config: more entries for the run's config.json.
    :param override: resume, with a warning, a run whose files or data were changed since they were written.
    :param progress: show a progress bar; None shows it on terminals only.
    :param on_epoch: called with the :class:`Fit` so far, whose last row is ``fit.history[-1]``, after each epoch, once
        that is logged. Training ends where it returns False; after an error in it the run can be resumed. What it
        draws, and the modes that it puts modules in, leave training as it is.
    :raises DataError: for data outside the observed sites' support, saying where; those that stream are looked at as
        they come (what a program computes from them, in their first epoch).
    :raises ValueError: for arguments out of range, and a ``run_dir`` that holds a run where ``resume`` is False.
    :raises CheckpointError: for a run to resume that is damaged or was changed.
    :raises ResourceError: where another process writes to ``run_dir``, or its disk is full; what was saved is kept.
    :raises NumericalError: where a step has no finite loss and gradient, naming step, data, and what is no number; the
        pair has its last good weights, and the last checkpoint is kept.

    >>> import pyrovae as pv
    >>> digits = pv.data.load("digits", binarization="dynamic").train
    >>> vae = pv.models.VAE(digits.event_shape, latent_dim=2, hidden=(32,)).initialise(digits.x)
    >>> result = pv.fit(vae.model, vae.guide, digits, objective=pv.IWAE(5), epochs=2)
    >>> result.history[1]["bound"] > result.history[0]["bound"]
    True
    """
    with ranks().together():
        setup = Setup(
            Plan.make(objective, epochs, schedule, particles, kl_warmup), batch_size=batch_size, clip_norm=clip_norm,
            precision=precision, device=device, seed=seed, progress=progress, on_nan=on_nan,
        )  # fmt: skip
        maker = optimizer_maker(optimizer, lr)
        if patience is not None:
            if validation is None:
                raise ValueError("patience needs data to validate on: pass validation, or leave patience out")
            positive_int("patience", patience)
        check_compile(compile)
        if resume and run_dir is None:
            raise ValueError("resume=True needs the folder of the run to go on with: pass run_dir")
        if not (on_epoch is None or callable(on_epoch)):
            raise TypeError(
                f"on_epoch must be a function of a Fit, got {type(on_epoch).__name__}: pass one, or leave it out"
            )
    team, facts = setup.ranks, dict[str, object]()
    run = None if run_dir is None or not team.first else runs.Run.of(run_dir, override=override)
    with (
        held(run, team), isolated_rng(setup.seed), setup.place(), derivable(), in_modes(training_modes(model, guide)),
        ExitStack() as inside, team.quiet(),
    ):  # fmt: skip
        with team.together(facts):
            if run is not None and not resume:
                run.check_absent()
            feed = Feed(data, setup.batch_size, setup.device, num_workers)
            trainee = Trainee(model, guide, objective, setup, feed, maker)
            facts |= {} if team.alone else facts_of(setup, feed, trainee.eager.state, objective)
        own = trainee.eager
        if not team.alone and isinstance(feed.source, Indexed):
            feed.source.read_own(team.share)
        inside.enter_context(threads(threads_for(own.state.modules, setup.rows // team.size, team.here())))
        team.copy_(list(own.state.tensors.values()))
        if (compiled := team.same(begun_with(run, "compiled") if compile == "auto" else compile)) is None:
            compiled = team.same(worthwhile(setup.plan, own.parameters, feed, own))
        whole = Compiled(own, anneals=bool(setup.plan.kl_warmup)) if compiled else own
        gradients: Gradients = whole if team.alone else Shared(whole, own, team, feed)
        plain = Step(gradients, [trainee.optimizer], setup.clip_norm, [trainee.make], lasting=not setup.skips)
        step = on_device(plain, feed) if team.alone else plain
        training = {"patience": patience, "compile": compile, "compiled": bool(compiled), "num_validation": None}
        held_out = None
        if validation is not None:
            told = dict[str, object]()
            with team.together(told):
                held_out = Feed(validation, setup.batch_size, setup.device, num_workers)
                trainee.validation, trainee.patience = Validation(model, guide, held_out, setup.plan.final), patience
                told |= {} if team.alone else {"validation data": known_by(held_out)}
            training["num_validation"] = held_out.size
        if run_dir is not None:
            described = with_fingerprints(config or {}, train=feed, validation=held_out)
            trainee.open(run, training, described, step)
        return train([trainee], step, on_epoch)[0]


@contextmanager
def held(run: runs.Run | None, team: Ranks) -> Iterator[None]:
    """Keep a run from other processes and threads, before this one waits for any of them."""
    with ExitStack() as inside:
        with team.together():
            if run is not None:
                inside.enter_context(run.writing())
        yield


def train(trainees: Sequence[Trainee], step: Step | Recorded, on_epoch: OnEpoch | None = None) -> list[Fit]:
    """All epochs of all pairs, from where their runs are; ``on_epoch`` is of a pair alone."""
    first, alone = trainees[0], len(trainees) == 1
    setup, plan, team = first.setup, first.setup.plan, first.setup.ranks
    watched = team.any(on_epoch is not None)  # perhaps in one process alone
    modules = [module for state in step.gradients.states for module in state.modules]
    warn_of_eval(modules, *(program for trainee in trainees for program in (trainee.model, trainee.guide)))
    saved = team.same(any(own.run is not None for own in trainees))
    kept = Signals().kept() if saved else nullcontext(Signals())
    with ProgressBar("epoch", plan.epochs, setup.progress) as bar, kept as signals:
        at_once = team if first.feed.device.type == "cpu" else ALONE  # a device is asked now and then
        watches = [
            Watch(
                own.eager, partial(getattr, own, "checkpoint"), setup.skips, "" if alone else f"replica {r}: ", at_once
            )
            for r, own in enumerate(trainees)
        ]
        progress = Progress(trainees, watches, signals)
        for epoch in range(len(first.result.history), 0 if first.result.finished else plan.epochs):
            with memory_advice(lambda: setup.advice(first.checkpoint)), lone_datum_advice(), ExitStack() as inside:
                for watch, trainee in zip(watches, trainees, strict=True):
                    inside.enter_context(watch.epoch(trainee.optimizer))
                metrics = run_epoch(epoch, first.feed, step, plan, watches, progress)
            losses = [watch.mean(epoch + 1) for watch in watches]
            shown = progress.metrics()
            with progress.measuring():
                found = [
                    own.measured(metrics | shown[r] | watches[r].counts, losses[r]) for r, own in enumerate(trainees)
                ]
            for own, row in zip(trainees, found, strict=True):
                own.add(row)
            mean = "" if alone else " on average"
            bound, speed = -sum(losses) / len(losses), metrics["images_per_second"]
            bar.update(epoch + 1, f"{bound:.2f} nats{mean}, {speed:,.0f} data/s")
            if all(trainee.result.finished for trainee in trainees):
                break
            if watched and team.any(on_epoch is not None and not first.show(on_epoch)):
                break
    return [trainee.close(step) for trainee in trainees]


def run_epoch(
    epoch: int, feed: Feed, step: Step | Recorded, plan: Plan, watches: Sequence[Watch], progress: Progress
) -> dict[str, float]:
    """One pass over the data: what the epoch was; ``watches`` take in what its steps came to."""
    outcomes = Outcomes(watches, step, feed)
    ahead = Ahead(epoch, feed, step, plan, outcomes)
    progress.begin(ahead, outcomes)
    feed.source.epoch = epoch
    step.gradients.look_again()
    for batch in feed.indices(ahead) if step.takes_index else feed.batches(ahead):
        step.set_lr(plan.factor(ahead.now()))
        # What Pyro's own checks can find they find at the first step; later they cost time, and hide what became NaN.
        with nullcontext() if epoch == ahead.steps == 0 else pyro.validation_enabled(False):
            outcomes.take(plan.at(ahead.now()), batch, epoch, ahead.steps)
        ahead.steps, ahead.data = ahead.steps + 1, ahead.data + number_in(feed, batch)
        progress()
    if not ahead.data:
        raise DataError(f"epoch {epoch + 1} had no data: pass a data set that gives them in every epoch")
    outcomes.read()
    seconds, cpu_seconds = progress.seconds()
    return {
        "epoch": epoch + 1, "kl_weight": float(getattr(plan.at(ahead.now(-1)), "kl_weight", 1.0)),
        "num_particles": plan.at(ahead.now(-1)).num_particles, "seconds": seconds, "steps": ahead.steps,
        "cpu_seconds": cpu_seconds, "images_per_second": ahead.data / seconds,
    }  # fmt: skip
