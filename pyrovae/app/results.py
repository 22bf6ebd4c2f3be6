"""What is measured of a run, as its results.json holds it; nats per datum throughout."""

from __future__ import annotations

from typing import TypedDict


class UnitCount(TypedDict):
    """The active units of a site, and all of them."""

    active: int
    of: int


class SiteInformation(TypedDict):
    """What each unit of a site carries, or a total where a figure has none by unit."""

    kl: list[float]
    mutual_information: list[float]
    aggregate_kl: list[float]


class Gap(TypedDict):
    """Where the bound is lost, of some images."""

    iwae: float
    log_p: float
    num_particles: int
    num_samples: int
    elbo: float
    refined_elbo: float | None
    gap: float
    amortisation: float | None
    approximation: float | None
    num_images: int


class Diagnostics(TypedDict):
    """What the latents carry, and where the bound is lost."""

    information: dict[str, SiteInformation]
    active_units_averaged: dict[str, int]
    posterior_gap: Gap


class Annealed(TypedDict):
    """The NLL of some images by annealing, and by importance sampling beside it."""

    nll: float
    nll_std_error: float
    acceptance: float
    num_chains: int
    num_temperatures: int
    num_images: int
    importance_nll: float
    importance_nll_std_error: float


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
    active_units: dict[str, UnitCount]
    timings: dict[str, object]
    seconds_per_epoch: float
    checkpoint: str
    diagnostics: Diagnostics
    ais: Annealed
