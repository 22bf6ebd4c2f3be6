"""Training objectives: bounds on log p(x), each a :class:`pyro.infer.ELBO`."""

import lazy_loader

from pyrovae.named import Named

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["OBJECTIVES"]

OBJECTIVES = Named(
    __name__,
    elbo="ELBO",
    iwae="IWAE",
    renyi="Renyi",
    vrmax="VRMax",
    miwae="MIWAE",
    piwae="PIWAE",
    ciwae="CIWAE",
    vimco="VIMCO",
    rws="RWS",
    tvo="TVO",
    sleep="SleepPhi",
)
