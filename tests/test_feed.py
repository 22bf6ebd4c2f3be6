"""The feed: every datum once per epoch, in an order that follows the generator, whatever the data come in."""

import multiprocessing

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from pyrovae.data import Images
from pyrovae.data.feed import Feed
from pyrovae.engine.observed import Observed
from pyrovae.engine.programs import nothing
from pyrovae.engine.sites import record
from pyrovae.errors import DataError
from tests.state import refused

CPU = torch.device("cpu")
X = torch.arange(10.0).unsqueeze(1)
Y = torch.arange(10)


class Squares(Dataset):
    """A data set of its own kind: no tensors held."""

    def __init__(self, size=10):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        if not 0 <= i < self.size:
            raise IndexError(i)
        return torch.tensor([float(i)])


class Stream(IterableDataset):
    def __init__(self, size=10):
        self.size = size

    def __iter__(self):
        return (torch.tensor([float(i)]) for i in range(self.size))


SOURCES = {
    "tensor": lambda: X,
    "array": lambda: X.numpy(),
    "tuple": lambda: (X, Y),
    "Images": lambda: Images(X),
    "TensorDataset": lambda: TensorDataset(X),
    "TensorDataset of three": lambda: TensorDataset(X, X, X),
    "Subset": lambda: Subset(Images(X), range(10)),
    "Dataset": Squares,
    "IterableDataset": Stream,
    "DataLoader": lambda: DataLoader(Squares(), batch_size=4, shuffle=True),
    "DataLoader of a stream": lambda: DataLoader(Stream(), batch_size=4),
}


@pytest.mark.parametrize(
    ("name", "workers"), [*((name, 0) for name in SOURCES), ("Dataset", 1), ("Dataset", 2), ("IterableDataset", 1)]
)
def test_every_datum_once_per_epoch(name, workers):
    feed = Feed(SOURCES[name](), 4, CPU, workers)
    for _ in range(2):
        batches = list(feed)
        assert [len(b[0]) for b in batches] == [4, 4, 2]
        assert sorted(torch.cat([b[0] for b in batches]).flatten().tolist()) == list(range(10))
        assert all(torch.equal(b[1].flatten().long(), b[0].flatten().long()) for b in batches if len(b) > 1)
    if feed.steps is not None:
        assert feed.steps == 3


def test_a_stream_has_no_size_and_is_not_delivered_once_per_worker(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr(DataLoader, "check_worker_number_rationality", lambda self: None)
    feed = Feed(Stream(), 4, CPU)
    assert feed.size is None
    assert feed.loader.num_workers == 1
    assert Feed(Squares(), 4, CPU).loader.num_workers == 4
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # as in a pool of processes
    assert Feed(Squares(), 4, CPU).loader.num_workers == 0


@pytest.mark.parametrize("name", ["tensor", "Dataset", "DataLoader"])
def test_the_order_follows_the_generator(name):
    def epochs(seed):
        torch.manual_seed(seed)
        feed = Feed(SOURCES[name](), 4, CPU, 0)
        return [torch.cat([b[0] for b in feed]).flatten().tolist() for _ in range(2)]

    first, second = epochs(1)
    assert epochs(1) == [first, second]
    assert first != second
    assert epochs(2)[0] != first


def test_dynamic_bits_are_drawn_anew_but_first_is_always_the_same():
    feed = Feed(Images(torch.full((1000, 1), 0.5), binarization="dynamic"), 1000, CPU)
    (a,), (b,) = next(iter(feed)), next(iter(feed))
    assert {a.unique().numel(), b.unique().numel()} == {2}
    # Two draws of 1000 fair bits agree everywhere with probability 2^-1000.
    assert not torch.equal(a, b)
    assert torch.equal(feed.first()[0], feed.first()[0])


@pytest.mark.parametrize(("name", "count", "expected"), [("tensor", None, 4), ("tensor", 7, 7), ("tensor", 99, 10)])
def test_first_counts_out_what_is_held(name, count, expected):
    feed = Feed(SOURCES[name](), 4, CPU)
    assert feed.first(count)[0].flatten().tolist() == list(range(expected))


def test_first_reads_a_loader_once():
    class Counting(Squares):
        starts = 0

        def __getitem__(self, i):
            type(self).starts += i == 0
            return super().__getitem__(i)

    feed = Feed(DataLoader(Counting(), batch_size=10), 4, CPU)
    assert feed.first() is feed.first(3)
    assert Counting.starts == 1


@pytest.mark.parametrize(
    "data", [X[:0], Squares(0), TensorDataset(X[:0]), DataLoader(Squares(0)), np.zeros((0, 2), dtype=np.float32)]
)
def test_no_data_is_a_data_error(data):
    refused(DataError, "at least one", Feed, data, 4, CPU)


def test_an_empty_stream_is_a_data_error():
    refused(DataError, "no data", Feed(Stream(0), 4, CPU, 0).first)


@pytest.mark.parametrize("item", [{"x": "words"}, "a string"])
def test_batches_that_are_no_tensors_are_refused(item):
    class Odd(Squares):
        def __getitem__(self, i):
            return item

    refused(TypeError, "batches must be tensors", Feed(Odd(), 4, CPU, 0).first)


@pytest.mark.parametrize("data", [["a", 2], [X], "mnist", None, {"x": ["a"] * 10}])
def test_what_is_no_data_is_refused(data):
    refused(TypeError, "data must be", Feed, data, 4, CPU)


def watch(feed, fn):
    """Let a feed be watched by a program that observes a pair of values at ``fn``; what it looked at as a program."""
    looked = []

    def observe(x):
        looked.append(x)
        with pyro.plate("data", len(x)):
            pyro.sample("x", fn.expand([2]).to_event(1), obs=x)

    batch = feed.first()
    feed.watch(Observed(observe, nothing, record(observe, batch, {}), batch))
    return looked[1:]


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize(("row", "value"), [(0, 0.5), (9, 255.0), (3, -1.0)])
def test_every_datum_that_is_held_is_watched_before_training(row, value, rows, monkeypatch):
    monkeypatch.setattr("pyrovae.engine.support.CHUNK_BYTES", {"cpu": rows * 8})
    x = torch.zeros(10, 2)
    x[row, 1] = value
    refused(DataError, rf"data\[{row}, 1\] = {value}", watch, Feed(x, 4, CPU), dist.Bernoulli(0.5))
    assert watch(Feed(x, 4, CPU), dist.Normal(0.0, 1.0)) == []


def test_the_bits_of_a_dynamic_set_are_watched_not_its_grey():
    watch(Feed(Images(torch.full((10, 2), 0.5), binarization="dynamic"), 4, CPU), dist.Bernoulli(0.5))
    with pytest.raises(DataError, match="binarization"):
        watch(Feed(torch.full((10, 2), 0.5), 4, CPU), dist.Bernoulli(0.5))


def test_data_that_stream_are_watched_once_and_named_by_their_place():
    source = TensorDataset(torch.cat([torch.zeros(9, 1), torch.ones(1, 1)]).expand(10, 2).clone(), Y)
    feed = Feed(DataLoader(source, 4, shuffle=True), 4, CPU)
    feed.first(), feed.watch(seen := Counted())
    assert [len(list(feed)), seen.batches] == [3, 3]
    assert [len(list(feed)), seen.batches] == [3, 3]
    source.tensors[0][7, 1] = 0.5
    other = Feed(DataLoader(source, 4, shuffle=True, generator=torch.Generator().manual_seed(0)), 4, CPU)

    def observe(x, y):
        pyro.sample("x", dist.Bernoulli(torch.full_like(x, 0.5)).to_event(2), obs=x)

    batch = torch.zeros(4, 2), Y[:4]
    other.watch(Observed(observe, nothing, record(observe, batch, {}), batch))
    refused(DataError, r"data\[7, 1\] = 0.5", list, other)


class Counted:
    """Finds every batch fine, and counts them."""

    batches = 0

    def fine(self, batch):
        self.batches += 1
        return torch.ones((), dtype=torch.bool)
