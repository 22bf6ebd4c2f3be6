"""The main job: train, evaluate, draw."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pyrovae import data as datasets
from pyrovae import runs
from pyrovae.app.job import _folder, _join, as_seen_by, build, describe_data, load_data, observes_bits, reopen
from pyrovae.app.measure import measure
from pyrovae.app.pictures import pictures
from pyrovae.app.settings import CODES, Parts, Settings, keywords, trains_itself
from pyrovae.app.tables import print_results
from pyrovae.arguments import pick_device, positive_int
from pyrovae.engine.randomness import rng_snapshot
from pyrovae.train.log import Fit
from pyrovae.train.loop import fit


def train(job: Settings, *, run_dir: Path | None, resume: bool, explicit: set[str], out: Console) -> None:
    """Train, evaluate, draw: the main job."""
    folder = _folder(job, run_dir, resume)
    run = runs.Run(folder)
    if trains_itself(job.model) and "objective" in explicit:
        raise ValueError(f"{job.model} has a rule of its own to train by, got objective {job.objective}: leave it out")
    if resume and run.exists and (then := run.config().get("settings")):
        changed = {k: v for k, v in dataclasses.asdict(job).items() if k in explicit}
        job = Settings(**(then | changed))
    parts, place = Parts.of(job, run=folder if resume else None), pick_device(job.device)
    positive_int("samples", job.samples)
    splits = load_data(job, parts)
    classes = None if splits.train.labels is None else int(splits.train.labels.max()) + 1
    vqvae = reopen(Path(job.data.removeprefix(CODES)))[0] if job.data.startswith(CODES) else None
    codes = None if vqvae is None else vqvae.quantizer.num_codes
    pair = build(parts, splits.train.event_shape, splits.train.x, job.seed, classes, codes)
    training = as_seen_by(pair, splits.train)
    if observes_bits(pair, training):
        splits = load_data(job, parts, binarization="dynamic")
        training = as_seen_by(pair, splits.train)
    alone = trains_itself(job.model)
    out.print(
        f"{type(pair).__name__} on {job.data} ({len(training):,} images), "
        f"{'its own rule' if alone else parts.objective}, run in {folder}"
    )
    config = {"settings": dataclasses.asdict(job), "data": describe_data(job.data, training)}
    if alone:
        result = _fit_alone(pair, training, job, parts.fit, run, resume, place, config)
    else:
        result = fit(
            pair.model, pair.guide, training, objective=parts.objective, epochs=job.epochs,
            batch_size=job.batch_size, lr=job.lr, device=place, seed=job.seed, run_dir=folder, resume=resume,
            validation=None if splits.validation is None else as_seen_by(pair, splits.validation),
            config=config, **parts.fit,
        )  # fmt: skip
    if (folder / runs.RESULTS).exists():
        out.print(f'the run "{folder}" is finished; its results are in {runs.RESULTS}')
        return
    if result.timings.get("steps"):
        t = result.timings
        speed = f"{t['ms_per_step']:.2f} ms a step, {t['path']}"
        out.print(f"trained {len(result.history)} epochs in {t['seconds']:.1f} s ({speed})")
    results = measure(pair, splits.test, samples=job.samples, seed=job.seed) | {"timings": result.timings}
    if hasattr(pair, "fit_density"):
        run.save("last", pair.fit_density(training).state_dict(), run.state())
    if vqvae is not None:
        joined = _join(vqvae.with_prior(pair), Path(job.data.removeprefix(CODES)), folder / "vqvae")
        out.print(f'the VQ-VAE with this prior is the run "{joined}": pyrovae evaluate {joined}')
    results["seconds_per_epoch"] = sum(row["seconds"] for row in result.history) / max(len(result.history), 1)
    drawn = pictures(pair, as_seen_by(pair, splits.test), splits.test.labels, result.history, folder, seed=job.seed)
    runs.write_json(folder / runs.RESULTS, results | {"checkpoint": "last"})
    print_results(results, out)
    out.print(f"pictures in {folder}: " + ", ".join(path.name for path in drawn))


def _fit_alone(
    pair: Any,
    training: datasets.Images,
    job: Settings,
    options: dict[str, Any],
    run: runs.Run,
    resume: bool,
    place: torch.device,
    config: dict[str, Any],
) -> Fit:
    """Train a model that has its own ``.fit``; it is saved in the end, and begins anew if it did not get there."""
    if run.exists and not resume:
        raise ValueError(f'"{run.path}" holds a run already: pass resume=True to go on with it, or another run_dir')
    if run.exists and (state := run.state()) is not None and state["finished"]:
        runs.restore(dict(pair.state_dict(keep_vars=True)), run.weights(), where=str(run.path))
        return Fit(run.history(), finished=True)
    asked = {k: getattr(job, k) for k in ("epochs", "batch_size", "lr") if getattr(job, k) != getattr(Settings, k)}
    takes = keywords(pair.fit)
    if unknown := [k for k in asked if k not in takes]:
        raise ValueError(f"{type(pair).__name__} has no {unknown[0]}, got {asked[unknown[0]]!r}: leave it out")
    run.start({"model": runs.describe(pair), "objective": None, "versions": runs.versions()} | config)
    given = asked | {k: v for k, v in (("seed", job.seed), ("device", place)) if k in takes}
    history = pair.to(place).fit(training, **given, **options)
    for row in history:
        run.log(row)
    state = {"epoch": len(history), "best_epoch": None, "finished": True, "optimizer": {}, "rng": rng_snapshot()}
    run.save("last", pair.state_dict(), state)
    return Fit(history, finished=True)
