"""What is measured of a run, as its results.json holds it; nats per datum throughout."""

from __future__ import annotations

from typing import TypedDict


class Diagnostics(TypedDict):
    """What the latents carry, each site's figures by unit, and where the bound is lost."""

    information: dict[str, dict[str, list[float]]]
    active_units_averaged: dict[str, int]
    posterior_gap: dict[str, float | None]


class Results(TypedDict, total=False):
    """What ``train`` and ``evaluate`` measure, and the metrics of the model; without log p(x) no figure of it."""

    likelihood_is: str | None
    num_images: int
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
    warning: str | None
    precision: str
    accuracy: float
    perplexity: float | list[float]
    active_units: dict[str, dict[str, int]]  # of each site those active, and of how many
    timings: dict[str, object]
    seconds_per_epoch: float
    checkpoint: str
    diagnostics: Diagnostics
    ais: dict[str, float]
