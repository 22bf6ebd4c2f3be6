"""A contender's training as its users run it, in a process of its own, epoch by epoch when it is told to.

Each trains the same network from the same weights on the same images, shuffled and binarised anew in every epoch, with
Adam in float32, and tells the mean loss of the epoch in nats per image.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from typing import Any

from tests.benchmarks.children import Turns
from tests.benchmarks.turns import NEEDS, hold_to

FIT, NUMPYRO, FLOOR = "pyrovae", "NumPyro", "products and Adam"
HAND, HAND_COMPILED, SVI, PYTHAE = "hand-written", "hand-written, torch.compile", "Pyro SVI vectorised", "Pythae"
NAMES = (FIT, NUMPYRO, HAND_COMPILED, HAND, SVI, PYTHAE, FLOOR)

Tell = Callable[[float], object]  # the mean loss of an epoch; it returns when the next may begin
Train = Callable[[Any, int, Any, int, Tell], object]  # of network, k, images, batch: without end


def fit(vae: Any, k: int, images: Any, batch: int, tell: Tell) -> None:
    """``pyrovae.fit``, held between its epochs."""
    import pyrovae as pv
    from tests.benchmarks.contenders import objective

    def on_epoch(result: pv.Fit) -> None:
        tell(-result.history[-1]["bound"])

    pv.fit(
        vae.model, vae.guide, images, objective=objective(k), epochs=10_000, batch_size=batch, progress=False,
        device=images.x.device, on_epoch=on_epoch,
    )  # fmt: skip


def numpyro(vae: Any, k: int, images: Any, batch: int, tell: Tell) -> None:
    """One compiled scan an epoch."""
    from tests.benchmarks import jax_vae

    for loss, _ in jax_vae.epochs(jax_vae.weights(vae), k, images.x.flatten(1).cpu().numpy(), batch):
        tell(loss)


def loop(name: str) -> Train:
    """A loop over steps, as one writes it."""

    def train(vae: Any, k: int, images: Any, batch: int, tell: Tell) -> None:
        import torch

        from tests.benchmarks.contenders import CONTENDERS

        graphs = {"mode": "reduce-overhead"} if name == HAND_COMPILED and images.x.is_cuda else {}
        step = CONTENDERS[name](vae, k, images.batch(torch.arange(batch, device=images.x.device)), **graphs)
        data = batch if name == SVI else 1  # whose loss is of the batch
        kept = torch.clone if graphs else torch.as_tensor  # a graph's next run writes over its loss
        while True:
            order = torch.randperm(len(images), device=images.x.device)
            losses = [kept(step(images.batch(index))) for index in order.split(batch)]  # type: ignore[arg-type]
            tell(float(torch.stack(losses).mean()) / data)

    return train


def floor(vae: Any, k: int, images: Any, batch: int, tell: Tell) -> None:
    """A step's products, and one pass over Adam's memory, on gradients that stay as they are."""
    import torch

    from tests.benchmarks import contenders
    from tests.benchmarks.timing import synchronise

    products = contenders.floor(vae, k, images.batch(torch.arange(batch, device=images.x.device)))
    own, optimizer = list(vae.parameters()), contenders.adam(vae)
    for parameter in own:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [[optimizer.state[p][key] for p in own] for key in ("exp_avg", "exp_avg_sq", "step")]
    tensors = own, [p.grad for p in own], moments[0], moments[1], [], moments[2]
    how = {"lr": contenders.LEARNING_RATE, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-8}
    with torch.no_grad():
        while True:
            for _ in repeat(None, len(images) // batch):
                products(own[0])
                torch._fused_adam_(*tensors, **how, amsgrad=False, maximize=False)
            synchronise(str(own[0].device))
            tell(float("nan"))


def trainer(name: str) -> Train:
    return {FIT: fit, NUMPYRO: numpyro, FLOOR: floor}.get(name) or loop(name)


def main(name: str, batch: int, k: int, cores: int, steps: int, data_dir: str, device: str) -> None:
    """Answer every turn with its seconds and the mean loss."""
    hold_to(cores)
    os.environ["JAX_PLATFORMS"] = device.partition(":")[0]
    turns = Turns()
    for module in NEEDS.get(name, ()):  # told as absent where it is
        importlib.import_module(module)
    from tests.benchmarks import images
    from tests.benchmarks.contenders import Setting

    train, _, data = images.load(Path(data_dir) if data_dir else None)
    if steps * batch > len(train):
        raise ValueError(f"there are {len(train):,} images, for {steps} steps of {batch}: give fewer --epoch-steps")
    train = train.subset(slice(steps * batch)).unlabelled().to(device)
    vae = Setting("mlp", batch, k).vae().to(device).initialise(train.x)
    turns(data=data)
    trainer(name)(vae, k, train, batch, lambda loss: turns(loss=loss, **turns.clocks()))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:6]), *sys.argv[6:8])  # type: ignore[arg-type]
