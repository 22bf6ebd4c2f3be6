"""Autoencoders: codes without a posterior, and so without log p(x); undercomplete, sparse, denoising."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypedDict, Unpack

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyrovae.arguments import in_range, lookup, one_of, positive_int, sizes
from pyrovae.models.code_density import CodeDensity, FittedPrior
from pyrovae.nn.conv import networks
from pyrovae.nn.mlp import DenseDecoder
from pyrovae.parts.likelihoods import make_likelihood


class Options(TypedDict, total=False):
    """The keywords that every autoencoder takes."""

    levels: int | None
    network: str
    activation: str
    channels: Sequence[int] | None
    density_components: int


class Activity(NamedTuple):
    """How sparse codes are: the mean of each unit's magnitude, ``[latent_dim]``, and the units in use per datum."""

    mean: Tensor
    units: float


class Autoencoder(CodeDensity):
    r"""Undercomplete autoencoder: an encoder, a code smaller than the data, a decoder.

    .. math:: z = \mathrm{enc}_\phi(x), \qquad \text{loss} = -\log p(x; f_\theta(z))

    As a Pyro pair: the guide is a Delta at the code, and the prior is flat, :math:`\log p(z) = 0`. So
    ``pv.fit(..., objective=pv.ELBO())`` trains it on that loss: cross-entropy for a Bernoulli, and for a Gaussian of
    fixed scale c the squared error over :math:`2 c^2` plus a constant. Particles of a Delta are all alike, and so every
    bound is this one; what needs log q at fixed codes ("stl", "dreg", RWS, TVO) is refused by name, as are free bits.

    It is not a generative model: ``log_likelihood`` refuses it, as a Delta has no density. :meth:`fit_density` makes
    codes to decode all the same; a density fitted on codes afterwards is not a likelihood, and training never sees it.

    ``hidden=()`` with ``likelihood="gaussian"`` is the linear autoencoder, whose decoder ends in the subspace of the
    data's first principal components; :meth:`subspace_angles` says how far it is from it.

    Shapes: Data is ``[B, *input_shape]``; the plate ``"data"`` is at dim -1, with sites ``"z"`` of event
    ``[latent_dim]`` and ``"x"`` of event ``input_shape``. Nats throughout.

    :param input_shape: shape of one datum, such as ``(1, 28, 28)`` or ``(784,)``.
    :param latent_dim: number of units of the code.
    :param density_components: components of the mixture that :meth:`fit_density` fits.

    The other arguments are those of :class:`VAE`.

    :ivar config: the arguments, as JSON can hold them.
    :raises TypeError, ValueError: at construction, for arguments that are out of range, unknown or do not go together;
        from ``pv.sample`` before :meth:`fit_density`.
    :raises DataError: for data of another shape.

    >>> import pyrovae as pv
    >>> digits = pv.data.load("digits").train
    >>> autoencoder = Autoencoder((1, 8, 8), latent_dim=5, hidden=(32,), likelihood="gaussian").initialise(digits.x)
    >>> result = pv.fit(autoencoder.model, autoencoder.guide, digits, objective=pv.ELBO(), epochs=1)
    >>> autoencoder.reconstruct(digits.x[:20]).shape
    torch.Size([20, 1, 8, 8])
    >>> pv.sample(autoencoder.fit_density(digits), 3).shape
    torch.Size([3, 1, 8, 8])

    Bourlard and Kamp, *Auto-association by multilayer perceptrons and singular value decomposition*, 1988; Baldi and
    Hornik, *Neural networks and principal component analysis*, 1989; Hinton and Salakhutdinov, *Reducing the
    dimensionality of data with neural networks*, 2006.
    """

    likelihood_is = None

    def __init__(
        self,
        input_shape: Sequence[int],
        latent_dim: int = 50,
        hidden: Sequence[int] = (200, 200),
        likelihood: str = "bernoulli",
        scale: float | str = "learned",
        *,
        levels: int | None = None,
        network: str = "mlp",
        activation: str = "tanh",
        channels: Sequence[int] | None = None,
        density_components: int = 10,
    ) -> None:
        super().__init__()
        shape, widths = self.set_shape(input_shape), sizes("hidden", hidden)
        make_encoder, make_decoder = networks(network, activation, channels)
        self.latent_dim = positive_int("latent_dim", latent_dim)
        self.observation = make_likelihood(likelihood, shape, scale, levels)
        self.encoder = make_encoder(shape, widths, self.latent_dim)
        self.decoder = make_decoder(self.latent_dim, widths[::-1], shape, heads=self.observation.outputs)
        self.code = nn.Identity()
        count = positive_int("density_components", density_components)
        self.register_buffer("density_weights", torch.zeros(count))  # that nothing has been fitted
        self.register_buffer("density_means", torch.zeros(count, self.latent_dim))
        self.register_buffer("density_scale_tril", torch.zeros(count, self.latent_dim, self.latent_dim))

    def prior(self, like: Tensor) -> TorchDistribution:
        """Flat, or the penalty of codes; its draws are those of :meth:`density`."""
        return FittedPrior(self)

    def posterior(self, x: Tensor) -> TorchDistribution:  # type: ignore[override]
        """The code of ``x`` as a Delta."""
        return dist.Delta(self.encode(x), event_dim=1)

    def encode(self, x: Tensor) -> Tensor:
        """The code, ``[..., *input_shape]`` to ``[..., latent_dim]``."""
        return self.code(self.encoder(x))

    def activity(self, data: object) -> Activity:
        r"""How sparse the codes of data are.

        .. math:: \text{mean}_u = \frac1N \sum_b |z_{bu}|, \qquad
                  \text{units} = \frac1N \sum_b \frac{(\sum_u |z_{bu}|)^2}{\sum_u z_{bu}^2}

        The second is the number of units in use for one datum, from 0 to ``latent_dim``, whatever their scale (as an
        effective sample size is).

        :param data: a tensor ``[N, *input_shape]`` or a Dataset, of which the first entry of each datum is used.

        >>> autoencoder = Autoencoder((4,), latent_dim=3, hidden=())
        >>> autoencoder.activity(torch.zeros(5, 4))
        Activity(mean=tensor([0., 0., 0.]), units=0.0)

        Treves and Rolls, *What determines the capacity of autoassociative memories in the brain?*, 1991.
        """
        size = self.outputs(self.encode, data).abs()
        squares = size.square().sum(-1)
        units = size.sum(-1).square() / torch.where(squares > 0, squares, 1.0)
        return Activity(size.mean(0), units.mean().item())

    def subspace_angles(self, basis: Tensor) -> Tensor:
        r"""Principal angles between the image of a linear decoder and the span of another basis, in radians.

        All are 0 where the two subspaces are one. With the first ``latent_dim`` principal directions of the data, that
        is where training with ``likelihood="gaussian"`` and one scale for all pixels ends.

        :param basis: ``[k, *input_shape]`` (or flat, ``[k, d]``), one direction a row, such as the ``components`` of a
            fitted :class:`PCA`.
        :return: ``[min(k, latent_dim)]``, the largest first.
        :raises ValueError: for an autoencoder that is not linear (``network="mlp"``, ``hidden=()``), and for a basis
            of another shape.

        Björck and Golub, *Numerical methods for computing angles between linear subspaces*, 1973.
        """
        from scipy.linalg import subspace_angles

        if not (isinstance(self.decoder, DenseDecoder) and len(self.decoder) == 1):
            self.refuse("subspace_angles", 'its decoder is not linear: build it with network="mlp" and hidden=()')
        features = math.prod(self.input_shape)
        other = basis.double().flatten(1) if basis.dim() > 1 else basis
        if other.shape[1:] != (features,):
            raise ValueError(
                f"basis must be [k, {features}], one direction a row, got {tuple(basis.shape)}: reshape it"
            )
        own = self.decoder.output.weight[:features].double()
        return torch.from_numpy(subspace_angles(own.numpy(force=True), other.T.numpy(force=True)))


class SparseAutoencoder(Autoencoder):
    r"""Autoencoder that is penalised for the activity of its code, which may then be larger than the data.

    .. math:: \text{L1: } -\log p(z) = w \sum_u |z_u|, \qquad
              \text{KL: } -\log p(z) = w \sum_u \Big[\rho \log \frac{\rho}{\hat\rho_u}
              + (1 - \rho) \log \frac{1 - \rho}{1 - \hat\rho_u}\Big], \quad \hat\rho_u = \frac1B \sum_b z_{bu}

    The penalty is the model's :math:`\log p(z)`, so that ``kl_weight`` and ``kl_warmup`` scale it and histories show it
    as the KL. L1 is a Laplace prior less its normaliser :math:`\sum_u \log(w / 2)`, which no gradient sees; its code
    ends in a ReLU, so that units can be exactly 0. A decoder can undo it in part, by making up for small codes with
    large weights: judge it by :meth:`activity`, and hold it with weight decay.

    KL(:math:`\rho \,\|\, \hat\rho`) compares the mean activity of each unit over the batch with what is wanted; its
    code ends in a sigmoid. Every datum of a batch bears the whole penalty, so that the loss per datum is reconstruction
    plus penalty. It is a property of batches: train on those of 100 or so, and read nothing into that of single data.

    :param latent_dim: number of units of the code.
    :param penalty: ``"l1"`` or ``"kl"``.
    :param weight: w; for L1 in nats per unit of activity.
    :param rho: for the KL: the mean activity wanted of each unit, by default 0.05.

    The other arguments, and the rest, are those of :class:`Autoencoder`.

    >>> sparse = SparseAutoencoder((1, 8, 8), latent_dim=100, hidden=(), penalty="kl", weight=3.0, rho=0.1)
    >>> z = torch.tensor([[0.0] * 100, [0.2] * 100])  # 0.1 in the mean, as wanted
    >>> sparse.log_prior(z).abs() < 1e-6
    tensor([True, True])

    Ng, *Sparse autoencoder*, lecture notes, 2011 (KL); Goodfellow, Bengio and Courville, *Deep learning*, section
    14.2.1, 2016 (L1 as a Laplace prior).
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        latent_dim: int = 200,
        hidden: Sequence[int] = (200,),
        likelihood: str = "bernoulli",
        scale: float | str = "learned",
        *,
        penalty: str = "l1",
        weight: float = 1.0,
        rho: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(input_shape, latent_dim, hidden, likelihood, scale, **options)
        self.penalty = one_of("penalty", penalty, ("l1", "kl"))
        self.weight = in_range("weight", weight, 0.0)
        if penalty == "l1" and rho is not None:
            raise ValueError(f"penalty='l1' has no rho, got rho={rho!r}: leave it out, or use 'kl'")
        self.rho = in_range("rho", 0.05 if rho is None else rho, 1e-6, 1 - 1e-6)
        self.code = nn.ReLU() if penalty == "l1" else nn.Sigmoid()

    def log_prior(self, z: Tensor) -> Tensor:
        """Minus the penalty of codes ``[..., B, latent_dim]``, ``[..., B]`` in nats."""
        if self.penalty == "l1":
            return -self.weight * z.abs().sum(-1)
        tiny = torch.finfo(z.dtype).eps  # a sigmoid rounds to 0 and to 1
        mean = z.mean(-2).clamp(tiny, 1 - tiny)
        on, off = self.rho, 1 - self.rho
        kl = on * (math.log(on) - mean.log()) + off * (math.log(off) - (-mean).log1p())
        return (-self.weight * kl.sum(-1, keepdim=True)).expand(z.shape[:-1])


#: Ways to corrupt data, and the largest level of each.
CORRUPTIONS = {"gaussian": math.inf, "masking": 1.0, "salt_and_pepper": 1.0}


class DenoisingAutoencoder(Autoencoder):
    r"""Autoencoder that is shown corrupted data and asked for the clean ones.

    .. math:: \tilde x \sim c(\tilde x \mid x), \qquad z = \mathrm{enc}_\phi(\tilde x), \qquad
              \text{loss} = -\log p(x; f_\theta(z))

    In training mode the guide corrupts what it reads, anew for every datum at every step; in eval mode, and in every
    verb, it reads what it is given: ``reconstruct(corrupt(x))`` denoises. Nothing prevents a code larger than the data.

    :param noise: ``"gaussian"`` adds :math:`N(0, \text{level}^2)`; ``"masking"`` sets a share ``level`` of the pixels
        to 0; ``"salt_and_pepper"`` sets that share to 0 or 1 with equal chances, for data in [0, 1].
    :param level: standard deviation, or share in [0, 1].

    The other arguments, and the rest, are those of :class:`Autoencoder`.

    >>> denoising = DenoisingAutoencoder((4,), latent_dim=2, hidden=(), noise="masking", level=1.0)
    >>> denoising.corrupt(torch.ones(1, 4))
    tensor([[0., 0., 0., 0.]])

    Vincent, Larochelle, Bengio and Manzagol, *Extracting and composing robust features with denoising autoencoders*,
    2008; Vincent et al., *Stacked denoising autoencoders*, 2010 (the three kinds of noise).
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        latent_dim: int = 50,
        hidden: Sequence[int] = (200, 200),
        likelihood: str = "bernoulli",
        scale: float | str = "learned",
        *,
        noise: str = "masking",
        level: float = 0.3,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(input_shape, latent_dim, hidden, likelihood, scale, **options)
        self.noise, largest = noise, lookup("noise", noise, CORRUPTIONS)
        self.level = in_range("level", level, 0.0, largest)

    def corrupt(self, x: Tensor) -> Tensor:
        """Data with the noise of training, drawn anew."""
        if self.noise == "gaussian":
            return x + self.level * torch.randn_like(x)
        chance = torch.rand_like(x)
        put = 0.0 if self.noise == "masking" else (chance < self.level / 2).to(x.dtype)
        return torch.where(chance < self.level, put, x)

    def guide(self, x: Tensor) -> Tensor:
        """The code of ``x``, corrupted first in training mode, as a Delta over the plate ``"data"``."""
        return super().guide(self.corrupt(x) if self.training else x)
