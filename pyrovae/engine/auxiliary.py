"""Draws of a guide that its model lacks: what its Deltas are computed from, or noise, which leaves log w as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import pyro
import torch
from pyro.distributions import Delta
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

from pyrovae.engine.devices import beside
from pyrovae.engine.programs import Batch, Program, protected_buffers
from pyrovae.engine.randomness import isolated_rng
from pyrovae.engine.sites import Record, Site, Sites, counts, drawn, latent, quoted
from pyrovae.engine.unwrap import point_mass


class Origins(Messenger):
    """Mark every draw by its name, so that each tensor says which draws it was computed from without others between.

    A Delta at one of ``own``, the draws that the model lacks, lets through what it was computed from.
    """

    def __init__(self, own: Sites) -> None:
        super().__init__()
        self.own = own

    def _pyro_post_sample(self, msg: Site) -> None:  # type: ignore[override]
        if counts(msg) and not msg["is_observed"]:
            name, mass = msg["name"], point_mass(msg["fn"])
            through = get_provenance(parts_of(mass)) if name in self.own and isinstance(mass, Delta) else frozenset()
            msg["value"] = track_provenance(detach_provenance(msg["value"]), through | {name})


class Auxiliary(NamedTuple):
    """What a guide draws that its model lacks.

    :ivar noise: the names of draws that no Delta is computed from.
    :ivar lacking: the Deltas that are computed from fewer random numbers, in all, than they have: they have no density.
    """

    noise: frozenset[str] = frozenset()
    lacking: tuple[str, ...] = ()


def auxiliary_of(guide: Program, args: Batch, kwargs: Mapping[str, object], run: Sites, model: Sites) -> Auxiliary:
    """What this run of the guide has drawn that the model lacks.

    :raises ValueError: where Deltas are computed from more random numbers than they have.
    """
    wanted = latent(model)
    own = {name: site for name, site in latent(run).items() if name not in wanted}
    if not own:
        return Auxiliary()
    with (
        torch.no_grad(), pyro.validation_enabled(False), isolated_rng(), protected_buffers(guide),
        beside(args, kwargs), Origins(own), Record(drawn(run)) as record,
    ):  # fmt: skip
        guide(*args, **kwargs)
    origins = {}
    for name, site in latent(record.sites).items():
        if name in wanted and isinstance(mass := point_mass(site["fn"]), Delta):
            origins[name] = get_provenance(parts_of(mass)) & own.keys()
    read = frozenset().union(*origins.values())
    random = {name for name in read if not isinstance(point_mass(own[name]["fn"]), Delta)}
    moved = {name: free_size(wanted[name]) for name, found in origins.items() if found & random}
    size, free = sum(own[name]["value"].numel() for name in random), sum(moved.values())
    if size > free:
        raise ValueError(
            f"guide sites {quoted(moved)} are Deltas of {free} free numbers in all, computed from "
            f"{quoted(sorted(random))}, which draw {size}: the density of these is then not that of the Deltas; draw "
            "what else is random at another site"
        )
    return Auxiliary(frozenset(own) - read, tuple(moved) if size < free else ())


def parts_of(mass: Delta) -> list[Tensor]:
    """What a Delta is made of."""
    return [mass.v, mass.log_density]


def free_size(site: Site) -> int:
    """How many numbers a value of a latent site has in unconstrained space; a discrete one has as many as it has."""
    value = site["value"]
    try:
        return biject_to(site["fn"].support).inverse_shape(value.shape).numel()
    except NotImplementedError:
        return value.numel()
