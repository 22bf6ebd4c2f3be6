"""Many independent gradients from one call of an objective, and what their mean should be."""

import pyro
import torch

import pyrovae as pv
from tests.laws.exact import expected
from tests.laws.objectives import Row
from tests.laws.pairs import Pair

Gradients = dict[str, torch.Tensor]


def draws(objective: pv.Objective, pair: Pair, repetitions: int) -> Gradients:
    """Independent gradients of the bound (summed over the pair's data) in each parameter, ``[R]``.

    Every repetition has its own copy of each parameter.
    """
    size = len(pair.data)
    params = pair.params(repetitions * size, grad=True)
    x = pair.data.repeat(repetitions, *[1] * (pair.data.dim() - 1))
    objective.differentiable_loss(*pair.programs(params), x).backward()
    return {n: -p.grad.view(repetitions, size).sum(1) for n, p in params.items() if p.grad is not None}


def seeded(objective: pv.Objective, pair: Pair, seed: int = 1) -> tuple[float, Gradients]:
    """The loss and its gradients, from one seed, each parameter shared by all data."""
    params = pair.params(grad=True)
    pyro.set_rng_seed(seed)
    loss = objective.loss_and_grads(*pair.programs(params), pair.data)
    return loss, {n: p.grad for n, p in params.items()}


def exact(row: Row, pair: Pair, *, path_only: bool = False) -> dict[str, torch.Tensor]:
    """The gradient that theta and phi should follow in the mean."""
    _, theta = expected(pair, row.expectation, row.particles, **row.weighting)
    _, phi = expected(pair, *(row.phi or (row.expectation, row.particles)), **row.weighting, path_only=path_only)
    return {n: (theta if n in pair.theta else phi)[n] for n in theta}
