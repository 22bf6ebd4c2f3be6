"""The hierarchical variational autoencoder: several stochastic layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyrovae.arguments import one_of, sizes
from pyrovae.models.base import Pair, layer_number
from pyrovae.nn.conv import Encoder, networks
from pyrovae.nn.mlp import MLP, module_list
from pyrovae.parts.likelihoods import make_likelihood
from pyrovae.parts.posteriors import POSTERIORS, DiagonalNormal, centre, make_posterior, share_options
from pyrovae.parts.priors import PRIORS, make_prior

GUIDES = ("bottom_up", "top_down")

Draw = Callable[[int, TorchDistribution], Tensor]


class HierarchicalVAE(Pair):
    r"""Variational autoencoder with several stochastic layers, z1 next to the data.

    .. math:: p(x, z) = p(x \mid z_1) \prod_{l < L} p(z_l \mid z_{l+1})\; p(z_L), \qquad p(z_L) = N(0, I)

    The bottom-up guide climbs by its own samples. The defaults are the two-layer network of the IWAE paper,
    784-200-200-100-(z1)-100-100-50-(z2) and back.

    .. math:: q(z \mid x) = q(z_1 \mid x) \prod_{l > 1} q(z_l \mid z_{l-1})

    The top-down guide, the ladder, climbs by a deterministic network that says
    :math:`N(\hat\mu_l(x), \hat\sigma_l^2(x))` of every layer, and comes down the generative path; what the two say of a
    layer is multiplied, so each is trusted by its precision. Its upper layers stay in use where those of a bottom-up
    guide fall asleep, the more so with ``fit(kl_warmup=...)``; the generative parameters are the guide's as well.

    .. math:: q(z_L \mid x) = N(\hat\mu_L, \hat\sigma_L^2), \qquad
              q(z_l \mid x, z_{l+1}) \propto N(z_l; \hat\mu_l, \hat\sigma_l^2)\; p(z_l \mid z_{l+1})

    All are normals of diagonal covariance, with :math:`\sigma` the exponential of a linear layer; it starts constant
    where ``hidden`` leaves nothing but that layer. The last layer's prior, and the bottom-up guide's posteriors, may be
    richer.

    Shapes: Data is ``[B, *input_shape]``; the plate ``"data"`` is at dim -1, with sites ``"z1"`` ... ``"zL"`` of event
    ``[latent_dims[l - 1]]`` and ``"x"`` of event ``input_shape``. Within an outer plate of K particles at dim -2, layer
    l is ``[K, B, latent_dims[l - 1]]``. Nats throughout.

    :param input_shape: shape of one datum, such as ``(1, 28, 28)`` or ``(784,)``.
    :param latent_dims: units of each stochastic layer, the one next to the data first.
    :param hidden: for each layer, the widths of the dense network that leads up to it; the one that leads down from it
        has them in reverse.
    :param guide: ``"bottom_up"`` or ``"top_down"``.
    :param prior: of the last layer, as for :class:`VAE`. The pseudo-inputs of ``"vamp"`` are inputs of that layer's
        posterior: data for a top-down guide, else values of the layer below it.
    :param posterior: of every layer, as for :class:`VAE`; a top-down guide multiplies normals, so that it takes
        ``"diagonal"`` alone.
    :param network: ``"mlp"`` or ``"conv"``, between the data and the first layer; above, all are dense.

    The other arguments are those of :class:`VAE`.

    :ivar config: the arguments, as JSON can hold them.
    :ivar num_layers: L, the number of stochastic layers.
    :raises TypeError, ValueError: at construction, for arguments that are out of range, unknown or do not go together.
    :raises DataError: from the programs, for data of another shape.

    >>> vae = HierarchicalVAE((1, 8, 8), latent_dims=(10, 5), hidden=((32,), (16,)), guide="top_down")
    >>> x = torch.rand(20, 1, 8, 8).round()
    >>> loss = pyro.infer.Trace_ELBO()(vae.initialise(x).model, vae.guide)(x)
    >>> vae.encode(x, layer=2).shape, vae.reconstruct(x, layer=2).shape
    (torch.Size([20, 5]), torch.Size([20, 1, 8, 8]))

    Burda, Grosse and Salakhutdinov, *Importance weighted autoencoders*, 2016; Sonderby, Raiko, Maaloe, Sonderby and
    Winther, *Ladder variational autoencoders*, 2016.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        latent_dims: Sequence[int] = (100, 50),
        hidden: Sequence[Sequence[int]] = ((200, 200), (100, 100)),
        likelihood: str = "bernoulli",
        scale: float | str = "learned",
        *,
        guide: str = "bottom_up",
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
        shape, dims = self.set_shape(input_shape), sizes("latent_dims", latent_dims)
        widths = layer_widths(hidden, dims)
        self.latent_dims, self.num_layers = dims, len(dims)
        layers = range(1, len(dims))  # above the first
        self.top_down = one_of("guide", guide, GUIDES) == "top_down"
        make_encoder, make_decoder = networks(network, activation, channels)
        self.observation = make_likelihood(likelihood, shape, scale, levels)
        options = {"components": components, "flows": flows, "flow_hidden": flow_hidden}
        of_prior, of_posterior = share_options(options, prior=(prior, PRIORS), posterior=(posterior, POSTERIORS))
        if self.top_down and posterior != "diagonal":
            raise ValueError(
                f"guide='top_down' multiplies diagonal normals, got posterior={posterior!r}: leave it out, or use "
                "guide='bottom_up'"
            )
        self.posterior_families = module_list(make_posterior(posterior, dim, **of_posterior) for dim in dims)
        self.normals = module_list(DiagonalNormal(dim) for dim in dims[:-1])
        up: list[Encoder | MLP] = [make_encoder(shape, widths[0], self.posterior_families[0].heads)]
        for i in layers:
            below = up[-1].output.in_features if self.top_down else dims[i - 1]
            up.append(layer_network(below, widths[i], self.posterior_families[i], activation))
        self.inference = module_list(up)
        self.generative = module_list(
            layer_network(dims[i], widths[i][::-1], self.normals[i - 1], activation) for i in layers
        )
        self.posterior_families[0].start_(up[0].output)
        self.decoder = make_decoder(dims[0], widths[0][::-1], shape, heads=self.observation.outputs)
        self.reads_data = self.top_down or len(dims) == 1
        # Last, as for the VAE.
        self.prior_family = make_prior(
            prior, dims[-1], posterior=self.last_posterior, pseudo_shape=shape if self.reads_data else dims[-2:-1],
            bounded=self.reads_data and likelihood != "gaussian", **of_prior,
        )  # fmt: skip

    def model(self, x: Tensor) -> Tensor:
        """p(z_L) ... p(z_1 | z_2) p(x | z_1) over the plate ``"data"``, with ``x`` observed."""
        self.check(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample(f"z{self.num_layers}", self.prior(x))
            for layer in range(self.num_layers - 1, 0, -1):
                z = pyro.sample(f"z{layer}", self.layer_prior(layer, z))
            return pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x: Tensor) -> dict[int, Tensor]:
        """q(z | x) over the plate ``"data"``; the layers' draws, by number."""
        self.check(x)
        with pyro.plate("data", len(x)):
            return self.infer(x, lambda layer, q: pyro.sample(f"z{layer}", q))

    def prior(self, like: Tensor) -> TorchDistribution:
        """p(z_L), of the tensor's dtype and device."""
        return self.prior_family.distribution(like)

    def layer_prior(self, layer: int, above: Tensor) -> TorchDistribution:
        """p(z_layer | z_layer+1), of the layer above, ``[..., latent_dims[layer]]``."""
        return self.normals[layer - 1](self.generative[layer - 1](above))

    def posterior(self, layer: int, below: Tensor) -> TorchDistribution:
        """Bottom-up q(z_layer | z_layer-1), where the layer below the first is x."""
        return self.posterior_families[layer - 1](self.inference[layer - 1](below))

    def read(self, x: Tensor) -> list[TorchDistribution]:
        """Top-down: what the data by themselves say of each layer, the first layer first."""
        found = []
        for family, network in zip(self.posterior_families, self.inference, strict=True):
            x = network.features(x)
            found.append(family(network.output(x)))
        return found

    def last_posterior(self, x: Tensor) -> TorchDistribution:
        """q(z_L | x) of data, or bottom-up q(z_L | z_L-1) of the layer below."""
        return self.read(x)[-1] if self.top_down else self.posterior(self.num_layers, x)

    def infer(self, x: Tensor, draw: Draw) -> dict[int, Tensor]:
        """Walk through the layers in the guide's order; ``draw(layer, q)`` gives the value to go on with."""
        values: dict[int, Tensor] = {}
        if not self.top_down:
            for layer in range(1, self.num_layers + 1):
                values[layer] = x = draw(layer, self.posterior(layer, x))
            return values
        of_data = self.read(x)
        for layer in range(self.num_layers, 0, -1):
            q = of_data[layer - 1]
            if layer < self.num_layers:
                q = product(q, self.layer_prior(layer, values[layer + 1]))
            values[layer] = draw(layer, q)
        return values

    def encode(self, x: Tensor, layer: int = 1) -> Tensor:
        """The posterior's mean of a layer, its parents at theirs, ``[..., *input_shape]`` to ``[..., units]``.

        Where the posterior is a flow, its :func:`centre` stands for the mean.
        """
        return self.infer(x, lambda _, q: centre(q))[layer_number(layer, self.num_layers)]

    def decode(self, z: Tensor, layer: int = 1) -> Tensor:
        """The likelihood's mean, through the means of the layers below, ``[..., units]`` to ``[..., *input_shape]``."""
        for below in range(layer_number(layer, self.num_layers) - 1, 0, -1):
            z = self.layer_prior(below, z).mean
        return self.likelihood(z).mean

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Self:
        """Start the decoder's bias, and the pseudo-inputs of a VampPrior, from data; returns the model itself."""
        super().initialise(x)
        below = None if self.reads_data else partial(self.encode, layer=self.num_layers - 1)
        self.prior_family.start_(x, below)
        return self


def layer_widths(hidden: Sequence[Sequence[int]], dims: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The widths of the dense networks of each layer, after checks."""
    if not dims:
        raise ValueError("latent_dims is empty: give the units of each layer, such as (100, 50)")
    if isinstance(hidden, str) or not hasattr(hidden, "__iter__"):
        raise TypeError(f"hidden must be a sequence of sequences of integers, got {hidden!r}: write (({hidden!r},),)")
    widths = [sizes(f"hidden[{i}]", each) for i, each in enumerate(hidden)]
    if len(widths) != len(dims):
        raise ValueError(
            f"hidden must give widths for each of {len(dims)} layers of latent_dims={dims}, got {len(widths)}: "
            "write one sequence for each, such as hidden=((200, 200), (100, 100))"
        )
    return widths


@torch.no_grad()
def layer_network(below: int, widths: Sequence[int], family: DiagonalNormal, activation: str) -> MLP:
    """The network that reads one stochastic layer and gives the parameters of the next."""
    network = MLP(below, widths, family.heads, activation)
    if not widths:  # the exponential of what is linear in an unbounded sample would start in overflow
        network.output.weight[family.heads[0] :].zero_()
    family.start_(network.output)
    return network


def product(a: TorchDistribution, b: TorchDistribution) -> TorchDistribution:
    r"""The normal whose density is proportional to the product of those of two, elementwise.

    .. math:: \sigma^{-2} = \sigma_a^{-2} + \sigma_b^{-2}, \qquad
              \mu = \sigma^2 (\mu_a / \sigma_a^2 + \mu_b / \sigma_b^2)

    >>> one, other = (dist.Normal(torch.tensor([m]), 1.0).to_event(1) for m in (0.0, 1.0))
    >>> product(one, other).mean, product(one, other).variance
    (tensor([0.5000]), tensor([0.5000]))
    """
    a, b = a.base_dist, b.base_dist
    share = b.scale / torch.hypot(a.scale, b.scale)  # its square is a's share of the precision; no square overflows
    return dist.Normal(torch.lerp(b.loc, a.loc, share.square()), a.scale * share).to_event(1)
