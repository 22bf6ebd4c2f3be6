"""The variational autoencoder: one latent vector per datum."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyrovae.arguments import lookup, positive_int, sizes
from pyrovae.likelihoods import make_likelihood
from pyrovae.models.base import Pair, arguments
from pyrovae.nn import networks

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


class VAE(Pair):
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
        given = arguments(locals())
        super().__init__()
        self.config = given
        shape, widths = self.set_shape(input_shape), sizes("hidden", hidden)
        make_encoder, make_decoder = networks(network, activation, channels)
        self.latent_dim = positive_int("latent_dim", latent_dim)
        self.observation = make_likelihood(likelihood, shape, scale, levels)
        self.normal = lookup("posterior", posterior, POSTERIORS)(self.latent_dim)
        self.encoder = make_encoder(shape, widths, self.normal.heads)
        self.decoder = make_decoder(self.latent_dim, widths[::-1], shape, heads=self.observation.outputs)
        self.normal.start_(self.encoder.output)

    def model(self, x: Tensor) -> Tensor:
        """p(z) p(x | z) over the plate ``"data"``, with ``x`` observed."""
        self.check(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(x))
            return pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x: Tensor) -> Tensor:
        """q(z | x) over the plate ``"data"``."""
        self.check(x)
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
