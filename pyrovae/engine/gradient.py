r"""Coefficients per particle to a gradient: the surrogates."""

from __future__ import annotations

from functools import partial
from operator import mul
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrovae.engine.particles import Particles


def surrogate(
    particles: Particles,
    log_p: Tensor | None,
    log_guide: Tensor | None,
    log_w: Tensor,
    weights: Any,
    *,
    kl_weight: Any,
    ratio: Tensor | None,
    fixed: bool,
    reinforce: bool,
    path: bool = True,
) -> Tensor:
    r"""A scalar whose gradient is the ascent direction that ``weights`` asks for; its value means nothing.

    ``log_p`` is the weighted log-joint of the model's run, ``log_w`` the whole log-weight. The total derivative of
    :math:`\log w` is path minus kl_weight times score; so, with one run of the model on live samples, ``path * log_w``
    and ``(path + score) * log q`` at fixed samples make every row with model = path. Where they differ the model ran on
    copies. Through detached ones go two backward passes, to the samples with ``path``, to the parameters with
    ``model``. Through live ones one is enough: it carries ``model``, and ``ratio``, path / model, is applied to what
    arrives at the samples, for plates make every particle of every datum a matter of its own.
    """
    alive = torch.isfinite(log_w.detach())

    def dot(coefficient: Tensor, value: Tensor) -> Tensor:
        return (coefficient * torch.where(alive, value, 0.0)).sum()

    if log_p is None:
        total = dot(weights.path, log_w)
    else:
        total = dot(weights.model, log_p)
        leaves = list(particles.copies.values()) if path else []
        if ratio is not None:
            for name, copied in particles.copies.items():
                copied.register_hook(partial(mul, particles.at_site(name, ratio)))
        elif leaves and log_p.requires_grad:
            along = torch.autograd.grad(dot(weights.path, log_p), leaves, retain_graph=True, allow_unused=True)
            live = [particles.guide[name]["value"] for name in particles.copies]
            total = total + sum((g * z).sum() for g, z in zip(along, live, strict=True) if g is not None)
        if log_guide is not None and path:
            total = total - dot(weights.path * kl_weight, log_guide)
    if fixed and (log_q := particles.log_guide_fixed()) is not None:
        total = total + dot(kl_weight * (weights.path + weights.score), log_q)
    if reinforce and (log_q := particles.log_score()) is not None:
        total = total + dot(weights.reinforce, log_q)
    return total


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


def finite_weights(weights: ParticleWeights, bound: Tensor, tiny: float = 0.0, scale: Any = 1.0) -> ParticleWeights:
    """No gradient from a datum whose bound is not finite, nor from a learning signal that is not.

    Nor from a weight below ``tiny``, eps^2 in training: it is invisible in the sum, and its gradients are denormal,
    many times slower on CPUs.
    """
    usable = torch.isfinite(bound)
    done: dict[int, Tensor] = {}  # several coefficients are often one tensor
    for c in weights[:3]:
        if id(c) not in done:
            kept = torch.where(usable & (c.abs() >= tiny), c, 0.0) if tiny else torch.where(usable, c, 0.0)
            done[id(c)] = _times(kept, scale)
    if id(weights.reinforce) not in done:
        finite = usable & torch.isfinite(weights.reinforce)
        done[id(weights.reinforce)] = _times(torch.where(finite, weights.reinforce, 0.0), scale)
    return ParticleWeights(*(done[id(c)] for c in weights))  # type: ignore[call-arg]


def _ratio(weights: ParticleWeights) -> Tensor:
    """path / model, 0 where both are."""
    dropped = weights.model == 0
    return torch.where(dropped, 0.0, weights.path / torch.where(dropped, 1.0, weights.model))


def _times(value: Tensor, scale: Any) -> Tensor:
    return value if isinstance(scale, int | float) and scale == 1 else value * scale
