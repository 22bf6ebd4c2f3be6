"""Latents that Hamiltonian Monte Carlo can move: continuous, and with a density of their own."""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import torch

from pyrovae.engine.observed import OTHER
from pyrovae.engine.probe import Look, check_pair
from pyrovae.engine.programs import Batch, Program, protected_buffers
from pyrovae.engine.randomness import isolated_rng
from pyrovae.engine.sites import (
    Site,
    Sites,
    attached,
    carriers,
    counted,
    latent,
    log_prob,
    masks,
    quoted,
    record,
    refuse_untraced,
)
from pyrovae.engine.unwrap import point_mass, unmasked


def refuse_immovable(
    seen: Look, model: Program, guide: Program | None, batch: Batch, kwargs: Mapping[str, object]
) -> None:
    """Refuse a model whose latents cannot all be moved, or not from where the guide starts.

    :raises ValueError: naming the site.
    """
    refuse_untraced(seen.model, "be annealed")
    sites, drawn = latent(seen.model), latent(seen.guide)
    if not sites:
        raise ValueError("the model has no latents to anneal: its log p(x) is exact, use pyrovae.log_likelihood")
    for name, site in sites.items():
        refuse_site(name, site)
    refuse_masked_in_use(seen, model, batch, kwargs)
    carried = [name for name, site in carriers(seen.model).items() if log_prob(site).any()]
    if carried and not guide:
        raise ValueError(
            f"point masses ({quoted(carried)}) carry part of the prior, so that it cannot be drawn from: "
            "pass guide= to start from, or the model without its reparameterisation"
        )
    if guide and (drawn.keys() != sites.keys() or any(point_mass(s["fn"]) is not None for s in drawn.values())):
        raise ValueError(
            f"to start from a guide it must draw {quoted(sites)} from densities, and nothing else; it has "
            f"{quoted(drawn)}: leave guide out to start from the prior"
        )
    if guide:
        check_pair(seen)


def refuse_site(name: str, site: Site) -> None:
    """Refuse a latent that is discrete, has no density, or scores something else than it gives."""
    if site["fn"].support.is_discrete:
        raise ValueError(
            f'latent site "{name}" is discrete, and HMC moves continuous ones only: mark it '
            'infer={"enumerate": "parallel"}, and it is summed out'
        )
    if attached(site["value"]):
        raise ValueError(
            f'latent site "{name}" ({type(site["fn"]).__name__}) gives one value and scores another, and HMC '
            "moves one: relax it without the straight-through step, or use pyrovae.log_likelihood"
        )
    if point_mass(site["fn"]) is not None or any(not mask.any() for mask, _ in masks(site)):
        raise ValueError(f'latent site "{name}" has no prior density: the model has no log p(x)')


def refuse_masked_in_use(seen: Look, model: Program, batch: Batch, kwargs: Mapping[str, object]) -> None:
    """Refuse latents that are masked for some of the data, where what is masked matters: it has no density."""
    sites = latent(seen.model)
    masked = {name: list(masks(site)) for name, site in sites.items() if any(masks(site))}
    if not masked:
        return

    def joint_at(own: dict[str, torch.Tensor]) -> torch.Tensor:
        with isolated_rng(OTHER):  # what is summed out is drawn alike where it is alike
            return sum_of(record(model, batch, kwargs, own))

    with torch.no_grad(), pyro.validation_enabled(False), isolated_rng(OTHER), protected_buffers(model):
        values, others = {name: site["value"] for name, site in sites.items()}, seen.again()
        swapped = dict(values)
        for name, held in masked.items():
            for mask, hidden in held:
                kept = mask[(..., *[None] * hidden)]
                swapped[name] = torch.where(kept, swapped[name], others[name]["value"])
        joint, other = joint_at(values), joint_at(swapped)
    if not torch.allclose(joint, other, rtol=1e-4):
        raise ValueError(
            f"latent sites {quoted(masked)} are masked, which leaves their masked values without a density, but the "
            "rest of the model hangs on those: mask what hangs on them as well, or the model has no log p(x)"
        )


def sum_of(sites: Sites) -> torch.Tensor:
    """The log-joint of a run."""
    return torch.stack([log_prob(site).sum() for site in counted(sites)]).sum()


def unmasked_latents(sites: Sites) -> Sites:
    """The sites of a run, its latents without masks: what is masked, and matters for nothing, has its own prior."""
    freed = {
        name: {**site, "mask": None, "fn": unmasked(site["fn"])}
        for name, site in latent(sites).items()
        if any(masks(site))
    }
    return sites | freed
