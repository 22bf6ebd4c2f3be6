"""Checks of arguments: each states the rule, the value received and the fix, in one line."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor


def positive_int(name: str, value: Any, minimum: int = 1) -> int:
    """``value`` as an int of at least ``minimum``, or one clear error."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}: pass {minimum} or more")
    return int(value)


def in_range(name: str, value: Any, low: float, high: float = math.inf) -> float:
    """``value`` as a finite float in [low, high], or one clear error."""
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{name} must be a number in [{low:g}, {high:g}], got {value!r}: pass a value in that range")
    return float(value)


def weight(name: str, value: Any) -> float | Tensor:
    """A weight that may be annealed: a 0-d tensor as it is, else a float of at least 0."""
    return value if isinstance(value, Tensor) and value.dim() == 0 else in_range(name, value, 0.0)


def one_of(name: str, value: Any, choices: Iterable[str]) -> Any:
    """``value`` if it is one of ``choices``, or an error that names the nearest."""
    choices = list(choices)
    if value in choices:
        return value
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)
    raise ValueError(f'unknown {name} {value!r}: did you mean "{near[0]}"? Choose one of {", ".join(choices)}')
