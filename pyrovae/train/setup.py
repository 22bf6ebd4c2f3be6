"""How pairs are to be trained: the arguments of fit and fit_replicas, checked once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from pyrovae.arguments import in_range, one_of, pick_device, positive_int
from pyrovae.compile.checked import check_compile
from pyrovae.compile.precision import PRECISIONS
from pyrovae.data.feed import Feed
from pyrovae.train.plan import Plan

MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]


class Setup:
    """What all pairs of one training share, besides their data."""

    def __init__(
        self,
        plan: Plan,
        *,
        batch_size: int,
        clip_norm: float | None,
        precision: str,
        device: str | torch.device,
        seed: int,
        progress: bool | None,
    ) -> None:
        self.plan = plan
        self.batch_size = positive_int("batch_size", batch_size)
        self.clip_norm = None if clip_norm is None else in_range("clip_norm", clip_norm, 1e-12)
        self.precision: str = one_of("precision", precision, PRECISIONS)
        self.device = pick_device(device)
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
            raise ValueError(f"seed must be an integer, got {seed!r}: pass one, and another one for another run")
        self.seed, self.progress = int(seed), progress

    def describe(self, feed: Feed) -> dict[str, object]:
        """As JSON can hold it."""
        return self.plan.describe() | {
            "batch_size": self.batch_size, "clip_norm": self.clip_norm, "precision": self.precision,
            "device": str(self.device), "seed": self.seed, "threads": torch.get_num_threads(), "num_data": feed.size,
        }  # fmt: skip

    def advice(self, checkpoint: Path | None) -> str:
        """What to lower where memory runs out."""
        particles = getattr(self.plan.current, "total_particles", 1)
        asked = f"batch_size={self.batch_size} with {particles} particles"
        bfloat = "" if self.precision == "bfloat16" else ', or pass precision="bfloat16"'
        kept = f'; the last checkpoint is in "{checkpoint}"' if checkpoint is not None else ""
        return f"asked for {asked}; lower either{bfloat}{kept}"


def check_options(validation: object, patience: int | None, compile: bool | str, run_dir: object, resume: bool) -> None:
    """Refuse what is asked for of fit alone where it is out of range, or lacks what it needs."""
    if patience is not None:
        if validation is None:
            raise ValueError("patience needs data to validate on: pass validation, or leave patience out")
        positive_int("patience", patience)
    check_compile(compile)
    if resume and run_dir is None:
        raise ValueError("resume=True needs the folder of the run to go on with: pass run_dir")


def optimizer_maker(make: MakeOptimizer | None, lr: float | None) -> tuple[float | None, MakeOptimizer]:
    """The learning rate, where it is ours to know, and what makes the optimizer."""
    if make is None:
        rate = 1e-3 if lr is None else in_range("lr", lr, 0.0)
        return rate, lambda parameters: torch.optim.Adam(parameters, lr=rate, fused=True)
    if lr is not None:
        raise ValueError(f"lr={lr} belongs to the default optimizer: set it in optimizer=, or leave optimizer out")
    if isinstance(make, Optimizer) or not callable(make):
        raise TypeError(
            f"optimizer must be a function of the parameters, got {type(make).__name__}: "
            "pass, for instance, lambda parameters: torch.optim.SGD(parameters, lr=0.1)"
        )

    def checked(parameters: Iterable[Tensor]) -> Optimizer:
        made = make(parameters)
        if not isinstance(made, Optimizer):
            raise TypeError(f"optimizer must return a torch.optim optimizer, got {type(made).__name__}: return one")
        return made

    return None, checked
