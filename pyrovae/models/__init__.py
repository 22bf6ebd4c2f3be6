"""The zoo: one file per family, each model a Pyro program with ``.model`` and ``.guide``."""

from pyrovae.models.autoencoders import Autoencoder, DenoisingAutoencoder, SparseAutoencoder
from pyrovae.models.code_prior import CodePrior
from pyrovae.models.conditional import ConditionalVAE
from pyrovae.models.deep import DeepVAE
from pyrovae.models.hierarchical import HierarchicalVAE
from pyrovae.models.pca import PCA
from pyrovae.models.rbm import RBM
from pyrovae.models.semi_supervised import SemiSupervisedVAE
from pyrovae.models.vae import VAE
from pyrovae.models.vqvae import VQVAE
from pyrovae.parts.quantizer import Quantized, VectorQuantizer

MODELS = {
    "vae": VAE,
    "hierarchical": HierarchicalVAE,
    "conditional": ConditionalVAE,
    "semi_supervised": SemiSupervisedVAE,
    "deep": DeepVAE,
    "autoencoder": Autoencoder,
    "sparse_autoencoder": SparseAutoencoder,
    "denoising_autoencoder": DenoisingAutoencoder,
    "pca": PCA,
    "rbm": RBM,
    "vqvae": VQVAE,
    "code_prior": CodePrior,
}

__all__ = [
    "MODELS", "PCA", "RBM", "VAE", "VQVAE", "Autoencoder", "CodePrior", "ConditionalVAE", "DeepVAE",
    "DenoisingAutoencoder", "HierarchicalVAE", "Quantized", "SemiSupervisedVAE", "SparseAutoencoder",
    "VectorQuantizer",
]  # fmt: skip
