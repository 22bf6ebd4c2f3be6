"""Classes by their paths: how a config names a model, and how the model is found again."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

from torch import nn


def class_path(cls: type) -> str:
    """Where a class is found, ``module:Class``; one of ours in the package that exports it."""
    return public_path(f"{cls.__module__}:{cls.__qualname__}")


def public_path(path: str) -> str:
    """The path of a class without the file of ours that it is written in, which may change.

    >>> public_path("pyrovae.models.vae:VAE"), public_path("my_models.vae:MyVAE")
    ('pyrovae.models:VAE', 'my_models.vae:MyVAE')
    """
    return re.sub(r"^(pyrovae\.(?:models|objectives))\.[\w.]+:", r"\1:", path)


def describe(owner: object) -> dict[str, object] | None:
    """How to build a model object again: its class and its arguments, or None if it does not say (no ``.config``)."""
    arguments = getattr(owner, "config", None)
    if owner is None or not isinstance(arguments, dict):
        return None
    return {"class": class_path(type(owner)), "arguments": arguments}


def find_class(path: str, *, outside: Path | None = None) -> type:
    """The model class at ``module:Class``; a ValueError where there is none, or it is no ``nn.Module``.

    With ``outside`` nothing that lies in that folder is imported.
    """
    module, _, name = path.partition(":")
    if outside is not None and lies_in(outside, module):
        raise ValueError(f'the class "{path}" lies in the run itself, whose code is never executed: move it elsewhere')
    try:
        cls: object = importlib.import_module(module)
    except (ImportError, TypeError, ValueError) as error:
        raise ValueError(f'cannot import "{module}" for the model "{path}" ({error}): run where it can be') from error
    for part in name.split("."):
        cls = getattr(cls, part, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(f'"{path}" is no model class: name an nn.Module with .model and .guide as module:Class')
    return cls


def lies_in(folder: Path, module: str) -> bool:
    """Whether a part of a dotted module path would be read from the folder; nothing in the folder is executed."""
    folder, parts = folder.resolve(), module.split(".")
    for i in range(len(parts)):
        try:
            spec = importlib.util.find_spec(".".join(parts[: i + 1]))  # imports the parts before it
        except (ImportError, ValueError):
            return False
        if spec is None:
            return False
        places = [spec.origin] if spec.has_location and spec.origin else []
        places += spec.submodule_search_locations or ()
        if any(Path(place).resolve().is_relative_to(folder) for place in places):
            return True
    return False
