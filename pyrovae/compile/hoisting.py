"""What all passes of an evaluation would compute alike, computed once: an encoder, say, beside the draws from it.

A graph is cut in two. The first part has the costly operations that no noise reaches, with all that leads to them;
the second has the rest, and takes what the first gives. What costs little is left where it is needed: as a result of
its own it would be written to memory and read again, where a compiled graph keeps it in registers.
"""

from __future__ import annotations

from operator import getitem
from typing import Any

from torch import Tensor, fx
from torch._ops import OpOverload

from pyrovae.compile.graph import Graph, Runnable, is_changed, is_mutable, is_view, written
from pyrovae.compile.noise import aten

COSTLY = {
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.convolution.default,
    aten.linalg_cholesky_ex.default,
}  # fmt: skip


class Hoisted:
    """A compiled graph without what no noise reaches, which is computed anew after :meth:`begin` alone.

    :param number: of the graph's inputs, which stay the same between two calls of :meth:`begin`.
    """

    def __init__(self, graph: Graph, number: int) -> None:
        self.first, rest = parts(graph, number)
        self.rest: Runnable = rest.compiled()
        self.found: list[Tensor] | None = None

    def begin(self) -> None:
        """Take other inputs."""
        self.found = None

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        if self.found is None:
            self.found = self.first(*inputs)
        return self.rest(*inputs, *self.found)


def parts(graph: Graph, number: int) -> tuple[Graph, Graph]:
    """What is computed once, and the rest, which takes that after the ``number`` inputs of the graph.

    The graph itself is rewritten where it changes its own results in place.
    """
    out_of_place(graph.module.graph)
    nodes = graph.module.graph.nodes
    inputs = graph.module.graph.find_nodes(op="placeholder")
    first_noise = number + len(graph.constants)
    reached = set(inputs[first_noise:])
    for node in nodes:
        if is_mutable(node.target) or is_changed(node) or not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    once = [node for node in nodes if is_costly(node) and node not in reached]

    rest, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in inputs[:number]:
        copies[node] = rest.node_copy(node)
    for node in once:
        copies[node] = rest.placeholder(f"once_{node.name}")
        copies[node].meta = node.meta
    rest.output(rest.graph_copy(graph.module.graph, copies))
    rest.eliminate_dead_code()
    for node in [node for node in once if not copies[node].users]:  # others follow from it
        rest.erase_node(copies.pop(node))
        once.remove(node)

    needed = set(once)
    for node in reversed(nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    first, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in nodes:
        if node in needed or node in inputs[:first_noise]:
            copies[node] = first.node_copy(node, copies.__getitem__)
    first.output([copies[node] for node in once])
    return (
        Graph(fx.GraphModule({}, first), graph.constants, tuple),
        Graph(fx.GraphModule({}, rest), graph.constants, graph.noise),
    )


def is_costly(node: fx.Node) -> bool:
    """Whether a node gives what a costly operation computes, or one of its results."""
    source: Any = node.args[0] if node.target is getitem else node
    return getattr(source, "target", None) in COSTLY


def out_of_place(graph: fx.Graph) -> None:
    """Let operations that change what nobody reads afterwards give a result of their own, as ``relu_`` of a layer."""
    seen = set[fx.Node]()
    for node in graph.nodes:
        seen.add(node)
        changed, plain = written(node), named_without_underscore(node.target)
        if plain is None or changed != [node.args[0]]:
            continue
        own = changed[0].op == "call_function" and not is_view(changed[0].target) and changed[0].users.keys() <= seen
        alone = not any(is_view(user.target) for user in changed[0].users if user is not node)
        alike = {n.meta["val"].dtype for n in node.all_input_nodes} == {node.meta["val"].dtype}  # nothing is promoted
        if own and alone and alike:
            node.target = plain


def named_without_underscore(target: object) -> OpOverload | None:
    """The operation that computes what this one writes in place, if it is called so and takes the same."""
    if not (isinstance(target, OpOverload) and is_mutable(target) and target._schema.name.endswith("_")):
        return None
    packet = getattr(aten, target._schema.name.removeprefix("aten::")[:-1], None)
    plain = getattr(packet, target._overloadname, None)
    taken = [[(a.name, str(a.type)) for a in op._schema.arguments] for op in (target, plain) if op is not None]
    return plain if taken[0] == taken[-1] else None
