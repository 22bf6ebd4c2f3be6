r"""Attributes of drawn characters, measured on their images: what a conditional model can be asked to vary.

Castro, Tan, Kainz, Konukoglu and Glocker, *Morpho-MNIST*, 2019, measure the same two.
"""

from __future__ import annotations

import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torch.nn.functional import interpolate

from pyrovae.errors import DataError

__all__ = ["slant", "stroke_width"]

_FINER = 4  # as many grid points per pixel and axis, on which an edge between pixels can be seen


def slant(images: Tensor) -> Tensor:
    r"""The angle by which characters lean to the right, in radians, from the second moments of their ink.

    .. math:: \arctan\!\big(\! -\mu_{11} / \mu_{02} \big), \qquad
              \mu_{pq} = \sum_{r, c} m_{rc} \, (c - \bar c)^p \, (r - \bar r)^q

    with ink m at row r and column c. It is the shear that makes rows and columns uncorrelated; 0 for an upright or a
    symmetric figure, and for ink within a single row.

    :param images: ink ``[..., height, width]``, not negative.
    :return: ``[...]``; a channel axis of size 1 in front of the height is dropped.
    :raises DataError: an image without ink, or negative ink.

    >>> bool(slant(torch.eye(5).flip(1)) == torch.pi / 4)
    True
    """
    ink = _ink(images)
    mass = ink.sum((-2, -1))
    rows, columns = (torch.arange(n, dtype=ink.dtype, device=ink.device) for n in ink.shape[-2:])
    r = rows.unsqueeze(-1) - ((ink.sum(-1) * rows).sum(-1) / mass)[..., None, None]
    c = columns - ((ink.sum(-2) * columns).sum(-1) / mass)[..., None, None]
    spread = (ink * r * r).sum((-2, -1))
    shear = (ink * r * c).sum((-2, -1)) / torch.where(spread > 0, spread, 1.0)
    return -shear.atan()


def stroke_width(images: Tensor) -> Tensor:
    r"""The mean width of strokes, in pixels.

    .. math:: w = 4 \cdot \operatorname{mean}_{\text{ink}} d

    with d the distance to the edge of the ink: across a stroke of width w it rises from 0 to w / 2 and falls again, so
    its mean is w / 4. Images are refined four times, so that grey edges count by their share. Good to a tenth of a
    pixel, but for ends and crossings of strokes, of which the first make it smaller and the others larger.

    :param images: ink ``[..., height, width]`` in [0, 1]; what is above 1/2 is a stroke.
    :return: ``[...]``; a channel axis of size 1 in front of the height is dropped.
    :raises DataError: an image without ink above 1/2.

    >>> bar = torch.zeros(28, 28)
    >>> bar[4:24, 12:16] = 1
    >>> 3.5 < stroke_width(bar) < 4
    tensor(True)
    """
    ink = _ink(images)
    flat = ink.reshape(-1, 1, *ink.shape[-2:])
    height, width = (n * _FINER for n in ink.shape[-2:])
    widths = []
    for image in flat:  # one by one: the transform knows no batches
        fine = interpolate(image.unsqueeze(0), (height, width), mode="bilinear", align_corners=False)[0, 0] > 0.5
        if not fine.any():
            raise DataError("an image has no ink above 1/2, and so no stroke: leave it out, or rescale it to [0, 1]")
        # Paper around the image. Its first point lies behind the edge by half a step of the grid where the edge runs
        # along the grid, and by less where it does not.
        distance = distance_transform_edt(torch.nn.functional.pad(fine, (1, 1, 1, 1)).cpu().numpy())
        widths.append(4 * float(distance[distance > 0].mean() - 0.4) / _FINER)
    return torch.tensor(widths, dtype=ink.dtype, device=ink.device).reshape(ink.shape[:-2])


def _ink(images: Tensor) -> Tensor:
    if images.dim() < 2:
        raise DataError(f"images must be [..., height, width], got {list(images.shape)}: reshape them")
    ink = images.squeeze(-3) if images.dim() > 3 else images
    ink = ink if ink.is_floating_point() else ink.to(torch.get_default_dtype())
    if bool((ink < 0).any()):
        raise DataError("ink must not be negative: rescale the images to [0, 1]")
    if not bool((ink.sum((-2, -1)) > 0).all()):
        raise DataError("an image is without ink: leave it out")
    return ink
