"""The data of the benchmarks: MNIST, or random pixels where it is absent."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

import pyrovae as pv
from tests.benchmarks.options import ROOT

SHAPE = (1, 28, 28)
SHARED = ROOT.parent / "shared" / "data"


@functools.cache
def load(data_dir: Path | None) -> tuple[pv.data.Images, pv.data.Images, str]:
    """Training and test images, dynamically binarised, and what they are."""
    root = data_dir if data_dir is not None or not SHARED.exists() else SHARED
    try:
        splits = pv.data.load("mnist", root, binarization="dynamic", download=False)
    except pv.data.DataError as error:
        print(f"!! MNIST is not there, taking RANDOM PIXELS instead: {error}", file=sys.stderr)
        generator = torch.Generator().manual_seed(0)
        grey = torch.rand(42_000, *SHAPE, generator=generator)
        grey = pv.data.Images(grey * (torch.rand(grey.shape, generator=generator) < 0.26), binarization="dynamic")
        return grey.subset(slice(40_000)), grey.subset(slice(40_000, None)), "RANDOM PIXELS (no MNIST found)"
    return splits.train, splits.test, "MNIST, dynamically binarised"


def pool(data_dir: Path | None, batch: int, device: str) -> list[Tensor]:
    """Some 6,000 training images (at least 20 batches), drawn once and always the same."""
    train, _, _ = load(data_dir)
    count = max(20, 6000 // batch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        batches = [train.batch(torch.randint(len(train), (batch,))) for _ in range(count)]
    return [x.to(device) for x in batches if isinstance(x, Tensor)]


def stream(batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """The same batches in the same order for whoever asks, without end."""
    return itertools.cycle(batches)
