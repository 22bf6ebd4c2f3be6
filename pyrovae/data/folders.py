"""Folders of images: which files count, and what becomes of their pixels."""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyrovae.data.arrays import Parts
from pyrovae.data.files import reading, regular, status
from pyrovae.engine.programs import warn
from pyrovae.errors import DataError
from pyrovae.memory import require_memory

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

#: Pillow's names of the formats that are opened, whatever a file is called; no other parser ever sees one. Those that
#: its ``preinit`` does not know stand last: to look for them, it imports all others too.
FORMATS = ("PNG", "JPEG", "BMP", "PPM", "GIF", "TIFF", "WEBP")
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".ppm", ".tif", ".tiff", ".webp", ".gif"}
GREY_MODES = {"1", "L", "LA", "La"}
COLOUR_MODES = {"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}
PARTS = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("val", "valid", "validation", "dev"), "validation"
)

Encoded = Path | tuple[str, bytes]  # an image: its file, or its name and content
Shape = tuple[int, int, int]


def read_folder(path: Path, download: bool) -> Parts:
    """The images below a folder, one part of all or parts by its subfolders' names; classes are numbered alike."""
    info = status(path, fix := "folder:PATH needs an existing folder, check the path")
    if not stat.S_ISDIR(info.st_mode):
        raise DataError(f"{path} is none: {fix}")
    with reading(path, "remove what is no folder of images"):
        seen = {(info.st_dev, info.st_ino): path}
        listed = {part: list_images(folder, seen) for part, folder in part_folders(path).items()}
    classes = sorted({c for files in listed.values() for _, c in files if c is not None})
    # Decoded together, so that all parts are held to one size.
    x = decode_images([file for files in listed.values() for file, _ in files])
    pixels = x.split([len(files) for files in listed.values()])
    number = {name: i for i, name in enumerate(classes)}
    labels = ([number[c] for _, c in files if c is not None] for files in listed.values())
    return {part: (x, torch.tensor(y) if y else None) for part, x, y in zip(listed, pixels, labels, strict=True)}


def entries(folder: Path) -> list[Path]:
    """What is in a folder and not hidden."""
    return sorted(entry for entry in folder.iterdir() if entry.name[0] != ".")


def is_image(path: Path) -> bool:
    """Whether a file is an image by its name."""
    return path.suffix.lower() in SUFFIXES


def part_folders(path: Path) -> dict[str, Path]:
    """The parts by the names of the subfolders; a held-out part alone is the test part, no held-out part, the whole."""
    inner = [entry for entry in entries(path) if entry.is_dir()]
    named = [(PARTS[entry.name.lower()], entry) for entry in inner if entry.name.lower() in PARTS]
    parts = dict(named)
    if "train" not in parts or (len(parts) == 1 and len(inner) > 1):
        if parts and len(named) == len(inner):
            raise DataError(f"{path} has {named[0][1].name}, but no train beside it: name the training part train")
        return {"train": path}
    rest = [e for e in entries(path) if e not in parts.values() and (e.is_dir() or is_image(e) or not e.exists())]
    if rest:
        raise DataError(
            f"{path} has parts, one folder train and at most one each for validation and test, and {rest[0].name} "
            "beside them: move it into one of them, or away"
        )
    if "validation" in parts and "test" not in parts:
        parts["test"] = parts.pop("validation")
    return {part: parts[part] for part in ("train", "test", "validation") if part in parts}


def list_images(folder: Path, seen: dict[tuple[int, int], Path]) -> list[tuple[Path, str | None]]:
    """The images of ``folder``, each with its class: the name of its subfolder, None in a flat folder."""
    found = sorted(files_below(folder, seen))
    files = [(path, None if path.parent == folder else path.relative_to(folder).parts[0]) for path in found]
    images = [(path, label) for path, label in files if is_image(path)]
    classes, suffixes = {label for _, label in images}, ", ".join(sorted(SUFFIXES))
    if not images:
        raise DataError(f"folder:PATH needs images, {folder} has none: put {suffixes} there")
    if None in classes and len(classes) > 1:
        raise DataError(
            f"{folder} has images beside its class folders: move them into a class folder, or all out of them"
        )
    for inner in entries(folder):
        if inner.is_dir() and inner.name not in classes:
            raise DataError(f"every class folder needs images, {inner} has none: put {suffixes} there, or remove it")
    if left := [path for path, _ in files if not is_image(path)]:
        warn(f"{len(left)} files below {folder} are left out, not being named {suffixes}: the first is {left[0].name}")
    return images


def files_below(folder: Path, seen: dict[tuple[int, int], Path]) -> Iterator[Path]:
    """All files below a folder but hidden ones. Links are followed; what they lead to a second time is refused."""
    waiting = [folder]
    while waiting:
        path = waiting.pop()
        info = status(path, "mend it, or remove it from the folder of images")
        first = seen.setdefault((info.st_dev, info.st_ino), path)
        if first != path:
            raise DataError(f"no image may count twice, but links make {path} the same as {first}: remove one of them")
        if stat.S_ISDIR(info.st_mode):
            waiting += entries(path)
        else:
            yield regular(path, "remove it from the folder of images")


def decode_images(files: Sequence[Encoded]) -> Tensor:
    """All images as 8-bit ``[N, C, H, W]``.

    No pixel is decoded before there is memory for all, and none of an image whose header has not the first's size.
    """
    with opened(files[0]) as image:
        shape = declared(image)
    number, floats = len(files), torch.get_default_dtype().itemsize
    what = f"{number:,} images of {shape[2]}x{shape[1]} pixels, held as reals,"
    require_memory(number * math.prod(shape) * (1 + floats), what, "take fewer, or make them smaller")
    first = decode_image(files[0], shape, files[0])
    x = torch.empty(number, *first.shape, dtype=torch.uint8)
    with ThreadPool() as pool:
        for i, pixels in enumerate(pool.imap(partial(decode_image, like=shape, of=files[0]), files, chunksize=16)):
            check_alike(pixels.shape, files[i], first.shape, files[0])
            x[i] = pixels
    return x


def decode_image(file: Encoded, like: Shape, of: Encoded) -> Tensor:
    """An image as 8-bit ``[C, H, W]``, grey or RGB, upright as its EXIF data say, whatever is transparent in it."""
    from PIL import ImageOps

    with opened(file) as image:
        channels, *size = declared(image)
        if channels != like[0] or sorted(size) != sorted(like[1:]):  # turned it may be yet
            check_alike((channels, *size), file, like, of)
        ImageOps.exif_transpose(image, in_place=True)
        image.info.pop("transparency", None)
        pixels = torch.from_numpy(np.array(image.convert("L" if channels == 1 else "RGB")))
    return pixels.unsqueeze(0) if pixels.dim() == 2 else pixels.permute(2, 0, 1)


@contextmanager
def opened(file: Encoded) -> Iterator[ImageFile]:
    """An image whose header has been read: one frame, of 8 bits a channel."""
    from PIL import Image

    Image.preinit()
    name, content = (file, file) if isinstance(file, Path) else (file[0], BytesIO(file[1]))
    with reading(name, "replace or remove the damaged image"), Image.open(content, formats=FORMATS) as image:
        if image.mode not in GREY_MODES | COLOUR_MODES or is_deep(image):
            raise DataError(f"images must have 8 bits a channel, {name} has mode {image.mode!r}: convert it beforehand")
        if getattr(image, "is_animated", False) and image.format != "MPO":
            raise DataError(f"images must have one frame, {name} has more: save each as an image of its own")
        yield image


def is_deep(image: ImageFile) -> bool:
    """Whether there are more than 8 bits a channel, of which Pillow would drop the lowest."""
    coded = image.tile[0][3] if image.tile else None
    levels = coded[-1] if image.format == "PPM" and isinstance(coded, tuple) else 255
    return levels > 255 or re.search(r";16[BLN]", str(coded)) is not None


def declared(image: ImageFile) -> Shape:
    """Channels, height and width by an image's header."""
    return (1 if image.mode in GREY_MODES else 3, image.height, image.width)


def check_alike(shape: Sequence[int], file: Encoded, wanted: Sequence[int], first: Encoded) -> None:
    """Hold an image to the first one's size."""
    if tuple(shape) != tuple(wanted):
        size, like = (f"{w}x{h} with {c} channel{'s' * (c > 1)}" for c, h, w in (shape, wanted))
        name, of = (f if isinstance(f, Path) else f[0] for f in (file, first))
        raise DataError(
            f"images must have one size and number of channels: {name} is {size}, {of} is {like}: "
            "resize or convert them beforehand"
        )
