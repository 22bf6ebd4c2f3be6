"""Images held as one tensor, with the binarisation they are used under."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.utils.data import Dataset

from pyrovae.arguments import one_of
from pyrovae.data.arrays import checked_labels
from pyrovae.engine.convert import Taken
from pyrovae.engine.support import BY_255, DROP, at, first_outside, may_be_pixels
from pyrovae.engine.support import check_support as check_support
from pyrovae.errors import DataError

REALS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # that can be computed with
BINARIZATIONS = ("none", "dynamic", "static", "threshold")


class Images(Dataset[Tensor | tuple[Tensor, Tensor]]):
    r"""Images (or vectors, or any events) held as one tensor, with the binarisation they are used under.

    With ``binarization="dynamic"`` a pixel of value :math:`p` is drawn anew from Bernoulli(:math:`p`) at every use, the
    protocol of the IWAE paper (Burda et al., 2016); ``"static"`` draws once, from a CPU generator seeded with ``seed``;
    ``"threshold"`` is :math:`p > 0.5`; ``"none"`` leaves the values alone.

    :param x: ``[N, *event]``, channels first; integers and booleans become the default float type, unscaled.
    :param labels: integers ``[N]``, kept as int64; neither one-hot rows nor names nor reals, however whole.
    :param binarization: "none", "dynamic", "static" or "threshold"; all but "none" ask for values in [0, 1].
    :param seed: of the static draw.
    :param name: the data's name in messages.
    :param raw: keep integers and booleans, and values that are not finite, as NaN for what is missing: whether a model
        takes them is seen when it observes them.
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
        self,
        x: Tensor,
        labels: Tensor | None = None,
        *,
        binarization: str = "none",
        seed: int = 0,
        name: str = "data",
        raw: bool = False,
    ) -> None:
        if not isinstance(x, Tensor) or x.is_complex() or x.is_quantized or x.is_meta or x.layout != torch.strided:
            kind = f"{x.dtype}, {x.layout}, {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a dense, real tensor [N, ...], received {kind}: use torch.as_tensor")
        one_of("binarization", binarization, BINARIZATIONS)
        kept = x.dtype in REALS or (raw and not x.is_floating_point())
        x = x.detach() if kept else x.detach().to(torch.get_default_dtype())
        if not x.dim() or not x.numel():
            raise DataError(
                f"data must be [N, ...] with N >= 1, {name!r} has shape {list(x.shape)}: pass at least one datum"
            )
        drawn = binarization != "none"
        if (drawn or not raw) and first_outside(x, constraints.unit_interval if drawn else None) is not None:
            if (bad := first_outside(x)) is not None:
                raise DataError(f"{at(name, bad, x[bad])}: data must be finite; {DROP}")
            bad = cast(tuple[int, ...], first_outside(x, constraints.unit_interval))
            how = BY_255 if may_be_pixels(x) else "rescale them to [0, 1]"
            raise DataError(
                f"{at(name, bad, x[bad])}: binarization needs values in [0, 1]; {how}, or pass binarization='none'"
            )
        self.x = binarized(x, binarization, seed)
        self.labels = None if labels is None else checked_labels(labels, x, name)
        self.binarization, self.name = binarization, name
        self.places: Tensor | None = None  # of a subset's data in what it was taken from

    @property
    def event_shape(self) -> torch.Size:
        """The shape of one datum."""
        return self.x.shape[1:]

    @property
    def mean(self) -> Tensor:
        """The mean image ``[*event]``: the expected value of each pixel, before any dynamic draw."""
        return self.x.mean(0)

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """The values as they are held, undrawn, and the labels if any."""
        return (self.x,) if self.labels is None else (self.x, self.labels)

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
        labels, places = (None if t is None else t.to(device) for t in (self.labels, self.places))
        return self._replace(x=self.x.to(device), labels=labels, places=places)

    def matched(self, taken: Taken) -> Images:
        """The same data in the type that programs take."""
        return self._replace(x=taken.matched(self.x))

    def fixed(self, seed: int = 0) -> Images:
        """A dynamic set drawn once, to the same bits on every device; any other set is returned as it is.

        >>> grey = Images(torch.full((100, 3), 0.5), binarization="dynamic")
        >>> torch.equal(grey.fixed(seed=1).x, grey.fixed(seed=1).x)
        True
        """
        if self.binarization != "dynamic":
            return self
        return self._replace(x=binarized(self.x, "static", seed), binarization="static")

    def subset(self, index: Tensor | Sequence[int] | slice) -> Images:
        """The data at ``index`` (integers, a mask ``[N]`` or a slice); raises DataError if that leaves none."""
        if not isinstance(index, slice):
            chosen = torch.atleast_1d(torch.as_tensor(index, device=self.x.device))
            index = chosen if chosen.numel() else chosen.long()
        x = self.x[index]
        if not len(x):
            raise DataError(f"a subset needs data, but the index selects 0 of {len(self)} in {self.name!r}: widen it")
        places = torch.arange(len(self), device=self.x.device) if self.places is None else self.places
        labels = None if self.labels is None else self.labels[index]
        return self._replace(x=x, labels=labels, places=places[index])

    def unlabelled(self) -> Images:
        """The same data without labels, as unconditional models take them."""
        return self._replace(labels=None)

    def relabelled(self, labels: Tensor) -> Images:
        """The same data with other labels ``[N]``, integers; -1 stands for one that is not known."""
        return self._replace(labels=checked_labels(labels, self.x, self.name))

    def __repr__(self) -> str:
        dtype = str(self.x.dtype).removeprefix("torch.")
        labels = "no labels" if self.labels is None else "labelled"
        return (
            f"Images({self.name!r}, {len(self):,} of {list(self.event_shape)}, {dtype}, "
            f"binarization={self.binarization!r}, {labels}, {self.x.device})"
        )

    def _drawn(self, x: Tensor) -> Tensor:
        if self.binarization != "dynamic":
            return x
        return torch.rand_like(x).lt_(x)  # four times as fast as torch.bernoulli

    def _replace(self, **attributes: object) -> Images:
        """A copy that skips the constructor: the values are checked already, and a static draw is made once only."""
        other = copy.copy(self)
        other.__dict__.update(attributes)
        return other


def binarized(x: Tensor, binarization: str, seed: int) -> Tensor:
    """Values as their binarisation keeps them: bits, but for "none" and "dynamic"."""
    if binarization == "threshold":
        return (x > 0.5).to(x.dtype)
    if binarization != "static":
        return x
    generator = torch.Generator().manual_seed(seed)
    return torch.bernoulli(x.cpu(), generator=generator).to(x.device)
