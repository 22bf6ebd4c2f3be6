"""Data sets, their binarisation, and the checks that data must pass.

:func:`load` reads a named set into :class:`Splits` of :class:`Images`; :func:`as_dataset` takes whatever else one has
(tensors, arrays, Datasets, DataLoaders); :func:`check_support` compares values with what a likelihood can explain.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from pyrovae.arguments import DataError, one_of
from pyrovae.sources import DATASETS, Part, as_tensor, permutation, resolve
from pyrovae.support import BY_255, DROP, at, check_support, first_outside

__all__ = ["DATASETS", "DataError", "Images", "Splits", "as_dataset", "batches", "check_support", "load"]

BINARIZATIONS = ("none", "dynamic", "static", "threshold")


class Images(Dataset[Any]):
    r"""Images (or vectors, or any events) held as one tensor, with the binarisation they are used under.

    With ``binarization="dynamic"`` a pixel of value :math:`p` is drawn anew from Bernoulli(:math:`p`) at every use, the
    protocol of the IWAE paper (Burda et al., 2016); ``"static"`` draws once, from a CPU generator seeded with ``seed``;
    ``"threshold"`` is :math:`p > 0.5`; ``"none"`` leaves the values alone.

    :param x: ``[N, *event]``, channels first; integers and booleans become the default float type, unscaled.
    :param labels: integers ``[N]``, kept as int64.
    :param binarization: "none", "dynamic", "static" or "threshold"; all but "none" ask for values in [0, 1].
    :param seed: of the static draw.
    :param name: the data's name in messages.
    :raises DataError: no data, a value that is not finite or outside [0, 1], labels that are not N integers.
    :raises ValueError: an unknown binarization.

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
        one_of("binarization", binarization, BINARIZATIONS)
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

    def unlabelled(self) -> Images:
        """The same data without labels, as unconditional models take them."""
        return self._replace(labels=None)

    def relabelled(self, labels: Tensor) -> Images:
        """The same data with other labels ``[N]``, integers; -1 stands for one that is not known."""
        return self._replace(labels=_checked_labels(labels, self.x, self.name))

    def __repr__(self) -> str:
        dtype = str(self.x.dtype).removeprefix("torch.")
        labels = "no labels" if self.labels is None else "labelled"
        return (
            f"Images({self.name!r}, {len(self):,} of {list(self.event_shape)}, {dtype}, "
            f"binarization={self.binarization!r}, {labels}, {self.x.device})"
        )

    def _drawn(self, x: Tensor) -> Tensor:
        return (
            torch.rand_like(x).lt(x).to(x.dtype) if self.binarization == "dynamic" else x
        )  # 3x torch.bernoulli's speed

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
    labels: bool | None = False,
    seed: int = 0,
    download: bool = True,
) -> Splits:
    """Read the data set ``name``, one of :data:`DATASETS`, into memory.

    Pixels are floats in [0, 1], channels first: 8-bit values are divided by 255. ``npz:PATH`` takes the arrays ``x``
    and, where they are, ``y``, ``x_test``, ``y_test``: 8-bit ones as images (a channel axis is added or moved to the
    front), any others as they are. ``folder:PATH`` takes images of one size, one subfolder per class or none at all,
    below ``train`` and ``test`` (or ``val``, ``valid``) if there are such. Of a set without a test part a tenth is set
    aside, the same tenth whatever the seed, so that no run is tested on what another one was trained on.

    :param name: of the set.
    :param root: the folder with the files, else ``$PYROVAE_DATA``, else ``pyrovae`` in the user's cache folder.
    :param binarization: as in :class:`Images`. With "dynamic" the validation and test parts are drawn once per seed, so
        that models are compared on the same bits.
    :param validation: how many (int) or which fraction (float below 1) of the training data to set aside at random.
        With 0 it is the set's own validation part, if it has one (binarized_mnist, a folder with ``train``, ``val`` and
        ``test``), else None; with any other value, that part joins the training data before the cut.
    :param labels: whether the parts carry labels; None, where they have them.
    :param seed: of the validation cut and of the draws.
    :param download: whether torchvision's sets may be fetched, md5-checked, when they are not there.
    :raises ValueError: an argument outside its range, an unknown name.
    :raises DataError: files absent or damaged, images of several sizes, no labels where they are asked for.

    >>> train, validation, test = load("digits", binarization="dynamic", validation=0.1, labels=True)
    >>> len(train), len(validation), len(test), train.event_shape
    (1293, 144, 360, torch.Size([1, 8, 8]))
    """
    read, location = resolve(name, root)
    one_of("binarization", binarization, BINARIZATIONS)
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

    :raises DataError: as :class:`Images`; arrays of objects; lengths that differ.
    :raises TypeError: anything else.

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
    return _from_columns(*(as_tensor(c, name) for c in columns), name=name)


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
    source = as_dataset(source)
    if isinstance(source, DataLoader):
        return iter(source)
    if isinstance(source, Images):
        fixed = source.fixed(seed)
        return (fixed.batch(index) for index in torch.arange(len(fixed), device=fixed.x.device).split(batch_size))
    return iter(DataLoader(source, batch_size=batch_size))


def _on_device(batch: Any, device: torch.device | None) -> tuple[Any, ...]:
    items = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    return tuple(a.to(device) if isinstance(a, Tensor) else a for a in items)


def _check_values(x: Tensor, name: str, unit: bool) -> None:
    if not x.dim() or not x.numel():
        raise DataError(
            f"data must be [N, ...] with N >= 1, {name!r} has shape {list(x.shape)}: pass at least one datum"
        )
    if (bad := first_outside(x, torch.isfinite)) is not None:
        raise DataError(f"{at(name, bad, x[bad])}: data must be finite; {DROP}")
    if unit and (bad := first_outside(x, constraints.unit_interval.check)) is not None:
        raise DataError(
            f"{at(name, bad, x[bad])}: binarization needs values in [0, 1]; {BY_255}, or pass binarization='none'"
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


def _check_validation(validation: int | float) -> None:
    if isinstance(validation, bool) or validation < 0 or (isinstance(validation, float) and not validation < 1):
        raise ValueError(
            f"validation must be a count or a fraction in [0, 1), received {validation}: pass such as 1000"
        )


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


# From raw parts to Images --------------------


def _binarized(x: Tensor, binarization: str, seed: int) -> Tensor:
    if binarization == "threshold":
        return (x > 0.5).to(x.dtype)
    if binarization != "static":
        return x
    generator = torch.Generator().manual_seed(seed)
    return torch.bernoulli(x.cpu(), generator=generator).to(x.device)


def _images(part: Part, labels: bool | None, *, name: str, **options: Any) -> Images:
    x, y = part
    if labels and y is None:
        raise DataError(f"labels=True needs labels in every part of a set, {name!r} lacks them: load it without labels")
    scaled = x.to(torch.get_default_dtype()).contiguous()
    if x.dtype == torch.uint8:
        scaled.div_(255)
    return Images(scaled, None if labels is False else y, name=name, **options)


def _cut(images: Images, amount: int | float, seed: int) -> tuple[Images, Images]:
    """A random part of ``amount`` (count or fraction) and the rest before it."""
    total = len(images)
    count = max(1, round(amount * total)) if isinstance(amount, float) else amount
    if count >= total:
        error = ValueError if total > 1 else DataError
        raise error(f"{count} of {total} data cannot be set aside from {images.name!r}: at least one must be left")
    order = permutation(total, seed)
    return images.subset(order[count:]), images.subset(order[:count])


def _joined(a: Part, b: Part) -> Part:
    y = None if a[1] is None or b[1] is None else torch.cat([a[1], b[1]])
    return torch.cat([a[0], b[0]]), y


def _from_columns(x: Tensor, *rest: Tensor, name: str) -> Images | TensorDataset:
    if any(c.shape[:1] != x.shape[:1] for c in rest):
        lengths = ", ".join(str(list(c.shape)) for c in (x, *rest))
        raise DataError(f"the tensors of {name!r} must have one length, received shapes {lengths}: make them equal")
    labels = rest[0] if len(rest) == 1 and rest[0].dim() == 1 and _is_integer(rest[0]) else None
    images = Images(x, labels, name=name)
    return TensorDataset(images.x, *rest) if rest and labels is None else images
