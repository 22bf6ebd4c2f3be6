"""Where and on what every evaluation runs: the context of measuring, and data in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from pyrovae import data as datasets
from pyrovae.compile.precision import full_float32
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

    :param args: as :func:`pyrovae.data.batches` takes them, with ``batch_size``, ``seed`` and ``device``.
    :param title: of the bar, which is shown as ``progress`` says.
    :raises DataError: at the end, where there was no batch.
    """

    def __init__(
        self,
        args: Sequence[object],
        batch_size: int | None = None,
        *,
        seed: int | None = None,
        device: torch.device | None = None,
        title: str = "",
        progress: bool | None = False,
    ) -> None:
        self.args, self.batch_size, self.seed, self.device = args, batch_size, seed or 0, device
        self.total = len(args[0]) if len(args) == 1 and isinstance(args[0], datasets.Images) else None
        self.done = 0
        self.bar = ProgressBar(title, self.total, progress)

    def __iter__(self) -> Iterator[Batch]:
        batch = None
        for batch in datasets.batches(self.args, self.batch_size, seed=self.seed, device=self.device):
            yield batch
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
