r"""One batch for several processes: each runs the programs on rows of its own, with its rows of one noise.

A draw of B rows takes B rows of numbers from the generator, so that rows alone would draw other numbers than they get
within their batch, and processes would draw the same. Inside :class:`Rows` a program that runs on some rows draws for
the whole batch, from generators that are alike everywhere, and keeps what is for its rows. Which axis of a draw has the
rows is learned from runs on batches of two sizes (:func:`learn`), and whether a loss is a sum over them as well, from
one batch whole and in parts: what is not cannot be shared out, and is refused.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload

from pyrovae.compile.noise import REWRITES, aten, dropout, is_random, rewritten
from pyrovae.engine.programs import Batch, cut, rows
from pyrovae.engine.randomness import isolated_rng

FEW = 5  # rows on which draws are looked at, of a batch that has so many

Shape = tuple[int, ...]


class Place(NamedTuple):
    """Where a draw has rows: an axis of ``outer`` times rows times ``inner`` numbers; particles are the outer ones."""

    axis: int
    outer: int
    inner: int


@dataclass(frozen=True)
class Draw:
    """A draw of a program, by its operation and shape, whose axis of rows counts per row."""

    function: OpOverload
    shape: Shape
    axis: int | None

    def on(self, number: int) -> Shape:
        """Its shape on so many rows."""
        return tuple(n * number if i == self.axis else n for i, n in enumerate(self.shape))


class Known(dict[tuple[OpOverload, Shape], Draw]):
    """Draws that were seen, as they are on batches of one size."""

    @classmethod
    def of(cls, draws: Sequence[Draw], number: int) -> Known:
        """On so many rows; refuses a batch on which two kinds of draws look alike."""
        found = cls()
        for draw in draws:
            key = draw.function, draw.on(number)
            if found.setdefault(key, draw).axis != draw.axis:
                raise ValueError(
                    f"draws of shape {list(key[1])} are of rows, and others of that shape are not, so that {number} "
                    "rows of a batch cannot be told from the rest: pass another batch_size"
                )
        return found


class Rows(rewritten):
    """The program runs on ``own`` rows of a batch of ``total``, and draws what it would draw there.

    Samplers by rejection, which take as many numbers as they need, draw the same law, but other numbers.
    """

    def __init__(self, draws: Sequence[Draw], total: int, own: slice, particles: int = 1) -> None:
        super().__init__()
        self.total, self.start, self.own, self.particles = total, own.start, own.stop - own.start, particles
        self.known = Known.of(draws, self.own)

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        if func.namespace == "pyrovae":  # a sampler by rejection, after its seed, which all have drawn alike
            return func(args[0] + self.start, *args[1:], **(kwargs or {}))
        if not is_random(func):
            return func(*args, **(kwargs or {}))
        if func in REJECTING:
            with self:
                return REWRITES[func](*args, **(kwargs or {}))
        draw = self.known.get((func, shape := drawn_shape(func, args, kwargs or {})))
        if draw is None:
            raise ValueError(
                f"a step draws {func.name().removeprefix('aten::')} of shape {list(shape)}, which the first batch did "
                "not: a program whose draws come and go cannot share batches; train in one process"
            )
        if draw.axis is None:
            return func(*args, **(kwargs or {}))
        m = draw.shape[draw.axis]
        outer = self.particles if m % self.particles == 0 else 1
        return self.drawn(func, args, kwargs or {}, shape, Place(draw.axis, outer, m // outer))

    def drawn(
        self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], shape: Shape, place: Place
    ) -> object:
        """The draw for the whole batch, of which this process's rows are kept."""
        whole = tuple(self.total * place.outer * place.inner if i == place.axis else n for i, n in enumerate(shape))
        if func._schema.is_mutable:
            filled, *rest = args
            given = [self.padded(a, place, shape) if isinstance(a, Tensor) else a for a in rest]
            fresh = func(torch.empty(whole, dtype=filled.dtype, device=filled.device), *given, **kwargs)
            return filled.copy_(self.mine(fresh, place))
        if func in NORMAL:
            like = next(a for a in args if isinstance(a, Tensor))
            noise = self.mine(torch.randn(whole, dtype=like.dtype, device=like.device), place)
            mean, std = args[0], args[1] if len(args) > 1 else 1.0
            return noise * std + mean
        if func is aten.native_dropout.default:
            x, p, train = args
            _, kept = dropout(torch.ones(whole, dtype=x.dtype, device=x.device), p, train)
            kept = self.mine(kept, place)
            return (kept * x * (1 / (1 - p) if p < 1 else 0.0) if train is not False and p else x.clone()), kept
        if (at := size_argument(func)) is not None:
            name = func._schema.arguments[at].name
            if name in kwargs:
                return self.mine(func(*args, **{**kwargs, name: whole}), place)
            return self.mine(func(*args[:at], whole, *args[at + 1 :], **kwargs), place)
        if func in LIKE or func in GIVEN:
            padded = [self.padded(a, place, shape) if isinstance(a, Tensor) else a for a in args]
            return self.mine(func(*padded, **kwargs), place)
        raise ValueError(
            f"a step draws {func.name().removeprefix('aten::')}, whose rows cannot be drawn one by one: train in one "
            "process"
        )

    def mine(self, whole: Tensor, place: Place) -> Tensor:
        """This process's rows."""
        if place.outer == place.inner == 1:
            return whole.narrow(place.axis, self.start, self.own).contiguous()
        apart = whole.unflatten(place.axis, (place.outer, self.total, place.inner))
        return apart.narrow(place.axis + 1, self.start, self.own).flatten(place.axis, place.axis + 2)

    def padded(self, given: Tensor, place: Place, shape: Shape) -> Tensor:
        """Parameters of this process's rows among others for the other rows, which only take their numbers."""
        axis = given.dim() - len(shape) + place.axis
        if axis < 0 or given.shape[axis] != shape[place.axis]:
            return given
        index = (torch.arange(self.total, device=given.device) - self.start).clamp(0, self.own - 1)
        apart = given.unflatten(axis, (place.outer, self.own, place.inner))
        return apart.index_select(axis + 1, index).flatten(axis, axis + 2)


#: Samplers by rejection.
REJECTING = {
    aten._standard_gamma.default, aten._sample_dirichlet.default, aten.poisson.default, aten.binomial.default,
}  # fmt: skip
NORMAL = {aten.normal.Tensor_Tensor, aten.normal.Tensor_float, aten.normal.float_Tensor}
#: What draws numbers in the shape of its first argument.
LIKE = {
    aten.rand_like.default, aten.randn_like.default, aten.randint_like.default, aten.randint_like.low_dtype,
    aten.bernoulli.p,
}  # fmt: skip
#: What takes one number of the generator for each row, whatever its parameters.
GIVEN = {aten.bernoulli.default, aten.multinomial.default}


def size_argument(func: OpOverload) -> int | None:
    """Which argument of an operation is the size of its result."""
    return next((i for i, a in enumerate(func._schema.arguments) if a.name == "size"), None)


def drawn_shape(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Shape:
    """The shape of what an operation draws."""
    if (at := size_argument(func)) is not None:
        return tuple(args[at] if at < len(args) else kwargs["size"])
    if func is aten.randperm.default:
        return (int(args[0]),)
    if func is aten.multinomial.default:
        return (*args[0].shape[:-1], args[1])
    return torch.broadcast_shapes(*(a.shape for a in args[:2] if isinstance(a, Tensor)))


class Seen(rewritten):
    """Notes what is drawn inside."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[tuple[OpOverload, Shape]] = []
        self.rejecting = False

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        if func in REJECTING:
            with self:
                self.rejecting = True
                return REWRITES[func](*args, **(kwargs or {}))
        self.rejecting |= func.namespace == "pyrovae"
        if is_random(func):
            self.draws.append((func, drawn_shape(func, args, kwargs or {})))
        return func(*args, **(kwargs or {}))


def learn(run: Callable[[Batch], object], batch: Batch) -> tuple[list[Draw], bool]:
    """What a program draws on a batch, and whether all of it can be drawn again from one seed.

    :raises ValueError: where draws do not follow the number of rows, or come from elsewhere than torch's generators.
    """
    number, many = rows(batch, {}), FEW
    few, fewer = (cut(batch, [i % number for i in range(n)]) for n in (many, many - 1))
    with isolated_rng():
        run(few)  # which may look at programs that it has not met
    first, last = noted(run, few), noted(run, fewer)
    if [f for f, _ in first.draws] != [f for f, _ in last.draws]:
        raise ValueError(f"{CANNOT}: it draws other noise on {many - 1} data than on {many}")
    draws: dict[Draw, None] = {}
    for (func, shape), (_, less) in zip(first.draws, last.draws, strict=True):
        axes = [i for i, (a, b) in enumerate(zip(shape, less, strict=False)) if a != b]
        if len(shape) != len(less) or len(axes) > 1 or any(shape[i] * (many - 1) != less[i] * many for i in axes):
            raise ValueError(f"{CANNOT}: it draws {list(shape)} numbers for {many} data, and {list(less)} for one less")
        axis = axes[0] if axes else None
        draws[Draw(func, tuple(n // many if i == axis else n for i, n in enumerate(shape)), axis)] = None
    return list(draws), not first.rejecting


CANNOT = "the program cannot run on some rows of a batch with their own noise; work in one process"


def noted(run: Callable[[Batch], object], batch: Batch) -> Seen:
    """What a program draws on a batch."""
    with isolated_rng():
        before = random.getstate(), repr(np.random.get_state())  # whose words have the place in the block of numbers
        with Seen() as seen:
            run(batch)
        if before != (random.getstate(), repr(np.random.get_state())):
            raise ValueError(f"{CANNOT}: it draws from NumPy's or Python's generator; draw by torch")
    return seen
