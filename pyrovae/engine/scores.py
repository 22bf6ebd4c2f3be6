r"""Draws that carry no gradient, or not all of it: their score functions, and what of log w each of them reaches.

The elements of a plate are independent given what lies outside of it. So an element of a scored site reaches, of the
terms of :math:`\log w_k`, those of its own element alone and those outside of the plate; a signal made of the rest
would be noise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from pyro.distributions.distribution import Distribution as PyroDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import Distribution, Independent, TransformedDistribution

from pyrovae.engine.particles import Layout, Particles, Role, is_number
from pyrovae.engine.sites import Plates, Site, Sites, Weight, frames, latent, log_prob
from pyrovae.engine.stacked import Stacked
from pyrovae.engine.unwrap import layers

Terms = list[tuple[Plates, Tensor]]  # of log w, each with the plates that it lies in
PLAIN = (PyroDistribution.score_parts, MaskedDistribution.score_parts, ExpandedDistribution.score_parts)


def score_function(site: Site) -> Tensor | None:
    """What of log q the draw itself carries no gradient of, masked or not; None of a reparameterised draw."""
    fn = site["fn"]
    score: Tensor | float = 0.0 if fn.has_rsample and not rejects(fn) else score_of(fn, site["value"], fn.has_rsample)
    return score if isinstance(score, Tensor) else None


def rejects(fn: Distribution) -> bool:
    """Whether a distribution draws by rejection, or does whatever else leaves a score to a reparameterised draw."""
    return any(getattr(type(layer), "score_parts", PLAIN[0]) not in PLAIN for layer in layers(fn))


def score_of(fn: Distribution, value: Tensor, rsample: bool) -> Tensor:
    """The score function under masks, sums over an event, and transforms; the number 0 where a class says so."""
    if isinstance(fn, Stacked):
        return fn.each(lambda part, own: score_of(part, own, rsample), value)
    if isinstance(fn, MaskedDistribution):
        return score_of(fn.base_dist, value, rsample)
    if isinstance(fn, Independent):
        return sum_rightmost(score_of(fn.base_dist, value, rsample), fn.reinterpreted_batch_ndims)
    if not rsample:
        return fn.log_prob(value)
    if isinstance(fn, TransformedDistribution) and getattr(type(fn), "score_parts", PLAIN[0]) in PLAIN:
        for transform in reversed(fn.transforms):
            value = transform.inv(value)
        inside = fn.base_dist
        return sum_rightmost(score_of(inside, value, rsample), len(fn.event_shape) - len(inside.event_shape))
    return fn.score_parts(value).score_function  # type: ignore[attr-defined]


def score_functions(particles: Particles) -> dict[str, Tensor]:
    """The score functions of the guide's draws, noise among them, and of its factors that say so, by site."""
    found = {name: score_function(site) for name, site in (particles.guide | particles.noise).items()}
    return {name: score for name, score in found.items() if score is not None}


def local_plates(particles: Particles, names: Iterable[str]) -> dict[str, Plates]:
    """The plates, beyond those that all sites share, whose elements the draws of a site reach one by one.

    What the guide draws later, outside of a plate, may depend on all its elements and carry that on.
    """
    shared, sites, found = particles.layout.dims, particles.guide | particles.noise, {}
    order = list(latent(particles.guide))  # noise may lie anywhere in it
    for name in names:
        later = [*order[order.index(name) if name in order else 0 :], *particles.noise]
        stacks, own = [frames(sites[other]) for other in later], frames(sites[name])
        if kept := {key: f for key, f in own.items() if key[1] not in shared and all(key in s for s in stacks)}:
            found[name] = kept
    return found


def terms_of(particles: Particles, *parts: tuple[Role, Sites, Weight]) -> Terms:
    """The log-probabilities of sites, weighted and tempered, without gradients."""
    with torch.no_grad():
        return [
            (frames(s), weight * particles.tempering.get((role, name), 1.0) * log_prob(s, in_guide=role == "guide"))
            for role, sites, weight in parts
            if not is_number(weight, 0)
            for name, s in sites.items()
        ]


def weight_terms(particles: Particles, kl_weight: Weight, likelihood_weight: Weight) -> Terms:
    """The terms of the log-weights."""
    return terms_of(
        particles, ("model", particles.likelihood, likelihood_weight), ("model", particles.prior, kl_weight),
        ("guide", particles.guide, -kl_weight),
    )  # fmt: skip


@dataclass
class Reach:
    """What single elements reach of the log-weights: finite terms, and how many that make a weight 0."""

    layout: Layout
    finite: Terms
    dead: Terms

    @classmethod
    def of(cls, layout: Layout, terms: Terms) -> Reach:
        """Of the terms of the log-weights."""
        split = [(around, torch.isneginf(term), term) for around, term in terms]
        finite = [(around, torch.where(dead, 0.0, term)) for around, dead, term in split]
        return cls(layout, finite, [(around, dead.to(term.dtype)) for around, dead, term in split])

    def part(self, plates: Plates) -> tuple[Tensor, Tensor]:
        """The sum of the finite terms that an element of these plates reaches, and the number of others."""
        return self.total(self.finite, plates), self.total(self.dead, plates)

    def total(self, terms: Terms, plates: Plates) -> Tensor:
        """Terms summed over all plates but these and the shared ones, ``[K, ...]``, the rest as in the program."""
        layout, parts = self.layout, []
        for around, term in terms:
            kept = {layout.particle_dim, *layout.dims, *(key[1] for key in around if key in plates)}
            summed = [d for d in range(-term.dim(), 0) if d not in kept]
            parts.append(term.sum(summed, keepdim=True) if summed else term)
        return particles_first(layout, sum(parts[1:], parts[0]))


def particles_first(layout: Layout, x: Tensor) -> Tensor:
    """A site's tensor with the particles along its first axis, and nothing else moved."""
    if layout.folded:
        return x.unflatten(-1, (layout.num_particles, -1)).movedim(-2, 0)
    return x.unsqueeze(0) if layout.particle_dim is None else x


def in_place(layout: Layout, of_data: Tensor, dim: int) -> Tensor:
    """A tensor of the shared plates, with its axes where they are in one of ``dim`` dimensions."""
    shape = [1] * dim
    for axis, size in zip(layout.dims, of_data.shape, strict=True):
        shape[axis] = size
    return of_data.reshape(shape)
