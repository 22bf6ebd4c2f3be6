"""One run directory: config, checkpoints, metrics, resume. Nothing in it is code, and every write is atomic."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyrovae.errors import CheckpointError
from pyrovae.runs.classes import public_path
from pyrovae.runs.files import CONFIG, METRICS, RESULTS, STATE, WEIGHTS, as_json, reason, write_json, write_text
from pyrovae.runs.manifest import sha256


class LateState(TypedDict, total=False):
    """What a checkpoint says of tensors that the first batch does not reach; those of before said nothing."""

    order: list[str]  # of the optimizer's parameters, by name
    late: list[str]  # the names of the tensors
    examples: list[tuple[int, tuple[Any, ...]]]  # seeds and batches that reach them


class State(LateState):
    """The training loop's state at a checkpoint."""

    epoch: int
    best_epoch: int | None
    finished: bool
    optimizer: dict[str, Any]
    rng: dict[str, Any]


class Run:
    """One run directory, ``runs/NAME``.

    >>> import tempfile
    >>> run = Run(Path(tempfile.mkdtemp()) / "first")
    >>> run.start({"seed": 0})
    >>> run.log({"epoch": 1, "bound": -90.0})
    >>> run.history()
    [{'epoch': 1, 'bound': -90.0}]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def exists(self) -> bool:
        """Whether a run was started here."""
        return (self.path / CONFIG).is_file()

    def start(self, config: Mapping[str, object]) -> None:
        """Begin a run: make the folder, write its config, drop what an attempt without a checkpoint left."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / METRICS).unlink(missing_ok=True)
        write_json(self.path / CONFIG, config)

    def config(self) -> dict[str, Any]:
        """What the run was made of, its classes by their paths of today; or a CheckpointError.

        By name: model and objective (class and arguments, or None), versions, training, settings and data, or more.
        """
        try:
            config = json.loads((self.path / CONFIG).read_text(encoding="utf-8"))
            if not isinstance(config, dict):
                raise ValueError(f"it holds a {type(config).__name__}")
            for described in (config.get("model"), config.get("objective")):
                if isinstance(described, dict) and "class" in described:
                    described["class"] = public_path(str(described["class"]))
            return config
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f'"{self.path}" holds no run: {CONFIG} is absent or unreadable ({reason(error)}); pass the folder that '
                "pyrovae train or pyrovae.fit(run_dir=...) wrote"
            ) from error

    def log(self, metrics: Mapping[str, object]) -> None:
        """Append one epoch's metrics, and wait until they are on disk: no checkpoint may be ahead of them."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(as_json(metrics), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def results(self) -> dict[str, Any]:
        """What was measured last, or nothing."""
        path = self.path / RESULTS
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def history(self) -> list[dict[str, Any]]:
        """The metrics of every epoch; a last line cut short by a crash is left out."""
        path = self.path / METRICS
        rows = []
        with suppress(json.JSONDecodeError):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
                rows.append(json.loads(line))
        return list(itertools.takewhile(lambda row: isinstance(row, dict), rows))

    def rewind(self, epoch: int) -> list[dict[str, Any]]:
        """Forget the metrics of epochs after ``epoch``, which a resumed run will log again."""
        rows = self.history()[:epoch]
        if [row.get("epoch") for row in rows] != list(range(1, epoch + 1)):
            raise CheckpointError(
                f'"{self.path / METRICS}" is damaged: its epochs do not run from 1 to {epoch}, where the '
                "last checkpoint is; restore it, or train again"
            )
        write_text(self.path / METRICS, "".join(json.dumps(row) + "\n" for row in rows))
        return rows

    def save(self, name: str, weights: Mapping[str, Tensor], state: Mapping[str, object] | None = None) -> None:
        """Write the checkpoint ``name`` ("last" or "best") aside, then swap it in."""
        new, old = self.path / f"{name}.new", self.path / f"{name}.old"
        if old.exists() and not (self.path / name).exists():  # a crash came between two renames: the old one counts
            old.replace(self.path / name)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in weights.items()}, new / WEIGHTS)
        if state is not None:
            torch.save(dict(state), new / STATE)
        for path in new.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(old, ignore_errors=True)
        if (self.path / name).exists():
            (self.path / name).replace(old)
        new.replace(self.path / name)
        shutil.rmtree(old, ignore_errors=True)

    def checkpoint(self, name: str = "last") -> Path | None:
        """The folder of a complete checkpoint, or None. A crash between two renames leaves it under the old name."""
        places = self.path / name, self.path / f"{name}.old"
        return next((place for place in places if (place / WEIGHTS).is_file()), None)

    def folder(self, name: str = "last") -> Path:
        """The folder of a complete checkpoint, which must be there."""
        if (folder := self.checkpoint(name)) is None:
            raise CheckpointError(
                f'"{self.path}" has no checkpoint "{name}": train at least one epoch, or pass another run'
            )
        return folder

    def digest(self, name: str = "last") -> str:
        """What the weights of a checkpoint are known by: the SHA-256 of their file."""
        return sha256(self.folder(name) / WEIGHTS)

    def weights(self, name: str = "last") -> dict[str, Tensor]:
        """The tensors of a checkpoint."""
        folder = self.folder(name)
        try:
            return load_file(folder / WEIGHTS)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f'"{folder / WEIGHTS}" is damaged ({reason(error)}): restore it, or train again'
            ) from error

    def state(self) -> State | None:
        """The loop's state at the last checkpoint, or None before the first."""
        if (folder := self.checkpoint()) is None:
            return None
        try:
            state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
            if not (isinstance(state, dict) and State.__required_keys__ <= state.keys()):
                raise ValueError("it is no state of a run")
            return cast(State, state)
        except Exception as error:
            raise CheckpointError(
                f'"{folder / STATE}" is damaged ({reason(error)}): restore it, or train again'
            ) from error
