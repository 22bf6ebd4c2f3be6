"""A training step as one CUDA graph."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyrovae.arguments import one_line
from pyrovae.compile.checked import untouched
from pyrovae.engine.probe import PairState
from pyrovae.engine.randomness import isolated_rng

WARM_UP = 3  # steps before a CUDA graph is recorded, in which libraries allocate what they need


class CannotRecord(Exception):
    """Why a step cannot become a CUDA graph; the message completes "cannot record the step: ..."."""


class Recording:
    """A step of one pair or more as a CUDA graph.

    It runs a few times aside first, so that libraries allocate what they need; parameters, buffers and optimizers are
    as before when it is recorded.

    :raises CannotRecord: for a step that waits for the device, or draws noise on the CPU, which the graph would freeze.
    """

    def __init__(
        self, step: Callable[[], Tensor], states: Sequence[PairState], optimizers: Sequence[Optimizer]
    ) -> None:
        for optimizer in filter(capturable, optimizers):
            make_capturable(optimizer)
        self.optimizers, self.frozen = optimizers, [options(optimizer) for optimizer in optimizers]
        parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        aside, self.graph = torch.cuda.Stream(parameters[0].device), torch.cuda.CUDAGraph()
        aside.wait_stream(torch.cuda.current_stream(aside.device))
        with reasons(), torch.cuda.stream(aside):
            with ExitStack() as undo:
                for state in states:
                    undo.enter_context(untouched(state))
                for optimizer in optimizers:
                    undo.enter_context(optimizer_untouched(optimizer))
                undo.enter_context(isolated_rng())
                for _ in range(WARM_UP - 1):
                    step()
                before = torch.get_rng_state()
                with unwaiting():
                    step()
                if not torch.equal(before, torch.get_rng_state()):
                    raise CannotRecord("it draws noise on the CPU, which a CUDA graph would freeze")
            # while this thread records, others may go on
            with torch.cuda.graph(self.graph, stream=aside, capture_error_mode="thread_local"):
                self.loss = step()
        torch.cuda.current_stream(aside.device).wait_stream(aside)
        self.gradients = [(parameter, parameter.grad) for parameter in parameters]

    def replay(self) -> Tensor:
        """Run the step again on what its inputs hold now; the loss, with the gradients in ``.grad``."""
        self.graph.replay()
        for parameter, gradient in self.gradients:  # other steps may have put theirs there
            parameter.grad = gradient
        return self.loss.clone()  # the next replay overwrites it

    def follows(self) -> bool:
        """Whether the graph does what its optimizers now say, with learning rates as they now are."""
        for optimizer, frozen in zip(self.optimizers, self.frozen, strict=True):
            for group, known in zip(optimizer.param_groups, frozen[1:], strict=False):
                if group["lr"] is not known["lr"]:
                    known["lr"].fill_(group["lr"])
                    group["lr"] = known["lr"]
        return self.frozen == [options(optimizer) for optimizer in self.optimizers]


def options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What a graph freezes of an optimizer: the options of its groups, and (first) which object its state is."""
    groups = ({name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups)
    return [{"state": id(optimizer.state)}, *groups]


@contextmanager
def unwaiting() -> Iterator[None]:
    """Refuse what waits for the device; other threads may wait, and so torch is to warn, and not to raise."""
    before, mine, shown = torch.cuda.get_sync_debug_mode(), threading.get_ident(), warnings.showwarning
    waits: list[str] = []

    def note(message: Warning | str, *where: Any, **more: Any) -> None:
        if "synchroniz" not in str(message).lower():
            shown(message, *where, **more)
        elif "called" in str(message) and threading.get_ident() == mine:
            waits.append(one_line(message, 100))

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=".*synchroniz")
        warnings.showwarning = note  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    if waits:
        raise CannotRecord(f"it waits for the device ({waits[0]})")


@contextmanager
def reasons() -> Iterator[None]:
    """Say of an error why a step cannot be recorded; of memory that runs out its own is said."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise CannotRecord(f"it waits for the device ({one_line(error, 100)})") from error


def capturable(optimizer: Optimizer) -> bool:
    """Whether an optimizer can be part of a CUDA graph: its state starts from zero and lives on the device."""
    return type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)


def settle(optimizer: Optimizer) -> None:
    """Let what :func:`make_capturable` made of an optimizer serve where its parameters are now."""
    for group in optimizer.param_groups:
        if group.get("capturable") and not group["params"][0].is_cuda:
            group["capturable"], group["lr"] = False, float(group["lr"])
        elif group.get("capturable"):
            group["lr"] = torch.as_tensor(group["lr"]).to(group["params"][0].device)


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
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    if isinstance(value, Tensor):
                        known = then.get(parameter, {}).get(name)
                        value.zero_() if known is None else value.copy_(known)
