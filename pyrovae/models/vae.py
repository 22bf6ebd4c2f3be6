"""The variational autoencoder: one latent vector per datum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyrovae.arguments import positive_int, sizes
from pyrovae.models.base import Pair
from pyrovae.nn.conv import Encoder, networks
from pyrovae.nn.residual import ResidualEncoder
from pyrovae.parts.likelihoods import make_likelihood
from pyrovae.parts.posteriors import POSTERIORS, DiagonalNormal, centre, make_posterior, share_options
from pyrovae.parts.priors import PRIORS, make_prior


class OneLatent(Pair):
    """A family with one latent, ``"z"``; a subclass gives its ``prior``, of the dtype and device of a tensor."""

    latent_dim: int
    prior: Callable[..., TorchDistribution]
    encoder: Encoder | ResidualEncoder
    posterior_family: DiagonalNormal

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

    def posterior(self, x: Tensor, *code: Tensor) -> TorchDistribution:
        """q(z | x) of data ``[..., *input_shape]``, given encoded labels where the encoder reads some."""
        return self.posterior_family(self.encoder(x, *code))

    def decode(self, z: Tensor) -> Tensor:
        """The likelihood's mean, ``[..., latent_dim]`` to ``[..., *input_shape]``."""
        return self.likelihood(z).mean


class VAE(OneLatent):
    r"""Variational autoencoder with one stochastic layer.

    .. math:: z \sim N(0, I), \qquad x \mid z \sim p(x; f_\theta(z)), \qquad
              q_\phi(z \mid x) = N(\mu_\phi(x), \mathrm{diag}\,\sigma_\phi^2(x))

    Both the prior and the posterior may be richer. A richer prior moves to where the codes are; a richer posterior
    follows what the data leave open. All that is measured stays the same.

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
    :param prior: ``"normal"``; ``"mixture"``, of learned normals; ``"vamp"``, the mixture of the posteriors of learned
        pseudo-inputs; ``"flow"``, affine couplings.
    :param posterior: ``"diagonal"``; ``"full"``, of full covariance; ``"flow"``, affine couplings; ``"iaf"``, inverse
        autoregressive.
    :param components: of the prior ``"mixture"``, by default 10, or ``"vamp"``, by default 100.
    :param flows: number of steps of a flow, by default 4; where prior and posterior are flows it is that of both.
    :param flow_hidden: widths of the hidden layers of each step, by default one of ``max(100, 2 * latent_dim)``.
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
        prior: str = "normal",
        posterior: str = "diagonal",
        components: int | None = None,
        flows: int | None = None,
        flow_hidden: Sequence[int] | None = None,
        network: str = "mlp",
        activation: str = "tanh",
        channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        shape, widths = self.set_shape(input_shape), sizes("hidden", hidden)
        make_encoder, make_decoder = networks(network, activation, channels)
        self.latent_dim = positive_int("latent_dim", latent_dim)
        self.observation = make_likelihood(likelihood, shape, scale, levels)
        options = {"components": components, "flows": flows, "flow_hidden": flow_hidden}
        of_prior, of_posterior = share_options(options, prior=(prior, PRIORS), posterior=(posterior, POSTERIORS))
        self.posterior_family = make_posterior(posterior, self.latent_dim, **of_posterior)
        self.encoder = make_encoder(shape, widths, self.posterior_family.heads)
        self.decoder = make_decoder(self.latent_dim, widths[::-1], shape, heads=self.observation.outputs)
        self.posterior_family.start_(self.encoder.output)
        # Last: means drawn first would be the very noise of whoever uses the same seed again.
        self.prior_family = make_prior(
            prior, self.latent_dim, posterior=self.posterior, pseudo_shape=shape,
            bounded=likelihood != "gaussian", **of_prior,
        )  # fmt: skip

    def prior(self, like: Tensor) -> TorchDistribution:
        """p(z), of the tensor's dtype and device."""
        return self.prior_family.distribution(like)

    def encode(self, x: Tensor) -> Tensor:
        """The posterior's mean (of a flow its :func:`centre`), ``[..., *input_shape]`` to ``[..., latent_dim]``."""
        return centre(self.posterior(x))

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Self:
        """Start the decoder's bias, and the pseudo-inputs of a VampPrior, from data; returns the model itself."""
        super().initialise(x)
        self.prior_family.start_(x)
        return self
