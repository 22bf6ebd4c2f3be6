"""Posterior draws that an evaluation keeps of its particles, by their weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyrovae.engine.particles import Particles
from pyrovae.engine.probe import Look
from pyrovae.engine.randomness import isolated_rng
from pyrovae.engine.sites import Site, Sites, frames, latent, masks, quoted
from pyrovae.engine.stacked import Stacked

Draws = dict[str, Tensor]


class Way(NamedTuple):
    """How a latent lies: its event, the dims of its plates, whether it is summed out."""

    event_shape: torch.Size
    plates: frozenset[int]
    summed: bool

    @property
    def rank(self) -> int:
        """The dims of a value of one particle."""
        return len(self.event_shape) - min(self.plates, default=0)

    @classmethod
    def each(cls, sites: Sites) -> dict[str, Way]:
        """Of every latent of a model's run."""
        found = latent(sites) | {name: site for name, site in sites.items() if site.get("summed")}
        return {
            name: cls(site["fn"].event_shape, frozenset(dim for _, dim, _ in frames(site)), bool(site.get("summed")))
            for name, site in found.items()
        }


class Resampler:
    r"""Keeps ``num_draws`` posterior draws per datum: particle s with probability :math:`w_s / \sum_s w_s` each.

    A draw gives way to one of a new pass with the share that the pass has in the weights so far; so nothing is held but
    the draws. They have a generator of their own: what the guide draws does not depend on them. What is summed out is
    drawn in the end, from its exact conditional given each of the draws. Batches may have other sites, and others of
    another size, as series of other lengths have: the draws are padded.

    Rubin (1988), *Using the SIR algorithm to simulate posterior distributions*.
    """

    def __init__(self, num_draws: int, seed: int | None, seen: Look) -> None:
        self.num_draws, self.seed, self.nesting = num_draws, seed, seen.nesting
        self.layout = replace(seen.layout, num_particles=num_draws, particle_dim=-1 - seen.nesting)
        self.ways = Way.each(seen.model) if num_draws else {}  # of this batch
        self.known, self.kinds = dict(self.ways), dict[object, dict[str, Way]]()
        self.kind: object = None
        self.fresh = False  # whether no pass of this batch ran yet
        self.generator: torch.Generator | None = None
        self.done: list[tuple[Draws, int]] = []
        self.draws: Draws = {}
        self.log_sum: Tensor | None = None
        self.rows = 0

    @property
    def weighed(self) -> dict[str, int]:
        """The event dims of the latents that have weights: those that are not summed out."""
        return {name: len(way.event_shape) for name, way in self.ways.items() if not way.summed}

    def begin(self, kind: object) -> None:
        """Let a batch of a kind begin: those of one kind may run through one graph, where no pass shows its sites."""
        self.kind, self.fresh, self.ways = kind, True, self.kinds.get(kind, self.ways)

    def values(self, run: Particles) -> list[Tensor]:
        """The model's latents of one pass, each ``[K, *[size or 1] * nesting, *event]``."""
        if not self.num_draws:
            return []
        if uneven := self.uneven(run):
            raise ValueError(
                f"num_draws keeps sites that all particles of a batch have, in the same plates, but {quoted(uneven)} "
                "come and go, or change plates or shapes: pass num_draws=0, or data of one kind at a time"
            )
        found, number = [], run.layout.num_particles
        for name, event_dim in self.weighed.items():
            value = counted(run.model[name], run.guide.get(name))
            missing = [1] * (1 + self.nesting + event_dim - value.dim())
            if run.layout.folded:
                value = value.unflatten(-1 - event_dim, (number, -1)).movedim(-2 - event_dim, 0)
                found.append(value.reshape(number, *missing[1:], *value.shape[1:]))
            else:
                value = value.reshape(*missing, *value.shape)
                found.append(value.expand(number, *value.shape[1:]))
        return found

    def uneven(self, run: Particles) -> list[str]:
        """The latents that not every particle of a batch has in one way, or that lie in other plates than before."""
        now = Way.each(run.model)
        partly = [n for n in now if isinstance(run.model[n]["fn"], Stacked) and None in run.model[n]["fn"].parts]
        if self.fresh:
            self.fresh, self.ways, self.kinds[self.kind] = False, now, now
            self.known = now | self.known
        other = [n for n in {**now, **self.ways} if now.get(n) != self.ways.get(n)]
        moved = [n for n, way in now.items() if way.plates != (then := self.known[n]).plates or way.rank != then.rank]
        return [*dict.fromkeys([*partly, *other, *moved])]

    def add(self, log_w: Tensor, values: list[Tensor]) -> None:
        """Let a pass in: its log-weights ``[K, *plates]``, and its :meth:`values`."""
        if not self.num_draws:
            return
        log_w, self.rows = log_w.double(), log_w.shape[-1]
        if self.generator is None:
            with isolated_rng():
                seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed + 1  # not the guide's noise
            self.generator = torch.Generator(log_w.device).manual_seed(seed)
        total = torch.logsumexp(log_w, 0)
        shares = (log_w - total).exp().nan_to_num(1.0)  # all alike where every weight is 0
        by_datum = shares.reshape(len(shares), -1).T
        chosen = torch.multinomial(by_datum, self.num_draws, replacement=True, generator=self.generator)
        self.log_sum = total if self.log_sum is None else torch.logaddexp(self.log_sum, total)
        share = (total - self.log_sum).exp().nan_to_num(1.0).expand(self.num_draws, *total.shape)
        taken = torch.bernoulli(share, generator=self.generator) == 1
        index = chosen.T.reshape(share.shape)
        for (name, event_dim), value in zip(self.weighed.items(), values, strict=True):
            at = self.layout.spread(index, event_dim).expand(self.num_draws, *value.shape[1:])
            fresh = value.gather(0, at)
            self.draws[name] = torch.where(self.layout.spread(taken, event_dim), fresh, self.draws.get(name, fresh))

    def finish(self, draw_summed: Callable[[Draws], Draws] = dict) -> None:
        """Let a batch end; ``draw_summed`` draws what is summed out, given the draws of all else."""
        if any(way.summed for way in self.ways.values()) and self.generator is not None:
            with isolated_rng(int(torch.randint(2**62, (), generator=self.generator, device=self.generator.device))):
                self.draws |= draw_summed(self.draws)
        self.done.append((self.draws, self.rows))
        self.draws, self.log_sum = {}, None

    def results(self) -> Draws:
        """The draws of all batches, ``[num_draws, B, *other plates of the site, *event]``; no B for joint weights.

        NaN (-1 for integers) stands where a datum has no such site, or fewer of it.
        """
        found, data = {}, self.layout.dims[-1:]
        for name, way in self.known.items():
            kept, event_dim = sorted(way.plates.union(data)), len(way.event_shape)
            absent = tuple(dim - event_dim for dim in range(-self.nesting, 0) if dim not in kept)  # of size 1
            parts = [(draws[name].squeeze(absent) if name in draws else None, rows) for draws, rows in self.done]
            if data:
                at = 1 + kept.index(data[0])
                parts = [(None if part is None else part.movedim(at, 1), rows) for part, rows in parts]
            found[name] = joined(parts) if data else next(part for part, _ in parts if part is not None)
        return found


def joined(parts: list[tuple[Tensor | None, int]]) -> Tensor:
    """Draws ``[S, B, ...]`` of batches of so many data, along the data, padded where they are smaller or lacking."""
    known = [part for part, _ in parts if part is not None]
    shape = [max(sizes) for sizes in zip(*(part.shape[2:] for part in known), strict=True)]
    whole = known[0].new_full((len(known[0]), sum(rows for _, rows in parts), *shape), blank_of(known[0]))
    for (part, _), place in zip(parts, whole.split([rows for _, rows in parts], 1), strict=True):
        if part is not None:
            for dim, size in enumerate(part.shape[2:], 2):
                place = place.narrow(dim, 0, size)
            place.copy_(part)
    return whole


def blank_of(value: Tensor) -> float:
    """What stands for no draw."""
    return math.nan if value.is_floating_point() else -1


def unblanked(draw: Tensor) -> Tensor:
    """A draw with one of its own numbers where it is blank; nothing hangs on those but what is masked as well."""
    blank = draw.isnan()
    return torch.where(blank, draw[~blank][0], draw) if blank.any() and not blank.all() else draw


def counted(model: Site, guide: Site | None) -> Tensor:
    """A latent's value, blank where masks leave it out of model and guide, as the steps beyond a length."""
    value, blank = model["value"], None
    for site in (model, guide or model):
        left_out = None
        for mask, hidden in masks(site):
            here = ~mask[(..., *[None] * hidden)]
            left_out = here if left_out is None else left_out | here
        if left_out is None:
            return value
        blank = left_out if blank is None else blank & left_out
    assert blank is not None
    return torch.where(blank, blank_of(value), value)
