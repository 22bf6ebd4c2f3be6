"""What processes share of an evaluation: each takes rows of every batch, and all get what came of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor

from pyrovae.compile.rows import Draw, Rows, learn
from pyrovae.data.streams import digest
from pyrovae.engine.probe import Look
from pyrovae.engine.programs import Batch, cut, rows
from pyrovae.ranks import ALONE, ranks

Found = tuple[Tensor, ...]
Run = Callable[[Batch], object]


class Sharing:
    """Rows of batches for this process, with the noise that they have within their batch.

    :param apart: False where what is asked for needs every batch whole; then each process measures all of it.
    """

    def __init__(self, kwargs: Mapping[str, object], *, apart: bool = True) -> None:
        kept = apart and not any(isinstance(a, Tensor) for a in kwargs.values())
        self.ranks = ranks() if kept else ALONE
        self.draws: dict[int, list[Draw]] = {}
        self.totals: dict[int, int] = {}
        self.total, self.own = 0, slice(0, 0)

    def begin(self, seen: Look, batch: Batch) -> None:
        """Take the first batch; where no plate around every site has its rows, none is shared."""
        if seen.layout.sizes[-1:] != [rows(batch)]:
            self.ranks = ALONE

    def __call__(self, batch: Batch, work: Callable[[Batch, int], Found]) -> Found:
        """What ``work`` gives for a batch, from what it gives for parts that begin with some row: data lie last."""
        mine = self.mine(batch)
        if mine is batch:
            return work(batch, 0)
        with self.ranks.together({"data": digest(batch)}):
            found = work(mine, self.own.start)
        return tuple(torch.cat(parts, -1) for parts in zip(*self.ranks.gather(found), strict=True))

    def mine(self, batch: Batch, total: int | None = None) -> Batch:
        """This process's rows of a batch; the batch itself where that is not shared.

        :param total: the number of data of the batch of which these are its rows already.
        """
        self.total = total or rows(batch)
        self.own = self.share(self.total)
        return cut(batch, self.own) if self.parted and total is None else batch

    def share(self, number: int) -> slice:
        """Which of so many data are this process's: all where there are too few to share."""
        return self.ranks.share(number) if number >= self.ranks.size else slice(0, number)

    @property
    def parted(self) -> bool:
        """Whether this process has a part of the batch."""
        return self.own.stop - self.own.start < self.total

    @property
    def graphs(self) -> bool:
        """Whether a graph that was made for so many rows is of batches of this size."""
        return self.totals.setdefault(self.own.stop - self.own.start, self.total) == self.total

    @contextmanager
    def drawing(
        self,
        run: Run,
        batch: Batch,
        particles: int,
        look: Run | None = None,
    ) -> Iterator[None]:
        """Programs inside draw for the whole batch; ``run`` shows what they draw, with so many particles.

        :param look: what they may do besides, at a batch of one datum, say.
        """
        if not self.parted:
            yield
            return
        if particles not in self.draws:
            found = [learn(each, batch)[0] for each in (run, look) if each is not None]
            self.draws[particles] = list(dict.fromkeys(chain.from_iterable(found)))
        with Rows(self.draws[particles], self.total, self.own, particles):
            yield


def shared_rows(number: int, work: Callable[[slice], Tensor]) -> Tensor:
    """What ``work`` gives for so many rows, each process taking some; it draws nothing."""
    team = ranks()
    if team.alone or number < team.size:
        return work(slice(0, number))
    with team.together():
        found = work(team.share(number))
    return torch.cat(team.gather(found))
