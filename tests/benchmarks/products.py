"""Matrix products of the dense VAE's layers in compiled graphs: by the library's own kernels, and by torch's."""

from __future__ import annotations

from functools import partial
from unittest import mock

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyrovae.compile import pages
from pyrovae.compile.inductor import ONE_FILE, lowered
from pyrovae.train.threads import threads
from tests.benchmarks.options import Options
from tests.benchmarks.tables import Row, Table, ratio
from tests.benchmarks.timing import Run, take_turns

LAYERS = [(784, 200), (200, 200), (200, 100), (50, 200), (200, 200), (200, 784)]
ROWS = (20, 100, 1000)
OWN, TORCH = "own", "torch's"


def factors(rows: int) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Of every layer what each pass multiplies."""
    of_layers = [(torch.randn(rows, into), torch.randn(out, into), torch.randn(rows, out)) for into, out in LAYERS]
    return {
        "forward": [(x, weight.mT) for x, weight, _ in of_layers],
        "gradients of weights": [(slope.mT, x) for x, _, slope in of_layers],
        "gradients of inputs": [(slope, weight) for _, weight, slope in of_layers],
    }


def multiply(*flat: Tensor) -> list[Tensor]:
    """All products."""
    return [left @ right for left, right in zip(flat[::2], flat[1::2], strict=True)]


def graph(pairs: list[tuple[Tensor, Tensor]], *, own: bool) -> Run:
    """The products as one call of a graph."""
    flat = [factor for pair in pairs for factor in pair]
    with torch.no_grad(), mock.patch.object(pages, "multiplies", return_value=own):
        run = partial(lowered(make_fx(multiply)(*flat), ONE_FILE), *flat)
    return torch.no_grad()(run)


def run(options: Options) -> list[Table]:
    """Microseconds of all products of a pass, by rows, on one thread."""
    found: list[Row] = []
    with threads(1):
        for rows in ROWS:
            for what, pairs in factors(rows).items():
                runs = {TORCH: graph(pairs, own=False), OWN: graph(pairs, own=True)}
                times = take_turns(runs, options.seconds, "cpu")
                each = {name: 1e3 * min(turns.ms) for name, turns in times.items()}
                found.append({"rows": rows, "products": what, **each, "own / torch's": ratio(each[OWN], each[TORCH])})
    note = "784-200-200-50, microseconds on one thread, the best turn; the call of the graph is in both."
    return [Table("Matrix products", ["rows", "products", TORCH, OWN, "own / torch's"], found, [note])]
