"""One run of a pair with K particles: where they lie, and the parts of its log-weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor

from pyrovae.engine.fixed import at_fixed_samples
from pyrovae.engine.programs import depends_on
from pyrovae.engine.sites import (
    Plates,
    Site,
    Sites,
    Weight,
    attached,
    carriers,
    counted,
    counts,
    draws,
    duplicate,
    frames,
    latent,
    log_prob,
    observed,
    oversampling,
    proposed,
    same,
    structure,
)
from pyrovae.engine.unwrap import of_libraries, point_mass

Role = Literal["guide", "model"]


@dataclass(frozen=True)
class Layout:
    """Where particles and data lie in the tensors of a run: ``[K, *plates]``, of the plates that every site shares.

    :ivar particle_dim: dim of the particles' plate; None for one particle, or with the particles folded into the batch.
    :ivar plates: the plates around every sample site of the model, at a dim and of a size that every one of the guide's
        lies in as well.
    """

    num_particles: int
    particle_dim: int | None
    folded: bool
    plates: Plates

    @classmethod
    def around(
        cls,
        model: Collection[Site],
        guide: Collection[Site] = (),
        num_particles: int = 1,
        particle_dim: int | None = None,
        folded: bool = False,
    ) -> Layout:
        """The layout of a run with these sites."""
        stacks = [frames(site) for site in model]
        places = [{key[1:] for key in frames(site)} for site in guide]
        first = next((frames(site) for site in (*model, *guide)), {})
        shared = {
            key: f for key, f in first.items() if all(key in s for s in stacks) and all(key[1:] in p for p in places)
        }
        return cls(num_particles, particle_dim, folded, shared)

    @cached_property
    def dims(self) -> list[int]:
        """The dims of the shared plates; none where the weights are joint."""
        return sorted(dim for _, dim, _ in self.plates)

    @property
    def row_dims(self) -> list[int]:
        """The dims of particles and shared plates, in the order of log-weights."""
        return [d for d in (self.particle_dim, *self.dims) if d is not None]

    @property
    def sizes(self) -> list[int]:
        """The sizes of the shared plates, in the order of :attr:`dims`."""
        return [size for _, _, size in sorted(self.plates, key=lambda key: key[1])]

    @property
    def oversampling(self) -> float:
        """The product of full_size/size over the shared plates."""
        return math.prod(map(oversampling, self.plates.values()))

    def reduce(self, lp: Tensor) -> Tensor:
        """Sum a site's log-probability over the plates that not all sites share: ``[K, *plates]``, or broadcastable."""
        if self.folded:
            return sum_rightmost(lp.movedim(-1, 0), lp.dim() - 1).view(self.num_particles, -1)
        dims = [d for d in range(-lp.dim(), 0) if d != self.particle_dim and d not in self.dims]
        return lp.sum(dims) if dims else lp

    def expand(self, total: Tensor) -> Tensor:
        """A reduced log-probability with all its axes, ``[K, *plates]``."""
        if self.num_particles == 1 and total.dim() == len(self.dims):
            return total.unsqueeze(0)
        return total.expand(self.num_particles, *total.shape[1:])

    def spread(self, weights: Tensor, event_dim: int) -> Tensor:
        """One weight per particle and datum, shaped to multiply a value of ``event_dim`` event dimensions."""
        if self.folded:
            return weights.reshape(-1, *[1] * event_dim)
        if self.particle_dim is None:
            weights = weights.squeeze(0)
        dims = self.row_dims
        shape = [1] * -min(dims, default=0)
        for dim, size in zip(dims, weights.shape, strict=True):
            shape[dim] = size
        return weights.reshape(*shape, *[1] * event_dim)


@dataclass
class Particles:
    """One run of guide and model.

    :ivar guide: the guide's sites that count in log q.
    :ivar noise: what it draws besides: given these draws, log w is as it is.
    :ivar scale: the factor of the bound: a number, or one for each datum.
    :ivar tempering: by role and site, what is left of a site's scale and tempers it inside log w (usually nothing).
    :ivar copies: the copies of the guide's samples that the model ran on, where it did.
    :ivar runs: the sites of guide and model in each of the runs, where particles ran one after the other.
    :ivar rerun_guide: runs the guide again on its samples held fixed, but for these; what :meth:`log_guide_fixed` may
        need.
    """

    layout: Layout
    guide: Sites
    model: Sites
    scale: Weight = 1.0
    tempering: dict[tuple[Role, str], Weight] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    rerun_guide: Callable[..., Sites] = dict
    noise: Sites = field(default_factory=dict)
    runs: list[tuple[Sites, ...]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        guide: Sites,
        model: Sites,
        num_particles: int = 1,
        particle_dim: int | None = None,
        folded: bool = False,
        *,
        noise: Collection[str] = (),
        scaled: bool = False,
    ) -> Particles:
        """A run from its sites; with ``scaled=False`` every scale is ignored."""
        own = proposed(guide, model)
        apart = {name: own.pop(name) for name in list(own) if name in noise}
        layout = Layout.around(counted(model), own.values(), num_particles, particle_dim, folded)
        scale, tempering = scales(layout, own, model) if scaled else (1.0, {})
        return cls(layout, own, model, scale, tempering, noise=apart)

    def check_dims(self) -> None:
        """Refuse a log-probability with dims left of the particles and plates: there a program took what is not theirs.

        With one particle it may not show, as where z[..., 0:1] gives a number for each. Of the libraries' distributions
        only shapes are looked at, for a flow may keep what its density computed for the next; a density of the user's
        own is computed, which may know no particles.
        """
        sites = *self.guide.values(), *self.noise.values(), *self.model.values()
        for site in (s for s in sites if "sum" not in s and counts(s)):
            fn, value = site["fn"], site["value"]
            own = () if of_libraries(fn) else log_prob(site).shape
            shape = torch.broadcast_shapes(fn.batch_shape, value.shape[: value.dim() - fn.event_dim], own)
            dims = [f.dim for f in site["cond_indep_stack"] if f.dim is not None]
            if any(size > 1 for size in shape[: max(0, len(shape) + min(dims, default=0))]):
                raise ValueError(
                    f'site "{site["name"]}" has log-probabilities {list(shape)}, with dims besides those of '
                    f"{self.layout.num_particles} particles and its plates: index latents from the right, as z[..., 0]"
                )

    @cached_property
    def weighed(self) -> Sites:
        """The model's sites, without those whose part another site of the same sum has."""
        return {name: site for name, site in self.model.items() if not site.get("absorbed")}

    @cached_property
    def carried(self) -> Sites:
        """The point masses that carry a part of the density of latents."""
        return carriers(self.weighed)

    @property
    def prior(self) -> Sites:
        """The model's latent sites, and the point masses that carry a part of their density."""
        return latent(self.weighed) | self.carried

    @property
    def likelihood(self) -> Sites:
        """The model's observed sites, factors included."""
        return {name: site for name, site in observed(self.weighed).items() if name not in self.carried}

    @property
    def structure(self) -> tuple[object, ...]:
        """What a check of this run holds for."""
        folded = self.layout.num_particles if self.layout.folded else 1
        return structure(self.guide, self.noise, self.model, folded=folded)

    @property
    def uncommon_subsampled(self) -> list[str]:
        """Names of subsampled plates that some site is outside of."""
        shared = {(dim, size) for _, dim, size in self.layout.plates}
        sites = (*self.guide.values(), *counted(self.model))
        others = {f.name: f for site in sites for f in site["cond_indep_stack"] if (f.dim, f.size) not in shared}
        return [name for name, f in others.items() if oversampling(f) != 1.0]

    @property
    def guide_tempering(self) -> list[Weight]:
        """The tempering of each latent site of the guide (1 where there is none)."""
        return [self.tempering.get(("guide", name), 1.0) for name in latent(self.guide)]

    def total(self, role: Role, terms: dict[str, Tensor], *, tempered: bool = True) -> Tensor | None:
        """The sum of sites' log-probabilities, ``[K, *plates]``; None of none."""
        total = None
        for name, lp in terms.items():
            if tempered and (role, name) in self.tempering:
                lp = lp * self.tempering[role, name]
            total = self.layout.reduce(lp) if total is None else total + self.layout.reduce(lp)
        return None if total is None else self.layout.expand(total)

    def log_guide(self, cut: Collection[str] = ()) -> Tensor | None:
        """log q(z | x), ``[K, *plates]``, without gradients of the sites ``cut``; None for a guide without sites."""
        terms = {name: log_prob(site, in_guide=True) for name, site in self.guide.items()}
        return self.total("guide", {name: lp.detach() if name in cut else lp for name, lp in terms.items()})

    def log_prior(self) -> Tensor | None:
        """log p(z), with what point masses carry of it, ``[K, *plates]``."""
        return self.total("model", {name: log_prob(site) for name, site in self.prior.items()})

    def log_carried(self) -> Tensor | None:
        """The part of log p(z) that no latent site has, but point masses carry, ``[K, *plates]``."""
        return self.total("model", {name: log_prob(site) for name, site in self.carried.items()})

    def log_likelihood(self) -> Tensor | None:
        """log p(x | z), factors included, ``[K, *plates]``."""
        return self.total("model", {name: log_prob(site) for name, site in self.likelihood.items()})

    def log_guide_fixed(self) -> Tensor | None:
        """log q(z | x) at fixed z: no gradient flows through any of the samples, but through noise besides.

        Where no site depends on another, the recorded distributions serve; else the guide runs once more.
        """
        sites = list(self.guide.values())
        cuttable = not any(point_mass(s["fn"]) for s in sites)
        if cuttable:
            terms = {s["name"]: log_prob(s, duplicate(s["value"], Tensor.detach)) for s in sites}
            values = [v for s in sites for d in draws(s) for v in (d, *attached(d).values())]
            nodes = {v.grad_fn for v in values if v.grad_fn is not None}
            cuttable = len(sites) == 1 or not any(depends_on(lp, nodes) for lp in terms.values())
        if not cuttable:
            own = [name for name in latent(self.guide) if name not in self.model]
            again = at_fixed_samples(self.guide, own, self.rerun_guide, self.layout.row_dims)
            terms = {name: log_prob(again[name], in_guide=True) for name in self.guide}
        return self.total("guide", terms)


def scales(layout: Layout, guide: Sites, model: Sites) -> tuple[Weight, dict[tuple[Role, str], Weight]]:
    """The factor of the bound, and what is left to temper single sites with (usually nothing)."""
    sites = [*guide.values(), *counted(model)]
    if not sites:
        return 1.0, {}
    first: Weight = sites[0]["scale"]
    if all(same(site["scale"], first) for site in sites):
        return per_datum(first, layout), {}
    common = layout.oversampling
    runs: tuple[tuple[Role, Sites], ...] = (("guide", guide), ("model", model))
    left = {
        (role, site["name"]): site["scale"] / common
        for role, run in runs
        for site in counted(run)
        if not same(site["scale"], common)
    }
    return common, left


def per_datum(scale: Weight, layout: Layout) -> Weight:
    """A scale as a number, or as a tensor of the shared plates' sizes."""
    if not isinstance(scale, Tensor) or scale.dim() == 0:
        return scale
    dims = [d for d in range(-scale.dim(), 0) if d not in layout.dims]
    if any(scale.shape[d] != 1 for d in dims):
        raise ValueError(f"a scale of shape {tuple(scale.shape)} varies within a datum: give one per datum")
    scale = scale.squeeze(dims).expand(layout.sizes)
    if not layout.folded:
        return scale
    of_particles = scale.unflatten(0, (layout.num_particles, -1))
    if not same(of_particles, of_particles[0]):
        raise ValueError("a scale varies with the particles folded into the batch: give one per datum")
    return of_particles[0]


def combine(
    log_likelihood: Tensor | None,
    log_prior: Tensor | None,
    log_guide: Tensor | None,
    kl_weight: Weight = 1.0,
    likelihood_weight: Weight = 1.0,
) -> Tensor:
    """likelihood_weight * log p(x | z) + kl_weight * (log p(z) - log q(z | x)), each part optional."""
    kl = None
    if not is_number(kl_weight, 0):
        kl = log_prior if log_guide is None else -log_guide if log_prior is None else log_prior - log_guide
    weighted = [
        part if is_number(weight, 1) else part * weight
        for part, weight in ((log_likelihood, likelihood_weight), (kl, kl_weight))
        if part is not None and not is_number(weight, 0)
    ]
    if not weighted:
        some = next(part for part in (log_likelihood, log_prior, log_guide) if part is not None)
        return torch.zeros_like(some)
    return weighted[0] if len(weighted) == 1 else weighted[0] + weighted[1]


def is_number(weight: Weight, number: float) -> bool:
    """Whether a weight is that number, for good; a tensor may be annealed."""
    return isinstance(weight, int | float) and weight == number


def measure(particles: Particles, kl_weight: Weight = 1.0, likelihood_weight: Weight = 1.0) -> Tensor:
    """The log-weights of a run, ``[K, *plates]``."""
    parts = particles.log_likelihood(), particles.log_prior(), particles.log_guide()
    return combine(*parts, kl_weight, likelihood_weight)
