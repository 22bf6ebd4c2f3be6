"""The zoo: one file per family, each model a Pyro program with ``.model`` and ``.guide``."""

import lazy_loader

from pyrovae.named import Named

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["MODELS"]

MODELS = Named(
    __name__,
    vae="VAE",
    hierarchical="HierarchicalVAE",
    conditional="ConditionalVAE",
    semi_supervised="SemiSupervisedVAE",
    deep="DeepVAE",
    autoencoder="Autoencoder",
    sparse_autoencoder="SparseAutoencoder",
    denoising_autoencoder="DenoisingAutoencoder",
    pca="PCA",
    rbm="RBM",
    vqvae="VQVAE",
    code_prior="CodePrior",
)
