"""Draws whose noise depends on their parameters, as operations of a graph: functions of these and of one seed.

A rejection sampler takes as many random numbers as it needs, so that its noise cannot be an input. Its seed can: one
number from the generator of all, from which the sampler then draws with one of its own. Their derivatives are those
of torch's own samplers (implicit reparameterisation), which autograd has taken before it comes to these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import von_mises

SEEDS = 2**62
OPERATIONS = torch.library.Library("pyrovae", "DEF")
turned: Callable[..., Tensor] = von_mises._rejection_sample


def like(given: Tensor, *_: object) -> Tensor:
    """What has the size and type of the first parameter."""
    return given.new_empty(given.shape)


def indices(probs: Tensor, number: int, replacement: bool) -> Tensor:
    """What holds so many indices a row."""
    return probs.new_empty((*probs.shape[:-1], number), dtype=torch.long)


def angles(loc: Tensor, concentration: Tensor, proposal_r: Tensor, x: Tensor, *, generator: torch.Generator) -> Tensor:
    """Torch's draws of a von Mises distribution, which are from the generator of all."""
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        torch.manual_seed(generator.initial_seed())
        return turned(loc, concentration, proposal_r, x)


def seeded(
    name: str, takes: str, draw: Callable[..., Tensor], empty: Callable[..., Tensor] = like
) -> Callable[..., Tensor]:
    """A sampler of torch's as an operation that takes its seed first; what comes back draws the seed and calls it.

    :param takes: the parameters, as torch's schemas have them.
    :param empty: of these, a tensor like the result.
    """

    def run(seed: Tensor, *given: Any) -> Tensor:
        parameters = [a.contiguous() if isinstance(a, Tensor) else a for a in given]  # which noise is whose
        return draw(*parameters, generator=torch.Generator(given[0].device).manual_seed(int(seed)))

    def each(info: Any, in_dims: Sequence[int | None], *given: Any) -> tuple[Tensor, int]:
        def row(r: int) -> list[Any]:
            return [a if d is None else a.select(d, r) for a, d in zip(given, in_dims, strict=True)]

        return torch.stack([operation(*row(r)) for r in range(info.batch_size)]), 0

    OPERATIONS.define(f"{name}(Tensor seed, {takes}) -> Tensor")
    OPERATIONS.impl(name, run, "CompositeExplicitAutograd")
    OPERATIONS.impl(name, lambda seed, *given: empty(*given), "Meta")
    torch.library.register_vmap(f"pyrovae::{name}", each, lib=OPERATIONS)
    operation = getattr(torch.ops.pyrovae, name).default

    def drawn(*given: Any, generator: object = None) -> Tensor:
        return operation(torch.randint(SEEDS, ()), *given)

    return drawn


gamma = seeded("gamma", "Tensor alpha", torch._standard_gamma)
dirichlet = seeded("dirichlet", "Tensor alpha", torch._sample_dirichlet)
poisson = seeded("poisson", "Tensor rate", torch.poisson)
binomial = seeded("binomial", "Tensor count, Tensor prob", torch.binomial)
multinomial = seeded("multinomial", "Tensor probs, int number, bool replacement", torch.multinomial, indices)
turn = seeded(
    "von_mises", "Tensor loc, Tensor concentration, Tensor proposal_r, Tensor x", angles, lambda *a: like(a[3])
)
