r"""A guide at fixed samples, also where these are Deltas of auxiliary draws and of parameters.

Where :math:`z = T_\phi(a)` is to stay, :math:`a` must move with :math:`\phi`; to first order, with
:math:`J = \partial T / \partial a`,

.. math:: a(\phi) = a - J^{-1} (T_\phi(a) - z),

so that the density of z, as a run of the guide on :math:`a(\phi)` has it, has the derivative of log q at fixed z.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pyro.distributions import Delta, Unit
from torch import Tensor

from pyrovae.engine.programs import graph_leaves
from pyrovae.engine.sites import Site, Sites
from pyrovae.engine.stacked import Stacked
from pyrovae.engine.unwrap import point_mass

Draws = dict[str, Tensor]


def at_fixed_samples(guide: Sites, own: Sequence[str], rerun: Callable[[Draws], Sites], dims: Sequence[int]) -> Sites:
    """The sites of the guide on its samples held fixed.

    :param own: what the model lacks: draws of which Deltas are computed, and Deltas on their way.
    :param rerun: runs the guide again on these values of ``own``, and on what it has drawn besides.
    :param dims: of particles and shared plates: what Deltas and draws have a row for.
    """
    own = [n for n in own if not point_mass(guide[n]["fn"]) and guide[n]["value"].is_floating_point()]
    draws = {name: guide[name]["value"].detach().requires_grad_() for name in own}
    sites, given = rerun(draws), {id(draw) for draw in draws.values()}
    moving, live = {}, False
    for name in guide:
        sources = {id(leaf) for part in parts_of(sites[name]) for leaf in graph_leaves(part)}
        if sources - given and (not sources & given or isinstance(point_mass(sites[name]["fn"]), Unit)):
            refuse_live_point_mass(sites[name])
        if sources & given:
            moving[name] = sites[name]
        live = live or bool(sources - given)
    return rerun(following(draws, [guide[name]["fn"].event_dim for name in own], moving, dims)) if live else sites


def parts_of(site: Site) -> tuple[Tensor, ...]:
    """What a point mass is made of; nothing of any other site."""
    fn = site["fn"]
    inside = [point_mass(part) for part in (fn.parts if isinstance(fn, Stacked) else [fn]) if part is not None]
    deltas = [part for mass in inside if isinstance(mass, Delta) for part in (mass.v, mass.log_density)]
    return (*deltas, *(mass.log_factor for mass in inside if isinstance(mass, Unit)))


def refuse_live_point_mass(site: Site) -> None:
    """Refuse a guide's Delta or factor that carries parameters although its parents are fixed."""
    if any(part.requires_grad for part in parts_of(site)):
        kind = "factor" if isinstance(point_mass(site["fn"]), Unit) else "Delta"
        raise ValueError(
            f'guide site "{site["name"]}" is a {kind} that carries parameters, so "log q at fixed z" has no meaning '
            'for it: use an objective with gradient="total"'
        )


def following(draws: Draws, event_dims: Sequence[int], masses: Sites, dims: Sequence[int]) -> Draws:
    """The draws as they move with the parameters while the Deltas that are computed from them stay."""
    z = torch.cat([rows(site["value"], site["fn"].event_dim, dims) for site in masses.values()], -1)
    sources, jacobian = list(draws.values()), []
    for number in z.unbind(-1):
        slopes = torch.autograd.grad(number.sum(), sources, retain_graph=True, materialize_grads=True)
        jacobian.append(torch.cat([rows(s, e, dims) for s, e in zip(slopes, event_dims, strict=True)], -1))
    along = torch.stack(jacobian, -2)
    off = (z - z.detach()).unsqueeze(-1)
    square = along.shape[-1] == along.shape[-2]  # else they lie on a manifold, as on a simplex
    moved = (torch.linalg.solve(along, off) if square else torch.linalg.pinv(along) @ off).squeeze(-1)
    parts = moved.split([rows(a, e, dims).shape[-1] for a, e in zip(sources, event_dims, strict=True)], -1)
    return {
        name: draw.detach() - unrows(part, draw, event_dim, dims)
        for (name, draw), event_dim, part in zip(draws.items(), event_dims, parts, strict=True)
    }


def rows(value: Tensor, event_dim: int, dims: Sequence[int]) -> Tensor:
    """A value ``[rows, numbers]``: all that lies in these dims of its batch, and what each of them has."""
    first = value.movedim([dim - event_dim for dim in dims], list(range(len(dims))))
    return first.reshape(first.shape[: len(dims)].numel(), -1)


def unrows(flat: Tensor, like: Tensor, event_dim: int, dims: Sequence[int]) -> Tensor:
    """The value that :func:`rows` has made ``flat`` of, and that has this shape."""
    where = [dim - event_dim for dim in dims]
    return flat.reshape(like.movedim(where, list(range(len(dims)))).shape).movedim(list(range(len(dims))), where)
