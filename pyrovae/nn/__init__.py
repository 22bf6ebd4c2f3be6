"""Networks that accept any leading dimensions: perceptrons, convolutions, residual pyramids."""

from pyrovae.nn.conv import NETWORKS, ConvDecoder, ConvEncoder, networks
from pyrovae.nn.mlp import ACTIVATIONS, MLP, DenseDecoder, DenseEncoder, fold, glorot, zero
from pyrovae.nn.residual import (
    PatchDecoder,
    PyramidEncoder,
    ResidualBlock,
    ResidualDecoder,
    ResidualEncoder,
    code_grid,
    pyramid,
)

__all__ = [
    "ACTIVATIONS", "MLP", "NETWORKS", "ConvDecoder", "ConvEncoder", "DenseDecoder", "DenseEncoder", "PatchDecoder",
    "PyramidEncoder", "ResidualBlock", "ResidualDecoder", "ResidualEncoder", "code_grid", "fold", "glorot",
    "networks", "pyramid", "zero",
]  # fmt: skip
