"""Measuring trained pairs: log p(x) by importance sampling and by annealing, and diagnostics of the latent space."""

from pyrovae.evaluate.ais import AISEstimate, Bracket, ais_log_likelihood, bdmc
from pyrovae.evaluate.diagnostics import active_units
from pyrovae.evaluate.gaps import GradientSNR, PosteriorGap, gradient_snr, posterior_gap
from pyrovae.evaluate.information import Information, information
from pyrovae.evaluate.likelihood import LikelihoodEstimate, log_likelihood
from pyrovae.evaluate.proposals import inflate, refine

__all__ = [
    "AISEstimate",
    "Bracket",
    "GradientSNR",
    "Information",
    "LikelihoodEstimate",
    "PosteriorGap",
    "active_units",
    "ais_log_likelihood",
    "bdmc",
    "gradient_snr",
    "inflate",
    "information",
    "log_likelihood",
    "posterior_gap",
    "refine",
]
