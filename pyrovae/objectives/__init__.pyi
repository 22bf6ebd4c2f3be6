import pyrovae.named

from .base import Objective, ParticleWeights
from .bounds import CIWAE, IWAE, MIWAE, PIWAE, VIMCO, Renyi, VRMax
from .elbo import ELBO
from .tvo import TVO
from .wake_sleep import RWS, SleepPhi

OBJECTIVES: pyrovae.named.Named[type[Objective]]

__all__ = [
    "CIWAE", "ELBO", "IWAE", "MIWAE", "OBJECTIVES", "PIWAE", "RWS", "TVO", "VIMCO", "Objective", "ParticleWeights",
    "Renyi", "SleepPhi", "VRMax",
]  # fmt: skip
