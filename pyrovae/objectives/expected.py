"""Guide sites marked for enumeration: their expectation, exactly, where the bound is linear."""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import torch
from pyro.distributions import Delta
from pyro.infer.traceenum_elbo import TraceEnum_ELBO, _compute_dice_elbo
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrovae.engine.devices import beside
from pyrovae.engine.enumerate import is_enumerated, refuse_short_memory
from pyrovae.engine.particles import is_number
from pyrovae.engine.programs import Batch, Program
from pyrovae.engine.sites import Site, Weight
from pyrovae.engine.unwrap import point_mass


class Weigh(Messenger):
    """Scales latents, and what carries a part of their density, by one weight, and the likelihood by another."""

    def __init__(self, latents: Weight, likelihood: Weight) -> None:
        super().__init__()
        self.latents, self.likelihood = latents, likelihood

    def _pyro_sample(self, msg: Site) -> None:  # type: ignore[override]
        of_data = msg["is_observed"] and not isinstance(point_mass(msg["fn"]), Delta)
        msg["scale"] = msg["scale"] * (self.likelihood if of_data else self.latents)


def expected_loss(
    model: Program,
    guide: Program,
    args: Batch,
    kwargs: Mapping[str, object],
    num_particles: int,
    nesting: int,
    *,
    kl_weight: Weight,
    likelihood_weight: Weight,
    vectorize: bool,
) -> Tensor:
    """Minus the ELBO summed over data, by Pyro: what the guide marks is summed over, the rest drawn."""
    if not (is_number(kl_weight, 1) and is_number(likelihood_weight, 1)):
        model = Weigh(kl_weight, likelihood_weight)(model)
        guide = Weigh(kl_weight, kl_weight)(guide)
    theirs = TraceEnum_ELBO(num_particles, nesting, vectorize_particles=vectorize)
    with pyro.validation_enabled(False), beside(args, kwargs):
        traces = theirs._get_traces(model, guide, args, kwargs)
        bounds = []
        for pair in traces:
            for site in (site for trace in pair for site in trace.nodes.values() if site["type"] == "sample"):
                if is_enumerated(site):
                    refuse_short_memory(site)
            bounds.append(torch.as_tensor(_compute_dice_elbo(*pair)))
    return -torch.stack(bounds).sum() / num_particles
