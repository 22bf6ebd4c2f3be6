"""The zoo: one file per family, each model a Pyro program with ``.model`` and ``.guide``."""

from pyrovae.models.vae import VAE

MODELS = {"vae": VAE}

__all__ = ["MODELS", "VAE"]
