"""Constructors whose arguments are remembered."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from collections.abc import Sequence
from typing import TypedDict, Unpack

import numpy as np
import pytest
from torch import nn

from pyrovae.configured import Configured


class Options(TypedDict, total=False):
    scale: float
    names: Sequence[str]


class Base(Configured, nn.Module):
    """Takes everything itself."""

    def __init__(
        self, width: int, depth: int = 2, *, scale: float = 1.0, names: Sequence[str] = (), seen: int = 0
    ) -> None:
        super().__init__()
        self.linear, self.names = nn.Linear(width, depth), names


class Derived(Base):
    """Passes two options on, and sets the rest."""

    def __init__(self, width: int = 3, *, own: object = None, **options: Unpack[Options]) -> None:
        super().__init__(width, 5, seen=7, **options)


class Silent(Derived):
    """Has no constructor."""


class Through(Derived):
    """Passes everything on."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)


class Loose(Base):
    """Passes on what it does not know, of a class that only type checkers do."""

    def __init__(self, depth: Unknown, **kwargs) -> None:  # noqa: F821
        super().__init__(kwargs.pop("width"), depth, **kwargs)


@pytest.mark.parametrize("cls", [Derived, Silent, Through])
def test_the_outermost_arguments_count(cls):
    made = cls(own={"sizes": (1, np.int64(2))}, names=("a", "b"))
    expected = {"width": 3, "own": {"sizes": [1, 2]}, "scale": 1.0, "names": ["a", "b"]}
    assert made.config == json.loads(json.dumps(made.config)) == expected
    assert cls(**made.config).config == expected
    assert made.names == ("a", "b")  # what the constructor sees is what was given
    assert cls.defaults() == {"width": 3, "own": None, "scale": 1.0, "names": ()}


def test_options_without_a_type_are_all_that_the_next_constructor_takes():
    assert Loose(4, width=2).config == {"depth": 4, "width": 2, "scale": 1.0, "names": [], "seen": 0}
    assert Loose.positional() == ["depth"]
    assert Loose.defaults()["width"] is inspect.Parameter.empty


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"seen": 1}, r"Derived.__init__\(\) got an unexpected keyword argument 'seen'"),
        ({"depth": 1}, "unexpected keyword argument 'depth'"),
    ],
)
def test_what_no_constructor_takes_is_refused(arguments, match):
    with pytest.raises(TypeError, match=match):
        Derived(**arguments)
    with pytest.raises(TypeError, match=r"Base.__init__\(\) missing a required argument: 'width'"):
        Base()


def test_copies_and_pickles_remember():
    made = Base(3, names=["a"])
    for twin in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert twin.config == made.config == {"width": 3, "depth": 2, "scale": 1.0, "names": ["a"], "seen": 0}
    assert copy.deepcopy(made).config is not made.config


def test_signatures_stay():
    assert list(inspect.signature(Derived).parameters) == ["width", "own", "options"]
    assert Derived.__init__.__qualname__ == "Derived.__init__"


def test_a_subclass_may_say_otherwise():
    class Other(Base):
        def __init__(self) -> None:
            super().__init__(2)
            self.config = {"other": True}

    assert Other().config == {"other": True}
