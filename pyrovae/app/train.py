"""The main job: train, measure, draw."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from pyrovae import runs
from pyrovae.app.card import write_card
from pyrovae.app.job import TERMS, Task, Terms, as_seen_by, run_of
from pyrovae.app.live import to_tensorboard
from pyrovae.app.measure import check_test, measure
from pyrovae.app.parts import keywords
from pyrovae.app.pictures import pictures
from pyrovae.app.results import Results, belongs, readable_results
from pyrovae.app.settings import CODES, Settings
from pyrovae.app.tables import print_results
from pyrovae.arguments import pick_device, positive_int
from pyrovae.engine.randomness import rng_snapshot
from pyrovae.models import CodePrior
from pyrovae.models.base import Rule
from pyrovae.plots.images import is_image
from pyrovae.ranks import alone, ranks
from pyrovae.train.log import Fit
from pyrovae.train.loop import fit
from pyrovae.train.resuming import FINGERPRINTS, check_data, check_same
from pyrovae.train.trainee import OnEpoch


def train(
    job: Settings,
    *,
    run_dir: Path | None,
    resume: bool,
    explicit: set[str],
    tensorboard: bool = False,
    terms: Terms = TERMS,
    out: Console,
) -> None:
    """Train a model, measure it, draw its pictures, all in one run: the main job.

    :param explicit: names of the settings that were given, which a resumed run must not have begun without.
    :param tensorboard: write every epoch for TensorBoard as well.
    """
    team, out.quiet = ranks(), out.quiet or not ranks().first
    with ExitStack() as held:
        with team.together():
            run = held.enter_context(run_of(job, run_dir, resume, terms)) if team.first else None
        on_epoch = to_tensorboard(run.path) if tensorboard and run is not None else None
        train_in(run, job, resume=resume, explicit=explicit, on_epoch=on_epoch, terms=terms, out=out)


def train_in(
    run: runs.Run | None, job: Settings, *, resume: bool, explicit: set[str], on_epoch: OnEpoch | None, terms: Terms,
    out: Console,
) -> None:  # fmt: skip
    """The main job in a run that no other process writes to; in the others of several, the parts that all share."""
    team = ranks()
    with team.together():
        begun = job if run is None else settings_of(run, job, resume=resume, explicit=explicit)
    job, exists, folder = team.same((begun, run is not None and run.exists, None if run is None else run.path))
    with team.together():
        positive_int("samples", job.samples)
        pick_device(job.device)
        task = Task.of(job, terms, named=not exists or "model" in explicit, explicit=explicit)
        pair, test = task.pair, task.splits.test
        check_test(pair, test)
    rule, held_out = pair.train_on, task.splits.validation
    method = str(task.parts.objective) if rule is None else "its own rule"
    name, kind = type(pair.module).__name__, "images" if is_image(task.training.event_shape) else "data"
    out.print(f"{name} on {job.data} ({len(task.training):,} {kind}), {method}, run in {folder}")
    if rule is None:
        result = fit(
            pair.model, pair.guide, task.training, objective=task.parts.objective, epochs=job.epochs,
            batch_size=job.batch_size, lr=job.lr, device=job.device, seed=job.seed, run_dir=run or folder,
            resume=resume, validation=None if held_out is None else as_seen_by(pair, held_out), config=task.config(),
            on_epoch=on_epoch, **task.parts.fit,  # type: ignore[arg-type]
        )  # fmt: skip
    elif run is None or not team.alone:
        raise ValueError(f"{name} is trained by a rule of its own, in one process: start one")
    else:
        result = train_by_rule(rule, task, run)
        if on_epoch is not None:
            on_epoch(result)
    if team.same(run is not None and belongs(readable_results(run), run)):
        out.print(f'the run "{folder}" is finished; its results are in {runs.RESULTS}')
        return
    if (t := result.timings).get("steps"):
        speed = f"{t['ms_per_step']:.2f} ms a step, {t['path']}"
        several = "" if team.alone else f", {team.size} processes"
        epochs = f"{len(result.history)} epoch{'s' * (len(result.history) != 1)}"
        out.print(f"trained {epochs} in {t['seconds']:.1f} s ({speed}{several})")
    results = measure(pair, test, samples=job.samples, seed=job.seed)
    with alone():
        if run is not None:
            finish(run, task, result, results, terms, out)


def settings_of(run: runs.Run, job: Settings, *, resume: bool, explicit: set[str]) -> Settings:
    """The settings of a run that begins, or goes on."""
    run.check_files()
    if not resume:
        run.check_absent()
    if not run.exists:
        return job
    given = {name: value for name, value in dataclasses.asdict(job).items() if name in explicit}
    with runs.opening(run.path):
        return Settings.of(run.config().get("settings", dataclasses.asdict(job)) | given)


def finish(run: runs.Run, task: Task, result: Fit, results: Results, terms: Terms, out: Console) -> None:
    """Write what came of a job into its run, pictures too."""
    job, pair, test, folder = task.job, task.pair, task.splits.test, run.path
    if pair.after_training(task.training):
        run.save("last", pair.module.state_dict(), run.state())
    if task.vqvae is not None and isinstance(pair, CodePrior):
        joined = runs.Run(folder / "vqvae")
        task.vqvae.with_prior(pair)
        source = terms.run(job.data.removeprefix(CODES))
        with joined.writing():
            joined.start(source.config() | {"model": runs.describe(task.vqvae)})
            joined.save("last", task.vqvae.state_dict())
        out.print(f'the VQ-VAE with this prior is the run "{joined.path}": pyrovae evaluate {joined.path}')
    drawn = pictures(pair, task.training, test, result.history, folder, seed=job.seed)
    seconds = sum(row["seconds"] for row in result.history) / max(len(result.history), 1)
    results |= {"timings": result.timings, "seconds_per_epoch": seconds, "checkpoint": "last", "weights": run.digest()}
    runs.write_json(folder / runs.RESULTS, results)
    write_card(run)
    print_results(results, out)
    out.print(f"pictures in {folder}: " + ", ".join(drawn))
    own = "" if runs.class_path(type(pair.module)).startswith("pyrovae.") else " --trust"
    out.print(f"to explore it in a browser: pyrovae report {folder}{own}")


def train_by_rule(rule: Rule, task: Task, run: runs.Run) -> Fit:
    """Train a pair by its own rule; it is saved in the end, and begins anew if it did not get there."""
    job, pair = task.job, task.pair
    config = {"model": runs.describe(pair), "objective": None, "versions": runs.versions()} | task.config()
    if run.exists and (state := run.state()) is not None and state["finished"]:
        check_finished(run, config)
        runs.restore(dict(pair.state_dict(keep_vars=True)), run.weights(), run)
        return Fit(run.history_until(state["epoch"]), finished=True)
    default, takes, place = Settings(), keywords(rule), pick_device(job.device)
    common = {"epochs": job.epochs, "batch_size": job.batch_size, "lr": job.lr}
    changed = {name: value for name, value in common.items() if value != getattr(default, name)}
    for name, value in changed.items():
        if name not in takes:
            raise ValueError(f"{type(pair.module).__name__} has no {name}, got {value!r}: leave it out")
    always = {name: value for name, value in (("seed", job.seed), ("device", place)) if name in takes}
    run.start(config)
    pair.to(place)
    history = rule(task.training, **changed, **always, **task.parts.fit)
    for row in history:
        run.log(row)
    state = {"epoch": len(history), "best_epoch": None, "finished": True, "optimizer": {}, "rng": rng_snapshot()}
    run.save("last", pair.state_dict(), state)
    return Fit(history, finished=True)


def check_finished(run: runs.Run, config: Mapping[str, Any]) -> None:
    """Refuse other settings or data for a run that its pair's own rule has finished: it does not go on."""
    check_data(run, config[FINGERPRINTS])
    then, now = run.config(), config["settings"]
    check_same(run, then, config)
    may = ("device", "data_dir", "samples")
    changed = {k: v for k, v in now.items() if then["settings"].get(k) != v and k not in may}
    if changed:
        raise ValueError(
            f'"{run.path}" was trained by a rule of its own, which does not go on, got {changed}: train another run'
        )
