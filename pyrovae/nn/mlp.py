"""Multilayer perceptrons that accept any leading dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pyrovae.arguments import lookup, positive_int, sizes

Convolution = TypeVar("Convolution", nn.Conv2d, nn.ConvTranspose2d)
M = TypeVar("M", bound=nn.Module)
Activation = str | Callable[[], nn.Module]
Sizes = Sequence[int]
Heads = int | Sequence[int]  # the size of an output, or of several side by side

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


def module_list(modules: Iterable[M]) -> Sequence[M]:
    """An ``nn.ModuleList`` that is known by what it holds."""
    return cast("Sequence[M]", nn.ModuleList(modules))


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
def glorot_(weight: Tensor, heads: Sizes, dim: int = 0) -> None:
    """Glorot's bound for each head by itself, as if heads that share one product were separate layers."""
    for head in weight.split(list(heads), dim):
        nn.init.xavier_uniform_(head)


def glorot_linear(in_features: int, heads: Sizes) -> nn.Linear:
    """A dense layer, started as every layer here, its outputs as several heads side by side."""
    layer = nn.Linear(in_features, sum(heads))
    glorot_(layer.weight, heads)
    nn.init.zeros_(layer.bias)
    return layer


def make_activation(activation: Activation) -> nn.Module:
    """The module of a name, or of what returns one."""
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

    def __init__(self, in_features: int, hidden: Sizes, out_features: Heads, activation: Activation = "tanh") -> None:
        heads = sizes("out_features", [out_features] if isinstance(out_features, int) else out_features)
        widths = (positive_int("in_features", in_features), *sizes("hidden", hidden))
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [glorot_linear(fan_in, [fan_out]), make_activation(activation)]
        super().__init__(*layers, glorot_linear(widths[-1], heads))

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
        self, input_shape: Sizes, hidden: Sizes, out_features: Heads, activation: Activation = "tanh", context: int = 0
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
        self, in_features: int, hidden: Sizes, output_shape: Sizes, activation: Activation = "tanh", heads: int = 1
    ) -> None:
        first, *rest = sizes("output_shape", output_shape)
        super().__init__(in_features, hidden, [first * math.prod(rest)] * heads, activation)
        self._shape = (heads * first, *rest)

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(z, context).unflatten(-1, self._shape)


def glorot(layer: Convolution, heads: int = 1) -> Convolution:
    """A convolution, started as every layer here; its output channels may be ``heads`` side by side."""
    transposed = isinstance(layer, nn.ConvTranspose2d)
    glorot_(layer.weight, [layer.out_channels // heads] * heads, dim=1 if transposed else 0)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


@torch.no_grad()
def zero(layer: Convolution) -> Convolution:
    """Start a layer at zero: it says nothing until it has learned to."""
    for parameter in layer.parameters():
        parameter.zero_()
    return layer
