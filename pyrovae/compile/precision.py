"""Mixed precision: networks multiply in bfloat16; log-probabilities, weights and everything else stay float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyrovae.arguments import one_of
from pyrovae.engine.programs import warn

T = TypeVar("T")

PRECISIONS = ("float32", "bfloat16")
ROWS = 100  # data times particles of a step: bfloat16 took .86 of float32's time there, 1.17 of it at 20 (AVX512-BF16)
MULTIPLIES = {
    F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    F.scaled_dot_product_attention,
}  # fmt: skip


class bfloat16_networks(TorchFunctionMode):
    """Inside, the float32 layers of networks (linear, convolution, attention) multiply in bfloat16.

    Their results are float32 again. ``torch.autocast`` would hand bfloat16 on to distributions, and with it three
    significant digits to log-probabilities of hundreds of nats.

    >>> layer = torch.nn.Linear(2, 2)
    >>> with bfloat16_networks():
    ...     y = layer(torch.ones(1, 2))
    >>> y.dtype, torch.equal(y, y.bfloat16().float())
    (torch.float32, True)
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func not in MULTIPLIES or getattr(next(iter((*args, *kwargs.values()))), "dtype", None) != torch.float32:
            return func(*args, **kwargs)
        product = func(*map(lowered, args), **{name: lowered(a) for name, a in kwargs.items()})
        assert isinstance(product, Tensor)
        return product.float()


def lowered(a: object) -> object:
    """An argument in bfloat16, if it is a tensor in single precision."""
    return a.bfloat16() if isinstance(a, Tensor) and a.dtype == torch.float32 else a


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 by units of its own, as its features say; nothing is timed."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if not hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu._is_avx512_bf16_supported()
    return any(has for feature, has in torch.cpu.get_capabilities().items() if "bf16" in feature)


def choose_precision(precision: str, device: torch.device, rows: int) -> str:
    """The precision for products of so many rows: "auto" is bfloat16 where that is the faster, else float32."""
    one_of("precision", precision, ("auto", *PRECISIONS))
    units = precision != "float32" and has_bfloat16_units(device)
    if precision == "bfloat16" and not units:
        warn(
            f"this {device.type} has no units for bfloat16, without which networks were up to 22 times slower than in "
            'float32: pass precision="float32", or "auto"'
        )
    return precision if precision != "auto" else "bfloat16" if units and rows >= ROWS else "float32"


def networks_in(precision: str) -> AbstractContextManager[object]:
    """The context in which to run a pair: "float32" changes nothing, "bfloat16" is :class:`bfloat16_networks`."""
    one_of("precision", precision, PRECISIONS)
    return bfloat16_networks() if precision == "bfloat16" else nullcontext()


@contextmanager
def full_float32() -> Iterator[None]:
    """Multiply float32 in float32: neither TF32 on CUDA nor bfloat16 on CPUs, whatever was allowed before.

    torch has older and newer switches for that, and refuses to read an older one where a newer one says otherwise.
    """
    cudnn: Any = torch.backends.cudnn
    cpu: Any = torch.backends.mkldnn
    switches: tuple[Any, ...] = (torch.backends, cudnn, cpu)  # of which the others take what they have not themselves
    switches += (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, cpu.matmul, cpu.conv, cpu.rnn)
    matmul, convolutions = readable(torch.get_float32_matmul_precision), readable(lambda: cudnn.allow_tf32)
    before: list[str] = []
    try:
        for switch in switches:
            before.append(switch.fp32_precision)
            switch.fp32_precision = "none"
        set_older("highest" if matmul else None, None if convolutions is None else False)
        for switch in switches[3:]:
            switch.fp32_precision = "ieee"
        yield
    finally:
        set_older(matmul, convolutions)
        for switch, precision in reversed([*zip(switches, before, strict=False)]):
            switch.fp32_precision = precision


def readable(read: Callable[[], T]) -> T | None:
    """The value of an older switch, or None where torch refuses to read it."""
    try:
        return read()
    except RuntimeError:
        return None


def set_older(matmul: str | None, convolutions: bool | None) -> None:
    """Set the older switches, those that are not None."""
    if matmul is not None:
        torch.set_float32_matmul_precision(matmul)
    if convolutions is not None:
        torch.backends.cudnn.allow_tf32 = convolutions
