"""Pyro's example programs and tutorials, written again in a few lines each, on small data made here."""

from tests.programs import chains, hierarchies, neural, processes
from tests.programs.registry import PROGRAMS

ALL = list(PROGRAMS)
__all__ = ["ALL", "chains", "hierarchies", "neural", "processes"]
