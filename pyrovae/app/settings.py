"""Settings of one job, by name, and which part of it takes each."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from pyrovae import models, objectives, runs
from pyrovae.arguments import lookup, one_of
from pyrovae.configured import Configured
from pyrovae.objectives.base import Objective


@dataclass
class Settings:
    """The settings of one experiment, by name; ``settings`` holds any other argument of its parts."""

    model: str = "vae"
    data: str = "digits"
    data_dir: str | None = None
    objective: str = "elbo"
    particles: int | None = None
    groups: int | None = None
    latent_dim: int | None = None
    epochs: int = 200
    batch_size: int = 100
    lr: float = 1e-3
    device: str = "auto"
    seed: int = 0
    samples: int = 5000
    settings: dict[str, Any] = field(default_factory=dict)


def parse_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """``key=value`` pairs, each value read as JSON where it is JSON, else as a string.

    >>> parse_settings(["hidden=[64, 64]", "likelihood=gaussian"])
    {'hidden': [64, 64], 'likelihood': 'gaussian'}
    """
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise ValueError(f"--set takes KEY=VALUE, got {pair!r}: write, for instance, --set hidden=[200,200]")
        try:
            settings[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            settings[key.strip()] = value
    return settings


def keywords(function: Callable[..., Any]) -> list[str]:
    """The arguments that ``--set`` can give to a class or function."""
    if isinstance(function, type) and issubclass(function, Configured):
        return list(function.defaults())
    return [
        name for name in inspect.signature(function).parameters if name not in ("self", "options", "args", "kwargs")
    ]


_OWN_FIT = ("epochs", "batch_size", "lr", "seed", "device", "progress")  # what a model that trains itself is told


FIT_KEYS = ("schedule", "kl_warmup", "clip_norm", "patience", "num_workers", "particles", "compile", "precision")


DATA_KEYS = ("binarization", "validation", "labels_per_class")


CODES = "codes:"  # data that are the codes of a VQ-VAE's run


@dataclass
class Parts:
    """The settings sorted by the part that takes them."""

    model_class: type[nn.Module]
    objective: Objective
    model: dict[str, Any]
    fit: dict[str, Any]
    data: dict[str, Any]

    @classmethod
    def of(cls, job: Settings, *, run: Path | None = None) -> Parts:
        """Look every name up, and give each setting to the part that knows it; no class is taken from ``run``."""
        own = ":" in job.model
        model_class: Any = runs.find_class(job.model, outside=run) if own else lookup("model", job.model, models.MODELS)
        objective_class = lookup("objective", job.objective.lower(), objectives.OBJECTIVES)
        known = {
            "model": [k for k in keywords(model_class) if k != "input_shape"],
            "objective": list(objective_class.defaults()),
            "fit": list(FIT_KEYS),
            "data": list(DATA_KEYS),
        }
        if trains_itself(job.model):
            known |= {"objective": [], "fit": [k for k in keywords(model_class.fit) if k not in ("data", *_OWN_FIT)]}
        sorted_: dict[str, dict[str, Any]] = {part: {} for part in known}
        shorthand = {"latent_dim": job.latent_dim, "num_particles": job.particles, "num_groups": job.groups}
        for key, value in (job.settings | {k: v for k, v in shorthand.items() if v is not None}).items():
            part = next((p for p, keys in known.items() if key in keys), None)
            if part is None:
                everything = sorted({k for keys in known.values() for k in keys})
                one_of(f"setting of {job.model}, {job.objective}, training and data", key, everything)
            sorted_[part][key] = value  # type: ignore[index]
        objective = objective_class(**sorted_.pop("objective"))
        return cls(model_class, objective, **sorted_)


def trains_itself(model: str) -> bool:
    """Whether a model of the zoo has a ``.fit`` of its own, and no objective."""
    return hasattr(models.MODELS.get(model), "fit")
