"""Where a loader is in its data, and how it is brought there again, to the same bits."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate, get_worker_info

from pyrovae.data.arrays import is_storable
from pyrovae.data.loaders import alike, same_each_time
from pyrovae.engine.programs import warn
from pyrovae.engine.randomness import drawn, host_snapshot, isolated_rng, restore_rng, seed_everything
from pyrovae.errors import DataError
from pyrovae.signals import apart

Doubt = Callable[[str, type[ValueError]], None]  # refuses, or warns a user who goes on knowingly
PLACES = 1_000_003  # in a batch, which have seeds of their own
Share = Callable[[int], slice]  # which of so many rows are this process's
END = object()


class Order:
    """The order of data in memory, drawn anew for each epoch, which is begun, or gone on with from a place in it."""

    whole: int | None = None

    def __init__(self, number: int, batch_size: int) -> None:
        # A batch of everything stays in order: then a guide may hold parameters for each datum, as autoguides do.
        self.epoch, self.number, self.draw = 0, number, torch.arange if number <= batch_size else torch.randperm
        self.began: dict[str, Any] = {}
        self.behind: int | None = None

    def begin(self) -> Tensor:
        """The indices of an epoch's data, or of what is left of them."""
        behind, self.behind = self.behind, None
        if behind is None:
            self.began = host_snapshot()
            return self.draw(self.number)
        with isolated_rng():
            restore_rng(self.began)
            return self.draw(self.number)[behind:]

    def between(self) -> dict[str, Any]:
        """What is to be known between two epochs."""
        return {"kind": "Order"}

    def place(self) -> dict[str, Any]:
        """From where the order of this epoch is found again."""
        return {"kind": "Order", "rng": self.began}

    def resume(self, place: dict[str, Any], behind: int, doubt: Doubt) -> None:
        """Begin next with what is left of an epoch, but for the data behind; with none behind, with an epoch."""
        check_kind(self, place)
        if behind:
            self.began, self.behind = place["rng"], behind


class Stream:
    """The batches of a loader, epoch by epoch; each from its beginning, or from a place in it.

    A loader that says where it is (``state_dict``, as torchdata's does) is asked, and told. Any other is brought to a
    place by reading again what came before it, with the generators as they were when its epoch began. What it draws in
    this process, it draws from seeds of its own, so that it does so again.

    :ivar epoch: its number.
    :ivar given: the batches of the epoch so far.
    :ivar whole: the number of data of the batch of which the last that it gave are rows; None where it gave all.
    """

    whole: int | None = None
    ending = False  # whether a worker came to its end, which torchdata says as if it had not begun

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader, self.epoch, self.given, self.last = loader, 0, 0, END
        self.left: Iterator[object] | None = None  # of an epoch that is begun
        self.told, self.says = False, True
        self.began: dict[str, Any] = {}
        parts = loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
        self.parts = [*parts, getattr(parts[-1], "sampler", None), loader.dataset]
        found = {id(g): g for p in self.parts if isinstance(g := getattr(p, "generator", None), torch.Generator)}
        self.generators = list(found.values())

    def begin(self) -> Iterator[object]:
        """An epoch of batches, or what is left of one."""
        left, self.left = self.left, None
        return self.noted(self.fresh() if left is None else left)

    def fresh(self) -> Iterator[object]:
        """An epoch from its beginning."""
        self.tell_epoch()
        states = [g.get_state() for g in self.generators]
        self.began, self.given = {"rng": host_snapshot(), "generators": states}, 0
        return self.start()

    def peek(self) -> Iterator[object]:
        """The first batch alone, which the epoch still begins with: a stream may not come back to it."""
        left = self.fresh()
        for first in left:
            self.left = chain((first,), left)
            yield first

    def resume(self, place: dict[str, Any], behind: int, doubt: Doubt) -> None:
        """Begin next with what is left of an epoch after a place in it; with no data behind, with an epoch.

        :raises DataError: where the place is not found again.
        """
        check_kind(self, place)
        self.left = None
        if not behind:
            self.set(place["generators"])
            if place["state"] is not None:
                self.tell(place["state"])
            return
        self.tell_epoch()
        self.began, self.given = {name: place[name] for name in ("rng", "generators")}, place["given"]
        self.set(self.began["generators"])
        with isolated_rng():
            restore_rng(self.began["rng"])
            batches = self.start(place)
        if place["last"] not in (None, digest(self.last)):
            doubt(
                f"batch {self.given} of the epoch is another than before the run was stopped: restore the data",
                DataError,
            )
        self.left = batches

    def tell_epoch(self) -> None:
        """Say to what shuffles by the number of the epoch which one begins."""
        for part in self.parts:
            if callable(told := getattr(part, "set_epoch", None)):
                told(self.epoch)

    def set(self, states: Sequence[Tensor]) -> None:
        """Put the loader's own generators where they were."""
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)

    def between(self) -> dict[str, Any]:
        """What is to be known between two epochs."""
        generators = [g.get_state() for g in self.generators]
        return {"kind": type(self).__name__, "generators": generators, "state": self.state()}

    def state(self) -> dict[str, Any] | None:
        """Where the loader says that it is, if it does, and a checkpoint can hold it."""
        told = self.says and not self.ending and hasattr(self.loader, "state_dict")
        said = self.loader.state_dict() if told else None  # type: ignore[attr-defined]
        if not is_storable(said):
            self.says = False
            warn(
                f"what the {type(self.loader).__name__} says of where it is has more than tensors, numbers, text, lists"
                " and dicts, and is not kept: to go on within an epoch, that is read again from its beginning"
            )
        return said if self.says else None

    def place(self) -> dict[str, Any]:
        """Where the loader is, after the batch that it gave last."""
        now = self.between()
        known = {"now": now["generators"], "given": self.given, "workers": self.loader.num_workers}
        return {**now, **self.began, **known, "last": None if now["state"] is not None else digest(self.last)}

    def noted(self, batches: Iterator[object]) -> Iterator[object]:
        """What is given, counted."""
        for batch in batches:
            self.given, self.last = self.given + 1, self.known(batch)
            yield batch

    def known(self, batch: object) -> object:
        """What a batch is known by, if its place is to be found again."""
        return batch

    def start(self, place: dict[str, Any] | None = None) -> Iterator[object]:
        """The batches from a place on."""
        seed, first = int(torch.randint(2**62, ())), 0
        if place is not None and self.loader.num_workers != place["workers"]:
            was, now = place["workers"], self.loader.num_workers
            raise DataError(f"the place in a stream that {was} workers read is none for {now}: pass num_workers={was}")
        if place is not None and place["state"] is not None:
            first = self.given
            self.tell(place["state"])
        self.ending = False
        with isolated_rng(seed):  # how often a loader that was told draws before it begins differs
            batches = self.drawing(self.iterator(), count(seed + first))
        if first and place is not None:
            self.set(place["now"])  # which what was told leaves elsewhere
        for _ in range(self.given - first):
            self.last = next(batches, END)
            refuse_end(self.last, self.given)
        return batches

    def tell(self, state: dict[str, Any]) -> None:
        """Let the loader go to where it said that it was, once it begins."""
        self.loader.load_state_dict(state)  # type: ignore[attr-defined]
        self.told = True

    def iterator(self) -> Iterator[object]:
        """What the loader gives."""
        told, self.told = self.told, False
        try:
            return begun(self.loader)
        except Exception as error:
            if not told:
                raise
            name = type(self.loader).__name__
            raise DataError(
                f"{name} does not take up the state that it gave ({error}): use the version of before"
            ) from error

    def drawing(self, batches: Iterator[object], seeds: Iterator[int]) -> Iterator[object]:
        """What a loader gives; what it draws in this process follows a seed for each batch."""
        for seed in seeds:
            apart: AbstractContextManager[object] = nullcontext() if self.loader.num_workers else isolated_rng(seed)
            with apart:
                batch = next(batches, END)
            self.ending = batch is not END and (self.ending or is_last(batch, self.loader))
            if batch is END:
                return
            yield batch


class Indexed(Stream):
    """The batches of a loader that finds data by their indices: what is before a place is not read again.

    What workers draw for data follows a seed for each, so that neither their number nor the place changes it.

    :ivar share: of a batch's indices, where this process may read its own rows alone.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        super().__init__(loader)
        self.share: Share | None = None
        self.sent: deque[object] = deque()  # indices whose batches did not come yet
        self.order: Iterator[object] = iter(())
        own = {"dataset": Seeded(loader.dataset), "worker_init_fn": Started(loader.worker_init_fn)}
        self.seeded = loader.num_workers > 0 and not same_each_time(loader)
        self.made = alike(loader, **(own if self.seeded else {}), batch_sampler=self)

    def __iter__(self) -> Iterator[object]:
        return self.order

    def peek(self) -> Iterator[object]:
        return self.fresh()

    @property
    def by_rows(self) -> bool:
        """Whether rows of a batch are the same without the others: collated as they are, with seeds of their own."""
        if self.loader.collate_fn is not default_collate or at_once(self.loader.dataset) is not None:
            return False
        return self.loader.num_workers > 0 or not self.draws()

    def draws(self) -> bool:
        """Whether the data that an epoch begins with are drawn in this process."""
        with isolated_rng():
            before = drawn()
            first = self.sent[0] if self.sent else next(iter(self.loader.batch_sampler))  # type: ignore[arg-type]
            for index in first:  # type: ignore[attr-defined]
                self.loader.dataset[index]
            return drawn() != before

    def read_own(self, share: Share) -> None:
        """Read rows of batches alone from now on, where those are the same without the others."""
        self.share = share if self.by_rows else None

    def known(self, batch: object) -> object:
        indices = self.sent.popleft()
        self.whole = len(indices) if self.share and isinstance(indices, list) else None
        return indices

    def start(self, place: dict[str, Any] | None = None) -> Iterator[object]:
        seed, inner = int(torch.randint(2**62, ())) if self.seeded else 0, iter(self.loader.batch_sampler)  # type: ignore[arg-type]
        for _ in range(self.given):
            self.last = next(inner, END)
            refuse_end(self.last, self.given)
        # most samplers draw an order with their first indices: here, not when a worker asks for them
        head = () if self.given or (first := next(inner, END)) is END else (first,)
        self.sent.clear()
        self.order = self.sending(chain(head, inner), seed + self.given)
        return begun(self.made)

    def sending(self, inner: Iterator[Any], seed: int) -> Iterator[object]:
        """Indices as the loader takes them."""
        for number, indices in enumerate(inner):
            self.sent.append(indices)
            own = self.share(len(indices)) if self.share and isinstance(indices, list) else slice(None)
            mine = indices if own == slice(None) else indices[own] or indices[:1]  # of none, one that does not count
            yield (seed + number, own.start or 0, mine) if self.seeded else mine


def refuse_end(batch: object, given: int) -> None:
    """Refuse data that end before the place that is looked for."""
    if batch is END:
        raise DataError(f"the data end before batch {given} of the epoch, up to which the run has come: restore them")


def is_last(batch: object, loader: DataLoader[Any]) -> bool:
    """Whether a worker gave its last batch of an epoch, as its size shows."""
    rows = next((len(t) for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim()), loader.batch_size)
    return loader.num_workers > 0 and loader.batch_size is not None and rows is not None and rows < loader.batch_size


def begun(loader: DataLoader[Any]) -> Iterator[object]:
    """An epoch of a loader, whose workers hear what is sent to them alone."""
    then = loader.worker_init_fn
    loader.worker_init_fn = partial(begin_apart, then)
    try:
        return iter(loader)
    finally:
        loader.worker_init_fn = then


def begin_apart(then: Callable[[int], object] | None, worker: int) -> None:
    """Start a worker in a group of its own, as a loader says."""
    apart()
    if then is not None:
        then(worker)


class Seeded(Dataset[Any]):
    """A data set that gives rows of batches, from a place in one on, by the seed of what it draws for that.

    A data set that reads many data at once has one seed for all of them.
    """

    def __init__(self, data: Dataset[Any]) -> None:
        self.data, self.draws = data, False

    def __getitems__(self, given: tuple[int, int, list[Any]]) -> list[Any]:
        seed, first, indices = given
        if (together := at_once(self.data)) is not None:
            seed_everything(seed)
            return together(indices)
        found: list[Any] = []
        for place, index in enumerate(indices, first):
            if self.draws or not found:
                seed_everything((seed * PLACES + place) % 2**62)
                before = drawn()
            found.append(self.data[index])
            if not self.draws and (place == first or len(found) == len(indices)) and drawn() != before:
                self.draws = True
                if place > first:  # some data draw, though the first does not
                    return self.__getitems__(given)
        return found


def at_once(data: Dataset[Any]) -> Callable[[list[Any]], list[Any]] | None:
    """What reads many data of a set at once, where that has something of the kind; a subset of one that has, too."""
    inner = data
    while type(inner) is Subset:
        inner = inner.dataset
    return getattr(data, "__getitems__", None) if hasattr(inner, "__getitems__") else None


class Started:
    """Starts a worker as a loader says, with the data set that it says."""

    def __init__(self, then: Callable[[int], object] | None) -> None:
        self.then = then

    def __call__(self, worker: int) -> None:
        info = get_worker_info()
        object.__setattr__(info, "dataset", info.dataset.data)  # type: ignore[union-attr]
        if self.then is not None:
            self.then(worker)


def stream_of(loader: DataLoader[Any]) -> Stream:
    """The batches of a loader, in the way in which it is brought to a place in them."""
    plain = type(loader) is DataLoader and loader.batch_sampler is not None
    return Indexed(loader) if plain and not isinstance(loader.dataset, IterableDataset) else Stream(loader)


def check_kind(source: Order | Stream, place: dict[str, Any]) -> None:
    """Refuse a place in data of another kind."""
    kinds = {"Order": "are in memory", "Indexed": "are read by their indices", "Stream": "come in a stream"}
    if place["kind"] != (now := type(source).__name__):
        raise DataError(
            f"the run was stopped within an epoch of data that {kinds.get(place['kind'])}, these {kinds[now]}: pass "
            "them as before"
        )


def digest(content: object) -> str:
    """What a batch, or its indices, are known by."""
    found = hashlib.sha256()
    for leaf in tree_leaves(content):
        if isinstance(leaf, Tensor):
            found.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(leaf if isinstance(leaf, int | float | str) else type(leaf)).encode())
    return found.hexdigest()[:16]
