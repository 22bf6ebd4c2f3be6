"""The deep convolutional variational autoencoder: grids of latents at several scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pyrovae.arguments import sizes
from pyrovae.errors import DataError
from pyrovae.models.base import Pair, layer_number
from pyrovae.nn.mlp import fold, glorot, module_list, zero
from pyrovae.nn.residual import PatchDecoder, PyramidEncoder, ResidualBlock
from pyrovae.parts.likelihoods import make_likelihood

LIMIT = 5.0  # of log sigma, and of its change by the data
Draw = Callable[[int, Tensor], Tensor]


class StochasticLayer(nn.Module):
    r"""One grid of latents on the way down: its prior, its posterior, and what it adds to the path h.

    The posterior is written as a change of the prior, so that where the data say nothing the two are equal:

    .. math:: p(z \mid h) = N(\mu, \sigma^2), \qquad q(z \mid h, x) = N(\mu + \delta, (\sigma \rho)^2), \qquad
              h' = f(h + W z)

    Both start as N(0, I). Logarithms of :math:`\sigma, \rho` are kept in (-5, 5) by a tanh.

    Shapes: the path is ``[..., channels, h, w]``, the latents ``[..., latent_channels, h, w]``.

    :param channels: of the path, and of the encoder's features.
    :param latent_channels: of the grid of latents.
    :param depth: number of such layers in the model; each adds to the path in proportion to its inverse root.
    """

    def __init__(self, channels: int, latent_channels: int, depth: int = 1) -> None:
        super().__init__()
        self.activation = nn.SiLU()
        self.prior_head = zero(nn.Conv2d(channels, 2 * latent_channels, 3, padding=1))
        self.path_head = glorot(nn.Conv2d(channels, channels, 1))
        self.data_head = glorot(nn.Conv2d(channels, channels, 1, bias=False))
        self.change = zero(nn.Conv2d(channels, 2 * latent_channels, 3, padding=1))
        self.enter = glorot(nn.Conv2d(latent_channels, channels, 1, bias=False))
        self.block = ResidualBlock(channels, "silu", silent=True)
        with torch.no_grad():
            self.enter.weight.div_(math.sqrt(depth))

    def prior(self, path: Tensor) -> TorchDistribution:
        """p(z | h)."""
        mean, raw = fold(self.prior_head, self.activation(path), 3).chunk(2, -3)
        return dist.Normal(mean, soft_clamp(raw).exp()).to_event(3)

    def posterior(self, path: Tensor, features: Tensor) -> TorchDistribution:
        """q(z | h, x), of the encoder's features ``[..., channels, h, w]``."""
        h = self.activation(path)
        mean, raw = fold(self.prior_head, h, 3).chunk(2, -3)
        # Both parts by themselves: the features of a datum are the same for all of its particles.
        joint = fold(self.path_head, h, 3) + fold(self.data_head, features, 3)
        shift, stretch = fold(self.change, self.activation(joint), 3).chunk(2, -3)
        return dist.Normal(mean + shift, (soft_clamp(raw) + soft_clamp(stretch)).exp()).to_event(3)

    def forward(self, path: Tensor, z: Tensor) -> Tensor:
        """The path below this layer."""
        return fold(self.block, path + fold(self.enter, z, 3), 3)


def soft_clamp(raw: Tensor) -> Tensor:
    """Kept within LIMIT on either side, smoothly."""
    return LIMIT * torch.tanh(raw / LIMIT)


class DeepVAE(Pair):
    r"""Variational autoencoder of many stochastic layers, grids at several scales of an image.

    A deterministic encoder reads the image at every scale; the guide and the model come down one path, from a learned
    constant at the coarsest scale through residual blocks, on which every layer adds its latents:

    .. math:: p(x, z) = p(x \mid h_0) \prod_{l=L}^{1} p(z_l \mid h_l), \quad
              q(z \mid x) = \prod_{l=L}^{1} q(z_l \mid h_l, x), \quad h_{l-1} = f_l(h_l, z_l)

    so that each layer sees all those above it; see :class:`StochasticLayer`. Residual blocks and all that decides on
    distributions start at zero: the guide starts as the prior, KL 0, and the output at its bias. Train it with
    ``fit(clip_norm=...)``, and with ``kl_warmup`` where layers fall asleep.

    Shapes: Data is ``[B, channels, height, width]``; the plate ``"data"`` is at dim -1, with sites ``"z1"`` (next to
    the data) ... ``"zL"`` of event ``[latent_channels[i], height / s_i, width / s_i]``, :math:`s_i = patch \cdot 2^i`,
    and ``"x"`` of event ``input_shape``. A code is one vector per datum, of all layers, the highest first. Nats
    throughout.

    :param input_shape: shape of one datum, ``(channels, height, width)``; height and width multiples of every s_i.
    :param channels: width of the networks at every scale, the finest first.
    :param latent_channels: of each grid of latents, by scale.
    :param blocks: number of stochastic layers, and of the encoder's residual blocks, by scale.
    :param patch: side of the patches of pixels that make the finest scale.

    ``likelihood``, ``scale`` and ``levels`` are those of :class:`VAE`.

    :ivar config: the arguments, as JSON can hold them.
    :ivar num_layers: L, the number of stochastic layers.
    :raises TypeError, ValueError: at construction, for arguments that are out of range, unknown or do not go together,
        and for a height or width that the scales do not divide.
    :raises DataError: from the programs, for data of another shape.

    >>> vae = DeepVAE((3, 16, 16), channels=(8, 8), latent_channels=(2, 4), blocks=(1, 2))
    >>> vae.num_layers, vae.layer_shape(1), vae.layer_shape(3)
    (3, (2, 8, 8), (4, 4, 4))
    >>> x = torch.randint(256, (5, 3, 16, 16)) / 255
    >>> loss = pyro.infer.Trace_ELBO()(vae.initialise(x).model, vae.guide)(x)
    >>> vae.encode(x).shape, vae.encode(x, layer=2).shape, vae.reconstruct(x, layer=2).shape
    (torch.Size([5, 256]), torch.Size([5, 128]), torch.Size([5, 3, 16, 16]))

    Vahdat and Kautz, *NVAE: a deep hierarchical variational autoencoder*, 2020; Child, *Very deep VAEs generalize
    autoregressive models and can outperform them on images*, 2021.
    """

    def __init__(
        self,
        input_shape: Sequence[int] = (3, 32, 32),
        channels: Sequence[int] = (64, 96, 128),
        latent_channels: Sequence[int] = (4, 8, 16),
        blocks: Sequence[int] = (2, 2, 2),
        likelihood: str = "discretized_logistic",
        scale: float | str = "learned",
        *,
        levels: int | None = None,
        patch: int = 2,
    ) -> None:
        super().__init__()
        shape = self.set_shape(input_shape)
        given = {"channels": channels, "latent_channels": latent_channels, "blocks": blocks}
        per_scale = {name: sizes(name, value) for name, value in given.items()}
        if not all(per_scale.values()):
            raise ValueError(f"channels, latent_channels and blocks need one entry per scale, got {given}: give some")
        if len({len(value) for value in per_scale.values()}) > 1:
            got = ", ".join(f"{name}={value}" for name, value in per_scale.items())
            raise ValueError(f"channels, latent_channels and blocks need one entry per scale, got {got}: give as many")
        widths, self.latent_channels, counts = per_scale.values()
        self.encoder = PyramidEncoder(shape, widths, counts, patch)
        self.observation = make_likelihood(likelihood, shape, scale, levels)
        self.decoder = PatchDecoder(widths[0], shape, patch, self.observation.outputs)
        #: The scale of each layer, the layer next to the data first.
        self.scales = [i for i, count in enumerate(counts) for _ in range(count)]
        self.num_layers = len(self.scales)
        self.layers = module_list(StochasticLayer(widths[i], self.latent_channels[i], sum(counts)) for i in self.scales)
        self.rise = module_list(glorot(nn.Conv2d(b, a, 1)) for a, b in pairwise(widths))
        self.start = nn.Parameter(torch.zeros(widths[-1], *self.encoder.grids[-1]))

    def layer_shape(self, layer: int) -> tuple[int, int, int]:
        """Shape of the grid of latents of one layer."""
        scale = self.scales[layer_number(layer, self.num_layers) - 1]
        return (self.latent_channels[scale], *self.encoder.grids[scale])

    def model(self, x: Tensor) -> Tensor:
        """p(z_L) ... p(z_1 | h_1) p(x | h_0) over the plate ``"data"``, with ``x`` observed."""
        self.check(x)
        with pyro.plate("data", len(x)):
            path, z = self.descend(lambda layer, path: pyro.sample(f"z{layer}", self.prior(layer, path)))
            return pyro.sample("x", self.likelihood(path, z), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z | x) over the plate ``"data"``."""
        self.check(x)
        with pyro.plate("data", len(x)):
            features = self.encoder(x)
            self.descend(lambda layer, path: pyro.sample(f"z{layer}", self.posterior(layer, path, features)))

    def descend(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """Come down the path; ``draw(layer, path)`` gives each layer's latents. The path above z_1, and z_1."""
        path: Tensor = self.start
        for layer in range(self.num_layers, 1, -1):
            path = self.below(layer, path, draw(layer, path))
        return path, draw(1, path)

    def prior(self, layer: int, path: Tensor) -> TorchDistribution:
        """p(z_layer | h_layer)."""
        return self.layers[layer - 1].prior(path)

    def posterior(self, layer: int, path: Tensor, features: Sequence[Tensor]) -> TorchDistribution:
        """q(z_layer | h_layer, x), of the encoder's features at every scale."""
        return self.layers[layer - 1].posterior(path, features[self.scales[layer - 1]])

    def below(self, layer: int, path: Tensor, z: Tensor) -> Tensor:
        """h_layer-1, at the scale of the layer below."""
        path = self.layers[layer - 1](path, z)
        finer = self.scales[layer - 2] if layer > 1 else 0
        if finer == self.scales[layer - 1]:
            return path
        return fold(lambda h: interpolate(self.rise[finer](h), scale_factor=2.0), path, 3)

    def likelihood(self, path: Tensor, z: Tensor) -> TorchDistribution:  # type: ignore[override]
        """p(x | h_0), of the path above the first layer and that layer's latents."""
        return self.observation.distribution(self.decoder(self.below(1, path, z)))

    def encode(self, x: Tensor, layer: int = 1) -> Tensor:
        """The posterior's means from the highest layer down to ``layer``, each given those above, ``[..., units]``."""
        self.check(x)
        lowest, features = layer_number(layer, self.num_layers), self.encoder(x)
        means = []

        def draw(current: int, path: Tensor) -> Tensor:
            means.append(self.posterior(current, path, features).mean)
            return means[-1]

        self.descend(draw)
        return torch.cat([mean.flatten(-3) for mean in means[: self.num_layers - lowest + 1]], -1)

    def decode(self, z: Tensor, layer: int = 1) -> Tensor:
        """The likelihood's mean of a code of :meth:`encode`, layers below ``layer`` at the means of their priors."""
        shapes = [self.layer_shape(i) for i in range(self.num_layers, layer_number(layer, self.num_layers) - 1, -1)]
        units = [math.prod(shape) for shape in shapes]
        if z.shape[-1:] != (sum(units),):
            raise DataError(
                f"a code down to layer {layer} has {sum(units)} units, got {tuple(z.shape)}: pass what encode gives"
            )
        given = [part.unflatten(-1, shape) for part, shape in zip(z.split(units, -1), shapes, strict=True)]

        def draw(current: int, path: Tensor) -> Tensor:
            return given[self.num_layers - current] if current >= layer else self.prior(current, path).mean

        return self.likelihood(*self.descend(draw)).mean
