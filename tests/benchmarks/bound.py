"""Time to a bound: seconds from a process's start, imports and compilation included, to the same validation bound.

All train the same weights on the same images by the ELBO in batches of 100, and measure it after every epoch on the
same held-out bits; once with empty caches, once with what that left in them.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.benchmarks.children import Child, Turns
from tests.benchmarks.options import Options
from tests.benchmarks.tables import Row, Table, ratio
from tests.benchmarks.turns import leave_out

FIT, NUMPYRO, HAND = "pyrovae", "NumPyro", "hand-written"
NAMES = (FIT, NUMPYRO, HAND)
BATCH, HELD_OUT = 100, 2000
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "JAX_COMPILATION_CACHE_DIR": "jax"}

Reached = Callable[[float], bool]  # of a validation bound: whether to stop


def numpyro(arrays: dict[str, np.ndarray], x: np.ndarray, held_out: np.ndarray, reached: Reached) -> None:
    from tests.benchmarks import jax_vae

    for _, bound in jax_vae.epochs(jax_vae.weights_of(arrays), 1, x, BATCH, held_out):
        if reached(bound):
            return


def torch_trainer(
    name: str, arrays: dict[str, np.ndarray], x: np.ndarray, held_out: np.ndarray, reached: Reached
) -> None:
    import torch

    import pyrovae as pv

    shape = 1, 28, 28
    vae = pv.models.VAE(shape, 50, (200, 200))
    vae.load_state_dict({key: torch.from_numpy(value) for key, value in arrays.items()})
    images = pv.data.Images(torch.from_numpy(x).unflatten(1, shape), binarization="dynamic")
    bits = torch.from_numpy(held_out).unflatten(1, shape)
    if name == FIT:
        pv.fit(vae.model, vae.guide, images, objective=pv.ELBO(), epochs=10_000, batch_size=BATCH, validation=bits,
               progress=False, on_epoch=lambda result: not reached(result.history[-1]["validation_bound"]))  # fmt: skip
        return
    from tests.benchmarks.contenders import hand_loss, hand_written

    step = hand_written(vae, 1, images.batch(torch.arange(BATCH)))
    while True:
        for index in torch.randperm(len(images)).split(BATCH):
            step(images.batch(index))  # type: ignore[arg-type]
        with torch.no_grad():
            if reached(-hand_loss(vae, bits, 1).item()):
                return


def main(name: str, file: Path, target: float, epochs: int) -> None:
    """Answer once, with the epochs and the bound that they led to."""
    turns = Turns()
    bounds: list[float] = []

    def reached(bound: float) -> bool:
        bounds.append(bound)
        return bound >= target or len(bounds) >= epochs

    arrays = dict(np.load(file))
    x, held_out = arrays.pop("x"), arrays.pop("held_out")
    if name == NUMPYRO:
        numpyro(arrays, x, held_out, reached)
    else:
        torch_trainer(name, arrays, x, held_out, reached)
    turns(epochs=len(bounds), bound=bounds[-1])


def save(options: Options, file: Path) -> None:
    """Weights, grey training images and held-out bits."""
    import torch

    from tests.benchmarks import images
    from tests.benchmarks.contenders import Setting

    train, test, _ = images.load(options.data_dir)
    some = train.x[: options.steps * BATCH or None]
    vae = Setting().vae().initialise(some)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        bits = test.unlabelled().batch(torch.arange(HELD_OUT))
    state = {name: value.numpy() for name, value in vae.state_dict().items()}
    np.savez(file, x=some.flatten(1).numpy(), held_out=bits.flatten(1).numpy(), **state)


def run(options: Options) -> list[Table]:
    """One table: seconds to the bound, from empty caches and again."""
    absent: dict[str, str] = {}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "start.npz"
        save(options, file)
        environment = {name: str(Path(folder) / own) for name, own in CACHES.items()}
        for cache in ("empty", "as that left it"):
            row: Row = {"cache": cache}
            for name in NAMES:
                print(f"time to a bound: {name}, cache {cache}", file=sys.stderr)
                try:
                    began = time.perf_counter()
                    with Child("bound", name, file, options.target, options.epochs, environment=environment) as child:
                        found = child.answer()
                    seconds = time.perf_counter() - began
                    met = found["bound"] >= options.target
                    row |= {name: seconds if met else None, f"epochs, {name}": found["epochs"]}
                    row |= {f"bound, {name}": found["bound"], f"seconds, {name}": seconds}
                except RuntimeError as error:
                    leave_out(name, error, absent)
            row |= {f"/ {name}": ratio(row.get(FIT), row.get(name)) for name in NAMES[1:]}
            rows.append(row)
    notes = [f"784-200-200-50, ELBO, batches of {BATCH}; a validation bound of {options.target:g} nats per image."]
    notes += [f"Left out: {name} ({why})." for name, why in absent.items()]
    names = [name for name in NAMES if any(name in row for row in rows)]
    own = [f"{what}, {name}" for what in ("epochs", "bound") for name in names]
    ratios = [f"/ {name}" for name in names if name != FIT]
    return [Table("Seconds from start to a bound", ["cache", *names, *ratios, *own], rows, notes)]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
