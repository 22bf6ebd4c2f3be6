"""A run as it is read: whatever is changed, damaged or of another run is refused."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict, TypeVar, cast

import torch
from safetensors.torch import load
from torch import Tensor

from pyrovae.engine.programs import warn
from pyrovae.errors import CheckpointError
from pyrovae.memory import require_memory
from pyrovae.runs.classes import public_path
from pyrovae.runs.files import CONFIG, MANIFEST, METRICS, RESULTS, STATE, WEIGHTS, read, read_json, reason, undamaged
from pyrovae.runs.manifest import Manifest, digest, holds, newer, read_manifest, sha256

T = TypeVar("T")
TRIES = 10  # readings of a checkpoint that is replaced meanwhile


class Within(TypedDict):
    """How far an epoch is that a checkpoint is within, and what came of it so far."""

    steps: int
    data: int
    seconds: float
    cpu_seconds: float
    outcomes: dict[str, float]
    metrics: dict[str, float]  # of the last step


class LateState(TypedDict, total=False):
    """What checkpoints of before did not say: of batches unlike the first and what they reach, of parts of epochs."""

    order: list[str]  # of the optimizer's parameters, by name
    late: list[str]  # the names of the tensors
    examples: list[tuple[int, tuple[Any, ...]]]  # seeds and batches that reach them
    met: dict[str, int]  # how many of each other size there were
    within: Within | None
    place: dict[str, Any]  # in the data


class State(LateState):
    """The training loop's state at a checkpoint; within an epoch, ``epoch`` of them are behind it."""

    epoch: int
    best_epoch: int | None
    finished: bool
    optimizer: dict[str, Any]
    rng: dict[str, Any]


def check_state(state: object) -> State:
    """A state whose parts are of the kinds that they must be of, or a ValueError."""
    if not (isinstance(state, dict) and State.__required_keys__ <= state.keys()):
        raise ValueError("it is no state of a run")
    epoch, best = state["epoch"], state["best_epoch"]
    order, late, examples = (state.get(name) or [] for name in ("order", "late", "examples"))
    if type(epoch) is not int or epoch < 0 or not (best is None or (type(best) is int and 1 <= best <= epoch)):
        raise ValueError(f"its epoch is {epoch!r} and its best epoch {best!r}")
    if type(state["finished"]) is not bool or not (
        isinstance(state["optimizer"], dict) and isinstance(state["rng"], dict)
    ):
        raise ValueError("it is no state of a run")
    if (within := state.get("within")) is not None:
        check_within(within)
    if not all(isinstance(name, str) for name in [*order, *late]):
        raise ValueError("it names parameters by what is no text")
    if not all(type(seed) is int and isinstance(batch, tuple) for seed, batch in examples):
        raise ValueError("it holds examples that are no batches")
    met = state.get("met", {})
    if not (isinstance(met, dict) and all(type(count) is int for count in met.values())):
        raise ValueError("it counts batches by what are no numbers")
    return cast(State, state)


def check_within(within: object) -> None:
    """A ValueError where something is not :class:`Within`."""
    if not (isinstance(within, dict) and Within.__required_keys__ <= within.keys()):
        raise ValueError("it does not say how far its epoch is")
    outcomes, metrics = within["outcomes"], within["metrics"]
    if not all(isinstance(part, dict) for part in (outcomes, metrics)):
        raise ValueError("it does not say how far its epoch is")
    counts = [within["steps"], within["data"]]
    numbers = [within["seconds"], within["cpu_seconds"], *outcomes.values(), *metrics.values()]
    if not all(type(n) is int and n > 0 for n in counts) or not all(type(n) in (int, float) for n in numbers):
        raise ValueError(f"its epoch has {counts} steps and data, and came to {numbers}")


class Reader(os.PathLike[str]):
    """What is read of one run directory.

    :param override: warn of what was changed since it was written, or is not known, instead of refusing it.
    :ivar loaded: the SHA-256 of the weights that were read last.
    :raises CheckpointError: for files that are absent, damaged, changed or of another run.
    """

    def __init__(self, path: str | os.PathLike[str], *, override: bool = False) -> None:
        self.path, self.override, self.loaded = Path(path), override, ""

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def exists(self) -> bool:
        """Whether a run was started here."""
        return (self.path / CONFIG).is_file()

    def doubt(self, message: str, error: type[ValueError] = CheckpointError) -> None:
        """Refuse what was changed, but for a user who goes on knowingly."""
        if not self.override:
            raise error(f"{message}, or go on knowingly with --override (override=True)")
        warn(message)

    def config(self) -> dict[str, Any]:
        """What the run was made of, its classes by their paths of today; or a CheckpointError.

        By name: model and objective (class and arguments, or None), versions, training, settings and data, or more.
        """
        path = self.path / CONFIG
        try:
            config = read_json(path)
            if not (isinstance(config, dict) and config.keys() & {"format_version", "versions"}):
                raise ValueError("it is no config of a run")
        except PermissionError:
            raise
        except (OSError, ValueError) as error:
            absent = isinstance(error, FileNotFoundError | NotADirectoryError)
            why = f"{CONFIG} is {'absent' if absent else f'unreadable ({reason(error)})'}"
            raise CheckpointError(f'"{self.path}" holds no run: {why}; pass the folder that training wrote') from error
        if by := newer(config):
            self.doubt(f'"{path}" is of {by}, which is newer than this pyrovae: update it')
        elif "format_version" in config and config.get("sha256") != digest(config):
            self.doubt(f'"{path}" was changed since it was written: restore it')
        for described in (config.get("model"), config.get("objective")):
            if isinstance(described, dict) and "class" in described:
                described["class"] = public_path(str(described["class"]))
        return config

    def results(self) -> dict[str, Any]:
        """What was measured last, or nothing."""
        path = self.path / RESULTS
        if not path.exists():
            return {}
        with undamaged(path, f"run pyrovae evaluate {self.path}"):
            results = read_json(path)
            if not isinstance(results, dict):
                raise ValueError(f"it holds a {type(results).__name__}")
            return results

    def history(self) -> list[dict[str, Any]]:
        """The metrics of every epoch; a last line cut short by a crash is left out."""
        path, rows = self.path / METRICS, []
        with undamaged(path):
            text = read(path).decode("utf-8-sig", errors="replace") if path.exists() else ""
        with suppress(ValueError, RecursionError):
            for line in text.splitlines():
                rows.append(json.loads(line))
        return list(itertools.takewhile(lambda row: isinstance(row, dict), rows))

    def checkpoint(self, name: str = "last") -> Path | None:
        """The folder of a checkpoint, or None. A crash between two renames leaves it under the old name."""
        return next((place for end in ("", ".old") if (place := self.path / f"{name}{end}").is_dir()), None)

    def folder(self, name: str = "last") -> Path:
        """The folder of a checkpoint, which must be there."""
        if (folder := self.checkpoint(name)) is None:
            raise CheckpointError(
                f'"{self.path}" has no checkpoint "{name}": train at least one epoch, or pass another run'
            )
        return folder

    def digest(self, name: str = "last") -> str:
        """What the weights of a checkpoint are known by: the SHA-256 of their file."""
        return self.read(name, WEIGHTS, lambda _: None)[1]

    def weights(self, name: str = "last") -> dict[str, Tensor]:
        """The tensors of a checkpoint."""

        def tensors(path: Path) -> tuple[dict[str, Tensor], bool]:
            require_memory(path.stat().st_size, f'the weights in "{path}"', "take a machine with more")
            # load_file takes no path that is not UTF-8
            return load(path.read_bytes()), self.manifest(path.parent) is None

        (weights, old), self.loaded = self.read(name, WEIGHTS, tensors)
        if old:
            warn(f'"{self.path}" was made before runs had manifests: whether files or data were changed is not known')
        return weights

    def state(self) -> State | None:
        """The loop's state at the last checkpoint, or None before the first."""
        if self.checkpoint() is None:
            return None
        return self.read(
            "last", STATE, lambda path: check_state(torch.load(path, map_location="cpu", weights_only=True))
        )[0]

    def read(self, name: str, file: str, load: Callable[[Path], T]) -> tuple[T, str]:
        """What a checkpoint's file holds, found to be as it was saved, and its SHA-256; again if replaced meanwhile."""
        for _ in range(TRIES):
            before = self.identity(name)
            try:
                folder = self.folder(name)
                found = self.check_file(folder, file)
                with undamaged(folder / file):
                    return load(folder / file), found or sha256(folder / file)
            except (CheckpointError, FileNotFoundError) as error:
                failed = error
                if self.identity(name) == before:
                    break
        raise failed

    def identity(self, name: str) -> tuple[int, ...]:
        """What tells the checkpoint that is now there from all others."""
        with suppress(OSError):
            found = os.stat(self.path / name)
            return found.st_ino, found.st_mtime_ns
        return ()

    def check_file(self, folder: Path, name: str) -> str:
        """A file's SHA-256 ("" if none is stated), refused if another is; the metrics' until then, as they may grow."""
        grows = name == METRICS
        path = (self.path if grows else folder) / name
        if not path.is_file():
            raise CheckpointError(f'"{path}" is missing: restore it, or train again')
        if (manifest := self.manifest(folder)) is None or (grows and name not in manifest["files"]):
            return ""
        if (stated := manifest["files"].get(name)) and holds(path, stated, grows=grows):
            return stated["sha256"]
        self.doubt(f'"{path}" is damaged or was changed, its SHA-256 is another: restore it, or train again')
        return ""

    def manifest(self, folder: Path) -> Manifest | None:
        """What a checkpoint says of its files; nothing for a run of before there were manifests."""
        run = self.config().get("run")
        if not (folder / MANIFEST).exists():
            if run is not None:
                self.doubt(f'"{folder / MANIFEST}" is missing: restore it, or train again')
            return None
        manifest = read_manifest(folder)
        if by := newer(manifest):
            self.doubt(f'"{folder}" is of {by}, which is newer than this pyrovae: update it')
        if manifest["run"] != run:
            self.doubt(f'"{folder}" is the checkpoint of another run than "{self.path / CONFIG}": restore either')
        return manifest
