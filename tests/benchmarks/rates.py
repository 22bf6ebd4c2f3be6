"""One contender's log p(x) of the same images under the same weights, in a process of its own (see likelihoods)."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.benchmarks import jax_vae
from tests.benchmarks.children import Turns
from tests.benchmarks.turns import NEEDS, NUMPYROS, hold_to

FIT, HAND = "pyrovae", "hand-written"
NUMPYRO, VMAP = NUMPYROS
NAMES = (FIT, NUMPYRO, VMAP, HAND)

Rate = Callable[[], tuple[float, float]]  # the mean of log p(x) and its standard error, where it is known


def numpyro(name: str, state: dict[str, np.ndarray], x: np.ndarray, samples: int) -> Rate:
    """``RenyiELBO(alpha=0)``, compiled once, of images one by one (which is quicker) or of all by vmap."""
    run = jax_vae.likelihoods(jax_vae.weights_of(state), samples, name == VMAP)
    return lambda: (float(run(x).mean()), float("nan"))


def torch_rate(name: str, state: dict[str, np.ndarray], x: np.ndarray, samples: int, device: str) -> Rate:
    """``pyrovae.log_likelihood``, or the loop over decoders as one writes it."""
    import torch

    import pyrovae as pv
    from tests.benchmarks import contenders

    vae = contenders.Setting().vae().to(device)
    vae.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    images = torch.from_numpy(x).unflatten(1, (1, 28, 28)).to(device)
    if name == HAND:
        return lambda: (contenders.hand_log_likelihood(vae, images, samples).mean().item(), float("nan"))

    def ours() -> tuple[float, float]:
        found = pv.log_likelihood(vae.model, vae.guide, images, num_samples=samples, seed=0, compile=True)
        return found.log_prob.mean().item(), found.std_error.square().sum().sqrt().item() / len(images)

    return ours


def main(name: str, cores: int, samples: int, file: Path, device: str) -> None:
    """Answer every turn with its seconds and the estimate."""
    hold_to(cores)
    os.environ["JAX_PLATFORMS"] = device.partition(":")[0]
    turns = Turns()
    for module in NEEDS.get(name, ("torch", "pyrovae")):
        importlib.import_module(module)
    arrays = dict(np.load(file))
    x = arrays.pop("x")
    turns()
    run = numpyro(name, arrays, x, samples) if name in NUMPYROS else torch_rate(name, arrays, x, samples, device)
    while True:
        mean, error = run()
        turns(loss=mean, error=error, **turns.clocks())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
