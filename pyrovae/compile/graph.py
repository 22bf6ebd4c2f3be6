r"""A computation -> one flat graph of tensor operations without Python in it, with its noise lifted out.

:func:`capture` runs a function once and records the operations below autograd, so gradients, Pyro's handlers and
modules all become plain operations. What comes back is a pure function

.. math:: \text{outputs} = g(\text{inputs}, \text{constants}, \text{noise})

whose randomness is an input: ``noise()`` draws it with the operations, and from the generator, that the function itself
used, in its order. So a captured function consumes the generator exactly as the function does, can be compared with it
on the same noise, batched over replicas, and recorded as a CUDA graph. What cannot become such a graph raises
:class:`CannotCompile` with the reason.
"""

from __future__ import annotations

import pickle
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import PyDLL
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from pyrovae.compile.inductor import empty_like_of, placeholders, remembered
from pyrovae.compile.noise import (
    READS,
    CannotCompile,
    Draws,
    aten,
    is_random,
    lift_noise,
    new_placeholder,
    stacked_noise,
)
from pyrovae.compile.steps import library_of
from pyrovae.engine.randomness import isolated_rng


@dataclass
class Graph:
    """A captured function: its operations, the tensors it closes over, and what draws its noise."""

    module: fx.GraphModule
    constants: list[Tensor]
    noise: Callable[[], tuple[Tensor, ...]]

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for equal computations: the operations, and what they take."""
        takes = tuple((v.shape, v.stride(), v.dtype, v.device) for v in placeholders(self.module))
        return self.module.code, getattr(self.noise, "code", None), takes

    def same(self, other: Graph) -> bool:
        """Whether both compute the same, of constants of the same values."""
        if self.key != other.key:
            return False
        pairs = zip(self.constants, other.constants, strict=True)
        return all(a is b or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in pairs)

    def __call__(self, *inputs: Tensor, noise: Callable[[], tuple[Tensor, ...]] | None = None) -> list[Tensor]:
        """Run the graph, operation by operation, on fresh noise or on what ``noise`` draws."""
        with torch.no_grad():
            return list(self.module(*inputs, *self.constants, *(noise or self.noise)()))

    def compiled(self) -> Runnable:
        """The same function through Inductor; graphs that are equal share one compilation.

        :raises CannotCompile: where Inductor, or the compiler that it calls, fails.
        """
        drawn = self.noise.forward if isinstance(self.noise, fx.GraphModule) else self.noise  # without Module.__call__
        return Runnable(self, remembered(self.module, self.key), drawn)

    def batched(self, number: int, stacked: Sequence[bool]) -> Graph:
        """``number`` copies of the function side by side, each on noise of its own.

        :param stacked: for each input, whether every copy has its own, stacked along a first axis.
        :raises CannotCompile: where an operation has no batched form.
        """
        count, like = len(self.constants), [empty_like_of(v) for v in placeholders(self.module)]
        axes = [*stacked, *[False] * count, *[True] * (len(like) - len(stacked) - count)]
        examples = [v.expand(number, *v.shape).clone() if own else v for v, own in zip(like, axes, strict=True)]
        with torch.no_grad(), reasons(), loops():
            module = make_fx(torch.vmap(self.module, in_dims=tuple(0 if own else None for own in axes)))(*examples)
        module.graph.set_codegen(fx.graph.CodeGen())
        module.graph.eliminate_dead_code()
        module.recompile()
        if more := [n for n in module.graph.nodes if n.op == "get_attr"]:
            raise CannotCompile(f"batching it makes constants of its own ({more[0].target})")
        return Graph(module, self.constants, stacked_noise([self.noise] * number))


class Library(NamedTuple):
    """The C++ of a graph, what a run gives, and the numbers of the inputs that it changes."""

    library: PyDLL
    results: list[Tensor]
    changed: list[int]


@dataclass
class Runnable:
    """A graph through Inductor; ``run`` takes its inputs, its constants and what ``noise`` draws."""

    graph: Graph
    run: Callable[..., Sequence[Tensor]]
    noise: Callable[[], tuple[Tensor, ...]]
    found: list[Library | None] = field(default_factory=list)

    def __call__(self, *inputs: Tensor, noise: Callable[[], tuple[Tensor, ...]] | None = None) -> list[Tensor]:
        """Run it on fresh noise, or on what ``noise`` draws."""
        with torch.no_grad():
            return list(self.run(*inputs, *self.graph.constants, *(noise or self.noise)()))

    def library(self, inputs: Sequence[Tensor]) -> Library | None:
        """The C++ that takes training steps by this graph, if there is such."""
        if not self.found:
            changed = changed_inputs(self.graph.module)
            own = [t.clone() if i in changed else t for i, t in enumerate(inputs)]
            with isolated_rng():
                noise = self.noise()
            results = list[Tensor]()
            library = library_of(
                lambda: results.extend(self(*own, noise=lambda: noise)), [*own, *self.graph.constants, *noise]
            )
            kinds = [empty_like_of(result) for result in results]
            self.found.append(None if library is None else Library(library, kinds, changed))
        return self.found[0]


def capture(function: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor]) -> Graph:
    """Record ``function``, which reads the tensors ``inputs`` wherever it finds them (they are known by identity).

    The function runs twice: a graph that comes out different the second time depends on Python state, which a static
    graph would freeze. Generators are left as they were; in-place changes of ``inputs`` happen, and are recorded.

    :raises CannotCompile: where values steer the program, randomness depends on parameters in a way that has no
        reparameterisation, or the two runs differ.
    """
    first, second = (capture_once(function, inputs) for _ in range(2))
    if not first.same(second):
        raise CannotCompile("the program does something else at every call (it changes Python state as it runs)")
    return first


def capture_once(function: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor]) -> Graph:
    """Record a function that does the same at every call."""
    if len({id(tensor) for tensor in inputs}) != len(inputs):
        raise CannotCompile("a tensor is given twice")
    draws, before = Draws(), pickle.dumps((random.getstate(), np.random.get_state()))

    def traced(*_: Tensor) -> list[Tensor]:
        with Traceable():
            return list(function())

    with isolated_rng(), reasons(), draws, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        module = make_fx(traced)(*inputs)
        if pickle.dumps((random.getstate(), np.random.get_state())) != before:
            raise CannotCompile("the program draws from Python's or numpy's generator: draw with torch")
    fold_masks(module)
    refuse_dynamic_shapes(module)
    constants = lift_constants(module)
    noise = lift_noise(module, draws.made)
    module.graph.set_codegen(fx.graph.CodeGen())
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return Graph(module, constants, noise)


def lift_constants(module: fx.GraphModule) -> list[Tensor]:
    """Make inputs of the tensors that the function closes over: they are read anew, as they are, at every call."""
    devices = {v.device for v in placeholders(module)}
    lifted: dict[int, tuple[Tensor, fx.Node]] = {}
    read = [n for n in module.graph.nodes if n.op == "get_attr"]
    for node in read:
        tensor = getattr(module, node.target)
        if not isinstance(tensor, Tensor):
            raise CannotCompile(f"it holds a sub-graph ({type(tensor).__name__})")
        if any(is_mutable(user.target) for user in node.users):
            raise CannotCompile(
                "it changes a tensor in place that is no buffer of a module that the programs are, belong to or call: "
                "register it in one"
            )
        if id(tensor) not in lifted:
            if devices and tensor.device not in devices:
                if any(user.target is not aten.lift_fresh_copy.default for user in node.users):
                    raise CannotCompile(f"it uses a tensor on {tensor.device}, its data are elsewhere")
                tensor = tensor.to(next(d for d in devices))
            lifted[id(tensor)] = tensor, new_placeholder(module.graph, "constant", tensor)
        node.replace_all_uses_with(lifted[id(tensor)][1])
        module.graph.erase_node(node)
    for name in {node.target for node in read}:
        delattr(module, name)  # or it becomes an input once more
    return [tensor for tensor, _ in lifted.values()]


def is_mutable(target: object) -> bool:
    """Whether an operation changes what it is given."""
    schema = getattr(target, "_schema", None)
    return schema is not None and schema.is_mutable


def changed_inputs(module: fx.GraphModule) -> list[int]:
    """The numbers of the inputs that a graph changes in place."""
    found = set[fx.Node]()
    for node in module.graph.nodes:
        for changed in written(node):
            while changed.op != "placeholder" and is_view(changed.target) and changed.all_input_nodes:
                changed = changed.all_input_nodes[0]
            found.add(changed)
    return [i for i, node in enumerate(module.graph.find_nodes(op="placeholder")) if node in found]


def written(node: fx.Node) -> list[fx.Node]:
    """What an operation changes in place."""
    given: list[Any] = []
    if node.target is aten.native_batch_norm.default and node.args[5]:
        given += node.args[3:5]  # running averages, which its schema keeps silent about
    elif is_mutable(node.target):
        arguments = node.target._schema.arguments  # type: ignore[union-attr]
        named = ((a, node.kwargs.get(a.name)) for a in arguments)
        pairs = (*zip(arguments, node.args, strict=False), *named)
        given += [value for a, value in pairs if a.alias_info is not None and a.alias_info.is_write]
    return [n for value in given for n in (value if isinstance(value, list | tuple) else [value]) if n is not None]


def fold_masks(module: fx.GraphModule) -> None:
    """Index by numbers where the program indexes by a mask of its own, such as that of a triangle."""
    graph, known = module.graph, dict[fx.Node, Tensor | None]()
    for node in [n for n in graph.nodes if n.target is aten.index.Tensor]:
        indices: list[Any] = []
        for index in node.args[1]:
            mask = None if index is None or index.meta["val"].dtype is not torch.bool else value_of(index, known)
            if mask is None:
                indices.append(index)
                continue
            for place in mask.nonzero(as_tuple=True):
                name = f"_folded_{len(indices)}_{node.name}"
                module.register_buffer(name, place)
                with graph.inserting_before(node):
                    indices.append(graph.get_attr(name))
                indices[-1].meta["val"] = place
        node.args = (node.args[0], indices)


def value_of(node: fx.Node, known: dict[fx.Node, Tensor | None]) -> Tensor | None:
    """What a node gives at every call; None where it depends on what a graph takes, draws or changes in place."""
    if node not in known:
        known[node] = None
        draws_or_changes = is_random(node.target) or is_mutable(node.target) or is_changed(node)
        fixed = node.op == "call_function" and not draws_or_changes
        if fixed and all(value_of(parent, known) is not None for parent in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)  # type: ignore[arg-type]
            with torch.no_grad():
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return known[node]


def is_changed(node: fx.Node) -> bool:
    """Whether the memory of a node is changed in place, by whatever name."""
    return any(
        (user.args[0] is node and is_mutable(user.target)) or (is_view(user.target) and is_changed(user))
        for user in node.users
        if user.args
    )


def is_view(target: object) -> bool:
    """Whether an operation gives what it is given, seen otherwise."""
    schema = getattr(target, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


def refuse_dynamic_shapes(module: fx.GraphModule) -> None:
    """Refuse operations whose result has a shape that depends on values."""
    tagged = (n for n in module.graph.nodes if torch.Tag.dynamic_output_shape in getattr(n.target, "tags", ()))
    for node in tagged:
        if node.target in (aten.index.Tensor, aten.repeat_interleave.Tensor):
            index = [a for a in node.args[1] if a is not None] if node.target is aten.index.Tensor else [node]
            if all(i is not node and i.meta["val"].dtype not in (torch.bool, torch.uint8) for i in index):
                continue
        raise CannotCompile(f'"{node.target}" gives a shape that depends on values')


class Composed(TorchFunctionMode):
    """Computes recurrent layers by plain operations: cuDNN's count as random, for their dropout is noise of its own."""

    RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        enabled = torch._C._get_cudnn_enabled()  # torch.backends.cudnn may be frozen, as torch's own tests have it
        torch._C._set_cudnn_enabled(enabled and func not in self.RECURRENT)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            torch._C._set_cudnn_enabled(enabled)


class Traceable(Composed):
    """Refuse what reads a traced tensor's values unnoticed; write what reads them needlessly in another way."""

    READS = (Tensor.numpy, Tensor.tolist, Tensor.__array__)

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func in self.READS and args[0].numel():
            args[0].detach().reshape(-1)[0].item()  # a tensor that depends on the inputs refuses this
        if func is torch.nn.functional.one_hot:
            return one_hot(*args, **kwargs)
        if func is torch._is_all_true:  # asked by distributions that were made while validation was on
            return True
        return super().__torch_function__(func, types, args, kwargs)


def one_hot(labels: Tensor, num_classes: int = -1) -> Tensor:
    """As torch's, which reads the labels to check them even where it is told how many classes there are."""
    if num_classes < 1:
        return torch.nn.functional.one_hot(labels, num_classes)
    return (labels.unsqueeze(-1) == torch.arange(num_classes, device=labels.device)).long()


@contextmanager
def loops() -> Iterator[None]:
    """Batch what has no batched form copy by copy, without a word on each such operation."""
    warned: Any = torch._C._functorch
    warned._set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        warned._set_vmap_fallback_warning_enabled(True)


@contextmanager
def reasons() -> Iterator[None]:
    """Say of any error why a function cannot be compiled."""
    try:
        yield
    except CannotCompile:
        raise
    except Exception as error:
        text = str(error)
        if "value out of a tracing tensor" in text or "data-dependent" in text.lower():
            raise CannotCompile(READS) from error
        raise CannotCompile(f"{type(error).__name__}: {text.splitlines()[0] if text else ''}") from error
