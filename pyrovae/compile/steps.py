"""Training steps with no Python between them: what graphs that are C++ have for them (steps.h), called from here."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from ctypes import Array, Structure, addressof, c_double, c_int64, c_void_p
from dataclasses import dataclass
from itertools import chain, starmap
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


class Changed(Structure):
    """As in steps.h."""

    _fields_ = [("at", c_void_p), ("before", c_void_p), ("size", c_int64)]


class Moved(Structure):
    """As in steps.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("at", "gradient", "steps", "first", "second", "third")),
        *((name, c_int64) for name in ("size", "output", "group")),
    ]


class Group(Structure):
    """As in steps.h."""

    _fields_ = [
        (name, c_double) for name in (
            "beta1", "beta2", "eps", "decoupled_weight_decay", "momentum", "dampening", "nesterov", "weight_decay",
            "maximize",
        )
    ]  # fmt: skip


class Given(Structure):
    """As in steps.h: what is called Steps there."""

    _fields_ = [
        *((name, c_void_p) for name in ("inputs", "given", "outputs", "columns", "draws", "moved", "changed")),
        ("groups", c_void_p),
        *((f"num_{name}", c_int64) for name in ("inputs", "outputs", "columns", "draws", "moved", "changed")),
        ("batch_size", c_int64), ("clip_norm", c_double), ("kl_weight", c_void_p), ("generator", c_void_p),
    ]  # fmt: skip


@dataclass
class Moves:
    """What Adam or SGD move, in the order of the gradients, and how.

    :ivar kept: of each parameter what the optimizer keeps of it: Adam's "step", or None, and what is as large as it.
    :ivar gradients: where the last step leaves them.
    :ivar of: the number of each parameter's group.
    :ivar groups: of parameters, with the optimizer's options.
    :ivar clip_norm: largest 2-norm of the gradient.
    """

    parameters: Sequence[Tensor]
    kept: Sequence[Sequence[Tensor | None]]
    gradients: Sequence[Tensor]
    of: Sequence[int]
    groups: Sequence[dict[str, Any]]
    clip_norm: float | None

    def structures(self) -> tuple[list[Moved], list[Group]]:
        """For C++; the graph's first two outputs are no gradients."""
        each = zip(self.parameters, self.gradients, self.kept, self.of, strict=True)
        moved = []
        for i, (parameter, gradient, kept, group) in enumerate(each):
            places = [None if t is None else t.data_ptr() for t in (parameter, gradient, *kept)]
            moved.append(Moved(*places, *[None] * (6 - len(places)), parameter.numel(), 2 + i, group))
        return moved, [group_of(options) for options in self.groups]


def group_of(options: dict[str, Any]) -> Group:
    """A group's options for C++."""
    beta1, beta2 = options.get("betas", (0.0, 0.0))
    known = {**options, "beta1": beta1, "beta2": beta2}
    return Group(*(float(known.get(name, 0.0)) for name, *_ in Group._fields_))


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
    """Steps on rows of data that lie in memory: batch, noise, graph, verdict and update.

    :param library: of :func:`library_of`.
    :param inputs: of the graph, but for its noise, which follows them.
    :param batch: those of them that are a batch; their rows are gathered from ``data``.
    :param binarised: whether the first column of the data holds probabilities of the bits that a batch has.
    :param kl_weight: the input that it is, if it changes from step to step.
    :param changed: the inputs that the graph changes in place; a step that is withheld leaves them as they were.
    """

    def __init__(
        self,
        library: ctypes.PyDLL,
        inputs: Sequence[Tensor],
        noise: Sequence[Drawn],
        data: Sequence[Tensor],
        batch: Sequence[Tensor],
        moves: Moves,
        *,
        binarised: bool,
        kl_weight: Tensor | None,
        changed: Sequence[Tensor] = (),
    ) -> None:
        self.library, self.batch, self.moves = library, batch, moves
        before = [t.clone() for t in changed]
        self.kept: list[object] = [inputs, data, before]  # all that C++ is given the place of
        capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([tensor.detach() for tensor in inputs])
        self.handles = [handle_of(capsule) for capsule in capsules]
        number, outputs = len(inputs) + len(noise), 2 + len(moves.parameters)
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
        moved, groups = moves.structures()
        undone = [Changed(t.data_ptr(), b.data_ptr(), t.nbytes) for t, b in zip(changed, before, strict=True)]
        given: list[tuple[Any, Sequence[object]]] = [
            (c_void_p, self.handles), (c_void_p, [0] * number), (c_void_p, [0] * outputs),
            (Column, columns), (Draw, draws), (Moved, moved), (Changed, undone), (Group, groups),
        ]  # fmt: skip
        generator: Any = torch.default_generator
        self.given = Given(
            *starmap(self.placed, given), number, outputs, len(columns), len(draws), len(moved), len(before),
            len(batch[0]), moves.clip_norm or 0.0, 0 if kl_weight is None else kl_weight.data_ptr(), generator._cdata,
        )  # fmt: skip

    def placed(self, kind: Any, values: Sequence[object]) -> int:
        """Where such values are for C++."""
        array: Array[Any] = (kind * len(values))(*values)
        self.kept.append(array)
        return addressof(array)

    def __call__(
        self, order: Tensor, rates: Sequence[Sequence[float]], kl_weights: Sequence[float]
    ) -> list[tuple[float, int]]:
        """Steps on the data of these indices, as many as each group has rates, or fewer: losses, and data left out.

        The last one is withheld, where its loss is NaN.
        """
        number = len(kl_weights)
        each = [*chain.from_iterable(rates)], kl_weights, [0.0] * number
        arrays = [(c_double * len(values))(*values) for values in each]
        left_out = (c_int64 * number)()
        call = self.library.pyrovae_steps
        call.restype, call.argtypes = c_int64, [c_void_p, c_int64, *[c_void_p] * 5, c_double]
        places = [order.data_ptr(), *map(addressof, arrays), addressof(left_out)]
        taken = call(addressof(self.given), number, *places, SECONDS)
        return list(zip(arrays[-1][:taken], left_out[:taken], strict=True))

    def __del__(self) -> None:
        for handle in self.handles:
            self.library.aoti_torch_delete_tensor_object(c_void_p(handle))
