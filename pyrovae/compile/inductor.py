"""The compiler: finding it, calling it, and the order in which tensors lie in memory."""

from __future__ import annotations

import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import Argument, Target

from pyrovae.compile.libraries import found_quickly, without_attention
from pyrovae.compile.noise import CannotCompile, aten
from pyrovae.compile.pages import our_pages

COMPILATION = 12.0  # seconds that one takes at most, between an AMD EPYC with AVX-512 and processors half as fast
FROM_CACHE = 4.0  # where it was compiled before; the imports of Inductor are most of it
OPTIONS = {"cpp.use_decompose_tanh": True}  # by one exp: three times as fast, and off by at most 1e-7
#: All of a graph in one file of C++, for which no other processes are started. To compile its header for others takes
#: as long as four such files, line tables a tenth of one.
ONE_FILE = {
    "cpp_wrapper": True, "compile_threads": 1, "cpp_cache_precompile_headers": False,
    "aot_inductor.enable_line_tables": False,
}  # fmt: skip
REMEMBERED = 32  # compiled functions that a process keeps

_compiled: OrderedDict[Hashable, Callable[..., Sequence[Tensor]]] = OrderedDict()


def has_compiler(device: torch.device) -> bool:
    """Whether Inductor finds what it compiles with."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return device.type != "cuda" or has_triton()


def placeholders(module: fx.GraphModule) -> list[Tensor]:
    """The inputs of a graph: tensors without data."""
    return [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]


def remembered(module: fx.GraphModule, key: Hashable) -> Callable[..., Sequence[Tensor]]:
    """A graph through Inductor, or the result for an equal one."""
    key = key, torch.get_num_threads()
    if key not in _compiled:
        _compiled[key] = through_inductor(module)
        while len(_compiled) > REMEMBERED:
            _compiled.popitem(last=False)
    _compiled.move_to_end(key)
    return _compiled[key]


def through_inductor(module: fx.GraphModule) -> Callable[..., Sequence[Tensor]]:
    """A graph through Inductor, in a cache for this once where its own cannot be read or written."""
    from torch._inductor.utils import fresh_cache

    on_cpu = all(v.device.type == "cpu" for v in placeholders(module))
    ways: list[tuple[dict[str, int], Callable[[], AbstractContextManager[None]]]] = []
    for options in (ONE_FILE, {}) if on_cpu else ({},):
        ways += [(options, nullcontext), (options, fresh_cache)]
    for options, cache in ways:
        try:
            with silent(), cache(), torch.no_grad():
                return lowered(module, options)
        except Exception as error:
            failed = error
            if "CxxCompiler" in repr(error):
                break
    if "compiler" in f"{type(failed).__name__}: {failed}".lower():
        raise CannotCompile("there is no working C++ compiler: install g++ or clang, or set CXX") from failed
    raise CannotCompile(f"Inductor failed with {type(failed).__name__}: {str(failed).splitlines()[0]}") from failed


def lowered(module: fx.GraphModule, options: dict[str, int]) -> Callable[..., Sequence[Tensor]]:
    """A graph through Inductor, under options besides :data:`OPTIONS`."""
    import torch._inductor.config

    example = [empty_like_of(v) for v in placeholders(module)]
    ours = our_pages() if options == ONE_FILE else nullcontext()  # another way lasts if another torch takes none
    with torch._inductor.config.patch(OPTIONS | options), found_quickly(), without_attention(module), ours:
        module = channels_last(module, example)
        return torch._inductor.standalone_compile(module, list(example), dynamic_shapes="from_example_inputs")


@contextmanager
def silent() -> Iterator[None]:
    """Without what Inductor and its compiler warn of: a CUDA toolkit without a device, for one, or an old cache."""
    loggers = [logging.getLogger(name) for name in ("torch.utils.cpp_extension", "torch._inductor", "torch._functorch")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)  # Inductor tells of the first way thus, where the second works
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def empty_like_of(value: Tensor) -> Tensor:
    """A tensor of the same kind (what a graph remembers of its inputs holds no data)."""
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


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
    return ChannelsLast(functional).transform()


class ChannelsLast(fx.Transformer):
    """Copies what is convolved, in that order, for all who read it; what the graph gives lies as it did."""

    def run_node(self, n: fx.Node) -> object:
        result: Any = super().run_node(n)
        if n.op == "output":
            return [
                aten.clone.default(value, memory_format=torch.contiguous_format)
                if node.meta["val"].dim() == 4 and node.meta["val"].is_contiguous()
                else value
                for node, value in zip(cast(Any, n.args[0]), result, strict=True)
            ]
        convolved = any(user.target is aten.convolution.default and user.args[0] is n for user in n.users)
        if not convolved or n.op == "placeholder" or n.meta["val"].dim() != 4:
            return result
        return aten.clone.default(result, memory_format=torch.channels_last)

    def call_function(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Argument]) -> object:
        views = (aten.view.default, aten._unsafe_view.default)  # which what lies channels last may not have
        return super().call_function(aten.reshape.default if target in views else target, args, kwargs)
