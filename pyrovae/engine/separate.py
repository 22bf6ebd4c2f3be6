"""Particles that run one after the other, for programs that take no more than one at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from pyrovae.engine.sites import PARTICLE_PLATE, Site, Sites, counts, depth, frames, same
from pyrovae.engine.stacked import Stacked, stack


class Deeper(ValueError):
    """Plates take more dimensions than were known."""

    def __init__(self, nesting: int) -> None:
        super().__init__(f"plates take {nesting} dimensions")
        self.nesting = nesting


def joined(runs: Sequence[Sites], nesting: int) -> Sites:
    """The sites of one program's runs as those of one run; a run may lack sites of another.

    :raises Deeper: where plates reach beyond ``nesting``.
    """
    if (deepest := depth(*runs)) > nesting:
        raise Deeper(deepest)
    names = dict.fromkeys(name for sites in runs for name in sites)
    return {name: joined_site([sites.get(name) for sites in runs], nesting) for name in names}


def joined_site(parts: Sequence[Site | None], nesting: int) -> Site:
    """One site of several runs."""
    present = [site for site in parts if site is not None]
    first = present[0]
    if not counts(first) or first.get("summed"):
        values = None if first["is_observed"] else [None if site is None else site["value"] for site in parts]
        return {**first, "parts": values}
    for site in present:
        alike = site["value"].shape == first["value"].shape and frames(site).keys() == frames(first).keys()
        if not (alike and site["is_observed"] == first["is_observed"] and same(site["scale"], first["scale"])):
            raise ValueError(
                f'site "{first["name"]}" has another shape, plate, scale or observation in another particle: give it '
                "one of each, or another name where it differs"
            )
    values = [None if site is None else site["value"] for site in parts]
    fn = Stacked([None if site is None else site["fn"] for site in parts], values, nesting)
    frame = CondIndepStackFrame(PARTICLE_PLATE, -1 - nesting, len(parts), 0)
    return {
        **first, "fn": fn, "value": fn.value, "args": (), "kwargs": {},
        "mask": joined_mask(parts, nesting), "cond_indep_stack": (*first["cond_indep_stack"], frame),
    }  # fmt: skip


def joined_mask(parts: Sequence[Site | None], nesting: int) -> Tensor | None:
    """The masks of a site in several runs; None where nothing is masked."""
    if all(site is None or site["mask"] is None or site["mask"] is True for site in parts):
        return None
    masks = [
        None if site is None else torch.as_tensor(site["mask"] is None or site["mask"]).expand(site["fn"].batch_shape)
        for site in parts
    ]
    return stack(masks, nesting)


def values_of(sites: Sites, values: dict[str, Tensor], run: int) -> dict[str, Tensor]:
    """The values of one run among those of joined sites."""
    found = {}
    for name, value in values.items():
        fn = sites[name]["fn"]
        own = fn.split(value)[run] if isinstance(fn, Stacked) else sites[name]["parts"][run]
        if own is not None:
            found[name] = own
    return found
