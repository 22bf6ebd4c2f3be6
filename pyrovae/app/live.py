"""Training as TensorBoard shows it while it goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from pyrovae.arguments import require_packages
from pyrovae.train.log import Fit

FOLDER = "tensorboard"  # in the run


def to_tensorboard(run: Path) -> Callable[[Fit], None]:
    """What ``fit(on_epoch=)`` takes to write its history into a run, a curve for each number (of each site).

    :raises ResourceError: where the extra ``pyrovae[tensorboard]`` is not installed.
    """
    require_packages("tensorboard", "tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writers: list[SummaryWriter] = []

    def write(fit: Fit) -> None:
        rows = fit.history[-1:]
        if not writers:  # what was written before a run was resumed is written anew, in its place
            rows = fit.history
            writers.append(SummaryWriter(run / FOLDER, purge_step=0))
        for row in rows:
            for name, number in numbers(row).items():
                writers[0].add_scalar(name, number, row["epoch"])
        writers[0].flush()

    return write


def numbers(row: Mapping[str, object]) -> dict[str, float]:
    """The finite numbers of a row by name, with the site's after a slash.

    >>> numbers({"epoch": 2, "bound": -3.0, "active_units": {"z": 4}, "kl_per_unit": {"z": [1.0]}, "kl": math.inf})
    {'bound': -3.0, 'active_units/z': 4}
    """
    by_site = {name: value if isinstance(value, Mapping) else {"": value} for name, value in row.items()}
    found = {f"{name}/{site}".rstrip("/"): number for name, sites in by_site.items() for site, number in sites.items()}
    return {name: n for name, n in found.items() if isinstance(n, int | float) and math.isfinite(n) and name != "epoch"}
