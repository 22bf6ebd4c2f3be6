"""Every system of the zoo on one data set, trained, measured and put side by side in one table.

    python examples/zoo.py [--data mnist] [--data-dir DIR] [--epochs 50] [--output runs/zoo]

On the embedded digits by default. Each system is a run of its own in the output folder, as ``pyrovae train`` makes it,
with its pictures; what has run already is not run again. Bounds on log p(x) are marked with a sign, and what is no
generative model says so.
"""

from pathlib import Path

import head
from rich.console import Console

from pyrovae.app import cli, tables
from pyrovae.app import train as training
from pyrovae.app.settings import Settings
from pyrovae.runs import RESULTS, Run

LABELS = 10  # per class, for the semi-supervised system

SYSTEMS = {
    "pca": {"model": "pca", "latent_dim": 50},
    "rbm": {"model": "rbm", "lr": 0.05, "settings": {"num_hidden": 200, "persistent": True}},
    "autoencoder": {"model": "autoencoder"},
    # on bits a weight of 1 silences every unit
    "sparse autoencoder": {"model": "sparse_autoencoder", "settings": {"weight": 0.1}},
    "denoising autoencoder": {"model": "denoising_autoencoder"},
    "vae": {"model": "vae"},
    "beta-vae": {"model": "vae", "settings": {"kl_weight": 2.0}},  # 4 silences every unit of small images
    "iwae": {"model": "vae", "objective": "iwae", "particles": 5},
    "iwae, 2 layers": {"model": "hierarchical", "objective": "iwae", "particles": 5},
    "ladder": {"model": "hierarchical", "settings": {"guide": "top_down"}},
    "vamp prior": {"model": "vae", "settings": {"prior": "vamp"}},
    "flow posterior": {"model": "vae", "settings": {"posterior": "iaf"}},
    "conditional": {"model": "conditional"},
    "semi-supervised": {"model": "semi_supervised", "settings": {"labels_per_class": LABELS}},
    "vq-vae": {
        "model": "vqvae",
        "settings": {
            "num_codes": 16,
            "code_dim": 16,
            "channels": 32,
            "num_downsamplings": 1,
            "ema_decay": 0.99,
            "revive_below": 1.0,
        },
    },
    "code prior": {"model": "code_prior", "data": "codes:{vq-vae}", "settings": {"channels": 16, "num_layers": 2}},
}


def main():
    options = head.options(
        __doc__,
        data="digits",
        epochs=50,
        samples=500,
        output=Path("runs/zoo"),
        only={"nargs": "*", "choices": SYSTEMS, "help": "some of the systems"},
    )

    out = Console()
    folders = {name: options.output / name.replace(", ", " ").replace(" ", "-") for name in SYSTEMS}
    for name in options.only or SYSTEMS:
        if not (folders[name] / RESULTS).exists():
            train(name, folders, options, out)
    chosen = [folders[name] for name in options.only or SYSTEMS]
    joined = folders["code prior"] / "vqvae"
    if joined.exists() and not (joined / RESULTS).exists():
        cli.evaluate(joined, samples=1, data_dir=options.data_dir)
        cli.sample(joined)
    tables.compare([Run(folder) for folder in [*chosen, *([joined] if joined.exists() else [])]], out)


def train(name, folders, options, out):
    """One system as a run."""
    given = {"data": options.data, "data_dir": options.data_dir, "samples": options.samples} | SYSTEMS[name]
    given["data"] = given["data"].replace("{vq-vae}", str(folders["vq-vae"]))
    if given["model"] != "pca":
        given["epochs"] = options.epochs
    job = Settings(**given)
    training.train(job, run_dir=folders[name], resume=folders[name].exists(), explicit=set(), out=out)


if __name__ == "__main__":
    main()
