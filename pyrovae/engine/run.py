r"""Guide and model with K particles, to log-weights.

Any pair of Pyro programs is run with :math:`K` particles in one vectorised outer plate. What comes back are the
parts of the log-weights

.. math:: \log w_{kb} = \log p(x_b, z_{kb}) - \log q(z_{kb} \mid x_b),

``[K, B]``, one row per particle and one column per datum.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Literal

import pyro
from pyro.distributions import Delta
from torch import Tensor

from pyrovae.engine.devices import beside
from pyrovae.engine.enumerate import Enumerate, summed_out
from pyrovae.engine.fold import Fold, check_folded, fold_arguments
from pyrovae.engine.particles import Particles
from pyrovae.engine.programs import Batch, Program, protected_buffers
from pyrovae.engine.randomness import replayed_rng, rng_state
from pyrovae.engine.separate import joined, values_of
from pyrovae.engine.sites import PARTICLE_PLATE, ParticlePlate, Record, Sites, drawn, duplicate
from pyrovae.engine.unwrap import point_mass

Copies = Literal["live", "detached", "fixed"] | None


def run(
    model: Program,
    guide: Program,
    args: Batch,
    kwargs: Mapping[str, object],
    *,
    num_particles: int = 1,
    nesting: int = 0,
    fold: Fold = False,
    copies: Copies = None,
    rerun: bool = False,
    scaled: bool = True,
    noise: Collection[str] = (),
    separate: bool = False,
    sums: bool = False,
) -> Particles:
    """Run guide, then model on its samples, with ``num_particles`` particles to the left of ``nesting`` plates.

    With ``copies`` the model runs on copies of the samples, of the kind named, kept in ``Particles.copies``.
    ``rerun`` keeps what :meth:`Particles.log_guide_fixed` needs. With ``fold`` the particles are folded into the batch
    instead of a plate. With ``scaled=False`` every scale is ignored. ``noise`` are the guide's draws that leave log w.
    With ``separate`` particles run one after the other, and may have different sites. With ``sums`` the model's marked
    sites that the guide does not draw are summed out.
    """
    several, particle_dim = num_particles > 1, None
    folded, apart = fold is not False and several, separate and several
    whole = *args, *kwargs.values()
    if folded:
        args, kwargs = fold_arguments(args, kwargs, num_particles, fold)
    elif several:
        particle_dim = -1 - nesting

    def once(program: Program, record: Record, sums: bool) -> Sites:
        first_dim = -1 - nesting - several
        with Enumerate(first_dim) if sums else nullcontext(), particle_plate(), beside(args, kwargs), record:
            program(*args, **kwargs)
        return summed_out(record.sites, first_dim, exact=not scaled) if sums else record.sites

    def particle_plate() -> AbstractContextManager[object]:
        together = particle_dim is not None and not apart
        return ParticlePlate(PARTICLE_PLATE, num_particles, dim=particle_dim) if together else nullcontext()

    def execute(program: Program, values: dict[str, Tensor], *, redraw: bool = False, sums: bool = False) -> Sites:
        if apart:
            each = (values_of(proposed, values, k) for k in range(num_particles))
            runs.append([once(program, Record(own, redraw=redraw), sums) for own in each])
            return joined(runs[-1], nesting)
        return once(program, Record(values, redraw=redraw), sums)

    runs: list[list[Sites]] = []
    proposed: Sites = {}
    with pyro.validation_enabled(False):
        states = rng_state() if rerun else None
        proposed = execute(guide, {})
        values = {name: value for name, value in drawn(proposed).items() if name not in noise}
        copied = copies_of(values, copies)
        joint = execute(model, values | copied, sums=sums)

    def rerun_guide(own: Mapping[str, Tensor]) -> Sites:
        assert states is not None
        moving = (n for n in values if not isinstance(point_mass(proposed[n]["fn"]), Delta))
        fixed = {n: duplicate(values[n], Tensor.detach) if isinstance(values[n], Tensor) else values[n] for n in moving}
        with pyro.validation_enabled(False), replayed_rng(*states), protected_buffers(guide):
            return execute(guide, {**fixed, **own}, redraw=True)

    particles = Particles.of(proposed, joint, num_particles, particle_dim, folded, noise=noise, scaled=scaled)
    if folded:
        check_folded(particles, whole, (*args, *kwargs.values()))
    return replace(particles, copies=copied, rerun_guide=rerun_guide, runs=list(zip(*runs, strict=True)))


def run_at(
    program: Program,
    args: Batch,
    kwargs: Mapping[str, object],
    values: Mapping[str, Tensor],
    num_particles: int,
    nesting: int,
    *,
    sums: bool = False,
) -> tuple[Sites, int]:
    """The sites of a program at these values, one for each particle, and the first of the dims of what is summed out.

    With ``sums`` marked sites that have no value are enumerated, and not summed out so far.
    """
    plate, first_dim = ParticlePlate(PARTICLE_PLATE, num_particles, dim=-1 - nesting), -2 - nesting
    with (
        Enumerate(first_dim) if sums else nullcontext(), pyro.validation_enabled(False), beside(args, kwargs),
        Record(values) as record, plate,
    ):  # fmt: skip
        program(*args, **kwargs)
    return record.sites, first_dim


def run_each_at(
    program: Program,
    args: Batch,
    kwargs: Mapping[str, object],
    values: Mapping[str, Tensor],
    like: Sites,
    num_particles: int,
    nesting: int,
    *,
    sums: bool = False,
) -> Sites:
    """The same of particles one after the other, what is to be summed out summed out.

    :param like: sites of one particle, whose values have the dims that the program knows.
    """
    runs, first_dim = [], -1 - nesting
    for k in range(num_particles):
        dims = {name: like[name]["value"].dim() for name in values}
        own = {name: value[k].reshape(value.shape[value.dim() - dims[name] :]) for name, value in values.items()}
        with (
            Enumerate(first_dim) if sums else nullcontext(), pyro.validation_enabled(False), beside(args, kwargs),
            Record(own) as record,
        ):  # fmt: skip
            program(*args, **kwargs)
        runs.append(summed_out(record.sites, first_dim) if sums else record.sites)
    return joined(runs, nesting)


def copies_of(values: Mapping[str, Tensor], kind: Copies) -> dict[str, Tensor]:
    """Copies of the samples that gradients flow through: live under another name, cut off, or without gradient."""
    if kind is None:
        return {}
    how = {"live": renamed, "detached": cut_off, "fixed": Tensor.detach}[kind]
    moved = {name: value for name, value in values.items() if getattr(value, "requires_grad", False)}
    return {name: duplicate(value, how) for name, value in moved.items()}


def renamed(value: Tensor) -> Tensor:
    """The same tensor under another name."""
    return value.view_as(value)


def cut_off(value: Tensor) -> Tensor:
    """A leaf with the same numbers."""
    return value.detach().requires_grad_(value.requires_grad)
