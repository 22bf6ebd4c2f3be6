"""Calling Pyro programs: the modules they reach, their modes and buffers, what their values depend on.

A program is any callable with Pyro primitives inside: a module, a bound method, a plain function that
closes over networks. These helpers find what such a callable reaches without asking it to register anything.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from threading import get_ident
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves, tree_map

from pyrovae.arguments import shown
from pyrovae.engine.randomness import isolated_rng, one_thread, restore_rng, rng_snapshot

Program = Callable[..., Any]
Batch = tuple[Any, ...]  # what a program takes
Modes = dict[nn.Module, bool]  # whether each is in train mode

HOLDERS = nn.Module, partial, MethodType, FunctionType, list, tuple, set, dict
LIBRARIES = {"torch", "pyro", "pyrovae"}  # whose functions name no networks of a user
MANY = 1000  # items of a container; a longer one holds data
ACCUMULATE: Any = torch._C._functions.AccumulateGrad  # the autograd node of a leaf


def warn(message: str) -> None:
    """Warn at the user's line: the innermost that is neither of this package nor of Pyro or torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in (
        "pyrovae",
        "pyro",
        "torch",
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def nothing(*_: object, **__: object) -> None:
    """The program without sites."""


def rows(batch: Batch, kwargs: Mapping[str, object] | None = None) -> int:
    """The number of data in a batch, by its first tensor, else the first that an argument holds; 1 without any."""
    given = (*batch, *(kwargs or {}).values())
    number = next((len(a) for a in given if isinstance(a, Tensor) and a.dim()), None)
    return next((len(a) for a in leaves(given) if isinstance(a, Tensor) and a.dim()), 1) if number is None else number


def cut(batch: Batch, own: slice | list[int]) -> Batch:
    """Some rows of a batch, within its arguments too; what has no rows, or others, is for all."""
    number = rows(batch)
    return tree_map(lambda a: a[own] if isinstance(a, Tensor) and a.dim() and len(a) == number else a, batch)


def leaves(batch: Batch) -> Sequence[object]:
    """The arguments of a batch; in the place of dicts, lists and tuples what they hold."""
    return batch if all(type(a) is Tensor for a in batch) else tree_leaves(batch)


#: What to pass instead, by how Python says that arguments do not fit.
CALLS = {
    "too many": "pass data without labels, or a model that takes them, such as pyrovae.models.ConditionalVAE",
    "missing": "pass a tuple of all that it takes, (x, y), or data that give such",
    "unexpected": "leave that out, as it is no option of this function either",
}

ONE_BY_ONE = "pass what the tuple holds one after the other: model, guide, x, y"


def refuse_call(program: Program, args: Batch, kwargs: Mapping[str, object]) -> None:
    """A TypeError in plain words for a program that cannot be called so; nothing for one that can."""
    if not callable(program):
        raise TypeError(f"a program must be callable, got {shown(program)}: pass such as vae.model and vae.guide")
    run = program.forward if isinstance(program, nn.Module) else program
    try:
        signature = inspect.signature(run)
        signature.bind(*args, **kwargs)
    except ValueError:  # that of a builtin is not known
        return
    except TypeError as error:
        takes = f"{getattr(run, '__name__', type(run).__name__)}({', '.join(signature.parameters)})"
        whole = "missing" in str(error) and list(map(type, args)) == [tuple]
        fix = ONE_BY_ONE if whole else next(fix for how, fix in CALLS.items() if how in str(error))
        given = [*(type(a).__name__ for a in args), *(f"{k}={type(a).__name__}" for k, a in kwargs.items())]
        raise TypeError(f"{takes} was called with ({', '.join(given)}): {error}; {fix}") from error


def roots(*programs: Program) -> list[nn.Module]:
    """The modules that the programs are, or are methods of, each once and in order.

    Partial functions are looked into: Pyro's handlers (``poutine.scale(model, ...)``) hold a program as an argument.
    """
    found: dict[nn.Module, None] = {}
    pending: list[object] = list(programs)
    while pending:
        program = pending.pop(0)
        if isinstance(program, partial):
            pending = [program.func, *program.args, *program.keywords.values(), *pending]
        for candidate in (program, getattr(program, "__self__", None)):
            if isinstance(candidate, nn.Module):
                found[candidate] = None
    return list(found)


def held_by(*programs: Program) -> Iterator[Tensor]:
    """The parameters and buffers of each of the programs' modules."""
    return (tensor for module in roots(*programs) for tensor in (*module.parameters(), *module.buffers()))


def device_of(*programs: Program) -> torch.device | None:
    """Where the first parameter, or else buffer, of the programs' modules lives; None if they have none."""
    return next((tensor.device for tensor in held_by(*programs)), None)


@contextmanager
def on_forward(hook: Callable[[nn.Module, Batch], None]) -> Iterator[None]:
    """Call ``hook`` with every module that is about to run, and what it is given."""
    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def within(*programs: object) -> dict[nn.Module, None]:
    """The modules that programs are, belong to, close over or name, and all below them, called or not."""
    found: dict[nn.Module, None] = {}
    pending, seen = list(programs), dict[int, object]()
    while pending:
        held = pending.pop()
        if id(held) not in seen:
            seen[id(held)] = held
            if isinstance(held, nn.Module):
                found.update(dict.fromkeys(held.modules()))
            else:
                pending += parts(held)
    return found


def parts(held: Any) -> Iterable[object]:
    """What may hold modules in a program, in what it is made of, or in an object that it belongs to."""
    if isinstance(held, partial):
        return held.func, *held.args, *held.keywords.values()
    if isinstance(held, MethodType):
        return held.__self__, held.__func__
    if isinstance(held, FunctionType):
        return named_in(held)
    if isinstance(held, list | tuple | set | dict):
        items = held.values() if isinstance(held, dict) else held
        return [item for item in items if isinstance(item, HOLDERS)] if len(held) <= MANY else ()
    if isinstance(held, type | ModuleType | Tensor) or not isinstance(own := getattr(held, "__dict__", None), dict):
        return ()
    return [*parts(own), held.__call__] if callable(held) else parts(own)


def named_in(function: FunctionType) -> Iterator[object]:
    """What a function closes over, and what it names of its file."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # it is empty so far
            yield cell.cell_contents
    codes = [] if function.__module__.split(".")[0] in LIBRARIES else [function.__code__]
    while codes:
        code = codes.pop()
        codes += (inner for inner in code.co_consts if isinstance(inner, CodeType))
        yield from (function.__globals__[name] for name in code.co_names if name in function.__globals__)


def lent(buffer: Tensor) -> Tensor:
    """A copy of a buffer; where there is such a thing, one that takes time and memory only if it is written to."""
    plain = type(buffer) is Tensor and buffer.layout is torch.strided and buffer.device.type in ("cpu", "cuda")
    traced = torch._C._len_torch_dispatch_stack()
    with suppress(RuntimeError):  # of memory that is not torch's own, such as NumPy's
        if plain and not traced:
            return torch._lazy_clone(buffer)
    return buffer.clone()


@contextmanager
def protected_buffers(*programs: object) -> Iterator[None]:
    """Let the programs' modules, and all that run inside, work on copies of their buffers (averages stay as they were).

    Modules of programs need not run to be found (:func:`within`): their methods may be what moves buffers.
    """
    originals: dict[nn.Module, dict[str, Tensor | None]] = {}

    def lend_copies(module: nn.Module, inputs: Batch) -> None:
        if module._buffers and module not in originals:
            if is_lazy(module):
                module.initialize_parameters(*inputs)  # type: ignore[operator]  # as it does itself before it runs, if that is still to be done
            originals[module] = dict(module._buffers.items())
            put_buffers(module, {name: None if b is None else lent(b) for name, b in module._buffers.items()})

    for module in within(*programs):
        if module._buffers and not is_lazy(module):
            lend_copies(module, ())
    with on_forward(lend_copies):
        try:
            yield
        finally:
            for module, buffers in originals.items():
                put_buffers(module, buffers)


def put_buffers(module: nn.Module, buffers: Mapping[str, Tensor | None]) -> None:
    """Let a module have other tensors for its buffers; one by one, as scripted modules take them."""
    for name, buffer in buffers.items():
        module._buffers[name] = buffer


@contextmanager
def reached_modules(*programs: Program) -> Iterator[dict[nn.Module, None]]:
    """Collect, while the programs run inside, every module that they are, belong to or call."""
    found: dict[nn.Module, None] = dict.fromkeys(roots(*programs))
    with on_forward(lambda module, _: found.setdefault(module)):
        yield found


def is_lazy(module: nn.Module) -> bool:
    """Whether a module makes its parameters when it first runs, and has not."""
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()


@contextmanager
def isolated_run() -> Iterator[None]:
    """Leave generators as they were found; but where lazy modules came into being inside, their draws are spent."""
    lazy: list[bool] = []
    with isolated_rng(), on_forward(lambda module, _: lazy.append(is_lazy(module))):
        yield
        spent = rng_snapshot() if any(lazy) else None
    if spent is not None:
        restore_rng(spent)


def modes_of(modules: Iterable[nn.Module]) -> Modes:
    """The modes of modules, and of all below them."""
    return {child: child.training for module in modules for child in module.modules()}


def set_modes(modes: Modes) -> None:
    """Put each module in its mode, and none below it."""
    for module, training in modes.items():
        if module.training is not training:
            module.training = training


@contextmanager
def in_modes(modes: Modes) -> Iterator[None]:
    """Run modules in given modes; restore each one's own afterwards, whatever was done to it meanwhile."""
    with one_thread():
        found = {module: module.training for module in modes}
        try:
            set_modes(modes)
            yield
        finally:
            set_modes(found)


def training_modes(*programs: Program) -> Modes:
    """The modes in which the programs' modules are trained.

    What is frozen below a module in train mode stays in eval mode; a module that is in eval mode itself, as one that
    was loaded, trains with all below it.
    """
    owners = roots(*programs)
    below = {child for root in owners for child in root.modules() if child is not root}
    outermost = [root for root in owners if root not in below]
    return {child: child.training or not root.training for root in outermost for child in root.modules()}


def warn_of_eval(modules: Iterable[nn.Module], *programs: Program) -> None:
    """Say which modules of plain functions are in eval mode, in which they stay: no program says that it owns them."""
    owned = {child for root in roots(*programs) for child in root.modules()}
    if kept := [type(module).__name__ for module in modules if not (module.training or module in owned)]:
        warn(
            f"{', '.join(kept)} stay in eval mode, as they were found: call .train() on what is to be trained in train "
            "mode, or make the programs methods of a module"
        )


@contextmanager
def evaluating(*programs: Program) -> Iterator[None]:
    """Run programs in eval mode and on copies of buffers, with all modules that they are, belong to or come to call."""
    modes: Modes = {}

    def enter(module: nn.Module, _: Batch = ()) -> None:
        if module not in modes:
            for child in module.modules():
                modes.setdefault(child, child.training)
                child.training = False

    with one_thread(), protected_buffers(*programs), on_forward(enter):
        for root in roots(*programs):
            enter(root)
        try:
            yield
        finally:
            set_modes(modes)


def graph_nodes(root: Tensor) -> Iterator[Node]:
    """The autograd nodes that ``root`` depends on, depth first, in the graph's order."""
    seen: set[Node] = set()
    stack = [root.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack.extend(parent for parent, _ in reversed(node.next_functions))


def graph_leaves(root: Tensor) -> list[Tensor]:
    """The leaf tensors that require grad and that ``root`` depends on, in the graph's order."""
    variables = (getattr(node, "variable", None) for node in graph_nodes(root))
    return list({id(v): v for v in variables if isinstance(v, Tensor)}.values())


def new_leaves(root: Tensor, known: Container[int]) -> list[Tensor]:
    """The leaves as in :func:`graph_leaves`, in any order, whose ids are not known: a few microseconds a step."""
    seen: set[Node] = set()
    stack: list[Any] = [root.grad_fn]
    found = []
    while stack:
        for parent, _ in stack.pop().next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                if type(parent) is not ACCUMULATE:
                    stack.append(parent)
                elif id(leaf := parent.variable) not in known and leaf.requires_grad:
                    found.append(leaf)
    return found


@contextmanager
def before_backward(hook: Callable[[Tensor], object]) -> Iterator[None]:
    """Call ``hook`` with every tensor whose ``backward()`` this thread calls, before its graph is gone."""
    backward, thread = torch.autograd.backward, get_ident()

    def noted(tensors: Tensor, *args: Any, **kwargs: Any) -> None:
        if get_ident() == thread:
            hook(tensors)
        backward(tensors, *args, **kwargs)

    torch.autograd.backward = noted  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.autograd.backward = backward


def depends_on(root: Tensor, nodes: Collection[Node]) -> bool:
    """Whether the graph of ``root`` passes through one of the autograd ``nodes``."""
    return any(node in nodes for node in graph_nodes(root))
