"""Arrays and labels as tensors: one rule for each kind of number and each order of axes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyrovae.errors import DataError

Part = tuple[Tensor, Tensor | None]  # values and labels
Parts = dict[str, Part]

NUMBER_THEM = "number them with numpy.unique(array, return_inverse=True)[1]"
NUMBERS_INSTEAD = {  # by the kind of a NumPy dtype
    "c": "pass its parts as reals, numpy.stack([array.real, array.imag], 1)",
    "O": "store numbers of one shape, not objects, for instance with numpy.stack",
    "U": NUMBER_THEM, "S": NUMBER_THEM, "T": NUMBER_THEM,
    "M": "convert it with array.astype('int64')", "m": "convert it with array.astype('int64')",
    "V": "store one array for each of its fields",
}  # fmt: skip


def check_numbers(dtype: np.dtype, name: str) -> None:
    """Refuse what is no boolean, integer or real."""
    if dtype.kind not in "buif":
        raise DataError(f"{name} must be an array of numbers, received {dtype}: {NUMBERS_INSTEAD[dtype.kind]}")


def as_tensor(array: Tensor | np.ndarray, name: str) -> Tensor:
    """A tensor of a numeric array: 8-bit, boolean, int64 or the default float type."""
    if isinstance(array, Tensor):
        return array
    check_numbers(array.dtype, name)
    if np.ma.is_masked(array):
        raise DataError(
            f"{name} must have no masked values, has {np.ma.count_masked(array)}: fill them with filled(...)"
        )
    if array.dtype in (np.uint8, np.bool_):
        kept = array.dtype
    elif array.dtype.kind == "f":
        kept = np.dtype(np.float32 if torch.get_default_dtype() != torch.float64 else np.float64)
    else:
        kept = np.dtype(np.int64)
        if array.dtype.kind == "u" and array.size and array.max() > np.iinfo(kept).max:
            raise DataError(f"{name} must fit 64-bit integers, received {array.max()}: convert it with astype(float)")
    with np.errstate(over="ignore"):  # an infinity is found by who looks at the values
        x = torch.from_numpy(np.array(array, kept, order="C"))
    return x.to(torch.get_default_dtype()) if x.is_floating_point() else x


def is_integer(x: Tensor) -> bool:
    """Whether a tensor holds integers."""
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def checked_labels(labels: object, x: Tensor, name: str) -> Tensor:
    """Labels as int64 on the device of the data, one for each datum."""
    dense = labels.cpu().numpy() if isinstance(labels, Tensor) and labels.dtype == torch.uint64 else labels
    y = as_tensor(dense if isinstance(dense, Tensor) else np.asarray(dense), f"labels of {name!r}")
    if y.dim() == 2 and y.shape[1] > 1:
        fix = "pass one class index per datum, of one-hot rows labels.argmax(1)"
    elif not is_integer(y):
        whole = not y.is_floating_point() or bool((y == y.round()).all())
        fix = "convert with labels.long()" if whole else f"mark unknown ones by -1, or {NUMBER_THEM}"
    else:
        fix = "pass one class index per datum, for instance with labels.flatten()"
    if not is_integer(y):
        raise DataError(f"labels must be integers, those of {name!r} are {y.dtype} {list(y.shape)}: {fix}")
    if y.shape != x.shape[:1]:
        raise DataError(
            f"labels must have shape [{len(x)}], one for each datum, those of {name!r} have {list(y.shape)}: {fix}"
        )
    return y.to(x.device, torch.int64)


def whole_numbers(array: np.ndarray, name: str) -> Tensor:
    """A vector of integers from a matrix of one row or column, as MATLAB, which knows only reals, keeps labels."""
    check_numbers(array.dtype, name)
    if array.size != max(array.shape, default=0):
        raise DataError(f"{name} must be one row or column of labels, has shape {list(array.shape)}: mend the file")
    if (bad := np.flatnonzero(~(np.abs(array) < 2**53) | (array != np.floor(array)))).size:
        raise DataError(f"{name} must be whole numbers, number {bad[0]} is {array.flat[bad[0]]}: mend the file")
    return as_tensor(array.astype(np.int64).flatten(), name)


def channels_first(x: Tensor, name: str) -> Tensor:
    """Arrays of four axes as images ``[N, C, H, W]``; 8-bit ``[N, H, W]`` too, with an axis for their one channel.

    Exactly one of the axes 1 and 3 has to count channels, 1 or 3 of them: the last one is moved. Where neither does,
    reals are taken as they are, if their last axis cannot be mistaken for channels.
    """
    if x.dim() == 3 and x.dtype == torch.uint8:
        return x.unsqueeze(1)
    if x.dim() != 4:
        return x
    (_, first, height, last), counted = x.shape, (1, 3)
    rule = f"four axes must be [N, C, H, W] or [N, H, W, C] with 1 or 3 channels, {name} has shape {list(x.shape)}"
    if first in counted and last in counted:
        raise DataError(f"{rule}, where both may be channels: pad the images, or store them as vectors [N, D]")
    if first in counted:
        return x
    if last in counted:
        return x.movedim(-1, 1)
    if x.dtype == torch.uint8 or (last in (2, 4) and last < min(first, height)):
        raise DataError(f"{rule}: drop transparency with x[..., :3], move other channels with numpy.moveaxis(x, -1, 1)")
    return x


def is_storable(content: object) -> bool:
    """Whether ``torch.load(weights_only=True)`` reads something back."""
    if type(content) is dict:
        return all(map(is_storable, content.items()))
    if isinstance(content, tuple | list):
        return all(map(is_storable, content))
    return content is None or isinstance(content, Tensor) or type(content) in (bool, int, float, str, bytes)
