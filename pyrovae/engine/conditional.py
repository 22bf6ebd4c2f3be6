"""Draws of what is summed out, from its exact conditional: Pyro's backward sampling, on sums in log space."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from opt_einsum import shared_intermediates
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.einsum.adjoint import require_backward, transpose
from pyro.ops.einsum.torch_sample import _EinsumBackward
from pyro.ops.einsum.util import Tensordot
from pyro.ops.rings import SampleRing
from torch import Tensor

from pyrovae.engine.enumerate import Sum, sums
from pyrovae.engine.enumerate import einsum as summed
from pyrovae.engine.particles import Layout
from pyrovae.engine.programs import Batch, Program
from pyrovae.engine.run import run_at
from pyrovae.engine.sites import Site, Sites

__all__ = ["draw_summed", "draws", "einsum", "tensordot", "transpose"]
NEVER = -1e30  # the log of a probability of 0, of which sums are no NaN


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """As :func:`pyrovae.engine.enumerate.einsum`, with the way back from a draw of the sum to one of its terms.

    The way back names the axes in order, without which Pyro cannot join draws of several numbers of sites.
    """
    output = packed.rename_equation(equation, *operands).split("->")[1]
    result = summed(equation, *operands)
    result._pyro_dims = output  # type: ignore[attr-defined]
    result._pyro_backward = _EinsumBackward("".join(sorted(output)), operands)  # type: ignore[attr-defined]
    return result


tensordot = Tensordot(einsum)


class DrawnSums(SampleRing):
    """Pyro's ring of sums forward, and draws backward."""

    _backend = __name__


def draw_summed(
    model: Program,
    args: Batch,
    kwargs: Mapping[str, object],
    values: Mapping[str, Tensor],
    ranks: Mapping[str, int],
    layout: Layout,
    together: bool,
) -> dict[str, Tensor]:
    """A draw of each site that is summed out, given each of the draws of all other latents.

    :param values: those draws, ``[particles, *[size or 1] * plates, *event]``; what comes back has that shape as well.
    :param ranks: the dims that a value has in a run of one particle.
    :param together: whether all particles run at a time.
    """
    assert layout.particle_dim is not None
    nesting = -1 - layout.particle_dim
    if together:
        sites, first_dim = run_at(model, args, kwargs, values, layout.num_particles, nesting, sums=True)
        return {name: in_place(value, sites[name], nesting) for name, value in draws(sites, first_dim).items()}
    each = []
    for k in range(layout.num_particles):
        own = {name: v[k].reshape(v.shape[v.dim() - ranks[name] :]) for name, v in values.items()}
        sites, first_dim = run_at(model, args, kwargs, own, 1, nesting, sums=True)
        each.append({name: in_place(value, sites[name], nesting) for name, value in draws(sites, first_dim).items()})
    return {name: torch.cat([drawn[name] for drawn in each]) for name in each[0]}


def in_place(value: Tensor, site: Site, nesting: int) -> Tensor:
    """A drawn value with an axis for particles, and for each plate, of size 1 where the site lies in none."""
    missing = 1 + nesting + site["fn"].event_dim - value.dim()
    return value.reshape(*[1] * missing, *value.shape)


def draws(sites: Sites, first_dim: int) -> dict[str, Tensor]:
    """Of a run inside of :class:`~pyrovae.engine.enumerate.Enumerate`, a joint draw of all enumerated sites.

    :return: by site, ``[*particles, *plates, *event]``.
    """
    found = {}
    for each in sums(sites, first_dim, exact=True):
        ring, factors = DrawnSums(dim_to_size=each.sizes), {}
        for name, factor in each.factors.items():
            factors[name] = factor.clamp(min=NEVER)
            factors[name]._pyro_dims = factor._pyro_dims  # type: ignore[attr-defined]
            require_backward(factors[name])
        with shared_intermediates(ring._cache):
            roots = contract_tensor_tree(each.tree(factors), each.dims, ring=ring)
        for root in (root for parts in roots.values() for root in parts):
            root._pyro_backward()
        for name in each.enumerated:
            found[name] = drawn_value(each, name, factors[name]._pyro_backward_result)  # type: ignore[attr-defined]
    return found


def drawn_value(of: Sum, name: str, sample: Tensor | None) -> Tensor:
    """The value of a site at the indices that were drawn, in all plates around it."""
    site = of.sites[name]
    sizes = {f.dim: f.size for f in site["cond_indep_stack"] if f.dim is not None}
    shape = [sizes.get(dim, 1) for dim in range(min(sizes, default=0), 0)]
    symbol, axis = site["infer"]["_enumerate_symbol"], site["infer"]["_enumerate_dim"] - site["fn"].event_dim
    if sample is None or symbol not in sample._pyro_sample_dims:  # type: ignore[attr-defined]
        index = torch.zeros(shape, dtype=torch.long, device=site["value"].device)  # of one value
    else:
        index = sample[sample._pyro_sample_dims.index(symbol)]  # type: ignore[attr-defined]
        index._pyro_dims = sample._pyro_dims[1:]  # type: ignore[attr-defined]
        index = packed.unpack(index, of.run.symbol_to_dim).expand(shape)
    event = site["fn"].event_shape
    support = site["value"].movedim(axis, 0).reshape(site["value"].shape[axis], -1, *event)[:, 0]
    return support[index]
