"""Plates that subsample, taken whole: an evaluation is of all of a datum, and of all data where they share latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Tensor

from pyrovae.engine.probe import Look, look
from pyrovae.engine.programs import Batch, Program, nothing, rows
from pyrovae.engine.sites import counted, observed, oversampling


class Whole:
    """Inside, plates that subsample at random take their whole range, once :meth:`look` has found which of them do.

    The plate of the data, around every site and as long as the batch, stays as it is: its rows are those given.
    """

    def __init__(self) -> None:
        self.drawn: dict[str, int] = {}  # the size of every plate that subsamples at random
        self.taken: set[str] = set()
        self.looked = False

    def __enter__(self) -> Self:
        self.original = SubsampleMessenger._subsample
        SubsampleMessenger._subsample = staticmethod(self.subsample)  # type: ignore[assignment, method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        SubsampleMessenger._subsample = staticmethod(self.original)  # type: ignore[method-assign]

    def subsample(
        self, name: str, size: int | None = None, part: int | None = None, subsample: Tensor | None = None, *rest: Any
    ) -> tuple[int, int, Tensor | None]:
        """Pyro's choice of a plate's sizes and indices, without chance."""
        if self.looked and subsample is None and size is not None and part is not None and part < size:
            self.drawn[name] = part
            if name in self.taken:
                part = size
            else:
                subsample = torch.arange(part, device=rest[-1] if rest else None)
        return self.original(name, size, part, subsample, *rest)

    def look(
        self,
        model: Program,
        guide: Program | None,
        batch: Batch,
        kwargs: Mapping[str, object],
        *,
        validate: bool = True,
    ) -> Look:
        """A look at a pair, or at one program alone, with every plate taken whole that can be.

        :param validate: as for :func:`pyrovae.engine.probe.look`.
        :raises ValueError: for a random subsample of a plate, by name, whose indices the program does not follow.
        """
        guide = nothing if guide is None else guide
        self.drawn, self.taken, self.looked = {}, set(), True
        seen = look(model, guide, batch, kwargs, validate=validate)
        own = [f for f in seen.layout.plates.values() if f.size == rows(batch, kwargs)]
        given = any(oversampling(f) == 1 for f in own)
        self.taken = self.drawn.keys() - (set() if given else {f.name for f in own})
        if self.taken:
            try:
                seen = look(model, guide, batch, kwargs, validate=validate)
                check_followed(seen, self.taken)
            except (RuntimeError, ValueError, IndexError) as error:
                sizes = ", ".join(f'"{name}" ({self.drawn[name]} at a time)' for name in sorted(self.taken))
                raise ValueError(
                    f"an evaluation needs the whole of plate {sizes}, which subsamples at random, and the data given "
                    f"do not follow its indices ({' '.join(str(error).split())}): pass all of them and index them by "
                    "the plate, x[index], or evaluate with the full plate"
                ) from error
        return seen


def check_followed(seen: Look, plates: set[str]) -> None:
    """Every observation in these plates must be as long as they are."""
    for name, site in observed(seen.model).items():
        for frame in site["cond_indep_stack"]:
            if frame.name in plates and frame.dim is not None:
                axis, value = frame.dim - site["fn"].event_dim, site["value"]
                if value.dim() >= -axis and value.shape[axis] != frame.size:
                    raise ValueError(f'site "{name}" observes {value.shape[axis]} of {frame.size}')


def refuse_part(seen: Look) -> None:
    """Refuse log p(x) of a part: of a plate with a given subsample that some site is outside of."""
    shared = [(f.dim, f.size) for f in seen.layout.plates.values()]
    for site in (*counted(seen.guide), *counted(seen.model)):
        for f in site["cond_indep_stack"]:
            if oversampling(f) != 1 and (f.dim, f.size) not in shared:
                raise ValueError(
                    f"log p(x) needs the whole of every datum, and of all data that share latents, but plate "
                    f'"{f.name}" is subsampled ({f.size} of {f.full_size}), and not every site lies in it: '
                    "evaluate with the full plate"
                )
