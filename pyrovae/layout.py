"""In which order tensors lie in memory, where that costs time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from pyrovae.noise import aten


def laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """A gradient in its parameter's memory layout, as autograd would leave it.

    Convolutions give theirs channels last, and fused optimizers read both tensors in the order in which they lie.
    """
    return gradient if gradient.stride() == parameter.stride() else torch.empty_like(parameter).copy_(gradient)


def channels_last(module: fx.GraphModule, inputs: Sequence[Tensor]) -> fx.GraphModule:
    """Let convolutions on CPUs find their inputs channels last, in the backward pass too.

    Inductor reads them so there, but keeps a contiguous value as well for the backward pass, and turns each into the
    other: up to a seventh of a step.
    """
    convolves = any(node.target is aten.convolution.default for node in module.graph.nodes)
    if not convolves or any(t.device.type != "cpu" for t in inputs):
        return module
    # without changes in place, a copy of a value is as good as the value
    functional = make_fx(torch.func.functionalize(module), tracing_mode="fake")(*inputs)
    return _ChannelsLast(functional).transform()


class _ChannelsLast(fx.Transformer):
    """Copies what is convolved, in that order, for all who read it."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        convolved = any(user.target is aten.convolution.default and user.args[0] is n for user in n.users)
        if not convolved or n.op == "placeholder" or n.meta["val"].dim() != 4:
            return result
        return aten.clone.default(result, memory_format=torch.channels_last)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        views = (aten.view.default, aten._unsafe_view.default)  # which what lies channels last may not have
        return super().call_function(aten.reshape.default if target in views else target, args, kwargs)
