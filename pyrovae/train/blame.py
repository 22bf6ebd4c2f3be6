"""Why a step is withheld: a run on its data shows it, or the gradients do."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from pyrovae.engine.blame import Cause, at_fault, nan_in
from pyrovae.engine.probe import PairState, look
from pyrovae.engine.programs import Batch, Program
from pyrovae.engine.randomness import isolated_rng

TRIES = 20  # runs in which what happens by chance is looked for again


class Moment(NamedTuple):
    """A step of a training, counted from 1, and the data it was given, with their numbers where those are known."""

    epoch: int
    step: int
    batch: Batch
    numbers: Tensor | None


def cause_of(model: Program, guide: Program, state: PairState, moment: Moment, *, tries: int = TRIES) -> Cause | None:
    """NaN in the state of the pair, else in the data of the first site that is no number, else that site itself."""
    found = nan_in(state.tensors) or site_at_fault(model, guide, moment, tries=tries)
    infinite = (name for name, parameter in state.parameters.items() if parameter.isinf().any())
    return found or next((Cause(f'parameter "{name}" is inf', "state") for name in infinite), None)


def site_at_fault(
    model: Program, guide: Program, moment: Moment, *, dead: bool = False, tries: int = TRIES
) -> Cause | None:
    """As :func:`pyrovae.engine.blame.at_fault`, of a run on the data of a step, or of another such run."""
    for seed in range(tries):
        with isolated_rng(seed):
            seen = look(model, guide, moment.batch, validate=False)
        if found := at_fault(seen.guide, seen.model, moment.batch, moment.numbers, dead=dead):
            return found
    return None


def gradient_at_fault(state: PairState) -> Cause | None:
    """The first parameter whose gradient is not finite, and of how many others it is so."""
    gradients = {name: p.grad for name, p in state.parameters.items() if p.grad is not None}
    bad = {name: g[~g.isfinite()][0].item() for name, g in gradients.items() if not g.isfinite().all()}
    if not bad:
        norm = get_total_norm(list(gradients.values())).item() if gradients else 0.0
        return Cause("the norm of the gradient overflows", "gradient") if norm == torch.inf else None
    name, number = next(iter(bad.items()))
    more = f" (and in {len(bad) - 1} others)" if len(bad) > 1 else ""
    return Cause(f'the gradient in parameter "{name}"{more} is {number}', "gradient")
