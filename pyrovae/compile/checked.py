"""Compiled functions that are never silently wrong: compared with the eager ones on the same noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import KW_ONLY, InitVar, dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_structure

from pyrovae.arguments import shown
from pyrovae.compile.graph import Composed, Graph, capture
from pyrovae.compile.hoisting import Hoisted
from pyrovae.compile.inductor import COMPILATION
from pyrovae.compile.noise import CannotCompile, rewritten
from pyrovae.compile.precision import full_float32
from pyrovae.engine.probe import PairState
from pyrovae.engine.programs import Batch, leaves, put_buffers, warn
from pyrovae.engine.randomness import isolated_rng

SAVED = 1e-11  # seconds that compiling saves, per parameter and sample of one datum (measured on CPUs)


class Captured(NamedTuple):
    """A function's graph, and what it is to be checked with."""

    graph: Graph
    expected: list[Tensor]  # of the function itself, on the noise of the check
    changed: list[Tensor]  # the tensors that it changes in place, as it leaves them


@dataclass(eq=False)
class Checked:
    """A function of tensors, called through one compiled graph that was found to give what the function gives.

    The graph is made for the first inputs and compared with the function on the same noise, in full float32. Inputs of
    the same kinds go through it, all others through the function; so does everything, after one warning, where nothing
    can be compiled.

    :param function: what is to be compiled; gives a list of tensors, a loss first if there is one.
    :param state: the tensors that it reads besides its inputs, each once.
    :param changes: those among them that it changes in place; they are compared as well.
    :param untouched: a context that undoes what the function does to its state while it is tried out.
    :param precision: "bfloat16" where its networks multiply in that: then more is explained by rounding.
    :param seed: of the noise that both are compared on.
    :param hoists: compute once, until :meth:`begin`, what no noise reaches; the inputs stay the same in between.
    :param wanted: False for a function that is to run eagerly.
    :param reason: why it cannot be compiled, where that is known beforehand.
    """

    function: Callable[..., list[Tensor]]
    state: Sequence[Tensor]
    _: KW_ONLY
    changes: list[Tensor] = field(default_factory=list)
    untouched: Callable[[], AbstractContextManager[None]] = nullcontext
    precision: str = "float32"
    seed: int = 0
    hoists: bool = False
    wanted: InitVar[bool] = True
    reason: str | None = None

    def __post_init__(self, wanted: bool) -> None:
        self.kind = "compiled" if wanted else "eager"
        self.compiled: Callable[..., list[Tensor]] | None = None
        self.graph: Graph | None = None
        self.signature: tuple[object, ...] = ()
        self.hoisted: Hoisted | None = None

    def begin(self) -> None:
        """Other inputs follow."""
        if self.hoisted is not None:
            self.hoisted.begin()

    def __call__(self, *inputs: object) -> list[Tensor]:
        if self.kind == "compiled" and self.compiled is None:
            try:
                self.compile(inputs)
            except CannotCompile as error:
                self.kind = "eager"
                warn(f"cannot compile: {error}; running eagerly")
        if self.compiled is not None and signature(inputs) == self.signature:
            return self.compiled(*tensors(inputs))
        return self.function(*inputs)

    def compile(self, inputs: Batch, *, lowered: bool = True) -> partial[list[Tensor]]:
        """Make the graph for inputs such as these; what runs it takes their tensors.

        :param lowered: through Inductor; else it runs operation by operation.
        :raises CannotCompile: with the reason.
        """
        if self.reason is not None:
            raise CannotCompile(self.reason)
        graph, *found = self.capture(inputs)
        self.hoisted = Hoisted(graph, len(self.state) + len(tensors(inputs))) if self.hoists else None
        compiled = partial(self.hoisted or (graph.compiled() if lowered else graph), *self.state)
        self.check(compiled, inputs, *found)
        self.compiled, self.graph, self.signature = compiled, graph, signature(inputs)
        return compiled

    def check(self, compiled: Callable[..., list[Tensor]], inputs: Batch, *found: list[Tensor]) -> None:
        """Refuse what does not give, and change, what the function does (as :meth:`expected`)."""
        with isolated_rng(self.seed), self.untouched(), full_float32():
            for expected, got in zip(found, (compiled(*tensors(inputs)), self.changes), strict=True):
                compare(expected, got, self.precision)

    def holds(self, inputs: Batch) -> bool:
        """Whether the function still does what it did when it was compiled, for such inputs."""
        if (compiled := self.compiled) is None or self.graph is None:
            return True
        return still(self.graph, lambda: self.check(compiled, inputs, *self.expected(inputs)), [self], inputs)

    def expected(self, inputs: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """What the function gives on the noise of the check, and what it changes, as it leaves it."""
        with isolated_rng(self.seed), self.untouched(), rewritten(), Composed(), full_float32():
            return self.function(*inputs), [t.clone() for t in self.changes]

    def capture(self, inputs: Batch) -> Captured:
        """The graph for inputs such as these.

        The function runs eagerly first, so that whatever is wrong with it is said in plain words.
        """
        expected, changed = self.expected(inputs)
        return Captured(self.captured(inputs), expected, changed)

    def captured(self, inputs: Batch) -> Graph:
        """The graph alone."""
        with self.untouched(), pyro.validation_enabled(False):
            return capture(partial(self.function, *inputs), [*self.state, *tensors(inputs)])

    def forget(self) -> None:
        """Make another graph, for the next inputs."""
        self.compiled = None


def still(graph: Graph, check: Callable[[], None], functions: Iterable[Checked], inputs: Batch) -> bool:
    """Whether functions do what they did when they became a graph, which ``check`` compares with them.

    Where results differ, they are captured once more: rounding, too, may have grown with the values.
    """
    with pyro.validation_enabled(False), suppress(torch.OutOfMemoryError):  # there may be room for the graph alone
        try:
            check()
        except CannotCompile:
            try:
                return all(graph.same(function.captured(inputs)) for function in functions)
            except CannotCompile:
                return False
    return True


def check_compile(compile: bool | str) -> None:
    """Refuse anything but "auto", True and False; 1 and 0 are these."""
    if not (isinstance(compile, int | np.bool_ | str) and compile in ("auto", True, False)):
        raise ValueError(f'compile must be "auto", True or False, got {shown(compile)}: pass one of these')


def wanted(compile: bool | str, saved: float) -> bool:
    """Whether to compile: as told, or for "auto" where that saves more seconds than a compilation takes."""
    return saved > COMPILATION if compile == "auto" else bool(compile)


def compare(expected: list[Tensor], got: list[Tensor], precision: str = "float32") -> None:
    """Refuse a compiled function whose results differ from the eager ones by more than rounding explains.

    The first result is a loss (or the only result); the norm of all the others sets the scale on which each counts.
    """
    if len(expected) != len(got):
        raise CannotCompile(f"compiled and eager results differ: {len(got)} and {len(expected)} tensors")
    total = math.sqrt(sum(float(e.double().square().sum()) for e in expected[1:]))
    for e, g in zip(expected, got, strict=True):
        if not e.is_floating_point():
            e, g = e.double(), g.double()
        if not torch.isfinite(e).all():
            continue  # there is nothing to compare; training reports it
        tolerance = 0.1 if precision == "bfloat16" else 10 * math.sqrt(torch.finfo(e.dtype).eps)
        error, size = float((e - g).double().norm()), float(e.double().norm())
        if not error <= tolerance * max(size, 1e-3 * total):
            raise CannotCompile(f"compiled and eager results differ: by {error:.3g} in a tensor of norm {size:.3g}")


def signature(batch: Batch) -> tuple[object, ...]:
    """What a graph is made for: the kinds of the tensors, and all else as it is, or which it is where it may change.

    Arguments that hold others count by what they hold, and where.
    """
    given = leaves(batch)
    kinds = ((a.shape, a.dtype, a.device) if isinstance(a, Tensor) else a for a in given)
    found = tuple(kind if isinstance(kind, Hashable) else id(kind) for kind in kinds)
    return found if given is batch else (*found, str(tree_structure(batch)))


def tensors(batch: Batch) -> list[Tensor]:
    """The tensors of a batch, those within its arguments too."""
    return [a for a in leaves(batch) if isinstance(a, Tensor)]


def distinct(many: Iterable[Tensor]) -> list[Tensor]:
    """Each tensor once."""
    return list({id(t): t for t in many}.values())


def tensors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """The parameters and buffers of modules, each once."""
    return distinct(tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))


@contextmanager
def untouched(state: PairState) -> Iterator[None]:
    """Leave parameters and buffers as they were: their values, and which tensors they are."""
    modules = [*(module for root in state.modules for module in root.modules()), *state.held]
    buffers = [(m, dict(m._buffers.items())) for m in modules if m._buffers]
    owned = [b for _, named in buffers for b in named.values() if b is not None]
    values = [(t, t.detach().clone()) for t in distinct([*state.tensors.values(), *owned])]
    try:
        yield
        for module, named in buffers:
            for name, then in named.items():
                if dict(module._buffers.items()).get(name) is not then:
                    raise CannotCompile(f'{type(module).__name__} replaces its buffer "{name}": change it in place')
    finally:
        for module, named in buffers:
            put_buffers(module, named)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
