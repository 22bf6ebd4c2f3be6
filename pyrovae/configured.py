"""A constructor's arguments, remembered once, in types that JSON can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def arguments(names: Mapping[str, Any]) -> dict[str, Any]:
    """A constructor's ``locals()`` as the arguments it was given, in types that JSON can hold.

    >>> arguments({"self": None, "hidden": (200, 200), "latent_dim": np.int64(5)})
    {'hidden': [200, 200], 'latent_dim': 5}
    """
    return {name: _plain(value) for name, value in names.items() if name not in ("self", "__class__")}


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    return value
