"""Sample sites: how a program's run is recorded, and what each site is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from pyro.distributions import Delta, TorchDistribution, Unit
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.distributions.util import sum_rightmost
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame, IndepMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor
from torch.distributions import Distribution, Independent, TransformedDistribution

from pyrovae.engine.brief import shorten
from pyrovae.engine.devices import beside
from pyrovae.engine.marginal import Marginal
from pyrovae.engine.programs import Batch, Program, refuse_call
from pyrovae.engine.relaxed import keep_logarithms
from pyrovae.engine.stacked import Stacked
from pyrovae.engine.unwrap import inner_value, layers, point_mass, unwrapped

Site = dict[str, Any]  # a message of Pyro's
Sites = dict[str, Site]
Weight = float | Tensor
Plates = dict[tuple[str, int, int], CondIndepStackFrame]  # by name, dim and size

PARTICLE_PLATE = "_particles"


class ParticlePlate(IndepMessenger):
    """The outer plate of particles: broadcasts like ``pyro.plate``, without its subsample site."""

    def _process_message(self, msg: Message) -> None:
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

    def __init__(self, replay: Mapping[str, Tensor] | None = None, *, redraw: bool = False) -> None:
        super().__init__()
        self.replay, self.redraw = replay or {}, redraw
        self.sites: Sites = {}

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)
        shorten(error)

    def _pyro_sample(self, msg: Site) -> None:  # type: ignore[override]
        keep_logarithms(msg["fn"])
        if not self.redraw and not msg["is_observed"] and msg["name"] in self.replay:
            msg["value"], msg["done"] = self.replay[msg["name"]], True

    def _pyro_post_sample(self, msg: Site) -> None:  # type: ignore[override]
        name = msg["name"]
        if name in self.sites:
            raise ValueError(f'a program has two sample sites named "{name}": names must be unique; rename one of them')
        if self.redraw and not msg["is_observed"] and name in self.replay:
            msg["value"] = self.replay[name]
        self.sites[name] = msg.copy()


def record(
    program: Program, args: Batch, kwargs: Mapping[str, object], values: Mapping[str, Tensor] | None = None
) -> Sites:
    """Run a program once, on these values of latent sites where they are given; its sites."""
    with beside(args, kwargs), Record(values) as run:
        try:
            program(*args, **kwargs)
        except TypeError:
            refuse_call(program, args, kwargs)
            raise
    if odd := [name for name, s in run.sites.items() if counts(s) and not isinstance(s["value"], Tensor)]:
        raise TypeError(f"the values of sites {quoted(odd)} are no tensors: convert them by torch.as_tensor")
    return run.sites


def drawn(sites: Sites) -> dict[str, Tensor]:
    """What a run drew, by site, subsamples included: for another run to replay."""
    return {n: site["value"] for n, site in sites.items() if not site["is_observed"] and not untraced(site)}


def record_pair(model: Program, guide: Program, args: Batch, kwargs: Mapping[str, object]) -> tuple[Sites, Sites]:
    """Run the guide, then the model on its samples, once and as they are; the sites of both."""
    proposed = record(guide, args, kwargs)
    return proposed, record(model, args, kwargs, drawn(proposed))


def attached(value: Tensor) -> dict[str, Tensor]:
    """The tensors that a value carries besides its numbers: the soft draw behind one that was made hard."""
    return {name: tensor for name, tensor in vars(value).items() if isinstance(tensor, Tensor)}


def duplicate(value: Tensor, how: Callable[[Tensor], Tensor]) -> Tensor:
    """A copy of a value that carries copies of what the value carries."""
    new = how(value)
    for name, tensor in attached(value).items():
        setattr(new, name, duplicate(tensor, how))
    return new


def draws(site: Site) -> list[Tensor]:
    """The value of a site as the program had it, or the values in each run."""
    fn = site["fn"]
    return [v for v in fn.values if v is not None] if isinstance(fn, Stacked) else [site["value"]]


def counts(site: Site) -> bool:
    """Whether a site is a random variable or an observation (subsamples and deterministic sites are not)."""
    return not (type(site["fn"]).__name__ == "_Subsample" or site["infer"].get("_deterministic") or untraced(site))


def untraced(site: Site) -> bool:
    """Whether a draw is no site of its own: another one carries its value and weight, as with ``ConjugateReparam``."""
    return bool(site["infer"].get("_do_not_trace"))


def refuse_untraced(model: Sites, purpose: str) -> None:
    """Refuse a model that draws latents by what it observes, for a purpose that needs them from the prior."""
    if names := [name for name, site in model.items() if untraced(site)]:
        raise ValueError(
            f"the model draws {quoted(names)} from a distribution updated by its data, and so cannot {purpose}: "
            "pass the model without ConjugateReparam"
        )


def counted(sites: Sites) -> list[Site]:
    """The random variables and observations among ``sites``, in order."""
    return [site for site in sites.values() if counts(site)]


def latent(sites: Sites) -> Sites:
    """The sampled sites among ``sites``, without those that are summed out."""
    return {name: s for name, s in sites.items() if counts(s) and not (s["is_observed"] or s.get("summed"))}


def observed(sites: Sites) -> Sites:
    """The observed sites among ``sites``, factors included."""
    return {name: site for name, site in sites.items() if counts(site) and site["is_observed"]}


def carriers(sites: Sites) -> Sites:
    """The observed point masses: latents in another form, with the density that a reparameterisation left to them."""
    return {name: site for name, site in observed(sites).items() if isinstance(point_mass(site["fn"]), Delta)}


def proposed(guide: Sites, model: Sites) -> Sites:
    """The sites that are a guide's own: what it draws, and its factors.

    A guide made by effects runs its model, so that its run contains what the model observes.
    """
    return {
        name: site
        for name, site in guide.items()
        if counts(site) and (not site["is_observed"] or is_own_factor(site, model.get(name)))
    }


def is_own_factor(site: Site, of_model: Site | None) -> bool:
    """Whether an observed site of a guide is a factor which the model lacks, or says otherwise."""
    inner = unwrapped(site["fn"])
    return isinstance(inner, Unit) and (of_model is None or says_rsample(inner) != says_rsample(of_model["fn"]))


def says_rsample(fn: Distribution) -> bool:
    """Whether a factor says by itself if it arose from reparameterised draws."""
    return "has_rsample" in vars(unwrapped(fn))


def structure(*runs: Sites, folded: int = 1) -> tuple[object, ...]:
    """The sites of programs, the dims of their plates, and which sizes are equal: what a check of a run holds for.

    :param folded: the number of particles in the data plate.
    """
    sizes, found = {1: 1}, list[object]()
    for sites in runs:
        for name, site in sites.items():
            found += name, site["is_observed"]
            for f in site["cond_indep_stack"]:
                if f.dim is not None and f.name != PARTICLE_PLATE:
                    size = f.size // folded if f.dim == -1 else f.size
                    found += f.dim, sizes.setdefault(size, len(sizes) + 1)
    return tuple(found)


def log_prob(site: Site, value: Tensor | None = None, *, in_guide: bool = False) -> Tensor:
    """The unscaled log-probability of one site, masks counted as zero."""
    if value is None:
        whole = not site["is_observed"] or isinstance(site["fn"], Stacked | Marginal)
        value = site["value"] if whole else seen_value(site)
    if in_guide and isinstance(point_mass(site["fn"]), Delta):
        return masked(delta_density(site["fn"], value), site["mask"])
    return masked(site["fn"].log_prob(value, *site["args"], **site["kwargs"]), site["mask"])


def masks(site: Site) -> Iterator[tuple[Tensor, int]]:
    """The masks of a site, around it and inside its distribution, each with the dims of the events that it hides."""
    held = [
        (site["mask"], site["fn"]),
        *((f._mask, f) for f in layers(site["fn"]) if isinstance(f, MaskedDistribution)),
    ]
    for mask, fn in held:
        if mask is not None and mask is not True:
            yield torch.as_tensor(mask, device=site["value"].device), len(fn.event_shape)


def seen_value(site: Site) -> Tensor:
    """What a site observes, with harmless numbers where it is masked: what is missing must not reach gradients."""
    value, harmless = site["value"], None
    if any(isinstance(layer, TransformedDistribution) for layer in layers(site["fn"])):
        value = value.view_as(value)  # transforms keep what they computed for a tensor: of parameters that have moved
    for mask, hidden in masks(site):
        harmless = inner_value(site["fn"]) if harmless is None else harmless
        if harmless is not None and value.is_floating_point():
            value = torch.where(mask[(..., *[None] * hidden)], value, harmless)
    return value


def delta_density(fn: TorchDistribution, value: Tensor) -> Tensor:
    """The density of a guide's Delta as it stands: its value is its own, no equality is tested."""
    if isinstance(fn, Delta):
        return fn.log_density
    if isinstance(fn, Stacked):
        return fn.each(delta_density, value)
    if isinstance(fn, Independent):
        return sum_rightmost(delta_density(fn.base_dist, value), fn.reinterpreted_batch_ndims)
    return fn.log_prob(value)


def masked(lp: Tensor, mask: Tensor | bool | None) -> Tensor:
    """``lp`` with zeros where a poutine.mask says so."""
    if mask is None or mask is True:
        return lp
    return torch.zeros_like(lp) if mask is False else torch.where(mask, lp, 0.0)


def frames(site: Site) -> Plates:
    """The vectorised plates around a site, by name, dim and size; ours for particles aside."""
    return {
        (f.name, f.dim, f.size): f for f in site["cond_indep_stack"] if f.dim is not None and f.name != PARTICLE_PLATE
    }


def depth(*runs: Sites) -> int:
    """The number of dimensions that the plates around sites take."""
    stacks = [site["cond_indep_stack"] for sites in runs for site in sites.values()]
    return max((-f.dim for stack in stacks for f in stack if f.dim is not None), default=0)


def oversampling(frame: CondIndepStackFrame) -> float:
    """full_size / size of a plate, 1 where it is not subsampled."""
    return 1.0 if frame.full_size is None or frame.full_size < 0 else frame.full_size / frame.size


def same(a: Weight, b: Weight) -> bool:
    """Whether two scales (numbers or tensors) are equal."""
    if a is b:
        return True
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return bool(torch.equal(*(t.cpu() for t in torch.broadcast_tensors(torch.as_tensor(a), torch.as_tensor(b)))))
    return math.isclose(a, b, rel_tol=1e-9)


def quoted(names: Iterable[str]) -> str:
    """Site names for a message."""
    return ", ".join(f'"{n}"' for n in names) or "none"
