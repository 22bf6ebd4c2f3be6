"""A density of codes that have no prior: fitted to those of the training data, after training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Self

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn

from pyrovae import data as datasets
from pyrovae.engine.programs import evaluating
from pyrovae.errors import DataError
from pyrovae.models.vae import OneLatent
from pyrovae.parts.shared import Broadcasting, Shape

MOST_CODES = 10_000  # that a density is fitted to: enough for its parameters, and a matter of seconds


class CodeDensity(OneLatent):
    """A family whose codes get a density after training; it makes codes to decode, and is no part of the model.

    :ivar encoder: from data to outputs ``[..., latent_dim]``.
    :ivar code: from outputs to codes, ``[..., latent_dim]`` both.
    """

    code: nn.Module
    density_weights: Tensor
    density_means: Tensor
    density_scale_tril: Tensor

    def log_prior(self, z: Tensor) -> Tensor:
        """Minus the penalty of codes ``[..., latent_dim]``, ``[...]`` in nats: none here."""
        return z.new_zeros(z.shape[:-1])

    def fit_density(self, data: object, *, seed: int = 0) -> Self:
        r"""Fit a mixture of Gaussians to the codes of ``data``, for ``pv.sample``; returns the model itself.

        .. math:: p(a) = \sum_c \pi_c N(a; \mu_c, \Sigma_c), \qquad z = \mathrm{code}(a)

        with :math:`a` the encoder's output and *code* its last nonlinearity, if there is one. The mixture is kept in
        buffers, so a ``state_dict`` holds it. More training moves the codes: fit again then.

        :param data: a tensor ``[N, *input_shape]`` or a Dataset, of which the first entry of each datum is used; of
            more than 10,000 data every second, or third, and so on.
        :param seed: where the fit starts.
        :raises DataError: for fewer data than components, or codes that are not finite.
        """
        from sklearn.mixture import GaussianMixture

        outputs = self.outputs(self.encoder, data).double().cpu()
        outputs = outputs[:: max(1, math.ceil(len(outputs) / MOST_CODES))]
        components = len(self.density_weights)
        if len(outputs) < components:
            raise DataError(f"a density of {components} components needs as many data, got {len(outputs)}: pass more")
        if not torch.isfinite(outputs).all():
            raise DataError("the codes of the data are not all finite: check the data, or train again with a lower lr")
        mixture = GaussianMixture(components, random_state=seed, max_iter=300).fit(outputs.numpy())
        self.density_weights.copy_(torch.from_numpy(mixture.weights_))
        self.density_means.copy_(torch.from_numpy(mixture.means_))
        self.density_scale_tril.copy_(torch.linalg.cholesky(torch.from_numpy(mixture.covariances_)))
        return self

    def after_training(self, data: object) -> bool:
        """Fit the density of the codes, as :meth:`fit_density`."""
        self.fit_density(data)
        return True

    def density(self, temperature: float = 1.0) -> TorchDistribution:
        """The mixture that :meth:`fit_density` fitted, over the encoder's outputs.

        :param temperature: factor of the components' standard deviations.
        :raises ValueError: before that.
        """
        if not self.density_weights.any():
            raise ValueError(
                f"{type(self).__name__} has no prior to draw codes from: call its fit_density(x) with training data "
                "first, and again after more training"
            )
        parts = dist.MultivariateNormal(self.density_means, scale_tril=self.density_scale_tril * temperature)
        return dist.MixtureSameFamily(dist.Categorical(self.density_weights), parts)

    @torch.no_grad()
    def outputs(self, network: Callable[[Tensor], Tensor], data: object) -> Tensor:
        """What a network makes of all data, in eval mode."""
        source, device = datasets.as_dataset(data), next(self.parameters()).device
        with evaluating(self.guide):
            found = []
            for x, *_ in datasets.batches((source,), 500, device=device):
                self.check(x)
                found.append(network(x))
        return torch.cat(found)


class FittedPrior(Broadcasting):
    """The prior of codes: their penalty for log p(z), and draws from the density fitted afterwards.

    It is improper, as :class:`pyro.distributions.ImproperUniform` is: what scores codes and what draws them are
    unrelated, and neither makes log p(x) exist.
    """

    support = constraints.real_vector

    def __init__(self, owner: CodeDensity, batch_shape: Sequence[int] = (), temperature: float = 1.0) -> None:
        self.owner, self.temperature = owner, temperature
        super().__init__(torch.Size(batch_shape), torch.Size([owner.latent_dim]), validate_args=False)

    def tempered(self, temperature: float) -> FittedPrior:
        """The same with draws from components whose deviations are ``temperature`` times as large."""
        return FittedPrior(self.owner, self.batch_shape, temperature)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.owner.log_prior(value)

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        density = self.owner.density(self.temperature)
        return self.owner.code(density.sample(self._extended_shape(sample_shape)[:-1]))
