"""Readers: one for each format, from files to the parts of a data set.

A reader takes a folder (or the path after ``folder:`` or ``npz:``) and whether it may download; it returns the parts
"train", "test" and "validation" that the set has, each as raw values and labels. A new set is a row of
:data:`pyrovae.data.names.SOURCES`, which names its reader.
"""

from __future__ import annotations

import importlib
import math
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyrovae.arguments import one_line
from pyrovae.data.arrays import Parts, as_tensor, channels_first, check_numbers, whole_numbers
from pyrovae.data.files import content_of, find_file, reading, regular, require
from pyrovae.data.matlab import read_matrices
from pyrovae.data.names import SOURCES
from pyrovae.errors import DataError

OTHER_ARRAYS = "write it anew with numpy.savez(path, x=x), of numbers, not objects"

Reader = Callable[[Path, bool], Parts]


def reader_of(source: str) -> Reader:
    """The reader of a set, by its key in :data:`SOURCES`; only the file that it stands in is imported."""
    file, _, name = SOURCES[source][0].partition(":")
    return getattr(importlib.import_module(f"pyrovae.data.{file}"), name)


def permutation(total: int, seed: int) -> Tensor:
    """A shuffle of ``total`` indices, the same for a seed on every machine and in every version."""
    # NumPy's legacy generator is the one whose stream is guaranteed never to change between versions.
    return torch.from_numpy(np.random.RandomState(seed % 2**32).permutation(total))


def read_digits(root: Path, download: bool) -> Parts:
    """Scikit-learn's digits, with the same 360 for the test on every machine."""
    package = find_spec("sklearn").submodule_search_locations[0]  # type: ignore[union-attr, index]
    # Its file alone: to import the package takes fifty times as long.
    table = torch.from_numpy(np.loadtxt(Path(package, "datasets", "data", "digits.csv.gz"), delimiter=","))
    x, y = table[:, :64].float().view(-1, 1, 8, 8) / 16, table[:, 64].long()
    order = permutation(len(x), seed=0)
    return {"train": (x[order[360:]], y[order[360:]]), "test": (x[order[:360]], y[order[:360]])}


def read_omniglot28(root: Path, download: bool) -> Parts:
    """The IWAE paper's OMNIGLOT."""
    path = find_file("omniglot28", root, "omniglot28/chardata.mat", "chardata.mat")
    fix, parts = "replace it by the IWAE paper's chardata.mat (arrays data and testdata, 784 x N)", Parts()
    with reading(path, fix):
        mat = read_matrices(path, {"data", "testdata", "targetchar", "testtargetchar"}, fix)
        for part, key in (("train", ""), ("test", "test")):
            columns, labels = mat.get(f"{key}data", np.empty(0)), mat.get(f"{key}targetchar")
            if columns.shape[:1] != (784,) or columns.ndim != 2:
                raise DataError(f"{path} must have {key}data [784, N], has {list(columns.shape)}: {fix}")
            # MATLAB counts down the columns, so that a transpose sets the drawings upright.
            x = as_tensor(columns.T, f"{path}: {key}data").reshape(-1, 1, 28, 28).mT.contiguous()
            if not ((x >= 0) & (x <= 1)).all():
                raise DataError(f"{path} must have {key}data in [0, 1], has {x.min():g} to {x.max():g}: {fix}")
            parts[part] = x, None if labels is None else whole_numbers(labels, f"{path}: {key}targetchar")
    return parts


def read_binarized_mnist(root: Path, download: bool) -> Parts:
    """Larochelle's MNIST, which has a validation part of its own: lines of 784 bits in text."""
    parts = Parts()
    for part, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        file = f"binarized_mnist_{name}.amat"
        path = find_file("binarized_mnist", root, f"binarized_mnist/{file}", file)
        with reading(path, "fetch the file again"):
            parts[part] = bits_of(path).to(torch.get_default_dtype()).reshape(-1, 1, 28, 28), None
    return parts


def bits_of(path: Path) -> Tensor:
    """The bits in a text, 784 in each of its lines, with something between them."""
    text = np.frombuffer(content_of(path, "fetch the file again").removesuffix(b"\n") + b"\n", np.uint8)
    is_bit = (text == ord("0")) | (text == ord("1"))
    starts = np.concatenate([[0], np.flatnonzero(text == ord("\n"))[:-1]])
    counts = np.add.reduceat(is_bit, starts, dtype=np.int64)
    joined = bool((is_bit[1:] & is_bit[:-1]).any())
    if joined or not np.isin(text, np.frombuffer(b"01 \t\r\n", np.uint8)).all() or (counts != 784).any():
        wrong = np.flatnonzero(counts != 784)
        line = f"line {wrong[0] + 1} has {counts[wrong[0]]}" if wrong.size else "it holds other text"
        raise DataError(f"{path} must have 784 values 0 or 1 on each of its lines, but {line}: fetch the file again")
    return torch.from_numpy(text[is_bit] - ord("0"))


def read_npz(path: Path, download: bool) -> Parts:
    """The arrays of a NumPy archive."""
    regular(path, "npz:PATH needs a NumPy archive, write it with numpy.savez(path, x=x)")
    with reading(path, OTHER_ARRAYS):
        names = check_archive(path)
        with np.load(path, allow_pickle=False) as archive:
            tensors = {key: as_tensor(archive[key], f"{path}: {key}") for key in names}
    x, x_test = tensors["x"], tensors.get("x_test")
    parts: Parts = {"train": (channels_first(x, f"{path}: x"), tensors.get("y"))}
    if x_test is not None:
        if (x.dtype == torch.uint8) != (x_test.dtype == torch.uint8):
            raise DataError(
                f"x and x_test must both be 8-bit, or neither, {path} has {x.dtype} and {x_test.dtype}: convert one"
            )
        parts["test"] = (channels_first(x_test, f"{path}: x_test"), tensors.get("y_test"))
    return parts


def check_archive(path: Path) -> list[str]:
    """Which of the arrays are in an archive, their headers, and nothing else, having been read."""
    with zipfile.ZipFile(path) as archive:
        members = [member.removesuffix(".npy") for member in archive.namelist()]
        names: list[str] = [key for key in ("x", "y", "x_test", "y_test") if key in members]
        for needed in ("x", "x_test") if "y_test" in names else ("x",):
            if needed not in names:
                held = one_line(", ".join(members) or "nothing")
                raise DataError(f"npz:PATH needs an array {needed!r}, {path} has: {held}: {OTHER_ARRAYS}")
        infos = [archive.getinfo(f"{key}.npy") for key in names]
        declared = [array_header(archive, info, path) for info in infos]
        stored = sum(info.compress_size for info in infos)
    if len(set(members)) < len(members) or stored > path.stat().st_size:
        raise DataError(f"{path} holds one array twice, or parts that overlap: {OTHER_ARRAYS}")
    require(path, declared, stored, OTHER_ARRAYS)
    return names


def array_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> tuple[tuple[int, ...], int]:
    """The shape of an array in an archive, and its bytes a value; only numbers, and as many as the archive holds."""
    name = f"{path}: {info.filename.removesuffix('.npy')}"
    with archive.open(info) as file:
        old = np.lib.format.read_magic(file) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        start = file.tell()
    check_numbers(dtype, name)
    if min(shape, default=0) < 0 or start + math.prod(shape) * dtype.itemsize != info.file_size:
        raise DataError(f"{name} declares {list(shape)} of {dtype}, which its size does not fit: {OTHER_ARRAYS}")
    return shape, dtype.itemsize
