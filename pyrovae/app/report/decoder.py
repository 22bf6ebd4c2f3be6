"""A decoder as a page computes it: a list of tensor operations, and weights in half precision where that serves."""

from __future__ import annotations

import base64
import operator
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import pyro
import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, get_decompositions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

PAGE = Path(__file__).parent / "page"
TOLERANCE = 5e-4  # of a pixel, that half precision may cost: half of what the page may be off by
MOST_BYTES, MOST_PRODUCTS = 3_000_000, 4_000_000  # of weights; multiplications of an image, some 50 ms of a core
DTYPES = {"float16": torch.float16, "float32": torch.float32}  # of weights, the first that serves
SAME = {"clone", "_to_copy", "detach", "alias", "lift_fresh_copy"}  # what leaves values as they are

aten = torch.ops.aten

Decode = Callable[[Tensor], Tensor]  # a code [1, D] to an image [1, *shape]
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Named(NamedTuple):
    """A tensor in a call: what a step gives, or a weight."""

    stepped: bool
    number: int


class NotInPage(ValueError):
    """Why a page cannot compute a decoder."""


@cache
def operations() -> frozenset[str]:
    """The names of the operations that a page has."""
    text = (PAGE / "decoder.js").read_text(encoding="utf-8")
    return frozenset(re.findall(r"^    (\w+)\(.*\{", text.split("const operations = {")[1].split("\n  };")[0], re.M))


#: Beside those of torch's core, operations that are to be made of others.
MADE = (
    aten.native_layer_norm, aten.native_batch_norm, aten._native_batch_norm_legit_no_training,
    aten.elu, aten.gelu, aten.leaky_relu, aten.hardtanh, aten._softmax, aten._log_softmax,
)  # fmt: skip


@cache
def decompositions() -> dict[Any, Callable[..., Any]]:
    """What operations are made of, by their functions."""
    table = {**core_aten_decompositions(), **get_decompositions(MADE), aten.native_group_norm.default: group_norm}
    return {func: made for func, made in table.items() if isinstance(func, torch._ops.OpOverload)}


def group_norm(x: Tensor, w: Tensor | None, b: Tensor | None, n: int, c: int, hw: int, groups: int, eps: float) -> Any:
    """Group normalisation without the strides by which torch's is made."""
    variance, mean = torch.var_mean(x.reshape(n, groups, -1), -1, correction=0, keepdim=True)
    y = ((x.reshape(n, groups, -1) - mean) * (variance + eps).rsqrt()).reshape(n, c, hw)
    y = y if w is None else y * w.reshape(1, c, 1)
    y = y if b is None else y + b.reshape(1, c, 1)
    return y.reshape(x.shape), mean, variance


def name_of(func: Any) -> str:
    """What an operation is called in the page; what works in place is a step like any other."""
    return str(func.overloadpacket.__name__.removesuffix("_"))


class Program(TorchDispatchMode):
    """A decoder as steps, each an operation on the code, on steps before it and on weights; all else is a weight.

    :param weights: of all programs of a page, to which those are added that are not among them.
    :raises NotInPage: an operation that the page lacks.
    """

    def __init__(self, decode: Decode, code: Tensor, weights: list[Tensor]) -> None:
        super().__init__()
        self.weights, self.calls, self.steps = weights, list[Call](), list[list[object]]()
        self.held: list[object] = [code]  # no id is given twice
        self.places = {id(code): 0}
        with self, pyro.validation_enabled(False):
            image = decode(code)
        self.output = self.written(image)

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not any(id(leaf) in self.places for leaf in tree_leaves((args, kwargs))):
            if torch.Tag.nondeterministic_seeded in func.tags:
                raise NotInPage("it draws random numbers")
            return func(*args, **kwargs)
        name = name_of(func)
        if name not in operations():
            with self:
                made = decompositions().get(func, func.decompose)(*args, **kwargs)
            if made is not NotImplemented:
                return made
        given = [*args, *(kwargs.get(a.name, a.default_value) for a in func._schema.arguments[len(args) :])]
        before = self.places.get(id(args[0]), 0)
        found = func(*args, **kwargs)
        if name in SAME:
            self.give(found, before)
            return found
        check(name, given)
        self.steps.append([name, *map(self.written, given)])
        anyhow = aten.reshape.default if func is aten.view.default else func  # weights may lie otherwise in memory
        self.calls.append(tree_map(self.named, (anyhow, args, kwargs)))
        place = len(self.steps)
        for i, tensor in enumerate(found if isinstance(found, list | tuple) else ()):
            self.steps.append(["getitem", ["value", place], i])
            self.calls.append((operator.getitem, (Named(True, place), i), {}))
            self.give(tensor, len(self.steps))
        if isinstance(found, Tensor):
            self.give(found, place)
        return found

    def give(self, tensor: Tensor, place: int) -> None:
        """Know a tensor as what a step gives."""
        self.held.append(tensor)
        self.places[id(tensor)] = place

    def named(self, leaf: object) -> object:
        """What stands for a tensor in a call."""
        if not isinstance(leaf, Tensor):
            return leaf
        return Named(True, self.places[id(leaf)]) if id(leaf) in self.places else Named(False, self.weight(leaf))

    def written(self, argument: object) -> object:
        """An argument as the page reads it."""
        if isinstance(argument, Tensor):
            stepped, number = cast(Named, self.named(argument))
            return ["value" if stepped else "weight", number]
        if isinstance(argument, list | tuple):
            return [self.written(each) for each in argument]
        return argument if isinstance(argument, bool | int | float | None) else str(argument)

    def weight(self, tensor: Tensor) -> int:
        """The number of a tensor among the weights."""
        self.held.append(tensor)
        value = tensor.detach().float()
        same = (i for i, w in enumerate(self.weights) if w.shape == value.shape and torch.equal(w, value))
        if (found := next(same, None)) is None:
            self.weights.append(value)
            return len(self.weights) - 1
        return found

    def __call__(self, code: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """What the steps make of a code with such weights, by PyTorch."""
        found: list[Any] = [code]
        for call in self.calls:
            func, args, kwargs = tree_map(
                lambda leaf: (found if leaf.stepped else weights)[leaf.number] if isinstance(leaf, Named) else leaf,
                call, is_leaf=lambda leaf: isinstance(leaf, Named),
            )  # fmt: skip
            found.append(func(*args, **kwargs))
        return cast(Tensor, found[cast(list[int], self.output)[1]])


def check(name: str, given: Sequence[Any]) -> None:
    """A NotInPage for an operation that the page lacks."""
    if name == "_local_scalar_dense":
        raise NotInPage("it reads numbers and goes on by them")
    if name not in operations():
        raise NotInPage(f'it uses the operation "{name}", which the page lacks')
    if name == "convolution":
        stride, _, dilation, transposed, _, groups = given[3:]
        dilated = any(step != 1 for step in dilation)
        if len(stride) != 2 or groups != 1 or (dilated and (transposed or any(step != 1 for step in stride))):
            raise NotInPage("it uses a convolution that the page lacks, in groups, with holes or not of images")


class Decoder:
    """What a page needs to decode: programs, one for each way to decode (a label), over common weights.

    :param ways: each a code ``[1, D]`` to an image.
    :param codes: ``[N, D]``, on which half precision is tried.
    :ivar error: the most that a pixel is off by, of those.
    :raises NotInPage: a decoder that is too large, or an operation that the page lacks.
    """

    def __init__(self, ways: Sequence[Decode], codes: Tensor) -> None:
        self.weights: list[Tensor] = []
        with torch.no_grad():
            with FlopCounterMode(display=False) as counter:
                ways[0](codes[:1])
            if (products := counter.get_total_flops() // 2) > MOST_PRODUCTS:
                raise NotInPage(f"it takes {products / 1e6:.0f} million multiplications for an image")
            self.programs = [Program(way, codes[:1], self.weights) for way in ways]
            tried = [(w, p, z) for w, p in zip(ways, self.programs, strict=True) for z in codes.unsqueeze(1)]
            for self.dtype, kind in DTYPES.items():
                weights = [w.to(kind).float() for w in self.weights]
                self.error = max(float((way(z) - program(z.float(), weights)).abs().max()) for way, program, z in tried)
                if self.error < TOLERANCE:
                    break
            else:
                raise NotInPage(f"single precision is off by {self.error:.1g} of a pixel's range")
        if (size := len(self.bytes())) > MOST_BYTES:
            raise NotInPage(f"its weights take {size / 1e6:.1f} MB")

    def bytes(self) -> bytes:
        """The weights, one after another."""
        return b"".join(w.to(DTYPES[self.dtype]).contiguous().numpy().tobytes() for w in self.weights)

    def payload(self) -> dict[str, object]:
        """As JSON."""
        return {
            "dtype": self.dtype,
            "weights": base64.b64encode(self.bytes()).decode(),
            "shapes": [list(w.shape) for w in self.weights],
            "programs": [{"steps": p.steps, "output": p.output} for p in self.programs],
        }
