r"""The contract of an objective: a bound on log-weights, and the coefficients that follow from it."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, TypedDict, get_args

import torch
from torch import Tensor

from pyrovae.arguments import one_of, positive_int, weight
from pyrovae.configured import Configured
from pyrovae.engine.fold import Fold
from pyrovae.engine.gradient import Needs, ParticleWeights, Parts, finite_weights, surrogate
from pyrovae.engine.left_out import kept
from pyrovae.engine.particles import Particles
from pyrovae.engine.probe import Look
from pyrovae.engine.scores import local_plates, score_functions, weight_terms
from pyrovae.engine.sites import Weight
from pyrovae.objectives import checks
from pyrovae.objectives.derivatives import Bound, curvature, learning_signal, slope
from pyrovae.objectives.interface import RunObjective
from pyrovae.objectives.local import local_ascent, noise_alone
from pyrovae.objectives.means import PowerMeans

Gradient = Literal["total", "stl", "dreg"]


class Options(TypedDict, total=False):
    """The keywords that every objective takes."""

    kl_weight: float | Tensor
    likelihood_weight: float | Tensor
    gradient: Gradient
    fold_particles: Fold
    vectorize_particles: bool


class Objective(Configured, RunObjective):
    r"""A training objective: a bound on :math:`\log p(x)` as a function of log-weights.

    Write one by giving :meth:`bound`. Its derivatives say what model and guide follow, its value is what is reported.

    :param num_particles: K, draws from the guide per datum (per group, where there are groups).
    :param kl_weight: b in :math:`\log w = \log p(x \mid z) + b\,(\log p(z) - \log q(z \mid x))`; a float, or
        a 0-d tensor that is annealed in place.
    :param likelihood_weight: the weight of :math:`\log p(x \mid z)` in the same sum.
    :param gradient: ``"total"``, the derivative of the bound as it stands; ``"stl"`` drops the score of the guide
        (Roeder et al. 2017: unbiased for the ELBO, biased for bounds with K > 1); ``"dreg"`` replaces the score by its
        reparameterised equal (Tucker et al. 2018: unbiased, and its signal-to-noise ratio grows with K).
    :param fold_particles: fold particles into the batch, for networks that take one batch dimension only; True, or the
        positions and names of the arguments that have a row for each datum, where True cannot know.
    :param vectorize_particles: False for particles that run one after the other, with any control flow; so they do,
        after a warning, where they cannot run together.
    :raises ValueError: for values out of range, at construction; for impossible sites, by name, at the first call.

    >>> import torch
    >>> import math
    >>> class SoftMin(Objective):
    ...     '''A pessimist's bound.'''
    ...     def bound(self, log_w):
    ...         return -(torch.logsumexp(-log_w, 0) - math.log(log_w.shape[0]))
    >>> SoftMin(num_particles=4)
    SoftMin(num_particles=4)
    >>> SoftMin(num_particles=2).weights(torch.zeros(2, 1)).model.squeeze()
    tensor([0.5000, 0.5000])
    """

    num_groups: int = 1
    #: Whether dreg's |path| <= C * model for some C, so that one backward pass serves for both.
    proportional: bool = False
    #: Whether kl_weight may differ from 1.
    weighs_kl: bool = True
    kl_weight: Weight
    likelihood_weight: Weight

    def __init__(
        self,
        num_particles: int = 1,
        *,
        kl_weight: float | Tensor = 1.0,
        likelihood_weight: float | Tensor = 1.0,
        gradient: Gradient = "total",
        fold_particles: Fold = False,
        vectorize_particles: bool = True,
    ) -> None:
        super().__init__(vectorize_particles=bool(vectorize_particles))
        self.num_particles = positive_int("num_particles", num_particles)
        self.kl_weight = weight("kl_weight", kl_weight)
        if not self.weighs_kl and (isinstance(self.kl_weight, Tensor) or self.kl_weight != 1):
            raise ValueError(f"{type(self).__name__} has no kl_weight but 1, got {kl_weight!r}: leave it out")
        self.likelihood_weight = weight("likelihood_weight", likelihood_weight)
        self.gradient = one_of("gradient", gradient, get_args(Gradient))
        if not isinstance(fold_particles, Sequence | bool):
            raise TypeError(f"fold_particles must be True, False or names, got {fold_particles!r}: pass one of these")
        self.fold_particles = fold_particles if isinstance(fold_particles, bool) else tuple(fold_particles)

    # --- what a subclass gives ---------------------------------------------------------------------------------

    @property
    @abstractmethod
    def bound(self) -> Bound:
        """The bound per datum in nats, a pure function of log-weights, ``[K, ...] -> [...]``; write it as a method."""

    @property
    def path_bound(self) -> Bound:
        """The bound that the guide follows; the same, unless an objective trains its two programs differently."""
        return self.bound

    @property
    def linear(self) -> bool:
        """Whether the bound is the mean of the log-weights."""
        known, number = self.bound, self.total_particles
        return known.linear(number) if isinstance(known, PowerMeans) else number == 1

    # --- what follows ------------------------------------------------------------------------------------------

    @property
    def total_particles(self) -> int:
        """Particles in all: groups times particles per group."""
        return self.num_groups * self.num_particles

    def weights(self, log_w: Tensor) -> ParticleWeights:
        """The coefficients that model and guide follow at ``log_w`` (``[K, ...]``), each shaped like it."""
        bound, weights = self.derived_weights(log_w.detach(), self.kl_weight, Needs(fixed=True))
        return finite_weights(weights, bound)

    @property
    def needs(self) -> Needs:
        """What a run must offer beyond log-weights; of weights of one's own nothing is known, and all is offered."""
        if self.has_own_weights:
            return Needs(copies="detached", fixed=True)
        fixed = self.gradient != "total"
        if type(self).path_bound is not Objective.path_bound:
            return Needs(copies="detached", fixed=fixed)
        if self.gradient != "dreg" or self.linear:
            return Needs(fixed=fixed)
        return Needs(copies="live" if self.proportional else "detached", fixed=fixed)

    @property
    def has_own_weights(self) -> bool:
        """Whether :meth:`weights` is given, and not derived from the bound."""
        return type(self).weights is not Objective.weights

    def derived_weights(self, log_w: Tensor, kl_weight: Weight, needs: Needs) -> tuple[Tensor, ParticleWeights]:
        """The bound, and the coefficients as they follow from it, finite or not; those not needed are ``path``."""
        bound, model = slope(self.bound, log_w)
        path = model if type(self).path_bound is Objective.path_bound else slope(self.path_bound, log_w)[1]
        if self.gradient == "dreg":
            path = path - kl_weight * curvature(self.path_bound, log_w)
        score = path if not needs.fixed else -path if self.gradient == "total" else torch.zeros_like(path)
        reinforce = learning_signal(self.path_bound, log_w, self.num_particles) if needs.reinforce else path
        return bound, ParticleWeights(model, path, score, reinforce)

    def followed_weights(self, log_w: Tensor, particles: Particles, needs: Needs) -> tuple[Tensor, ParticleWeights]:
        """The bound, and what the gradient follows: the coefficients, tiny ones dropped, times the common scale."""
        kl_weight = self.kl_weight * next(iter(particles.guide_tempering), 1.0)
        if self.has_own_weights:
            bound, weights = self.bound(log_w), self.weights(log_w)
        else:
            bound, weights = self.derived_weights(log_w, kl_weight, needs)
        return bound, finite_weights(weights, bound, tiny=torch.finfo(log_w.dtype).eps ** 2, scale=particles.scale)

    # --- of one run ------------------------------------------------------------------------------------------------

    def particle_loss(self, particles: Particles) -> Tensor:
        """The loss of one run of the pair."""
        needs = self.needs
        scores = score_functions(particles) if needs.reinforce and torch.is_grad_enabled() else {}
        cut = () if self.has_own_weights else noise_alone(particles, scores, self.path_bound)
        parts = Parts(
            particles.log_likelihood(), particles.log_prior(), particles.log_guide(cut),
            self.kl_weight, self.likelihood_weight,
        )  # fmt: skip
        log_w = parts.log_w
        if not (particles.copies or any(live.requires_grad for live in (log_w, *scores.values()))):
            return -(kept(self.bound(log_w)) * particles.scale).sum()
        local = {} if self.has_own_weights else local_plates(particles, scores)
        log_score = particles.total("guide", {n: s for n, s in scores.items() if n not in local}, tempered=False)
        needs = needs._replace(reinforce=log_score is not None)
        bound, weights = self.followed_weights(log_w.detach(), particles, needs)
        ascent = surrogate(particles, parts, log_w, weights, needs, log_score)
        if local:
            terms = weight_terms(particles, self.kl_weight, self.likelihood_weight)
            scores = {name: scores[name] for name in local}
            ascent = ascent + local_ascent(particles, scores, terms, self.path_bound, self.num_particles)
        return -(kept(bound) * particles.scale).sum() - (ascent - ascent.detach())

    def check(self, seen: Look) -> None:
        """Refuse a pair that this objective cannot train or measure."""
        checks.refuse_unlike_scales(seen)
        if not self.linear:
            checks.refuse_uncommon_subsample(seen, type(self).__name__, self.total_particles)
        if self.gradient != "total":
            checks.refuse_scored_sites(seen, self.gradient)
        if torch.is_grad_enabled():
            checks.refuse_without_gradient(seen, None if self.expects_marked else type(self).__name__)
            if self.needs.fixed:
                checks.refuse_lacking(seen)
            if not self.needs.reinforce:
                checks.refuse_unscored_noise(seen, type(self).__name__)

    # --- what it is made of ------------------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:  # type: ignore[override]
        """The constructor's arguments, by name, as they are now: particles and weights may be annealed.

        Those that an objective of one's own keeps under another name are not known.
        """
        kept = {name: getattr(self, name) for name in self.defaults() if hasattr(self, name)}
        return {name: value for name, value in kept.items() if not inspect.ismethod(value)}

    def __repr__(self) -> str:
        always, defaults = self.positional(), self.defaults()
        shown = {k: v for k, v in self.config.items() if k in always or v != defaults[k]}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in shown.items())})"
