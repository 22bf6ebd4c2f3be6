"""A training step as one CUDA graph."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyrovae.arguments import one_line
from pyrovae.compile.checked import untouched
from pyrovae.compile.steps import AT_ONCE
from pyrovae.engine.probe import PairState
from pyrovae.engine.randomness import isolated_rng

TRIES = 3  # captures of a step, which other threads can spoil
WARM_UP = 3  # steps before a CUDA graph is recorded, in which libraries allocate what they need


class CannotRecord(Exception):
    """Why a step cannot become a CUDA graph; the message completes "cannot record the step: ..."."""


class Recording:
    """A step of one pair or more as a CUDA graph.

    It runs a few times aside first, so that libraries allocate what they need; parameters, buffers and optimizers are
    as before when it is recorded.

    :param beside: another recording, which shares its memory, as the two never run at once.
    :raises CannotRecord: for a step that waits for the device, or draws noise on the CPU, which the graph would freeze.
    """

    def __init__(
        self,
        step: Callable[[], Tensor],
        states: Sequence[PairState],
        optimizers: Sequence[Optimizer],
        beside: Recording | None = None,
    ) -> None:
        for optimizer in filter(capturable, optimizers):
            make_capturable(optimizer)
        self.optimizers, self.frozen = optimizers, [options(optimizer) for optimizer in optimizers]
        parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        self.graph: torch.cuda.CUDAGraph
        aside = torch.cuda.Stream(parameters[0].device)
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
            self.graph, self.loss = captured(step, aside, None if beside is None else beside.graph.pool())
        torch.cuda.current_stream(aside.device).wait_stream(aside)
        self.gradients = [(parameter, parameter.grad) for parameter in parameters]

    def replay(self, times: int = 1) -> Tensor:
        """Run the step again on what its inputs hold now; the loss, with the gradients in ``.grad``."""
        for _ in range(times):
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


def captured(step: Callable[[], Tensor], aside: torch.cuda.Stream, pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A step as a graph, and where that leaves the loss; other threads may go on meanwhile, but wait for no device."""
    for tries_left in reversed(range(TRIES)):
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=aside, capture_error_mode="thread_local"):
                return graph, step()
        except RuntimeError:
            close(graph, aside)
            if not tries_left:
                raise
    raise AssertionError


def close(graph: torch.cuda.CUDAGraph, aside: torch.cuda.Stream) -> None:
    """After a capture that failed: torch leaves its memory pool and its generator as they are within one."""
    with suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(aside.device_index, graph.pool())
    for _ in range(100):  # others may spoil this one as well
        with warnings.catch_warnings(), suppress(RuntimeError):
            warnings.filterwarnings("ignore", message=".*graph is empty")
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=aside, capture_error_mode="thread_local"):
                pass
            return  # the generator leaves a capture where one ends well


class Replays:
    """Steps in a row on data that live on a device: replays of one graph, which finds what is a step's by its number.

    :param step: a step on the data of an index: its losses, and how many data were left out.
    :param record: what records the step with all around it.
    :param inputs: the learning rate, and kl_weight if it changes, 0-d: what each step has its own of.
    """

    def __init__(
        self,
        step: Callable[[Tensor], Tensor],
        record: Callable[[Callable[[], Tensor]], Recording],
        size: int,
        inputs: Sequence[Tensor],
    ) -> None:
        now = torch.stack([value.double() for value in inputs])
        self.step, self.inputs, self.came = step, inputs, now.new_zeros(0)
        self.values, self.number = now.repeat(AT_ONCE, 1), torch.zeros(1, dtype=torch.long, device=now.device)
        self.order = self.number.new_zeros(AT_ONCE, size)
        self.recording = record(self.numbered)

    def numbered(self) -> Tensor:
        """The step whose turn it is."""
        index, values = (rows.index_select(0, self.number)[0] for rows in (self.order, self.values))
        for place, value in zip(self.inputs, values.unbind(), strict=True):
            place.copy_(value)
        outcome = self.step(index)
        if not len(self.came):
            self.came = outcome.new_zeros(AT_ONCE, *outcome.shape)
        self.came.index_copy_(0, self.number, outcome[None])
        self.number.add_(1)
        return outcome

    def __call__(
        self, order: Tensor, rates: Sequence[Sequence[float]], kl_weights: Sequence[float]
    ) -> list[tuple[float, int]]:
        """Steps on the data of these indices, as many as there are rates: their losses, and how many were left out."""
        number, size = len(kl_weights), self.order.shape[1]
        own = torch.tensor([*rates, kl_weights][: len(self.inputs)], dtype=torch.float64)
        self.order[:number].copy_(order[: number * size].unflatten(0, (number, size)))
        self.values[:number].copy_(own.mT)
        self.number.zero_()
        self.recording.replay(number)
        return [(loss, int(left_out)) for loss, left_out in self.came[:number].tolist()]


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
