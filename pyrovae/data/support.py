"""Do the data lie in the support of the site that observes them?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints

from pyrovae.engine.unwrap import is_boolean, widest
from pyrovae.errors import DataError

CHUNK_BYTES = 64 * 2**20
DROP = "drop or replace such data, for instance with torch.nan_to_num"
BY_255 = "divide values from 0 to 255 by 255"


def check_support(
    x: Tensor, support: constraints.Constraint | None, *, site: str = "x", likelihood: str | None = None
) -> None:
    """Check that all values of ``x`` ``[N, ...]`` are finite and inside the support of the site that observes them.

    Works through ``x`` in pieces of about 64 MB, with one wait for the device each. A dependent support (or None) asks
    only for finite values; bounds that vary between pixels count with their widest values.

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
    bad = first_outside(x, partial(inside, support=support))
    if bad is None:
        return
    value, used = x[bad], "" if likelihood is None else f", likelihood {likelihood!r}"
    if support is None or not torch.isfinite(value).all():
        raise DataError(f'{at("data", bad, value)} at site "{site}"{used}: data must be finite; {DROP}')
    low, high = torch.aminmax(x)
    kind = "boolean: 0 or 1" if is_boolean(support) else repr(support)
    raise DataError(
        f'{at("data", bad, value)} is outside the support of site "{site}" ({kind}{used}); '
        f"the values run from {show(low)} to {show(high)}: {advice(support, low.item(), high.item())}"
    )


def first_outside(x: Tensor, valid: Callable[[Tensor], Tensor]) -> tuple[int, ...] | None:
    """The first index of ``x`` at which ``valid`` (called on slices of the leading dimension) is false."""
    rows = max(1, CHUNK_BYTES // max(1, x[:1].nbytes))
    for start in range(0, len(x), rows):
        ok = valid(x[start : start + rows])
        if not ok.all():
            first, *rest = np.unravel_index(int((~ok).to(torch.uint8).argmax()), ok.shape)
            return (start + int(first), *map(int, rest))
    return None


def inside(x: Tensor, support: constraints.Constraint | None) -> Tensor:
    """Which values (or events, for a support of those) are finite and in the support."""
    finite = torch.isfinite(x)
    if support is None:
        return finite
    inside = support.check(x)
    return inside & (finite if inside.dim() == x.dim() else finite.flatten(inside.dim()).all(-1))


def advice(support: constraints.Constraint, low: float, high: float) -> str:
    """What to do with values from ``low`` to ``high`` that a support does not hold."""
    boolean = is_boolean(support)
    if boolean and low >= 0 and high <= 1:
        return (
            "grey values need binarization='dynamic' (or 'static', 'threshold'), "
            "or a likelihood for them such as 'continuous_bernoulli'"
        )
    if not (boolean or getattr(support, "upper_bound", None) == 1):
        return "transform them into the support, or use a likelihood whose support holds them, such as 'gaussian'"
    if low < 0:
        return "rescale negative values to [0, 1], or use a likelihood for any real value such as 'gaussian'"
    return (BY_255 if 1 < high <= 255 else "rescale them to [0, 1]") + (", then binarise" if boolean else "")


def at(name: str, index: tuple[int, ...], value: Tensor) -> str:
    """Where a value stands, for a message: ``data[17, 0] = 0.53``."""
    return f"{name}[{', '.join(map(str, index))}] = {show(value)}"


def show(value: Tensor) -> str:
    """A value for a message; of a vector the first four."""
    if value.dim():
        return f"[{', '.join(show(v) for v in value.flatten()[:4])}{', ...' if value.numel() > 4 else ''}]"
    number = value.item()
    # The shortest digits that name the number in its own precision: 0.53, not 0.5299999713897705.
    return str(np.float32(number)) if value.is_floating_point() and value.dtype != torch.float64 else str(number)
