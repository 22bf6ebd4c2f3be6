"""Randomness as an input: every random operation as noise of a size that is known, and a function of it.

The same rewrites serve while a program is captured and while it runs eagerly (:class:`rewritten`), so that both can be
compared on the same noise; :func:`lift_noise` then takes the drawing out of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.distributions import von_mises
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from pyrovae.compile import seeded
from pyrovae.engine.randomness import rng_state

aten = torch.ops.aten

READS = "the program reads a tensor's value on the host (.item(), if, float)"


class CannotCompile(Exception):
    """Why a function cannot become a static graph; the message completes "cannot compile: ..."."""


def bernoulli(x: Tensor, p: float | None = None, generator: object = None) -> Tensor:
    """Bits of the shape of ``x``, of the probability ``p`` or, without one, of those in ``x``."""
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    return (torch.rand(x.shape, dtype=dtype, device=x.device) < (x if p is None else p)).to(x.dtype)


def multinomial(probs: Tensor, num_samples: int, replacement: bool = False, *, generator: object = None) -> Tensor:
    """One index a row: the first of exponential waiting times to end."""
    if num_samples != 1:
        return seeded.multinomial(probs, num_samples, replacement)
    waiting = torch.empty(probs.shape, dtype=probs.dtype, device=probs.device).exponential_()
    return (probs / waiting).argmax(-1, keepdim=True)


def normal(mean: Tensor | float, std: Tensor | float = 1.0, generator: object = None) -> Tensor:
    """A location-scale family of standard normals."""
    like = mean if isinstance(mean, Tensor) else std
    assert isinstance(like, Tensor)
    shape = torch.broadcast_shapes(getattr(mean, "shape", ()), getattr(std, "shape", ()))
    return torch.randn(shape, dtype=like.dtype, device=like.device) * std + mean


def dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    """What is kept, and which."""
    if train is False or p == 0:
        return x.clone(), torch.ones(x.shape, dtype=torch.bool, device=x.device)
    kept = torch.rand(x.shape, dtype=x.dtype, device=x.device) >= p
    return kept * x * (1 / (1 - p) if p < 1 else 0.0), kept


def made_like(make: Callable[..., Tensor], x: Tensor, size: Sequence[int] | None = None, **given: object) -> Tensor:
    """A tensor of the kind of ``x``, from a function of nothing but size, dtype and device."""
    kind = {name: given.get(name) or getattr(x, name) for name in ("dtype", "device")}
    return make(x.shape if size is None else size, **kind)


REWRITES: dict[OpOverload, Callable[..., object]] = {
    aten.bernoulli.default: bernoulli,
    aten.bernoulli.p: bernoulli,
    aten.multinomial.default: multinomial,
    aten.normal.Tensor_Tensor: normal,
    aten.normal.Tensor_float: normal,
    aten.normal.float_Tensor: normal,
    aten.empty_like.default: partial(made_like, torch.empty),
    aten.new_empty.default: partial(made_like, torch.empty),
    aten.rand_like.default: partial(made_like, torch.rand),
    aten.randn_like.default: partial(made_like, torch.randn),
    aten.native_dropout.default: dropout,
    aten._standard_gamma.default: seeded.gamma,
    aten._sample_dirichlet.default: seeded.dirichlet,
    aten.poisson.default: seeded.poisson,
    aten.binomial.default: seeded.binomial,
}


class rewritten(TorchDispatchMode):
    """Run the program eagerly on the noise that its captured graph draws from the same generator state."""

    def __init__(self) -> None:
        super().__init__()
        self.samplers: list[Callable[..., Tensor]] = []

    def __enter__(self) -> Self:
        self.samplers.append(von_mises._rejection_sample)
        von_mises._rejection_sample = seeded.turn  # it reads whether all are accepted
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        von_mises._rejection_sample = self.samplers.pop()
        super().__exit__(kind, error, trace)

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        if func in REWRITES and not (kwargs and kwargs.get("generator")):
            with self:
                return REWRITES[func](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class Draws(rewritten):
    """Notes every random operation with the state it drew from, for a draw that is replayed is the same draw.

    Refuses to read the value of a tensor that the function did not make: it may be another one at the next call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[OpOverload, bytes]] = []
        self.scalars: list[Tensor] = []  # that the function made itself; it may read them

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        if is_random(func) and kwargs and kwargs.get("generator"):
            raise CannotCompile("it draws from a generator of its own")
        if is_random(func) and func not in REWRITES:
            with _disable_current_modes():
                cpu, others = rng_state()
                state = b"".join(generator.numpy().tobytes() for generator in (cpu, *others))
            self.made.append((func, state))
        if func is aten._local_scalar_dense.default and not any(args[0] is made for made in self.scalars):
            raise CannotCompile(READS)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if isinstance(result, Tensor) and result.numel() == 1:
            self.scalars.append(result)
        return result


def is_random(target: object) -> bool:
    """Whether the target of a node, or a function, is an operation that draws."""
    return isinstance(target, OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def lift_noise(module: fx.GraphModule, made: Sequence[tuple[OpOverload, bytes]]) -> fx.GraphModule:
    """Replace random operations by inputs, one for each different draw, and return the module that draws them."""
    nodes = [node for node in module.graph.nodes if is_random(node.target)]
    if [node.target for node in nodes] != [function for function, _ in made]:
        raise CannotCompile("its random operations do not all appear in the graph")
    source, drawn, inputs = fx.Graph(), [], {}
    copies: dict[fx.Node, fx.Node] = {}

    def copy(node: fx.Node, name: str) -> fx.Node:
        """A node, with all that it is computed from."""
        if node.op != "call_function":
            raise CannotCompile(f'"{name}" draws from a distribution whose noise depends on its parameters')
        if node not in copies:
            for parent in node.all_input_nodes:
                copy(parent, name)
            copies[node] = source.node_copy(node, copies.__getitem__)
        return copies[node]

    for node, (function, state) in zip(nodes, made, strict=True):
        name = function.name().removeprefix("aten::")
        filled = node.args[0] if function._schema.is_mutable else None
        while isinstance(filled, fx.Node) and filled.target is aten.alias.default and len(filled.users) == 1:
            filled = filled.args[0]  # tracing aliases a tensor of one number before it is filled
        if isinstance(filled, fx.Node) and (filled.all_input_nodes or len(filled.users) > 1):
            raise CannotCompile(f'"{name}" fills a tensor that is used elsewhere as well')
        numbers = repr([a for a in (*node.args, *node.kwargs.values()) if not isinstance(a, fx.Node)])
        same = (function, state, numbers, node.meta["val"].shape, node.meta["val"].dtype)
        if same not in inputs:
            drawn.append(copy(node, name))
            inputs[same] = new_placeholder(module.graph, "noise", node.meta["val"])
        noise = inputs[same]
        if noise.users:  # the first draw may change it in place
            with module.graph.inserting_before(next(n for n in module.graph.nodes if n.op == "call_function")):
                noise = module.graph.call_function(aten.clone.default, (noise,))
        node.replace_all_uses_with(noise)
    for node in reversed(nodes):
        module.graph.erase_node(node)
    source.output(tuple(drawn))
    return fx.GraphModule({}, source)


class Drawn(NamedTuple):
    """One draw of single precision on a CPU, of standard normals or uniforms."""

    normal: bool
    shape: torch.Size


def plain_draws(source: object) -> list[Drawn] | None:
    """What a module of :func:`lift_noise` draws, one after the other; None where any of it is something else."""
    if not isinstance(source, fx.GraphModule):
        return None
    *made, output = [node for node in source.graph.nodes if node.target is not aten.empty.memory_format]
    for node in made:
        filled, value = node.target in (aten.normal_.default, aten.uniform_.default), node.meta["val"]
        known = (
            (len(node.args) == 1 and not node.kwargs)
            if filled
            else node.target in (aten.randn.default, aten.rand.default)
        )
        if not (known and value.dtype is torch.float32 and value.is_cpu and value.is_contiguous()):
            return None
    if list(output.args[0]) != made:
        return None
    normals = (aten.normal_.default, aten.randn.default)
    return [Drawn(node.target in normals, node.meta["val"].shape) for node in made]


def stacked_noise(sources: Sequence[Callable[[], tuple[Tensor, ...]]]) -> Callable[[], tuple[Tensor, ...]]:
    """The noise of several copies, drawn one after the other and stacked along a first axis."""
    return lambda: tuple(map(torch.stack, zip(*(source() for source in sources), strict=True)))


def new_placeholder(graph: fx.Graph, name: str, value: Tensor) -> fx.Node:
    """One more input, behind those there are."""
    present = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(present[-1]) if present else graph.inserting_before():
        node = graph.placeholder(f"{name}_{len(present)}")
    node.meta["val"] = value
    return node
