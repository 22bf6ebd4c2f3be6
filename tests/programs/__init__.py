"""Pyro's example programs and tutorials, and some of NumPyro's, written again in a few lines each, on small data."""

from tests.programs import chains, classics, hierarchies, neural, numpyros, processes
from tests.programs.registry import PROGRAMS

ALL = list(PROGRAMS)
__all__ = ["ALL", "chains", "classics", "hierarchies", "neural", "numpyros", "processes"]
