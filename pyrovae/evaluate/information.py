r"""What the latent units carry: KL, mutual information with the data, and how the aggregate meets the prior."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrovae import data as datasets
from pyrovae import importance
from pyrovae.arguments import positive_int
from pyrovae.divergence import elementwise, site_kl
from pyrovae.precision import full_float32
from pyrovae.programs import Program, device_of, evaluating, isolated_rng
from pyrovae.sites import latent

_CELLS = 2**24  # densities held at a time


class Information(NamedTuple):
    """Of one latent site, nats per unit (one entry where the units are not independent), each ``[units]``.

    ``mutual_information`` is at most log N of the N data it was measured on. ``aggregate_kl`` compares the aggregate
    posterior with the prior; of a site whose prior depends on other latents it says nothing.
    """

    kl: Tensor
    mutual_information: Tensor
    aggregate_kl: Tensor


def information(
    model: Program, guide: Program, *args: Any, num_data: int = 1000, seed: int = 0, **kwargs: Any
) -> dict[str, Information]:
    r"""Split the KL of every latent unit into what it knows of the data and how far its prior is off.

    .. math:: \underbrace{\mathbb E_x \mathrm{KL}(q(z_u \mid x) \| p(z_u))}_{\text{kl}}
              = \underbrace{I_q(x; z_u)}_{\text{mutual\_information}}
              + \underbrace{\mathrm{KL}(q(z_u) \| p(z_u))}_{\text{aggregate\_kl}}, \qquad
              q(z_u) = \tfrac1N \textstyle\sum_n q(z_u \mid x_n)

    A collapsed unit has neither; a unit with a KL but no information is a bad prior. The aggregate posterior is the
    mixture over the first ``num_data`` data, at one draw each, so that an estimate of the information has a standard
    error of about :math:`N^{-1/2}` nats.

    :param args: data as :func:`pyrovae.log_likelihood` takes them.
    :param num_data: N, how many of the data to use.
    :return: ``{site: Information}`` for every latent site in a data plate.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...         pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(torch.stack([0.9 * x, 0 * x + 1], -1), 0.3).to_event(1))
    >>> found = information(model, guide, torch.randn(500))["z"]
    >>> (found.mutual_information > 0.5).tolist()  # the second unit knows nothing, whatever its KL
    [True, False]

    Hoffman and Johnson (2016), *ELBO surgery: yet another way to carve up the variational evidence lower bound*.
    """
    num_data = positive_int("num_data", num_data, minimum=2)
    device = device_of(model, guide)
    with isolated_rng(seed), torch.no_grad(), evaluating(model, guide), full_float32():
        batch = next(iter(datasets.batches(args, num_data, seed=seed, device=device)), None)
        if batch is None or len(batch[0]) < 2:
            raise datasets.DataError("information over data needs two of them at least: pass more")
        particles = importance.run(model, guide, batch, kwargs, scaled=False)
        found = {}
        for name in latent(particles.model):
            site = particles.guide[name]
            if site["fn"].batch_shape != (len(batch[0]),):
                continue  # shared by the data, or in further plates
            kl = site_kl(particles, name)[0].double().mean(0)
            info = _mutual_information(elementwise(site["fn"]) or site["fn"], site["value"]).reshape(-1)
            kl = kl if kl.shape == info.shape else kl.sum().reshape(1)
            found[name] = Information(kl, info, kl - info)
    return found


def _mutual_information(fn: Any, value: Tensor) -> Tensor:
    """E log q(z_n | x_n) - log 1/N sum_m q(z_n | x_m), unit by unit, ``[units]``."""
    number = len(value)
    own = fn.log_prob(value)
    rows = max(1, _CELLS // own.numel())
    # Every draw against every datum's density: the draws get an axis of their own in front.
    mixed = [torch.logsumexp(fn.log_prob(part.unsqueeze(1)), 1) - math.log(number) for part in value.split(rows)]
    return (own - torch.cat(mixed)).double().mean(0)
