"""The run directory: config, checkpoints, metrics, resume. Nothing in it is code, and every write is atomic."""

from pyrovae.runs.classes import class_path, describe, find_class, public_path
from pyrovae.runs.files import (
    CHECKPOINTS,
    COMPARED,
    CONFIG,
    MANIFEST,
    METRICS,
    REPORT,
    RESULTS,
    STATE,
    WEIGHTS,
    as_json,
    undamaged,
    write_json,
    write_text,
)
from pyrovae.runs.loading import load, opening, restore
from pyrovae.runs.manifest import versions
from pyrovae.runs.run import Run

__all__ = [
    "CHECKPOINTS", "COMPARED", "CONFIG", "MANIFEST", "METRICS", "REPORT", "RESULTS", "STATE", "WEIGHTS", "Run",
    "as_json", "class_path", "describe", "find_class", "load", "opening", "public_path", "restore", "undamaged",
    "versions", "write_json", "write_text",
]  # fmt: skip
