"""Vector quantisation, forward and backward in training mode, beside the vector-quantize-pytorch package."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyrovae.models import VectorQuantizer
from tests.benchmarks.contenders import left_out
from tests.benchmarks.options import Options
from tests.benchmarks.tables import Row, Table
from tests.benchmarks.timing import take_turns

CODES, DIM, VECTORS = 512, 64, 100_000
OURS, PACKAGE = "pyrovae", "vector-quantize-pytorch"
# What is learned, our arguments, and the package's for the same; without its rotation trick, as ours has none.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "codebook by gradient": ({}, {"ema_update": False, "learnable_codebook": True, "commitment_weight": 0.25}),
    "moving averages": ({"ema_decay": 0.99}, {"decay": 0.99, "commitment_weight": 0.25}),
    "with codes revived": (
        {"ema_decay": 0.99, "revive_below": 2.0},
        {"decay": 0.99, "commitment_weight": 0.25, "threshold_ema_dead_code": 2},
    ),
}


def ours(options: Options, **arguments: Any) -> Callable[[Tensor], Tensor]:
    """A function of vectors that gives what is to be differentiated."""
    quantizer = VectorQuantizer(CODES, DIM, **arguments).to(options.device).train()

    def loss(z: Tensor) -> Tensor:
        found = quantizer(z)
        return found.z_q.square().sum() + found.codebook_loss + 0.25 * found.commitment_loss

    return loss


def package(options: Options, **arguments: Any) -> Callable[[Tensor], Tensor]:
    """The same by the package."""
    from vector_quantize_pytorch import VectorQuantize

    quantizer = VectorQuantize(DIM, CODES, rotation_trick=False, **arguments).to(options.device).train()

    def loss(z: Tensor) -> Tensor:
        z_q, _, commitment = quantizer(z)
        return z_q.square().sum() + commitment.sum()

    return loss


def _step(loss: Callable[[Tensor], Tensor], z: Tensor) -> None:
    z.grad = None
    loss(z).backward()


def run(options: Options) -> list[Table]:
    """One table: milliseconds of a step, and the package's time in ours."""
    z = torch.randn(1, VECTORS, DIM, device=options.device, requires_grad=True)
    rows: list[Row] = []
    absent: dict[str, str] = {}
    for kind, (own, other) in KINDS.items():
        runs = {OURS: partial(_step, ours(options, **own), z)}
        with left_out(PACKAGE, absent):
            runs[PACKAGE] = partial(_step, package(options, **other), z)
        times = take_turns(runs, options.seconds, options.device)
        rows += [
            {"codebook": kind, "contender": name, "ms": found.median}
            | {"time / ours": found.median / times[OURS].median, "details": found.summary()}
            for name, found in times.items()
        ]
    notes = [
        f"{VECTORS:,} vectors of {DIM} numbers, {CODES} codes, forward and backward.",
        *(f"Left out: {name} ({why})." for name, why in absent.items()),
    ]
    return [Table("Vector quantisation", ["codebook", "contender", "ms", "time / ours"], rows, notes)]
