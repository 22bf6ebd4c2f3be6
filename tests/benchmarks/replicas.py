"""How the time of a step grows with the number of models that are trained at once."""

from __future__ import annotations

import sys

import pyrovae as pv
from tests.benchmarks import images
from tests.benchmarks.contenders import Setting, objective
from tests.benchmarks.options import Options
from tests.benchmarks.tables import Row, Table

BATCHES = 100  # per epoch
EPOCHS = 3
CELLS = ((20, 1), (100, 5))


def run(options: Options) -> list[Table]:
    """One table: milliseconds per step of R replicas of the MLP, and how many times one they are."""
    train, _, data = images.load(options.data_dir)
    rows: list[Row] = []
    batches = options.steps or BATCHES
    for batch, k in options.cells or CELLS:
        some = train.subset(slice(batch * batches))
        for number in options.replicas:
            print(f"replicas: batch {batch}, k {k}, {number} at once", file=sys.stderr)
            pairs = [Setting(batch=batch, k=k).vae() for _ in range(number)]
            results = pv.fit_replicas(
                pairs, some, objective=objective(k), epochs=EPOCHS, batch_size=batch, device=options.device
            )
            ms = 1e3 * min(row["seconds"] / row["steps"] for row in results[0].history)
            rows.append({"batch": batch, "k": k, "replicas": number, "ms": ms})
            rows[-1]["times one"] = ms / rows[-number.bit_length()]["ms"]
    notes = [f"Data: {data}. The quickest of {EPOCHS} epochs of {batches} steps, gather and binarisation included."]
    return [Table("Replicas", ["batch", "k", "replicas", "ms", "times one"], rows, notes)]
