"""KL divergence of one latent site, unit by unit, in closed form where that is right and registered."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from pyro.distributions import ImproperUniform
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal, kl_divergence, register_kl
from torch.distributions.kl import _KL_REGISTRY

from pyrovae.engine.marginal import Marginal, conditional
from pyrovae.engine.particles import Layout, Particles, Role
from pyrovae.engine.sites import Site, Weight, latent, masked, same
from pyrovae.engine.stacked import Stacked, stack
from pyrovae.engine.unwrap import elementwise, innermost, is_masked, layers, point_mass

BASES = "torch.distributions", "pyro.distributions.torch"  # what Pyro's own classes add there is speed
OfSite = TypeVar("OfSite", Tensor | bool, Weight)  # a mask or a scale


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


class Side(NamedTuple):
    """What one program says of a site's units, ``[*batch, *units]``: their law, where it counts, and how much."""

    fn: Distribution
    mask: Tensor | bool
    weight: Weight

    def log_prob(self, z: Tensor) -> Tensor:
        """As it enters the log-weights, unit by unit."""
        return masked(self.fn.log_prob(z) * self.weight, self.mask)


def site_kl(particles: Particles, name: str) -> Tensor:
    """KL of the latent site ``name`` in a run of the pair, ``[K, *plates, units]`` in nats."""
    return over_plates(particles.layout, kl_in_place(particles, name))


def over_plates(layout: Layout, kl: Tensor) -> Tensor:
    """Unit by unit, what a log-probability becomes in the log-weights."""
    return torch.vmap(lambda unit: layout.expand(layout.reduce(unit)), in_dims=-1, out_dims=-1)(kl)


def kl_in_place(particles: Particles, name: str) -> Tensor:
    r"""KL of a latent site, shaped as the program lays it out, units last.

    A unit is one element of the event where both distributions are independent over it, else the whole site. Given
    what the guide drew before the site, the mean of :math:`\log q(z) - \log p(z)` is KL(q || p), which stands in its
    place where it is registered and p's factor hangs on nothing that the guide draws later.
    """
    site = particles.guide[name]
    q, p = sides(particles, name)
    kl = closed_form(q.fn, p.fn) if parents_first(particles, name) and same(q.weight, p.weight) else None
    if kl is not None:
        kl = masked(kl * q.weight, q.mask)
    if kl is None or q.mask is not p.mask:
        of_p = p.log_prob(site["value"])
        of_q = q.log_prob(site["value"])
        if isinstance(p.fn, Marginal | Stacked):  # what is summed out may have joined elements of a plate
            of_q = of_q.sum_to_size(torch.broadcast_shapes(of_p.shape, [1] * of_q.dim()))
        drawn = of_q - of_p
        both = q.mask & p.mask
        kl = torch.where(both, kl, drawn) if kl is not None and isinstance(both, Tensor) else drawn
    batch_dim = site["value"].dim() - site["fn"].event_dim
    return kl.flatten(batch_dim) if kl.dim() > batch_dim else kl.unsqueeze(-1)


def is_divergence(particles: Particles, name: str) -> bool:
    """Whether both mask and scale a site alike, and it has a prior; else its cost is no divergence, maybe negative."""
    q, p = sides(particles, name)
    return same(q.weight, p.weight) and same(q.mask, p.mask) and not isinstance(innermost(p.fn), ImproperUniform)


def parents_first(particles: Particles, name: str) -> bool:
    """Whether the guide draws, before a site, all latents that the model draws before it: its parents are of these."""
    model, guide = (list(latent(run)) for run in (particles.model, particles.guide))
    return set(model[: model.index(name)]) <= set(guide[: guide.index(name)])


def closed_form(q: Distribution, p: Distribution) -> Tensor | None:
    """KL(q || p), if it is registered; a Delta's lacks its log_density, and masks inside of an event may differ."""
    if isinstance(q, Stacked) and isinstance(p, Stacked):
        pairs = zip(q.parts, p.parts, strict=True)
        each = [None if a is None or b is None else closed_form(a, b) for a, b in pairs]
        known = [(kl is None) == (part is None) for kl, part in zip(each, q.parts, strict=True)]
        return stack(each, q.nesting) if all(known) else None
    if point_mass(q) is not None or is_masked(q) or is_masked(p) or not all(map(has_own_law, (*layers(q), *layers(p)))):
        return None
    if (shape := torch.broadcast_shapes(q.batch_shape, p.batch_shape)) != q.batch_shape or shape != p.batch_shape:
        q, p = q.expand(shape), p.expand(shape)  # a replayed site is not broadcast over the particles
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return None


def has_own_law(fn: Distribution) -> bool:
    """Whether the KL of a class is meant for its density, and not for that of the class which it alters."""
    altered = next(cls for cls in type(fn).__mro__ if "log_prob" in vars(cls))
    return altered.__module__.startswith(BASES) or any(altered in pair for pair in _KL_REGISTRY)


def sides(particles: Particles, name: str) -> tuple[Side, Side]:
    """Guide's and model's part in the KL of a site."""
    q, p = particles.guide[name], particles.model[name]
    apart = elementwise(q["fn"]) is not None and elementwise(p["fn"]) is not None

    def side(role: Role, site: Site) -> Side:
        site = {**site, "fn": conditional(site["fn"])}
        fn, mask = site["fn"], True if site["mask"] is None else aligned(site["mask"], site["fn"].event_dim * apart)
        several = apart and isinstance(site["fn"], Stacked)
        for fn in layers(elementwise(site["fn"]) if several else site["fn"]):  # type: ignore[arg-type]
            if isinstance(fn, MaskedDistribution):
                mask = mask & aligned(fn._mask, fn.event_dim * apart)
            elif not (apart and isinstance(fn, Independent)):
                break
        return Side(fn, mask, aligned(particles.tempering.get((role, name), 1.0), site["fn"].event_dim * apart))

    return side("guide", q), side("model", p)


def aligned(of_site: OfSite, units_dim: int) -> OfSite:
    """A mask or scale of the batch, with axes of size 1 for the units to its right."""
    return of_site.reshape((*of_site.shape, *[1] * units_dim)) if isinstance(of_site, Tensor) else of_site
