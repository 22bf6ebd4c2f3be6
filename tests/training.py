"""What tests of training share: settings in which all changes, histories without times, a death on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor
from torch.utils.data import Dataset

import pyrovae as pv

SETTINGS = {
    "objective": pv.IWAE(3), "epochs": 4, "batch_size": 20, "schedule": "cosine", "particles": (1, 4), "kl_warmup": 2,
    "clip_norm": 1.0,
}  # fmt: skip
TIMES = ("seconds", "cpu_seconds", "images_per_second")


def rows(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A history but for what a clock says."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in history]


class Rows(Dataset[Tensor]):
    """A data set of nobody's kind: rows, one by one."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Tensor:
        return self.x[i]


class Killed(BaseException):
    """What ends a process."""


def dying_at(owner: object, name: str, call: int, run: Callable[[], object], *, after: bool = False) -> None:
    """Run with a death before, or after, a function's ``call``-th call, which must come."""
    original, calls = getattr(owner, name), []

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == call and not after:
            raise Killed
        result = original(*args, **kwargs)
        if len(calls) == call:
            raise Killed
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, dying)
        with pytest.raises(Killed):
            run()
