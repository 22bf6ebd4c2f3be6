"""Settings of one job, by name. Nothing here takes time to import."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Self, get_type_hints

from pyrovae.arguments import fits, one_of
from pyrovae.data.names import source_of
from pyrovae.models import MODELS
from pyrovae.objectives import OBJECTIVES

DEEPEST = 20  # levels of lists in a setting
CODES = "codes:"  # data that are the codes of a VQ-VAE's run
#: Of the first run, for which neither model nor data are named, what is otherwise: one reads digits in its samples.
FIRST: dict[str, object] = {"latent_dim": 4, "lr": 1e-2}
FIRST_SET: dict[str, object] = {"hidden": [64, 64], "schedule": "cosine"}


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

    def by_default(self, explicit: Collection[str]) -> Self:
        """With the defaults of the first run, if it is one, for what is not given."""
        if {"model", "data"} & set(explicit):
            return self
        own = {name: value for name, value in FIRST.items() if name not in {*explicit, *self.settings}}
        return replace(self, **own, settings=FIRST_SET | self.settings)  # type: ignore[arg-type]

    def check_names(self) -> None:
        """Refuse a name that nothing here has, before anything is imported that takes seconds."""
        if ":" not in self.model:
            one_of("model", self.model, (*MODELS, "my_module:MyPair"))
        one_of("objective", self.objective.lower(), OBJECTIVES)
        if not self.data.startswith(CODES):
            source_of(self.data)


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
