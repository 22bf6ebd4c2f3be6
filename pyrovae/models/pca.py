"""Principal component analysis, as the Gaussian model whose maximum likelihood it is."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyrovae.arguments import pick_device, positive_int
from pyrovae.data.feed import as_dataset, batches
from pyrovae.engine.support import check_support
from pyrovae.errors import DataError, NumericalError
from pyrovae.models.vae import OneLatent
from pyrovae.parts.pixels import Gaussian

if TYPE_CHECKING:
    from sklearn.decomposition import PCA as Decomposition

NOTHING = 1e-12  # share of the variance outside the components that is rounding only


class PCA(OneLatent):
    r"""Principal component analysis: the linear Gaussian model with its exact posterior and its exact log p(x).

    .. math:: z \sim N(0, I), \qquad x \mid z \sim N(W z + \mu, \sigma^2 I), \qquad
              W = U (\Lambda - \sigma^2 I)^{1/2}, \qquad \sigma^2 = \frac{1}{d - k} \sum_{j > k} \lambda_j

    The columns of U are the k leading principal directions, :math:`\lambda_j` the variances along all d, largest first,
    :math:`\Lambda` the first k of them. No other W and :math:`\sigma^2` make the data more likely, up to a rotation of
    z. As :math:`W^\top W + \sigma^2 I = \Lambda` is diagonal, so is the posterior's covariance:

    .. math:: z \mid x \sim N\big(\Lambda^{-1} W^\top (x - \mu),\ \sigma^2 \Lambda^{-1}\big)

    The guide is this posterior, so every log-weight is log p(x) itself. It is what a linear VAE tends to, without
    training. Nothing is known before :meth:`fit`.

    The posterior's mean lies nearer to 0 than the code that reconstructs best. :meth:`encode` gives the latter,
    :math:`W^+ (x - \mu) = \operatorname{argmax}_z p(x \mid z)`, so that :meth:`reconstruct` is PCA's orthogonal
    projection :math:`\mu + U U^\top (x - \mu)`; ``posterior(x).mean`` gives the former.

    Shapes: Data is ``[B, *input_shape]``; the plate ``"data"`` is at dim -1, with sites ``"z"`` of event
    ``[latent_dim]`` and ``"x"`` of event ``input_shape``. Nats of density throughout.

    :param input_shape: shape of one datum, such as ``(1, 28, 28)`` or ``(784,)``.
    :param latent_dim: k, the number of components, below the number d of entries of a datum.
    :ivar mean: :math:`\mu`, ``[d]``.
    :ivar components: :math:`U^\top`, ``[latent_dim, d]``.
    :ivar explained_variance: the diagonal of :math:`\Lambda`, ``[latent_dim]``.
    :ivar noise_variance: :math:`\sigma^2`, 0-d; NaN before :meth:`fit`.
    :raises ValueError: at construction, for a ``latent_dim`` that leaves no noise; anywhere, before :meth:`fit`.
    :raises DataError: for data of another shape.

    >>> x = torch.randn(200, 6) @ torch.randn(6, 6)
    >>> pca = PCA((6,), latent_dim=2)
    >>> row = pca.fit(x)[0]
    >>> pca.decode(pca.encode(x)).shape, 0 < row["explained_variance_ratio"] < 1
    (torch.Size([200, 6]), True)

    Tipping and Bishop, *Probabilistic principal component analysis*, 1999.
    """

    likelihood_is = "exact"
    observes_bits = False
    mean: Tensor
    components: Tensor
    explained_variance: Tensor
    noise_variance: Tensor

    def __init__(self, input_shape: Sequence[int], latent_dim: int = 50) -> None:
        super().__init__()
        dim = math.prod(self.set_shape(input_shape))
        self.latent_dim = positive_int("latent_dim", latent_dim)
        if self.latent_dim >= dim:
            raise ValueError(
                f"latent_dim must be below the {dim} entries of a datum, got {latent_dim}: "
                f"pass at most {dim - 1}, as the noise needs a direction of its own"
            )
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("components", torch.zeros(self.latent_dim, dim))
        self.register_buffer("explained_variance", torch.zeros(self.latent_dim))
        self.register_buffer("noise_variance", torch.tensor(math.nan))

    @torch.no_grad()
    def fit(self, data: object, *, seed: int = 0, device: str | torch.device = "auto") -> list[dict[str, float]]:
        """Find the components of the data, in float64 by scikit-learn: exact, and in one pass.

        Variances are those of scikit-learn, with N - 1 below the sum of squares; so is the noise where there are more
        data than entries of a datum.

        :param data: as :func:`pyrovae.fit` takes them; labels are left out, and a dynamically binarised set is drawn
            once, by ``seed``. All are held in memory.
        :param device: where the pair is afterwards.
        :return: one row: seconds, *bound* (the data's mean log p(x), here itself), the share of the variance that is
            explained, and the noise variance.
        :raises NumericalError: where variances overflow the pair's dtype.
        :raises DataError: for fewer data than components, data that are not finite, and data without any variance
            outside of the components.

        Pedregosa et al., *Scikit-learn: machine learning in Python*, 2011.
        """
        began, place = time.perf_counter(), pick_device(device)
        parts = []
        for x, *_ in batches((as_dataset(data),), 1000, seed=seed):
            self.check(x)
            parts.append(x.flatten(1).double().cpu())
        if not parts:
            raise DataError("there are no data to fit: pass at least one datum")
        x = torch.cat(parts)
        check_support(x, None)
        number, dim = x.shape
        found, total, left = find_components(x, self.latent_dim)
        noise = torch.tensor(left / (dim - self.latent_dim), dtype=torch.float64)
        fitted = *map(torch.from_numpy, (found.mean_, found.components_, found.explained_variance_)), noise
        own = self.mean, self.components, self.explained_variance, self.noise_variance
        if not all(t.to(mine.dtype).isfinite().all() for mine, t in zip(own, fitted, strict=True)):
            raise NumericalError(
                f"a variance of {fitted[2].max():.3g} overflows {self.mean.dtype}: scale the data down"
            )
        for mine, t in zip(own, fitted, strict=True):
            mine.copy_(t)
        self.to(place)
        row = {"epoch": 1, "seconds": time.perf_counter() - began}
        # Variances of N - 1: each squared coordinate over its own is on average 1 - 1/N.
        row["bound"] = self.log_density(self.mean.new_tensor(dim * (1 - 1 / number))).item()
        return [row | {"explained_variance_ratio": 1 - left / total, "noise_variance": self.noise_variance.item()}]

    train_on = fit

    def initialise(self, x: Tensor) -> PCA:
        """Nothing: :meth:`fit` starts from no weights."""
        return self

    def prior(self, like: Tensor | None = None) -> TorchDistribution:
        """p(z)."""
        return dist.Normal(torch.zeros_like(self.explained_variance), 1.0).to_event(1)

    def likelihood(self, z: Tensor) -> TorchDistribution:  # type: ignore[override]
        """p(x | z) of latents ``[..., latent_dim]``."""
        mean = (z @ self.loading.T + self.mean).unflatten(-1, self.input_shape)
        return Gaussian(mean, self.noise_variance.sqrt()).to_event(len(self.input_shape))

    def posterior(self, x: Tensor) -> TorchDistribution:  # type: ignore[override]
        """p(z | x) of data ``[..., *input_shape]``."""
        mean = self.centred(x) @ self.loading / self.explained_variance
        return dist.Normal(mean, (self.noise_variance / self.explained_variance).sqrt()).to_event(1)

    @property
    def loading(self) -> Tensor:
        """W, ``[d, latent_dim]``."""
        self.require_fit()
        return self.components.T * self.signal.sqrt()

    @property
    def signal(self) -> Tensor:
        """The diagonal of W^T W, which rounding must not make negative."""
        return (self.explained_variance - self.noise_variance).clamp(min=0)

    def require_fit(self) -> None:
        """A ValueError before :meth:`fit`."""
        if not torch.compiler.is_exporting() and self.noise_variance.isnan():
            raise ValueError("PCA has no components yet: call fit(data) first")

    def centred(self, x: Tensor) -> Tensor:
        """Data ``[..., *input_shape]`` less their mean, ``[..., d]``."""
        return x.flatten(-len(self.input_shape)).to(self.mean.dtype) - self.mean

    def log_prob(self, x: Tensor) -> Tensor:
        r"""The exact log p(x) of data ``[N, *input_shape]``, in nats of density, ``[N]``.

        .. math:: \log N(x; \mu, W W^\top + \sigma^2 I) = -\tfrac12 \Big[ d \log 2\pi + \log |\Lambda| + (d - k) \log
                  \sigma^2 + \sum_{j \leq k} \frac{(u_j^\top (x - \mu))^2}{\lambda_j} + \frac{r^2}{\sigma^2} \Big]

        with r the distance between x and its reconstruction.
        """
        self.require_fit()
        self.check(x)
        centred = self.centred(x)
        along = centred @ self.components.T
        squares = (along.square() / self.explained_variance).sum(-1)
        squares = squares + (centred - along @ self.components).square().sum(-1) / self.noise_variance
        return self.log_density(squares)

    def log_density(self, squares: Tensor) -> Tensor:
        """Of a datum whose squared coordinates, each over its variance, sum to ``squares``."""
        dim, rest = len(self.mean), len(self.mean) - self.latent_dim
        log_volume = self.explained_variance.log().sum() + rest * self.noise_variance.log()
        return -0.5 * (dim * math.log(2 * math.pi) + log_volume + squares)

    def encode(self, x: Tensor) -> Tensor:
        """The code that reconstructs best, ``[..., *input_shape]`` to ``[..., latent_dim]``."""
        signal = self.signal
        return self.centred(x) @ self.loading * torch.where(signal > 0, 1 / signal, 0.0)


def find_components(x: Tensor, number: int) -> tuple[Decomposition, float, float]:
    """Scikit-learn's decomposition of data ``[N, d]``, the variance of the data, and what of it lies outside.

    :raises DataError: for fewer data than components, and data without any variance outside of them.
    """
    from sklearn.decomposition import PCA as Decomposition

    if number >= len(x):
        raise DataError(f"{number} components need more data than that, got {len(x)}: lower latent_dim")
    solver = "covariance_eigh" if len(x) >= x.shape[1] else "full"  # the default for large data is approximate
    found, total, left = Decomposition(number, svd_solver=solver), x.var(0).sum().item(), 0.0
    if total > 0:
        left = total - float(found.fit(x.numpy()).explained_variance_.sum())
    if left <= NOTHING * total:
        raise DataError(
            f"the data have no variance outside of {number} components (of {total:.3g} in all): their "
            "density would be infinite; lower latent_dim, or pass data that vary"
        )
    return found, total, left
