"""Data sets, loaders, and what feeds a device with their batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, StackDataset, Subset, TensorDataset

from pyrovae.arguments import positive_int
from pyrovae.data.arrays import NUMBER_THEM, as_tensor, is_integer
from pyrovae.data.fingerprint import fingerprint, held
from pyrovae.data.images import Images
from pyrovae.data.loaders import from_workers, in_order, length, loader_of, refuse_one_pass, same_each_time
from pyrovae.data.streams import Indexed, Order, Share, Stream, stream_of
from pyrovae.engine.convert import Taken, exactly, listed
from pyrovae.engine.observed import Observed
from pyrovae.engine.programs import Batch, cut, leaves, rows
from pyrovae.engine.support import rows_at_a_time
from pyrovae.errors import DataError

Source = Images | Dataset[Any] | DataLoader[Any]


@contextmanager
def numbered(images: Images | None) -> Iterator[None]:
    """Say of a datum of a subset, as a part of a file, that is refused meanwhile which one it is of the whole."""
    try:
        yield
    except DataError as error:
        if images is None or images.places is None or error.datum is None or error.datum >= len(images):
            raise
        number = int(images.places[error.datum])
        raise DataError(f"{error} (from 0, data[{error.datum}] is number {number} of {images.name!r})") from None


def as_dataset(data: object, *, name: str = "data", raw: bool = False) -> Source:
    """Bring what a user passes as data into one of three forms: Images, another Dataset, or a DataLoader.

    A tensor ``[N, ...]``, a tuple ``(x, y)`` of tensors, and a TensorDataset of one or two become :class:`Images` with
    ``y`` as labels (a TensorDataset, where ``y`` is not a vector of integers or there are more than two). Integers
    and booleans become the default float type, unscaled; so do the values of NumPy arrays and of lists of numbers. A
    dict of tensors becomes a StackDataset, whose batches are dicts. The rest is returned as it is.

    :param raw: keep integers as they are, and NaN, as :class:`Images` does with ``raw=True``.
    :raises DataError: as :class:`Images`; arrays of objects; lengths that differ.
    :raises TypeError: anything else.

    >>> as_dataset((torch.rand(10, 3), torch.arange(10)))
    Images('data', 10 of [3], float32, binarization='none', labelled, cpu)
    """
    if isinstance(data, Subset) and isinstance(data.dataset, Images):
        return data.dataset.subset(data.indices)
    if type(data) is TensorDataset:
        data = data.tensors
    if isinstance(data, (Dataset, DataLoader)):
        return data
    if isinstance(data, Mapping):
        named: Any = exactly(data)
        if named and all(isinstance(column, Tensor) and column.dim() for column in named.values()):
            refuse_lengths(named.values(), name)
            return StackDataset(**named)
    columns = [listed(column) for column in (data if isinstance(data, tuple) else (data,))]
    arrays = [column for column in columns if isinstance(column, (Tensor, np.ndarray))]
    if not arrays or len(arrays) < len(columns):
        kinds = " of ".join(dict.fromkeys([type(data).__name__, *(type(c).__name__ for c in columns[-1:])]))
        raise TypeError(
            "data must be a tensor, an array, a tuple of those, Images, a Dataset or a DataLoader, "
            f"received {kinds}: {conversion(data)}"
        )
    x, *rest = (as_tensor(array, name) for array in arrays)
    refuse_lengths((x, *rest), name)
    labels = rest[0] if len(rest) == 1 and rest[0].dim() == 1 and is_integer(rest[0]) else None
    images = Images(x, labels, name=name, raw=raw)
    return TensorDataset(images.x, *rest) if rest and labels is None else images


def refuse_lengths(columns: Iterable[Tensor], name: str) -> None:
    """Refuse tensors of which some have other lengths than others."""
    if len({c.shape[:1] for c in columns}) > 1:
        lengths = ", ".join(str(list(c.shape)) for c in columns)
        raise DataError(f"the tensors of {name!r} must have one length, received shapes {lengths}: make them equal")


def conversion(data: object) -> str:
    """How something becomes data."""
    if isinstance(data, str):
        return f"read it, pyrovae.data.load({data!r}).train"
    if isinstance(data, Mapping):
        return "let its columns be tensors or arrays of numbers of one length, for batches that are dicts of them"
    if isinstance(data, Iterator):
        return "it ends after one epoch; collect it, torch.cat(list(data)), or write an IterableDataset"
    if isinstance(data, tuple) and any(
        isinstance(v, str) for column in data if isinstance(column, list) for v in column
    ):
        return NUMBER_THEM
    return "pass its part .train" if hasattr(data, "train") else "convert it, for instance with torch.stack"


def batches(
    args: Sequence[object], batch_size: int | None = None, *, seed: int = 0, device: torch.device | None = None
) -> Iterator[Batch]:
    """What an evaluation passes to the programs, batch by batch, in order.

    One Dataset or DataLoader is batched (by 100, unless ``batch_size`` says otherwise) and moved to ``device``; a
    dynamic set is drawn once, by ``seed``. Tensors go whole, or are cut along their first axis into ``batch_size``,
    those within dicts, lists and tuples too.

    >>> [x.shape[0] for (x,) in batches((torch.zeros(5, 2),), batch_size=2)]
    [2, 2, 1]
    """
    if len(args) == 1 and isinstance(args[0], Dataset | DataLoader):
        source, size = as_dataset(args[0], raw=True), batch_size or 100
        loader = in_order(source) if isinstance(source, DataLoader) else DataLoader(source, batch_size=size)
        given: Iterable[object] = from_workers(loader)
        if isinstance(source, Images):
            fixed = source.fixed(seed)
            given = map(fixed.batch, torch.arange(len(fixed), device=fixed.x.device).split(size))
        yield from (as_batch(batch, device) for batch in given)
    elif batch_size is None:
        yield tuple(args)
    else:
        whole = as_batch(tuple(args))
        for i in range(0, rows(whole), batch_size):
            yield cut(whole, slice(i, i + batch_size))


def as_batch(batch: object, device: torch.device | None = None, *, non_blocking: bool = False) -> Batch:
    """What a data set gives, as arguments of the programs, its tensors on the device if one is named.

    A mapping is one argument, and a dict whatever it was.
    """
    given = batch if isinstance(batch, tuple | list) else (batch,)
    arguments = tuple(dict(a) if isinstance(a, Mapping) else a for a in given)
    if device is None:
        return arguments
    move = partial(Tensor.to, device=device, non_blocking=non_blocking)
    return tuple(move(a) if isinstance(a, Tensor) else tree_map_only(Tensor, move, a) for a in arguments)


def number_in(feed: Feed, batch: Batch) -> int:
    """How many data the batch has that was given last, of which this process may have read its rows alone."""
    return feed.source.whole or rows(batch)


def keep_order(feed: Feed, share: Share | None = None) -> None:
    """Let a loader give all data in the order of their data set from now on, to an evaluation.

    :param share: of a batch, where this process may read its own rows alone.
    """
    if feed.loader is not None:
        feed.source = stream_of(in_order(feed.loader))
        if share is not None and isinstance(feed.source, Indexed):
            feed.source.read_own(share)


class Feed:
    """Batches of a data set, as tuples of tensors on ``device``; of ``()``, one batch of no arguments.

    Data held in tensors live on the device if they fill at most half of its free memory; everything else streams
    through a DataLoader. The order comes from torch's global generator. ``size`` and ``steps``, the numbers of data and
    of batches, are None where they are not known.
    """

    def __init__(self, data: object, batch_size: int, device: torch.device, num_workers: int | None = None) -> None:
        if num_workers is not None:
            positive_int("num_workers", num_workers, minimum=0)
        one_empty: Any = [()]
        none = isinstance(data, tuple) and not data
        source = DataLoader(one_empty, batch_size=None) if none else as_dataset(exactly(data), raw=True)
        self.device, self.batch_size = device, batch_size
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
        self.images = source.to(device) if isinstance(source, Images) and source.x.nbytes <= free / 2 else None
        self.loader: DataLoader[Any] | None = None
        if self.images is None:
            if length(source) == 0:
                dropped = isinstance(source, DataLoader) and length(source.dataset)
                fix = "pass a DataLoader that does not drop its only batch" if dropped else "pass at least one datum"
                raise DataError(f"there are no data to train on: {fix}")
            refuse_one_pass(source)
            self.loader = (
                source if isinstance(source, DataLoader) else loader_of(source, batch_size, device, num_workers)
            )
        self.source: Order | Stream = (
            Order(len(self.images), batch_size) if self.images is not None else stream_of(self.loader)  # type: ignore[arg-type]
        )
        self._first: Batch | None = None
        self.observed: Observed | None = None
        self.unseen, self.taken = False, Taken()
        self.others = self.loader is not None and not same_each_time(self.loader)
        self.index: Tensor | None = None  # of the batch given last, where it is known
        self.size = length(self.images if self.loader is None else self.loader.dataset)
        self.steps = length(range(0, len(self.images), batch_size) if self.images is not None else self.loader)

    @cached_property
    def fingerprint(self) -> str | None:
        """What the data hold, in a line (:func:`pyrovae.data.fingerprint.fingerprint`); None where no tensors do."""
        columns = held(self.loader if self.images is None else self.images)
        return fingerprint(*columns) if columns else None

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, ahead: Callable[[Tensor], int] | None = None) -> Iterator[Batch]:
        """An epoch of batches; of data held here all but those that ``ahead`` takes, as it does of :meth:`indices`."""
        if self.images is None:
            yield from self.watched(from_workers(self.source.begin()))
        else:
            yield from (as_batch(self.images.batch(index)) for (index,) in self.indices(ahead))

    def indices(self, ahead: Callable[[Tensor], int] | None = None) -> Iterator[tuple[Tensor]]:
        """An epoch of data held here, as indices of batches in a new order; ``ahead`` says how many it takes first."""
        assert isinstance(self.source, Order)
        order = self.source.begin().to(self.device, non_blocking=True)
        while len(order := order[ahead(order) if ahead else 0 :]):
            self.index, order = order[: self.batch_size], order[self.batch_size :]
            yield (self.index,)

    @property
    def last(self) -> int | None:
        """How many data an epoch's last batch has, where that is known."""
        if self.loader is None:
            return (len(self.images) - 1) % self.batch_size + 1  # type: ignore[arg-type]
        number, size = length(self.loader.sampler), self.loader.batch_size
        return None if not number or size is None or self.loader.drop_last else (number - 1) % size + 1

    def first(self, count: int | None = None) -> Batch:
        """The first data, ``count`` of them where they can be counted out (else one batch), on the device.

        A dynamic set is drawn once here, to the same bits every time.
        """
        if self.images is not None:
            index = torch.arange(min(count or self.batch_size, len(self.images)), device=self.device)
            return self.images.subset(index).fixed().columns
        if self._first is None:
            assert isinstance(self.source, Stream)
            batch = next(from_workers(self.source.peek()), None)
            if batch is None:
                raise DataError("there are no data to train on: the DataLoader is empty")
            moved = as_batch(batch, self.device, non_blocking=True)
            if moved and not any(isinstance(a, Tensor) for a in leaves(moved)):
                kind = type(batch).__name__
                raise TypeError(
                    f"batches must be tensors [B, ...], or tuples that hold some, got a {kind}: convert them"
                )
            self._first = self.taken(moved)
        return self._first

    def take(self, taken: Taken) -> None:
        """Give batches as the programs take them from now on."""
        self.taken, self._first = taken, None if self._first is None else taken(self._first)
        if self.images is not None:
            self.images = self.images.matched(taken)

    def watch(self, observed: Observed) -> None:
        """Check all data by what a pair was seen to observe: those held here at once, others as they come."""
        if self.observed is not None:
            return
        self.observed, self.unseen = observed, self.images is None
        if self.images is None:
            return
        # Bits that are drawn anew are all like those that were seen.
        drawn = self.images.binarization == "dynamic" and {c and c.position for c in observed.columns} == {0}
        piece = rows_at_a_time(self.images.x)
        number = 0 if drawn else len(self.images)
        for start in range(0, number, piece):
            end = min(start + piece, number)
            if observed.fine(tuple(c[start:end] for c in self.images.columns)):
                continue
            for first in range(start - start % self.batch_size, end, self.batch_size):
                observed(self.images.subset(slice(first, first + self.batch_size)).fixed().columns, first)

    def watched(self, loaded: Iterable[object]) -> Iterator[Batch]:
        """What a loader gives as batches on the device, each checked, on the CPU if it is there.

        In later epochs these are the same data where tensors hold them; of others the arguments are looked at again.
        """
        first, doubtful = 0, torch.zeros((), dtype=torch.bool)
        for given in loaded:
            arguments = as_batch(given)
            batch = self.taken(as_batch(arguments, self.device, non_blocking=True))
            if (self.unseen or self.others) and self.observed is not None:
                fine = self.observed.fine(arguments)
                if fine is not None and not fine.is_cpu:  # read at the end: here it would wait for the device
                    doubtful = doubtful.to(fine.device) | ~fine
                elif not (fine or (fine is None and not self.unseen)):
                    self.refuse(batch, first)
                first += number_in(self, batch)
            yield batch
        if doubtful:
            self.refuse()
        self.unseen = False

    def refuse(self, batch: Batch = (), first: int = 0) -> None:
        """Refuse a batch that is bad indeed; of data that come in another order, by its place in the data set."""
        assert self.observed is not None
        assert self.loader is not None
        found: DataError | None = None
        try:
            if batch:
                self.observed(batch, first)
                return
        except DataError as error:
            if (ordered := in_order(self.loader)) is self.loader and self.source.whole is None:
                raise
            found = error
        place = 0
        for given in ordered if batch else in_order(self.loader):
            batch = self.taken(as_batch(given, self.device))
            self.observed(batch, place)
            place += rows(batch)
        if found is not None:  # the data set gave something else this time
            raise found
