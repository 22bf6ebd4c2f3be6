import pyrovae.models.base
import pyrovae.named

from .autoencoders import Autoencoder, DenoisingAutoencoder, SparseAutoencoder
from .code_prior import CodePrior
from .conditional import ConditionalVAE
from .deep import DeepVAE
from .hierarchical import HierarchicalVAE
from .pca import PCA
from .rbm import RBM
from .semi_supervised import SemiSupervisedVAE
from .vae import VAE
from .vqvae import VQVAE, Quantized, VectorQuantizer

MODELS: pyrovae.named.Named[type[pyrovae.models.base.Pair]]

__all__ = [
    "MODELS", "PCA", "RBM", "VAE", "VQVAE", "Autoencoder", "CodePrior", "ConditionalVAE", "DeepVAE",
    "DenoisingAutoencoder", "HierarchicalVAE", "Quantized", "SemiSupervisedVAE", "SparseAutoencoder",
    "VectorQuantizer",
]  # fmt: skip
