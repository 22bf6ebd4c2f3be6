"""pyrovae: variational autoencoders as Pyro programs.

Every generative model is a Pyro model/guide pair, every training objective a :class:`pyro.infer.ELBO`, any pair meets
any objective, and log p(x) is measured by importance sampling with a standard error.
"""

__version__ = "0.1.0"

from pyrovae import data, errors, evaluate, models, nn, objectives, parts, plots
from pyrovae.engine.runner import log_weights
from pyrovae.evaluate import (
    AISEstimate,
    Bracket,
    GradientSNR,
    Information,
    LikelihoodEstimate,
    PosteriorGap,
    active_units,
    ais_log_likelihood,
    bdmc,
    gradient_snr,
    inflate,
    information,
    log_likelihood,
    posterior_gap,
    refine,
)
from pyrovae.objectives import (
    CIWAE,
    ELBO,
    IWAE,
    MIWAE,
    PIWAE,
    RWS,
    TVO,
    VIMCO,
    Objective,
    ParticleWeights,
    Renyi,
    SleepPhi,
    VRMax,
)
from pyrovae.runs import load
from pyrovae.sampling import sample
from pyrovae.train.compiled import training_step
from pyrovae.train.log import Fit
from pyrovae.train.loop import fit
from pyrovae.train.replicas import fit_replicas

__all__ = [
    "CIWAE", "ELBO", "IWAE", "MIWAE", "PIWAE", "RWS", "TVO", "VIMCO", "AISEstimate", "Bracket", "Fit", "GradientSNR",
    "Information", "LikelihoodEstimate", "Objective", "ParticleWeights", "PosteriorGap", "Renyi", "SleepPhi", "VRMax",
    "active_units", "ais_log_likelihood", "bdmc", "data", "errors", "evaluate", "fit", "fit_replicas", "gradient_snr",
    "inflate", "information", "load", "log_likelihood", "log_weights", "models", "nn", "objectives", "parts", "plots",
    "posterior_gap", "refine", "sample", "training_step",
]  # fmt: skip
