"""Residual networks: between images and grids of codes, and down a pyramid of scales."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from pyrovae.arguments import positive_int, sizes
from pyrovae.nn.mlp import Activation, Sizes, fold, glorot, make_activation, zero


def code_grid(shape: Sizes, num_downsamplings: int) -> tuple[int, int]:
    """Height and width of an image after ``num_downsamplings`` convolutions of stride 2.

    :raises ValueError: the image is no ``(channels, height, width)``, or its sides cannot be halved that often.

    >>> code_grid((1, 28, 28), 2)
    (7, 7)
    >>> code_grid((1, 28, 30), 2)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: 2 strided convolutions need height and width to be multiples of 4, got 28x30: pad to 28x32, or give ...
    """
    if len(shape) != 3:
        raise ValueError(f"a grid of codes needs images (channels, height, width), got {tuple(shape)}: reshape them")
    _, height, width = shape
    step = 2 ** positive_int("num_downsamplings", num_downsamplings)
    if height % step or width % step:
        padded = "x".join(str(-(-side // step) * step) for side in (height, width))
        possible = (math.gcd(height, width) & -math.gcd(height, width)).bit_length() - 1
        fewer = f", or give num_downsamplings={possible}" if possible else ""
        raise ValueError(
            f"{num_downsamplings} strided convolutions need height and width to be multiples of {step}, "
            f"got {height}x{width}: pad to {padded}{fewer}"
        )
    return height // step, width // step


class ResidualBlock(nn.Module):
    r"""What comes in, and a correction on top of it.

    .. math:: y = x + W_{1 \times 1}\, a(W_{3 \times 3}\, a(x))

    Shapes: ``[N, channels, h, w]`` to the same.

    :param silent: start without the correction, so that a deep stack of blocks starts as a shallow network.

    >>> ResidualBlock(8)(torch.zeros(2, 8, 7, 7)).shape
    torch.Size([2, 8, 7, 7])
    """

    def __init__(self, channels: int, activation: Activation = "relu", *, silent: bool = False) -> None:
        super().__init__()
        width = positive_int("channels", channels)
        self.activation = make_activation(activation)
        self.wide = glorot(nn.Conv2d(width, width, 3, padding=1))
        self.narrow = (zero if silent else glorot)(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(self.activation(self.wide(self.activation(x))))


class ResidualEncoder(nn.Module):
    """An image as a grid of vectors: convolutions of stride 2 (4x4), residual blocks, one 1x1 convolution.

    Shapes: ``[..., *input_shape]`` to ``[..., out_channels, height / 2^n, width / 2^n]``.

    :param input_shape: ``(channels, height, width)``; both sides multiples of ``2^num_downsamplings``.
    :param out_channels: size of the vectors.
    :param channels: units of every hidden layer.
    :param residual_layers: number of residual blocks.
    :param num_downsamplings: n, the number of convolutions of stride 2.
    :raises ValueError: see :func:`code_grid`.

    >>> ResidualEncoder((1, 28, 28), 64, channels=32)(torch.zeros(5, 20, 1, 28, 28)).shape
    torch.Size([5, 20, 64, 7, 7])

    van den Oord, Vinyals and Kavukcuoglu, *Neural discrete representation learning*, 2017.
    """

    def __init__(
        self,
        input_shape: Sizes,
        out_channels: int,
        channels: int = 256,
        residual_layers: int = 2,
        num_downsamplings: int = 2,
    ) -> None:
        super().__init__()
        shape = sizes("input_shape", input_shape)
        code_grid(shape, num_downsamplings)
        width = positive_int("channels", channels)
        layers: list[nn.Module] = []
        for i in range(num_downsamplings):
            layers += [glorot(nn.Conv2d(width if i else shape[0], width, 4, stride=2, padding=1)), nn.ReLU()]
        layers[-1:] = [ResidualBlock(width) for _ in range(positive_int("residual_layers", residual_layers, 0))]
        out = glorot(nn.Conv2d(width, positive_int("out_channels", out_channels), 1))
        self.layers = nn.Sequential(*layers, nn.ReLU(), out)

    def forward(self, x: Tensor) -> Tensor:
        return fold(self.layers, x, 3)


class ResidualDecoder(nn.Module):
    """The mirror image of :class:`ResidualEncoder`: a grid of vectors as an image, or as ``heads`` of them.

    The last layer's bias has the shape of the output, as in :class:`ConvDecoder`.

    Shapes: ``[..., in_channels, height / 2^n, width / 2^n]`` to ``[..., heads * channels, height, width]``.

    :param in_channels: size of the vectors.
    :param output_shape: ``(channels, height, width)``; both sides multiples of ``2^num_downsamplings``.
    :param channels: units of every hidden layer.
    :param residual_layers: number of residual blocks.
    :param num_downsamplings: n, the number of transposed convolutions of stride 2.
    :param heads: number of images to write, one after another along the channel axis.
    :raises ValueError: see :func:`code_grid`.

    >>> ResidualDecoder(64, (3, 32, 32), channels=32)(torch.zeros(5, 20, 64, 8, 8)).shape
    torch.Size([5, 20, 3, 32, 32])
    """

    def __init__(
        self,
        in_channels: int,
        output_shape: Sizes,
        channels: int = 256,
        residual_layers: int = 2,
        num_downsamplings: int = 2,
        heads: int = 1,
    ) -> None:
        super().__init__()
        shape = sizes("output_shape", output_shape)
        code_grid(shape, num_downsamplings)
        width, out = positive_int("channels", channels), heads * shape[0]
        layers: list[nn.Module] = [glorot(nn.Conv2d(positive_int("in_channels", in_channels), width, 1))]
        layers += [ResidualBlock(width) for _ in range(positive_int("residual_layers", residual_layers, 0))]
        for i in reversed(range(num_downsamplings)):
            layer = nn.ConvTranspose2d(width, width if i else out, 4, stride=2, padding=1, bias=i > 0)
            layers += [nn.ReLU(), glorot(layer, 1 if i else heads)]
        self.layers = nn.Sequential(*layers)
        self.output_bias = nn.Parameter(torch.zeros(out, *shape[1:]))

    def forward(self, z: Tensor) -> Tensor:
        return fold(self.layers, z, 3) + self.output_bias


def pyramid(shape: Sizes, num_scales: int, patch: int) -> list[tuple[int, int]]:
    """Heights and widths of the scales of an image: patches of pixels, and each scale half of the one before.

    >>> pyramid((3, 32, 48), 3, patch=2)
    [(16, 24), (8, 12), (4, 6)]
    """
    if len(shape) != 3:
        raise ValueError(f"scales need a shape (channels, height, width), got {tuple(shape)}: reshape the data")
    positive_int("patch", patch)
    for side, size in zip(("height", "width"), shape[1:], strict=True):
        for i in range(num_scales):
            if size % (patch * 2**i):
                raise ValueError(
                    f"{side} {size} is no multiple of {patch * 2**i}, the step of scale {i + 1} of {num_scales} "
                    f"(patch={patch}, halved {i} times): pad to {-(-size // (patch * 2**i)) * patch * 2**i}, or give "
                    f"channels for fewer scales"
                )
    return [(shape[1] // (patch * 2**i), shape[2] // (patch * 2**i)) for i in range(num_scales)]


class PyramidEncoder(nn.Module):
    """An image as grids of features, each half as fine as the one before; all that a deep hierarchy wants to know.

    Patches of pixels become channels, then come residual blocks at every scale and convolutions of stride 2 (4x4)
    between them.

    Shapes: ``[..., *input_shape]`` to a list of ``[..., channels[i], height / s_i, width / s_i]`` with
    ``s_i = patch * 2^i``.

    :param input_shape: ``(channels, height, width)``.
    :param channels: of every scale, the finest first.
    :param blocks: number of residual blocks of every scale.
    :param patch: side of the patches, in pixels.
    :param activation: as in :class:`MLP`.
    :raises ValueError: height and width are no multiples of every ``s_i``; says of which not.

    >>> [tuple(y.shape) for y in PyramidEncoder((3, 32, 32), (8, 16), (1, 2))(torch.zeros(5, 3, 32, 32))]
    [(5, 8, 16, 16), (5, 16, 8, 8)]
    """

    def __init__(
        self, input_shape: Sizes, channels: Sizes, blocks: Sizes, patch: int = 2, activation: Activation = "silu"
    ) -> None:
        super().__init__()
        shape, channels = sizes("input_shape", input_shape), sizes("channels", channels)
        self.grids = pyramid(shape, len(channels), patch)
        self.patch = patch
        self.scales = nn.ModuleList()
        for i, (width, count) in enumerate(zip(channels, blocks, strict=True)):
            enter = nn.Conv2d(channels[i - 1], width, 4, 2, 1) if i else nn.Conv2d(shape[0] * patch**2, width, 3, 1, 1)
            residual = [ResidualBlock(width, activation, silent=True) for _ in range(count)]
            self.scales.append(nn.Sequential(glorot(enter), *residual))

    def forward(self, x: Tensor) -> list[Tensor]:
        y, found = pixel_unshuffle(x, self.patch), []
        for scale in self.scales:
            y = fold(scale, y, 3)
            found.append(y)
        return found


class PatchDecoder(nn.Module):
    """A grid of features as an image of ``patch`` times its size, or as ``heads`` of them; it starts at its bias.

    The bias has the shape of the output, as in :class:`ConvDecoder`.

    Shapes: ``[..., in_channels, height / patch, width / patch]`` to ``[..., heads * channels, height, width]``.

    >>> PatchDecoder(8, (3, 32, 32), heads=2)(torch.zeros(5, 20, 8, 16, 16)).shape
    torch.Size([5, 20, 6, 32, 32])
    """

    def __init__(
        self, in_channels: int, output_shape: Sizes, patch: int = 2, heads: int = 1, activation: Activation = "silu"
    ) -> None:
        super().__init__()
        first, *rest = sizes("output_shape", output_shape)
        self.patch = positive_int("patch", patch)
        self.layers = nn.Sequential(
            make_activation(activation),
            zero(nn.Conv2d(in_channels, heads * first * patch**2, 3, padding=1, bias=False)),
        )
        self.output_bias = nn.Parameter(torch.zeros(heads * first, *rest))

    def forward(self, y: Tensor) -> Tensor:
        return pixel_shuffle(fold(self.layers, y, 3), self.patch) + self.output_bias
