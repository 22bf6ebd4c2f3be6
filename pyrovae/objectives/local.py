r"""The learning signal of sites whose draws reach only part of the log-weights, element by element."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pyrovae.engine.particles import Particles
from pyrovae.engine.scores import Reach, Terms, in_place, local_plates, particles_first
from pyrovae.objectives.derivatives import Bound, change, mean_of_others
from pyrovae.objectives.means import PowerMeans


def local_ascent(particles: Particles, scores: Mapping[str, Tensor], terms: Terms, bound: Bound, group: int) -> Tensor:
    r"""A scalar whose gradient is that of these sites by their score functions; its value means nothing.

    Element i of particle k is scored with :math:`L - L_{(ki)}`, where :math:`L_{(ki)}` has in the place of the terms
    that it reaches their mean over the other particles of the group; without others, nothing.
    """
    layout, parts = particles.layout, []
    reach = Reach.of(layout, terms)
    whole, lost = reach.part({})
    log_w = torch.where(lost > 0, -math.inf, whole)
    known, plates = torch.isfinite(bound(log_w)), local_plates(particles, scores)
    for name, unplaced in scores.items():
        part, gone = reach.part(plates.get(name, {}))
        target = torch.where(lost > gone, -math.inf, whole - part)
        if group > 1:
            target = target + mean_of_others(torch.where(gone > 0, -math.inf, part), group)
        signal = -change(bound, log_w, target)
        score, scale = particles_first(layout, unplaced), particles.scale
        dim = max(signal.dim(), score.dim())
        signal, score = (t.reshape(len(t), *[1] * (dim - t.dim()), *t.shape[1:]) for t in (signal, score))
        usable = known & torch.isfinite(signal)
        if isinstance(scale, Tensor) and scale.dim():
            scale = in_place(layout, scale, signal.dim() - 1)
        parts.append((torch.where(usable, signal, 0.0) * scale * torch.where(score.isfinite(), score, 0.0)).sum())
    return torch.stack(parts).sum()


def noise_alone(particles: Particles, scored: Iterable[str], bound: Bound) -> list[str]:
    """The draws without rsample whose -log q has a gradient of mean 0, as its coefficient in the bound is a number."""
    if not (isinstance(bound, PowerMeans) and bound.linear(particles.layout.num_particles)):
        return []
    return [name for name in scored if name in particles.guide and not particles.guide[name]["fn"].has_rsample]
