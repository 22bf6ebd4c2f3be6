"""Measuring trained pairs: log p(x) by importance sampling and by annealing, and diagnostics of the latent space."""

from pyrovae.evaluate.ais import AISEstimate, Bracket, ais_log_likelihood, bdmc
from pyrovae.evaluate.diagnostics import active_units
from pyrovae.evaluate.likelihood import LikelihoodEstimate, log_likelihood

__all__ = [
    "AISEstimate",
    "Bracket",
    "LikelihoodEstimate",
    "active_units",
    "ais_log_likelihood",
    "bdmc",
    "log_likelihood",
]
