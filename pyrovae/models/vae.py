"""The variational autoencoder: one latent vector per datum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyrovae.arguments import DataError, lookup, positive_int, sizes
from pyrovae.likelihoods import make_likelihood
from pyrovae.nn import ACTIVATIONS, NETWORKS

__all__ = ["POSTERIORS", "VAE", "DiagonalNormal", "FullNormal"]


class DiagonalNormal(nn.Module):
    r"""Encoder output as :math:`N(\mu, \mathrm{diag}\,\sigma^2)` with :math:`\sigma = \exp(\text{output})`.

    Shapes: ``[..., 2 * dim]`` to a distribution of batch shape ``[...]`` and event shape ``[dim]``.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads: tuple[int, ...] = (dim, dim)

    def forward(self, params: Tensor) -> TorchDistribution:
        mean, log_sigma = params.chunk(2, -1)
        return dist.Normal(mean, log_sigma.exp()).to_event(1)

    @torch.no_grad()
    def start_(self, output: nn.Linear) -> None:
        """Set what the encoder's last layer should start with, other than Glorot's."""


class FullNormal(DiagonalNormal):
    r"""Encoder output as :math:`N(\mu, L L^\top)`, L lower triangular with diagonal :math:`\exp(\text{output})`.

    The weights of the elements below the diagonal start at 0, so that it starts as the :class:`DiagonalNormal`.

    Shapes: ``[..., 2 * dim + dim * (dim - 1) / 2]`` to a distribution of batch shape ``[...]`` and event shape
    ``[dim]``.
    """

    below: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.register_buffer("below", torch.tril_indices(dim, dim, -1), persistent=False)
        if dim > 1:
            self.heads = (dim, dim, self.below.shape[1])

    def forward(self, params: Tensor) -> TorchDistribution:
        dim = self.heads[0]
        mean, log_diagonal, below = params.tensor_split((dim, 2 * dim), -1)
        scale_tril = log_diagonal.exp().diag_embed()
        scale_tril[..., self.below[0], self.below[1]] = below
        return dist.MultivariateNormal(mean, scale_tril=scale_tril)

    @torch.no_grad()
    def start_(self, output: nn.Linear) -> None:
        output.weight[2 * self.heads[0] :].zero_()


POSTERIORS: dict[str, type[DiagonalNormal]] = {"diagonal": DiagonalNormal, "full": FullNormal}


class VAE(nn.Module):
    r"""Variational autoencoder with one stochastic layer.

    .. math:: z \sim N(0, I), \qquad x \mid z \sim p(x; f_\theta(z)), \qquad
              q_\phi(z \mid x) = N(\mu_\phi(x), \mathrm{diag}\,\sigma_\phi^2(x))

    The defaults are the one-layer network of the IWAE paper: 784-200-200-(50, 50) and 50-200-200-784, tanh,
    :math:`\sigma` the exponential of a linear layer, Glorot-uniform weights and zero biases. ``hidden=()`` is the
    linear VAE, whose log p(x) is known exactly with a Gaussian likelihood.

    Shapes: Data is ``[B, *input_shape]``; the plate ``"data"`` is at dim -1, with sites ``"z"`` of event
    ``[latent_dim]`` and ``"x"`` of event ``input_shape``. Within an outer plate of K particles at dim -2, z is
    ``[K, B, latent_dim]`` and the decoder's output ``[K, B, *input_shape]``. Nats throughout.

    :param input_shape: shape of one datum, such as ``(1, 28, 28)`` or ``(784,)``.
    :param latent_dim: number of latent units.
    :param hidden: widths of the encoder's dense layers; the decoder has them in reverse.
    :param likelihood: ``"bernoulli"``, ``"gaussian"``, ``"continuous_bernoulli"`` or ``"discretized_logistic"``.
    :param scale: for the Gaussian and the discretized logistic: a number (fixed), ``"learned"`` or ``"per_pixel"``.
    :param levels: for the discretized logistic: number of grey values, by default 256.
    :param posterior: ``"diagonal"``, or ``"full"`` for a full covariance.
    :param network: ``"mlp"`` or ``"conv"``; convolutions come in front of the encoder's dense layers.
    :param activation: a name from :data:`pyrovae.nn.ACTIVATIONS`.
    :param channels: for convolutions of stride 2: output channels of each in the encoder, by default ``(32, 64)``.
    :ivar config: the arguments, as JSON can hold them; ``VAE(**vae.config)`` has the same architecture.
    :raises TypeError, ValueError: at construction, for arguments that are out of range, unknown or do not go together.
    :raises DataError: from the programs, for data of another shape.

    >>> vae = VAE((1, 8, 8), latent_dim=5, hidden=(32,))
    >>> x = torch.rand(20, 1, 8, 8).round()
    >>> loss = pyro.infer.Trace_ELBO()(vae.initialise(x).model, vae.guide)(x)
    >>> vae.decode(vae.encode(x)).shape
    torch.Size([20, 1, 8, 8])

    Kingma and Welling, *Auto-encoding variational Bayes*, 2014; Burda, Grosse and Salakhutdinov, *Importance weighted
    autoencoders*, 2016.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        latent_dim: int = 50,
        hidden: Sequence[int] = (200, 200),
        likelihood: str = "bernoulli",
        scale: float | str = "learned",
        *,
        levels: int | None = None,
        posterior: str = "diagonal",
        network: str = "mlp",
        activation: str = "tanh",
        channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        shape, widths = sizes("input_shape", input_shape), sizes("hidden", hidden)
        if not shape:
            raise ValueError("input_shape is empty: give the shape of one datum, such as (1, 28, 28)")
        make_encoder, make_decoder = lookup("network", network, NETWORKS)
        lookup("activation", activation, ACTIVATIONS)
        if channels is not None and network != "conv":
            raise ValueError(f"network={network!r} has no channels, got {channels}: leave them out, or use 'conv'")
        channels = None if channels is None else sizes("channels", channels)

        self.config = {
            "input_shape": list(shape),
            "latent_dim": positive_int("latent_dim", latent_dim),
            "hidden": list(widths),
            "likelihood": likelihood,
            "scale": scale,
            "levels": None if levels is None else positive_int("levels", levels, minimum=2),
            "posterior": posterior,
            "network": network,
            "activation": activation,
            "channels": None if channels is None else list(channels),
        }
        self.input_shape, self.latent_dim = shape, positive_int("latent_dim", latent_dim)
        self.observation = make_likelihood(likelihood, shape, scale, levels)
        self.normal = lookup("posterior", posterior, POSTERIORS)(self.latent_dim)

        down: dict[str, Any] = {} if channels is None else {"channels": channels}
        up: dict[str, Any] = {} if channels is None else {"channels": channels[::-1]}
        self.encoder = make_encoder(shape, widths, self.normal.heads, activation, **down)
        self.decoder = make_decoder(
            self.latent_dim, widths[::-1], shape, activation, heads=self.observation.outputs, **up
        )
        self.normal.start_(self.encoder.output)

    def model(self, x: Tensor) -> Tensor:
        """p(z) p(x | z) over the plate ``"data"``, with ``x`` observed."""
        self._check(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(x))
            return pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x: Tensor) -> Tensor:
        """q(z | x) over the plate ``"data"``."""
        self._check(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("z", self.posterior(x))

    def prior(self, like: Tensor) -> TorchDistribution:
        """p(z), of the tensor's dtype and device."""
        return dist.Normal(like.new_zeros(self.latent_dim), like.new_ones(self.latent_dim)).to_event(1)

    def likelihood(self, z: Tensor) -> TorchDistribution:
        """p(x | z) of latents ``[..., latent_dim]``."""
        return self.observation.distribution(self.decoder(z))

    def posterior(self, x: Tensor) -> TorchDistribution:
        """q(z | x) of data ``[..., *input_shape]``."""
        return self.normal(self.encoder(x))

    def encode(self, x: Tensor) -> Tensor:
        """The posterior's mean, ``[..., *input_shape]`` to ``[..., latent_dim]``."""
        return self.posterior(x).mean

    def decode(self, z: Tensor) -> Tensor:
        """The likelihood's mean, ``[..., latent_dim]`` to ``[..., *input_shape]``."""
        return self.likelihood(z).mean

    @torch.no_grad()
    def initialise(self, x: Tensor) -> VAE:
        r"""Start the decoder's output bias at the mean of the data ``[N, *input_shape]``; returns the model itself.

        For a Bernoulli the bias is :math:`\mathrm{logit}(\mathrm{clip}(\bar x, .001, .999))`, as in the IWAE paper's
        code, where it is worth about a nat.
        """
        self._check(x)
        mean = x.mean(0, dtype=torch.float64)
        bias = self.decoder.output_bias
        bias.copy_(self.observation.initial_bias(mean).reshape(bias.shape))
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config.items() if value is not None)

    def _check(self, x: Tensor) -> None:
        if x.shape[1:] != self.input_shape:
            raise DataError(
                f"data must be [batch, *input_shape] with input_shape={self.input_shape}, got {tuple(x.shape)}: "
                "reshape it, or build the model with the shape of one datum"
            )
