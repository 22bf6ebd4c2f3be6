"""Named data sets: where their files are, and how they are cut."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pyrovae.arguments import one_of
from pyrovae.data.fingerprint import repeated
from pyrovae.data.images import BINARIZATIONS, Images
from pyrovae.data.names import source_of
from pyrovae.data.readers import permutation, reader_of
from pyrovae.engine.programs import warn
from pyrovae.errors import DataError


class Splits(NamedTuple):
    """What :func:`load` returns.

    >>> Splits(*load("digits", validation=100)).validation
    Images('digits', 100 of [1, 8, 8], float32, binarization='none', no labels, cpu)
    """

    train: Images
    validation: Images | None
    test: Images


def load(
    name: str = "digits",
    root: str | os.PathLike[str] | None = None,
    *,
    binarization: str = "none",
    validation: int | float = 0,
    labels: bool | None = False,
    seed: int = 0,
    download: bool = True,
) -> Splits:
    """Read the data set ``name``, one of :data:`DATASETS`, into memory.

    Pixels are floats in [0, 1], channels first: 8-bit values are divided by 255. ``npz:PATH`` takes the arrays ``x``
    and, where they are, ``y``, ``x_test``, ``y_test``: those of four axes as images (channels are moved to the front),
    8-bit ones of three as grey images, any others as they are. ``folder:PATH`` takes images of one size, one subfolder
    per class or none, below ``train`` and ``test`` (or ``val``) if there are such. Of a set without a test part a tenth
    is set aside, the same tenth whatever the seed, so that no run is tested on what another one was trained on. What no
    rule covers is refused; the rules stand on the page "Data".

    :param name: of the set.
    :param root: the folder with the files, else ``$PYROVAE_DATA``, else ``pyrovae`` in the user's cache folder.
    :param binarization: as in :class:`Images`. With "dynamic" the validation and test parts are drawn once per seed, so
        that models are compared on the same bits.
    :param validation: how many (int) or which fraction (float below 1) of the training data to set aside at random.
        With 0 it is the set's own validation part, if it has one (binarized_mnist, a folder with ``train``, ``val`` and
        ``test``), else None; with any other value, that part joins the training data before the cut.
    :param labels: whether the parts carry labels; None, where all of them do.
    :param seed: of the validation cut and of the draws.
    :param download: whether torchvision's sets may be fetched when they are not there; all are held to their checksums.
    :raises ValueError: an argument outside its range, an unknown name.
    :raises DataError: files absent, damaged or no files, arrays without a rule, no labels where they are asked for.
    :raises ResourceError: more than there is memory for, files that may not be read, a disk that is full.

    >>> train, validation, test = load("digits", binarization="dynamic", validation=0.1, labels=True)
    >>> len(train), len(validation), len(test), train.event_shape
    (1293, 144, 360, torch.Size([1, 8, 8]))
    """
    _, colon, path = str(name).partition(":")
    key = source_of(name)
    if colon and not path:
        raise ValueError(f"{key} needs a path, received {name!r}: write it after the colon")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "pyrovae"
    location = Path(path if colon else root or os.environ.get("PYROVAE_DATA") or cache)
    with suppress(RuntimeError):  # without a home, "~" is a name like others
        location = location.expanduser()
    one_of("binarization", binarization, BINARIZATIONS)
    counted = isinstance(validation, int | np.integer) and not isinstance(validation, bool) and validation >= 0
    if not (counted or (isinstance(validation, float) and 0 <= validation < 1)):
        raise ValueError(
            f"validation must be a count or a fraction in [0, 1), received {validation!r}: pass such as 1000"
        )
    parts = reader_of(key)(location, download)
    if validation and "validation" in parts:
        (x, y), (more, of_more) = parts["train"], parts.pop("validation")
        parts["train"] = torch.cat([x, more]), None if y is None or of_more is None else torch.cat([y, of_more])
    if max((int(x.max()) for x, _ in parts.values() if x.dtype == torch.uint8 and x.numel()), default=0) == 1:
        raise DataError(
            f"8-bit values are divided by 255, but those of {name!r} are 0 and 1 only: store them as 0 and 255, or as "
            "bool or float"
        )
    sets, all_labelled = {}, all(y is not None for _, y in parts.values())
    for part, (x, y) in parts.items():
        if labels and y is None:
            raise DataError(
                f"labels=True needs labels in every part of a set, {name!r} lacks them: load it without labels"
            )
        scaled = x.to(torch.get_default_dtype()).contiguous()
        if x.dtype == torch.uint8:
            scaled.div_(255)
        y = y if labels or (labels is None and all_labelled) else None
        sets[part] = Images(scaled, y, name=name, binarization=binarization, seed=seed)
    if "test" not in sets:
        sets["train"], sets["test"] = cut(sets["train"], 0.1, seed=0)
    if validation:
        sets["train"], sets["validation"] = cut(sets["train"], validation, seed)
    if len({images.event_shape for images in sets.values()}) > 1:
        shapes = ", ".join(f"{k} {list(images.event_shape)}" for k, images in sets.items())
        raise DataError(f"the parts of {name!r} must have one shape, received {shapes}: make them equal")
    if twice := repeated(sets["test"].x, sets["train"].x):
        warn(
            f"{twice:,} of the {len(sets['test']):,} test data of {name!r} are training data as well, value for value: "
            "what is measured on them is no test"
        )
    held_out = sets["validation"].fixed(seed) if "validation" in sets else None
    return Splits(sets["train"], held_out, sets["test"].fixed(seed))


def cut(images: Images, amount: int | float, seed: int) -> tuple[Images, Images]:
    """A random part of ``amount`` (count or fraction) and the rest before it."""
    total = len(images)
    count = max(1, round(amount * total)) if isinstance(amount, float) else amount
    if count >= total:
        error = ValueError if total > 1 else DataError
        raise error(f"{count} of {total} data cannot be set aside from {images.name!r}: at least one must be left")
    order = permutation(total, seed)
    return images.subset(order[count:]), images.subset(order[:count])
