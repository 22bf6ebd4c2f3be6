"""Data sets, their binarisation, and the checks that data must pass.

:func:`load` reads a named set into :class:`Splits` of :class:`Images`; :func:`as_dataset` takes whatever else one has
(tensors, arrays, Datasets, DataLoaders); :func:`check_support` compares values with what a likelihood can explain.
"""

from __future__ import annotations

import copy
import difflib
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

__all__ = ["DATASETS", "DataError", "Images", "Splits", "as_dataset", "batches", "check_support", "load"]

_CHUNK_BYTES = 64 * 2**20
_BINARIZATIONS = ("none", "dynamic", "static", "threshold")
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".ppm", ".tif", ".tiff", ".webp", ".gif"}
_GREY_MODES = {"1", "L", "LA", "La"}
_COLOUR_MODES = {"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}

_Part = tuple[Tensor, "Tensor | None"]
_Parts = dict[str, _Part]


class DataError(ValueError):
    """The data themselves are bad or absent; a wrong *argument* is a plain ``ValueError``.

    >>> issubclass(DataError, ValueError)
    True
    """


class Images(Dataset[Any]):
    r"""Images (or vectors, or any events) held as one tensor, with the binarisation they are used under.

    With ``binarization="dynamic"`` a pixel of value :math:`p` is drawn anew from Bernoulli(:math:`p`) at every use, the
    protocol of the IWAE paper (Burda et al., 2016); ``"static"`` draws once, from a CPU generator seeded with ``seed``;
    ``"threshold"`` is :math:`p > 0.5`; ``"none"`` leaves the values alone.

    Args:
        x: ``[N, *event]``, channels first; integers and booleans become the default float type, unscaled.
        labels: integers ``[N]``, kept as int64.
        binarization: "none", "dynamic", "static" or "threshold"; all but "none" ask for values in [0, 1].
        seed: of the static draw.
        name: the data's name in messages.

    Raises:
        DataError: no data, a value that is not finite or outside [0, 1], labels that are not N integers.
        ValueError: an unknown binarization.

    >>> grey = Images(torch.full((4, 1, 2, 2), 0.5), torch.arange(4), binarization="dynamic", name="grey")
    >>> grey
    Images('grey', 4 of [1, 2, 2], float32, binarization='dynamic', labelled, cpu)
    >>> x, y = grey.batch(torch.tensor([3, 0]))
    >>> x.shape, y
    (torch.Size([2, 1, 2, 2]), tensor([3, 0]))
    """

    def __init__(
        self, x: Tensor, labels: Tensor | None = None, *, binarization: str = "none", seed: int = 0, name: str = "data"
    ) -> None:
        if not isinstance(x, Tensor) or x.is_complex():
            raise TypeError(f"x must be a real tensor [N, ...], received {type(x).__name__}: use torch.as_tensor(x)")
        _check_binarization(binarization)
        x = x.detach() if x.is_floating_point() else x.detach().to(torch.get_default_dtype())
        _check_values(x, name, unit=binarization != "none")
        self.x = _binarized(x, binarization, seed)
        self.labels = None if labels is None else _checked_labels(labels, x, name)
        self.binarization, self.name = binarization, name

    @property
    def event_shape(self) -> torch.Size:
        """The shape of one datum."""
        return self.x.shape[1:]

    @property
    def mean(self) -> Tensor:
        """The mean image ``[*event]``: the expected value of each pixel, before any dynamic draw."""
        return self.x.mean(0)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Tensor | tuple[Tensor, Tensor]:
        x = self._drawn(self.x[i])
        return x if self.labels is None else (x, self.labels[i])

    def batch(self, index: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The data ``[B, *event]`` at the integers ``index`` ``[B]`` (on the device of ``x``), and their labels if any.

        Never waits for the device, so that it can be part of a captured training step.
        """
        x = self._drawn(self.x.index_select(0, index))
        return x if self.labels is None else (x, self.labels.index_select(0, index))

    def to(self, device: torch.device | str) -> Images:
        """The same data on ``device``; nothing is drawn again."""
        labels = None if self.labels is None else self.labels.to(device)
        return self._replace(x=self.x.to(device), labels=labels)

    def fixed(self, seed: int = 0) -> Images:
        """A dynamic set drawn once, to the same bits on every device; any other set is returned as it is.

        >>> grey = Images(torch.full((100, 3), 0.5), binarization="dynamic")
        >>> torch.equal(grey.fixed(seed=1).x, grey.fixed(seed=1).x)
        True
        """
        if self.binarization != "dynamic":
            return self
        return self._replace(x=_binarized(self.x, "static", seed), binarization="static")

    def subset(self, index: Tensor | Sequence[int] | slice) -> Images:
        """The data at ``index`` (integers, a mask ``[N]`` or a slice); raises DataError if that leaves none."""
        if not isinstance(index, slice):
            chosen = torch.atleast_1d(torch.as_tensor(index, device=self.x.device))
            index = chosen if chosen.numel() else chosen.long()
        x = self.x[index]
        if not len(x):
            raise DataError(f"a subset needs data, but the index selects 0 of {len(self)} in {self.name!r}: widen it")
        return self._replace(x=x, labels=None if self.labels is None else self.labels[index])

    def __repr__(self) -> str:
        dtype = str(self.x.dtype).removeprefix("torch.")
        labels = "no labels" if self.labels is None else "labelled"
        return (
            f"Images({self.name!r}, {len(self):,} of {list(self.event_shape)}, {dtype}, "
            f"binarization={self.binarization!r}, {labels}, {self.x.device})"
        )

    def _drawn(self, x: Tensor) -> Tensor:
        return torch.bernoulli(x) if self.binarization == "dynamic" else x

    def _replace(self, **attributes: Any) -> Images:
        """A copy that skips the constructor: the values are checked already, and a static draw is made once only."""
        other = copy.copy(self)
        other.__dict__.update(attributes)
        return other


class Splits(NamedTuple):
    """What :func:`load` returns.

    >>> Splits(*load("digits", validation=100)).validation
    Images('digits', 100 of [1, 8, 8], float32, binarization='none', no labels, cpu)
    """

    train: Images
    validation: Images | None
    test: Images


def load(
    name: str = "digits",
    root: str | os.PathLike[str] | None = None,
    *,
    binarization: str = "none",
    validation: int | float = 0,
    labels: bool = False,
    seed: int = 0,
    download: bool = True,
) -> Splits:
    """Read the data set ``name``, one of :data:`DATASETS`, into memory.

    Pixels are floats in [0, 1], channels first: 8-bit values are divided by 255. ``npz:PATH`` takes the arrays ``x``
    and, where they are, ``y``, ``x_test``, ``y_test``: 8-bit ones as images (a channel axis is added or moved to the
    front), any others as they are. ``folder:PATH`` takes images of one size, one subfolder per class or none at all,
    below ``train`` and ``test`` (or ``val``, ``valid``) if there are such. Of a set without a test part a tenth is set
    aside, the same tenth whatever the seed, so that no run is tested on what another one was trained on.

    Args:
        name: of the set.
        root: the folder with the files, else ``$PYROVAE_DATA``, else ``pyrovae`` in the user's cache folder.
        binarization: as in :class:`Images`. With "dynamic" the validation and test parts are drawn once per seed, so
            that models are compared on the same bits.
        validation: how many (int) or which fraction (float below 1) of the training data to set aside at random. With 0
            it is the set's own validation part, if it has one (binarized_mnist, a folder with ``train``, ``val`` and
            ``test``), else None; with any other value, that part joins the training data before the cut.
        labels: whether the parts carry labels.
        seed: of the validation cut and of the draws.
        download: whether torchvision's sets may be fetched, md5-checked, when they are not there.

    Raises:
        ValueError: an argument outside its range, an unknown name.
        DataError: files absent or damaged, images of several sizes, no labels where they are asked for.

    >>> train, validation, test = load("digits", binarization="dynamic", validation=0.1, labels=True)
    >>> len(train), len(validation), len(test), train.event_shape
    (1293, 144, 360, torch.Size([1, 8, 8]))
    """
    read, location = _resolve(name, root)
    _check_binarization(binarization)
    _check_validation(validation)
    parts = read(location, download)
    if validation and "validation" in parts:
        parts["train"] = _joined(parts["train"], parts.pop("validation"))
    sets = {k: _images(p, labels, name=name, binarization=binarization, seed=seed) for k, p in parts.items()}
    if "test" not in sets:
        sets["train"], sets["test"] = _cut(sets["train"], 0.1, seed=0)
    if validation:
        sets["train"], sets["validation"] = _cut(sets["train"], validation, seed)
    if len({images.event_shape for images in sets.values()}) > 1:
        shapes = ", ".join(f"{k} {list(images.event_shape)}" for k, images in sets.items())
        raise DataError(f"the parts of {name!r} must have one shape, received {shapes}: make them equal")
    held_out = sets["validation"].fixed(seed) if "validation" in sets else None
    return Splits(sets["train"], held_out, sets["test"].fixed(seed))


def as_dataset(data: Any, *, name: str = "data") -> Images | Dataset[Any] | DataLoader[Any]:
    """Bring what a user passes as data into one of three forms: Images, another Dataset, or a DataLoader.

    A tensor ``[N, ...]``, a tuple ``(x, y)`` of tensors, and a TensorDataset of one or two become :class:`Images` with
    ``y`` as labels (a TensorDataset, where ``y`` is not a vector of integers or there are more than two). Integers and
    booleans become the default float type, unscaled; so do the values of NumPy arrays. The rest is returned as it is.

    Raises:
        DataError: as :class:`Images`; arrays of objects; lengths that differ.
        TypeError: anything else.

    >>> as_dataset((torch.rand(10, 3), torch.arange(10)))
    Images('data', 10 of [3], float32, binarization='none', labelled, cpu)
    """
    if isinstance(data, Subset) and isinstance(data.dataset, Images):
        return data.dataset.subset(data.indices)
    if type(data) is TensorDataset:
        data = data.tensors
    if isinstance(data, (Dataset, DataLoader)):
        return data
    columns = data if isinstance(data, tuple) else (data,)
    if not columns or not all(isinstance(c, (Tensor, np.ndarray)) for c in columns):
        raise TypeError(
            "data must be a tensor, an array, a tuple of those, Images, a Dataset or a DataLoader, "
            f"received {type(data).__name__}: convert it, for instance with torch.stack"
        )
    return _from_columns(*(_tensor(c, name) for c in columns), name=name)


def batches(
    args: Sequence[Any], batch_size: int | None = None, *, seed: int = 0, device: torch.device | None = None
) -> Iterator[tuple[Any, ...]]:
    """What an evaluation passes to the programs, batch by batch, in order.

    One Dataset or DataLoader is batched (by 100, unless ``batch_size`` says otherwise) and moved to ``device``; a
    dynamic set is drawn once, by ``seed``. Tensors go whole, or are cut along their first axis into ``batch_size``.

    >>> [x.shape[0] for (x,) in batches((torch.zeros(5, 2),), batch_size=2)]
    [2, 2, 1]
    """
    if len(args) == 1 and isinstance(args[0], Dataset | DataLoader):
        yield from (_on_device(batch, device) for batch in _dataset_batches(args[0], batch_size or 100, seed))
    elif batch_size is None:
        yield tuple(args)
    else:
        size = next((len(a) for a in args if isinstance(a, Tensor) and a.dim()), 0)
        for i in range(0, size, batch_size):
            whole = (isinstance(a, Tensor) and a.dim() and len(a) == size for a in args)
            yield tuple(a[i : i + batch_size] if cut else a for a, cut in zip(args, whole, strict=True))


def _dataset_batches(source: Dataset[Any] | DataLoader[Any], batch_size: int, seed: int) -> Iterator[Any]:
    if isinstance(source, DataLoader):
        return iter(source)
    source = as_dataset(source)
    if isinstance(source, Images):
        fixed = source.fixed(seed)
        return (fixed.batch(index) for index in torch.arange(len(fixed), device=fixed.x.device).split(batch_size))
    return iter(DataLoader(source, batch_size=batch_size))


def _on_device(batch: Any, device: torch.device | None) -> tuple[Any, ...]:
    items = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    return tuple(a.to(device) if isinstance(a, Tensor) else a for a in items)


def check_support(
    x: Tensor, support: constraints.Constraint | None, *, site: str = "x", likelihood: str | None = None
) -> None:
    """Check that all values of ``x`` ``[N, ...]`` are finite and inside the support of the site that observes them.

    Works through ``x`` in pieces of about 64 MB, with one wait for the device each. A dependent support (or None) asks
    only for finite values; bounds that vary between pixels count with their widest values.

    Args:
        x: the data.
        support: a constraint of ``torch.distributions``, such as ``distribution.support``.
        site: the observed site's name.
        likelihood: the likelihood's name, for the message.

    Raises:
        DataError: naming the first offending index, its value, the range received and the fix.

    >>> check_support(torch.tensor([[0.0, 1.0]]), constraints.boolean)
    >>> check_support(torch.tensor([[0.0, 0.53]]), constraints.boolean)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    pyrovae.data.DataError: data[0, 1] = 0.53 is outside the support of site "x" (boolean: 0 or 1); the values...
    """
    support = None if support is None else _elementwise(support)
    x = torch.atleast_1d(x.detach())
    bad = _first_outside(x, partial(_inside, support=support))
    if bad is None:
        return
    value, used = x[bad], "" if likelihood is None else f", likelihood {likelihood!r}"
    if support is None or not torch.isfinite(value).all():
        raise DataError(f'{_at("data", bad, value)} at site "{site}"{used}: data must be finite; {_DROP}')
    low, high = torch.aminmax(x)
    raise DataError(
        f'{_at("data", bad, value)} is outside the support of site "{site}" ({_describe(support)}{used}); '
        f"the values run from {_show(low)} to {_show(high)}: {_fix(support, low.item(), high.item())}"
    )


# Checks --------------------

_DROP = "drop or replace such data, for instance with torch.nan_to_num"
_BY_255 = "divide values from 0 to 255 by 255"


def _first_outside(x: Tensor, valid: Callable[[Tensor], Tensor]) -> tuple[int, ...] | None:
    """The first index of ``x`` at which ``valid`` (called on slices of the leading dimension) is false."""
    rows = max(1, _CHUNK_BYTES // max(1, x[:1].nbytes))
    for start in range(0, len(x), rows):
        ok = valid(x[start : start + rows])
        if not ok.all():
            first, *rest = np.unravel_index(int((~ok).to(torch.uint8).argmax()), ok.shape)
            return (start + int(first), *map(int, rest))
    return None


def _inside(x: Tensor, support: constraints.Constraint | None) -> Tensor:
    finite = torch.isfinite(x)
    if support is None:
        return finite
    inside = support.check(x)
    return inside & (finite if inside.dim() == x.dim() else finite.flatten(inside.dim()).all(-1))


def _elementwise(support: constraints.Constraint) -> constraints.Constraint | None:
    """``support`` without independent (or mixture) wrappers and with numbers for bounds; None if it is dependent."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if constraints.is_dependent(support):
        return None
    support = copy.copy(support)
    for name, widest in (("lower_bound", torch.min), ("upper_bound", torch.max)):
        if isinstance(bound := getattr(support, name, None), Tensor):
            setattr(support, name, widest(bound).item())
    return support


def _is_boolean(support: constraints.Constraint) -> bool:
    return isinstance(support, type(constraints.boolean))


def _describe(support: constraints.Constraint) -> str:
    return "boolean: 0 or 1" if _is_boolean(support) else repr(support)


def _fix(support: constraints.Constraint, low: float, high: float) -> str:
    boolean = _is_boolean(support)
    if boolean and low >= 0 and high <= 1:
        return (
            "grey values need binarization='dynamic' (or 'static', 'threshold'), "
            "or a likelihood for them such as 'continuous_bernoulli'"
        )
    if not (boolean or getattr(support, "upper_bound", None) == 1):
        return "transform them into the support, or use a likelihood whose support holds them, such as 'gaussian'"
    if low < 0:
        return "rescale negative values to [0, 1], or use a likelihood for any real value such as 'gaussian'"
    return (_BY_255 if 1 < high <= 255 else "rescale them to [0, 1]") + (", then binarise" if boolean else "")


def _check_values(x: Tensor, name: str, unit: bool) -> None:
    if not x.dim() or not x.numel():
        raise DataError(
            f"data must be [N, ...] with N >= 1, {name!r} has shape {list(x.shape)}: pass at least one datum"
        )
    if (bad := _first_outside(x, torch.isfinite)) is not None:
        raise DataError(f"{_at(name, bad, x[bad])}: data must be finite; {_DROP}")
    if unit and (bad := _first_outside(x, constraints.unit_interval.check)) is not None:
        raise DataError(
            f"{_at(name, bad, x[bad])}: binarization needs values in [0, 1]; {_BY_255}, or pass binarization='none'"
        )


def _checked_labels(labels: Tensor, x: Tensor, name: str) -> Tensor:
    if not _is_integer(labels := torch.as_tensor(labels)):
        raise DataError(f"labels must be integers, those of {name!r} are {labels.dtype}: convert with labels.long()")
    if labels.shape != x.shape[:1]:
        raise DataError(
            f"labels must have shape [{len(x)}], one for each datum, those of {name!r} have {list(labels.shape)}: "
            "pass one class index per datum"
        )
    return labels.to(x.device, torch.int64)


def _check_binarization(binarization: str) -> None:
    if binarization not in _BINARIZATIONS:
        raise ValueError(_unknown("binarization", binarization, _BINARIZATIONS))


def _check_validation(validation: int | float) -> None:
    if isinstance(validation, bool) or validation < 0 or (isinstance(validation, float) and not validation < 1):
        raise ValueError(
            f"validation must be a count or a fraction in [0, 1), received {validation}: pass such as 1000"
        )


def _unknown(what: str, value: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(str(value), known, n=1, cutoff=0.0)[0]
    return f"unknown {what} {value!r}: did you mean {nearest!r}? Known: {', '.join(known)}"


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _at(name: str, index: tuple[int, ...], value: Tensor) -> str:
    return f"{name}[{', '.join(map(str, index))}] = {_show(value)}"


def _show(value: Tensor) -> str:
    if value.dim():
        return f"[{', '.join(_show(v) for v in value.flatten()[:4])}{', ...' if value.numel() > 4 else ''}]"
    number = value.item()
    # The shortest digits that name the number in its own precision: 0.53, not 0.5299999713897705.
    return str(np.float32(number)) if value.is_floating_point() and value.dtype != torch.float64 else str(number)


# From raw parts to Images --------------------


def _binarized(x: Tensor, binarization: str, seed: int) -> Tensor:
    if binarization == "threshold":
        return (x > 0.5).to(x.dtype)
    if binarization != "static":
        return x
    generator = torch.Generator().manual_seed(seed)
    return torch.bernoulli(x.cpu(), generator=generator).to(x.device)


def _images(part: _Part, labels: bool, *, name: str, **options: Any) -> Images:
    x, y = part
    if labels and y is None:
        raise DataError(f"labels=True needs labels in every part of a set, {name!r} lacks them: load it without labels")
    scaled = x.to(torch.get_default_dtype()).contiguous()
    if x.dtype == torch.uint8:
        scaled.div_(255)
    return Images(scaled, y if labels else None, name=name, **options)


def _cut(images: Images, amount: int | float, seed: int) -> tuple[Images, Images]:
    """A random part of ``amount`` (count or fraction) and the rest before it."""
    total = len(images)
    count = max(1, round(amount * total)) if isinstance(amount, float) else amount
    if count >= total:
        error = ValueError if total > 1 else DataError
        raise error(f"{count} of {total} data cannot be set aside from {images.name!r}: at least one must be left")
    order = _permutation(total, seed)
    return images.subset(order[count:]), images.subset(order[:count])


def _permutation(total: int, seed: int) -> Tensor:
    # NumPy's legacy generator is the one whose stream is guaranteed never to change between versions.
    return torch.from_numpy(np.random.RandomState(seed % 2**32).permutation(total))


def _joined(a: _Part, b: _Part) -> _Part:
    y = None if a[1] is None or b[1] is None else torch.cat([a[1], b[1]])
    return torch.cat([a[0], b[0]]), y


def _from_columns(x: Tensor, *rest: Tensor, name: str) -> Images | TensorDataset:
    if any(c.shape[:1] != x.shape[:1] for c in rest):
        lengths = ", ".join(str(list(c.shape)) for c in (x, *rest))
        raise DataError(f"the tensors of {name!r} must have one length, received shapes {lengths}: make them equal")
    labels = rest[0] if len(rest) == 1 and rest[0].dim() == 1 and _is_integer(rest[0]) else None
    images = Images(x, labels, name=name)
    return TensorDataset(images.x, *rest) if rest and labels is None else images


def _tensor(array: Tensor | np.ndarray, name: str) -> Tensor:
    """A tensor of a numeric array: 8-bit, boolean, int64 or the default float type."""
    if isinstance(array, Tensor):
        return array
    if array.dtype.kind not in "buif":
        raise DataError(f"{name} must be an array of numbers, received {array.dtype}: convert it with astype(float)")
    if array.dtype.kind == "f":
        return torch.tensor(array.astype(np.float64), dtype=torch.get_default_dtype())
    return torch.tensor(array if array.dtype in (np.uint8, np.bool_) else array.astype(np.int64))


def _channels_first(x: Tensor) -> Tensor:
    """8-bit images ``[N, H, W]`` and ``[N, H, W, C]`` (C 1 or 3) as ``[N, C, H, W]``; anything else as it is."""
    if x.dtype != torch.uint8:
        return x
    if x.dim() == 3:
        return x.unsqueeze(1)
    return x.movedim(-1, 1) if x.dim() == 4 and x.shape[-1] in (1, 3) else x


# Readers: (root or path, download) -> parts --------------------


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


def _read_digits(root: Path, download: bool) -> _Parts:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x, y = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16, torch.from_numpy(bunch.target)
    order = _permutation(len(x), seed=0)
    return {"train": (x[order[360:]], y[order[360:]]), "test": (x[order[:360]], y[order[:360]])}


def _read_omniglot28(root: Path, download: bool) -> _Parts:
    from scipy.io import loadmat

    path = _found("omniglot28", root, "omniglot28/chardata.mat", "chardata.mat")
    with _reading(path, "replace it by the IWAE paper's chardata.mat (arrays data and testdata, 784 x N)"):
        mat = loadmat(path)
        return {part: _characters(mat, key) for part, key in (("train", ""), ("test", "test"))}


def _characters(mat: dict[str, np.ndarray], key: str) -> _Part:
    # MATLAB counts down the columns, so that a transpose sets the drawings upright.
    x = _tensor(mat[f"{key}data"].T, f"{key}data").reshape(-1, 1, 28, 28).mT.contiguous()
    labels = mat.get(f"{key}targetchar")
    return x, None if labels is None else torch.from_numpy(labels.astype(np.int64)).flatten()


def _read_binarized_mnist(root: Path, download: bool) -> _Parts:
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


def _read_npz(path: Path, download: bool) -> _Parts:
    if not zipfile.is_zipfile(path):
        state = "not a whole .npz archive" if path.exists() else "absent"
        raise DataError(f"npz:PATH needs a NumPy archive, {path} is {state}: write it with numpy.savez(path, x=x)")
    fix = "write it anew with numpy.savez(path, x=x), of numbers, not objects"
    with _reading(path, fix), np.load(path, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in ("x", "y", "x_test", "y_test") if key in archive}
        keys = ", ".join(archive)
    if "x" not in arrays:
        raise DataError(f"npz:PATH needs an array 'x', {path} has: {keys or 'nothing'}: write numpy.savez(path, x=x)")
    tensors = {key: _tensor(array, f"{path}: {key}") for key, array in arrays.items()}
    parts: _Parts = {"train": (_pixels_of(tensors["x"], path), tensors.get("y"))}
    if "x_test" in tensors:
        parts["test"] = (_pixels_of(tensors["x_test"], path), tensors.get("y_test"))
    return parts


def _pixels_of(x: Tensor, path: Path) -> Tensor:
    if x.dtype == torch.uint8 and x.numel() and x.max() == 1:
        raise DataError(f"8-bit values are divided by 255, but {path} holds 0 and 1 only: store those as bool or float")
    return _channels_first(x)


def _read_folder(path: Path, download: bool) -> _Parts:
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


def _arrays(dataset: Any) -> _Part:
    labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    return _channels_first(torch.as_tensor(dataset.data)), torch.as_tensor(labels)


def _strokes(dataset: Any) -> _Part:
    """Omniglot's drawings, black on white, as strokes of 1 on 0."""
    # torchvision numbers the characters in the order of os.listdir, which differs between machines.
    files = sorted(Path(dataset.target_folder).glob("*/*/*.png"))
    number = {folder: i for i, folder in enumerate(dict.fromkeys(file.parent for file in files))}
    return 255 - _decoded(files), torch.tensor([number[file.parent] for file in files])


def _torchvision(
    kind: str, folder: str, files: str, arrays: Callable[[Any], _Part] = _arrays, **splits: tuple[Any, Any]
) -> Callable[[Path, bool], _Parts]:
    """A reader of ``torchvision.datasets.<kind>``; ``splits``: its split argument, with the train and test values."""
    [(argument, values)] = (splits or {"train": (True, False)}).items()

    def read(root: Path, download: bool) -> _Parts:
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


_IDX = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte"
_ZIPS = "images_background.zip and images_evaluation.zip, with their unpacked folders,"
_BATCHES = "data_batch_1 to data_batch_5, test_batch and batches.meta"
_MATS = "train_32x32.mat and test_32x32.mat"

_SOURCES: dict[str, tuple[str, Callable[[Path, bool], _Parts]]] = {
    "digits": ("scikit-learn's 1,797 digits, 8x8 grey; needs no files", _read_digits),
    "mnist": ("70,000 digits, 28x28 grey", _torchvision("MNIST", "MNIST/raw", _IDX)),
    "fashion_mnist": ("70,000 pieces of clothing, 28x28 grey", _torchvision("FashionMNIST", "FashionMNIST/raw", _IDX)),
    "kmnist": ("70,000 cursive Japanese characters, 28x28 grey", _torchvision("KMNIST", "KMNIST/raw", _IDX)),
    "omniglot": (
        "32,460 drawings of 1,623 characters, 105x105 black and white, new alphabets in test",
        _torchvision("Omniglot", "omniglot-py", _ZIPS, _strokes, background=(True, False)),
    ),
    "omniglot28": ("OMNIGLOT in the IWAE paper's 28x28 form, from chardata.mat", _read_omniglot28),
    "binarized_mnist": ("Larochelle's fixed binarisation of MNIST, from its .amat files", _read_binarized_mnist),
    "cifar10": (
        "60,000 photographs of 10 classes, 32x32 colour",
        _torchvision("CIFAR10", "cifar-10-batches-py", _BATCHES),
    ),
    "svhn": ("99,289 house numbers, 32x32 colour", _torchvision("SVHN", "", _MATS, split=("train", "test"))),
    "folder:PATH": ("a folder of images of one size, one subfolder per class or none", _read_folder),
    "npz:PATH": ("arrays x and, where present, y, x_test, y_test of a NumPy archive", _read_npz),
}

DATASETS: dict[str, str] = {name: description for name, (description, _) in _SOURCES.items()}
"""The names that :func:`load` knows, each with a line about it."""


def _resolve(name: str, root: str | os.PathLike[str] | None) -> tuple[Callable[[Path, bool], _Parts], Path]:
    """The reader of the set ``name``, and the folder or file to give it."""
    scheme, colon, path = str(name).partition(":")
    key = f"{scheme}:PATH" if colon else name
    if key not in _SOURCES:
        raise ValueError(_unknown("data set", name, list(_SOURCES)))
    if colon and not path:
        raise ValueError(f"{key} needs a path, received {name!r}: write it after the colon")
    return _SOURCES[key][1], Path(path).expanduser() if colon else _root_folder(root)


def _root_folder(root: str | os.PathLike[str] | None) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "pyrovae"
    return Path(root or os.environ.get("PYROVAE_DATA") or cache).expanduser()
