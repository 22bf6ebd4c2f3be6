"""One run of a pair with K particles: plates, scales, and the parts of its log-weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pyro.distributions.util import sum_rightmost
from torch import Tensor

from pyrovae.engine.programs import depends_on
from pyrovae.engine.sites import (
    Sites,
    counts,
    frames,
    latent,
    log_prob,
    oversampling,
    refuse_live_point_mass,
    reparameterised,
    same,
)
from pyrovae.engine.unwrap import point_mass

Copies = Literal["detached", "live"] | None


@dataclass
class Particles:
    """One run of guide and model with ``num_particles`` particles."""

    guide: Sites
    model: Sites
    num_particles: int
    particle_dim: int | None
    folded: bool
    scaled: bool
    copies: dict[str, Tensor]
    rerun_guide: Callable[[], Sites]

    def __post_init__(self) -> None:
        self.counted = [s for run in (self.guide, self.model) for s in run.values() if counts(s)]
        stacks = [frames(site) for site in self.counted]
        self.plates = {key: f for key, f in (stacks[0] if stacks else {}).items() if all(key in s for s in stacks)}
        self.common_dims = sorted(dim for _, dim, _ in self.plates)
        self.scale: Any = 1.0
        self.tempering: dict[tuple[str, str], Any] = {}
        if self.scaled:
            self.scale, self.tempering = self._scales()

    # --- plates and scales -------------------------------------------------------------------------------------

    @property
    def oversampling(self) -> float:
        """The product of full_size/size over the plates that all sites share."""
        return math.prod(map(oversampling, self.plates.values()))

    @property
    def uncommon_subsampled(self) -> list[str]:
        """Names of subsampled plates that some site is outside of."""
        shared = {name for name, _, _ in self.plates}
        others = {f.name: f for site in self.counted for f in site["cond_indep_stack"] if f.name not in shared}
        return [name for name, f in others.items() if oversampling(f) != 1.0]

    def _scales(self) -> tuple[Any, dict[tuple[str, str], Any]]:
        """The factor of the bound, and what is left to temper single sites with (usually nothing)."""
        if not self.counted:
            return 1.0, {}
        first = self.counted[0]["scale"]
        if all(same(site["scale"], first) for site in self.counted):
            return self._per_datum(first), {}
        left = {}
        for role, sites in (("guide", self.guide), ("model", self.model)):
            for name, site in sites.items():
                if counts(site) and not same(site["scale"], self.oversampling):
                    left[role, name] = site["scale"] / self.oversampling
        return self.oversampling, left

    def _per_datum(self, scale: Any) -> Any:
        if isinstance(scale, Tensor) and scale.dim() > 0:
            sizes = [size for _, _, size in sorted(self.plates, key=lambda key: key[1])]
            dims = [d for d in range(-scale.dim(), 0) if d not in self.common_dims]
            if any(scale.shape[d] != 1 for d in dims):
                raise ValueError(f"a scale of shape {tuple(scale.shape)} varies within a datum: give one per datum")
            return scale.squeeze(dims).expand(sizes) if dims else scale
        return scale

    @property
    def guide_tempering(self) -> list[Any]:
        """The tempering of each latent site of the guide (1 where there is none)."""
        return [self.tempering.get(("guide", name), 1.0) for name in latent(self.guide)]

    # --- log-probabilities ---------------------------------------------------------------------------------------

    def reduce(self, lp: Tensor) -> Tensor:
        """Sum a site's log-probability over the plates that not all sites share: ``[K, *plates]``, or broadcastable."""
        if self.folded:
            return sum_rightmost(lp.movedim(-1, 0), lp.dim() - 1).view(self.num_particles, -1)
        dims = [d for d in range(-lp.dim(), 0) if d != self.particle_dim and d not in self.common_dims]
        return lp.sum(dims) if dims else lp

    def _total(self, role: str, terms: dict[str, Tensor], *, tempered: bool = True) -> Tensor | None:
        total = None
        for name, lp in terms.items():
            if tempered and (role, name) in self.tempering:
                lp = lp * self.tempering[role, name]
            total = self.reduce(lp) if total is None else total + self.reduce(lp)
        return None if total is None else self.as_particles(total)

    def as_particles(self, total: Tensor) -> Tensor:
        """A reduced log-probability with all its axes, ``[K, *plates]``."""
        if self.num_particles == 1 and total.dim() == len(self.common_dims):
            return total.unsqueeze(0)
        return total.expand(self.num_particles, *total.shape[1:])

    def at_site(self, name: str, weights: Tensor) -> Tensor:
        """One weight per particle and datum, ``[K, *plates]``, shaped to multiply the value of a guide's site."""
        return self.spread(weights, self.guide[name]["fn"].event_dim)

    def spread(self, weights: Tensor, event_dim: int) -> Tensor:
        """One weight per particle and datum, shaped to multiply a value of ``event_dim`` event dimensions."""
        if self.folded:
            return weights.reshape(-1, *[1] * event_dim)
        if self.num_particles == 1:
            weights = weights.squeeze(0)
        dims = [d for d in (self.particle_dim, *self.common_dims) if d is not None]
        shape = [1] * -min(dims, default=0)
        for dim, size in zip(dims, weights.shape, strict=True):
            shape[dim] = size
        return weights.reshape(*shape, *[1] * event_dim)

    def log_guide(self) -> Tensor | None:
        """log q(z | x), ``[K, *plates]``; None for a guide without sites."""
        sites = {n: s for n, s in self.guide.items() if counts(s)}
        return self._total("guide", {n: log_prob(s, in_guide=True) for n, s in sites.items()})

    def log_prior(self) -> Tensor | None:
        """log p(z), ``[K, *plates]``."""
        return self._total("model", {name: log_prob(site) for name, site in latent(self.model).items()})

    def log_likelihood(self) -> Tensor | None:
        """log p(x | z), factors included, ``[K, *plates]``."""
        sites = {n: s for n, s in self.model.items() if counts(s) and s["is_observed"]}
        return self._total("model", {name: log_prob(site) for name, site in sites.items()})

    def log_score(self) -> Tensor | None:
        """log q of the guide's non-reparameterised sites, their parents live, untempered; None if there is none."""
        sites = {n: s for n, s in self.guide.items() if counts(s) and not reparameterised(s)}
        return self._total("guide", {n: log_prob(s) for n, s in sites.items()}, tempered=False)

    def log_guide_fixed(self) -> Tensor | None:
        """log q(z | x) at fixed z: no gradient flows through any of the samples.

        Where no site depends on another, the recorded distributions serve; else the guide runs once more.
        """
        sites = {n: s for n, s in self.guide.items() if counts(s)}
        cuttable = not any(point_mass(s["fn"]) for s in sites.values())
        if cuttable:
            terms = {n: log_prob(s, s["value"].detach()) for n, s in sites.items()}
            nodes = {s["value"].grad_fn for s in sites.values()} - {None}
            cuttable = len(sites) == 1 or not any(depends_on(lp, nodes) for lp in terms.values())
        if not cuttable:
            sites = {n: s for n, s in self.rerun_guide().items() if counts(s)}
            for name, site in sites.items():
                refuse_live_point_mass(name, site)
            terms = {n: log_prob(s, in_guide=True) for n, s in sites.items()}
        return self._total("guide", terms)
