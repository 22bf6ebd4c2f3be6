"""Images as sheets of 8-bit pixels: what is shown of a datum, and how many are laid side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

CELL = 56  # pixels that a small image is enlarged to, at least, by whole factors
GAP, PAGE, FRAME = 2, 255, 205


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
    x = as_numpy(images)
    x = x[:, None] if x.ndim == 3 else x
    x = np.nan_to_num(x, nan=0.0).clip(0, 1)
    return np.broadcast_to((255 * x).round().astype(np.uint8), (len(x), 3, *x.shape[2:])).transpose(0, 2, 3, 1)


def mosaic(pixels: np.ndarray, columns: int, gap: int = GAP) -> np.ndarray:
    """Enlarged images on one sheet, ``[height, width, 3]``; cells without an image have the colour of the page."""
    factor = max(1, math.ceil(CELL / max(pixels.shape[1:3]))) if gap else 1
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


def as_numpy(x: Tensor) -> np.ndarray:
    """The values of a tensor on any device; bfloat16, which NumPy lacks, as float32."""
    x = x.detach().cpu()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()
