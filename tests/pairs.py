"""Programs of one latent in a plate over the data, told by their distributions; a pair with all a step may meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

Program = Callable[..., None]
Prior = Callable[[Tensor], Any]


def standard(x: Tensor) -> Any:
    """N(0, 1), the prior of most."""
    return dist.Normal(x.new_zeros(()), 1.0)


def units(number: int) -> Prior:
    """N(0, I) of so many units."""
    return lambda x: dist.Normal(x.new_zeros(number), 1.0).to_event(1)


def guide_of(posterior: Callable[[Tensor], Any], site: str = "z") -> Program:
    """A guide that draws its one latent from ``posterior(x)``."""

    def guide(x: Tensor, *labels: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample(site, posterior(x))

    return guide


def model_of(
    likelihood: Callable[[Tensor], Any], prior: Callable[[Tensor], Any] = standard, site: str = "z"
) -> Program:
    """A model that draws its one latent from ``prior(x)`` and observes x under ``likelihood(z)``."""

    def model(x: Tensor, *labels: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample(site, prior(x))
            pyro.sample("x", likelihood(z), obs=x)

    return model


class Noisy(nn.Module):
    """With dropout, BatchNorm's buffers and a parameter of its own."""

    def __init__(self, rate: float = 0.3) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(rate), nn.Linear(4, 2))
        self.decoder = nn.Linear(2, 6)
        self.log_scale = nn.Parameter(torch.zeros(2))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), self.log_scale.exp()).to_event(1))
