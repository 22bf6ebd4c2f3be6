"""Checks of arguments: each states the rule, the value received and the fix, in one line."""

from __future__ import annotations

import difflib
import importlib.util
import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from numbers import Integral, Real
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints, is_typeddict

from pyrovae.errors import ResourceError

if TYPE_CHECKING:
    import torch  # which takes seconds to import, and no option of the command line is a tensor

T = TypeVar("T")
MOST = 2**63 - 1  # that a size can be


def shown(value: object) -> str:
    """A value for a message: in one line, and no numbers of a tensor."""
    many = isinstance(getattr(value, "shape", None), tuple) and not isinstance(value, Real)  # as NumPy's scalars are
    return f"a {type(value).__name__} of shape {list(value.shape)}" if many else one_line(repr(value))  # type: ignore[attr-defined]


def whole(value: object) -> int | None:
    """``value`` as an int; None for what is no integer, a Boolean too."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def check_seed(value: object) -> int:
    """``value`` as a seed that every generator takes, or one clear error."""
    number = whole(value)
    if number is None or not -(2**63) <= number < 2**64:
        raise ValueError(f"seed must be an integer of 64 bits, got {shown(value)}: pass one, another for another run")
    return number


def positive_int(name: str, value: object, minimum: int = 1) -> int:
    """``value`` as an int of at least ``minimum``, or one clear error."""
    number = whole(value)
    if number is None or number < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {shown(value)}: pass {minimum} or more")
    if number > MOST:
        raise ValueError(f"{name} must be an integer of at most {MOST}, got a larger one: pass a smaller one")
    return number


def sizes(name: str, value: object) -> tuple[int, ...]:
    """``value`` as a tuple of integers of at least 1, or one clear error."""
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a sequence of integers, got {shown(value)}: pass such as [200, 200]")
    return tuple(positive_int(f"every entry of {name}", v) for v in value)


def in_range(name: str, value: object, low: float, high: float = math.inf) -> float:
    """``value`` as a finite float in [low, high], or one clear error."""
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not (math.isfinite(number) and low <= number <= high):
        between = f"[{low:g}, inf)" if high == math.inf else f"[{low:g}, {high:g}]"
        raise ValueError(f"{name} must be a number in {between}, got {shown(value)}: pass a value in that range")
    return number


def rising_betas(value: object) -> list[float]:
    """Inverse temperatures that rise from 0 to 1, or one clear error."""
    if not isinstance(value, Iterable):
        raise TypeError(f"betas must be a sequence of numbers, got {value!r}: pass such as (0, .1, .5, 1)")
    betas = [in_range("every beta", beta, 0.0, 1.0) for beta in value]
    if len(betas) < 2 or betas[0] != 0 or betas[-1] != 1 or any(a >= b for a, b in pairwise(betas)):
        raise ValueError(f"betas must rise from 0 to 1, got {betas}: pass such as (0, .1, .5, 1)")
    return betas


def weight(name: str, value: object) -> float | torch.Tensor:
    """A weight that may be annealed: a 0-d tensor as it is, else a float of at least 0."""
    from torch import Tensor

    return value if isinstance(value, Tensor) and value.dim() == 0 else in_range(name, value, 0.0)


def one_of(name: str, value: T, choices: Iterable[str]) -> T:
    """``value`` if it is one of ``choices``, or an error that names the nearest."""
    choices = list(choices)
    if isinstance(value, str) and value in choices:
        return value
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)
    raise ValueError(f"unknown {name} {shown(value)}: did you mean {near[0]!r}? Choose one of {', '.join(choices)}")


def lookup(name: str, value: str, table: Mapping[str, T]) -> T:
    """The entry of ``table`` under ``value``, or an error that names the nearest.

    >>> lookup("activation", "thanh", {"tanh": 1, "relu": 2})
    Traceback (most recent call last):
    ...
    ValueError: unknown activation 'thanh': did you mean 'tanh'? Choose one of tanh, relu
    """
    return table[one_of(name, value, table)]


def fits(value: object, kind: Any) -> bool:
    """Whether a value, as JSON holds it, is of a type: a class, a union, or lists, dicts and TypedDicts of such.

    A float that was not finite is None there.

    >>> fits({"a": [1, None, 2.5]}, dict[str, list[float]]), fits({"a": None}, dict[str, int])
    (True, False)
    """
    inner = get_args(kind)
    if is_typeddict(kind):
        kinds = get_type_hints(kind)
        return isinstance(value, dict) and all(fits(v, kinds.get(name, object)) for name, v in value.items())
    match get_origin(kind):
        case origin if origin is UnionType:
            return any(fits(value, each) for each in inner)
        case origin if origin is list:
            return isinstance(value, list) and all(fits(each, *inner) for each in value)
        case origin if origin is dict:
            return isinstance(value, dict) and all(fits(each, inner[1]) for each in value.values())
    return isinstance(value, int | float | None if kind is float else kind)


def one_line(text: object, longest: int | None = 200) -> str:
    """A text in one line, cut where it is too long for a message."""
    return " ".join(str(text).split())[:longest]


def require_packages(extra: str, *packages: str) -> None:
    """A ResourceError where one of the packages of an extra, which pyrovae does without else, is not installed.

    >>> require_packages("hub", "json", "no_such_package")
    Traceback (most recent call last):
    ...
    pyrovae.errors.ResourceError: this needs no_such_package, which is not installed: pip install "pyrovae[hub]"
    """
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        raise ResourceError(f'this needs {absent[0]}, which is not installed: pip install "pyrovae[{extra}]"')


DEVICES = ("cpu", "cuda", "mps", "xpu")  # where a pair can be trained; others hold no values, or have no driver here


def pick_device(device: str | torch.device) -> torch.device:
    """The device asked for, never another: "auto" is CUDA where there is one, and the CPU elsewhere."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        count = getattr(torch, place.type).device_count() if place.type in DEVICES else 0
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'unknown device {device!r}: pass "auto", "cpu", "cuda" or "cuda:0"') from error
    if (place.index or 0) >= count:
        raise ValueError(
            f'device "{device}" was asked for, but {count} {place.type.upper()} devices are here: pass device="cpu"'
        )
    return place
