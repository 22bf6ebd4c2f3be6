"""Samples of a run's model: where they go, and how they are drawn and written."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from pyrovae import plots
from pyrovae.app.job import Terms, example, reopen
from pyrovae.app.pictures import columns_for, labels_for
from pyrovae.arguments import positive_int
from pyrovae.engine.randomness import isolated_rng
from pyrovae.files import replacing
from pyrovae.memory import require_memory
from pyrovae.plots.images import as_numpy, sheet_shape
from pyrovae.sampling import sample as draw

PASS = 10_000  # data that are drawn at a time
SUFFIXES = (".png", ".npz", ".csv")


def sample(
    folder: Path, *, number: int, draws: bool, label: str | None, temperature: float, output: Path | None,
    checkpoint: str, seed: int, terms: Terms, out: Console,
) -> None:  # fmt: skip
    """Draw from a run's model, into a file."""
    positive_int("number", number)
    pair, run = reopen(folder, checkpoint, terms).pair, terms.run(folder)
    if output is None:
        run.check_files()
    like, columns = example(run), columns_for(pair, label)
    path = place_of(output, folder / f"samples-{seed}", like.shape[1:], number, columns)
    labels, returns = labels_for(pair, number, label), "draws" if draws else "means"
    x = drawn(pair.module, number, labels, returns=returns, temperature=temperature, seed=seed, like=like)
    write(x, labels, path, columns)
    out.print(f"wrote {path}")


def place_of(output: Path | None, stem: Path, shape: Sequence[int], number: int, columns: int | None) -> Path:
    """The file to write samples of a shape to, before any is drawn: what cannot be written is refused.

    By default under the stem: a picture of images, an archive of anything else.
    """
    shown = plots.is_image(shape)
    path = output or stem.with_suffix(".png" if shown else ".npz")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f'samples go to {", ".join(SUFFIXES)} files, got "{path}": name one of these')
    if path.suffix.lower() == ".png" and not shown:
        raise ValueError(f'data of shape {list(shape)} are no images, got "{path}": name an .npz or .csv file')
    advice = "lower --number"
    size = 12 * number * prod(shape)  # of float32, in parts, as a whole, and to be written
    require_memory(size, f"{number:,} samples of shape {list(shape)}", advice)
    if path.suffix.lower() == ".png":
        height, width = sheet_shape(number, (shape[-2], shape[-1]), columns)
        require_memory(16 * height * width, f"a picture of {number:,} images", advice)
    return path


def drawn(
    module: nn.Module, number: int, labels: tuple[Tensor, ...], *, returns: str, temperature: float, seed: int,
    like: Tensor,
) -> Tensor:  # fmt: skip
    """Samples on the CPU, a pass at a time, so that memory is taken for their values alone."""
    parts = []
    with isolated_rng(seed):
        for i in range(0, number, PASS):
            rows, given = min(PASS, number - i), (y[i : i + PASS] for y in labels)
            x = draw(module, rows, *given, returns=returns, temperature=temperature, like=like)
            parts.append(x.cpu())
    return torch.cat(parts)


def write(x: Tensor, labels: tuple[Tensor, ...], path: Path, columns: int | None) -> Path:
    """Samples as a picture, as arrays ``x`` and (where the model was given labels) ``y``, or as a table, a row each."""
    if path.suffix.lower() == ".png":
        plots.image_grid(x, path, columns=columns, smooth=True)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    named = dict(zip("xy", map(as_numpy, (x, *labels)), strict=False))
    with replacing(path) as aside, aside.open("wb") as file:
        if path.suffix.lower() == ".npz":
            np.savez(file, allow_pickle=False, **named)
        else:
            tables = {name: array.reshape(len(array), -1) for name, array in named.items()}
            head = [f"{name}{i}" for name, table in tables.items() for i in range(table.shape[1])]
            np.savetxt(file, np.hstack(list(tables.values())), "%.9g", ",", header=",".join(head), comments="")
    return path
