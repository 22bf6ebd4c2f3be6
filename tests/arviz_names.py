"""What tests ask of ArviZ, by the names that its version has: 0.23 is one package, 1 several."""

from __future__ import annotations

import arviz
import numpy as np
import xarray

OLD = "InferenceData" in vars(arviz)
KEPT = arviz.InferenceData if OLD else xarray.DataTree  #: what its tables are


def pareto_shape(log_w: np.ndarray) -> float:
    """The tail shape k of one datum's log-weights."""
    if OLD:
        return float(arviz.psislw(log_w)[1])
    from arviz_stats.base import array_stats

    return float(array_stats.psislw(-log_w)[1])
