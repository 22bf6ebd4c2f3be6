"""Network parts: multilayer perceptrons and strided convolutions that accept any leading dimensions.

A Pyro program run with particles hands its networks ``[K, B, ...]`` where ordinary training hands them ``[B, ...]``.
Every module here takes both. They know nothing of distributions.

All weights start Glorot-uniform and all biases at zero (Glorot and Bengio, *Understanding the difficulty of training
deep feedforward neural networks*, 2010), the start of the IWAE paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pixel_shuffle, pixel_unshuffle

from pyrovae.arguments import lookup, positive_int, sizes

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "NETWORKS",
    "ConvDecoder",
    "ConvEncoder",
    "DenseDecoder",
    "DenseEncoder",
    "PatchDecoder",
    "PyramidEncoder",
    "ResidualBlock",
    "ResidualDecoder",
    "ResidualEncoder",
    "code_grid",
    "fold",
    "glorot",
    "networks",
    "pyramid",
    "zero",
]

Activation = str | Callable[[], nn.Module]
Convolution = TypeVar("Convolution", nn.Conv2d, nn.ConvTranspose2d)

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "sigmoid": nn.Sigmoid,
}


def fold(function: Callable[[Tensor], Tensor], x: Tensor, event_ndim: int) -> Tensor:
    """Apply a function of one batch dimension to ``x`` with any leading dimensions, as a single batch.

    Shapes: ``x`` is ``[*leading, *event]`` with ``event_ndim`` event dimensions; ``function`` maps ``[N, *event]`` to
    ``[N, *out]``; the result is ``[*leading, *out]``.

    >>> fold(nn.Conv2d(1, 3, 4), torch.zeros(5, 2, 1, 8, 8), event_ndim=3).shape
    torch.Size([5, 2, 3, 5, 5])
    """
    leading, event = x.shape[: x.ndim - event_ndim], x.shape[x.ndim - event_ndim :]
    y = function(x.reshape(math.prod(leading), *event))
    return y.reshape(*leading, *y.shape[1:])


@torch.no_grad()
def _glorot_(weight: Tensor, heads: Sequence[int], dim: int = 0) -> None:
    """Glorot's bound for each head by itself, as if heads that share one product were separate layers."""
    for head in weight.split(list(heads), dim):
        nn.init.xavier_uniform_(head)


def _linear(in_features: int, heads: Sequence[int]) -> nn.Linear:
    layer = nn.Linear(in_features, sum(heads))
    _glorot_(layer.weight, heads)
    nn.init.zeros_(layer.bias)
    return layer


def _activation(activation: Activation) -> nn.Module:
    return activation() if callable(activation) else lookup("activation", activation, ACTIVATIONS)()


class MLP(nn.Sequential):
    r"""Multilayer perceptron on the last axis.

    .. math:: y = W_L \, a(\cdots a(W_1 x + b_1) \cdots) + b_L, \qquad
              W_{ij} \sim U\!\left(\pm\sqrt{6 / (\mathrm{in} + \mathrm{out})}\right), \quad b = 0

    Shapes: ``[..., in_features]`` to ``[..., sum(out_features)]``. The last of the input's features may come apart, as
    a ``context`` of fewer leading dimensions: what they share is then multiplied once.

    :param in_features: size of the last axis of the input, the context included.
    :param hidden: widths of the hidden layers; ``()`` makes the network one linear layer.
    :param out_features: size of the output, or the sizes of several heads that lie side by side in it. Heads share one
        matrix product and start as separate layers would: "out" in the equation is the size of the head.
    :param activation: a name from :data:`ACTIVATIONS`, or anything that returns a module when called.

    >>> net = MLP(784, (200, 200), (50, 50))
    >>> mean, log_sigma = net(torch.zeros(5, 20, 784)).split(50, dim=-1)
    >>> mean.shape
    torch.Size([5, 20, 50])
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: int | Sequence[int],
        activation: Activation = "tanh",
    ) -> None:
        heads = sizes("out_features", [out_features] if isinstance(out_features, int) else out_features)
        widths = (positive_int("in_features", in_features), *sizes("hidden", hidden))
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [_linear(fan_in, [fan_out]), _activation(activation)]
        super().__init__(*layers, _linear(widths[-1], heads))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if context is None:
            return super().forward(x)
        first = cast(nn.Linear, self[0])
        of_x, of_context = first.weight.split((x.shape[-1], context.shape[-1]), 1)
        y = linear(x, of_x, first.bias) + linear(context, of_context)
        for layer in list(self)[1:]:
            y = layer(y)
        return y

    @property
    def output(self) -> nn.Linear:
        """The last layer."""
        return cast(nn.Linear, self[-1])

    @property
    def output_bias(self) -> Tensor:
        """The parameter that is added last, ``[sum(out_features)]``."""
        return self.output.bias

    def features(self, x: Tensor) -> Tensor:
        """What the last layer reads, ``[..., output.in_features]``."""
        for layer in list(self)[:-1]:
            x = layer(x)
        return x


class DenseEncoder(MLP):
    """An :class:`MLP` that reads an image: ``[..., *input_shape]`` to ``[..., sum(out_features)]``.

    ``context`` is the number of features that :meth:`forward` takes besides the image.

    >>> DenseEncoder((1, 8, 8), (32,), 10)(torch.zeros(5, 20, 1, 8, 8)).shape
    torch.Size([5, 20, 10])
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        hidden: Sequence[int],
        out_features: int | Sequence[int],
        activation: Activation = "tanh",
        context: int = 0,
    ) -> None:
        shape = sizes("input_shape", input_shape)
        super().__init__(math.prod(shape) + context, hidden, out_features, activation)
        self._event_ndim = len(shape)

    def features(self, x: Tensor) -> Tensor:
        return super().features(x.flatten(-self._event_ndim))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(x.flatten(-self._event_ndim), context)


class DenseDecoder(MLP):
    """An :class:`MLP` that writes an image, or ``heads`` images one after another along the first event axis.

    Shapes: ``[..., in_features]`` to ``[..., heads * output_shape[0], *output_shape[1:]]``.

    >>> DenseDecoder(10, (32,), (1, 8, 8), heads=2)(torch.zeros(5, 20, 10)).shape
    torch.Size([5, 20, 2, 8, 8])
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        output_shape: Sequence[int],
        activation: Activation = "tanh",
        heads: int = 1,
    ) -> None:
        first, *rest = sizes("output_shape", output_shape)
        super().__init__(in_features, hidden, [first * math.prod(rest)] * heads, activation)
        self._shape = (heads * first, *rest)

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(z, context).unflatten(-1, self._shape)


def _halvings(shape: Sequence[int], count: int) -> list[tuple[int, int]]:
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


def glorot(layer: Convolution, heads: int = 1) -> Convolution:
    """A convolution, started as every layer here; its output channels may be ``heads`` side by side."""
    transposed = isinstance(layer, nn.ConvTranspose2d)
    _glorot_(layer.weight, [layer.out_channels // heads] * heads, dim=1 if transposed else 0)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


@torch.no_grad()
def zero(layer: Convolution) -> Convolution:
    """Start a layer at zero: it says nothing until it has learned to."""
    for parameter in layer.parameters():
        parameter.zero_()
    return layer


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
        height, width = _halvings(shape, len(channels))[-1]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise((shape[0], *channels)):
            layers += [glorot(nn.Conv2d(fan_in, fan_out, 4, stride=2, padding=1)), _activation(activation)]
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
        grid = _halvings(shape, len(channels))[::-1]
        widths = (*channels, heads * shape[0])
        layers: list[nn.Module] = []
        for i in range(len(channels)):
            last = i == len(channels) - 1
            # An odd size was rounded down on the way in; the extra row or column gives it back.
            extra = (grid[i + 1][0] % 2, grid[i + 1][1] % 2)
            layer = nn.ConvTranspose2d(widths[i], widths[i + 1], 4, 2, 1, output_padding=extra, bias=not last)
            layers += [_activation(activation), glorot(layer, heads if last else 1)]
        self.dense = DenseDecoder(in_features, hidden, (channels[0], *grid[0]), activation)
        self.convolutions = nn.Sequential(*layers)
        self.output_bias = nn.Parameter(torch.zeros(heads * shape[0], *shape[1:]))

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return fold(self.convolutions, self.dense(z, context), 3) + self.output_bias


def code_grid(shape: Sequence[int], num_downsamplings: int) -> tuple[int, int]:
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
        self.activation = _activation(activation)
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
        input_shape: Sequence[int],
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
        output_shape: Sequence[int],
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


def pyramid(shape: Sequence[int], num_scales: int, patch: int) -> list[tuple[int, int]]:
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
        self,
        input_shape: Sequence[int],
        channels: Sequence[int],
        blocks: Sequence[int],
        patch: int = 2,
        activation: Activation = "silu",
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
        self,
        in_channels: int,
        output_shape: Sequence[int],
        patch: int = 2,
        heads: int = 1,
        activation: Activation = "silu",
    ) -> None:
        super().__init__()
        first, *rest = sizes("output_shape", output_shape)
        self.patch = positive_int("patch", patch)
        self.layers = nn.Sequential(
            _activation(activation), zero(nn.Conv2d(in_channels, heads * first * patch**2, 3, padding=1, bias=False))
        )
        self.output_bias = nn.Parameter(torch.zeros(heads * first, *rest))

    def forward(self, y: Tensor) -> Tensor:
        return pixel_shuffle(fold(self.layers, y, 3), self.patch) + self.output_bias


NETWORKS: dict[str, tuple[type[DenseEncoder | ConvEncoder], type[DenseDecoder | ConvDecoder]]] = {
    "mlp": (DenseEncoder, DenseDecoder),
    "conv": (ConvEncoder, ConvDecoder),
}
"""Pairs of encoder and decoder with the same arguments; a new kind of network is one more row."""


def networks(
    network: str, activation: str, channels: Sequence[int] | None = None
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What makes encoders and decoders of one kind; the shapes are left to give.

    :param network: a name from :data:`NETWORKS`.
    :param activation: a name from :data:`ACTIVATIONS`.
    :param channels: for convolutions: output channels of each in the encoder; the decoder has them in reverse.

    >>> encoder, decoder = networks("conv", "relu", (8, 16))
    >>> encoder((1, 28, 28), (32,), 10)(torch.zeros(5, 1, 28, 28)).shape
    torch.Size([5, 10])
    """
    makers: tuple[Callable[..., Any], Callable[..., Any]] = lookup("network", network, NETWORKS)
    make_encoder, make_decoder = makers
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
