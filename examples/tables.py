"""A table of the lectures, cell by cell: test NLL and active units of one network trained on one bound.

    python examples/tables.py a [--layers 1] [--objective IWAE] [--particles 5 50]
    python examples/tables.py a --data mnist --epochs 80 --batch-size 20
    python examples/tables.py a --data mnist --minutes 30
    python examples/tables.py a --data mnist --paper

Table A is the IWAE paper's first: VAE (the mean of k sampled log-weights, no KL in closed form) and IWAE, k = 1, 5, 50,
with one stochastic layer and with two. With k = 1 the two are one cell. On the embedded digits, in minutes, by default.

Every cell gets one schedule: as many epochs, or as many minutes, or with --paper the paper's: batches of 20, 3,280
epochs in eight stages, Adam as in the authors' code, where its second moment starts at 1/400, and not at 0 as here.
A cell that is finished has a record, a JSON file, and is not trained again; one that was interrupted goes on from its
last epoch. Two processes with the same command share the cells between them.
"""

import fcntl
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import head
import records
import torch

import pyrovae as pv
from pyrovae import runs


@dataclass(frozen=True)
class Cell:
    """One figure of a table: a network and its objective."""

    table: str
    layers: int
    objective: str
    particles: int
    groups: int = 1
    gradient: str = "total"

    def __str__(self):
        groups = f"{self.groups} x " if self.groups > 1 else ""
        return f"{self.layers} layer{'s'[: self.layers - 1]}, {self.objective}, k = {groups}{self.particles}"

    def network(self, shape):
        """The paper's network."""
        return (pv.models.VAE if self.layers == 1 else pv.models.HierarchicalVAE)(shape)

    def bound(self):
        """What it is trained on."""
        make = {"VAE": pv.ELBO, "IWAE": pv.IWAE}[self.objective]
        return make(self.particles, gradient=self.gradient)


BOUNDS = [("VAE", 1), ("VAE", 5), ("VAE", 50), ("IWAE", 5), ("IWAE", 50)]  # IWAE with k = 1 is the VAE
TABLES = {"a": [Cell("A", layers, objective, k) for layers in (1, 2) for objective, k in BOUNDS]}
SELECTORS = {"layers": int, "objective": str, "particles": int}
#: The schedule, as options by name with their defaults, and what the paper has instead.
SCHEDULE = {
    "batch_size": (100, "images a step"),
    "lr": (2e-3, "learning rate"),
    "schedule": ("linear", "of the learning rate: constant, cosine, linear or iwae, the paper's stages"),
    "adam": {"nargs": 3, "type": float, "default": [0.9, 0.999, 1e-8], "help": "Adam's two betas and epsilon"},
    "precision": ("float32", "of the networks' products: float32 or bfloat16"),
}
PAPER = {"epochs": 3280, "batch_size": 20, "lr": 1e-3, "schedule": "iwae", "adam": [0.99, 0.999, 5e-6]}
RENAMED = {"data": "dataset", "minutes": "budget_minutes", "samples": "num_samples"}  # options, in a record


def settings_of(cell, options):
    """All that decides a cell's figures, but for the code and the machine."""
    length = "minutes" if options.minutes else "epochs"
    names = ("data", length, *SCHEDULE, "train", "samples", "seed")
    return asdict(cell) | {RENAMED.get(name, name): getattr(options, name) for name in names}


def command_of(settings):
    """The command that makes this cell and no other."""
    words = ["python", "examples/tables.py", settings["table"].lower()]
    for name in ("data", *SELECTORS, "gradient", "epochs", "minutes", *SCHEDULE, "train", "samples", "seed"):
        value = settings.get(RENAMED.get(name, name))
        if value is not None:
            words += ["--" + name.replace("_", "-"), *(value if isinstance(value, list) else [value])]
    return " ".join(map(str, words))


def train(cell, settings, epochs, images, **where):
    """The cell's network, trained."""
    torch.manual_seed(settings["seed"])
    pair = cell.network(images.event_shape).initialise(images.x)
    first, second, eps = settings["adam"]
    adam = partial(torch.optim.Adam, lr=settings["lr"], betas=(first, second), eps=eps, fused=True)
    return pair, pv.fit(
        pair.model, pair.guide, images, objective=cell.bound(), epochs=epochs, batch_size=settings["batch_size"],
        optimizer=adam, schedule=settings["schedule"], precision=settings["precision"], seed=settings["seed"], **where,
    )  # fmt: skip


def epochs_of(cell, settings, images, run, device):
    """How many epochs the cell is trained: of a budget in minutes, by the pace of a short training."""
    if run.exists:
        return run.config()["training"]["epochs"]
    if "epochs" in settings:
        return settings["epochs"]
    _, short = train(cell, settings, 2, images.subset(slice(1000)), device=device)
    return max(1, round(60 * settings["budget_minutes"] * short.history[-1]["images_per_second"] / len(images)))


def measure(cell, settings, data, options, folder):
    """Train the cell, or go on with it, and measure it."""
    images, run = data.train.subset(slice(options.train)), runs.Run(folder / "run")
    epochs = epochs_of(cell, settings, images, run, options.device)
    pair, fitted = train(
        cell, settings, epochs, images, device=options.device, run_dir=run.path, resume=True,
        config={"commit": options.commit},
    )  # fmt: skip
    estimate = pv.log_likelihood(
        pair.model, pair.guide, data.test, num_samples=settings["num_samples"], seed=settings["seed"]
    )
    sampled, averaged = (pv.active_units(pair.guide, data.test, samples=draws) for draws in (1, 64))
    begun, device = run.config()["commit"], fitted.timings["device"]
    return {
        "nll": estimate.nll, "nll_std_error": estimate.nll_std_error, "unreliable": estimate.unreliable,
        "active_units": {
            site: {"at_one_draw": sampled[site].count, "averaged": averaged[site].count, "of": units.variances.numel()}
            for site, units in sampled.items()
        },
        "epochs": epochs, "train_bound": fitted.history[-1]["bound"], "num_train": len(images),
        "minutes": fitted.timings["seconds"] / 60, "cpu_minutes": sum(h["cpu_seconds"] for h in fitted.history) / 60,
        "device": device, "processor": records.processor(device), "threads": fitted.timings["threads"],
        "path": fitted.timings["path"], "versions": runs.versions(), "commit": options.commit,
        "command": command_of(settings),
    } | ({} if begun == options.commit else {"begun_at_commit": begun})  # fmt: skip


@contextmanager
def mine(folder):
    """Whether no other process is at work on a folder, which until the end is this one's."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def chosen(options):
    """The cells that the options name."""
    cells = [
        Cell(**asdict(cell) | ({} if cell.objective == "VAE" else {"gradient": options.gradient}))
        for cell in TABLES[options.table]
        if all(getattr(cell, key) in (getattr(options, key) or [getattr(cell, key)]) for key in SELECTORS)
    ]
    if not cells:
        there = "; ".join(map(str, TABLES[options.table]))
        raise ValueError(f"table {options.table} has no such cell: choose among {there}")
    return cells


def parse():
    """The options, and the parser for what is wrong with them."""
    select = {name: {"nargs": "+", "type": kind, "help": "of the cells wanted"} for name, kind in SELECTORS.items()}
    parser = head.parser(
        __doc__,
        data="digits",
        **select,
        **SCHEDULE,
        gradient=("total", "of the cells beside the VAE's: total, stl or dreg"),
        train=int,
        samples=5000,
        seed=(0, "of weights, noise and order"),
        device=("auto", "auto, cpu, cuda"),
        runs=(Path("runs/tables"), "folder of the checkpoints"),
        records=(Path("docs/results"), "folder of the records"),
    )
    parser.add_argument("table", choices=TABLES, help="which table")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, default=30, help=head.HELP["epochs"] + ", the same for every cell")
    length.add_argument("--minutes", type=float, help="instead of epochs: as many as each cell does in that time")
    length.add_argument("--paper", action="store_true", help="the paper's schedule in full")
    if parser.parse_args().paper:
        parser.set_defaults(**PAPER)
    return parser


def main():
    parser = parse()
    options = parser.parse_args()
    options.commit = records.commit()
    try:
        data, cells = head.load(options, binarization="dynamic"), chosen(options)
    except ValueError as error:
        parser.error(str(error))
    for cell in cells:
        settings = settings_of(cell, options)
        folder, said = options.runs / records.name(settings), f"table {options.table}, {options.data}, {cell}"
        with mine(folder) as free:
            if not free:
                print(f"{said}: another process is at work on it")
                continue
            record = records.of(options.records, settings)
            if record is None:
                record = measure(cell, settings, data, options, folder)
                records.write(options.records, settings, record)
        active = " + ".join(str(units["at_one_draw"]) for units in record["active_units"].values())
        length = f"{record['epochs']} epochs, {record['minutes']:.1f} minutes"
        print(f"{said}: NLL {record['nll']:.2f} ± {record['nll_std_error']:.2g}, {active} active units, {length}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
