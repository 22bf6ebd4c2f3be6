"""Data sets, their binarisation, and the checks that data must pass.

:func:`load` reads a named set into :class:`Splits` of :class:`Images`; :func:`as_dataset` takes whatever else one has
(tensors, arrays, Datasets, DataLoaders); :func:`check_support` compares values with what a likelihood can explain.
"""

from pyrovae.data.feed import as_dataset, batches
from pyrovae.data.images import Images
from pyrovae.data.sets import DATASETS, Splits, load
from pyrovae.engine.support import check_support
from pyrovae.errors import DataError

__all__ = ["DATASETS", "DataError", "Images", "Splits", "as_dataset", "batches", "check_support", "load"]
