"""Training steps with no Python between them: what graphs that are C++ have for them (steps.h), called from here."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from ctypes import Array, Structure, addressof, c_double, c_int64, c_void_p
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from pyrovae.compile.noise import Drawn

ENTRY = "inductor_entry_cpp"  # by which Inductor calls a graph that is one file of C++
AT_ONCE, SECONDS = 256, 0.1  # that steps take before Python looks again


class Column(Structure):
    """As in steps.h."""

    _fields_ = [("data", c_void_p), ("batch", c_void_p), ("row", c_int64), ("drawn", c_int64)]


class Draw(Structure):
    """As in steps.h."""

    _fields_ = [("input", c_int64), ("normal", c_int64), ("dims", c_int64), ("sizes", c_void_p)]


class Moved(Structure):
    """As in steps.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("at", "mean", "square", "steps", "gradient")),
        ("size", c_int64), ("output", c_int64),
    ]  # fmt: skip


class Given(Structure):
    """As in steps.h: what is called Steps there."""

    _fields_ = [
        *((name, c_void_p) for name in ("inputs", "given", "outputs", "columns", "draws", "moved")),
        *((f"num_{name}", c_int64) for name in ("inputs", "outputs", "columns", "draws", "moved")),
        ("batch_size", c_int64), ("beta1", c_double), ("beta2", c_double), ("eps", c_double), ("kl_weight", c_void_p),
        ("generator", c_void_p),
    ]  # fmt: skip


@dataclass
class Adam:
    """What Adam moves, in the order of the gradients, and how.

    :ivar states: of each parameter what the optimizer keeps: "exp_avg", "exp_avg_sq" and "step".
    :ivar gradients: where the last step leaves them.
    """

    parameters: Sequence[Tensor]
    states: Sequence[dict[str, Tensor]]
    gradients: Sequence[Tensor]
    betas: tuple[float, float]
    eps: float


def library_of(call: Callable[[], object], inputs: Sequence[Tensor]) -> ctypes.PyDLL | None:
    """The file of C++ that a compiled function runs, if it is one and takes these inputs as they are, in this order."""
    found: list[tuple[ctypes.PyDLL, list[int]]] = []

    def see(frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call" and getattr(called, "__name__", "") == ENTRY:
            file = getattr(called.__self__, "__file__", None)
            library = ctypes.PyDLL(file) if file else None
            handles = frame.f_locals.get("input_handles")
            if library is not None and hasattr(library, "pyrovae_steps") and isinstance(handles, list):
                found.append((library, [data_of(library, handle) for handle in handles]))

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        call()
    finally:
        if callable(before) or before is None:
            sys.setprofile(before)
        else:  # a profiler in C, such as cProfile
            before.enable()
    right = len(found) == 1 and found[0][1] == [tensor.data_ptr() for tensor in inputs]
    return found[0][0] if right else None


def data_of(library: ctypes.PyDLL, capsule: object) -> int:
    """Where the data of a tensor are that is passed to C++."""
    at = c_void_p()
    library.aoti_torch_get_data_ptr(c_void_p(handle_of(capsule)), ctypes.byref(at))
    return at.value or 0


def handle_of(capsule: object) -> int:
    """What C++ knows a tensor by."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return pointer(capsule, None)


class Steps:
    """Steps on rows of data that lie in memory: batch, noise, graph, verdict and Adam.

    :param library: of :func:`library_of`.
    :param inputs: of the graph, but for its noise, which follows them.
    :param batch: those of them that are a batch; their rows are gathered from ``data``.
    :param binarised: whether the first column of the data holds probabilities of the bits that a batch has.
    :param kl_weight: the input that it is, if it changes from step to step.
    """

    def __init__(
        self,
        library: ctypes.PyDLL,
        inputs: Sequence[Tensor],
        noise: Sequence[Drawn],
        data: Sequence[Tensor],
        batch: Sequence[Tensor],
        adam: Adam,
        *,
        binarised: bool,
        kl_weight: Tensor | None,
    ) -> None:
        self.library, self.batch, self.adam = library, batch, adam
        self.kept: list[object] = [inputs, data]  # all that C++ is given the place of
        capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([tensor.detach() for tensor in inputs])
        self.handles = [handle_of(capsule) for capsule in capsules]
        number, outputs = len(inputs) + len(noise), 2 + len(adam.parameters)
        shapes = [(c_int64 * len(drawn.shape))(*drawn.shape) for drawn in noise]
        self.kept.append(shapes)
        columns = [
            Column(rows.data_ptr(), to.data_ptr(), to[0].nbytes, binarised and to is batch[0])
            for rows, to in zip(data, batch, strict=True)
        ]
        draws = [
            Draw(len(inputs) + i, drawn.normal, len(drawn.shape), addressof(shape))
            for i, (drawn, shape) in enumerate(zip(noise, shapes, strict=True))
        ]
        each = zip(adam.parameters, adam.states, adam.gradients, strict=True)
        moved = [
            Moved(*(t.data_ptr() for t in (p, s["exp_avg"], s["exp_avg_sq"], s["step"], g)), p.numel(), 2 + i)
            for i, (p, s, g) in enumerate(each)
        ]
        inputs_given, outputs_made = [0] * number, [0] * outputs
        places = [
            *(self.placed(c_void_p, values) for values in (self.handles, inputs_given, outputs_made)),
            self.placed(Column, columns), self.placed(Draw, draws), self.placed(Moved, moved),
        ]  # fmt: skip
        generator: Any = torch.default_generator
        self.given = Given(
            *places, number, outputs, len(columns), len(draws), len(moved), len(batch[0]), *adam.betas, adam.eps,
            0 if kl_weight is None else kl_weight.data_ptr(), generator._cdata,
        )  # fmt: skip

    def placed(self, kind: Any, values: Sequence[object]) -> int:
        """Where such values are for C++."""
        array: Array[Any] = (kind * len(values))(*values)
        self.kept.append(array)
        return addressof(array)

    def __call__(self, order: Tensor, rates: Sequence[float], kl_weights: Sequence[float]) -> list[tuple[float, int]]:
        """Steps on the data of these indices, as many as there are rates, or fewer: their losses, and data left out.

        The last one is withheld, where its loss is NaN.
        """
        number = len(rates)
        arrays = [(c_double * number)(*rates), (c_double * number)(*kl_weights), (c_double * number)()]
        left_out = (c_int64 * number)()
        call = self.library.pyrovae_steps
        call.restype, call.argtypes = c_int64, [c_void_p, c_int64, *[c_void_p] * 5, c_double]
        places = [order.data_ptr(), *map(addressof, arrays), addressof(left_out)]
        taken = call(addressof(self.given), number, *places, SECONDS)
        return list(zip(arrays[-1][:taken], left_out[:taken], strict=True))

    def __del__(self) -> None:
        for handle in self.handles:
            self.library.aoti_torch_delete_tensor_object(c_void_p(handle))
