"""Readers: one for each format, from files to the parts of a data set.

A reader takes a folder (or the path after ``folder:`` or ``npz:``) and whether it may download; it returns the parts
"train", "test" and "validation" that the set has, each as raw values and labels. A new set is a row of :data:`SOURCES`.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrovae.arguments import one_line
from pyrovae.data.images import as_tensor, channels_first
from pyrovae.errors import DataError

OTHER_ROOT = "name another root (--data-dir, $PYROVAE_DATA)"
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".ppm", ".tif", ".tiff", ".webp", ".gif"}
GREY_MODES = {"1", "L", "LA", "La"}
COLOUR_MODES = {"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}

Part = tuple[Tensor, Tensor | None]
Parts = dict[str, Part]
Reader = Callable[[Path, bool], Parts]


def permutation(total: int, seed: int) -> Tensor:
    """A shuffle of ``total`` indices, the same for a seed on every machine and in every version."""
    # NumPy's legacy generator is the one whose stream is guaranteed never to change between versions.
    return torch.from_numpy(np.random.RandomState(seed % 2**32).permutation(total))


@contextmanager
def reading(path: Path, fix: str) -> Iterator[None]:
    """Turn whatever a parser raises on a damaged file into one DataError that names the file."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:
        why = one_line(f"{type(error).__name__}: {error}")
        raise DataError(f"{path} cannot be read ({why}): {fix}") from error


def find_file(name: str, root: Path, *places: str) -> Path:
    """The first of ``places`` under ``root`` that exists."""
    for place in places:
        if (root / place).exists():
            return root / place
    raise DataError(f"{name} needs a file that is not there: put it at {root / places[0]}, or {OTHER_ROOT}")


def read_digits(root: Path, download: bool) -> Parts:
    """Scikit-learn's digits, with the same 360 for the test on every machine."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x, y = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16, torch.from_numpy(bunch.target)
    order = permutation(len(x), seed=0)
    return {"train": (x[order[360:]], y[order[360:]]), "test": (x[order[:360]], y[order[:360]])}


def read_omniglot28(root: Path, download: bool) -> Parts:
    """The IWAE paper's OMNIGLOT."""
    from scipy.io import loadmat

    path = find_file("omniglot28", root, "omniglot28/chardata.mat", "chardata.mat")
    with reading(path, "replace it by the IWAE paper's chardata.mat (arrays data and testdata, 784 x N)"):
        mat, parts = loadmat(path), Parts()
        for part, key in (("train", ""), ("test", "test")):
            # MATLAB counts down the columns, so that a transpose sets the drawings upright.
            x = as_tensor(mat[f"{key}data"].T, f"{key}data").reshape(-1, 1, 28, 28).mT.contiguous()
            labels = mat.get(f"{key}targetchar")
            parts[part] = x, None if labels is None else torch.from_numpy(labels.astype(np.int64)).flatten()
    return parts


def read_binarized_mnist(root: Path, download: bool) -> Parts:
    """Larochelle's MNIST, which has a validation part of its own: lines of 784 bits in text."""
    parts = Parts()
    for part, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        file = f"binarized_mnist_{name}.amat"
        path = find_file("binarized_mnist", root, f"binarized_mnist/{file}", file)
        text = np.frombuffer(path.read_bytes(), np.uint8)
        bits = text[(text == ord("0")) | (text == ord("1"))] - ord("0")
        lines = int((text == ord("\n")).sum()) + (len(text) > 0 and text[-1] != ord("\n"))
        if not lines or not np.isin(text, np.frombuffer(b"01 \t\r\n", np.uint8)).all() or len(bits) != 784 * lines:
            raise DataError(
                f"{path} must have 784 values 0 or 1 on each of its lines, but has not: fetch the file again"
            )
        parts[part] = torch.from_numpy(bits).to(torch.get_default_dtype()).reshape(-1, 1, 28, 28), None
    return parts


def read_npz(path: Path, download: bool) -> Parts:
    """The arrays of a NumPy archive."""
    if not zipfile.is_zipfile(path):
        state = "not a whole .npz archive" if path.exists() else "absent"
        raise DataError(f"npz:PATH needs a NumPy archive, {path} is {state}: write it with numpy.savez(path, x=x)")
    fix = "write it anew with numpy.savez(path, x=x), of numbers, not objects"
    with reading(path, fix), np.load(path, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in ("x", "y", "x_test", "y_test") if key in archive}
        keys = ", ".join(archive)
    if "x" not in arrays:
        raise DataError(f"npz:PATH needs an array 'x', {path} has: {keys or 'nothing'}: write numpy.savez(path, x=x)")
    tensors = {key: as_tensor(array, f"{path}: {key}") for key, array in arrays.items()}
    parts: Parts = {"train": (as_pixels(tensors["x"], path), tensors.get("y"))}
    if "x_test" in tensors:
        parts["test"] = (as_pixels(tensors["x_test"], path), tensors.get("y_test"))
    return parts


def as_pixels(x: Tensor, path: Path) -> Tensor:
    """Values of an archive, channels first where they are 8-bit images."""
    if x.dtype == torch.uint8 and x.numel() and x.max() == 1:
        raise DataError(f"8-bit values are divided by 255, but {path} holds 0 and 1 only: store those as bool or float")
    return channels_first(x)


def read_folder(path: Path, download: bool) -> Parts:
    """The images below a folder, one part of all or parts by its subfolders' names; classes are numbered alike."""
    if not path.is_dir():
        raise DataError(f"folder:PATH needs an existing folder, {path} is none: check the path")
    folders = {part: path / part for part in ("train", "val", "valid", "test") if (path / part).is_dir()}
    if "train" not in folders or len(folders) == 1:
        folders = {"train": path}
    held_out = [folders[part] for part in ("test", "val", "valid") if part in folders]
    named = zip(("train", "test", "validation"), (folders["train"], *held_out), strict=False)
    listed = {part: list_images(folder) for part, folder in named}
    classes = sorted({c for files in listed.values() for _, c in files if c is not None})
    # Decoded together, so that all parts are held to one size.
    x = decode_images([file for files in listed.values() for file, _ in files])
    pixels = x.split([len(files) for files in listed.values()])
    number = {name: i for i, name in enumerate(classes)}
    labels = ([number[c] for _, c in files if c is not None] for files in listed.values())
    return {part: (x, torch.tensor(y) if y else None) for part, x, y in zip(listed, pixels, labels, strict=True)}


def list_images(folder: Path) -> list[tuple[Path, str | None]]:
    """The images of ``folder``, each with its class: the name of its subfolder, None in a flat folder."""
    found: list[Path] = []
    for base, inner, names in os.walk(folder, followlinks=True):
        # Hidden ones are left out, and links back to a folder that they lie in.
        above = {path.resolve() for path in (Path(base), *Path(base).parents)}
        inner[:] = [name for name in inner if name[0] != "." and Path(base, name).resolve() not in above]
        found += [Path(base, name) for name in names if name[0] != "."]
    images = sorted(path for path in found if path.suffix.lower() in IMAGE_SUFFIXES)
    files = [(path, None if path.parent == folder else path.relative_to(folder).parts[0]) for path in images]
    if not files:
        raise DataError(f"folder:PATH needs images, {folder} has none: put {', '.join(sorted(IMAGE_SUFFIXES))} there")
    if len({label is None for _, label in files}) > 1:
        raise DataError(
            f"{folder} has images beside its class folders: move them into a class folder, or all out of them"
        )
    return files


def decode_images(files: list[Path]) -> Tensor:
    """All images as 8-bit ``[N, C, H, W]``."""
    first = decode_image(files[0])
    x = torch.empty(len(files), *first.shape, dtype=torch.uint8)
    with ThreadPool() as pool:
        for i, pixels in enumerate(pool.imap(decode_image, files, chunksize=16)):
            if pixels.shape != first.shape:
                size, wanted = (f"{w}x{h} with {c} channel{'s' * (c > 1)}" for c, h, w in (pixels.shape, first.shape))
                raise DataError(
                    f"images must have one size and number of channels: {files[i]} is {size}, {files[0]} is {wanted}: "
                    "resize or convert them beforehand"
                )
            x[i] = pixels
    return x


def decode_image(path: Path) -> Tensor:
    """An image as 8-bit ``[C, H, W]``, grey or RGB."""
    from PIL import Image

    with reading(path, "replace or remove the damaged image"), Image.open(path) as image:
        if image.mode not in GREY_MODES | COLOUR_MODES:
            raise DataError(f"images must have 8 bits a channel, {path} has mode {image.mode!r}: convert it beforehand")
        pixels = torch.from_numpy(np.array(image.convert("L" if image.mode in GREY_MODES else "RGB")))
    return pixels.unsqueeze(0) if pixels.dim() == 2 else pixels.permute(2, 0, 1)


def arrays_of(dataset: Any) -> Part:
    """Values and labels of a data set of torchvision that holds them as arrays, the labels under either name."""
    labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    return channels_first(torch.as_tensor(dataset.data)), torch.as_tensor(labels)


def omniglot_strokes(dataset: Any) -> Part:
    """Omniglot's drawings, black on white, as strokes of 1 on 0."""
    # torchvision numbers the characters in the order of os.listdir, which differs between machines.
    files = sorted(Path(dataset.target_folder).glob("*/*/*.png"))
    number = {folder: i for i, folder in enumerate(dict.fromkeys(file.parent for file in files))}
    return 255 - decode_images(files), torch.tensor([number[file.parent] for file in files])


def torchvision(
    kind: str, folder: str, files: str, arrays: Callable[[Any], Part] = arrays_of, **splits: tuple[object, object]
) -> Reader:
    """A reader of ``torchvision.datasets.<kind>``; ``splits``: its split argument, with the train and test values."""
    [(argument, values)] = (splits or {"train": (True, False)}).items()

    def read(root: Path, download: bool) -> Parts:
        from torchvision import datasets

        put = f"put {files} into {root / folder}, or {OTHER_ROOT}"
        with reading(root / folder, f"its files are damaged; delete them and {put}"):
            makes = [partial(getattr(datasets, kind), root, **{argument: value}) for value in values]
            opened = [open_set(make, kind, root, put, download) for make in makes]
            return dict(zip(("train", "test"), map(arrays, opened), strict=True))

    return read


def open_set(make: Callable[..., object], kind: str, root: Path, put: str, download: bool) -> object:
    """A data set of torchvision from its files, which are fetched where that is allowed."""
    try:
        return make(download=False)
    except RuntimeError as error:
        if "not found" not in str(error):
            raise
        why = "download=False"
    if download:
        try:
            return make(download=True)
        except Exception as error:
            why = f"the download failed ({one_line(f'{type(error).__name__}: {error}')})"
    raise DataError(f"{kind} is not under {root} and {why}: {put}")


IDX = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte"
ZIPS = "images_background.zip and images_evaluation.zip, with their unpacked folders,"
BATCHES = "data_batch_1 to data_batch_5, test_batch and batches.meta"
MATS = "train_32x32.mat and test_32x32.mat"
SOURCES: dict[str, tuple[str, Reader]] = {
    "digits": ("scikit-learn's 1,797 digits, 8x8 grey; needs no files", read_digits),
    "mnist": ("70,000 digits, 28x28 grey", torchvision("MNIST", "MNIST/raw", IDX)),
    "fashion_mnist": ("70,000 pieces of clothing, 28x28 grey", torchvision("FashionMNIST", "FashionMNIST/raw", IDX)),
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
