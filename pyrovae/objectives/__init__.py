"""Training objectives: bounds on log p(x), each a :class:`pyro.infer.ELBO`."""

from pyrovae.engine.gradient import ParticleWeights
from pyrovae.objectives.base import Objective
from pyrovae.objectives.bounds import CIWAE, IWAE, MIWAE, PIWAE, VIMCO, Renyi, VRMax
from pyrovae.objectives.elbo import ELBO
from pyrovae.objectives.tvo import TVO
from pyrovae.objectives.wake_sleep import RWS, SleepPhi

__all__ = [
    "CIWAE", "ELBO", "IWAE", "MIWAE", "PIWAE", "RWS", "TVO", "VIMCO", "Objective", "ParticleWeights", "Renyi",
    "SleepPhi", "VRMax",
]  # fmt: skip

OBJECTIVES: dict[str, type[Objective]] = {
    "elbo": ELBO,
    "iwae": IWAE,
    "renyi": Renyi,
    "vrmax": VRMax,
    "miwae": MIWAE,
    "piwae": PIWAE,
    "ciwae": CIWAE,
    "vimco": VIMCO,
    "rws": RWS,
    "tvo": TVO,
    "sleep": SleepPhi,
}
