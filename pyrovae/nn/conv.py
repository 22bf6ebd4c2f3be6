"""Strided convolutions that accept any leading dimensions; networks by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from pyrovae.arguments import lookup, sizes
from pyrovae.nn.mlp import ACTIVATIONS, Activation, DenseDecoder, DenseEncoder, fold, glorot, make_activation


def halved(shape: Sequence[int], count: int) -> list[tuple[int, int]]:
    """Heights and widths before, between and after ``count`` convolutions of stride 2 (4x4, padding 1)."""
    if len(shape) != 3:
        raise ValueError(f"convolutions need a shape (channels, height, width), got {tuple(shape)}: use network='mlp'")
    if count == 0:
        raise ValueError("channels is empty: give one entry per convolution, or use network='mlp'")
    _, height, width = shape
    if min(height, width) < 2**count:
        raise ValueError(
            f"{count} strided convolutions halve the image {count} times and need height and width of at least "
            f"{2**count}, got {height}x{width}: give at most {int(math.log2(min(height, width)))} channels, "
            "or use network='mlp'"
        )
    return [(height >> i, width >> i) for i in range(count + 1)]


class ConvEncoder(nn.Module):
    """Convolutions of stride 2, then an :class:`MLP`.

    Every convolution is 4x4 with padding 1: it halves height and width, rounding down.

    Shapes: ``[..., *input_shape]`` to ``[..., sum(out_features)]``.

    :param input_shape: ``(channels, height, width)``.
    :param hidden: widths of the dense layers between the last convolution and the output.
    :param out_features: as in :class:`MLP`.
    :param activation: as in :class:`MLP`.
    :param channels: output channels of each convolution.
    :param context: features that :meth:`forward` takes besides the image; they join it where it becomes dense.
    :raises ValueError: the image is too small to be halved ``len(channels)`` times.

    >>> ConvEncoder((1, 28, 28), (256,), 10)(torch.zeros(5, 20, 1, 28, 28)).shape
    torch.Size([5, 20, 10])
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        hidden: Sequence[int],
        out_features: int | Sequence[int],
        activation: Activation = "relu",
        channels: Sequence[int] = (32, 64),
        context: int = 0,
    ) -> None:
        super().__init__()
        shape, channels = sizes("input_shape", input_shape), sizes("channels", channels)
        height, width = halved(shape, len(channels))[-1]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise((shape[0], *channels)):
            layers += [glorot(nn.Conv2d(fan_in, fan_out, 4, stride=2, padding=1)), make_activation(activation)]
        self.convolutions = nn.Sequential(*layers)
        self.dense = DenseEncoder(((shape[0], *channels)[-1], height, width), hidden, out_features, activation, context)

    @property
    def output(self) -> nn.Linear:
        """The last layer."""
        return self.dense.output

    def features(self, x: Tensor) -> Tensor:
        """What the last layer reads, ``[..., output.in_features]``."""
        return self.dense.features(fold(self.convolutions, x, 3))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.dense(fold(self.convolutions, x, 3), context)


class ConvDecoder(nn.Module):
    """The mirror image of :class:`ConvEncoder`: an MLP, then transposed convolutions up to the exact output size.

    The last layer's bias has the shape of the output, not one number per channel, so that it can hold the data's mean
    image.

    Shapes: ``[..., in_features]`` to ``[..., heads * channels, height, width]``.

    :param in_features: size of the last axis of the input.
    :param hidden: widths of the dense layers in front of the first transposed convolution.
    :param output_shape: ``(channels, height, width)``.
    :param activation: as in :class:`MLP`.
    :param heads: number of images to write, one after another along the channel axis.
    :param channels: input channels of each transposed convolution.
    :raises ValueError: the image is too small to be halved ``len(channels)`` times.

    >>> ConvDecoder(10, (256,), (3, 27, 31))(torch.zeros(5, 20, 10)).shape
    torch.Size([5, 20, 3, 27, 31])
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        output_shape: Sequence[int],
        activation: Activation = "relu",
        heads: int = 1,
        channels: Sequence[int] = (64, 32),
    ) -> None:
        super().__init__()
        shape, channels = sizes("output_shape", output_shape), sizes("channels", channels)
        grid = halved(shape, len(channels))[::-1]
        widths = (*channels, heads * shape[0])
        layers: list[nn.Module] = []
        for i in range(len(channels)):
            last = i == len(channels) - 1
            # An odd size was rounded down on the way in; the extra row or column gives it back.
            extra = (grid[i + 1][0] % 2, grid[i + 1][1] % 2)
            layer = nn.ConvTranspose2d(widths[i], widths[i + 1], 4, 2, 1, output_padding=extra, bias=not last)
            layers += [make_activation(activation), glorot(layer, heads if last else 1)]
        self.dense = DenseDecoder(in_features, hidden, (channels[0], *grid[0]), activation)
        self.convolutions = nn.Sequential(*layers)
        self.output_bias = nn.Parameter(torch.zeros(heads * shape[0], *shape[1:]))

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return fold(self.convolutions, self.dense(z, context), 3) + self.output_bias


Encoder = DenseEncoder | ConvEncoder
Decoder = DenseDecoder | ConvDecoder
MakeEncoder = Callable[..., Encoder]
MakeDecoder = Callable[..., Decoder]

NETWORKS: dict[str, tuple[MakeEncoder, MakeDecoder]] = {
    "mlp": (DenseEncoder, DenseDecoder),
    "conv": (ConvEncoder, ConvDecoder),
}
"""Pairs of encoder and decoder with the same arguments; a new kind of network is one more row."""


def networks(network: str, activation: str, channels: Sequence[int] | None = None) -> tuple[MakeEncoder, MakeDecoder]:
    """What makes encoders and decoders of one kind; the shapes are left to give.

    :param network: a name from :data:`NETWORKS`.
    :param activation: a name from :data:`ACTIVATIONS`.
    :param channels: for convolutions: output channels of each in the encoder; the decoder has them in reverse.

    >>> encoder, decoder = networks("conv", "relu", (8, 16))
    >>> encoder((1, 28, 28), (32,), 10)(torch.zeros(5, 1, 28, 28)).shape
    torch.Size([5, 10])
    """
    make_encoder, make_decoder = lookup("network", network, NETWORKS)
    lookup("activation", activation, ACTIVATIONS)
    if channels is None:
        return partial(make_encoder, activation=activation), partial(make_decoder, activation=activation)
    if network != "conv":
        raise ValueError(f"network={network!r} has no channels, got {channels}: leave them out, or use 'conv'")
    down = sizes("channels", channels)
    return (
        partial(make_encoder, activation=activation, channels=down),
        partial(make_decoder, activation=activation, channels=down[::-1]),
    )
