"""Sample sites: how a program's run is recorded, and what each site is worth."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import Delta, Unit
from pyro.distributions.util import sum_rightmost
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Independent

from pyrovae.engine.programs import Program
from pyrovae.engine.unwrap import point_mass

Site = dict[str, Any]


Sites = dict[str, Site]


PARTICLE_PLATE = "_particles"


class ParticlePlate(IndepMessenger):
    """The outer plate of particles: broadcasts like ``pyro.plate``, without its subsample site."""

    def _process_message(self, msg: Any) -> None:
        super()._process_message(msg)
        shape: tuple[int, ...] = getattr(msg["fn"], "batch_shape", ())
        axis = self.dim or 0
        if len(shape) < -axis or shape[axis] != self.size:  # else there is nothing left to broadcast
            BroadcastMessenger._pyro_sample(msg)


class Record(Messenger):
    """Record the sample sites of a run; latent sites named in ``replay`` take their values from there.

    With ``redraw`` the site is drawn first and its draw thrown away, so that whatever else is random in the
    program (dropout) consumes the generator exactly as it did when ``replay`` was drawn.
    """

    def __init__(self, replay: dict[str, Any] | None = None, *, redraw: bool = False) -> None:
        super().__init__()
        self.replay, self.redraw = replay or {}, redraw
        self.sites: Sites = {}

    def _pyro_sample(self, msg: Any) -> None:
        if not self.redraw and not msg["is_observed"] and msg["name"] in self.replay:
            msg["value"], msg["done"] = self.replay[msg["name"]], True

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.sites:
            raise ValueError(f'a program has two sample sites named "{name}": names must be unique; rename one of them')
        if self.redraw and not msg["is_observed"] and name in self.replay:
            msg["value"] = self.replay[name]
        self.sites[name] = msg.copy()


def _is_subsample(site: Site) -> bool:
    return type(site["fn"]).__name__ == "_Subsample"


def record_pair(model: Program, guide: Program, args: tuple, kwargs: dict[str, Any]) -> tuple[Sites, Sites]:
    """Run the guide, then the model on its samples, once and as they are; the sites of both."""
    with Record() as drawn:
        guide(*args, **kwargs)
    with Record({n: s["value"] for n, s in drawn.sites.items() if not s["is_observed"]}) as joint:
        model(*args, **kwargs)
    return drawn.sites, joint.sites


def counts(site: Site) -> bool:
    """Whether a site is a random variable or an observation (subsamples and deterministic sites are not)."""
    return not (_is_subsample(site) or site["infer"].get("_deterministic"))


def latent(sites: Sites) -> Sites:
    """The sampled sites among ``sites``."""
    return {name: site for name, site in sites.items() if counts(site) and not site["is_observed"]}


def _guide_density(fn: Any, value: Tensor, site: Site) -> Tensor:
    """As ``log_prob``, with a Delta's density taken as it stands: its value is its own, no equality is tested."""
    if isinstance(fn, Delta):
        return fn.log_density
    if isinstance(fn, Independent) and point_mass(fn) is not None:
        return sum_rightmost(_guide_density(fn.base_dist, value, site), fn.reinterpreted_batch_ndims)
    return fn.log_prob(value, *site["args"], **site["kwargs"])


def log_prob(site: Site, value: Tensor | None = None, *, in_guide: bool = False) -> Tensor:
    """The unscaled log-probability of one site, masks counted as zero."""
    value = site["value"] if value is None else value
    if in_guide:
        lp = _guide_density(site["fn"], value, site)
    else:
        lp = site["fn"].log_prob(value, *site["args"], **site["kwargs"])
    return masked(lp, site["mask"])


def masked(lp: Tensor, mask: Tensor | bool | None) -> Tensor:
    """``lp`` with zeros where a poutine.mask says so."""
    if mask is None or mask is True:
        return lp
    return torch.zeros_like(lp) if mask is False else torch.where(mask, lp, 0.0)


def frames(site: Site) -> dict[tuple[str, int, int], Any]:
    """The vectorised plates around a site, by name, dim and size; ours for particles aside."""
    return {
        (f.name, f.dim, f.size): f for f in site["cond_indep_stack"] if f.dim is not None and f.name != PARTICLE_PLATE
    }


def oversampling(frame: Any) -> float:
    """full_size / size of a plate, 1 where it is not subsampled."""
    return 1.0 if frame.full_size is None or frame.full_size < 0 else frame.full_size / frame.size


def same(a: Any, b: Any) -> bool:
    """Whether two scales (numbers or tensors) are equal."""
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        a, b = torch.broadcast_tensors(torch.as_tensor(a), torch.as_tensor(b))
        return bool(torch.equal(a.cpu(), b.cpu()))
    return math.isclose(a, b, rel_tol=1e-9)


def reparameterised(site: Site) -> bool:
    """Whether gradients flow through the site's draws, so that it needs no score function."""
    return site["fn"].has_rsample or (site["is_observed"] and not isinstance(point_mass(site["fn"]), Unit))


def refuse_live_point_mass(name: str, site: Site) -> None:
    """Refuse a guide's Delta or factor that carries parameters although its parents are fixed."""
    inner = point_mass(site["fn"])
    parts = (inner.v, inner.log_density) if isinstance(inner, Delta) else (inner.log_factor,) if inner else ()
    if any(part.requires_grad for part in parts):
        kind = "factor" if isinstance(inner, Unit) else "Delta"
        raise ValueError(
            f'guide site "{name}" is a {kind} that carries parameters, so "log q at fixed z" has no meaning for it: '
            'use an objective with gradient="total"'
        )


def quoted(names: Any) -> str:
    """Site names for a message."""
    return ", ".join(f'"{n}"' for n in names) or "none"
