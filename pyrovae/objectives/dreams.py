"""What a model dreams: data drawn with their latents, in the place of those that are given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import NamedTuple, TypeVar

import torch
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import biject_to
from torch.utils._pytree import tree_map_only

from pyrovae.engine.generate import Redraw, Written, dreamt
from pyrovae.engine.places import storage
from pyrovae.engine.programs import Batch, leaves
from pyrovae.engine.randomness import isolated_rng
from pyrovae.engine.runner import Runner
from pyrovae.engine.sites import Sites, latent, oversampling, quoted
from pyrovae.engine.unwrap import point_mass

T = TypeVar("T")


class Dream(NamedTuple):
    """What a model has dreamt: its sites, the names of those that drew data, and the arguments that hold them."""

    sites: Sites
    drawn: Set[str]
    args: Batch
    kwargs: Mapping[str, object]


def dreamt_data(runner: Runner, args: Batch, kwargs: Mapping[str, object]) -> Dream:
    """A dream of the data: by one site that observes all of an argument, or by several that observe parts of them."""
    tied = [name for name, dreams in runner.dreams.items() if dreams]
    given = args, dict(kwargs)
    held = {id(t): t for t in leaves(given) if isinstance(t, Tensor)}
    x = args[0] if args and isinstance(args[0], Tensor) else torch.empty(0)
    with torch.no_grad():
        if runner.dreams_whole is None:
            with isolated_rng():  # the first step draws no more than others
                sites = dreamt(runner.model, *given, redraw := Redraw(x, others=tied))
            runner.dreams_whole = bool(whole(sites, redraw.names, held.values()))
        if runner.dreams_whole:
            sites = dreamt(runner.model, *given, redraw := Redraw(x, others=tied))
            new = whole(sites, redraw.names, held.values())
            runner.dreams_whole = bool(new)
        if not runner.dreams_whole:
            new = {at: t.clone() for at, t in held.items()}
            redraw = Written(new.get(id(x), x), others=tied, also=new.values())
            sites = dreamt(runner.model, *replaced(given, new), redraw)
            check_places(sites, redraw)
            changed = {id(redraw.within.root(place)) for place, *_ in redraw.places.values()}
            new = {at: t for at, t in new.items() if id(t) in changed}
    return Dream(sites, redraw.names.keys(), *replaced(given, new))


def replaced(given: T, new: Mapping[int, Tensor]) -> T:
    """Arguments with other tensors in the place of some, known by their identity."""
    return tree_map_only(Tensor, lambda t: new.get(id(t), t), given)


def whole(sites: Sites, names: Mapping[str, Tensor], held: Iterable[Tensor]) -> dict[int, Tensor]:
    """What one site has drawn of a tensor, all of which it would observe; nothing where that is not how it is."""
    (name, seen), *others = names.items() or [("", torch.empty(0))]
    for t in () if others else held:
        all_of_it = storage(seen) == storage(t) and seen.numel() == t.numel()
        in_order = seen.is_contiguous() and t.is_contiguous()
        if all_of_it and in_order and (value := sites[name]["value"]).shape == seen.shape:
            return {id(t): value.reshape(t.shape)}
    return {}


def check_places(sites: Sites, dream: Written) -> None:
    """Refuse dreams of what is no part of the arguments, and of a part of each datum that a plate has taken."""
    if not dream.names:
        raise ValueError("SleepPhi dreams what a model observes of latents, but this one observes nothing of them")
    if nowhere := dream.names.keys() - dream.places.keys():
        raise ValueError(
            f"SleepPhi dreams arguments of the programs, but sites {quoted(sorted(nowhere))} depend on latents and "
            "observe no part of those, or draw another shape: pass what they observe as an argument, or part of one"
        )
    for name, (place, *_) in dream.places.items():
        root, value = dream.within.root(place), sites[name]["value"]
        for frame in sites[name]["cond_indep_stack"]:
            first = frame.dim is None or value.dim() - sites[name]["fn"].event_dim + frame.dim == 0
            if oversampling(frame) != 1 and not (
                first and root is not None and len(root) in (frame.size, frame.full_size)
            ):
                raise ValueError(
                    f'SleepPhi dreams whole data, but plate "{frame.name}" of site "{name}" takes {frame.size} of '
                    f"{frame.full_size} within a datum: pass the whole of them"
                )


def sources(guide: Sites, model: Sites) -> dict[str, Tensor]:
    """What a guide's Deltas are computed from, by site, if the model has drawn their values, as autoguides do it.

    That is the unconstrained values, put together, of the Deltas that follow the site in the guide.
    """
    wanted, parts = latent(model), dict[str, list[Tensor]]()
    for name, site in latent(guide).items():
        is_delta = isinstance(point_mass(site["fn"]), Delta)
        if name not in wanted and not is_delta:
            parts[name] = []
        elif name in wanted and is_delta and parts:
            transform, value = biject_to(wanted[name]["fn"].support), wanted[name]["value"]
            parts[next(reversed(parts))].append(transform.inv(value).flatten())
    joined = {name: torch.cat(values) for name, values in parts.items() if values}
    shapes = {name: guide[name]["value"].shape for name in joined}
    return {name: u.reshape(shapes[name]) for name, u in joined.items() if u.numel() == shapes[name].numel()}
