"""Randomness as an input: every random operation as noise of a size that is known, and a function of it.

The same rewrites serve while a program is captured and while it runs eagerly (:class:`rewritten`), so that both can be
compared on the same noise; :func:`lift_noise` then takes the drawing out of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

aten = torch.ops.aten


READS = "the program reads a tensor's value on the host (.item(), if, float)"


class CannotCompile(Exception):
    """Why a function cannot become a static graph; the message completes "cannot compile: ..."."""


def _bernoulli(p: Tensor, generator: Any = None) -> Tensor:
    return (torch.rand(p.shape, dtype=_float(p), device=p.device) < p).to(p.dtype)


def _bernoulli_p(x: Tensor, p: float = 0.5, generator: Any = None) -> Tensor:
    return (torch.rand(x.shape, dtype=_float(x), device=x.device) < p).to(x.dtype)


def _multinomial(probs: Tensor, num_samples: int, replacement: bool = False, *, generator: Any = None) -> Tensor:
    if num_samples != 1:
        return NotImplemented
    waiting = torch.empty(probs.shape, dtype=probs.dtype, device=probs.device).exponential_()
    return (probs / waiting).argmax(-1, keepdim=True)


def _normal(mean: Any, std: Any, generator: Any = None) -> Tensor:
    like = mean if isinstance(mean, Tensor) else std
    shape = torch.broadcast_shapes(getattr(mean, "shape", ()), getattr(std, "shape", ()))
    return torch.randn(shape, dtype=like.dtype, device=like.device) * std + mean


def _native_dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    if train is False or p == 0:
        return x.clone(), torch.ones(x.shape, dtype=torch.bool, device=x.device)
    kept = torch.rand(x.shape, dtype=x.dtype, device=x.device) >= p
    return kept * x * (1 / (1 - p) if p < 1 else 0.0), kept


def _empty_like(x: Tensor, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=device or x.device)


def _new_empty(x: Tensor, size: Sequence[int], dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return torch.empty(size, dtype=dtype or x.dtype, device=device or x.device)


def _rand_like(x: Tensor, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return torch.rand(x.shape, dtype=dtype or x.dtype, device=device or x.device)


def _randn_like(x: Tensor, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return torch.randn(x.shape, dtype=dtype or x.dtype, device=device or x.device)


def _float(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else torch.get_default_dtype()


REWRITES: dict[Any, Callable[..., Any]] = {
    aten.bernoulli.default: _bernoulli,
    aten.bernoulli.p: _bernoulli_p,
    aten.multinomial.default: _multinomial,
    aten.normal.Tensor_Tensor: _normal,
    aten.normal.Tensor_float: lambda mean, std=1.0, generator=None: _normal(mean, std),
    aten.normal.float_Tensor: _normal,
    aten.empty_like.default: _empty_like,
    aten.new_empty.default: _new_empty,
    aten.rand_like.default: _rand_like,
    aten.randn_like.default: _randn_like,
    aten.native_dropout.default: _native_dropout,
}


class rewritten(TorchDispatchMode):
    """Run the program eagerly on the noise that its captured graph draws from the same generator state."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in REWRITES and not (kwargs and kwargs.get("generator")):
            with self:
                result = REWRITES[func](*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return func(*args, **(kwargs or {}))


class Draws(rewritten):
    """Notes every random operation with the state it drew from, for a draw that is replayed is the same draw.

    Refuses to read the value of a tensor that the function did not make: it may be another one at the next call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, bytes]] = []
        self.scalars: list[Tensor] = []  # that the function made itself; it may read them

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_random(func) and kwargs and kwargs.get("generator"):
            raise CannotCompile("it draws from a generator of its own")
        if _is_random(func) and func not in REWRITES:
            with _disable_current_modes():
                state = torch.get_rng_state().numpy().tobytes()
                if torch.cuda.is_initialized():
                    state += torch.cuda.get_rng_state().numpy().tobytes()
            self.made.append((func, state))
        if func is aten._local_scalar_dense.default and not any(args[0] is made for made in self.scalars):
            raise CannotCompile(READS)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if isinstance(result, Tensor) and result.numel() == 1:
            self.scalars.append(result)
        return result


def _is_random(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def lift_noise(module: fx.GraphModule, made: list[tuple[Any, bytes]]) -> fx.GraphModule:
    """Replace random operations by inputs, and return the module that draws them."""
    graph, drawing = module.graph, fx.Graph()
    nodes = [node for node in graph.nodes if _is_random(node.target)]
    if [node.target for node in nodes] != [func for func, _ in made]:
        raise CannotCompile("its random operations do not all appear in the graph")
    copies: dict[fx.Node, fx.Node] = {}
    known: dict[Any, fx.Node] = {}
    drawn = []

    def copy(node: fx.Node, of: str) -> fx.Node:
        if node.op != "call_function":
            raise CannotCompile(f'"{of}" draws from a distribution whose noise depends on its parameters')
        if node not in copies:
            for parent in node.all_input_nodes:
                copy(parent, of)
            copies[node] = drawing.node_copy(node, lambda n: copies[n])
        return copies[node]

    for node, (func, state) in zip(nodes, made, strict=True):
        name = func.name().removeprefix("aten::")
        if func._schema.is_mutable and (node.args[0].all_input_nodes or len(node.args[0].users) > 1):
            raise CannotCompile(f'"{name}" fills a tensor that is used elsewhere as well')
        settings = repr([a for a in (*node.args, *node.kwargs.values()) if not isinstance(a, fx.Node)])
        same = (func, state, settings, node.meta["val"].shape, node.meta["val"].dtype)
        if same not in known:
            drawn.append(copy(node, name))
            known[same] = new_placeholder(graph, "noise", node.meta["val"])
        noise = known[same]
        if noise.users:  # the first use may change it in place
            with graph.inserting_before(next(n for n in graph.nodes if n.op == "call_function")):
                noise = graph.call_function(aten.clone.default, (noise,))
        node.replace_all_uses_with(noise)
    for node in reversed(nodes):
        graph.erase_node(node)
    drawing.output(tuple(drawn))
    return fx.GraphModule({}, drawing)


def stacked_noise(sources: Sequence[Callable[[], tuple[Tensor, ...]]]) -> Callable[[], tuple[Tensor, ...]]:
    """The noise of several copies, drawn one after the other and stacked along a first axis."""

    def draw() -> tuple[Tensor, ...]:
        return tuple(map(torch.stack, zip(*(source() for source in sources), strict=True)))

    return draw


def new_placeholder(graph: fx.Graph, name: str, value: Tensor) -> fx.Node:
    """One more input, behind those there are."""
    present = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(present[-1]):
        node = graph.placeholder(f"{name}_{len(present)}")
    node.meta["val"] = value
    return node
