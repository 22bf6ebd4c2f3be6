"""Training objectives: bounds on log p(x), each a :class:`pyro.infer.ELBO`."""

from pyrovae.objectives.base import Objective, ParticleWeights
from pyrovae.objectives.bounds import CIWAE, IWAE, MIWAE, PIWAE, VIMCO, Renyi, VRMax
from pyrovae.objectives.elbo import ELBO

__all__ = ["CIWAE", "ELBO", "IWAE", "MIWAE", "PIWAE", "VIMCO", "Objective", "ParticleWeights", "Renyi", "VRMax"]

OBJECTIVES: dict[str, type[Objective]] = {
    "elbo": ELBO,
    "iwae": IWAE,
    "renyi": Renyi,
    "vrmax": VRMax,
    "miwae": MIWAE,
    "piwae": PIWAE,
    "ciwae": CIWAE,
    "vimco": VIMCO,
}
