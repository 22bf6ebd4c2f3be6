"""One run directory: config, checkpoints, metrics, resume. Nothing in it is code, and every write is atomic."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pyrovae.errors import CheckpointError, ResourceError, is_out_of_memory
from pyrovae.files import sync
from pyrovae.runs.files import (
    CONFIG,
    LOCK,
    MANIFEST,
    METRICS,
    STATE,
    WEIGHTS,
    as_json,
    reason,
    strange,
    tidy,
    write_json,
    write_text,
)
from pyrovae.runs.lock import Lock
from pyrovae.runs.manifest import FORMAT, held, sealed
from pyrovae.runs.reading import Reader

SHARE, LONGEST = 0.005, 600.0  # of the time that checkpoints may take; seconds without one


class Run(Reader):
    """One run directory, ``runs/NAME``.

    :param override: warn of what was changed since it was written, or is not known, instead of refusing it.
    :raises CheckpointError: wherever it is read, for files that are absent, damaged, changed or of another run.
    :raises ResourceError: wherever it is written to, if another process does so, or it was moved away.

    >>> import tempfile
    >>> run = Run(Path(tempfile.mkdtemp()) / "first")
    >>> with run.writing():
    ...     run.start({"seed": 0})
    ...     run.log({"epoch": 1, "bound": -90.0})
    >>> run.history()
    [{'epoch': 1, 'bound': -90.0}]
    """

    def __init__(self, path: str | os.PathLike[str], *, override: bool = False) -> None:
        super().__init__(path, override=override)
        self.lock: Lock | None = None
        self.saved, self.cost = -math.inf, 0.0  # when the last checkpoint was, and the seconds that it took

    @classmethod
    def of(cls, path: str | os.PathLike[str], *, override: bool = False) -> Run:
        """The run at a path; a run is itself."""
        return path if isinstance(path, cls) else cls(path, override=override)

    @cached_property
    def name(self) -> str | None:
        """What the run is known by, in its manifests; a run of before there were any has none."""
        name: str | None = self.config().get("run")
        return name

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the run, whose folder is made: no other process writes to it. An empty folder is taken away again."""
        if self.lock is not None:
            yield
            return
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(
                f'"{self.path}" cannot be a folder, a file is in its place: pass another run_dir'
            ) from error
        try:
            with Lock(self.path / LOCK) as self.lock:
                tidy(self.path)
                yield
        finally:
            self.lock = None
            with suppress(OSError):  # where something came of it
                for folder in made:
                    folder.rmdir()

    def check_files(self) -> None:
        """Refuse to write where others' files, or links, have the names of a run's own."""
        if found := strange(self.path, run=self.exists):
            raise ValueError(
                f'"{self.path}" holds {", ".join(found[:5])}, which no run made here and none will replace: take an '
                "empty folder"
            )

    def check_absent(self) -> None:
        """Refuse to begin where a run is already."""
        if self.exists:
            raise ValueError(
                f'"{self.path}" holds a run already: pass resume=True (--resume) to go on with it, or another run_dir'
            )

    def check_place(self) -> None:
        """Refuse to go on where the run was, if it is there no more."""
        if not (self.exists and (self.lock is None or self.lock.in_place)):
            raise ResourceError(f'the run "{self.path}" is gone: it was moved or deleted while it was written to')

    def start(self, config: Mapping[str, object]) -> None:
        """Begin a run: make the folder, write its config, drop what an attempt without a checkpoint left."""
        self.check_files()
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / METRICS).unlink(missing_ok=True)
        self.name = uuid.uuid4().hex
        write_json(self.path / CONFIG, sealed(config, self.name))

    def amend(self, config: Mapping[str, object]) -> None:
        """Write another config of a run that goes on: it keeps its name, and its checkpoints."""
        write_json(self.path / CONFIG, sealed(config, self.name))

    def log(self, metrics: Mapping[str, object]) -> None:
        """Append one epoch's metrics, and wait until they are on disk: no checkpoint may be ahead of them."""
        self.check_place()
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(as_json(metrics), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def history_until(self, epoch: int) -> list[dict[str, Any]]:
        """The metrics of the epochs up to the last checkpoint's, which must be as they were saved."""
        rows = self.history()[:epoch]
        if [row.get("epoch") for row in rows] != list(range(1, len(rows) + 1)) or len(rows) != epoch:
            raise CheckpointError(
                f'"{self.path / METRICS}" is damaged: its epochs do not run from 1 to {epoch}, where the '
                "last checkpoint is; restore it, or train again"
            )
        if epoch and (folder := self.checkpoint()) is not None:
            self.check_file(folder, METRICS)
        return rows

    def rewind(self, epoch: int) -> list[dict[str, Any]]:
        """Forget the metrics of epochs after ``epoch``, which a resumed run will log again."""
        rows = self.history_until(epoch)
        write_text(self.path / METRICS, "".join(json.dumps(row) + "\n" for row in rows))
        return rows

    @property
    def due(self) -> bool:
        """Whether a checkpoint would take no more than its share of the time since the last one."""
        return time.monotonic() - self.saved >= min(self.cost / SHARE, LONGEST)

    def save(self, name: str, weights: Mapping[str, Tensor], state: Mapping[str, object] | None = None) -> None:
        """Write the checkpoint ``name`` ("last" or "best") aside, with its manifest, then swap it in."""
        began = time.monotonic()
        self.check_place()
        now, new, old = (self.path / f"{name}{suffix}" for suffix in ("", ".new", ".old"))
        if old.exists() and not now.exists():  # a crash came between two renames: the old one counts
            old.replace(now)
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in weights.items()}
        try:
            self.write(new, tensors, state)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(new, ignore_errors=True)
            if is_out_of_memory(error):
                raise
            kept = "the one before it is kept; " if now.exists() else ""
            raise ResourceError(
                f'cannot write the checkpoint "{now}" ({reason(error)}): {kept}mend that, and go on with resume'
            ) from error
        shutil.rmtree(old, ignore_errors=True)
        if now.exists():
            now.replace(old)
        new.replace(now)
        sync(self.path)
        shutil.rmtree(old, ignore_errors=True)
        self.saved = time.monotonic()
        self.cost = self.saved - began

    def write(self, folder: Path, weights: dict[str, Tensor], state: Mapping[str, object] | None) -> None:
        """Write all of a checkpoint into a new folder, and wait until it is on disk."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        files = [folder / WEIGHTS]
        save_file(weights, folder / WEIGHTS)
        if state is not None:
            torch.save(dict(state), folder / STATE)
            files += [folder / STATE, *([self.path / METRICS] if (self.path / METRICS).exists() else [])]
        manifest = {
            "format_version": FORMAT,
            "run": self.name,
            "files": {f.name: held(f) for f in files},
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in (*folder.iterdir(), folder):
            sync(path)
