"""Where programs live, and where what they make without naming a device is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

import pyro
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves

from pyrovae.engine.programs import Batch, Program, device_of, leaves, protected_buffers
from pyrovae.engine.randomness import isolated_rng

MADE = {*_device_constructors(), torch.normal}
CONVERTED = {torch.tensor, torch.as_tensor, torch.asarray, torch.normal}  # of a tensor they take its device


def batch_device(args: Batch, kwargs: Mapping[str, object]) -> torch.device | None:
    """The device of a batch: of its first tensor that is not on the CPU, or else of any."""
    places = [a.device for a in leaves((*args, *kwargs.values())) if isinstance(a, Tensor)]
    return next((place for place in places if place.type != "cpu"), places[0] if places else None)


def beside(args: Batch, kwargs: Mapping[str, object] | None = None) -> AbstractContextManager[object]:
    """The context in which programs run on a batch: what they make without naming a device is made beside it.

    On the CPU it is none.
    """
    for a in leaves((*args, *kwargs.values()) if kwargs else args):
        if isinstance(a, Tensor) and not a.is_cpu:
            return MadeOn(a.device)
    return nullcontext()


class MadeOn(TorchFunctionMode):
    """Makes on a device what is made without naming one; what comes from a generator stays where that is.

    Numbers become tensors there without a copy from the host, which would wait for the device.

    >>> x = torch.ones(1)
    >>> with MadeOn(torch.device("meta")):
    ...     torch.zeros(2).device, torch.zeros(2, device="cpu").device, torch.as_tensor(x).device
    (device(type='meta'), device(type='cpu'), device(type='cpu'))
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        given = dict(kwargs or {})
        named = given.get("device") is not None or given.get("generator") is not None
        taken = func in CONVERTED and any(isinstance(a, Tensor) for a in (*args, *given.values()))
        if func in MADE and not named and not taken:
            given["device"] = self.device
        if func is torch.tensor and args and isinstance(args[0], int | float):
            return torch.full((), args[0], **given)  # type: ignore[call-overload]
        return func(*args, **given)


class Elsewhere(BaseException):  # so that no program takes it for an error of its own
    """A program met a tensor that is not where its batch is."""

    def __init__(self, device: torch.device) -> None:
        self.device = device


class Meets(TorchFunctionMode):
    """Stops at the first parameter, or tensor of an accelerator, that is on another device than ``device``."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        for a in tree_leaves((args, kwargs)):
            away = isinstance(a, Tensor) and a.device != self.device
            if away and (a.device.type != "cpu" or isinstance(a, nn.Parameter) or (a.is_leaf and a.requires_grad)):
                raise Elsewhere(a.device)
        return func(*args, **(kwargs or {}))


def home_of(*programs: Program, args: Batch, kwargs: Mapping[str, object] | None = None) -> torch.device | None:
    """Where the programs' parameters live, or None where nothing speaks against the device of the batch.

    Of programs that are no modules this is where the first tensor lives that a run meets and that is not at the batch;
    the run stops there, and leaves no trace.
    """
    found = device_of(*programs)
    place = batch_device(args, kwargs or {})
    if found is not None or place is None or not may_differ(place):
        return found
    for program in programs:
        try:
            # The run proper tells of errors.
            with undone(program), beside(args, kwargs), Meets(place), suppress(Exception):
                program(*args, **(kwargs or {}))
        except Elsewhere as met:
            return met.device
    return None


def may_differ(place: torch.device) -> bool:
    """Whether there are other devices than the CPU at all."""
    return place.type != "cpu" or torch.accelerator.is_available()


@contextmanager
def undone(program: Program) -> Iterator[None]:
    """Leave generators, buffers and, of a run that was stopped, Pyro's parameter store as they were."""
    store = pyro.get_param_store()
    known = set(store.keys())
    with isolated_rng(), protected_buffers(program), pyro.validation_enabled(False), torch.enable_grad():
        try:
            yield
        except Elsewhere:
            for name in set(store.keys()) - known:
                del store[name]
            raise
