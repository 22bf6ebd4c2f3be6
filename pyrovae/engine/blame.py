"""What is no number in a run of a pair: the state of the pair, its data, or a site, and where it stands there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_leaves_with_path

from pyrovae.engine.programs import Batch, rows
from pyrovae.engine.sites import Site, Sites, counts, log_prob

SHOWN = 5  # rows that are named
ADVICE = {
    "data": "drop or mend these data, or observe them at a site whose distribution takes them",
    "state": "give the pair finite weights",
    "site": "check the parameters of its distribution, lower lr, or pass clip_norm",
    "gradient": "lower lr, or pass clip_norm",
}


class Cause(NamedTuple):
    """What is no number, and of what kind that is."""

    said: str
    kind: str


def nan_in(state: Mapping[str, Tensor]) -> Cause | None:
    """The first tensor of a pair's state that holds NaN."""
    for name, tensor in state.items():
        if tensor.isnan().any():
            return Cause(f'{"parameter" if tensor.requires_grad else "buffer"} "{name}" is nan', "state")
    return None


@torch.no_grad()
def at_fault(
    guide: Sites, model: Sites, batch: Batch, numbers: Tensor | None = None, *, dead: bool = False
) -> Cause | None:
    """The first site of a run that is no number; the data, where it is so for data that are not finite themselves.

    :param numbers: of the data, where known.
    :param dead: look for log-probabilities of -inf instead, which leave data without a bound.
    """
    for role, sites in (("guide", guide), ("model", model)):
        for name, site in sites.items():
            if counts(site) and (found := worth(site, dead, in_guide=role == "guide")) is not None:
                what, number, bad = found
                size = rows(batch, {})
                which = bad.reshape(-1, size).any(0) if bad.dim() and bad.shape[-1] == size else None
                if cause := data_at_fault(batch, size, which, numbers):
                    return cause
                where = "" if which is None else f" {in_words(which, numbers)}"
                return Cause(f'the {what} at {role} site "{name}" is {number}{where}', "site")
    return None


def worth(site: Site, dead: bool, *, in_guide: bool) -> tuple[str, float, Tensor] | None:
    """What is no number of a site, the first such, and where, ``[*plates]``."""
    found, what = log_prob(site, in_guide=in_guide), "log-probability"
    bad = found == -torch.inf if dead else found.isnan() | (found == torch.inf)
    if not (dead or site["is_observed"] or site["value"].isfinite().all()):
        found, what = site["value"], "draw"
        bad = ~found.isfinite()
    if not bad.any():
        return None
    event_dim = site["fn"].event_dim if what == "draw" else 0
    return what, found[bad][0].item(), bad.flatten(-event_dim).any(-1) if event_dim else bad


def data_at_fault(batch: Batch, size: int, which: Tensor | None, numbers: Tensor | None) -> Cause | None:
    """The argument that is not finite in some of the rows ``which``, if there is one."""
    for path, argument in tree_leaves_with_path(batch):
        if isinstance(argument, Tensor) and argument.is_floating_point() and argument.shape[:1] == (size,):
            bad = ~argument.isfinite()
            own = bad.reshape(size, -1).any(-1)
            if (own if which is None else own & which).any():
                name, first = keystr(path).replace("[", "", 1).replace("]", "", 1), argument[bad][0].item()
                return Cause(f"the data (argument {name}) are {first} {in_words(own, numbers)}", "data")
    return None


def in_words(which: Tensor, numbers: Tensor | None) -> str:
    """The data of a mask ``[B]``, in words."""
    found = which.nonzero().flatten()
    named = (found if numbers is None else numbers[found]).tolist()
    if len(named) == len(which) > 1:
        return "in all rows of the batch"
    more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
    of = "batch" if numbers is None else "data"
    return f"in row{'s' * (len(named) > 1)} {', '.join(map(str, named[:SHOWN]))}{more} of the {of}"
