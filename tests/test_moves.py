"""C++ moves parameters as torch's optimizers do, by whatever options, on what these keep."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import PyDLL
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from pyrovae.compile.graph import Graph, capture
from pyrovae.compile.steps import Moves, Steps
from pyrovae.engine.updates import Update
from pyrovae.train.ahead import known_moves

SHAPES, ROWS, BATCH = (
    [(21, 17), (17,), (), (40, 3, 2)],
    24,
    4,
)  # odd ones: weights and biases are no multiples of vectors
FACTORS = [1.0, 0.5, 2.0, 0.0, 1.0, 0.7]  # of the learning rates, step by step

#: The option sets of torch's own tests of these (torch.testing._internal.common_optimizers), and more of that kind.
OF_ADAM: list[dict[str, Any]] = [
    {}, {"lr": 0.01}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True},
    {"weight_decay": 0.1, "amsgrad": True}, {"fused": True, "weight_decay": 0.1, "amsgrad": True, "maximize": True},
    {"foreach": True, "betas": (0.5, 0.5), "eps": 0.1}, {"betas": (0.0, 0.9)}, {"lr": torch.tensor(0.001)},
    {"lr": torch.tensor(0.001), "betas": (torch.tensor(0.9), torch.tensor(0.99)), "amsgrad": True},
]  # fmt: skip
OF_SGD: list[dict[str, Any]] = [
    {}, {"lr": 1e-2}, {"lr": torch.tensor(0.001)}, {"weight_decay": 0.5}, {"momentum": 0.9},
    {"weight_decay": 0.1, "maximize": True}, {"momentum": 0.9, "dampening": 0.5},
    {"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1, "maximize": True, "fused": True}, {"foreach": True},
]  # fmt: skip
SETS = [*product((Adam, AdamW), OF_ADAM), *product((SGD,), OF_SGD)]


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]


def rows() -> Tensor:
    return torch.randn(ROWS, 21, generator=torch.Generator().manual_seed(2))


def loss_of(own: list[Tensor], x: Tensor) -> Tensor:
    weight, bias, scale, cube = own
    z = x @ weight
    return z.mean() + (3 * (z + bias).tanh() * scale - cube.sum(-1).mean()).square().mean() + cube.square().sum()


@pytest.fixture(scope="module")
def compiled() -> tuple[Graph, PyDLL]:
    own, x = parameters(), rows()[:BATCH]

    def loss_and_gradients() -> list[Tensor]:
        loss = loss_of(own, x)
        return [loss.detach(), torch.zeros((), dtype=torch.long), *torch.autograd.grad(loss, own)]

    graph = capture(loss_and_gradients, [*own, x])
    found = graph.compiled().library([*own, x])
    assert found is not None
    return graph, found.library


def moves_of(optimizer: Optimizer, own: list[Tensor], clip_norm: float | None) -> Moves | None:
    step: Any = SimpleNamespace(optimizers=[optimizer], updates=[Update(optimizer)], clip_norm=clip_norm)
    graph: Any = SimpleNamespace(reached=own)
    return known_moves(step, graph)


def by_torch(
    optimizer: Optimizer, own: list[Tensor], data: Tensor, clip_norm: float | None, factors: list[float]
) -> list[float]:
    """One by one, as a user writes it; rates that are tensors are filled."""
    base, losses = [float(group["lr"]) for group in optimizer.param_groups], []
    for x, factor in zip(data.split(BATCH), factors, strict=False):
        for group, rate in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = torch.tensor(rate * factor) if isinstance(group["lr"], Tensor) else rate * factor
        optimizer.zero_grad()
        loss = loss_of(own, x)
        loss.backward()
        if clip_norm is not None:
            clip_grad_norm_(own, clip_norm)
        optimizer.step()
        losses.append(loss.item())
    for group, rate in zip(optimizer.param_groups, base, strict=True):
        group["lr"] = rate
    return losses


def ahead(
    compiled: tuple[Graph, PyDLL], optimizer: Optimizer, own: list[Tensor], data: Tensor, clip_norm: float | None
) -> tuple[Steps, list[float]]:
    """All steps but the first by C++."""
    graph, library = compiled
    by_torch(optimizer, own, data[:BATCH], clip_norm, FACTORS[:1])
    moves = moves_of(optimizer, own, clip_norm)
    assert moves is not None
    batch = torch.empty(BATCH, 21)
    inputs = [*own, batch, *graph.constants]
    steps = Steps(library, inputs, [], [data], [batch], moves, binarised=False, kl_weight=None)
    rates = [[float(group["lr"]) * factor for factor in FACTORS[1:]] for group in optimizer.param_groups]
    came = steps(torch.arange(BATCH, len(data)), rates, [1.0] * (len(data) // BATCH - 1))
    return steps, [loss for loss, _ in came]


def check(
    compiled: tuple[Graph, PyDLL], make: Callable[[list[Tensor]], Optimizer], data: Tensor, clip_norm: float | None
) -> None:
    theirs, ours = parameters(), parameters()
    optimizers = make(theirs), make(ours)
    losses = by_torch(optimizers[0], theirs, data, clip_norm, FACTORS)
    steps, found = ahead(compiled, optimizers[1], ours, data, clip_norm)
    assert found == pytest.approx(losses[1:], rel=1e-4)
    for p, q, gradient in zip(theirs, ours, steps.moves.gradients, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, p.grad, rtol=1e-3, atol=1e-5)
        states = [optimizer.state.get(own, {}) for optimizer, own in zip(optimizers, (p, q), strict=True)]
        assert states[0].keys() == states[1].keys()
        for name, value in states[0].items():
            torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("kind", "options"), SETS, ids=lambda each: getattr(each, "__name__", str(each)))
def test_as_torch_does(compiled: tuple[Graph, PyDLL], kind: type[Optimizer], options: dict[str, Any]) -> None:
    """Parameters, what is kept, losses, and the last gradient, clipped or not; nothing is NaN that is finite there."""
    for clip_norm in (None, 0.1, 1e6):
        check(compiled, lambda own: kind(own, **options), rows(), clip_norm)


GROUPS: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    "Adam": lambda own: AdamW(
        [{"params": own[2:], "lr": 0.1, "betas": (0.5, 0.9), "decoupled_weight_decay": False},
         {"params": own[:2], "amsgrad": True, "fused": True}]
    ),
    "SGD": lambda own: SGD([{"params": own[1:3], "momentum": 0.5}, {"params": [own[0], own[3]], "lr": 0.1}], lr=0.01),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_groups_have_their_own_options(compiled: tuple[Graph, PyDLL], name: str) -> None:
    """Whatever the order in which they hold the parameters; one norm clips them all."""
    for clip_norm in (None, 0.1):
        check(compiled, GROUPS[name], rows(), clip_norm)


def test_steps_without_a_norm_are_withheld(compiled: tuple[Graph, PyDLL]) -> None:
    """Clipping would make zeros of finite gradients whose squares overflow; unclipped they move."""
    data = rows()
    data[2 * BATCH] = 1e20
    for clip_norm, number in ((1.0, 2), (None, 5)):
        own = parameters()
        steps, losses = ahead(compiled, SGD(own, lr=1e-25), own, data, clip_norm)
        assert len(losses) == number
        assert torch.tensor(losses).isfinite().tolist() == [True] + [number == 5] * (number - 1)
        assert all(p.isfinite().all() for p in own)
        assert (steps.moves.gradients[0].abs() > 1e18).any() == (number == 2)  # as they were


REFUSED: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    "another": lambda own: RMSprop(own, lr=0.01),
    "a user's own": lambda own: type("Own", (Adam,), {})(own),
    "differentiable": lambda own: Adam(own, differentiable=True),
    "without all": lambda own: Adam(own[1:]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_left_to_python(name: str) -> None:
    """Also what is not known yet, and whose steps something waits for."""
    own = parameters()
    optimizer = REFUSED[name](own)
    for parameter in own:
        optimizer.state[parameter] |= {"step": torch.ones(())} | dict.fromkeys(("exp_avg", "exp_avg_sq"), parameter)
    assert moves_of(optimizer, own, None) is None


def test_what_is_not_ready_is_left_to_python() -> None:
    """A first step, a hook, a patched step, doubles, what does not lie in order."""
    own = parameters()
    assert moves_of(SGD(own), own, None) is not None
    assert moves_of(Adam(own), own, None) is None
    assert moves_of(SGD(own, momentum=0.9), own, None) is None
    hooked, patched = SGD(own), SGD(own)
    hooked.register_step_post_hook(lambda *_: None)
    torch.optim.lr_scheduler.StepLR(patched, 1)
    doubles, turned = [p.detach().double() for p in own], [torch.ones(2, 3).t()]
    others = (hooked, own), (patched, own), (SGD(doubles), doubles), (SGD(turned), turned)
    assert not any(moves_of(optimizer, held, None) for optimizer, held in others)
