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
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyrovae.arguments import lookup, positive_int, sizes

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "NETWORKS",
    "ConvDecoder",
    "ConvEncoder",
    "DenseDecoder",
    "DenseEncoder",
    "fold",
    "networks",
]

Activation = str | Callable[[], nn.Module]

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

    Shapes: ``[..., in_features]`` to ``[..., sum(out_features)]``.

    :param in_features: size of the last axis of the input.
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

    @property
    def output(self) -> nn.Linear:
        """The last layer."""
        return cast(nn.Linear, self[-1])

    @property
    def output_bias(self) -> Tensor:
        """The parameter that is added last, ``[sum(out_features)]``."""
        return self.output.bias


class DenseEncoder(MLP):
    """An :class:`MLP` that reads an image: ``[..., *input_shape]`` to ``[..., sum(out_features)]``.

    >>> DenseEncoder((1, 8, 8), (32,), 10)(torch.zeros(5, 20, 1, 8, 8)).shape
    torch.Size([5, 20, 10])
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        hidden: Sequence[int],
        out_features: int | Sequence[int],
        activation: Activation = "tanh",
    ) -> None:
        shape = sizes("input_shape", input_shape)
        super().__init__(math.prod(shape), hidden, out_features, activation)
        self._event_ndim = len(shape)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(-self._event_ndim))


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

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z).unflatten(-1, self._shape)


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


def _start_(layer: nn.Conv2d | nn.ConvTranspose2d, heads: int = 1) -> nn.Module:
    transposed = isinstance(layer, nn.ConvTranspose2d)
    _glorot_(layer.weight, [layer.out_channels // heads] * heads, dim=1 if transposed else 0)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
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
    ) -> None:
        super().__init__()
        shape, channels = sizes("input_shape", input_shape), sizes("channels", channels)
        height, width = _halvings(shape, len(channels))[-1]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise((shape[0], *channels)):
            layers += [_start_(nn.Conv2d(fan_in, fan_out, 4, stride=2, padding=1)), _activation(activation)]
        self.convolutions = nn.Sequential(*layers)
        self.dense = DenseEncoder(((shape[0], *channels)[-1], height, width), hidden, out_features, activation)

    @property
    def output(self) -> nn.Linear:
        """The last layer."""
        return self.dense.output

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(fold(self.convolutions, x, 3))


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
            layers += [_activation(activation), _start_(layer, heads if last else 1)]
        self.dense = DenseDecoder(in_features, hidden, (channels[0], *grid[0]), activation)
        self.convolutions = nn.Sequential(*layers)
        self.output_bias = nn.Parameter(torch.zeros(heads * shape[0], *shape[1:]))

    def forward(self, z: Tensor) -> Tensor:
        return fold(self.convolutions, self.dense(z), 3) + self.output_bias


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
