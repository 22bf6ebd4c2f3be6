"""Measuring trained pairs: log p(x) by importance sampling, and diagnostics of the latent space."""

from pyrovae.evaluate.diagnostics import active_units
from pyrovae.evaluate.likelihood import LikelihoodEstimate, log_likelihood

__all__ = ["LikelihoodEstimate", "active_units", "log_likelihood"]
