"""The one visible training loop."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyro.infer
import torch
from torch import Tensor
from torch.optim import Optimizer

from pyrovae.arguments import DataError, in_range, one_of, pick_device, positive_int
from pyrovae.compile.checked import check_compile
from pyrovae.compile.precision import PRECISIONS
from pyrovae.data.feed import Feed
from pyrovae.engine.probe import Reach, find_parameters
from pyrovae.engine.programs import Program, device_of, eval_mode, protected_buffers
from pyrovae.engine.randomness import isolated_rng
from pyrovae.engine.sites import Sites, counts, log_prob, record_pair
from pyrovae.memory import memory_advice
from pyrovae.progress import ProgressBar
from pyrovae.schedules import Schedule
from pyrovae.train.compiled import choose_stepper
from pyrovae.train.log import Fit, Log, describe_pair
from pyrovae.train.monitor import Monitor, Validation
from pyrovae.train.plan import Plan
from pyrovae.train.step import Stepper


def fit(
    model: Program,
    guide: Program,
    data: Any,
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
    validation: Any = None,
    patience: int | None = None,
    compile: bool | str = "auto",
    precision: str = "float32",
    device: str | torch.device = "auto",
    num_workers: int | None = None,
    seed: int = 0,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    config: dict[str, Any] | None = None,
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
    epochs, batch_size = positive_int("epochs", epochs), positive_int("batch_size", batch_size)
    plan = Plan.make(objective, epochs, schedule, particles, kl_warmup)
    place = pick_device(device)
    rate, made = make_optimizer(optimizer, lr)
    clip = None if clip_norm is None else in_range("clip_norm", clip_norm, 1e-12)
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise ValueError(f"seed must be an integer, got {seed!r}: pass one, and another one for another run")
    if patience is not None and validation is None:
        raise ValueError("patience needs data to validate on: pass validation, or leave patience out")
    patience = None if patience is None else positive_int("patience", patience)
    check_compile(compile)
    one_of("precision", precision, PRECISIONS)
    if resume and run_dir is None:
        raise ValueError("resume=True needs the folder of the run to go on with: pass run_dir")

    with isolated_rng(seed):
        feed = Feed(data, batch_size, place, num_workers)
        pair = prepare(model, guide, feed)
        _warn_of_batches(model, guide, feed)
        stepper = choose_stepper(compile, plan, pair, feed)(
            model, guide, pair, made(list(pair.parameters.values())), feed.first(),
            clip_norm=clip, precision=precision,
        )  # fmt: skip
        monitor = Monitor(model, guide, pair.modules, feed)
        validate = None
        if validation is not None:
            held_out = Feed(validation, batch_size, place, num_workers)
            check_data(model, guide, held_out)
            validate = Validation(model, guide, pair.modules, held_out, plan.final)
        log = Log(run_dir, pair, stepper.optimizer, resume)
        training = describe_training(plan, feed, stepper, schedule, rate, batch_size, seed) | {
            "patience": patience, "compile": compile,
            "num_validation": None if validate is None else validate.feed.size,
        }  # fmt: skip
        result = log.open(describe_pair(model, guide, objective) | {"training": training} | (config or {}))
        with eval_mode(pair.modules, training=True), ProgressBar("epoch", epochs, progress) as bar:
            for epoch in range(len(result.history), 0 if result.finished else epochs):
                with memory_advice(lambda: _lower(plan, batch_size, precision, log.checkpoint)):
                    loss, metrics = run_epoch(epoch, feed, stepper, plan)
                if math.isnan(loss) or not stepper.finite():
                    raise FloatingPointError(_blame(model, guide, feed.first(), epoch + 1, log.checkpoint))
                metrics |= {"bound": -float(loss)} | stepper.metrics() | monitor()
                if validate is not None:
                    metrics["validation_bound"] = validate()
                result.add(metrics, patience)
                log.write(result)
                bar.update(epoch + 1, f"{metrics['bound']:.2f} nats, {metrics['images_per_second']:,.0f} images/s")
                if result.finished:
                    break
        result.finish(stepper, place)
        log.close(result)
    return result


def make_optimizer(make: Any, lr: float | None) -> tuple[float | None, Callable[[Iterable[Tensor]], Optimizer]]:
    """The learning rate, where it is ours to know, and what makes the optimizer."""
    if make is None:
        rate = 1e-3 if lr is None else in_range("lr", lr, 0.0)
        return rate, lambda parameters: torch.optim.Adam(parameters, lr=rate, fused=True)
    if lr is not None:
        raise ValueError(f"lr={lr} belongs to the default optimizer: set it in optimizer=, or leave optimizer out")
    if isinstance(make, Optimizer) or not callable(make):
        raise TypeError(
            f"optimizer must be a function of the parameters, got {type(make).__name__}: "
            "pass, for instance, lambda parameters: torch.optim.SGD(parameters, lr=0.1)"
        )

    def checked(parameters: Iterable[Tensor]) -> Optimizer:
        made = make(parameters)
        if not isinstance(made, Optimizer):
            raise TypeError(f"optimizer must return a torch.optim optimizer, got {type(made).__name__}: return one")
        return made

    return None, checked


def describe_training(
    plan: Plan, feed: Feed, stepper: Stepper, schedule: Any, rate: Any, batch_size: int, seed: int
) -> dict[str, Any]:
    """How a pair is trained, as JSON can hold it."""
    return {
        "epochs": plan.epochs, "batch_size": batch_size, "lr": rate, "optimizer": type(stepper.optimizer).__name__,
        "schedule": schedule if isinstance(schedule, str) else "custom",
        "particles": plan.particles, "kl_warmup": plan.kl_warmup, "clip_norm": stepper.clip_norm,
        "precision": stepper.precision, "device": str(feed.device), "seed": int(seed),
        "threads": torch.get_num_threads(), "num_data": feed.size,
    }  # fmt: skip


def prepare(model: Program, guide: Program, feed: Feed) -> Reach:
    """Find a pair's parameters, check the data against its observed sites, and move it to the device of the data."""
    home = device_of(model, guide)
    batch = tuple(a.to(home) if home and isinstance(a, Tensor) else a for a in feed.first())

    pair = find_parameters(model, guide, batch, lambda joint: _check_observed(joint, batch, feed))
    pair.to(feed.device)
    return pair


def _warn_of_batches(model: Program, guide: Program, feed: Feed) -> None:
    """Say so if latents are shared by all data, and yet each batch would count as all of them."""
    if feed.steps == 1:
        return
    with torch.no_grad(), isolated_rng(), protected_buffers(), pyro.validation_enabled(False):
        drawn, joint = record_pair(model, guide, feed.first(), {})
    sites = [s for s in (*drawn.values(), *joint.values()) if counts(s)]
    plates = [{f.name: f for f in s["cond_indep_stack"]} for s in sites]
    everywhere = set.intersection(*(set(p) for p in plates))
    subsampled = any(f.full_size and f.full_size > f.size for p in plates for f in p.values())
    if not everywhere and any(plates) and not subsampled:
        warnings.warn(
            "latents outside the data plate are shared by all data, but each batch will count as all of them: pass "
            'batch_size=len(data), or give the plate its full size, pyro.plate("data", N, subsample_size=...)',
            stacklevel=3,
        )


def check_data(model: Program, guide: Program, feed: Feed) -> None:
    """Check the data of a pair that is prepared already."""
    batch = feed.first()
    with torch.no_grad(), isolated_rng(), protected_buffers(), pyro.validation_enabled(False):
        _, joint = record_pair(model, guide, batch, {})
    _check_observed(joint, batch, feed)


def _check_observed(sites: Sites, batch: tuple[Any, ...], feed: Feed) -> None:
    for name, site in sites.items():
        if not (counts(site) and site["is_observed"] and site["value"].numel()):
            continue
        for position, argument in enumerate(batch):
            if isinstance(argument, Tensor) and argument.data_ptr() == site["value"].data_ptr():
                feed.check(position, site["fn"].support, name, site["fn"].event_shape)


def run_epoch(epoch: int, feed: Feed, step: Any, plan: Plan) -> tuple[Tensor, dict[str, Any]]:
    """One pass over the data: the mean loss, read back once at its end, and what the epoch was."""
    total: Any = 0.0
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
    loss = torch.as_tensor(total / data).cpu()
    seconds = time.perf_counter() - step.compile_seconds - began
    return loss, {
        "epoch": epoch + 1,
        "kl_weight": float(getattr(plan.at(now), "kl_weight", 1.0)),
        "num_particles": plan.at(now).num_particles,
        "seconds": seconds,
        "steps": steps,
        "images_per_second": data / seconds,
    }


def _lower(plan: Plan, batch_size: int, precision: str, checkpoint: Path | None) -> str:
    """What to lower where memory runs out."""
    asked = f"batch_size={batch_size} with {getattr(plan.current, 'total_particles', 1)} particles"
    bfloat = "" if precision == "bfloat16" else ', or pass precision="bfloat16"'
    kept = f'; the last checkpoint is in "{checkpoint}"' if checkpoint is not None else ""
    return f"asked for {asked}; lower either{bfloat}{kept}"


def _blame(model: Program, guide: Program, batch: tuple[Any, ...], epoch: int, checkpoint: Path | None) -> str:
    """Say where the first value that is not finite came from."""
    with torch.no_grad(), isolated_rng(), protected_buffers(), pyro.validation_enabled(False):
        drawn, joint = record_pair(model, guide, batch, {})
    where = next(
        (
            f'{role} site "{name}" has the first value or log-probability that is not finite'
            for role, sites in (("guide", drawn), ("model", joint))
            for name, s in sites.items()
            if counts(s) and not (torch.isfinite(log_prob(s)).all() and torch.isfinite(s["value"]).all())
        ),
        "every site is finite on the first batch",
    )
    kept = f'; the last good checkpoint is in "{checkpoint}"' if checkpoint is not None else ""
    return f"the loss or a parameter became NaN in epoch {epoch}: {where}{kept}; lower lr, or pass clip_norm"
