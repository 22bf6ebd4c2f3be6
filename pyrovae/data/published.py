"""Sets that torchvision publishes: fetched whole, and taken only if their files are the originals."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import socket
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyrovae.arguments import one_line
from pyrovae.data.arrays import Part, Parts, channels_first
from pyrovae.data.files import OTHER_ROOT, content_of, is_lacking, reading, regular, status
from pyrovae.data.folders import decode_images
from pyrovae.engine.programs import warn
from pyrovae.errors import DataError, ResourceError

LARGEST = 2**30  # bytes, which no published file has
STALLED = 30.0  # seconds without a byte, after which a download is given up
#: Of MNIST's files as they are unpacked; torchvision knows those of the packed ones.
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}

Source = Any  # a class of torchvision.datasets
Checksums = dict[str, str]  # md5 by path below the root


@dataclass(frozen=True)
class Published:
    """A reader of ``torchvision.datasets.<kind>``.

    :param kind: the class.
    :param checksums: what its files are, and their md5, by the class.
    :param read: one part, from the class, the root and the value of ``split`` for it.
    :param split: the argument that tells the parts apart, and its values for train and test.
    """

    kind: str
    checksums: Callable[[Source], Checksums]
    read: Callable[[Source, Path, object], Part]
    split: tuple[str, object, object] = ("train", True, False)

    def __call__(self, root: Path, download: bool) -> Parts:
        from torchvision import datasets

        source = getattr(datasets, self.kind)
        md5 = self.checksums(source)
        names = ", ".join(os.path.basename(name).removesuffix(".gz") for name in md5)
        put = f"put {names} into {(root / next(iter(md5))).parent}, or {OTHER_ROOT}"
        if not all(is_there(root / name) or is_there(root / name.removesuffix(".gz")) for name in md5):
            self.fetch(source, root, put, download)
        for path in filter(is_there, (root / name for name in md5)):
            if regular(path, put).stat().st_size > LARGEST:
                raise DataError(f"{path} is larger than any of the originals: delete it and {put}")
        try:
            with reading(root, f"its files are damaged; delete them and {put}"):
                train, test = (self.read(source, root, value) for value in self.split[1:])
        except DataError:
            for path, known in ((root / name, known) for name, known in md5.items()):
                if is_there(path) and not is_original(path, known):
                    raise DataError(f"{path} is damaged, its md5 is not {known}: delete it and {put}") from None
            raise
        return {"train": train, "test": test}

    def fetch(self, source: Source, root: Path, put: str, download: bool) -> None:
        """Let torchvision download into a folder aside, and move what has come whole into its place."""
        absent = f"{self.kind} is not under {root}"
        if not download:
            raise DataError(f"{absent} and download=False: {put}")
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as aside, impatient():
                for value in self.split[1:]:
                    source(aside, **{self.split[0]: value}, download=True)
                for path in filter(Path.is_file, Path(aside).rglob("*")):
                    place = root / path.relative_to(aside)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    if not is_there(place):
                        path.replace(place)
        except Exception as error:
            kind = ResourceError if is_lacking(error) else DataError
            why = one_line(f"{type(error).__name__}: {error}")
            raise kind(f"{absent} and the download failed ({why}): {put}") from error


def is_there(path: Path) -> bool:
    """Whether there is a file, of whatever kind."""
    try:
        return bool(status(path, ""))
    except DataError:
        return False


def is_original(path: Path, md5: str) -> bool:
    """Whether a file has this md5."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest() == md5


@contextmanager
def impatient() -> Iterator[None]:
    """Sockets that are opened inside give up once nothing has come for some time."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALLED)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def arrays_of(argument: str) -> Callable[[Source, Path, object], Part]:
    """Reads values and labels from the class itself, which checks the md5 of its files; labels have either name."""

    def read(source: Source, root: Path, value: object) -> Part:
        dataset = source(root, **{argument: value})
        labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
        return channels_first(torch.as_tensor(dataset.data), source.__name__), torch.as_tensor(labels)

    return read


def omniglot_strokes(source: Source, root: Path, background: object) -> Part:
    """Omniglot's drawings, black on white, as strokes of 1 on 0, from the archive, which cannot be unpacked by half."""
    folder = "images_background" if background else "images_evaluation"
    path = root / source.folder / f"{folder}.zip"
    if not is_original(path, source.zips_md5[folder]):
        raise DataError(f"{path} is damaged: fetch it again")
    with zipfile.ZipFile(path) as archive:
        # By names: torchvision numbers the characters in the order of os.listdir, which differs between machines.
        names = sorted((n for n in archive.namelist() if n.endswith(".png")), key=lambda name: name.split("/"))
        x = decode_images([(name, archive.read(name)) for name in names])
    characters = [os.path.dirname(name) for name in names]
    number = {character: i for i, character in enumerate(dict.fromkeys(characters))}
    return 255 - x, torch.tensor([number[character] for character in characters])


def read_idx(source: Source, root: Path, train: object) -> Part:
    """Images and labels of a set in MNIST's format."""
    folder, part = root / source.__name__ / "raw", "train" if train else "t10k"
    x = idx_array(source, folder / f"{part}-images-idx3-ubyte", 3)
    y = idx_array(source, folder / f"{part}-labels-idx1-ubyte", 1)
    if len(x) != len(y) or y.max(initial=0) >= len(source.classes):
        raise DataError(
            f"{folder} must have a label below {len(source.classes)} for each image, has {len(y)} labels up to "
            f"{y.max(initial=0)} for {len(x)} images: delete its files and fetch them again"
        )
    return channels_first(torch.from_numpy(x), str(folder)), torch.from_numpy(y).long()


def idx_array(source: Source, path: Path, dims: int) -> np.ndarray:
    """The array in an idx file, held to its header."""
    content = original(source, path)
    start = 4 + 4 * dims
    shape = struct.unpack(f">{dims}I", bytes(content[4:start]).ljust(4 * dims, b"\0"))
    if bytes(content[:4]) != bytes([0, 0, 8, dims]) or len(content) != start + math.prod(shape):
        raise DataError(f"{path} is no idx file of {dims} axes, or not whole: delete it and fetch it again")
    return content[start:].reshape(shape)


def original(source: Source, path: Path) -> np.ndarray:
    """The bytes of an idx file, held to those published: by SHA-256, or by the packed file beside it and its md5."""
    packed, raw, same, fix = path.with_name(path.name + ".gz"), is_there(path), True, "put the original file there"
    content = content_of(path, fix) if raw else b""
    if raw and source.__name__ == "MNIST":
        same = hashlib.sha256(content).hexdigest() == MNIST_SHA256[path.name]
    elif is_there(packed):
        same = is_original(regular(packed, fix), dict(source.resources)[packed.name])
        if same and raw:
            same = packed.read_bytes()[-8:-4] == zlib.crc32(content).to_bytes(4, "little")
        elif same:
            content = gzip.decompress(packed.read_bytes())
    else:
        warn(f"{path} is taken unverified: nothing is known of it without {packed.name} beside it")
    if not same:
        raise DataError(
            f"{path} is damaged, or not the one that was published, by its checksum: delete it and fetch it again; "
            "npz:PATH reads data of your own"
        )
    return np.frombuffer(bytearray(content), np.uint8)


def mnist_like(kind: str) -> Published:
    """The reader of a set in MNIST's format."""
    return Published(kind, lambda source: {f"{kind}/raw/{name}": md5 for name, md5 in source.resources}, read_idx)


MNIST, FASHION_MNIST, KMNIST = map(mnist_like, ("MNIST", "FashionMNIST", "KMNIST"))
OMNIGLOT = Published(
    "Omniglot",
    lambda source: {f"{source.folder}/{name}.zip": md5 for name, md5 in source.zips_md5.items()},
    omniglot_strokes,
    ("background", True, False),
)
CIFAR10 = Published(
    "CIFAR10",
    lambda source: {
        f"{source.base_folder}/{name}": md5
        for name, md5 in (*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"]))
    },
    arrays_of("train"),
)
SVHN = Published(
    "SVHN",
    lambda source: {source.split_list[part][1]: source.split_list[part][2] for part in ("train", "test")},
    arrays_of("split"),
    ("split", "train", "test"),
)
