"""Readers: one for each format, from files to the parts of a data set.

A reader takes a folder (or the path after ``folder:`` or ``npz:``) and whether it may download; it returns the parts
"train", "test" and "validation" that the set has, each as raw values and labels.
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

from pyrovae.arguments import DataError
from pyrovae.data.images import _channels_first, as_tensor

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".ppm", ".tif", ".tiff", ".webp", ".gif"}


_GREY_MODES = {"1", "L", "LA", "La"}


_COLOUR_MODES = {"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}


Part = tuple[Tensor, "Tensor | None"]


Parts = dict[str, Part]


Reader = Callable[[Path, bool], Parts]


def permutation(total: int, seed: int) -> Tensor:
    """A shuffle of ``total`` indices, the same for a seed on every machine and in every version."""
    # NumPy's legacy generator is the one whose stream is guaranteed never to change between versions.
    return torch.from_numpy(np.random.RandomState(seed % 2**32).permutation(total))


@contextmanager
def _reading(path: Path, fix: str) -> Iterator[None]:
    """Turn whatever a parser raises on a damaged file into one DataError that names the file."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:
        raise DataError(f"{path} cannot be read ({_brief(error)}): {fix}") from error


def _brief(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _found(name: str, root: Path, *places: str) -> Path:
    """The first of ``places`` under ``root`` that exists."""
    for place in places:
        if (root / place).exists():
            return root / place
    raise DataError(f"{name} needs a file that is not there: put it at {root / places[0]}, or {_ROOT}")


_ROOT = "name another root (--data-dir, $PYROVAE_DATA)"


def _read_digits(root: Path, download: bool) -> Parts:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x, y = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16, torch.from_numpy(bunch.target)
    order = permutation(len(x), seed=0)
    return {"train": (x[order[360:]], y[order[360:]]), "test": (x[order[:360]], y[order[:360]])}


def _read_omniglot28(root: Path, download: bool) -> Parts:
    from scipy.io import loadmat

    path = _found("omniglot28", root, "omniglot28/chardata.mat", "chardata.mat")
    with _reading(path, "replace it by the IWAE paper's chardata.mat (arrays data and testdata, 784 x N)"):
        mat = loadmat(path)
        return {part: _characters(mat, key) for part, key in (("train", ""), ("test", "test"))}


def _characters(mat: dict[str, np.ndarray], key: str) -> Part:
    # MATLAB counts down the columns, so that a transpose sets the drawings upright.
    x = as_tensor(mat[f"{key}data"].T, f"{key}data").reshape(-1, 1, 28, 28).mT.contiguous()
    labels = mat.get(f"{key}targetchar")
    return x, None if labels is None else torch.from_numpy(labels.astype(np.int64)).flatten()


def _read_binarized_mnist(root: Path, download: bool) -> Parts:
    files = {"train": "train", "validation": "valid", "test": "test"}
    return {part: (_bits(root, f"binarized_mnist_{file}.amat"), None) for part, file in files.items()}


def _bits(root: Path, file: str) -> Tensor:
    path = _found("binarized_mnist", root, f"binarized_mnist/{file}", file)
    text = np.frombuffer(path.read_bytes(), np.uint8)
    bits = text[(text == ord("0")) | (text == ord("1"))] - ord("0")
    lines = int((text == ord("\n")).sum()) + (len(text) > 0 and text[-1] != ord("\n"))
    if not lines or not np.isin(text, np.frombuffer(b"01 \t\r\n", np.uint8)).all() or len(bits) != 784 * lines:
        raise DataError(f"{path} must have 784 values 0 or 1 on each of its lines, but has not: fetch the file again")
    return torch.from_numpy(bits).to(torch.get_default_dtype()).reshape(-1, 1, 28, 28)


def _read_npz(path: Path, download: bool) -> Parts:
    if not zipfile.is_zipfile(path):
        state = "not a whole .npz archive" if path.exists() else "absent"
        raise DataError(f"npz:PATH needs a NumPy archive, {path} is {state}: write it with numpy.savez(path, x=x)")
    fix = "write it anew with numpy.savez(path, x=x), of numbers, not objects"
    with _reading(path, fix), np.load(path, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in ("x", "y", "x_test", "y_test") if key in archive}
        keys = ", ".join(archive)
    if "x" not in arrays:
        raise DataError(f"npz:PATH needs an array 'x', {path} has: {keys or 'nothing'}: write numpy.savez(path, x=x)")
    tensors = {key: as_tensor(array, f"{path}: {key}") for key, array in arrays.items()}
    parts: Parts = {"train": (_pixels_of(tensors["x"], path), tensors.get("y"))}
    if "x_test" in tensors:
        parts["test"] = (_pixels_of(tensors["x_test"], path), tensors.get("y_test"))
    return parts


def _pixels_of(x: Tensor, path: Path) -> Tensor:
    if x.dtype == torch.uint8 and x.numel() and x.max() == 1:
        raise DataError(f"8-bit values are divided by 255, but {path} holds 0 and 1 only: store those as bool or float")
    return _channels_first(x)


def _read_folder(path: Path, download: bool) -> Parts:
    if not path.is_dir():
        raise DataError(f"folder:PATH needs an existing folder, {path} is none: check the path")
    listed = {part: _list_images(folder) for part, folder in _part_folders(path).items()}
    classes = sorted({c for files in listed.values() for _, c in files if c is not None})
    # Decoded together, so that all parts are held to one size.
    x = _decoded([file for files in listed.values() for file, _ in files])
    pixels = x.split([len(files) for files in listed.values()])
    return {part: (x, _class_indices(files, classes)) for (part, files), x in zip(listed.items(), pixels, strict=True)}


def _part_folders(path: Path) -> dict[str, Path]:
    folders = {part: path / part for part in ("train", "val", "valid", "test") if (path / part).is_dir()}
    if "train" not in folders or len(folders) == 1:
        return {"train": path}
    held_out = [folders[part] for part in ("test", "val", "valid") if part in folders]
    return dict(zip(("train", "test", "validation"), (folders["train"], *held_out), strict=False))


def _list_images(folder: Path) -> list[tuple[Path, str | None]]:
    """The images of ``folder``, each with its class: the name of its subfolder, None in a flat folder."""
    found = sorted(Path(base, file) for base, _, names in os.walk(folder, followlinks=True) for file in names)
    inner = [(f, f.relative_to(folder).parts) for f in found if f.suffix.lower() in _IMAGE_SUFFIXES]
    files = [(f, p[0] if len(p) > 1 else None) for f, p in inner if not any(name.startswith(".") for name in p)]
    if not files:
        raise DataError(f"folder:PATH needs images, {folder} has none: put {', '.join(sorted(_IMAGE_SUFFIXES))} there")
    if len({label is None for _, label in files}) > 1:
        raise DataError(
            f"{folder} has images beside its class folders: move them into a class folder, or all out of them"
        )
    return files


def _class_indices(files: list[tuple[Path, str | None]], classes: list[str]) -> Tensor | None:
    names = [name for _, name in files if name is not None]
    index = {name: i for i, name in enumerate(classes)}
    return torch.tensor([index[name] for name in names]) if names else None


def _decoded(files: list[Path]) -> Tensor:
    """All images as 8-bit ``[N, C, H, W]``."""
    first = _pixels(files[0])
    x = torch.empty(len(files), *first.shape, dtype=torch.uint8)
    with ThreadPool() as pool:
        for i, pixels in enumerate(pool.imap(_pixels, files, chunksize=16)):
            if pixels.shape != first.shape:
                raise DataError(
                    f"images must have one size and number of channels: {files[i]} is {_size(pixels)}, "
                    f"{files[0]} is {_size(first)}: resize or convert them beforehand"
                )
            x[i] = pixels
    return x


def _pixels(path: Path) -> Tensor:
    from PIL import Image

    with _reading(path, "replace or remove the damaged image"), Image.open(path) as image:
        if image.mode not in _GREY_MODES | _COLOUR_MODES:
            raise DataError(f"images must have 8 bits a channel, {path} has mode {image.mode!r}: convert it beforehand")
        pixels = torch.from_numpy(np.array(image.convert("L" if image.mode in _GREY_MODES else "RGB")))
    return pixels.unsqueeze(0) if pixels.dim() == 2 else pixels.permute(2, 0, 1)


def _size(pixels: Tensor) -> str:
    channels, height, width = pixels.shape
    return f"{width}x{height} with {channels} channel{'s' * (channels > 1)}"


def _arrays(dataset: Any) -> Part:
    labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    return _channels_first(torch.as_tensor(dataset.data)), torch.as_tensor(labels)


def _strokes(dataset: Any) -> Part:
    """Omniglot's drawings, black on white, as strokes of 1 on 0."""
    # torchvision numbers the characters in the order of os.listdir, which differs between machines.
    files = sorted(Path(dataset.target_folder).glob("*/*/*.png"))
    number = {folder: i for i, folder in enumerate(dict.fromkeys(file.parent for file in files))}
    return 255 - _decoded(files), torch.tensor([number[file.parent] for file in files])


def _torchvision(
    kind: str, folder: str, files: str, arrays: Callable[[Any], Part] = _arrays, **splits: tuple[Any, Any]
) -> Reader:
    """A reader of ``torchvision.datasets.<kind>``; ``splits``: its split argument, with the train and test values."""
    [(argument, values)] = (splits or {"train": (True, False)}).items()

    def read(root: Path, download: bool) -> Parts:
        from torchvision import datasets

        put = f"put {files} into {root / folder}, or {_ROOT}"
        with _reading(root / folder, f"its files are damaged; delete them and {put}"):
            opened = [
                _opened(partial(getattr(datasets, kind), root, **{argument: v}), kind, root, put, download)
                for v in values
            ]
            return dict(zip(("train", "test"), map(arrays, opened), strict=True))

    return read


def _opened(make: Callable[..., Any], kind: str, root: Path, put: str, download: bool) -> Any:
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
            why = f"the download failed ({_brief(error)})"
    raise DataError(f"{kind} is not under {root} and {why}: {put}")
