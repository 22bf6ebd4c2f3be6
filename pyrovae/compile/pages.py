"""C++ of our own that stands in front of a graph's: training steps, functions of vectors, and matrix products."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import fx

from pyrovae.compile.libraries import older_cpp

OURS = ("exp", "sigmoid", "tanh")  # functions of vectors that elementary.h has


@cache
def page(name: str) -> str:
    """The text of a file of C++."""
    return files("pyrovae.compile").joinpath(name).read_text(encoding="utf-8")


@cache
def multiplies() -> bool:
    """Whether this is a processor of AMD, with vector units that products.h knows.

    There MKL multiplies by kernels of AVX2, after copying both factors; Intel's it knows better than products.h does.
    """
    known = Path("/proc/cpuinfo")
    maker = known.read_text(encoding="utf-8") if known.exists() else platform.processor()
    return "AuthenticAMD" in maker and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def source() -> str:
    """What stands in front of a graph."""
    return "\n".join(map(page, ["steps.h", "elementary.h", *(["products.h"] if multiplies() else [])]))


@contextmanager
def our_pages() -> Iterator[None]:
    """Let graphs that are lowered to one file of C++ begin with :func:`source`, and be C++17 where that is quicker."""
    import torch._inductor.config
    from torch._inductor.codegen.cpp import CppVecOverrides
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Named(CustomGraphPass):
        """Changes nothing; by its name graphs are found in Inductor's cache."""

        def __call__(self, graph: fx.Graph) -> None:
            """Leave the graph as it is."""

        def uuid(self) -> str:
            """What the source says."""
            return hashlib.sha256(source().encode()).hexdigest()

    write: Any = CppWrapperCpu.write_header

    def write_header(self: Any) -> None:
        write(self)
        self.header.splice(source())

    def written(name: str) -> Any:
        return staticmethod(lambda x: f"pyrovae::{name}({x})")

    with (
        older_cpp(),
        patch.object(CppWrapperCpu, "write_header", write_header),
        patch.multiple(CppVecOverrides, **{name: written(name) for name in OURS}),
        torch._inductor.config.patch(post_grad_custom_post_pass=Named()),
    ):
        yield
