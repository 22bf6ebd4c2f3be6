r"""Coefficients per particle to a gradient: a scalar whose derivative is the ascent direction that they ask for.

The total derivative of :math:`\log w` is path minus kl_weight times score; so ``path * log_w``, and ``(path + score) *
log q`` at fixed samples, give every row whose model coefficient is its path. Where the two differ the model has run on
copies of the samples. Nothing here knows whose parameter is whose.
"""

from __future__ import annotations

from functools import partial
from operator import mul
from typing import NamedTuple

import torch
from torch import Tensor

from pyrovae.engine.particles import Particles, combine, is_number
from pyrovae.engine.run import Copies
from pyrovae.engine.sites import Weight, attached


class ParticleWeights(NamedTuple):
    r"""Four detached coefficients per particle, each like the log-weights they were made from.

    The gradient follows, with :math:`b` the kl_weight,

    .. math::
        \theta:&\; \sum_k \text{model}_k\, \nabla_\theta \log p(x, z_k) \\
        \phi:&\; \sum_k \text{path}_k\, \nabla_z \log w_k\, \nabla_\phi z_k
               + b\, \text{score}_k\, \nabla_\phi \log q(z_k \mid x)
               + \text{reinforce}_k\, \nabla_\phi \log q_\text{non-reparameterised}.
    """

    model: Tensor
    path: Tensor
    score: Tensor
    reinforce: Tensor


class Needs(NamedTuple):
    """What an objective needs of a run of a pair, besides its log-weights.

    :ivar copies: the copies of the samples on which the model runs, where model and path may differ; "fixed" where the
        guide does not follow its samples at all.
    :ivar fixed: whether path + score may differ from 0, so that log q at fixed samples enters.
    :ivar reinforce: whether sites without rsample follow their score.
    """

    copies: Copies = None
    fixed: bool = False
    reinforce: bool = True


class Parts(NamedTuple):
    """The parts of a run's log-weights, ``[K, *plates]`` each, and the weights that joined them."""

    likelihood: Tensor | None
    prior: Tensor | None
    guide: Tensor | None
    kl_weight: Weight
    likelihood_weight: Weight

    @property
    def log_w(self) -> Tensor:
        """The weighted log-weights."""
        return combine(*self)

    @property
    def log_p(self) -> Tensor:
        """The weighted log-joint of the model's run."""
        return combine(*self._replace(guide=None))


def surrogate(
    particles: Particles, parts: Parts, log_w: Tensor, weights: ParticleWeights, needs: Needs, log_score: Tensor | None
) -> Tensor:
    """A scalar whose gradient is the ascent direction that ``weights`` asks for; its value means nothing."""
    alive = torch.isfinite(log_w.detach())
    if needs.copies is None:
        total = dot(weights.path, log_w, alive)
    elif needs.copies == "live":
        total = along_live_copies(particles, parts.log_p, weights, alive)
    else:
        total = along_detached_copies(particles, parts.log_p, weights, alive)
    if needs.copies in ("live", "detached") and parts.guide is not None:
        total = total - dot(weights.path * parts.kl_weight, parts.guide, alive)
    if needs.fixed and (log_q := particles.log_guide_fixed()) is not None:
        total = total + dot(parts.kl_weight * (weights.path + weights.score), log_q, alive)
    if log_score is not None:
        total = total + dot(weights.reinforce, log_score, torch.isfinite(log_score.detach()))
    return total


def dot(coefficient: Tensor, value: Tensor, alive: Tensor) -> Tensor:
    """The sum of coefficient times value; dead particles have no gradient (0 * NaN would be one)."""
    return (coefficient * torch.where(alive, value, 0.0)).sum()


def along_live_copies(particles: Particles, log_p: Tensor, weights: ParticleWeights, alive: Tensor) -> Tensor:
    """One backward pass through the model: ``model`` to the parameters, scaled by path / model to the samples.

    That is right because plates make every particle of every datum a matter of its own.
    """
    ratio = ratio_of(weights.path, weights.model)
    for name, copy in particles.copies.items():
        for tensor in (copy, *attached(copy).values()):
            at_site = particles.layout.spread(ratio, particles.guide[name]["fn"].event_dim).to(tensor.dtype)
            tensor.register_hook(partial(mul, at_site))
    return dot(weights.model, log_p, alive)


def along_detached_copies(particles: Particles, log_p: Tensor, weights: ParticleWeights, alive: Tensor) -> Tensor:
    """Two backward passes through the model: to the samples with ``path``, to the parameters with ``model``."""
    total = dot(weights.model, log_p, alive)
    leaves = [leaf for copy in particles.copies.values() for leaf in (copy, *attached(copy).values())]
    if not any(leaf.requires_grad for leaf in leaves) or not log_p.requires_grad:
        return total
    along = torch.autograd.grad(dot(weights.path, log_p, alive), leaves, retain_graph=True, allow_unused=True)
    drawn = [particles.guide[name]["value"] for name in particles.copies]
    live = [tensor for value in drawn for tensor in (value, *attached(value).values())]
    return total + sum((g * z).sum() for g, z in zip(along, live, strict=True) if g is not None)


def ratio_of(path: Tensor, model: Tensor) -> Tensor:
    """path / model, 0 where both are."""
    dropped = model == 0
    return torch.where(dropped, 0.0, path / torch.where(dropped, 1.0, model))


def finite_weights(weights: ParticleWeights, bound: Tensor, tiny: float = 0.0, scale: Weight = 1.0) -> ParticleWeights:
    """No gradient from a datum whose bound is not finite, nor from a learning signal that is not.

    Nor from a weight below ``tiny``, eps^2 in training: it is invisible in the sum, and its gradients are denormal,
    many times slower on CPUs. Coefficients that are one tensor stay one.
    """
    usable = torch.isfinite(bound)

    def kept(coefficient: Tensor, where: Tensor) -> Tensor:
        finite = torch.where(where, coefficient, 0.0)
        return finite if is_number(scale, 1) else finite * scale

    def visible(coefficient: Tensor) -> Tensor:
        return kept(coefficient, usable & (coefficient.abs() >= tiny))  # false of a NaN

    model = visible(weights.model)
    path = model if weights.path is weights.model else visible(weights.path)
    score = path if weights.score is weights.path else visible(weights.score)
    if weights.reinforce is weights.path:
        return ParticleWeights(model, path, score, path)
    return ParticleWeights(model, path, score, kept(weights.reinforce, usable & torch.isfinite(weights.reinforce)))
