"""A known state for tests: double precision, one seed, an empty parameter store."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pytest
import torch

from pyrovae.compile import inductor


@contextmanager
def double_precision(seed: int) -> Iterator[None]:
    """Default dtype float64, every generator seeded, Pyro's parameter store empty before and after."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        pyro.clear_param_store()


@contextmanager
def unwaiting() -> Iterator[None]:
    """On CUDA, whatever waits for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def refused(error: type[Exception], match: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Expect this call to fail so."""
    with pytest.raises(error, match=match):
        function(*arguments, **options)


def counting(patch: Any, compiler: Callable[..., Any]) -> list[Any]:
    """Count compilations, from an empty memory of them."""
    made: list[Any] = []
    patch.setattr(inductor, "through_inductor", lambda module: made.append(module) or compiler(module))
    patch.setattr(inductor, "_compiled", type(inductor._compiled)())
    return made


def scrambled(module: torch.nn.Module, std: float = 0.3) -> Any:
    """A module far from its start, where a flow is the identity."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return module


def grid(limit: float = 30.0, number: int = 601) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of a square in the plane, and the area of a cell."""
    axis = torch.linspace(-limit, limit, number)
    return torch.cartesian_prod(axis, axis), (axis[1] - axis[0]) ** 2
