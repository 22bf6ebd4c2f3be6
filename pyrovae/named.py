"""Classes by the names that a command line or a file gives them, none imported before it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")


class Named(Mapping[str, T], Generic[T]):
    """What a package shows, by other names: those are there at once, what they name when it is looked up.

    >>> names = Named("collections", ordered="OrderedDict", counter="Counter")
    >>> list(names), names["counter"]("abca")["a"]
    (['ordered', 'counter'], 2)
    """

    def __init__(self, package: str, **attributes: str) -> None:
        self.package, self.attributes = package, attributes

    def __getitem__(self, name: str) -> T:
        return getattr(importlib.import_module(self.package), self.attributes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.attributes)

    def __len__(self) -> int:
        return len(self.attributes)
