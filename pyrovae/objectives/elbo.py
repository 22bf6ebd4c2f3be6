r"""The evidence lower bound, and its variant with free bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor

from pyrovae.arguments import in_range
from pyrovae.engine.kl import is_divergence, kl_in_place, over_plates, parents_first
from pyrovae.engine.left_out import kept
from pyrovae.engine.particles import Particles, is_number
from pyrovae.engine.probe import Look
from pyrovae.engine.programs import Program, warn
from pyrovae.engine.scores import score_functions, terms_of
from pyrovae.engine.sites import frames, latent
from pyrovae.engine.unwrap import point_mass
from pyrovae.objectives import checks
from pyrovae.objectives.base import Objective, Options
from pyrovae.objectives.derivatives import Bound
from pyrovae.objectives.expected import expected_loss
from pyrovae.objectives.interface import refusals_of_func
from pyrovae.objectives.local import local_ascent
from pyrovae.objectives.means import PowerMeans


class ELBO(Objective):
    r"""Evidence lower bound, the mean of K log-weights.

    .. math:: \mathrm{ELBO}
        = \mathbb E_{q(z \mid x)} \big[ \log p(x \mid z) + \beta\,(\log p(z) - \log q(z \mid x)) \big]

    :math:`\beta` is ``kl_weight``: 1 in the plain VAE, other in the beta-VAE. More particles lower the variance of its
    gradient, not its gap :math:`\mathrm{KL}(q \| p(z \mid x))`. Shadows Pyro's abstract class of that name,
    ``pyro.infer.ELBO``, of which it is a subclass.

    ``free_bits`` :math:`\lambda > 0` (nats per unit) stops paying for the KL of units below it:

    .. math:: \text{loss} = -\sum_b \mathbb E \log p(x_b \mid z) + B\, \beta \sum_u \max\big(\lambda,\;
        \tfrac1B \textstyle\sum_b \mathrm{KL}_{bu}\big)

    with the KL of each unit (one element of an independent event, else the site) in closed form given its parents,
    where one is registered and the guide draws all latents before the site that the model draws before it, else by its
    samples. That is no function of log-weights: :meth:`bound` refuses.

    Guide sites that are marked for enumeration (``pyro.infer.config_enumerate``) are not drawn: of them the exact
    expectation is taken, eagerly, as ``pyro.infer.TraceEnum_ELBO`` does it, which says what the marks mean.

    >>> ELBO(num_particles=2).bound(torch.tensor([[0.0], [-2.0]]))
    tensor([-1.])

    :raises ValueError: if free_bits is negative, or joined with a gradient other than "total"; at the first call, for
        sites without a KL.

    Kingma and Welling (2014), *Auto-encoding variational Bayes*; Kingma et al. (2016), *Improved variational inference
    with inverse autoregressive flow* (free bits).
    """

    expects_marked = True

    def __init__(self, num_particles: int = 1, *, free_bits: float = 0.0, **options: Unpack[Options]) -> None:
        super().__init__(num_particles, **options)
        self.free_bits = in_range("free_bits", free_bits, 0.0, 1e6)
        if self.free_bits and self.gradient != "total":
            raise ValueError(f'free_bits needs gradient="total", got "{self.gradient}": drop one of the two')

    @property
    def bound(self) -> Bound:
        if self.free_bits:
            raise ValueError("with free_bits the ELBO is no function of log-weights: pass free_bits=0 for its bound")
        return PowerMeans({0.0: 1.0})

    @property
    def linear(self) -> bool:
        return True

    def particle_loss(self, particles: Particles) -> Tensor:
        """The loss of one run of the pair."""
        return self.free_bits_loss(particles) if self.free_bits else super().particle_loss(particles)

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """As of any objective; guide sites marked for enumeration are summed over, as Pyro does it."""
        runner = self.runner(model, guide)
        if not runner.known:
            with refusals_of_func(self):
                runner.look(args, kwargs, self.check)
        if not runner.marked:
            return super().differentiable_loss(model, guide, *args, **kwargs)
        return expected_loss(
            model, guide, args, kwargs, self.num_particles, runner.nesting, vectorize=not runner.separate,
            kl_weight=self.kl_weight, likelihood_weight=self.likelihood_weight,
        )  # fmt: skip

    def check(self, seen: Look) -> None:
        """As of any objective; free bits need a KL for each unit."""
        super().check(seen)
        if seen.marked:
            weighs = not (is_number(self.kl_weight, 1) and is_number(self.likelihood_weight, 1))
            options = {"free_bits": bool(self.free_bits), "fold_particles": bool(self.fold_particles)}
            checks.refuse_expectation(seen, options | {"weights of what the model sums out": weighs and seen.sums})
        for name, site in seen.particles.guide.items() if self.free_bits else ():
            if (inner := point_mass(site["fn"])) is not None:
                raise ValueError(
                    f'free_bits needs a KL for each unit, but guide site "{name}" is a {type(inner).__name__}, '
                    "which has none: sample it from a density, or pass free_bits=0"
                )
        for name in latent(seen.model) if self.free_bits else ():
            if not is_divergence(replace(seen, left=None).particles, name):
                raise ValueError(
                    f'free_bits needs a KL for each unit, but site "{name}" is masked or scaled in one program '
                    "otherwise than in the other, or has an improper prior: treat it alike, or pass free_bits=0"
                )
            if not parents_first(seen.particles, name):
                warn(
                    f'free_bits take the KL of site "{name}" by its draws, whose mean is noisy, because the guide '
                    "draws it before what the model may compute it from: draw latents in the order of the model"
                )

    def free_bits_loss(self, particles: Particles) -> Tensor:
        """As in the equation, times the common factor."""
        likelihood, carried = particles.log_likelihood(), particles.log_carried()
        cost: Any = 0.0 if likelihood is None else -self.likelihood_weight * likelihood
        if carried is not None:
            cost = cost - self.kl_weight * carried
        loss: Any = -kept(-(torch.as_tensor(cost) * particles.scale).mean(0)).sum()
        terms = []
        for name in latent(particles.model):
            kl = kl_in_place(particles, name)
            of_data = over_plates(particles.layout, kl)  # [K, *plates, units]
            mean = of_data.flatten(0, -2).mean(0)
            paid = torch.clamp(mean, min=self.free_bits).sum()
            loss = loss + self.kl_weight * paid * (torch.ones_like(of_data[0, ..., 0]) * particles.scale).sum()
            of_site = self.kl_weight * (kl * (mean > self.free_bits)).sum(-1)
            terms.append((frames(particles.guide[name]), -of_site.detach()))
        if torch.is_grad_enabled() and (scores := score_functions(particles)):
            rest = particles.carried, self.kl_weight
            terms += terms_of(particles, ("model", particles.likelihood, self.likelihood_weight), ("model", *rest))
            ascent = local_ascent(particles, scores, terms, PowerMeans({0.0: 1.0}), self.num_particles)
            loss = loss - (ascent - ascent.detach())
        return loss
