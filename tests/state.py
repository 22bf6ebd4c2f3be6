"""A known state for tests: double precision, one seed, an empty parameter store."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import torch


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
