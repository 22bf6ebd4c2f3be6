"""Errors of Pyro's checks in one line: which value is wrong, and where, instead of whole tensors."""

from __future__ import annotations

import re
from types import TracebackType

import numpy as np
from torch import Tensor

from pyrovae.arguments import one_line
from pyrovae.engine.support import at


def shorten(error: BaseException | None) -> None:
    """Let a ValueError that shows a tensor name the first value that is wrong; any other is left as it is.

    >>> import pyro.distributions as dist, torch
    >>> try:
    ...     dist.Normal(torch.tensor([0.0, torch.nan]), 1.0)
    ... except ValueError as error:
    ...     shorten(error)
    ...     print(error)
    Expected parameter loc (...) of distribution Normal(...) to satisfy the constraint Real(), but loc[1] = nan
    """
    if not isinstance(error, ValueError) or "tensor(" not in str(error):
        return
    site = re.search(r"at site '([^']*)'", str(error))
    inner: BaseException = error
    while isinstance(inner.__cause__, ValueError):
        inner = inner.__cause__
    message = one_line(str(inner).partition(", but found invalid values")[0].partition("tensor(")[0], None)
    message = re.sub(r"\((?:Tensor of shape|\w+: (?:torch|tensor|-?\d)).*?\)\)?(?= (?:of|to|is)|$)", "(...)", message)
    value, valid = failing(inner.__traceback__)
    if value is not None and valid is not None and not valid.all():
        index = np.unravel_index(int((~valid).int().argmax()), valid.shape)
        name = re.search(r"parameter (\w+)", message)
        message += f", but {at(name[1] if name else 'value', tuple(map(int, index)), value[index])}"
    error.args = (f'site "{site[1]}": {message}' if site else message,)


def failing(traceback: TracebackType | None) -> tuple[Tensor | None, Tensor | None]:
    """The value that torch's check refused, and where it was valid, from the frame that raised."""
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    found = {} if traceback is None else traceback.tb_frame.f_locals
    value, valid = found.get("value"), found.get("valid")
    fitting = isinstance(value, Tensor) and isinstance(valid, Tensor) and value.shape[: valid.dim()] == valid.shape
    return (value.detach(), valid) if fitting else (None, None)  # type: ignore[union-attr]


class Brief:
    """Inside, errors are shortened."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        shorten(error)
