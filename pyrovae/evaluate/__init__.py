"""Measuring trained pairs: log p(x) by importance sampling and by annealing, and diagnostics of the latent space."""

from pyrovae.evaluate.ais import ais_log_likelihood, bdmc
from pyrovae.evaluate.estimate import AISEstimate, Bracket, LikelihoodEstimate
from pyrovae.evaluate.gaps import GradientSNR, PosteriorGap, gradient_snr, posterior_gap
from pyrovae.evaluate.likelihood import log_likelihood
from pyrovae.evaluate.proposals import inflate, refine
from pyrovae.evaluate.units import Information, active_units, information

__all__ = [
    "AISEstimate", "Bracket", "GradientSNR", "Information", "LikelihoodEstimate", "PosteriorGap", "active_units",
    "ais_log_likelihood", "bdmc", "gradient_snr", "inflate", "information", "log_likelihood", "posterior_gap",
    "refine",
]  # fmt: skip
