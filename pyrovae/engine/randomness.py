"""Random generators: isolated, seeded, replayed, saved."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import RLock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrovae.arguments import check_seed
from pyrovae.errors import ResourceError

RUNNING, PATIENCE = RLock(), 10  # seconds that a thread waits for another


@contextmanager
def one_thread() -> Iterator[None]:
    """Wait until no other thread runs programs: Pyro's handlers and the generators are one for the whole process.

    :raises ResourceError: where that takes long; the other thread may wait for this one.
    """
    if not RUNNING.acquire(timeout=PATIENCE):
        raise ResourceError(
            "another thread of this process trains or measures, and Pyro's handlers are one for all threads: wait for "
            "it, or use processes"
        )
    try:
        yield
    finally:
        RUNNING.release()


@contextmanager
def isolated_rng(seed: int | None = None) -> Iterator[None]:
    """Leave every random generator as it was found; inside, start from ``seed`` if one is given."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with one_thread(), torch.random.fork_rng(devices=devices):
        python_state, numpy_state = random.getstate(), np.random.get_state()
        if seed is not None:
            seed_everything(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def seed_everything(seed: int) -> None:
    """Seed torch (every device), numpy and Python, as Pyro programs may draw from any of them."""
    seed = check_seed(seed)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def drawn() -> tuple[object, ...]:
    """What differs once anything was drawn on the host."""
    numpy = np.random.get_state(legacy=False)
    place = numpy["state"]["pos"], int(numpy["state"]["key"][0]), numpy["has_gauss"]  # type: ignore[call-overload]
    return torch.get_rng_state().numpy().tobytes(), place, random.getstate()


@contextmanager
def replayed_rng(state: Tensor, cuda_states: list[Tensor]) -> Iterator[None]:
    """Draw again what was drawn from ``state`` on, then go on as if nothing had been drawn."""
    now, cuda_now = rng_state()
    set_rng_state(state, cuda_states)
    try:
        yield
    finally:
        set_rng_state(now, cuda_now)


def rng_state() -> tuple[Tensor, list[Tensor]]:
    """The states of torch's generators: the CPU's, and those of CUDA where it is in use."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def set_rng_state(state: Tensor, cuda_states: list[Tensor]) -> None:
    """Put torch's generators to what :func:`rng_state` saw."""
    torch.set_rng_state(state)
    if cuda_states:
        torch.cuda.set_rng_state_all(cuda_states)


def rng_snapshot() -> dict[str, Any]:
    """The state of every generator, in types that ``torch.load(weights_only=True)`` accepts."""
    return host_snapshot() | {
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "current": torch.cuda.current_device() if torch.cuda.is_initialized() else 0,
    }


def host_snapshot() -> dict[str, Any]:
    """The same of the generators that are on no device."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def restore_rng(snapshot: Mapping[str, Any]) -> None:
    """Put every generator back to where :func:`rng_snapshot` saw it; the current device's goes on on that of today."""
    torch.set_rng_state(snapshot["torch"])
    states = dict(zip(range(torch.cuda.device_count()), snapshot.get("cuda", ()), strict=False))
    if states:
        states[torch.cuda.current_device()] = snapshot["cuda"][snapshot.get("current", 0)]
    for device, state in states.items():
        torch.cuda.set_rng_state(state, device)
    kind, keys, position, *rest = snapshot["numpy"]
    if not (keys.shape == (624,) and type(position) is int and 0 <= position <= 624):  # NumPy would read on beyond
        raise ValueError("the state of NumPy's generator is none")
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, *rest))
    version_, internal, gauss = snapshot["python"]
    random.setstate((version_, tuple(internal), gauss))
