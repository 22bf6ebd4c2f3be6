"""Do the data lie in the support of the site that observes them?"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyrovae.engine.unwrap import is_boolean, widest
from pyrovae.errors import DataError

CHUNK_BYTES = {"cpu": 2**20}  # looked at in one piece: what a cache holds; elsewhere 64 MB, one wait for each
BOUNDS = "lower_bound", "upper_bound"
# Supports that hold all (integer) values between two that they hold.
BETWEEN = (
    type(constraints.real), constraints.interval, constraints.half_open_interval, constraints.greater_than,
    constraints.greater_than_eq, constraints.less_than,
)  # fmt: skip
INTEGERS = type(constraints.boolean), constraints.integer_interval, type(constraints.nonnegative_integer)
UNORDERED = torch.uint16, torch.uint32, torch.uint64  # of which torch knows no extremes
DROP = "drop or replace such data, for instance with torch.nan_to_num"
BY_255 = "divide values from 0 to 255 by 255"
BITS_8 = "8-bit numbers of a file are grey values and divided by 255: write counts in a wider type, as int32"
BINARIZATION = (
    "binarization='dynamic' (or 'static', 'threshold'), or a likelihood for them such as 'continuous_bernoulli'"
)
PIXELS = 64  # numbers of a datum, from which on they may be pixels


class Within(constraints.interval):
    """Between two numbers, without these."""

    def check(self, value: Tensor) -> Tensor:
        return (value > self.lower_bound) & (value < self.upper_bound)

    def __repr__(self) -> str:
        return f"above {self.lower_bound:g} and below {self.upper_bound:g}"


class Shares(type(constraints.simplex)):  # type: ignore[misc]
    """Numbers above 0 whose sum is 1."""

    def check(self, value: Tensor) -> Tensor:
        return super().check(value) & (value > 0).all(-1)

    def __repr__(self) -> str:
        return "shares above 0"


def check_support(x: Tensor, support: Constraint | None, *, site: str = "x", likelihood: str | None = None) -> None:
    """Check that all values of ``x`` ``[N, ...]`` are finite and inside the support of the site that observes them.

    Works through ``x`` in pieces, with one wait for the device each. A dependent support (or None) asks only for finite
    values; bounds that vary between pixels count with their widest values.

    :param x: the data.
    :param support: a constraint of ``torch.distributions``, such as ``distribution.support``.
    :param site: the observed site's name.
    :param likelihood: the likelihood's name, for the message.
    :raises DataError: naming the first offending index, its value, the range received and the fix.

    >>> check_support(torch.tensor([[0.0, 1.0]]), constraints.boolean)
    >>> check_support(torch.tensor([[0.0, 0.53]]), constraints.boolean)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    pyrovae.errors.DataError: data[0, 1] = 0.53 is outside the support of site "x" (boolean: 0 or 1); the values...
    """
    support = None if support is None else widest(support)
    x = torch.atleast_1d(x.detach())
    if (bad := first_outside(x, support)) is not None:
        raise refusal(x, bad, support, site, "" if likelihood is None else f", likelihood {likelihood!r}")


def refusal(
    x: Tensor,
    bad: tuple[int, ...],
    support: Constraint | None,
    site: str,
    used: str = "",
    first: int = 0,
) -> DataError:
    """What to say of data ``x`` whose value (or event) at the index ``bad`` a site cannot observe.

    :param used: more of the site.
    :param first: the number of the first datum.
    """
    value, support = x[bad], None if support is None else widest(support)
    place = (first + bad[0], *bad[1:]) if bad else bad
    where, refused = at("data", place, value), partial(DataError, datum=next(iter(place), None))
    if support is None or not torch.isfinite(value).all():
        return refused(f'{where} at site "{site}"{used}: data must be finite; {DROP}')
    finite = x[x.isfinite()]
    low, high = torch.aminmax(finite)
    kind = "boolean: 0 or 1" if is_boolean(support) else repr(support)
    if isinstance(support, type(constraints.simplex)):
        return refused(f'{where} is outside the support of site "{site}" ({kind}{used}): {of_shares(value)}')
    return refused(
        f'{where} is outside the support of site "{site}" ({kind}{used}); '
        f"the values run from {show(low)} to {show(high)}: {advice(support, low.item(), high.item(), may_be_pixels(x))}"
    )


def of_shares(row: Tensor) -> str:
    """What is wrong with a row whose numbers are to be shares, and what to do."""
    if (row < 0).any():
        return f"it holds {show(row.min())}, but shares are not negative: rescale the data"
    if abs(float(total := row.double().sum()) - 1) > 1e-6:
        return f"its sum is {total:.7g} and not 1: divide each row by its sum, as in x / x.sum(-1, keepdim=True)"
    return "it holds a 0, where its density is 0 or infinite: add a small number to all, and divide each row by its sum"


def may_be_pixels(x: Tensor) -> bool:
    """Whether data look like images, and not like the rows of a table."""
    return x.dim() > 2 or x.dtype == torch.uint8 or x[:1].numel() >= PIXELS


def first_outside(x: Tensor, support: Constraint | None = None) -> tuple[int, ...] | None:
    """The first index of ``x`` whose value (or event) is not finite or not in the support."""
    rows = rows_at_a_time(x)
    for start in range(0, len(x), rows):
        if not all_inside(part := x[start : start + rows], support) and not (ok := inside(part, support)).all():
            first, *rest = np.unravel_index(int((~ok).to(torch.uint8).argmax()), ok.shape)
            return (start + int(first), *map(int, rest))
    return None


def rows_at_a_time(x: Tensor) -> int:
    """How many rows of ``x`` make a piece."""
    return max(1, CHUNK_BYTES.get(x.device.type, 64 * 2**20) // max(1, x[:1].nbytes))


def inside(x: Tensor, support: Constraint | None) -> Tensor:
    """Which values (or events, for a support of those) are finite and in the support."""
    finite = torch.isfinite(x)
    if support is None:
        return finite
    inside = support.check(x)
    if isinstance(support, constraints.multinomial):
        inside = inside & (x == x.round()).all(-1)
    return inside & (finite if inside.dim() == x.dim() else finite.flatten(inside.dim()).all(-1))


def all_inside(x: Tensor, support: Constraint | None) -> Tensor:
    """Whether all values are finite and in the support, 0-d: quickly, where the extremes say it of what is between."""
    varies = any(isinstance(getattr(support, name, None), Tensor) for name in BOUNDS)
    known = support is None or isinstance(support, BETWEEN + INTEGERS)
    if varies or not known or not x.numel() or x.is_complex() or x.dtype in UNORDERED:
        return inside(x, support).all()
    if not (isinstance(support, INTEGERS) and x.is_floating_point()):
        return inside(torch.stack(torch.aminmax(x)), support).all()
    if is_boolean(support):  # x - x^2 is 0 at 0 and 1 alone, and NaN at infinity; extremes take less time than equality
        return torch.stack(torch.aminmax(torch.addcmul(x, x, x, value=-1))).eq(0).all()
    ends = torch.stack([*torch.aminmax(x), *torch.aminmax(x.round().sub_(x))])
    return inside(ends[:2], support).all() & ends[2:].eq(0).all()


def advice(support: Constraint, low: float, high: float, pixels: bool = True) -> str:
    """What to do with values from ``low`` to ``high``, of pixels or others, that a support does not hold."""
    boolean = is_boolean(support)
    ends = [getattr(support, name, None) for name in BOUNDS]
    if isinstance(support, Within | constraints.greater_than) and (low == ends[0] or high == ends[1]):
        return (
            "at its ends the density is 0 or infinite: move such values inside, as by x.clamp(min=1e-4), "
            "or use a likelihood that holds them, such as 'gaussian'"
        )
    if boolean and low >= 0 and high <= 1:
        return f"{'grey values' if pixels else 'values in between'} need {BINARIZATION}"
    if isinstance(support, INTEGERS) and not boolean and low >= getattr(support, "lower_bound", low):
        most = getattr(support, "upper_bound", high)
        grey = f" ({BITS_8})" if high <= 1 else ""
        return (
            f"it takes integers up to {most:g}; count from 0, or give it more classes or trials"
            if high > most
            else f"it counts in integers: pass counts{grey}, or use a likelihood for real values, such as 'gaussian'"
        )
    if not (boolean or getattr(support, "upper_bound", None) == 1):
        return "transform them into the support, or use a likelihood whose support holds them, such as 'gaussian'"
    if low < 0:
        return "rescale negative values to [0, 1], or use a likelihood for any real value such as 'gaussian'"
    if boolean and not pixels:
        return "rescale them to 0 and 1, or use a likelihood that holds them, such as 'gaussian'"
    how = BY_255 if pixels and 1 < high <= 255 else "rescale them to [0, 1]"
    return how + (", then binarise" if boolean else "")


def at(name: str, index: tuple[int, ...], value: Tensor) -> str:
    """Where a value stands, for a message: ``data[17, 0] = 0.53``."""
    place = f"[{', '.join(map(str, index))}]" if index else ""
    return f"{name}{place} = {show(value)}"


def show(value: Tensor) -> str:
    """A value for a message; of a vector the first four."""
    if value.dim():
        return f"[{', '.join(show(v) for v in value.flatten()[:4])}{', ...' if value.numel() > 4 else ''}]"
    number = value.item()
    # The shortest digits that name the number in its own precision: 0.53, not 0.5299999713897705.
    return str(np.float32(number)) if value.is_floating_point() and value.dtype != torch.float64 else str(number)
