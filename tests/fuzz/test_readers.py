"""Damaged files of data: a DataError in one line, or values as they were; never another error, never a hang."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

import pyrovae as pv
from pyrovae.errors import DataError, ResourceError
from tests.fuzz.damage import answer, damaged

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (6, 5, 5), np.uint8)
BITS = RANDOM.integers(0, 2, (4, 784))


def npz(**arrays: np.ndarray) -> bytes:
    made = io.BytesIO()
    np.savez(made, **arrays)
    return made.getvalue()


def png(pixels: np.ndarray) -> bytes:
    made = io.BytesIO()
    Image.fromarray(pixels).save(made, "png")
    return made.getvalue()


def jpeg(pixels: np.ndarray) -> bytes:
    made = io.BytesIO()
    Image.fromarray(pixels).save(made, "jpeg")
    return made.getvalue()


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def mat(**arrays: np.ndarray) -> bytes:
    made = io.BytesIO()
    savemat(made, arrays)
    return made.getvalue()


def amat(bits: np.ndarray) -> bytes:
    return b"".join(b" ".join(b"%d" % bit for bit in row) + b" \n" for row in bits)


@dataclass(frozen=True)
class Set:
    """A data set as its files, of which one is to be damaged, and the name and root it is loaded under."""

    files: dict[str, bytes]
    victim: str
    name: Callable[[Path], str]
    sealed: bool = True  # whether the format has a checksum of its values, by which one accident is found

    def load(self, folder: Path, content: bytes) -> pv.data.Splits:
        for name, kept in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if name == self.victim else kept)
        return pv.data.load(self.name(folder), folder, labels=None, download=False)


IMAGES = {f"train/{i % 2}/{i}.png": png(x) for i, x in enumerate(PIXELS)} | {"test/0/7.png": png(PIXELS[0])}
AMAT = {f"binarized_mnist_{part}.amat": amat(BITS) for part in ("train", "valid", "test")}
IDX = {
    f"MNIST/raw/{part}-{kind}": idx(array)
    for part in ("train", "t10k")
    for kind, array in (("images-idx3-ubyte", PIXELS), ("labels-idx1-ubyte", np.arange(6)))
}
ARRAYS = {"x": PIXELS, "y": np.arange(6), "x_test": PIXELS[:2], "y_test": np.arange(2)}
CHARS = {"data": BITS.T, "testdata": BITS.T, "targetchar": np.arange(4)[None], "testtargetchar": np.arange(4)[None]}
SETS = {
    "npz": Set({"d.npz": npz(**ARRAYS)}, "d.npz", lambda f: f"npz:{f / 'd.npz'}"),
    "png": Set(IMAGES, "train/0/0.png", lambda f: f"folder:{f}"),
    "jpeg": Set({"0.jpg": jpeg(PIXELS[0]), "1.jpg": jpeg(PIXELS[1])}, "0.jpg", lambda f: f"folder:{f}", sealed=False),
    "amat": Set(AMAT, "binarized_mnist_valid.amat", lambda f: "binarized_mnist", sealed=False),
    "idx images": Set(IDX, "MNIST/raw/train-images-idx3-ubyte", lambda f: "mnist", sealed=False),
    "idx labels": Set(IDX, "MNIST/raw/t10k-labels-idx1-ubyte", lambda f: "mnist", sealed=False),
    "mat": Set({"chardata.mat": mat(**CHARS)}, "chardata.mat", lambda f: "omniglot28", sealed=False),
}


def answered(load: Callable[[], pv.data.Splits]) -> pv.data.Splits | None:
    """What is loaded, or None after an error that is one of ours."""
    return answer(load, DataError, ResourceError)


def values(splits: pv.data.Splits) -> list[torch.Tensor]:
    return [column for part in splits if part is not None for column in part.columns]


@pytest.mark.parametrize("name", SETS)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_harmless(name, data, tmp_path_factory):
    kind = SETS[name]
    folder = tmp_path_factory.mktemp("set")
    content = data.draw(damaged(kind.files[kind.victim], 1 if kind.sealed else 3))
    splits = answered(lambda: kind.load(folder, content))
    if splits is None:
        return
    for part in splits:
        if part is not None:
            assert torch.isfinite(part.x).all()
            assert part.x.min() >= 0
            assert part.x.max() <= 1
            assert part.labels is None or len(part.labels) == len(part)
    if kind.sealed:
        whole = kind.load(tmp_path_factory.mktemp("whole"), kind.files[kind.victim])
        for mine, theirs in zip(values(splits), values(whole), strict=True):
            assert torch.equal(mine, theirs)


DTYPES = ["?", "i1", "u1", "<i2", ">i2", "<u4", "<i8", "<u8", "<f2", "<f4", ">f8", "<c8", "<U2", "S3", "<M8[s]", "O"]


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 12, 20]), max_size=4))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    made = np.asarray(RANDOM.integers(0, draw(st.sampled_from([1, 2, 256])), shape))
    if dtype.kind == "f" and draw(st.booleans()):
        return np.where(made > 0, draw(st.floats()), made).astype(dtype)
    return made.astype(dtype)


@given(x=arrays(), y=st.none() | arrays(), x_test=st.none() | arrays(), y_test=st.none() | arrays())
def test_an_archive_of_any_arrays_is_refused_or_kept_as_it_is(x, y, x_test, y_test, tmp_path_factory):
    path = tmp_path_factory.mktemp("any") / "d.npz"
    given_ = {"x": x, "y": y, "x_test": x_test, "y_test": y_test}
    np.savez(path, allow_pickle=True, **{name: array for name, array in given_.items() if array is not None})
    splits = answered(lambda: pv.data.load(f"npz:{path}", labels=None))
    if splits is None or x_test is None:
        return
    for array, labels, part in ((x, y, splits.train), (x_test, y_test, splits.test)):
        assert len(part) == len(array)
        assert part.x.numel() == array.size
        scale = 255 if array.dtype == np.uint8 else 1
        theirs = np.sort(array.astype(np.float64).ravel()) / scale
        np.testing.assert_allclose(np.sort(part.x.double().numpy().ravel()), theirs, rtol=1e-6)
        if y is not None and y_test is not None:
            assert part.labels is not None
            assert part.labels.tolist() == labels.tolist()


@given(count=st.integers(0, 2**40), kind=st.sampled_from(["u1", "<f8"]))
def test_a_header_that_promises_more_than_there_is_allocates_nothing(count, kind, tmp_path_factory):
    assume(count > 10)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": kind, "fortran_order": False, "shape": (count, 2, 2)})
    path = tmp_path_factory.mktemp("promise") / "d.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", header.getvalue() + bytes(40))
    assert answered(lambda: pv.data.load(f"npz:{path}")) is None


@given(
    number=st.integers(1, 12),
    validation=st.one_of(st.integers(-2, 14), st.floats(-0.5, 1.5), st.booleans()),
    seed=st.integers(-5, 2**70),
)
def test_parts_are_disjoint_and_whole(number, validation, seed, tmp_path_factory):
    x = np.arange(number * 3, dtype=np.float32).reshape(number, 3) / 100
    path = tmp_path_factory.mktemp("parts") / "d.npz"
    np.savez(path, x=x)
    splits = answer(lambda: pv.data.load(f"npz:{path}", validation=validation, seed=seed), ValueError)
    if splits is not None:
        rows = torch.cat([part.x for part in splits if part is not None])
        assert torch.equal(rows[rows[:, 0].argsort()], torch.from_numpy(x))
