"""What Inductor does before and after a graph, and need not: units asked for, libraries read, forms traced."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import fx


@contextmanager
def found_quickly() -> Iterator[None]:
    """Take the processor's word for its vector units, and no library that is not whole.

    Inductor compiles a program for each unit. Every compiler that knows the C++ of torch's headers knows the units,
    except for the youngest (AMX): these it tries as ever. Without CUDA it also reads all of Triton, for a key that does
    not have it.
    """
    from torch._inductor import codecache
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.cpu_vec_isa import VecISA

    units: Any = VecISA
    libraries: Any = CppCodeCache
    asked = (units, "check_build"), (libraries, "_load_library"), (codecache, "triton_key")
    if not all(hasattr(of, name) for of, name in asked):  # another release of torch
        yield
        return
    tried, load = units.check_build, libraries._load_library.__func__

    def known(unit: VecISA, code: str) -> bool:
        return "amx" not in code or tried(unit, code)

    def load_whole(cache: type[CppCodeCache], path: str, key: str) -> object:
        if not is_whole(Path(path)):
            raise OSError(f'"{path}" is half-written')
        return load(cache, path, key)

    no_key = nullcontext() if torch.cuda.is_available() else patch.object(codecache, "triton_key", lambda: None)
    with (
        patch.object(units, "check_build", known),
        patch.object(libraries, "_load_library", classmethod(load_whole)),
        no_key,
    ):
        yield


def without_attention(module: fx.GraphModule) -> AbstractContextManager[object]:
    """Spare Inductor .6 s of tracing the forms of attention that it looks for, where a graph on a CPU has no softmax.

    It traces them once a process, before its first graph: the first one that is lowered otherwise.
    """
    from torch._inductor.fx_passes import joint_graph

    on_cpu = all(n.meta["val"].device.type == "cpu" for n in module.graph.nodes if n.op == "placeholder")
    softmax = any(node.target is torch.ops.aten._softmax.default for node in module.graph.nodes)
    if softmax or not on_cpu or not hasattr(joint_graph, "lazy_init"):  # or another release of torch
        return nullcontext()
    return patch.object(joint_graph, "lazy_init", lambda *of: None)


def older_cpp() -> AbstractContextManager[object]:
    """Compile as C++17, which parses torch's headers in two thirds of the time: the library's own are shorter there."""
    from torch._inductor import cpp_builder

    if sys.platform == "win32" or not hasattr(cpp_builder, "_get_cpp_std_cflag"):  # or another release of torch
        return nullcontext()
    return patch.object(cpp_builder, "_get_cpp_std_cflag", lambda *of: ["std=c++17"])


def is_whole(path: Path) -> bool:
    """Whether a shared library is there to its end; the loader says so itself only of those that lack their head.

    An ELF file of 64 bits ends with its table of sections, which a process that loads less of it dies of.
    """
    with path.open("rb") as file:
        head = file.read(64)
        if len(head) < 64 or head[:5] != b"\x7fELF\x02":
            return True
        start, size, number = *struct.unpack_from("<Q", head, 0x28), *struct.unpack_from("<HH", head, 0x3A)
        file.seek(start + size * (number - 1))
        last = file.read(size)
    return len(last) == size and any(last)
