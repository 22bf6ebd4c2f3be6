"""Which part of a job takes which of its settings."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from pyrovae import runs
from pyrovae.app.settings import Settings
from pyrovae.arguments import lookup, one_of
from pyrovae.configured import Configured
from pyrovae.models import MODELS
from pyrovae.models.base import Pair
from pyrovae.objectives import OBJECTIVES
from pyrovae.objectives.base import Objective

FIT_KEYS = (
    "schedule", "kl_warmup", "clip_norm", "patience", "num_workers", "particles", "compile", "precision", "on_nan",
)  # fmt: skip
OWN_FIT = ("data", "epochs", "batch_size", "lr", "seed", "device", "progress")  # of a rule of its own, given anyway
DATA_KEYS = ("binarization", "validation", "labels_per_class")


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
        if own and trust and "" not in sys.path and os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # where the module that was named is, as for python -m
        model_class = runs.find_class(job.model, trust=trust) if own else lookup("model", job.model, MODELS)
        objective_class = lookup("objective", job.objective.lower(), OBJECTIVES)
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
