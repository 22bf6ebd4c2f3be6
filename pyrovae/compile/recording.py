"""A training step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyrovae.compile.checked import untouched
from pyrovae.engine.probe import PairState
from pyrovae.engine.randomness import isolated_rng

WARM_UP = 3  # steps before a CUDA graph is recorded, in which libraries allocate what they need


class Recording:
    """A step of one pair or more as a CUDA graph.

    It runs a few times aside first, so that libraries allocate what they need; parameters, buffers and optimizers are
    as before when it is recorded.
    """

    def __init__(
        self, step: Callable[[], Tensor], states: Sequence[PairState], optimizers: Sequence[Optimizer]
    ) -> None:
        for optimizer in filter(capturable, optimizers):
            make_capturable(optimizer)
        with ExitStack() as undo:
            for state in states:
                undo.enter_context(untouched(state))
            for optimizer in optimizers:
                undo.enter_context(optimizer_untouched(optimizer))
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with isolated_rng(), torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    step()
            torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = step()
        self.gradients = [(p, p.grad) for o in optimizers for group in o.param_groups for p in group["params"]]

    def replay(self) -> Tensor:
        """Run the step again on what its inputs hold now; the loss, with the gradients in ``.grad``."""
        self.graph.replay()
        for parameter, gradient in self.gradients:  # other steps may have put theirs there
            parameter.grad = gradient
        return self.loss.clone()  # the next replay overwrites it


def capturable(optimizer: Optimizer) -> bool:
    """Whether an optimizer can be part of a CUDA graph: its state starts from zero and lives on the device."""
    return type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)


def uncapturable(optimizer: Optimizer) -> None:
    """Undo :func:`make_capturable` where a run goes on without CUDA."""
    for group in optimizer.param_groups:
        if group.get("capturable") and not group["params"][0].is_cuda:
            group["capturable"], group["lr"] = False, float(group["lr"])


def make_capturable(optimizer: Optimizer) -> None:
    """Keep learning rate and step counts on the device."""
    for group in optimizer.param_groups:
        device = group["params"][0].device
        group["capturable"], group["lr"] = True, torch.as_tensor(group["lr"], dtype=torch.float32).to(device)
    for parameter, state in optimizer.state.items():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].to(parameter.device)


@contextmanager
def optimizer_untouched(optimizer: Optimizer) -> Iterator[None]:
    """Undo steps, but keep the tensors that they created; these start from zero."""
    then = {
        parameter: {k: v.clone() for k, v in state.items() if isinstance(v, Tensor)}
        for parameter, state in optimizer.state.items()
    }
    yield
    with torch.no_grad():
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    known = then.get(parameter, {}).get(name)
                    value.zero_() if known is None else value.copy_(known)
