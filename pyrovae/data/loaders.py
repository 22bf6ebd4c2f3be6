"""Loaders: how they are made, in which order they give their data, and how they say that they cannot."""

from __future__ import annotations

import multiprocessing
import os
import re
import traceback
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from pyrovae.arguments import one_line
from pyrovae.data.images import Images
from pyrovae.engine.programs import warn
from pyrovae.engine.randomness import isolated_rng
from pyrovae.errors import DataError, ResourceError, is_out_of_memory

COLLATED = os.path.join("torch", "utils", "data", "_utils", "collate.py")  # where rows become a batch


def in_order(loader: DataLoader[Any]) -> DataLoader[Any]:
    """All data of a loader in the order of its data set, batched and collated as it says, but without its sampler.

    A loader that goes over given indices keeps to those, in their order.

    :raises ValueError: where it has a sampler of another kind, by name: what that leaves out is not known.

    >>> loader = DataLoader(torch.arange(5), batch_size=2, shuffle=True, drop_last=True)
    >>> [batch.tolist() for batch in in_order(loader)]
    [[0, 1], [2, 3], [4]]
    """
    data, sampler, size = loader.dataset, loader.sampler, loader.batch_size
    if loader.batch_sampler is not None:
        size, own = getattr(loader.batch_sampler, "batch_size", size), loader.batch_sampler
        sampler = own.sampler if type(own) is BatchSampler else own
    if isinstance(data, IterableDataset):
        ordered = not loader.drop_last
    else:
        ordered = type(sampler) is SequentialSampler and not getattr(loader.batch_sampler, "drop_last", False)
        if isinstance(sampler, SubsetRandomSampler | list | tuple | range):
            data = Subset(data, list(getattr(sampler, "indices", sampler)))
        elif type(sampler) not in (SequentialSampler, RandomSampler, WeightedRandomSampler):
            raise ValueError(
                "an evaluation takes data in the order of their data set, but this loader has a sampler of its own, "
                f"{type(sampler).__name__}: pass the data set itself, or torch.utils.data.Subset(data_set, indices)"
            )
        elif len(sampler) != len(data) or getattr(sampler, "replacement", False):  # type: ignore[arg-type]
            warn(f"an evaluation takes every datum once, in order: the loader's {type(sampler).__name__} is not used")
    if ordered or type(loader).__iter__ is not DataLoader.__iter__:
        return loader
    return alike(loader, dataset=data, batch_size=size)


def alike(loader: DataLoader[Any], **changes: object) -> DataLoader[Any]:
    """A loader that differs from another in its data set, or in how that is batched."""
    names = (
        "dataset", "collate_fn", "num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
        "prefetch_factor", "persistent_workers", "generator",
    )  # fmt: skip
    kept: dict[str, Any] = {name: getattr(loader, name) for name in names}
    return DataLoader(**kept | changes)


def loader_of(source: Dataset[Any], size: int, device: torch.device, workers: int | None) -> DataLoader[Any]:
    """What streams a data set to a device."""
    shuffle = not isinstance(source, IterableDataset)
    most = 4 if shuffle else 1  # several workers would each deliver the whole of a stream
    placed = torch.cuda.is_initialized() and lies_on_a_device(source)
    # A worker cannot read what another process holds there, and a daemon may have none.
    most = 0 if placed or multiprocessing.current_process().daemon else most
    workers = min(most, (os.cpu_count() or 1) - 1) if workers is None else workers
    pinned = device.type == "cuda" and not placed
    return DataLoader(source, size, shuffle=shuffle, num_workers=workers, pin_memory=pinned)


def from_workers(loader: Iterable[object]) -> Iterator[object]:
    """What a loader gives; what fails in its workers is said in one line."""
    try:
        yield from loader
    except Exception as error:
        text = str(error)
        if re.match(r"DataLoader worker \(pid.*\) (exited|is killed)", text):
            raise ResourceError(f"{one_line(text)}: free memory, or pass num_workers=0 to see what ends it") from error
        what = one_line((text.strip("'\\n ").splitlines() or [""])[-1])
        if not is_out_of_memory(error) and COLLATED in text + "".join(traceback.format_tb(error.__traceback__)):
            raise DataError(
                f"rows of the data set do not go into one batch ({what}): let all be tensors of one shape and type, or "
                "pass a DataLoader with a collate_fn"
            ) from error
        if "in DataLoader worker process" not in text:
            raise
        raise type(error)(f"in a worker of the DataLoader: {what}; num_workers=0 shows where") from error


def same_each_time(loader: DataLoader[Any]) -> bool:
    """Whether a loader is known to give the same data in all epochs: from tensors, and put into batches as they are."""
    return type(loader.dataset) in (TensorDataset, Images) and loader.collate_fn is default_collate


def refuse_one_pass(source: object) -> None:
    """Refuse a stream that is one iterator: its second epoch would be empty."""
    dataset = source.dataset if isinstance(source, DataLoader) else source
    if isinstance(dataset, IterableDataset):
        with isolated_rng():
            if iter(dataset) is iter(dataset):
                raise TypeError(
                    f"{type(dataset).__name__} gives the same iterator each time, which ends after one epoch: let its "
                    "__iter__ begin anew"
                )


def lies_on_a_device(source: Any) -> bool:
    """Whether what a data set gives is on a device other than the CPU already; nothing is known of a stream."""
    if isinstance(source, IterableDataset):
        return False
    with isolated_rng():
        first = tree_leaves(source[0])
    return any(isinstance(a, Tensor) and a.device.type != "cpu" for a in first)


def length(sized: object) -> int | None:
    """The number of data or batches, where it is known."""
    try:
        return len(sized)  # type: ignore[arg-type]
    except TypeError:  # an iterable data set
        return None
