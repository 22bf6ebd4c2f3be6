"""Where and on what every evaluation runs: the context of measuring, and data in batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from pyrovae import data as datasets
from pyrovae.compile.precision import full_float32
from pyrovae.data.arrays import as_tensor
from pyrovae.data.feed import as_batch, as_dataset
from pyrovae.data.loaders import length
from pyrovae.engine.convert import exactly, first_way
from pyrovae.engine.devices import batch_device, home_of
from pyrovae.engine.observed import Observed
from pyrovae.engine.probe import Look
from pyrovae.engine.programs import Batch, Program, evaluating, nothing, rows
from pyrovae.engine.randomness import isolated_rng
from pyrovae.engine.whole import Whole
from pyrovae.progress import ProgressBar
from pyrovae.ranks import ranks


@contextmanager
def measuring(*programs: Program, seed: int | None) -> Iterator[None]:
    """Run programs in eval mode, without gradients, in full float32; isolated and seeded, if a seed is given."""
    seeded = nullcontext() if seed is None else isolated_rng(seed)
    with seeded, torch.no_grad(), full_float32(), evaluating(*programs):
        yield


class Batches:
    """What an evaluation runs programs on, batch by batch and in order, and the context in which it does.

    Inside, plates are taken whole (:class:`~pyrovae.engine.whole.Whole`), and ``seen`` is the look at the first batch.
    Data are cut into batches only where a plate around every site has a row for each: others come whole.

    :param guide: None for an evaluation of one program alone, whichever it is.
    :param args: as :func:`pyrovae.data.batches` takes them, with ``batch_size`` and ``seed``; the batches go where the
        parameters of the programs live.
    :param default: the batch size where None is given.
    :param title: of the bar, which is shown as ``progress`` says.
    :raises DataError: where there is no batch, and for a datum outside the support of the site that observes it.
    :raises ValueError: for data that a ``batch_size`` or a loader would cut, and that must not be.
    """

    def __init__(
        self,
        model: Program,
        guide: Program | None,
        args: Sequence[object],
        kwargs: Mapping[str, object],
        batch_size: int | None = None,
        *,
        default: int | None = None,
        seed: int | None = None,
        title: str = "",
        progress: bool | None = False,
    ) -> None:
        given = tuple(map(exactly, args))
        self.args = tuple(as_tensor(a, "data") if isinstance(a, np.ndarray) else a for a in given)
        self.pair, self.kwargs = (model, guide), kwargs
        self.programs = (model,) if guide is None else (model, guide)
        self.batch_size, self.default, self.seed = batch_size, default, seed
        self.total = len(args[0]) if len(args) == 1 and isinstance(args[0], datasets.Images) else None
        self.done, self.whole, self.stack = 0, Whole(), ExitStack()
        self.bar = ProgressBar(title, self.total, progress if ranks().first else False)

    def __enter__(self) -> Self:
        self.stack.enter_context(measuring(*self.programs, seed=self.seed))
        self.stack.enter_context(self.bar)
        self.stack.enter_context(self.whole)
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)

    def cut(self, size: int | None) -> Iterator[Batch]:
        """The data, so many at a time, where the programs live."""
        home, loaded = None, isinstance(next(iter(self.args), None), Dataset | DataLoader)
        for first, batch in enumerate(datasets.batches(self.args, size, seed=self.seed or 0)):
            if first == 0:
                home = home_of(*self.programs, args=batch, kwargs=self.kwargs)
                if not loaded and batch_device(batch, {}) == home:
                    home = None  # what one passes as tensors beside the pair's may well be on the CPU
            yield as_batch(batch, home)

    def __iter__(self) -> Iterator[Batch]:
        batches = self.cut(self.batch_size or self.default)
        batch = next(batches, None)
        if batch is None or not rows(batch, self.kwargs):
            raise datasets.DataError("there are no data to evaluate: pass at least one datum")
        try:
            taken, (batch, self.seen) = first_way(batch, self.look, *self.programs)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            if len(self.args) == 1:
                as_dataset(self.args[0], raw=True)  # which names what is no data
            raise
        number = rows(batch, self.kwargs)
        if self.seen.layout.sizes[-1:] != [number] and next(batches, None) is not None:
            batch, batches = taken(self.uncut()), iter(())
            _, self.seen = self.look(batch)
        check = Observed(self.pair[0], self.pair[1] or nothing, self.seen.model, batch, self.kwargs)
        while batch is not None:
            yield batch
            self.done += rows(batch, self.kwargs)
            self.bar.update(self.done, "data")
            if (batch := next(batches, None)) is not None:
                check(batch := taken(batch), self.done)

    def look(self, batch: Batch) -> tuple[Batch, Look]:
        """A batch, and the look at the programs on it."""
        return batch, self.whole.look(*self.pair, batch, self.kwargs)

    def uncut(self) -> Batch:
        """All data as one batch, where nobody asked for another size."""
        source = self.args[0]
        if self.batch_size is not None or isinstance(source, DataLoader | IterableDataset):
            raise ValueError(
                "the pair has latents outside the data plate, so that its weights are joint over the data, which "
                "therefore cannot come in batches: pass them whole, as tensors, without batch_size (information: with "
                "num_data of them all)"
            )
        return next(self.cut(length(source) if isinstance(source, Dataset) else None))


class RunningMean:
    """A mean over draws, in float64, and their scatter (Welford 1962)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, value: Tensor) -> None:
        value = value.double()
        self.count += 1
        step = value - self.mean
        self.mean = self.mean + step / self.count
        self.squares = self.squares + step * (value - self.mean)

    @property
    def variance(self) -> Tensor:
        """Of a single draw."""
        return self.squares / max(self.count - 1, 1)

    @property
    def noise(self) -> Tensor:
        """The variance that the scatter leaves in the mean."""
        return self.variance / self.count
