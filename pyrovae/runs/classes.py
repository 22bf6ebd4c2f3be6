"""Classes by their paths: how a config names a model, and how the model is found again."""

from __future__ import annotations

import importlib
import re

from torch import nn

from pyrovae.errors import CheckpointError

OURS = "pyrovae.models"


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


def find_class(path: str, *, trust: bool = False) -> type:
    """The model class at ``module:Class``: one of this package, or with ``trust`` any that can be imported.

    :raises CheckpointError: for a class of anyone else without ``trust``; nothing is imported then.
    :raises ValueError: where there is no such class, or it is no ``nn.Module``.
    """
    module, _, name = path.partition(":")
    if not trust and (module != OURS or name not in importlib.import_module(OURS).__all__):
        raise CheckpointError(
            f'the class "{path}" is not pyrovae\'s, and opening a run imports nothing else: if you know its code, pass '
            "--trust (in Python trust=True, or the pair itself as pair=)"
        )
    try:
        cls: object = importlib.import_module(module)
    except (ImportError, TypeError, ValueError) as error:
        raise ValueError(f'cannot import "{module}" for the model "{path}" ({error}): run where it can be') from error
    for part in name.split("."):
        cls = getattr(cls, part, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(f'"{path}" is no model class: name an nn.Module with .model and .guide as module:Class')
    return cls
