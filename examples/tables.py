"""A table of the lectures, cell by cell: test NLL and active units of one network trained on one bound.

    python examples/tables.py a [--layers 1] [--objective IWAE] [--particles 5 50]
    python examples/tables.py a --data mnist --epochs 80 --batch-size 20
    python examples/tables.py b --data mnist --minutes 30
    python examples/tables.py c --data mnist --paper
    python examples/tables.py d --data mnist --epochs 300 --layers 1 [--gradient dreg] [--variant vamp] [--growth fixed]

Table A is the IWAE paper's first: VAE (the mean of k sampled log-weights, no KL in closed form) and IWAE, k = 1, 5, 50,
with one stochastic layer and with two. With k = 1 the two are one cell. Table B trains two of its networks on, each on
the other's bound: VAE with k = 1, then IWAE with k = 50, and the other way round. The first stage is table A's run; it
is trained if it is not there. Table C is that of Rainforth et al.: one stochastic layer, 64 samples in all, as IWAE,
PIWAE, MIWAE, CIWAE and VAE have them; IWAE-64, log p-hat and their difference -KL, along the training too, there on a
part of the test data. Table D goes beyond the papers: the same networks with other gradients of the bound, with numbers
of particles that grow, and with richer priors and posteriors; its curves are those of C, against minutes of training.
On the embedded digits, in minutes, by default.

Every cell gets one schedule: as many epochs, or as many minutes, or with --paper the paper's: batches of 20, 3,280
epochs in eight stages, Adam as in the authors' code, where its second moment starts at 1/400, and not at 0 as here. A
second stage is 2/3 as long, with a tenth of the learning rate.
A cell that is finished has a record, a JSON file, and is not trained again; one that was interrupted goes on from its
last checkpoint, which after SIGTERM is that of the epoch at hand. Processes with the same command share the cells
between them, on one GPU as well. examples/results.py makes a page of the records.

    for i in 1 2 3 4; do timeout 9m python examples/tables.py d --data mnist --epochs 300 --sharing 4 & done; wait

Outside a git repository the commit is what PYROVAE_COMMIT says.
"""

import fcntl
import math
import signal
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import fmean

import head
import records
import torch
from cells import SELECTORS, TABLES

import pyrovae as pv
from pyrovae import runs


class Busy(Exception):
    """Another process is at work on what is needed."""


#: The schedule, as options by name with their defaults, and what the paper has instead.
SCHEDULE = {
    "batch_size": (100, "images a step"),
    "lr": (2e-3, "learning rate"),
    "schedule": ("linear", "of the learning rate: constant, cosine, linear or iwae, the paper's stages"),
    "adam": {"nargs": 3, "type": float, "default": [0.9, 0.999, 1e-8], "help": "Adam's two betas and epsilon"},
    "precision": ("float32", "of the networks' products: float32 or bfloat16"),
}
PAPER = {"epochs": 3280, "batch_size": 20, "lr": 1e-3, "schedule": "iwae", "adam": [0.99, 0.999, 5e-6]}
LAST = {"iwae": "constant"}  # schedules whose last stage is what a second one goes on with
CURVED = ("C", "D")  # the tables whose figures are followed along the training
CURVE = {"points": 20, "images": 100, "samples": 512}
IWAE_64_SAMPLES = 640  # of the final IWAE-64: the mean of ten
RENAMED = {"data": "dataset", "minutes": "budget_minutes", "samples": "num_samples"}  # options, in a record


def settings_of(cell, options):
    """All that decides a cell's figures, but for the code and the machine."""
    length = "minutes" if options.minutes else "epochs"
    names = ("data", length, *SCHEDULE, "train", "samples", "seed")
    settings = {name: value for name, value in vars(cell).items() if value is not None}
    settings |= {RENAMED.get(name, name): getattr(options, name) for name in names}
    if cell.continues is None:
        return settings
    first, length = settings_of(cell.continues, options), RENAMED.get(length, length)
    lasts = options.second or first[length] * 2 / 3
    return settings | {
        "continues": first,
        length: max(1, round(lasts)) if length == "epochs" else lasts,
        "lr": options.second_lr or round(first["lr"] / 10, 12),
        "schedule": LAST.get(first["schedule"], first["schedule"]),
    }


def command_of(settings):
    """The command that makes this cell and no other, or without the names of cells the whole table."""
    own, first = dict(settings), settings.get("continues", settings)
    if own.get("groups") == 1:
        del own["groups"]
    if own.get("objective") == "VAE":
        own["gradient"] = first["gradient"]
    for name in ("epochs", "budget_minutes", *SCHEDULE):
        own[name] = first.get(name)
    if first is not settings:
        own |= {"second": settings.get("epochs", settings.get("budget_minutes")), "second_lr": settings["lr"]}
    words = ["python", "examples/tables.py", settings["table"].lower()]
    lengths = ("epochs", "minutes", "second", "second_lr")
    for name in ("data", *SELECTORS, "gradient", *lengths, *SCHEDULE, "train", "samples", "seed"):
        value = own.get(RENAMED.get(name, name))
        if value is not None:
            words += ["--" + name.replace("_", "-"), *(value if isinstance(value, list) else [value])]
    return " ".join(map(str, words))


def network(cell, settings, images):
    """The cell's network, untrained."""
    torch.manual_seed(settings["seed"])
    return cell.network(images.event_shape).initialise(images.x)


def fit(pair, cell, settings, epochs, images, **where):
    """Train a pair as the settings say."""
    first, second, eps = settings["adam"]
    adam = partial(torch.optim.Adam, lr=settings["lr"], betas=(first, second), eps=eps, fused=True)
    return pv.fit(
        pair.model, pair.guide, images, objective=cell.bound(), epochs=epochs, batch_size=settings["batch_size"],
        particles=cell.growing, optimizer=adam, schedule=settings["schedule"], precision=settings["precision"],
        seed=settings["seed"], **where,
    )  # fmt: skip


def epochs_of(cell, settings, images, run, device):
    """How many epochs the cell is trained: of a budget in minutes, by the pace of a short training."""
    if run.exists:
        return run.config()["training"]["epochs"]
    if "epochs" in settings:
        return settings["epochs"]
    few, minutes, stages = images.subset(slice(5000)), settings["budget_minutes"], cell.growing or (cell.particles,)
    seconds = {}  # an image, by particles
    for k in set(stages):
        one = replace(cell, particles=k, growth=cell.growth and "fixed")
        short = fit(
            network(cell, settings, images), one, settings, 2, few, device=device, compile=minutes > 1 or "auto"
        )
        seconds[k] = 1 / short.history[-1]["images_per_second"]
    return max(len(stages), round(60 * minutes / len(images) / fmean(seconds[k] for k in stages)))


@contextmanager
def ending(run):
    """What fit calls after an epoch, so that SIGTERM ends a training there, with a checkpoint."""
    asked = []

    def ask(*_):
        run.saved = -math.inf  # so that one is due
        asked.append(True)

    def look(_):
        if asked:
            raise SystemExit(f"ended as asked, after an epoch: the same command goes on with it ({run.path})")

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield look
    finally:
        signal.signal(signal.SIGTERM, before)


def train(cell, settings, data, options):
    """The cell's network, how it was trained, and its run: from its start, or on from its last epoch."""
    images, run = data.train.subset(slice(options.train)), runs.Run(options.runs / records.name(settings) / "run")
    epochs, config = epochs_of(cell, settings, images, run, options.device), {"commit": options.commit}
    if cell.continues and not (run.exists and run.state()):
        first = settings["continues"]
        with mine(options.runs / records.name(first)) as free:
            if not free:
                raise Busy(f"table {first['table'].lower()}, {cell.continues}, with which it begins")
            pair, before, run_before = train(cell.continues, first, data, options)
        config["continued"] = {
            "record": records.name(first), "epochs": len(before.history), "train_bound": before.history[-1]["bound"],
            "commit": run_before.config()["commit"],
        }  # fmt: skip
    else:
        pair = network(cell, settings, images)
    if cell.table in CURVED:
        seen = data.test.subset(slice(CURVE["images"]))
        pair.metrics = along(pair, seen, run, max(1, epochs // CURVE["points"]), settings["seed"])
    with ending(run) as look:
        fitted = fit(
            pair, cell, settings, epochs, images,
            device=options.device, run_dir=run, resume=True, config=config, on_epoch=look,
        )  # fmt: skip
    return pair, fitted, run


def along(pair, images, run, every, seed):
    """What gives table C's figures after every so many epochs; fit asks for them after each, and logs them."""
    epoch = None

    def metrics(*_):
        nonlocal epoch
        epoch = (len(run.history()) if epoch is None else epoch) + 1
        if epoch % every:
            return {}
        found = pv.posterior_gap(pair.model, pair.guide, images, num_samples=CURVE["samples"], seed=seed)
        return {"iwae_64": found.iwae, "log_p": found.log_p}

    return metrics


def gap(pair, test, nll, history, seed):
    """What table C shows, in the end and along the training."""
    found = pv.posterior_gap(pair.model, pair.guide, test, num_samples=IWAE_64_SAMPLES, seed=seed)
    keys, seconds = ("epoch", "iwae_64", "log_p"), accumulate(row["seconds"] for row in history)
    return {
        "iwae_64": found.iwae, "iwae_64_samples": found.num_samples, "log_p": -nll, "minus_kl": found.iwae + nll,
        "curve": {
            "images": min(CURVE["images"], len(test)), "samples": CURVE["samples"],
            "points": [
                {key: row[key] for key in keys} | {"minutes": passed / 60}
                for row, passed in zip(history, seconds, strict=True) if "iwae_64" in row
            ],
        },
    }  # fmt: skip


def measure(cell, settings, data, options):
    """Train the cell, or go on with it, and measure it."""
    pair, fitted, run = train(cell, settings, data, options)
    estimate = pv.log_likelihood(
        pair.model, pair.guide, data.test, num_samples=settings["num_samples"], seed=settings["seed"]
    )
    sampled, averaged = (pv.active_units(pair.guide, data.test, samples=draws) for draws in (1, 64))
    config, device = run.config(), fitted.timings["device"]
    found = {
        "nll": estimate.nll, "nll_std_error": estimate.nll_std_error, "unreliable": estimate.unreliable,
        "active_units": {
            site: {"at_one_draw": sampled[site].count, "averaged": averaged[site].count, "of": units.variances.numel()}
            for site, units in sampled.items()
        },
        "epochs": len(fitted.history), "train_bound": fitted.history[-1]["bound"],
        "fell": fall(row["bound"] for row in fitted.history),
        "num_train": config["training"]["num_data"],
        "minutes": fitted.timings["seconds"] / 60, "cpu_minutes": sum(h["cpu_seconds"] for h in fitted.history) / 60,
        "device": device, "processor": records.processor(device), "sharing": options.sharing,
        "threads": fitted.timings["threads"], "path": fitted.timings["path"], "versions": runs.versions(),
        "commit": options.commit, "command": command_of(settings),
    }  # fmt: skip
    if cell.table in CURVED:
        found |= gap(pair, data.test, estimate.nll, fitted.history, settings["seed"])
    if config["commit"] != options.commit:
        found["begun_at_commit"] = config["commit"]
    return found | {key: config[key] for key in ("continued",) if key in config}


def fall(bounds):
    """By how many nats a bound fell below its best until then, at most."""
    best, most = -math.inf, 0.0
    for bound in bounds:
        best = max(best, bound)
        most = max(most, best - bound)
    return most


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
    wanted = {key: getattr(options, key) for key in SELECTORS}
    if options.table == "d":
        wanted["gradient"] = options.gradient and [options.gradient]
    cells = [
        cell.with_gradient(options.gradient or "total")
        for cell in TABLES[options.table]
        if all(getattr(cell, key) in (values or [getattr(cell, key)]) for key, values in wanted.items())
    ]
    if not cells:
        there = "; ".join(map(str, TABLES[options.table]))
        raise ValueError(f"table {options.table} has no such cell: choose among {there}")
    for cell in cells:
        cell.bound()  # is refused here, and not when its turn comes
        if cell.table in CURVED and options.samples < 64:
            raise ValueError(
                f"log p-hat of table {cell.table} needs more samples than IWAE-64, got {options.samples}: raise "
                "--samples"
            )
    return cells


def parse():
    """The options, and the parser for what is wrong with them."""
    select = {name: {"nargs": "+", "type": kind, "help": "of the cells wanted"} for name, kind in SELECTORS.items()}
    parser = head.parser(
        __doc__,
        data="digits",
        **select,
        **SCHEDULE,
        gradient=(str, "of the cells beside the VAE's: total (the default), stl or dreg; of the cells wanted of d"),
        second=(float, "epochs of a second stage, or minutes with --minutes: else 2/3 of the first's"),
        second_lr=(float, "its learning rate: else a tenth of the first's"),
        train=int,
        samples=5000,
        seed=(0, "of weights, noise and order"),
        device=("auto", "auto, cpu, cuda"),
        sharing=(1, "how many such processes share the device, which a record says"),
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
    try:
        options.commit = records.commit()
        data, cells = head.load(options, binarization="dynamic"), chosen(options)
    except ValueError as error:
        parser.error(str(error))
    for cell in cells:
        settings = settings_of(cell, options)
        said = f"table {options.table}, {options.data}, {cell}"
        with mine(options.runs / records.name(settings)) as free:
            try:
                if not free:
                    raise Busy("it")
                record = records.of(options.records, settings)
                if record is None:
                    record = measure(cell, settings, data, options)
                    records.write(options.records, settings, record)
            except Busy as needed:
                print(f"{said}: another process is at work on {needed}")
            else:
                print(f"{said}: {summary(record)}")
        sys.stdout.flush()


def summary(record):
    """A record in a line."""
    active = " + ".join(str(units["at_one_draw"]) for units in record["active_units"].values())
    gap = f", IWAE-64 {record['iwae_64']:.2f}, -KL {record['minus_kl']:.2f}" if "iwae_64" in record else ""
    length = f"{record['epochs']} epochs, {record['minutes']:.1f} minutes"
    return f"NLL {record['nll']:.2f} ± {record['nll_std_error']:.2g}{gap}, {active} active units, {length}"


if __name__ == "__main__":
    main()
