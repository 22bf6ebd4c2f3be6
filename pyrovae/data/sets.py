"""Named data sets: where their files are, and how they are cut. A new set is one row of :data:`SOURCES`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch

from pyrovae.arguments import DataError, one_of
from pyrovae.data.images import BINARIZATIONS, Images
from pyrovae.data.readers import (
    Part,
    Reader,
    omniglot_strokes,
    permutation,
    read_binarized_mnist,
    read_digits,
    read_folder,
    read_npz,
    read_omniglot28,
    torchvision,
)

IDX = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte"
ZIPS = "images_background.zip and images_evaluation.zip, with their unpacked folders,"
BATCHES = "data_batch_1 to data_batch_5, test_batch and batches.meta"
MATS = "train_32x32.mat and test_32x32.mat"


SOURCES: dict[str, tuple[str, Reader]] = {
    "digits": ("scikit-learn's 1,797 digits, 8x8 grey; needs no files", read_digits),
    "mnist": ("70,000 digits, 28x28 grey", torchvision("MNIST", "MNIST/raw", IDX)),
    "fashion_mnist": (
        "70,000 pieces of clothing, 28x28 grey",
        torchvision("FashionMNIST", "FashionMNIST/raw", IDX),
    ),
    "kmnist": ("70,000 cursive Japanese characters, 28x28 grey", torchvision("KMNIST", "KMNIST/raw", IDX)),
    "omniglot": (
        "32,460 drawings of 1,623 characters, 105x105 black and white, new alphabets in test",
        torchvision("Omniglot", "omniglot-py", ZIPS, omniglot_strokes, background=(True, False)),
    ),
    "omniglot28": ("OMNIGLOT in the IWAE paper's 28x28 form, from chardata.mat", read_omniglot28),
    "binarized_mnist": ("Larochelle's fixed binarisation of MNIST, from its .amat files", read_binarized_mnist),
    "cifar10": (
        "60,000 photographs of 10 classes, 32x32 colour",
        torchvision("CIFAR10", "cifar-10-batches-py", BATCHES),
    ),
    "svhn": ("99,289 house numbers, 32x32 colour", torchvision("SVHN", "", MATS, split=("train", "test"))),
    "folder:PATH": ("a folder of images of one size, one subfolder per class or none", read_folder),
    "npz:PATH": ("arrays x and, where present, y, x_test, y_test of a NumPy archive", read_npz),
}


DATASETS: dict[str, str] = {name: description for name, (description, _) in SOURCES.items()}
"""The names that :func:`load` knows, each with a line about it."""


def resolve(name: str, root: str | os.PathLike[str] | None) -> tuple[Reader, Path]:
    """The reader of the set ``name``, and the folder or file to give it."""
    scheme, colon, path = str(name).partition(":")
    key = f"{scheme}:PATH" if colon else name
    one_of("data set", key if key in SOURCES else name, SOURCES)
    if colon and not path:
        raise ValueError(f"{key} needs a path, received {name!r}: write it after the colon")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "pyrovae"
    return SOURCES[key][1], Path(path if colon else root or os.environ.get("PYROVAE_DATA") or cache).expanduser()


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
    and, where they are, ``y``, ``x_test``, ``y_test``: 8-bit ones as images (a channel axis is added or moved to the
    front), any others as they are. ``folder:PATH`` takes images of one size, one subfolder per class or none at all,
    below ``train`` and ``test`` (or ``val``, ``valid``) if there are such. Of a set without a test part a tenth is set
    aside, the same tenth whatever the seed, so that no run is tested on what another one was trained on.

    :param name: of the set.
    :param root: the folder with the files, else ``$PYROVAE_DATA``, else ``pyrovae`` in the user's cache folder.
    :param binarization: as in :class:`Images`. With "dynamic" the validation and test parts are drawn once per seed, so
        that models are compared on the same bits.
    :param validation: how many (int) or which fraction (float below 1) of the training data to set aside at random.
        With 0 it is the set's own validation part, if it has one (binarized_mnist, a folder with ``train``, ``val`` and
        ``test``), else None; with any other value, that part joins the training data before the cut.
    :param labels: whether the parts carry labels; None, where they have them.
    :param seed: of the validation cut and of the draws.
    :param download: whether torchvision's sets may be fetched, md5-checked, when they are not there.
    :raises ValueError: an argument outside its range, an unknown name.
    :raises DataError: files absent or damaged, images of several sizes, no labels where they are asked for.

    >>> train, validation, test = load("digits", binarization="dynamic", validation=0.1, labels=True)
    >>> len(train), len(validation), len(test), train.event_shape
    (1293, 144, 360, torch.Size([1, 8, 8]))
    """
    read, location = resolve(name, root)
    one_of("binarization", binarization, BINARIZATIONS)
    if isinstance(validation, bool) or validation < 0 or (isinstance(validation, float) and not validation < 1):
        raise ValueError(
            f"validation must be a count or a fraction in [0, 1), received {validation}: pass such as 1000"
        )
    parts = read(location, download)
    if validation and "validation" in parts:
        parts["train"] = joined(parts["train"], parts.pop("validation"))
    sets = {k: as_images(p, labels, name=name, binarization=binarization, seed=seed) for k, p in parts.items()}
    if "test" not in sets:
        sets["train"], sets["test"] = cut(sets["train"], 0.1, seed=0)
    if validation:
        sets["train"], sets["validation"] = cut(sets["train"], validation, seed)
    if len({images.event_shape for images in sets.values()}) > 1:
        shapes = ", ".join(f"{k} {list(images.event_shape)}" for k, images in sets.items())
        raise DataError(f"the parts of {name!r} must have one shape, received {shapes}: make them equal")
    held_out = sets["validation"].fixed(seed) if "validation" in sets else None
    return Splits(sets["train"], held_out, sets["test"].fixed(seed))


def as_images(part: Part, labels: bool | None, *, name: str, binarization: str, seed: int) -> Images:
    """A part as it was read, its 8-bit values in [0, 1]."""
    x, y = part
    if labels and y is None:
        raise DataError(f"labels=True needs labels in every part of a set, {name!r} lacks them: load it without labels")
    scaled = x.to(torch.get_default_dtype()).contiguous()
    if x.dtype == torch.uint8:
        scaled.div_(255)
    return Images(scaled, None if labels is False else y, name=name, binarization=binarization, seed=seed)


def cut(images: Images, amount: int | float, seed: int) -> tuple[Images, Images]:
    """A random part of ``amount`` (count or fraction) and the rest before it."""
    total = len(images)
    count = max(1, round(amount * total)) if isinstance(amount, float) else amount
    if count >= total:
        error = ValueError if total > 1 else DataError
        raise error(f"{count} of {total} data cannot be set aside from {images.name!r}: at least one must be left")
    order = permutation(total, seed)
    return images.subset(order[count:]), images.subset(order[:count])


def joined(a: Part, b: Part) -> Part:
    """Two parts as one, labelled where both are."""
    y = None if a[1] is None or b[1] is None else torch.cat([a[1], b[1]])
    return torch.cat([a[0], b[0]]), y
