"""Settings of one job, by name, and which part of it takes each."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Self, get_type_hints

from torch import nn

from pyrovae import models, objectives, runs
from pyrovae.arguments import fits, lookup, one_of
from pyrovae.configured import Configured
from pyrovae.models.base import Pair
from pyrovae.objectives.base import Objective

FIT_KEYS = (
    "schedule", "kl_warmup", "clip_norm", "patience", "num_workers", "particles", "compile", "precision", "on_nan",
)  # fmt: skip
OWN_FIT = ("data", "epochs", "batch_size", "lr", "seed", "device", "progress")  # of a rule of its own, given anyway
DATA_KEYS = ("binarization", "validation", "labels_per_class")
DEEPEST = 20  # levels of lists in a setting
CODES = "codes:"  # data that are the codes of a VQ-VAE's run


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
    settings: dict[str, object] = field(default_factory=dict)

    @classmethod
    def of(cls, given: dict[str, Any]) -> Self:
        """Settings as a run's config holds them, which anyone may have written."""
        kinds = get_type_hints(cls)
        for name, value in given.items():
            if not fits(value, kinds[one_of("setting", name, kinds)]):
                raise TypeError(f"the setting {name} cannot be {type(value).__name__}")
        return cls(**given)


def parse_settings(pairs: Iterable[str]) -> dict[str, object]:
    """``key=value`` pairs, each value read as JSON (or Python's True, False, None) where it is such, else as a string.

    >>> parse_settings(["hidden=[64, 64]", "likelihood=gaussian"])
    {'hidden': [64, 64], 'likelihood': 'gaussian'}
    """
    settings: dict[str, object] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise ValueError(f"--set takes KEY=VALUE, got {pair!r}: write, for instance, --set hidden=[200,200]")
        try:
            settings[key.strip()] = json.loads({"True": "true", "False": "false", "None": "null"}.get(value, value))
            shallow = depth(settings[key.strip()]) <= DEEPEST
        except json.JSONDecodeError:
            settings[key.strip()], shallow = value, True
        except RecursionError:
            shallow = False
        if not shallow:
            raise ValueError(f"--set {key} has lists in lists {DEEPEST} deep and more: write a number, text, a list")
    return settings


def depth(value: object) -> int:
    """How deep lists and mappings lie in each other."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(depth, inside), default=0)


def keywords(function: Callable[..., object], *, but: Iterable[str] = ()) -> dict[str, object]:
    """The arguments that ``--set`` can give to a class or function, with their defaults; those in ``but`` left out."""
    hidden = {"self", "options", "args", "kwargs", *but}
    if isinstance(function, type) and issubclass(function, Configured):
        defaults = function.defaults()
    else:
        defaults = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    return {name: default for name, default in defaults.items() if name not in hidden}


@dataclass
class Parts:
    """The settings sorted by the part that takes them."""

    model_class: type[nn.Module]
    objective: Objective
    model: dict[str, object]
    fit: dict[str, object]
    data: dict[str, object]

    @classmethod
    def of(cls, job: Settings, *, trust: bool = True) -> Parts:
        """Look every name up, and give each setting to the part that knows it; ``trust`` as for a run's class."""
        own = ":" in job.model
        model_class = runs.find_class(job.model, trust=trust) if own else lookup("model", job.model, models.MODELS)
        objective_class = lookup("objective", job.objective.lower(), objectives.OBJECTIVES)
        rule = model_class.train_on if issubclass(model_class, Pair) else None
        known: dict[str, Iterable[str]] = {
            "model": keywords(model_class, but=["input_shape"]),
            "objective": keywords(objective_class) if rule is None else (),
            "fit": FIT_KEYS if rule is None else keywords(rule, but=OWN_FIT),
            "data": DATA_KEYS,
        }
        owner = {key: part for part, keys in reversed(known.items()) for key in keys}  # the first part that knows it
        shorthand = {"latent_dim": job.latent_dim, "num_particles": job.particles, "num_groups": job.groups}
        given = dict(job.settings)
        for key, number in shorthand.items():
            if number is not None and given.setdefault(key, number) != number:
                raise ValueError(f"{key} is given twice, got {given[key]!r} and {number}: leave one of them out")
        for key, value in given.items():
            one_of(f"setting of {job.model}, {job.objective}, training and data", key, sorted(owner))
            options = known[owner[key]]
            switch = isinstance(options, dict) and isinstance(options[key], bool)
            if switch and not isinstance(value, bool | list):
                raise ValueError(f"{key} must be true or false, got {value!r}: pass one of these")
        sorted_ = {part: {k: v for k, v in given.items() if owner[k] == part} for part in known}
        objective = objective_class(**sorted_.pop("objective"))  # type: ignore[arg-type]
        return cls(model_class, objective, **sorted_)
