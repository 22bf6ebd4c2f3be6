"""Particles folded into the batch, for networks that take one batch dimension only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from pyrovae.engine.particles import Particles
from pyrovae.engine.probe import Look
from pyrovae.engine.programs import Batch, leaves
from pyrovae.engine.sites import counted, frames, oversampling, quoted

Fold = bool | Sequence[int | str]  # whether, or which arguments have a row for each datum, by position or name


def fold_arguments(
    args: Batch, kwargs: Mapping[str, object], num_particles: int, fold: Fold = True
) -> tuple[Batch, dict[str, object]]:
    """Repeat the data along their first axis, particles major: the arguments said, or the first and its labels ``[B]``.

    What a dict holds goes by its name there.

    :raises ValueError: where other arguments have as many rows, and nothing is said of them.
    """
    named: dict[int | str, object] = {**dict(enumerate(args)), **dict(kwargs)}  # type: ignore[dict-item]
    known = {**named, **{key: a for held in named.values() if isinstance(held, dict) for key, a in held.items()}}
    tensors = {key: a for key, a in known.items() if isinstance(a, Tensor) and a.dim()}
    along = list(tensors)[:1] if isinstance(fold, bool) else list(fold)
    if unknown := [key for key in along if key not in tensors]:
        raise ValueError(
            f"fold_particles names argument {unknown[0]!r}, but tensors with rows are {list(tensors)}: name these"
        )
    for key, a in tensors.items() if isinstance(fold, bool) else ():
        if key not in along and len(a) == len(tensors[along[0]]):
            if a.dim() > 1:
                raise ValueError(
                    f"fold_particles=True repeats the first argument and labels [{len(a)}], but argument {key!r} has "
                    f"as many rows, {list(a.shape)}, which may be data or not: name the arguments that have a row for "
                    f"each datum, fold_particles={(along[0], key)!r} or {(along[0],)!r}"
                )
            along.append(key)
    for key in along:
        known[key] = tensors[key].repeat(num_particles, *[1] * (tensors[key].dim() - 1))
    folded = {k: {n: known[n] for n in a} if isinstance(a, dict) else known[k] for k, a in named.items()}
    return tuple(folded[i] for i in range(len(args))), {key: folded[key] for key in kwargs}


def check_folded(particles: Particles, before: Batch, after: Batch) -> None:
    """What was repeated must be what the data plate is made of."""
    pairs = zip(leaves(before), leaves(after), strict=True)
    rows = next((len(new) for old, new in pairs if isinstance(new, Tensor) and new is not old), 0)
    if (sizes := particles.layout.sizes) not in ([rows], []):
        raise ValueError(
            f"what was folded has {rows} rows, but its data plate has size {sizes[0]}: name the arguments that have a "
            "row for each datum, as in fold_particles=(1,)"
        )


def check_fold(seen: Look, fold: Fold) -> None:
    """Refuse to fold the particles of a pair that has joint weights, or a plate with a subsample of its own."""
    if fold is False:
        return
    if seen.layout.dims != [-1]:
        raise ValueError(
            "fold_particles=True needs one data plate at dim -1 around every site, "
            f"found plates {quoted(name for name, _, _ in seen.layout.plates)} shared by all: pass fold_particles=False"
        )
    stack = [f for site in (*counted(seen.guide), *counted(seen.model)) for f in site["cond_indep_stack"]]
    subsampled = sorted({f.name for f in stack if oversampling(f) != 1.0})
    if subsampled:
        raise ValueError(
            f"fold_particles=True cannot repeat a subsampled plate, found {quoted(subsampled)}: "
            "drop the subsample, or pass fold_particles=False"
        )
    place = seen.layout.dims[0], seen.layout.sizes[0]
    outside = [name for name, site in seen.particles.noise.items() if place not in {k[1:] for k in frames(site)}]
    if outside:
        raise ValueError(
            f"fold_particles=True needs noise for each datum, but {quoted(outside)} are outside of the data plate: "
            "draw them in it, or pass fold_particles=False"
        )
