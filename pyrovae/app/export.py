"""Encoder and decoder of a trained model as ONNX, for whatever runs that."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pyro
import torch
from rich.console import Console
from torch import Tensor, nn

from pyrovae.app.job import Terms, example, reopen
from pyrovae.arguments import one_line, require_packages
from pyrovae.engine.randomness import isolated_rng
from pyrovae.errors import NumericalError
from pyrovae.files import replacing
from pyrovae.models.base import Pair, as_pair

TOLERANCE = 1e-5  # between an output of the graph and the model's, in the size of the largest value, or 1
Inputs = tuple[Tensor, ...]


class Verb(nn.Module):
    """One of a module's verbs as its forward pass, which is what the exporter takes."""

    def __init__(self, owner: nn.Module, verb: Callable[..., Tensor]) -> None:
        super().__init__()
        self.owner, self.verb = owner, verb

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.verb(*inputs)


def export(folder: Path, *, output: Path | None, checkpoint: str, terms: Terms, out: Console) -> None:
    """Write the networks of a run."""
    pair, run = reopen(folder, checkpoint, terms).pair, terms.run(folder)
    for path in export_onnx(pair.module, output or folder, shape=example(run).shape[1:]):
        out.print(f"wrote {path}")


def export_onnx(pair: nn.Module, folder: str | os.PathLike[str], *, shape: Sequence[int] | None = None) -> list[Path]:
    """Write ``encode`` and ``decode`` of a pair as ``encoder.onnx`` and ``decoder.onnx``, for any number of data.

    The encoder takes ``x`` ``[batch, *shape]`` and gives ``z``, the decoder takes ``z`` and gives the mean of
    p(x | z); those of a conditional pair take labels ``y`` as well. Each is run by onnxruntime, on batches of other
    sizes, and compared with the model, before it is written. Models that encode alone have an encoder alone.

    :param pair: any of :mod:`pyrovae.models`, or a module of your own with ``encode`` or ``decode``.
    :param folder: where the files go; what has their names there is replaced.
    :param shape: of one datum; the module's ``input_shape`` by default.
    :return: the files.
    :raises ValueError: a pair with neither verb, or whose computation ONNX cannot hold.
    :raises NumericalError: a graph whose outputs are another's than the model's by more than 1e-5.
    :raises ResourceError: where the extra ``pyrovae[onnx]`` is not installed.

    >>> import pyrovae as pv
    >>> vae = pv.models.VAE((1, 8, 8), latent_dim=4, hidden=(16,))
    >>> pv.export_onnx(vae, "digits")  # doctest: +SKIP
    [PosixPath('digits/encoder.onnx'), PosixPath('digits/decoder.onnx')]
    """
    require_packages("onnx", "onnx", "onnxscript", "onnxruntime")
    taken = as_pair(copy.deepcopy(pair).cpu().eval())
    wanted = getattr(pair, "input_shape", None) if shape is None else tuple(shape)
    if wanted is None:
        raise ValueError(
            "the shape of a datum is not known, the pair has no input_shape: pass shape, such as (1, 28, 28)"
        )
    with torch.no_grad(), isolated_rng(0), pyro.validation_enabled(False):
        batches: list[Inputs] = [inputs(taken, wanted, size) for size in (3, 2, 5)]
        graphs, named = {}, ["y"] * taken.conditional
        if has(taken, "encode"):
            graphs["encoder"] = graph_of(taken, "encode", batches, ["x", *named], "z")
        if has(taken, "encode") and has(taken, "decode"):
            codes = [(taken.encode(*batch), *batch[1:]) for batch in batches]
            graphs["decoder"] = graph_of(taken, "decode", codes, ["z", *named], "x")
    if not graphs:
        raise ValueError(f"{type(pair).__name__} has no encode to write: give it one, [batch, *input_shape] to codes")
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = {Path(folder) / f"{name}.onnx": graph for name, graph in graphs.items()}
    for path, graph in paths.items():
        with replacing(path) as aside:
            aside.write_bytes(graph)
    return list(paths)


def has(pair: Pair, verb: str) -> bool:
    """Whether a pair does more by a verb than refuse."""
    return getattr(getattr(pair, verb), "__func__", None) is not getattr(Pair, verb)


def inputs(pair: Pair, shape: Sequence[int], size: int) -> Inputs:
    """So many data, bits that any likelihood has, and labels for a conditional pair."""
    kind = next((p.dtype for p in pair.module.parameters() if p.is_floating_point()), torch.get_default_dtype())
    x = torch.rand(size, *shape).round().to(kind)
    if not pair.conditional:
        return (x,)
    classes = pair.num_classes
    return x, torch.arange(size) % classes if classes else torch.rand(size, pair.num_attributes or 1).to(kind)


def hypot(a: Any, b: Any) -> Any:
    """The square root of a^2 + b^2 in ONNX."""
    from onnxscript import opset18

    return opset18.Sqrt(a * a + b * b)


def graph_of(pair: Pair, verb: str, batches: Sequence[Inputs], names: Sequence[str], output: str) -> bytes:
    """A verb as a graph that any number of data may be given to, found equal to it on every batch."""
    called = f"{type(pair.module).__name__}.{verb}"
    sizes = tuple({0: torch.export.Dim("batch")} for _ in names)
    said = io.StringIO()  # the exporter's own words, some of which are of its graphs
    try:
        with redirect_stdout(said), redirect_stderr(said):
            program = torch.onnx.export(
                Verb(pair.module, getattr(pair, verb)).eval(), batches[0], input_names=list(names),
                output_names=[output], dynamo=True, dynamic_shapes=(sizes,), verbose=False,
                custom_translation_table={torch.ops.prims.hypot.default: hypot},  # which ONNX lacks
            )  # fmt: skip
        graph = program.model_proto.SerializeToString()  # type: ignore[union-attr]
    except Exception as error:
        cause = one_line(str(error).rpartition("Exception summary")[2].strip("# \n") or type(error).__name__)
        raise ValueError(f"{called} cannot be written as ONNX: {cause}") from error
    import onnxruntime

    session = onnxruntime.InferenceSession(graph)
    for batch in batches:
        (found,) = session.run(None, {name: value.numpy() for name, value in zip(names, batch, strict=True)})
        wanted = getattr(pair, verb)(*batch)
        off = (torch.from_numpy(found).double() - wanted.double()).abs().max().item()
        if not off <= TOLERANCE * max(1.0, wanted.abs().max().item()):
            raise NumericalError(f"{called} as ONNX is off by {off:.2g} for {len(batch[0])} data: nothing was written")
    return graph
