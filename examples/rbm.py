"""A restricted Boltzmann machine by contrastive divergence, one step or ten, and by persistent chains.

    python examples/rbm.py [--data digits] [--epochs 400] [--hidden 100] [--ais-steps 10000] [--output runs/rbm]
    python examples/rbm.py --data mnist --data-dir DATA

Prints the estimated log Z with its standard error and the mean log p(x) of the test set, which an underestimated log Z
makes too high; writes draws, one picture for each. About a minute on the embedded digits. On MNIST: 500 hidden units
and persistent chains only, in six minutes on one core.
"""

from pathlib import Path

import head
import torch

import pyrovae as pv

SMALL, FULL = {"epochs": 400, "hidden": 100, "lr": 0.05}, {"epochs": 60, "hidden": 500, "lr": 0.01}
WAYS = {"CD-1": {"cd_steps": 1}, "CD-10": {"cd_steps": 10}, "persistent": {"persistent": True}}


def describe(rbm, test):
    """log Z with its error, and what follows from it."""
    with torch.no_grad():
        log_z, error = rbm.log_partition(return_std_error=True)
        log_p = rbm.log_prob(test.x.to(rbm.weight.device)).mean()
    return f"log Z {log_z:.2f} ± {error:.2g}, test log p(x) {log_p:.2f} nats"


def main():
    options = head.options(
        __doc__, data="digits", epochs=int, hidden=int, lr=float, ais_steps=10_000, output=Path("runs/rbm")
    )
    small = options.data == "digits"
    size = (SMALL if small else FULL) | {k: v for k, v in vars(options).items() if k in SMALL and v is not None}
    data = head.load(options, binarization="dynamic")
    for name in WAYS if small else ["persistent"]:
        torch.manual_seed(0)
        rbm = pv.models.RBM(data.train.event_shape, size["hidden"], ais_steps=options.ais_steps)
        rbm.initialise(data.train.x)
        history = rbm.fit(data.train, epochs=size["epochs"], lr=size["lr"], **WAYS[name])
        seconds = sum(row["seconds"] for row in history)
        print(f"{name}: {len(history)} epochs in {seconds:.0f} s, {describe(rbm, data.test)}")
        pv.plots.image_grid(pv.sample(rbm, 100, seed=0), picture := options.output / f"{name}.png", smooth=True)
        print("draws in", picture)


if __name__ == "__main__":
    main()
