"""Runs that are stopped within an epoch go on to the bits of one that was left alone."""

from __future__ import annotations

import math
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

import pyrovae as pv
from pyrovae import runs
from pyrovae.errors import DataError
from pyrovae.train import monitor, within
from tests.training import Killed, rows

GREY = torch.rand(53, 6, generator=torch.Generator().manual_seed(0))


class Bits(Dataset[Tensor]):
    """Draws its own bits, wherever it is."""

    def __len__(self) -> int:
        return len(GREY)

    def __getitem__(self, i: int) -> Tensor:
        return torch.bernoulli(GREY[i])


class Shuffled(IterableDataset[Tensor]):
    """In an order that it draws as it goes, and bits too; each worker has its share."""

    def __iter__(self) -> Iterator[Tensor]:
        info = get_worker_info()
        share = GREY if info is None else GREY[info.id :: info.num_workers]
        return (torch.bernoulli(share[i]) for i in torch.randperm(len(share)))


class Marked(IterableDataset[Tensor]):
    """Says where it is, and goes there without a look at what is before."""

    row, version = 0, 1

    def __iter__(self) -> Iterator[Tensor]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        while (i := first + self.row * step) < len(GREY):
            self.row += 1
            yield GREY[i].round()
        self.row = 0

    def state_dict(self) -> dict[str, Any]:
        return {"row": self.row, "version": self.version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["version"] != self.version:
            raise ValueError(f"version {state['version']}")
        self.row = state["row"]


DATA: dict[str, Callable[[], object]] = {
    "held": lambda: pv.data.Images(GREY, binarization="dynamic"),
    "rows": Bits,
    "rows by two workers": lambda: DataLoader(Bits(), 8, shuffle=True, num_workers=2),
    "rows in an order of their own": lambda: DataLoader(
        Bits(), 8, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "stream": lambda: DataLoader(Shuffled(), 8),
    "stream by two workers": lambda: DataLoader(Shuffled(), 8, num_workers=2),
    "stateful": lambda: StatefulDataLoader(Marked(), 8, num_workers=2),
    "stateful rows": lambda: StatefulDataLoader(Bits(), 8, shuffle=True, generator=torch.Generator().manual_seed(3)),
}
OPTIONS: dict[str, Any] = {
    "objective": pv.IWAE(2), "epochs": 3, "batch_size": 8, "schedule": "cosine", "kl_warmup": 2, "lr": 1e-2,
    "validation": GREY.round(), "num_workers": 0,
}  # fmt: skip


def trained(data: object, **options: Any) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    torch.manual_seed(0)
    pair = pv.models.VAE((6,), latent_dim=2, hidden=(5,))
    result = pv.fit(pair.model, pair.guide, data, **OPTIONS | options)
    return rows(result.history), {name: t.clone() for name, t in pair.state_dict().items()}


def same(one: Any, other: Any) -> bool:
    return one[0] == other[0] and all(torch.equal(t, other[1][name]) for name, t in one[1].items())


@pytest.fixture(autouse=True)
def signals_are_heard() -> Iterator[None]:
    """Also where whoever started the tests has them ignored, as a shell does in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every step."""
    monkeypatch.setattr(within, "FIRST", 0.0)
    monkeypatch.setattr(runs.Run, "due", property(lambda self: True))
    monkeypatch.setattr("pyrovae.compile.steps.AT_ONCE", 1)


def killed(folder: Path, at: int, run: Callable[[], object]) -> None:
    """Run, and die right after the checkpoint number ``at``."""
    save, saved = runs.Run.save, []

    def dying(self: runs.Run, name: str, *given: Any) -> None:
        save(self, name, *given)
        saved.append(name)
        if saved.count("last") == at:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Run, "save", dying)
        with pytest.raises(Killed):
            run()


@pytest.mark.parametrize(("kind", "compile"), [*((kind, False) for kind in DATA), ("held", True), ("stream", True)])
def test_to_the_same_bits(tmp_path: Path, often: None, kind: str, compile: bool) -> None:
    """Wherever in an epoch: in the first, in one that begins elsewhere, and again in what was left of it."""
    make = partial(trained, run_dir=tmp_path, resume=True, compile=compile)
    whole = trained(DATA[kind](), compile=compile)
    for at in (7,) if compile else (2, 8 if "two" in kind or kind == "stateful" else 7):
        killed(tmp_path, at, lambda: make(DATA[kind]()))
        assert runs.Run(tmp_path).state()["within"] is not None
    assert same(make(DATA[kind]()), whole)


@pytest.mark.parametrize(("workers", "at"), [(1, 7), (1, 8), (2, 7), (2, 8), (2, 9)])
def test_at_the_end_of_an_epoch(tmp_path: Path, often: None, workers: int, at: int) -> None:
    """After the last batch of a worker, of which torchdata says as of one that has not begun, and between epochs."""
    make = partial(StatefulDataLoader, Marked(), 8, num_workers=workers)
    killed(tmp_path, at, lambda: trained(make(), run_dir=tmp_path))
    assert same(trained(make(), run_dir=tmp_path, resume=True), trained(make()))


class Stopping(Bits):
    """Sends a signal to its process where it is asked for a datum for so many times."""

    def __init__(self, at: int, number: int) -> None:
        self.left, self.number = at, number

    def __getitem__(self, i: int) -> Tensor:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), self.number)
        return super().__getitem__(i)


def process(run: Callable[[], object]) -> int:
    """The exit code of a process of its own."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        run()
        code = 0
    except KeyboardInterrupt:
        code = 130
    finally:
        os._exit(code)


def test_a_signal_saves_and_then_does_what_it_does(tmp_path: Path) -> None:
    """No step is lost that was taken before it."""
    whole, run = trained(Bits()), runs.Run(tmp_path)

    def go_on(at: int, number: int) -> int:
        return process(lambda: trained(Stopping(at, number), run_dir=tmp_path, resume=True))

    assert go_on(8 + len(GREY) + 10, signal.SIGTERM) == -signal.SIGTERM  # 8 are looked at first
    assert (run.state()["epoch"], run.state()["within"]["steps"]) == (1, 2)
    assert go_on(8 + 10, signal.SIGINT) == 130
    assert (run.state()["epoch"], run.state()["within"]["steps"]) == (1, 4)
    assert same(trained(Bits(), run_dir=tmp_path, resume=True), whole)


class Grouped(Marked):
    """Sends a signal to all processes of the group that waits for the last of its rows."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self) -> Iterator[Tensor]:
        for i, row in enumerate(super().__iter__()):
            if i == len(GREY) - 1:
                time.sleep(0.3)
                os.killpg(os.getpgid(os.getppid()), self.number)
            yield row


@pytest.mark.parametrize(
    ("kind", "number", "method"),
    [
        (DataLoader, signal.SIGTERM, "spawn"),
        (StatefulDataLoader, signal.SIGTERM, "fork"),
        (StatefulDataLoader, signal.SIGINT, "fork"),
    ],
)
def test_a_signal_to_workers_too(tmp_path: Path, kind: type[DataLoader[Tensor]], number: int, method: str) -> None:
    """They live on until the process that asks them has left."""

    def run() -> None:
        os.setpgrp()
        own: dict[str, Any] = {"num_workers": 1, "prefetch_factor": 1, "multiprocessing_context": method}
        trained(kind(Grouped(number), 8, **own), run_dir=tmp_path)

    whole = trained(kind(Marked(), 8, num_workers=1))
    assert process(run) == {signal.SIGTERM: -signal.SIGTERM, signal.SIGINT: 130}[number]
    assert 0 < runs.Run(tmp_path).state()["within"]["data"] <= len(GREY)
    assert same(trained(kind(Marked(), 8, num_workers=1), run_dir=tmp_path, resume=True), whole)


def test_a_signal_while_an_epoch_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes at once, and nothing of the epoch is lost."""
    measured, whole = monitor.Validation.__call__, trained(DATA["rows"]())
    with monkeypatch.context() as patch:
        patch.setattr(monitor.Validation, "__call__", lambda self: signal.raise_signal(signal.SIGINT) or measured(self))
        with pytest.raises(KeyboardInterrupt):
            trained(DATA["rows"](), run_dir=tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    state = runs.Run(tmp_path).state()
    assert (state["epoch"], state["within"]["data"]) == (0, len(GREY))
    assert same(trained(DATA["rows"](), run_dir=tmp_path, resume=True), whole)


def test_a_signal_that_a_program_goes_on_after(tmp_path: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        source = [*GREY.round()]
        loader = DataLoader(source, 8, collate_fn=lambda r: signal.raise_signal(signal.SIGTERM) or torch.stack(r))
        history, _ = trained(loader, run_dir=tmp_path, epochs=2)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(history) == 2
    assert len(heard) >= 2 * 7


# --- data that are not found again -----------------------------------------------------------------


class Counting(IterableDataset[Tensor]):
    """So many rows from a first one on."""

    def __init__(self, first: int = 0, size: int = 53) -> None:
        self.first, self.size = first, size

    def __iter__(self) -> Iterator[Tensor]:
        return iter(GREY.round()[self.first : self.first + self.size])


class Own(torch.utils.data.Sampler[int]):
    """An order that is another one each time."""

    orders = torch.Generator().manual_seed(0)

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(len(GREY), generator=Own.orders).tolist())


def stopped(folder: Path, data: object, at: int = 3) -> None:
    killed(folder, at, lambda: trained(data, run_dir=folder, resume=True))


LOST: dict[str, tuple[Callable[[], object], Callable[[], object], str]] = {
    "shorter": (Counting, lambda: Counting(size=15), "the data end before batch 3 of the epoch"),
    "another": (Counting, lambda: Counting(first=1), "batch 3 of the epoch is another than before the run was stopped"),
    "another order": (lambda: DataLoader(Bits(), 8, sampler=Own()),) * 2 + ("batch 3 of the epoch is another",),
    "more workers": (
        lambda: DataLoader(Shuffled(), 8, num_workers=1), lambda: DataLoader(Shuffled(), 8, num_workers=2),
        "a stream that 1 workers read is none for 2: pass num_workers=1",
    ),
    "another kind": (
        lambda: GREY.round(), lambda: DataLoader(TensorDataset(GREY.round()), 8),
        "data that are in memory, these are read by their indices",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("before", "after", "says"), LOST.values(), ids=LOST)
def test_what_is_not_found_again_is_refused(
    tmp_path: Path, often: None, before: Callable[[], object], after: Callable[[], object], says: str
) -> None:
    stopped(tmp_path, before())
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(DataError, match=says):
        trained(after(), run_dir=tmp_path, resume=True, override=says.startswith("the data end"))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files


def test_other_data_are_taken_knowingly(tmp_path: Path, often: None) -> None:
    stopped(tmp_path, Counting())
    with pytest.warns(UserWarning, match="batch 3 of the epoch is another"):
        history, _ = trained(Counting(first=1), run_dir=tmp_path, resume=True, override=True)
    assert [row["steps"] for row in history] == [7, 7, 7]


def test_an_epoch_of_data_in_memory_that_changed_begins_anew(tmp_path: Path, often: None) -> None:
    stopped(tmp_path, GREY.round())
    with pytest.warns(UserWarning, match="the data of .* changed"):
        history, _ = trained(GREY[:40].round(), run_dir=tmp_path, resume=True, override=True)
    assert [row["steps"] for row in history] == [5, 5, 5]


def test_workers_may_change_where_data_are_read_by_their_indices(tmp_path: Path, often: None) -> None:
    """What a worker draws for a batch is the same, whichever it is."""
    make = lambda workers: DataLoader(Bits(), 8, shuffle=True, num_workers=workers)  # noqa: E731
    whole = trained(make(1))
    stopped(tmp_path, make(1), 4)
    assert same(trained(make(2), run_dir=tmp_path, resume=True), whole)


def test_fewer_epochs_than_were_begun(tmp_path: Path, often: None) -> None:
    stopped(tmp_path, Counting(), 10)
    with pytest.raises(ValueError, match="has begun 2 epochs, got epochs=1: pass 2 or more"):
        trained(Counting(), run_dir=tmp_path, resume=True, epochs=1)


class Newer(Marked):
    version = 2


class Odd(Marked):
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"odd": object()}


def test_the_state_of_another_version_is_refused(tmp_path: Path, often: None) -> None:
    stopped(tmp_path, StatefulDataLoader(Marked(), 8))
    with pytest.raises(DataError, match=r"StatefulDataLoader does not take up the state that it gave \(version 1\)"):
        trained(StatefulDataLoader(Newer(), 8), run_dir=tmp_path, resume=True)


def test_a_state_that_no_checkpoint_holds(tmp_path: Path, often: None) -> None:
    """It is said once; then it is as if nothing were said."""
    whole = trained(StatefulDataLoader(Odd(), 8, num_workers=1))
    with pytest.warns(UserWarning, match="has more than tensors") as seen:
        stopped(tmp_path, StatefulDataLoader(Odd(), 8, num_workers=1), 10)
    assert sum("has more than tensors" in str(w.message) for w in seen) == 1
    with pytest.warns(UserWarning, match="has more than tensors"):
        assert same(trained(StatefulDataLoader(Odd(), 8, num_workers=1), run_dir=tmp_path, resume=True), whole)


# --- more data than memory -------------------------------------------------------------------------

ALLOWED, FLOATS, BATCH = 2**27, 2**16, 10  # bytes that a process may take, floats of a row, rows of a batch
ROWS = 10 * ALLOWED // (4 * FLOATS)


class Large(IterableDataset[Tensor]):
    """Ten times as much as a process may hold; in the middle it may be stopped."""

    def __init__(self, stops: bool = False) -> None:
        self.stops = stops

    def __iter__(self) -> Iterator[Tensor]:
        for i in range(ROWS):
            if self.stops and i == ROWS // 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield torch.full((FLOATS,), math.sin(i))


def train_large(folder: Path, data: Large) -> None:
    """A job in little memory: what this process has, and :data:`ALLOWED` besides."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + ALLOWED,) * 2)
    torch.manual_seed(0)
    pair = pv.models.VAE((FLOATS,), latent_dim=1, hidden=(2,), likelihood="gaussian", scale=1.0)
    pv.fit(
        pair.model, pair.guide, data, objective=pv.ELBO(), epochs=1, batch_size=BATCH, num_workers=0, compile=False,
        run_dir=folder, resume=True,
    )  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux says how much a process has")
def test_a_stream_of_ten_times_the_memory(tmp_path: Path) -> None:
    assert process(partial(train_large, tmp_path / "whole", Large())) == 0
    assert process(partial(train_large, tmp_path / "cut", Large(stops=True))) == -signal.SIGTERM
    assert runs.Run(tmp_path / "cut").state()["within"]["data"] == ROWS // 2 // BATCH * BATCH + BATCH
    assert process(partial(train_large, tmp_path / "cut", Large())) == 0
    whole, resumed = (runs.Run(tmp_path / name).weights() for name in ("whole", "cut"))
    assert all(torch.equal(t, resumed[name]) for name, t in whole.items())
    assert process(lambda: train_large(tmp_path / "held", torch.zeros(ROWS, FLOATS))) == 1, "it does not fit"
