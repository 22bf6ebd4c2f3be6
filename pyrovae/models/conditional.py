"""The conditional variational autoencoder: data given labels or attributes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyrovae.arguments import positive_int, shown, sizes
from pyrovae.data.arrays import NUMBER_THEM
from pyrovae.errors import DataError
from pyrovae.models.vae import OneLatent
from pyrovae.nn.conv import networks
from pyrovae.nn.mlp import MLP
from pyrovae.parts.labels import Attributes, Classes, Labels
from pyrovae.parts.likelihoods import make_likelihood
from pyrovae.parts.posteriors import DiagonalNormal, centre, make_posterior


class Options(TypedDict, total=False):
    """The keywords of likelihood and posterior that every conditional family takes."""

    levels: int | None
    posterior: str
    flows: int | None
    flow_hidden: Sequence[int] | None


class ConditionalVAE(OneLatent):
    r"""Variational autoencoder of data given labels or attributes: log p(x | y).

    .. math:: z \sim N(0, I), \qquad x \mid z, y \sim p(x; f_\theta(z, c(y))), \qquad
              q_\phi(z \mid x, y) = N(\mu_\phi(x, c(y)), \mathrm{diag}\,\sigma_\phi^2(x, c(y)))

    y is a class (``num_classes``; c is one-hot) or a vector of attributes (``num_attributes``; c is the identity), and
    c(y) joins the input of the dense layers of both networks. With ``conditional_prior`` the prior is
    :math:`p(z \mid y) = N(\mu_\psi(y), \mathrm{diag}\,\sigma_\psi^2(y))`, which starts as :math:`N(0, I)`. What y says
    need not be in z: hence generation by label, and analogies, which keep z and change y.

    Shapes: Data is ``[B, *input_shape]``, labels ``[B]`` or ``[B, num_attributes]``; the plate ``"data"`` is at dim -1,
    with sites ``"z"`` and ``"x"`` as in :class:`VAE`, and the observed site ``"y"``, whose density is left out (its
    mask is False): everything is given y. Within an outer plate of K particles y is shared by all. Nats throughout.
    The verbs take labels that broadcast against the leading dimensions of ``x`` or ``z``: one int, for instance.

    Labels that do not exist are refused by ``fit`` and wherever Pyro validates; elsewhere (in a training step, which
    does not wait for the device) they make their datum's log-probability NaN, never that of another label.

    :param input_shape: shape of one datum.
    :param num_classes: number of classes; either this or ``num_attributes``.
    :param latent_dim: number of latent units.
    :param hidden: widths of the encoder's dense layers; the decoder has them in reverse.
    :param likelihood: as in :class:`VAE`; ``scale`` and ``levels`` too.
    :param num_attributes: number of attributes.
    :param posterior: as in :class:`VAE`; ``flows`` and ``flow_hidden`` too.
    :param conditional_prior: learn p(z | y), by a network of one hidden layer, of the width of the last in ``hidden``.
    :param network: as in :class:`VAE`; ``activation`` and ``channels`` too.
    :raises TypeError, ValueError: at construction, for arguments that are out of range, unknown or do not go together.
    :raises DataError: from programs and verbs, for data or labels that are missing, or of another shape or type.

    >>> cvae = ConditionalVAE((1, 8, 8), 10, latent_dim=5, hidden=(32,))
    >>> x, y = torch.rand(20, 1, 8, 8).round(), torch.arange(20) % 10
    >>> loss = pyro.infer.Trace_ELBO()(cvae.initialise(x).model, cvae.guide)(x, y)
    >>> cvae.analogies(x, y, labels=range(10)).shape
    torch.Size([20, 10, 1, 8, 8])
    >>> import pyrovae as pv
    >>> pv.sample(cvae, 7, torch.tensor(3)).shape  # seven threes
    torch.Size([7, 1, 8, 8])

    Kingma, Rezende, Mohamed and Welling, *Semi-supervised learning with deep generative models*, 2014; Sohn, Lee and
    Yan, *Learning structured output representation using deep conditional generative models*, 2015.
    """

    conditional = True

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int | None = None,
        latent_dim: int = 50,
        hidden: Sequence[int] = (200, 200),
        likelihood: str = "bernoulli",
        scale: float | str = "learned",
        *,
        num_attributes: int | None = None,
        levels: int | None = None,
        posterior: str = "diagonal",
        flows: int | None = None,
        flow_hidden: Sequence[int] | None = None,
        conditional_prior: bool = False,
        network: str = "mlp",
        activation: str = "tanh",
        channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        shape, widths = self.set_shape(input_shape), sizes("hidden", hidden)
        if (num_classes is None) == (num_attributes is None):
            both = "neither" if num_classes is None else "both"
            raise ValueError(f"labels are classes or attributes, got {both}: give num_classes or num_attributes")
        self.num_classes, self.num_attributes = num_classes, num_attributes
        self.labels: Classes | Attributes
        if num_attributes is not None:
            self.labels = Attributes(num_attributes)
        elif num_classes is not None:
            self.labels = Classes(num_classes)
        make_encoder, make_decoder = networks(network, activation, channels)
        self.latent_dim, width = positive_int("latent_dim", latent_dim), self.labels.size
        self.observation = make_likelihood(likelihood, shape, scale, levels)
        self.posterior_family = make_posterior(posterior, self.latent_dim, flows=flows, flow_hidden=flow_hidden)
        self.encoder = make_encoder(shape, widths, self.posterior_family.heads, context=width)
        self.decoder = make_decoder(self.latent_dim + width, widths[::-1], shape, heads=self.observation.outputs)
        self.posterior_family.start_(self.encoder.output)
        self.prior_network: MLP | None = None
        if conditional_prior:
            self.prior_network = MLP(width, widths[-1:], (self.latent_dim, self.latent_dim), activation)
            torch.nn.init.zeros_(self.prior_network.output.weight)

    def model(self, x: Tensor, y: Labels | None = None) -> Tensor:
        """p(z) p(x | z, y) over the plate ``"data"``, with ``x`` observed; p(z | y) with a conditional prior."""
        self.check(x)
        y = self.checked(y, x, x.shape[:1])
        code = self.labels.encode(y, x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", self.labels.distribution(x).mask(False), obs=y)
            z = pyro.sample("z", self.prior(code))
            return pyro.sample("x", self.likelihood(z, code), obs=x)

    def guide(self, x: Tensor, y: Labels | None = None) -> Tensor:
        """q(z | x, y) over the plate ``"data"``."""
        self.check(x)
        code = self.labels.encode(self.checked(y, x, x.shape[:1]), x)
        with pyro.plate("data", len(x)):
            return pyro.sample("z", self.posterior(x, code))

    def prior(self, code: Tensor) -> TorchDistribution:
        """p(z), or p(z | y) of encoded labels ``[..., width]``."""
        if self.prior_network is not None:
            return DiagonalNormal(self.latent_dim)(self.prior_network(code))
        return dist.Normal(code.new_zeros(self.latent_dim), code.new_ones(self.latent_dim)).to_event(1)

    def encode(self, x: Tensor, y: Labels | None = None) -> Tensor:  # type: ignore[override]
        """The posterior's centre, ``[..., *input_shape]`` and labels ``[...]`` to ``[..., latent_dim]``."""
        y = self.checked(y, x, x.shape[: x.dim() - len(self.input_shape)])
        return centre(self.posterior(x, self.labels.encode(y, x)))

    def decode(self, z: Tensor, y: Labels | None = None) -> Tensor:  # type: ignore[override]
        """The likelihood's mean, ``[..., latent_dim]`` and labels ``[...]`` to ``[..., *input_shape]``."""
        y = self.checked(y, z, z.shape[:-1])
        return self.likelihood(z, self.labels.encode(y, z)).mean

    def analogies(self, x: Tensor, y: Labels, labels: Labels) -> Tensor:
        """Data with their labels replaced by one after another, z as encoded, ``[N, len(labels), *input_shape]``.

        :param x: data ``[N, *input_shape]``.
        :param y: their own labels.
        :param labels: those to show them with, ``[L]`` or ``[L, num_attributes]``.
        """
        shown = self.tensor(labels, x)
        return self.decode(self.encode(x, y).unsqueeze(1).expand(-1, len(shown), -1), shown)

    def checked(self, y: Labels | None, like: Tensor, leading: torch.Size) -> Tensor:
        """Labels as a tensor on the device of ``like``, after checks; their values where Pyro's validation is on."""
        if y is None:
            raise DataError("labels missing: call model(x, y), and load data with labels=True")
        y = self.tensor(y, like)
        self.labels.check(y)
        shape = y.shape[: y.dim() - self.labels.event_dim]
        if len(shape) > len(leading) or any(n not in (1, m) for n, m in zip(shape[::-1], leading[::-1], strict=False)):
            raise DataError(
                f"labels of shape {list(y.shape)} do not go with {list(leading)} data: pass one label per datum, "
                "of one-hot rows y.argmax(-1)"
            )
        if dist.is_validation_enabled():
            self.labels.check_values(y)
        return y

    def tensor(self, y: Labels, like: Tensor) -> Tensor:
        """Labels as a tensor on the device of ``like``."""
        try:
            return torch.as_tensor(list(y) if isinstance(y, range) else y, device=like.device)
        except (TypeError, ValueError) as error:
            raise DataError(f"labels must be numbers, got {shown(y)}: {NUMBER_THEM}") from error
