"""Every datum against the sites that observe it: a run of a pair says what those are, and what they can observe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.distributions import Beta, Categorical, Dirichlet, Distribution, Gamma, Multinomial, constraints
from torch.distributions.constraints import Constraint

from pyrovae.engine.programs import Batch, Program, leaves, protected_buffers
from pyrovae.engine.randomness import isolated_rng
from pyrovae.engine.sites import Site, Sites, log_prob, masks, observed, record_pair
from pyrovae.engine.support import BOUNDS, Shares, Within, all_inside, inside, refusal
from pyrovae.engine.unwrap import is_discrete, plain, point_mass, unvalidated, unwrapped
from pyrovae.errors import DataError

OPEN: dict[type[Distribution], tuple[tuple[str, ...], Constraint]] = {
    Gamma: (("concentration",), constraints.positive),
    Beta: (("concentration1", "concentration0"), Within(0.0, 1.0)),
    Dirichlet: (("concentration",), Shares()),
}
OTHER = 52_018  # seed of a run on other latents


def data_sites(model: Sites) -> Sites:
    """The sites of a model's run that observe data: neither factors nor point masses."""
    return {n: s for n, s in observed(model).items() if point_mass(s["fn"]) is None and s["value"].numel()}


def support_of(fn: Distribution) -> Constraint | None:
    """The constraint of single values, or of the smallest events; None where it depends on what is not known."""
    if has_any_total(unwrapped(fn)):
        return constraints.nonnegative_integer
    try:
        support = plain(fn.support)  # type: ignore[arg-type]
    except NotImplementedError:
        return None
    return None if constraints.is_dependent(support) else without_ends(unwrapped(fn), support)


def without_ends(fn: Distribution, support: Constraint) -> Constraint:
    """A support without its ends, where with other concentrations than 1 the density is 0 or infinite."""
    for family, (names, inner) in OPEN.items():
        if isinstance(fn, family) and any((getattr(fn, name) != 1).any() for name in names):
            return inner
    return support


def bounds(fn: Distribution) -> list[Tensor]:
    """The bounds of a support that are tensors, and so may vary between data or depend on latents."""
    found = (getattr(support_of(fn), name, None) for name in BOUNDS)
    return [bound for bound in found if isinstance(bound, Tensor)]


def check_observed(model: Sites, first: int = 0, again: Callable[[], Sites] | None = None) -> None:
    """Refuse what the sites of a model's run observe outside of their support, unless it is masked or missing.

    :param first: the number of the first datum, for the message.
    :param again: runs the model once more: bounds that differ then depend on latents, and say nothing of data.
    :raises DataError: naming the site, the first index, the value there and the fix.
    """
    for name, site in data_sites(model).items():
        fn, value = site["fn"], site["value"].detach()
        refuse_misread(name, fn, value)
        bad = outside(site)
        if not bad.any():
            continue
        if again is not None and (limits := bounds(fn)):
            other = bounds(again()[name]["fn"])
            if not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(limits, other, strict=True)):
                continue
        at = np.unravel_index(int(bad.to(torch.uint8).argmax()), bad.shape)
        raise refusal(value, tuple(map(int, at)), support_of(fn), name, first=first)


def outside(site: Site) -> Tensor:
    """Where a site observes what it cannot, of the shape of its value, or of what is left of it in front of events."""
    fn, value = site["fn"], site["value"].detach()
    bad = ~inside(value, support_of(fn))
    if not bad.any():
        return bad
    inside_events = value.dim() - bad.dim()
    for mask, hidden in masks(site):
        if mask.dim():  # a site that never counts still says what its values may be, such as labels
            bad = bad & mask[(..., *[None] * (hidden - inside_events))]
    missing = torch.isnan(value) if value.is_floating_point() and not is_discrete(fn) else None
    if missing is not None and missing.any():
        known = scored(site).isfinite()  # a density that does not depend on it, as NanMaskedNormal's
        missing = missing if missing.dim() == bad.dim() else missing.flatten(bad.dim()).any(-1)
        bad = bad & ~(missing & known[(..., *[None] * (bad.dim() - known.dim()))])
    return bad


def scored(site: Site) -> Tensor:
    """The log-probability of a site as it is without Pyro's checks of values."""
    with torch.no_grad(), pyro.validation_enabled(False):
        return log_prob({**site, "fn": unvalidated(site["fn"])})


def excused(site: Site) -> Site:
    """A site without Pyro's checks, where it observes what only those refuse: values that are masked or missing."""
    if site["name"] not in data_sites({site["name"]: site}) or all_inside(site["value"], support_of(site["fn"])):
        return site
    return {**site, "fn": unvalidated(site["fn"])}


def refuse_misread(name: str, fn: Distribution, value: Tensor) -> None:
    """Refuse one-hot rows where a site observes labels, and more trials than a Multinomial has."""
    inner = unwrapped(fn)
    if isinstance(inner, Categorical) and value.dim() > len(inner.batch_shape):
        shapes = f"{list(value.shape)}, but takes one label per draw, {list(inner.batch_shape)}"
        raise DataError(
            f'site "{name}" (Categorical) observes {shapes}: pass labels, as of one-hot rows y.argmax(-1), or observe '
            "them with OneHotCategorical"
        )
    if not isinstance(inner, Multinomial) or has_any_total(inner):
        return
    if (totals := value.sum(-1)).max() > inner.total_count:
        raise DataError(
            f'data of site "{name}" sum to as much as {totals.max():g}, but its Multinomial has '
            f"total_count={inner.total_count}: pass one that no datum exceeds (each counts with its own sum), or leave "
            "it out, with validate_args=False, for data of any sum"
        )


def has_any_total(fn: Distribution) -> bool:
    """Whether a Multinomial was left its default of one trial, and is not validated: then each row has its own sum."""
    return isinstance(fn, Multinomial) and fn.total_count == 1 and vars(fn).get("_validate_args") is False


@dataclass(frozen=True)
class Column:
    """What a site observes, where that is an argument, or held by one, or a view of it.

    :ivar position: of the tensor among those that the arguments are or hold, which had ``rows`` rows, ``stride`` apart.
    :ivar view: size, strides and offset of the value in it.
    :ivar skips_nan: whether NaN counts as missing everywhere.
    """

    position: int
    rows: int
    stride: int
    view: tuple[list[int], list[int], int]
    support: Constraint | None
    skips_nan: bool

    @classmethod
    def of(cls, site: Site, batch: Batch) -> Column | None:
        """None for values that a program computes, and supports that may differ between data."""
        value, fn = site["value"], site["fn"]
        for position, own in enumerate(leaves(batch)):
            if not (isinstance(own, Tensor) and own.dim() and own.is_contiguous() and own.dtype == value.dtype):
                continue
            if own.untyped_storage().data_ptr() == value.untyped_storage().data_ptr() and not bounds(fn):
                view = list(value.shape), list(value.stride()), value.storage_offset() - own.storage_offset()
                return cls(position, len(own), own.stride(0), view, support_of(fn), skips_nan(site))
        return None

    def values(self, batch: Batch) -> Tensor:
        """What the site observes of a batch, of whatever length."""
        own = cast(Tensor, leaves(batch)[self.position]).detach().contiguous()
        size, strides, offset = self.view
        long = [len(own) if (n, s) == (self.rows, self.stride) else n for n, s in zip(size, strides, strict=True)]
        x = own.as_strided(long, strides, own.storage_offset() + offset)
        return x[~x.isnan()] if self.skips_nan else x


class Observed:
    """What a pair observes of its batches, as a run on the first of them showed it; call it to check another one.

    Arguments are looked at as they are. What a program computes from them, and what seems to lie outside of a support,
    is judged by a run on that batch.
    """

    def __init__(
        self, model: Program, guide: Program, seen: Sites, batch: Batch, kwargs: Mapping[str, object] | None = None
    ) -> None:
        self.pair, self.kwargs = (model, guide), kwargs or {}
        self.columns = [Column.of(site, batch) for site in data_sites(seen).values()]

    def fine(self, batch: Batch) -> Tensor | None:
        """Whether all of a batch surely is inside, 0-d and not read from its device; None where only a run can say."""
        if None in self.columns:
            return None
        found = [all_inside(column.values(batch), column.support) for column in self.columns if column is not None]
        return torch.stack(found).all() if found else torch.ones((), dtype=torch.bool)

    def __call__(self, batch: Batch, first: int = 0) -> None:
        """Check a batch whose first datum has this number.

        :raises DataError: as :func:`check_observed`.
        """
        if not self.fine(batch):
            check_observed(self.run(batch), first, partial(self.run, batch, OTHER))

    def run(self, batch: Batch, seed: int | None = None) -> Sites:
        """The model's sites on a batch; no trace is left in generators and buffers."""
        with isolated_rng(seed), protected_buffers(*self.pair), pyro.validation_enabled(False):
            return record_pair(*self.pair, batch, self.kwargs)[1]


def skips_nan(site: Site) -> bool:
    """Whether the density of a site takes NaN for missing, whatever the batch."""
    value, fn = site["value"], site["fn"]
    if any(masks(site)) or is_discrete(fn) or not value.is_floating_point():
        return False
    return bool(scored({**site, "value": torch.full_like(value, torch.nan)}).isfinite().all())
