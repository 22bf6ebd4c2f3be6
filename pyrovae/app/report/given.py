"""What a report takes in Python beside the run: data in any form that training takes, and the pair."""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pyrovae import runs
from pyrovae.data.arrays import is_integer
from pyrovae.data.feed import as_dataset
from pyrovae.data.images import Images
from pyrovae.data.sets import Splits
from pyrovae.engine.convert import first_way
from pyrovae.engine.programs import Program, roots, within
from pyrovae.engine.randomness import isolated_rng
from pyrovae.engine.sites import record_pair
from pyrovae.models.base import Pair, as_pair

BATCHES, BATCH = 100, 100  # that are read of data which no tensor holds

Programs = tuple[Program, Program]


class Given(NamedTuple):
    """What takes the place of what a run does not say; None leaves it to the run."""

    data: Images | None = None
    pair: nn.Module | Programs | None = None
    samples: int | None = None  # with which all the data are measured


NOTHING = Given()


class TwoPrograms(nn.Module):
    """Two programs in a module of their own, with the modules that they use below it."""

    def __init__(self, model: Program, guide: Program) -> None:
        super().__init__()
        vars(self).update(model=model, guide=guide)  # not by setattr, which would register a program twice
        self.used = nn.ModuleList(within(model, guide))


def as_images(data: object) -> Images:
    """Data as a report reads them: of :class:`Splits` the test part, of what streams the first ten thousand."""
    source = as_dataset(data.test if isinstance(data, Splits) else data, raw=True)
    if isinstance(source, Images):
        return source
    loader = source if isinstance(source, DataLoader) else DataLoader(cast(Dataset[object], source), BATCH)
    rows = [batch if isinstance(batch, tuple | list) else (batch,) for batch in islice(loader, BATCHES)]
    x, *labels = (torch.cat(list(column)) for column in zip(*rows, strict=True))
    if len(labels) > 1:
        raise TypeError(f"a report takes data x, or x and labels, received {1 + len(labels)} tensors: leave some out")
    images = Images(x, raw=True)
    if labels and is_integer(labels[0]) and labels[0].dim() == 1:
        return images.relabelled(labels[0])
    images.labels = labels[0] if labels else None  # attributes
    return images


def matched(pair: Pair, images: Images) -> Images:
    """The same data in the type of numbers that the pair's programs take."""
    few: tuple[Tensor, ...] = images.subset(slice(0, 2)).columns
    with torch.no_grad(), isolated_rng():
        taken, _ = first_way(few, lambda batch: record_pair(pair.model, pair.guide, batch, {}), pair.model, pair.guide)
    return images.matched(taken)


def loaded(run: runs.Run, given: Given, checkpoint: str, trust: bool) -> Pair:
    """The pair with the weights of a run: the one given, or as the run's config says."""
    pair = given.pair
    if isinstance(pair, tuple):
        owners = roots(*pair)
        pair = owners[0] if len(owners) == 1 and hasattr(owners[0], "guide") else pair
    if isinstance(pair, tuple):
        if given.data is None:
            raise ValueError("what two programs use is found by a run of them: pass data= as well, which they take")
        return as_pair(TwoPrograms(*runs.load(run, pair=pair, data=given.data.columns, checkpoint=checkpoint)))
    return as_pair(runs.load(run, pair=pair, checkpoint=checkpoint, trust=trust))
