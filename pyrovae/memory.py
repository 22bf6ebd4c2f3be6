"""Memory: what fits, and what to do when it runs out."""

from __future__ import annotations

import math
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyrovae.errors import ResourceError, is_out_of_memory

T = TypeVar("T")


def free_memory() -> float:
    """Bytes of the machine's memory that this process may still take, infinite where the system does not say.

    The least of what is free, what its control group leaves, and what its own limit (``ulimit -v``) leaves.
    """
    limits = [int(kib) * 1024 for kib in re.findall(r"^MemAvailable: *(\d+)", read("/proc/meminfo"), re.MULTILINE)]
    for folder, most, now in CONTROL_GROUPS:
        limit, used = (read(f"{folder}/{name}").strip() for name in (most, now))
        if limit.isdigit() and used.isdigit():  # of which the pages of files are given back when they are needed
            pages = re.findall(r"^(?:total_)?inactive_file (\d+)", read(f"{folder}/memory.stat"), re.MULTILINE)
            limits.append(int(limit) - int(used) + max(map(int, pages), default=0))
    with suppress(ImportError, ValueError, IndexError):  # a system without such limits
        import resource

        if (own := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
            limits.append(own - int(read("/proc/self/statm").split()[0]) * resource.getpagesize())
    return min(limits, default=math.inf)


CONTROL_GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def read(path: str) -> str:
    """What a file of the system says; nothing where there is none."""
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""


def require_memory(size: float, what: str, advice: str) -> None:
    """Refuse what takes ``size`` bytes of the machine's memory before it is allocated, if there are fewer.

    >>> require_memory(1e18, "10**9 images", "ask for fewer")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    pyrovae.errors.ResourceError: holding 10**9 images takes 931,322,574.6 GiB of memory, ... free: ask for fewer
    """
    if size > (free := free_memory()):
        raise ResourceError(
            f"holding {what} takes {size / 2**30:,.1f} GiB of memory, {free / 2**30:,.1f} GiB are free: {advice}"
        )


@contextmanager
def memory_advice(advice: Callable[[], str]) -> Iterator[None]:
    """Say what to lower where memory runs out; what was asked for is in the error's own words."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        free = ""
        if torch.cuda.is_initialized():
            free = " ({:.1f} of {:.1f} GiB were free)".format(*(b / 2**30 for b in torch.cuda.mem_get_info()))
        raise torch.OutOfMemoryError(f"out of memory{free}: {advice()}. {error}") from error


class Declared(TorchFunctionMode):
    """Refuses a tensor that is made inside, before it is, if memory does not hold it; ``what`` names it.

    It sees tensors whose size is declared, as weights are, and not what torch computes from others.
    """

    def __init__(self, what: str, advice: str) -> None:
        super().__init__()
        self.what, self.advice = what, advice

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> object:
        options = kwargs or {}
        if func in MAKERS and torch.device(options.get("device") or "cpu").type == "cpu":
            shape = options.get("size", args[0] if args and isinstance(args[0], list | tuple) else args)
            size = math.prod(shape) * (options.get("dtype") or torch.get_default_dtype()).itemsize
            if size > LARGE:
                require_memory(size, f"{self.what}, a tensor of shape {list(shape)},", self.advice)
        return func(*args, **options)


MAKERS = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full)
LARGE = 2**26  # bytes of a tensor that is worth asking whether memory holds it
MEMORY = 2 * 2**30  # bytes that one evaluation may take
WORKING_SET = {"cpu": 48 * 2**20, "cuda": 2**30}  # larger passes gain nothing: they leave the caches


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside held at one time; memory counts until no tensor holds it any more."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.over_time: list[int] = []
        self.holders: Counter[int] = Counter()

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            pointer = tensor.untyped_storage().data_ptr() if isinstance(tensor, Tensor) else 0
            if pointer and (pointer in self.holders or pointer not in given):  # not a view of a parameter, say
                size = tensor.untyped_storage().nbytes()
                self.now += 0 if self.holders[pointer] else size
                self.holders[pointer] += 1
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor, self.release, pointer, size)
        self.over_time.append(self.now)
        return out

    def release(self, pointer: int, size: int) -> None:
        self.holders[pointer] -= 1
        if not self.holders[pointer]:
            del self.holders[pointer]
            self.now -= size


def bytes_at_peak(run: Callable[[int], object], size: int) -> float:
    """The most bytes that the tensors of ``run(size)`` hold at one time, extrapolated from runs on 2 and 4.

    What they hold after each operation is linear in the size; the peak need not be, as another operation may have it.

    >>> bytes_at_peak(lambda n: torch.zeros(n, 10) + torch.zeros(1000)[:, None].sum(), 500)
    40004.0
    """
    few = (2, 4) if size > 4 else (size, size)
    held = []
    for n in (few[0], *few):  # a first run also does what is done once
        with PeakBytes() as used:
            run(n)
        held.append(used.over_time)
    _, first, last = held
    if len(first) != len(last):  # which operations there are depends on the data
        first, last = [max(first)], [max(last)]
    return max(b + (size - few[1]) * (b - a) / 2 for a, b in zip(first, last, strict=True))


def fitting_chunk(bytes_per_particle: float, memory: int, batch: Iterable[object], number: int) -> int:
    """The number of particles whose pass takes at most ``memory`` bytes, and no more than a device's caches hold.

    All passes on ``number`` of them are of one size where a few more come out even: a graph is of one size.
    """
    device = next((a.device.type for a in batch if isinstance(a, Tensor)), "cpu")
    budget = min(memory, WORKING_SET.get(device, WORKING_SET["cpu"]))
    few = -(-number // max(1, int(budget / max(bytes_per_particle, 1))))
    passes = next((n for n in range(few, few + few // 3 + 1) if number % n == 0), few)
    return -(-number // passes)


class Passes:
    """Work in passes of at most ``size`` rows, halved wherever memory runs out.

    :param on_halving: called when the size has changed.
    """

    def __init__(self, size: int, on_halving: Callable[[], None]) -> None:
        self.size, self.on_halving = size, on_halving

    def __call__(self, number: int, work: Callable[[int], T]) -> Iterator[T]:
        """What ``work`` gives for as many rows as it is told, ``number`` of them in all."""
        while number:
            size = min(self.size, number)
            try:
                found = [work(size)]
            except RuntimeError as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
                self.size = size // 2
                self.on_halving()
                continue
            number -= size
            yield found.pop()  # held here, it would be in memory throughout the next pass
