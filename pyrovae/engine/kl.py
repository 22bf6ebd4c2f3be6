r"""KL divergence of one latent site, unit by unit, in closed form where it is known."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence, register_kl

from pyrovae.engine.particles import Particles
from pyrovae.engine.sites import masked
from pyrovae.engine.unwrap import elementwise, unmasked


@register_kl(MultivariateNormal, Independent)
def _kl_mvn_independent(p: MultivariateNormal, q: Independent) -> Tensor:
    r"""KL of N(mu, L L^T) against independent normals; without it Pyro falls back to Monte Carlo, silently."""
    if not (isinstance(q.base_dist, Normal) and q.reinterpreted_batch_ndims == 1):
        raise NotImplementedError(f"no closed-form KL of MultivariateNormal against {q}")
    loc, scale = q.base_dist.loc, q.base_dist.scale
    log_det = scale.log().sum(-1) - p._unbroadcasted_scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    trace = (p._unbroadcasted_scale_tril / scale.unsqueeze(-1)).square().sum((-2, -1))
    distance = ((p.loc - loc) / scale).square().sum(-1)
    return log_det + 0.5 * (trace + distance - p.event_shape[0])


def unit_kl(q: torch.distributions.Distribution, p: torch.distributions.Distribution, z: Tensor) -> Tensor:
    r"""KL(q || p) of one site given its parents, ``[*batch, units]`` in nats.

    A unit is one element of the event where both distributions are independent over it, else the whole site. Where no
    closed form is registered, the one-sample estimate :math:`\log q(z) - \log p(z)` stands in for it.
    """
    q, p = unmasked(q), unmasked(p)
    event_dim = len(q.event_shape)
    inner_q, inner_p = elementwise(q), elementwise(p)
    if inner_q is not None and inner_p is not None:
        q, p = inner_q, inner_p
    try:
        kl = kl_divergence(q, p)
    except NotImplementedError:
        kl = q.log_prob(z) - p.log_prob(z)
    batch_dim = z.dim() - event_dim
    return kl.flatten(batch_dim) if kl.dim() > batch_dim else kl.unsqueeze(-1)


def site_kl(particles: Particles, name: str) -> Tensor:
    """KL of the latent site ``name`` in a run of the pair, ``[K, *plates, units]`` in nats."""
    q, p = particles.guide[name], particles.model[name]
    mask, tempering = q["mask"], particles.tempering.get(("guide", name), 1.0)
    kl = masked(unit_kl(q["fn"], p["fn"], q["value"]), mask.unsqueeze(-1) if isinstance(mask, Tensor) else mask)
    kl = kl * (tempering.unsqueeze(-1) if isinstance(tempering, Tensor) and tempering.dim() else tempering)
    layout = particles.layout
    return torch.vmap(lambda unit: layout.expand(layout.reduce(unit)), in_dims=-1, out_dims=-1)(kl)
