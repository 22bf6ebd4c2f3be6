"""The files of a run: their names, and reading and writing them."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pyrovae.arguments import one_line
from pyrovae.errors import CheckpointError, DataError, exit_code
from pyrovae.files import replacing

CONFIG, METRICS, RESULTS, LOCK = "config.json", "metrics.jsonl", "results.json", "pyrovae.lock"
REPORT, COMPARED = "report.html", "compare.html"  # the second in the folder of several runs
WEIGHTS, STATE, MANIFEST = "weights.safetensors", "state.pt", "manifest.json"  # of a checkpoint
CHECKPOINTS = ("last", "best")
FOLDERS = (*CHECKPOINTS, *(f"{name}.{suffix}" for name in CHECKPOINTS for suffix in ("new", "old")), "vqvae")


def strange(folder: Path, *, run: bool) -> list[str]:
    """What has the name of a run's file, but is a link, of another kind, or (where there is no run) was there before.

    A run's own files are written to, replaced and deleted; these, and others' files in a checkpoint, must not be.
    """
    found = []
    for place in folder.iterdir() if folder.is_dir() else ():
        if place.name in FOLDERS:
            own = place.is_dir()
        elif place.name in (CONFIG, METRICS, RESULTS, REPORT) or place.suffix == ".png":
            own = place.is_file()
        else:
            continue
        if place.is_symlink() or not (own and run):
            found.append(place.name)
        elif place.name in FOLDERS[:-1]:
            found += [f"{place.name}/{p.name}" for p in place.iterdir() if p.name not in (WEIGHTS, STATE, MANIFEST)]
    return sorted(found)


def tidy(folder: Path) -> None:
    """Delete what a killed writer left of checkpoints that others have replaced, or that were not done."""
    if (folder / CONFIG).is_file() and not strange(folder, run=True):
        for now in (folder / name for name in CHECKPOINTS):
            shutil.rmtree(now.with_suffix(".new"), ignore_errors=True)
            if now.is_dir():
                shutil.rmtree(now.with_suffix(".old"), ignore_errors=True)


def read(path: Path) -> bytes:
    """The bytes of a regular file; a pipe or a device, which might never end, is a ValueError."""
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")
    return path.read_bytes()


def read_json(path: Path) -> Any:
    """What a JSON file holds; a ValueError where it is none, or is nested too deeply to be of a run."""
    try:
        return json.loads(read(path).decode("utf-8-sig"))  # an editor may have put a mark in front
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


@contextmanager
def undamaged(path: Path, advice: str = "restore it, or train again") -> Iterator[None]:
    """Say of any error inside that a file of a run is damaged; memory, permissions and our own words stay as they are.

    >>> with undamaged(Path("last/state.pt")):
    ...     {}["epoch"]
    Traceback (most recent call last):
    ...
    pyrovae.errors.CheckpointError: "last/state.pt" is damaged ('epoch'): restore it, or train again
    """
    try:
        yield
    except Exception as error:
        resources = exit_code(error) == 6 and not isinstance(error, FileNotFoundError | IsADirectoryError)
        if resources or isinstance(error, CheckpointError | DataError):
            raise
        raise CheckpointError(f'"{path}" is damaged ({reason(error)}): {advice}') from error


def write_text(path: Path, text: str) -> None:
    """Replace a file whole; what is no text, as in a path of odd bytes, is spelt out."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: object) -> None:
    """Write ``content`` as strict JSON: what is not finite becomes null."""
    write_text(path, json.dumps(as_json(content), indent=2, allow_nan=False) + "\n")


def as_json(content: object) -> Any:
    """``content`` as it reads back from JSON: numbers that are not finite become null, tuples and tensors lists.

    What JSON cannot hold becomes its name.
    """
    if isinstance(content, Mapping):
        return {str(key): as_json(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [as_json(value) for value in content]
    if isinstance(content, Tensor | np.ndarray | np.generic):
        return as_json(content.tolist())
    if isinstance(content, float):
        return float(content) if math.isfinite(content) else None
    if content is None or isinstance(content, str | int):
        return content
    if isinstance(content, os.PathLike):
        return str(content)
    return getattr(content, "__qualname__", type(content).__name__)


def reason(error: BaseException) -> str:
    """What an error says in one line, or else its class."""
    return one_line(error) or type(error).__name__
