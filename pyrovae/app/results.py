"""What results.json holds, and whether it is of the weights that are there."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import TypedDict, cast

from pyrovae import runs
from pyrovae.arguments import fits
from pyrovae.errors import CheckpointError

NEEDED = {"likelihood_is", "active_units"}, {"nll", "nll_std_error"}  # of any model, of one with log p(x)
INFINITE = {"nll": math.nan, "nll_std_error": math.inf}  # what null stands for


class Diagnostics(TypedDict):
    """What the latents carry, each site's figures by unit, and where the bound is lost."""

    information: dict[str, dict[str, list[float]]]
    active_units_averaged: dict[str, int]
    posterior_gap: dict[str, float | None]


class Results(TypedDict, total=False):
    """What results.json holds: what ``train`` and ``evaluate`` measure, in nats per datum, and the model's metrics.

    Without log p(x) there is no figure of it.
    """

    likelihood_is: str | None
    num_images: int
    counted: str  # what they are, "images" or "data"
    parameters: int
    reconstruction_error: float | None
    seed: int
    nll: float
    nll_std_error: float
    nll_data_std_error: float | None
    bits_per_dim: float
    num_samples: int
    median_ess: float
    unreliable: float
    criterion: str
    warning: str | None
    precision: str
    accuracy: float
    perplexity: float | list[float]
    active_units: dict[str, dict[str, int]]  # of each site those active, and of how many
    timings: dict[str, object]
    seconds_per_epoch: float
    checkpoint: str
    weights: str  # the SHA-256 of the checkpoint's, to which all this belongs
    diagnostics: Diagnostics
    ais: dict[str, float]


def kept_results(run: runs.Run) -> Results | None:
    """What was measured of a run last, or None; a CheckpointError where results.json is of another shape."""
    if not (found := run.results()):
        return None
    with runs.undamaged(run.path / runs.RESULTS, f"run pyrovae evaluate {run.path}"):
        needed = NEEDED[0] | (NEEDED[1] if found.get("likelihood_is") else set())
        if not (fits(found, Results) and needed <= found.keys()):
            raise ValueError("it has other entries than pyrovae writes")
    null = {name: value for name, value in INFINITE.items() if found.get(name, 0) is None}
    return cast(Results, found | null)


def readable_results(run: runs.Run) -> Results:
    """As :func:`kept_results`; nothing where they are absent or of another shape, as they will be measured anew."""
    with suppress(CheckpointError):
        return kept_results(run) or {}
    return {}


def timed(run: runs.Run) -> Results:
    """What the last results say of training, which another measurement keeps."""
    kept = readable_results(run)
    return cast(Results, {name: kept[name] for name in ("timings", "seconds_per_epoch") if name in kept})


def belongs(results: Results, run: runs.Run) -> bool:
    """Whether results are of the weights that the run's checkpoint holds now."""
    checkpoint = results.get("checkpoint", "last")
    known = "weights" in results and run.checkpoint(checkpoint) is not None
    return known and results["weights"] == run.digest(checkpoint)
