"""Where and on what every evaluation runs: the context of measuring, and data in batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from pyrovae import data as datasets
from pyrovae.compile.precision import full_float32
from pyrovae.data.feed import as_batch
from pyrovae.engine.devices import batch_device, home_of
from pyrovae.engine.programs import Batch, Program, evaluating
from pyrovae.engine.randomness import isolated_rng
from pyrovae.progress import ProgressBar


@contextmanager
def measuring(*programs: Program, seed: int | None) -> Iterator[None]:
    """Run programs in eval mode, without gradients, in full float32; isolated and seeded, if a seed is given."""
    seeded = nullcontext() if seed is None else isolated_rng(seed)
    with seeded, torch.no_grad(), full_float32(), evaluating(*programs):
        yield


class Batches:
    """What an evaluation passes to the programs, batch by batch and in order, with a ``bar`` of the progress.

    :param args: as :func:`pyrovae.data.batches` takes them, with ``batch_size`` and ``seed``; the batches go where the
        parameters of the programs ``of`` live, which take them and ``kwargs``.
    :param title: of the bar, which is shown as ``progress`` says.
    :raises DataError: at the end, where there was no batch.
    """

    def __init__(
        self,
        args: Sequence[object],
        batch_size: int | None = None,
        *,
        of: Sequence[Program],
        kwargs: Mapping[str, object] | None = None,
        seed: int | None = None,
        title: str = "",
        progress: bool | None = False,
    ) -> None:
        self.args, self.batch_size, self.of, self.kwargs, self.seed = args, batch_size, of, kwargs, seed or 0
        self.total = len(args[0]) if len(args) == 1 and isinstance(args[0], datasets.Images) else None
        self.done = 0
        self.bar = ProgressBar(title, self.total, progress)

    def __iter__(self) -> Iterator[Batch]:
        batch, home = None, None
        for batch in datasets.batches(self.args, self.batch_size, seed=self.seed):
            if not self.done:
                home = home_of(*self.of, args=batch, kwargs=self.kwargs)
                if isinstance(self.args[0], Tensor) and batch_device(batch, {}) == home:
                    home = None  # what one passes as tensors beside the pair's may well be on the CPU
            yield as_batch(batch, home)
            self.done += rows(batch)
            self.bar.update(self.done, "data")
        if batch is None:
            raise datasets.DataError("there are no data to evaluate: pass at least one datum")


def rows(batch: Batch) -> int:
    """The number of data in a batch, by its first tensor; 1 where there is none."""
    return next((len(a) for a in batch if isinstance(a, Tensor) and a.dim()), 1)


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
