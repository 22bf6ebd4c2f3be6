"""An update is its optimizer's own step, to the same bits, whoever else looks at the optimizer or changes it."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from pyrovae.engine.updates import Update

SHAPES = [(3, 4), (5,), (), (2, 1)]

MAKERS: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    "fused": lambda own: Adam(own, lr=0.01, fused=True),
    "amsgrad": lambda own: AdamW(own, lr=0.01, fused=True, amsgrad=True),
    "decay": lambda own: Adam(own, lr=torch.tensor(0.01), fused=True, weight_decay=0.1, maximize=True),
    "groups": lambda own: AdamW([{"params": own[:2]}, {"params": own[2:], "lr": 0.1, "betas": (0.5, 0.9)}], fused=True),
    "half fused": lambda own: Adam([{"params": own[:2]}, {"params": own[2:], "fused": False}], fused=True),
    "foreach": lambda own: Adam(own, lr=0.01),
    "momentum": lambda own: SGD(own, lr=0.01, momentum=0.9),
}


def twins(make: Callable[[list[Tensor]], Optimizer]) -> Iterator[tuple[list[Tensor], Optimizer]]:
    for _ in range(2):
        generator = torch.Generator().manual_seed(1)
        own = [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]
        yield own, make(own)


def give(own: list[Tensor], step: int, *, none: int | None = None) -> None:
    generator = torch.Generator().manual_seed(step)
    for i, parameter in enumerate(own):
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if i == none else gradient


def reset(optimizer: Optimizer) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def forget_one(optimizer: Optimizer) -> None:
    del optimizer.state[optimizer.param_groups[0]["params"][0]]


def change_rate(optimizer: Optimizer) -> None:
    optimizer.param_groups[-1]["lr"] = 0.3


def change_moment(optimizer: Optimizer) -> None:
    own = optimizer.state[optimizer.param_groups[0]["params"][1]]
    own.update({name: value * 2 for name, value in own.items() if isinstance(value, Tensor)})


def schedule(optimizer: Optimizer) -> None:
    torch.optim.lr_scheduler.StepLR(optimizer, 1).step()


def hook(optimizer: Optimizer) -> None:
    def halve(optimizer: Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None if parameter.grad is None else parameter.grad / 2

    optimizer.register_step_pre_hook(halve)


def patch(optimizer: Optimizer) -> None:
    step = optimizer.step

    def twice() -> None:
        step()
        step()

    optimizer.step = twice  # type: ignore[method-assign, assignment]


@pytest.mark.filterwarnings("ignore:.*lr_scheduler")
@pytest.mark.parametrize("meddle", [reset, forget_one, change_rate, change_moment, schedule, hook, patch])
@pytest.mark.parametrize("name", MAKERS)
def test_an_update_is_the_optimizers_own_step(name: str, meddle: Callable[[Optimizer], None]):
    (own, optimizer), (others, twin) = twins(MAKERS[name])
    update = Update(optimizer)
    for step in range(9):
        if step == 4:
            meddle(optimizer)
            meddle(twin)
        give(own, step, none=2 if step % 3 == 0 else None)
        give(others, step, none=2 if step % 3 == 0 else None)
        if step == 6:
            optimizer.step()  # whose turn it is does not matter
        else:
            update()
        twin.step()
    assert all(map(torch.equal, own, others))
    torch.testing.assert_close(optimizer.state_dict()["state"], twin.state_dict()["state"], rtol=0, atol=0)


def test_an_update_calls_the_kernel_itself(monkeypatch: pytest.MonkeyPatch):
    (own, optimizer), _ = twins(MAKERS["fused"])
    update = Update(optimizer)
    give(own, 0)
    update()
    monkeypatch.setattr(Adam, "step", None)
    update()
    assert {entries["step"].item() for entries in optimizer.state.values()} == {2.0}
