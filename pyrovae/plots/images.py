"""Pictures of images: sheets of 8-bit pixels, side by side."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from pyrovae.arguments import positive_int
from pyrovae.files import replacing

INK, MUTED, LINES = "#2b2d31", "#6f747c", "#e6e7ea"
DPI = 150
CELL = 56  # pixels that a small image is enlarged to, at least, by whole factors
GAP, PAGE, FRAME = 2, 255, 205
BETWEEN, WIDE = 16, 8  # pixels between two sheets, and that a letter takes at most
LONGEST = 50_000  # pixels of a side, with room for a title and labels: the backend ends at 2**16

StrPath = str | os.PathLike[str]


def is_image(shape: Sequence[int]) -> bool:
    """Whether a datum of this shape can be shown: ``(H, W)``, or ``(C, H, W)`` with 1 or 3 channels.

    >>> is_image((1, 28, 28)), is_image((32, 32)), is_image((784,)), is_image((2, 8, 8))
    (True, True, False, False)
    """
    shape = tuple(shape)
    return len(shape) in (2, 3) and min(shape[-2:]) > 1 and (len(shape) == 2 or shape[0] in (1, 3))


def rgb(images: Tensor, name: str) -> np.ndarray:
    """Images as 8-bit RGB, ``[N, H, W, 3]``."""
    if not isinstance(images, Tensor) or not len(images) or not is_image(images.shape[1:]):
        shape = tuple(images.shape) if hasattr(images, "shape") else type(images).__name__
        raise ValueError(
            f"{name} must be [N, H, W] or [N, C, H, W] with 1 or 3 channels, got {shape}: reshape them into images"
        )
    x = np.nan_to_num(as_numpy(images), nan=0.0).clip(0, 1)
    x = x[:, None] if x.ndim == 3 else x
    return np.broadcast_to((255 * x).round().astype(np.uint8), (len(x), 3, *x.shape[2:])).transpose(0, 2, 3, 1)


def mosaic(pixels: np.ndarray, columns: int, gap: int = GAP, *, smooth: bool = False) -> np.ndarray:
    """Enlarged images on one sheet, ``[height, width, 3]``; cells without an image have the colour of the page."""
    factor = enlarged(*pixels.shape[1:3]) if gap else 1
    if smooth:
        size = factor * pixels.shape[2], factor * pixels.shape[1]
        enlarge = (Image.fromarray(image).resize(size, Image.Resampling.BICUBIC) for image in pixels)
        tiles = np.stack([np.asarray(image) for image in enlarge])
    else:
        tiles = pixels.repeat(factor, 1).repeat(factor, 2)
    count, height, width, _ = tiles.shape
    rows = math.ceil(count / columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), PAGE, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        # A frame round each image, shared with its neighbours: white images stand out from the page.
        sheet[top - gap : top + height + gap, left - gap : left + width + gap] = FRAME
        sheet[top : top + height, left : left + width] = tile
    return sheet


def enlarged(height: int, width: int) -> int:
    """The whole factor by which images of a size are shown."""
    return max(1, math.ceil(CELL / max(height, width)))


def sheet_shape(count: int, size: tuple[int, int], columns: int | None = None, *, left: int = 0) -> tuple[int, int]:
    """Height and width of a sheet of ``count`` images in pixels; by default as many columns as make it square.

    :param left: pixels of the picture that are to its left.

    :raises ValueError: a side that is longer than a picture can be.
    """
    columns = min(math.ceil(math.sqrt(count)) if columns is None else positive_int("columns", columns), count)
    shape = math.ceil(count / columns), columns
    height, width = (number * (enlarged(*size) * side + GAP) + GAP for number, side in zip(shape, size, strict=True))
    if max(height, left + width) > LONGEST:
        raise ValueError(
            f"{count:,} images in {columns:,} columns make a picture of {height:,} x {left + width:,} pixels, a side "
            f"has at most {LONGEST:,}: draw fewer images"
        )
    return height, width


def as_numpy(x: Tensor) -> np.ndarray:
    """The values of a tensor on any device; bfloat16, which NumPy lacks, as float32."""
    x = x.detach().cpu()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def image_grid(
    images: Tensor,
    path: StrPath | None = None,
    *,
    columns: int | None = None,
    title: str | None = None,
    smooth: bool = False,
) -> Figure:
    """Images side by side, row by row, enlarged by a whole factor so that each pixel stays a sharp square.

    :param images: ``[N, H, W]`` or ``[N, C, H, W]`` with 1 or 3 channels; values are clipped to [0, 1], NaN is black.
    :param path: a PNG to write as well.
    :param columns: images per row; by default as many as make the grid square.
    :param title: a line above the grid.
    :param smooth: enlarge by cubic interpolation instead, in which images of few pixels are easier to read.
    :raises ValueError: no images, or of another shape.

    >>> image_grid(torch.rand(6, 8, 8), columns=3, title="noise").get_size_inches()
    array([1.7601, 1.4801])
    """
    return side_by_side({title or "": images}, path, columns=columns, smooth=smooth)


def side_by_side(
    groups: Mapping[str, Tensor], path: StrPath | None = None, *, columns: int | None = None, smooth: bool = False
) -> Figure:
    """Grids of images, each as of :func:`image_grid`, next to each other under their names: data beside samples.

    :param groups: by name, ``[N, H, W]`` or ``[N, C, H, W]`` each.
    :raises ValueError: no groups, or images of which there is none, or of another shape.

    >>> drawn = side_by_side({"data": torch.rand(4, 8, 8), "samples": torch.rand(4, 8, 8)})
    >>> [text.get_text() for text in drawn.texts]
    ['data', 'samples']
    """
    if not groups:
        raise ValueError("groups is empty: pass images by name")
    sheets, left = [], 0
    for name, images in groups.items():
        pixels = rgb(images, f"images of {name!r}" if len(groups) > 1 else "images")
        _, width = sheet_shape(len(pixels), pixels.shape[1:3], columns, left=left)
        across = min(columns or math.ceil(math.sqrt(len(pixels))), len(pixels))
        sheets.append((left, mosaic(pixels, across, smooth=smooth)))
        left += max(width, WIDE * len(name)) + BETWEEN
    height, width = max(len(sheet) for _, sheet in sheets), max(x + sheet.shape[1] for x, sheet in sheets)
    canvas = np.full((height, width, 3), PAGE, np.uint8)
    for x, sheet in sheets:
        canvas[: len(sheet), x : x + sheet.shape[1]] = sheet
    titles = [(x, name) for (x, _), name in zip(sheets, groups, strict=True)]
    return save(of_pixels(canvas, titles), path)


def reconstructions(
    originals: Tensor,
    reconstructions: Tensor,
    path: StrPath | None = None,
    *,
    columns: int = 10,
    title: str | None = None,
    smooth: bool = False,
) -> Figure:
    """Rows of data with the model's reconstruction below each; the images as in :func:`image_grid`."""
    above, below = rgb(originals, "originals"), rgb(reconstructions, "reconstructions")
    if above.shape[:3] != below.shape[:3]:
        raise ValueError(
            f"originals and reconstructions must have one shape, got {tuple(originals.shape)} and "
            f"{tuple(reconstructions.shape)}: pass one reconstruction per datum"
        )
    columns = min(positive_int("columns", columns), len(above))
    canvas, labels = np.empty((0, *mosaic(above[:columns], columns).shape[1:]), np.uint8), []
    for i in range(0, len(above), columns):
        for part, name in ((above, "data"), (below, "model")):
            row = mosaic(part[i : i + columns], columns, smooth=smooth)
            labels.append((len(canvas) + len(row) // 2, name))
            canvas = np.concatenate([canvas, row])
        canvas = np.concatenate([canvas, np.full((6 * GAP, *canvas.shape[1:]), PAGE, np.uint8)])
    return save(of_pixels(canvas[: -6 * GAP], [(0, title or "")], labels), path)


def image_rows(groups: Mapping[str, Tensor], path: StrPath | None = None, *, smooth: bool = False) -> Figure:
    """A row of images for each name, one below the other, the names on the left: data above what models make of them.

    :param groups: by name, ``[N, H, W]`` or ``[N, C, H, W]`` each; as in :func:`image_grid`.
    :param path: a PNG to write as well.
    :raises ValueError: no groups, or images of which there is none, or of another shape.

    >>> drawn = image_rows({"data": torch.rand(4, 8, 8), "model": torch.rand(4, 8, 8)})
    >>> [text.get_text() for text in drawn.texts]
    ['data', 'model']
    """
    if not groups:
        raise ValueError("groups is empty: pass images by name")
    sheets, labels, top = [], [], 0
    for name, images in groups.items():
        pixels = rgb(images, f"images of {name!r}")
        sheet_shape(len(pixels), pixels.shape[1:3], len(pixels))
        sheets.append(mosaic(pixels, len(pixels), smooth=smooth))
        labels.append((top + len(sheets[-1]) // 2, name))
        top += len(sheets[-1])
    canvas = np.full((top, max(sheet.shape[1] for sheet in sheets), 3), PAGE, np.uint8)
    for (middle, _), sheet in zip(labels, sheets, strict=True):
        start = middle - len(sheet) // 2
        canvas[start : start + len(sheet), : sheet.shape[1]] = sheet
    return save(of_pixels(canvas, [(0, "")], labels), path)


def of_pixels(sheet: np.ndarray, titles: Sequence[tuple[int, str]], labels: Sequence[tuple[int, str]] = ()) -> Figure:
    """The sheet at one screen pixel per value; above it titles, from the left, beside it labels, from the top."""
    height, width, _ = sheet.shape
    left = max(46, *(6 + WIDE * len(label) for _, label in labels)) if labels else 0
    top = 30 if any(title for _, title in titles) else 0
    full_width, full_height = max(left + width, *(x + WIDE * len(title) for x, title in titles)), top + height
    # A touch more than the exact size, as the backend cuts the product of inches and dots per inch down to pixels.
    figure = Picture(((full_width + 0.01) / 100, (full_height + 0.01) / 100), dpi=100, facecolor="white")
    figure.figimage(sheet, xo=left, yo=0, origin="upper")
    for x, title in titles:
        if title:
            figure.text((x + 2) / full_width, 1 - 14 / full_height, title, fontsize=10, color=INK, va="center")
    for y, label in labels:
        x, y = (left - 7) / full_width, 1 - (top + y) / full_height
        figure.text(x, y, label, fontsize=8, color=MUTED, ha="right", va="center")
    return figure


class Picture(Figure):
    """A figure apart from pyplot's, which a notebook shows all the same."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", metadata={"Software": None})
        return file.getvalue()


def save(figure: Figure, path: StrPath | None) -> Figure:
    """The figure, which is written as a PNG if a path is given."""
    if path is None:
        return figure
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f'pictures are PNG files, got "{path}": name it .png')
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        figure.savefig(aside, format="png", metadata={"Software": None})
    return figure
