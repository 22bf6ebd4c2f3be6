"""Data sets, their binarisation, and the checks that data must pass.

:func:`load` reads a named set into :class:`Splits` of :class:`Images`; :func:`as_dataset` takes whatever else one has
(tensors, arrays, Datasets, DataLoaders); :func:`check_support` compares values with what a likelihood can explain.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
