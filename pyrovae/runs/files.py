"""The files of a run: their names, and writes of which no reader, and no crash, ever meets half."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pyrovae.arguments import one_line
from pyrovae.files import replacing

CONFIG, METRICS, RESULTS = "config.json", "metrics.jsonl", "results.json"
WEIGHTS, STATE = "weights.safetensors", "state.pt"  # of a checkpoint


def write_text(path: Path, text: str) -> None:
    """Replace a file whole."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


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
