"""Processes that work together, on one machine or many: a group of torch.distributed as one object."""

from __future__ import annotations

import os
import platform
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from pyrovae.errors import DataError, ResourceError

__all__ = ["Ranks", "alone", "ranks"]

T = TypeVar("T")

TIMEOUT, ROLL_CALL = "PYROVAE_TIMEOUT", 5  # seconds that a process waits for the others, and for their names
STARTED = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets beside WORLD_SIZE
APART: ContextVar[bool] = ContextVar("APART", default=False)


class ElsewhereError(RuntimeError):
    """Another process failed, and says why; this one ends with it."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that work together; alone it waits for nothing and sends nothing."""

    rank: int = 0
    size: int = 1
    calls: list[int] = field(default_factory=lambda: [0])  # of the roll

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether it is this process that writes and shows."""
        return self.rank == 0

    def share(self, number: int) -> slice:
        """Which of so many rows are this process's: neighbours, and as many as others have, or one more.

        >>> [Ranks(r, 3).share(7) for r in range(3)]
        [slice(0, 3, None), slice(3, 5, None), slice(5, 7, None)]
        """
        each, more = divmod(number, self.size)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over processes, in place."""
        if not self.alone:
            with self.reaching("adding up"):
                if where := self.elsewhere(tensor):
                    moved = tensor.to(where)
                    dist.all_reduce(moved)
                    tensor.copy_(moved)
                else:
                    dist.all_reduce(tensor)
        return tensor

    def gather(self, item: T) -> list[T]:
        """What every process has, in the order of ranks."""
        found: list[T] = [item] * self.size
        if not self.alone:
            with self.reaching("gathering"):
                dist.all_gather_object(found, item)
        return found

    def same(self, item: T) -> T:
        """What the first process has."""
        held = [item]
        if not self.alone:
            with self.reaching("sending"):
                dist.broadcast_object_list(held, src=0)
        return held[0]

    def copy_(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the first one's numbers."""
        if self.alone:
            return
        for tensor, given in zip(tensors, self.same([t.detach().cpu() for t in tensors]), strict=True):
            if not self.first:
                with torch.no_grad():
                    tensor.copy_(given)

    def any(self, found: bool) -> bool:
        """Whether any process found it."""
        return found if self.alone else any(self.gather(found))

    @contextmanager
    def together(self, facts: Mapping[str, object] | None = None) -> Iterator[None]:
        """What each process does without the others: where one fails all do, and so they do where ``facts`` differ.

        :param facts: that must be one in all, by name; they may be filled in inside.
        """
        if self.alone:
            yield
            return
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        said = None if failed is None else f"{type(failed).__name__}: {failed}"
        found = self.gather((said, {name: repr(fact) for name, fact in (facts or {}).items()}))
        if failed is not None:
            failed.__dict__["told"] = said in [words for words, _ in found[: self.rank]]
            raise failed
        for rank, (said, _) in enumerate(found):
            if said is not None:
                raise ElsewhereError(f"process {rank} of {self.size} failed ({said}), and all end with it")
        for name, mine in found[0][1].items():
            for rank, (_, own) in enumerate(found):
                if own.get(name) != mine:
                    raise (DataError if name.endswith("data") else ValueError)(
                        f"processes must work on the same {name}, but process 0 has {mine}, and process {rank} "
                        f"{own.get(name)}: start all with the same arguments, files and versions"
                    )

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Let the first process alone warn."""
        with warnings.catch_warnings():
            if not self.first:
                warnings.simplefilter("ignore")
            yield

    def here(self) -> int:
        """How many of the processes are on this machine."""
        return self.gather(platform.node()).count(platform.node())

    def elsewhere(self, tensor: Tensor) -> torch.device | None:
        """Where a tensor must go to be sent, if not where it is: a group of NCCL alone knows no CPU."""
        only = tensor.device.type == "cpu" and dist.get_backend() == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if only else None

    @contextmanager
    def reaching(self, doing: str) -> Iterator[None]:
        """Say in plain words which processes are missing where the others cannot be reached."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ResourceError(
                f"{self.missing()} while {doing} with the others (waiting ends after {TIMEOUT} seconds): see its own "
                "last words, free what it lacked, and start again with --resume (resume=True)"
            ) from error

    def missing(self) -> str:
        """Which processes do not answer, in words: those that still run have run into the same."""
        self.calls[0] += 1
        try:
            store = dist.distributed_c10d._get_default_store()
            mine = f"pyrovae/{self.calls[0]}/"
            store.set(f"{mine}{self.rank}", "here")
            until, absent = time.monotonic() + ROLL_CALL, []
            for rank in range(self.size):
                with suppress(RuntimeError):
                    store.wait([f"{mine}{rank}"], timedelta(seconds=max(0.1, until - time.monotonic())))
                    continue
                absent.append(rank)
        except RuntimeError:  # the store was in the first process
            absent = [0]
        if not absent:
            return "a process was lost"
        named = ", ".join(map(str, absent))
        return f"process {named} of {self.size} ended or does not answer"


ALONE = Ranks()


def ranks() -> Ranks:
    """The processes that work together: those of an initialised group, or those that torchrun has started.

    :raises ValueError: for a WORLD_SIZE without what else torchrun sets.
    :raises ResourceError: where the others cannot be reached.
    """
    if APART.get() or not dist.is_available():
        return ALONE
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE") or 1) <= 1:
            return ALONE
        begin()
    size = dist.get_world_size()
    return ALONE if size == 1 else Ranks(dist.get_rank(), size)


def begin() -> None:
    """Join the group that the environment describes, on this process's own CUDA device where there are such."""
    size = os.environ["WORLD_SIZE"]
    if lacking := [name for name in STARTED if not os.environ.get(name)]:
        raise ValueError(
            f"WORLD_SIZE={size} says that there are other processes, but {', '.join(lacking)} is not set, by which "
            "they would be found: start with torchrun --nproc-per-node N -m pyrovae train ..., or unset WORLD_SIZE"
        )
    backend, place = "gloo", int(os.environ.get("LOCAL_RANK") or 0)
    if torch.cuda.is_available() and place < torch.cuda.device_count():
        torch.cuda.set_device(place)
        backend = "cpu:gloo,cuda:nccl"
    seconds = float(os.environ.get(TIMEOUT) or 600)
    waits = timedelta(seconds=seconds)
    try:
        store, rank, world = next(rendezvous("env://", timeout=waits))
        dist.init_process_group(
            backend, store=fresh_store(store, rank, world, seconds), rank=rank, world_size=world, timeout=waits
        )
    except (RuntimeError, ValueError) as error:
        raise ResourceError(
            f"the {size} processes did not find each other at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
            f"within {seconds:g} s ({' '.join(str(error).split())[:200]}): start all of them, and let that port through"
        ) from error


def fresh_store(store: dist.Store, rank: int, size: int, seconds: float) -> dist.Store:
    """A store without what former processes have left: those that torchrun starts again get the one that these had.

    Each process says a word of its own, which the first answers with the name that their store has. As a word may be a
    former process's, it answers until all have heard the name.

    :raises RuntimeError: after so many seconds.
    """
    mine, until = uuid.uuid4().hex, time.monotonic() + seconds
    if rank:
        store.set(f"pyrovae/{rank}", mine)
        name = store.get(mine).decode()
        store.set(f"{name}/{rank}", "heard")
        return dist.PrefixStore(name, store)
    absent = list(range(1, size))
    while absent := [other for other in absent if not store.check([f"{mine}/{other}"])]:
        if time.monotonic() > until:
            raise RuntimeError(f"process {', '.join(map(str, absent))} did not come")
        for other in absent:
            if store.check([f"pyrovae/{other}"]):
                store.set(store.get(f"pyrovae/{other}").decode(), mine)
        time.sleep(0.01)
    return dist.PrefixStore(mine, store)


def require_alone(what: str) -> None:
    """Refuse, in a group of several, what does not work together with the others."""
    if not (team := ranks()).alone:
        raise ValueError(
            f"{what}, but there are {team.size} processes: use pyrovae.fit, or let each work by itself inside "
            "pyrovae.ranks.alone()"
        )


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works without the others of its group: what it calls, they need not call.

    >>> with alone():
    ...     ranks().size
    1
    """
    token = APART.set(True)
    try:
        yield
    finally:
        APART.reset(token)
