"""What a run was made with, and what its files hold, by SHA-256.

A checkpoint's manifest lies in its folder and moves with it; it names the size and digest of each of its files and of
the metrics written until then, and the run that they are of. The config bears the run's name, and its own digest: it is
written alone, so that no crash comes between a file and what is said of it.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

from pyrovae.runs.files import MANIFEST, as_json, read_json, undamaged

FORMAT = 1  # of the runs that are written; all up to it are read


class Held(TypedDict):
    """What a file holds."""

    bytes: int
    sha256: str


class Manifest(TypedDict):
    """What a checkpoint's files hold, by name, and the name of their run (none, if that began without one)."""

    format_version: int
    run: str | None
    files: dict[str, Held]


def held(path: Path) -> Held:
    """What a file holds now."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def holds(path: Path, stated: Held, *, grows: bool = False) -> bool:
    """Whether a file holds what was stated; one that grows, at its beginning. One of another size is not read."""
    if not grows and path.stat().st_size != stated["bytes"]:
        return False
    return sha256(path, stated["bytes"] if grows else None) == stated["sha256"]


def sha256(path: Path, size: int | None = None) -> str:
    """The SHA-256 of a file, or of its first bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        if size is not None:
            return hashlib.sha256(file.read(size)).hexdigest()
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest in a checkpoint's folder; a CheckpointError where it is none."""
    with undamaged(folder / MANIFEST):
        said = read_json(folder / MANIFEST)
        files = {name: Held(bytes=int(h["bytes"]), sha256=str(h["sha256"])) for name, h in said["files"].items()}
        return Manifest(format_version=said["format_version"], run=said["run"], files=files)


def sealed(config: Mapping[str, object], name: str | None) -> dict[str, Any]:
    """A config as it is written: with its format, the name of its run, and its digest."""
    given = {key: value for key, value in as_json(config).items() if key not in ("format_version", "run", "sha256")}
    content = {"format_version": FORMAT, "run": name, **given}
    return {**content, "sha256": digest(content)}


def digest(content: Mapping[str, object]) -> str:
    """The SHA-256 of a JSON object, however it is laid out; of its own entry "sha256" nothing."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def newer(written: Mapping[str, Any]) -> str | None:
    """What a config or manifest says it was written by, if that is newer than this package."""
    form, by = written.get("format_version", FORMAT), written.get("versions") or {}
    if not isinstance(form, int) or form > FORMAT:
        return f"format_version {form!r}"
    made = by.get("pyrovae", "0") if isinstance(by, dict) else by
    return f"pyrovae {made}" if numbers(made) > numbers(versions()["pyrovae"]) else None


def numbers(text: object) -> list[int]:
    """The numbers of a version: 0.2.1 is [0, 2, 1]."""
    return [int(number) for number in re.findall(r"\d+", str(text))[:3]]


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    packages = {name: version(name) for name in ("torch", "pyro-ppl", "numpy")}
    from pyrovae import __version__

    return {"pyrovae": __version__, "python": platform.python_version(), **packages}
