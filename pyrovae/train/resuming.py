"""Whether a run may go on: on the data and under the settings that it began with, for as many epochs or for more."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyro.infer
import torch
from torch import Tensor

from pyrovae import runs
from pyrovae.data.feed import Feed
from pyrovae.data.streams import digest
from pyrovae.engine.probe import PairState
from pyrovae.engine.programs import warn
from pyrovae.errors import CheckpointError, DataError
from pyrovae.runs.reading import State
from pyrovae.train.log import describe_objective
from pyrovae.train.plan import Setup

FINGERPRINTS = "fingerprints"  # in a config: of each part of the data
#: Between a run and its resumption.
MAY_CHANGE = ("threads", "processes", "device", "compile", "compiled", "on_nan", "epochs")
Begun = tuple[Path, State, dict[str, Tensor], dict[str, Any] | None]  # place, state, weights, another config
OF_DATA = ("num_data", "num_validation", "shape")  # which change with them


def with_fingerprints(config: Mapping[str, object], **feeds: Feed | None) -> dict[str, object]:
    """A run's config that says what its data hold, those that are held in tensors, if it does not say so yet."""
    if FINGERPRINTS in config:
        return dict(config)
    found = {name: feed.fingerprint for name, feed in feeds.items() if feed is not None and feed.fingerprint}
    return {FINGERPRINTS: found, **config}


def begun_with(run: runs.Run | None, setting: str) -> object:
    """How a run that is there was begun; None where it does not say."""
    training = run.config().get("training") if run is not None and run.exists else None
    return training.get(setting) if isinstance(training, dict) else None


def check_data(run: runs.Run, now: Mapping[str, str]) -> bool:
    """Refuse data of another content than the run's, but for a user who goes on knowingly; whether they are of another.

    :raises DataError: naming each part that changed, as it was and as it is.
    """
    then = run.config().get(FINGERPRINTS)
    then = then if isinstance(then, dict) else {}
    changed = [part for part in now if part in then and then[part] != now[part]]
    if changed:
        found = "; ".join(f"{part} was {then[part]}, is {now[part]}" for part in changed)
        run.doubt(f'the data of "{run.path}" changed since it was begun ({found}): put them back', DataError)
    return bool(changed)


def check_resumable(run: runs.Run, config: Mapping[str, Any], done: int) -> dict[str, Any] | None:
    """Refuse to go on with other settings or data; what the run's config must say from now on, if that is another.

    That is another total of epochs, or other data that the user took knowingly.

    :param done: the epochs that are behind the run, and the one that it is in.
    """
    then, epochs = run.config(), config["training"]["epochs"]
    changed = check_data(run, config[FINGERPRINTS])
    check_same(run, then, config, but=(*MAY_CHANGE, *(OF_DATA if changed else ())))
    before = training.get("epochs") if isinstance(training := then.get("training"), dict) else None
    if epochs < done:
        raise ValueError(
            f'"{run.path}" has begun {done} epochs, got epochs={epochs}: pass {done} or more, or train another run'
        )
    if epochs != before:
        warn_of_total(config["training"], before, done)
    if epochs == before and not changed:
        return None
    return then | {part: config[part] for part in ("training", "settings", FINGERPRINTS) if part in config}


def begun(run: runs.Run, config: Mapping[str, Any]) -> Begun | None:
    """What a run holds to go on from, which may; None for one that begins here."""
    saved = run.state() if run.exists else None
    if saved is None:
        if run.exists and len(run.history()) > 1:  # the first epoch is always saved
            raise CheckpointError(
                f'"{run.path / "last"}" is missing, the checkpoint of a run: restore it, or train again'
            )
        run.start(config)
        return None
    run.check_files()
    run.history_until(saved["epoch"])
    amended = check_resumable(run, config, saved["epoch"] + bool(saved.get("within")))
    if amended is not None and amended.get(FINGERPRINTS) != run.config().get(FINGERPRINTS):
        saved.pop("place", None)  # which was in other data
    return run.path, saved, run.weights(), amended


def check_same(
    run: runs.Run, then: Mapping[str, object], config: Mapping[str, object], but: tuple[str, ...] = MAY_CHANGE
) -> None:
    """A run goes on under the settings it began with, or its result would be neither one's nor the other's."""
    for part in ("model", "objective", "training", "data"):
        old, new = (said if isinstance(said := runs.as_json(c.get(part)), dict) else {} for c in (then, config))
        changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and k not in but]
        if changed:
            was, now = ({k: settings.get(k) for k in changed} for settings in (old, new))
            raise ValueError(f'"{run.path}" was begun with {part} {was}, got {now}: resume with the same settings')


def warn_of_total(training: Mapping[str, Any], before: object, done: int) -> None:
    """Say what another total of epochs changes for those to come: whatever is spread over all of them."""
    schedule, stages = training["schedule"], training["particles"] or ()
    spread = [f'the schedule "{schedule}"'] * (schedule != "constant") + ["the stages of particles"] * (len(stages) > 1)
    if spread:
        warn(
            f"the run goes on to {training['epochs']} epochs, it was begun with {before}: from epoch {done + 1} on "
            f"{' and '.join(spread)} will be as in a run of {training['epochs']}, unlike the epochs before"
        )


def facts_of(setup: Setup, feed: Feed, state: PairState, objective: pyro.infer.ELBO) -> dict[str, object]:
    """What processes that train together must have in common."""
    settings = setup.describe(feed)
    shapes = [(name, tuple(t.shape), str(t.dtype)) for name, t in state.tensors.items()]
    return {
        "versions": runs.versions(),
        **{name: value for name, value in settings.items() if name not in ("device", "threads", "num_data")},
        "objective": describe_objective(objective),
        "data": known_by(feed),
        "tensors of the pair": (len(shapes), hashlib.sha256(repr(shapes).encode()).hexdigest()[:8]),
    }  # fmt: skip


def known_by(feed: Feed) -> tuple[object, ...]:
    """What data are told from others by: also where a sampler or a stream gives each process some of its own."""
    return feed.size, feed.fingerprint, digest(feed.first())


def state_of(parameters: Iterable[Tensor]) -> dict[str, object]:
    """What must be alike in all processes after each epoch, or they would go on with pairs of their own."""
    said = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
    for parameter in parameters:
        said.update(str(float(parameter.detach().double().sum())).encode())
    return {"noise and weights": said.hexdigest()[:8]}
