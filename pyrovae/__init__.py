"""pyrovae: variational autoencoders as Pyro programs."""

from pyrovae import data, models, nn
from pyrovae.importance import log_weights
from pyrovae.objectives import CIWAE, ELBO, IWAE, MIWAE, PIWAE, VIMCO, Objective, ParticleWeights, Renyi, VRMax

__version__ = "0.1.0"
__all__ = [
    "CIWAE",
    "ELBO",
    "IWAE",
    "MIWAE",
    "PIWAE",
    "VIMCO",
    "Objective",
    "ParticleWeights",
    "Renyi",
    "VRMax",
    "data",
    "log_weights",
    "models",
    "nn",
]
