r"""Model/guide -> particles -> log-weights -> gradient.

Any pair of Pyro programs is run with :math:`K` particles in one vectorised outer plate. What comes back are the
parts of the log-weights

.. math:: \log w_{kb} = \log p(x_b, z_{kb}) - \log q(z_{kb} \mid x_b),

``[K, B]``, one row per particle and one column per datum. :func:`surrogate` turns four coefficients per particle
into a gradient for model and guide, without knowing whose parameter is whose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import mul
from typing import Any, Literal

import pyro
import torch
from pyro.distributions import Delta
from pyro.distributions.util import sum_rightmost
from pyro.util import check_site_shape
from torch import Tensor

from pyrovae.arguments import positive_int
from pyrovae.programs import Program, depends_on, isolated_rng, protected_buffers, replayed_rng, rng_state
from pyrovae.sites import (
    PARTICLE_PLATE,
    ParticlePlate,
    Record,
    Sites,
    counts,
    frames,
    latent,
    log_prob,
    oversampling,
    point_mass,
    quoted,
    record_pair,
    refuse_live_point_mass,
    reparameterised,
    same,
)

_ANY: Any = math.inf
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


# --- running the programs ------------------------------------------------------------------------------------------


def fold_arguments(args: tuple, kwargs: dict, num_particles: int) -> tuple[tuple, dict]:
    """Repeat every argument that has the data along its first axis, particles major."""
    size = next((a.shape[0] for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim() > 0), None)

    def repeat(a: Any) -> Any:
        if isinstance(a, Tensor) and a.dim() > 0 and a.shape[0] == size:
            return a.repeat(num_particles, *[1] * (a.dim() - 1))
        return a

    return tuple(map(repeat, args)), {k: repeat(v) for k, v in kwargs.items()}


@contextmanager
def _shape_hint(num_particles: int) -> Iterator[None]:
    """With one particle the pair ran; where it fails with several, its networks are the likely reason."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        error.add_note(
            f"with {num_particles} particles, networks see leading dimensions [K, B, ...]: "
            "let them take any, or pass fold_particles=True"
        )
        raise


def run(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: dict,
    *,
    num_particles: int = 1,
    nesting: int = 0,
    fold: bool = False,
    copies: Copies = None,
    rerun: bool = False,
    scaled: bool = True,
) -> Particles:
    """Run guide, then model on its samples, with ``num_particles`` particles to the left of ``nesting`` plates.

    With ``copies`` the model runs on copies of the samples, "detached" or "live", kept in ``Particles.copies``.
    ``rerun`` keeps what :meth:`Particles.log_guide_fixed` needs. With ``fold`` the particles are folded into the batch
    instead of a plate. With ``scaled=False`` every scale is ignored.
    """
    fold, particle_dim = fold and num_particles > 1, None
    if fold:
        args, kwargs = fold_arguments(args, kwargs, num_particles)
    elif num_particles > 1:
        particle_dim = -1 - nesting

    def execute(program: Program, record: Record) -> Sites:
        with record:
            if particle_dim is None:
                program(*args, **kwargs)
            else:
                with _shape_hint(num_particles), ParticlePlate(PARTICLE_PLATE, num_particles, dim=particle_dim):
                    program(*args, **kwargs)
        return record.sites

    with pyro.validation_enabled(False):
        states: Any = rng_state() if rerun else None
        guide_sites = execute(guide, Record())
        values = {n: s["value"] for n, s in guide_sites.items() if not s["is_observed"]}
        copied = {n: v for n, v in values.items() if copies and getattr(v, "requires_grad", False)}
        copied = {n: v.view_as(v) if copies == "live" else v.detach().requires_grad_() for n, v in copied.items()}
        model_sites = execute(model, Record(values | copied))

    def rerun_guide() -> Sites:
        moving = (n for n in values if not isinstance(point_mass(guide_sites[n]["fn"]), Delta))
        fixed = {n: values[n].detach() if isinstance(values[n], Tensor) else values[n] for n in moving}
        with pyro.validation_enabled(False), replayed_rng(*states), protected_buffers():
            return execute(guide, Record(fixed, redraw=True))

    return Particles(guide_sites, model_sites, num_particles, particle_dim, fold, scaled, copied, rerun_guide)


def probe(model: Program, guide: Program, args: tuple, kwargs: dict) -> Particles:
    """Run the pair once with one particle, checked by Pyro and by us, leaving no trace in generators and buffers."""
    with torch.no_grad(), isolated_rng(), protected_buffers():
        particles = Particles(*record_pair(model, guide, args, kwargs), 1, None, False, True, {}, dict)
        _check_match(particles)
        _check_shapes(particles)
    return particles


def nesting(particles: Particles) -> int:
    """The number of dimensions that the programs' own plates take."""
    sites = (s for run in (particles.guide, particles.model) for s in run.values())
    return max((-f.dim for s in sites for f in s["cond_indep_stack"] if f.dim is not None), default=0)


def _check_match(particles: Particles) -> None:
    """Every latent site of the model must be drawn by the guide, and the other way round."""
    drawn, wanted = latent(particles.guide), latent(particles.model)
    if not any(counts(s) for s in particles.model.values()):
        raise ValueError("the model has no sample site: it must observe something; add pyro.sample(..., obs=x)")
    for name in wanted:
        if name not in drawn:
            raise ValueError(
                f'model site "{name}" is neither observed nor drawn by the guide, which draws {quoted(drawn)}: '
                "sample it in the guide, or pass obs="
            )
    for name, site in drawn.items():
        if name not in wanted and not site["infer"].get("is_auxiliary"):
            raise ValueError(
                f'guide site "{name}" is not a latent site of the model, which has {quoted(wanted)}: '
                'rename it, or mark it infer={"is_auxiliary": True}'
            )


def _check_shapes(particles: Particles) -> None:
    for role, sites in (("guide", particles.guide), ("model", particles.model)):
        for name, site in sites.items():
            if not counts(site):
                continue
            try:
                scored: Any = {**site, "log_prob": log_prob(site, in_guide=role == "guide")}
                check_site_shape(scored, max_plate_nesting=_ANY)
            except ValueError as error:
                raise ValueError(f'{role} site "{name}": ' + " ".join(str(error).split())) from error


# --- gradient ------------------------------------------------------------------------------------------------------


def combine(
    log_likelihood: Tensor | None,
    log_prior: Tensor | None,
    log_guide: Tensor | None,
    kl_weight: Any,
    likelihood_weight: Any,
) -> Tensor:
    """likelihood_weight * log p(x | z) + kl_weight * (log p(z) - log q(z | x)), each part optional."""
    kl = None
    if not (isinstance(kl_weight, int | float) and kl_weight == 0):
        kl = log_prior if log_guide is None else -log_guide if log_prior is None else log_prior - log_guide
    weighted = [
        part if isinstance(weight, int | float) and weight == 1 else part * weight
        for part, weight in ((log_likelihood, likelihood_weight), (kl, kl_weight))
        if part is not None and not (isinstance(weight, int | float) and weight == 0)
    ]
    if not weighted:
        some = next(part for part in (log_likelihood, log_prior, log_guide) if part is not None)
        return torch.zeros_like(some)
    return weighted[0] if len(weighted) == 1 else weighted[0] + weighted[1]


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


def log_weights(
    model: Program, guide: Program, *args: Any, num_particles: int = 1, fold_particles: bool = False, **kwargs: Any
) -> Tensor:
    r"""The importance log-weights :math:`\log p(x_b, z_{kb}) - \log q(z_{kb} \mid x_b)`, ``[K, B]`` in nats.

    Scales (subsampling, ``poutine.scale``) are ignored, masked sites count as zero, and the train/eval mode is left as
    it is. A pair whose latents lie outside the data plate has joint weights, ``[K]``. The result carries gradients
    unless called under ``torch.no_grad()``.

    :param num_particles: K, the number of draws from the guide.
    :param fold_particles: fold the particles into the batch, for networks that take one batch dimension only.
    :raises ValueError: if the guide does not match the model, naming the site.

    >>> import pyro, torch, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
    >>> log_w = log_weights(model, guide, torch.zeros(3), num_particles=4)
    >>> log_w.shape, bool(log_w.std() < 1e-6)  # the guide is the posterior: every weight is log p(x)
    (torch.Size([4, 3]), True)
    """
    checked = probe(model, guide, args, kwargs)
    check_fold(checked, fold_particles)
    return measure(
        run(
            model,
            guide,
            args,
            kwargs,
            num_particles=positive_int("num_particles", num_particles),
            nesting=nesting(checked),
            fold=fold_particles,
            scaled=False,
        )
    )


def measure(particles: Particles, kl_weight: Any = 1.0, likelihood_weight: Any = 1.0) -> Tensor:
    """The log-weights of a run, ``[K, *plates]``."""
    parts = particles.log_likelihood(), particles.log_prior(), particles.log_guide()
    return combine(*parts, kl_weight, likelihood_weight)


def check_fold(particles: Particles, fold: bool) -> None:
    """Refuse to fold the particles of a pair that has joint weights, or a plate with a subsample of its own."""
    if not fold:
        return
    if particles.common_dims != [-1]:
        raise ValueError(
            "fold_particles=True needs one data plate at dim -1 around every site, "
            f"found plates {quoted(name for name, _, _ in particles.plates)} shared by all: pass fold_particles=False"
        )
    stack = [f for site in particles.counted for f in site["cond_indep_stack"]]
    subsampled = sorted({f.name for f in stack if oversampling(f) != 1.0})
    if subsampled:
        raise ValueError(
            f"fold_particles=True cannot repeat a subsampled plate, found {quoted(subsampled)}: "
            "drop the subsample, or pass fold_particles=False"
        )
