"""The benchmarks: pyrovae beside NumPyro, hand-written PyTorch, Pyro's SVI and Pythae, taking turns.

    python tests/benchmarks/run.py [--only steps,likelihoods,replicas,...] [--json FILE] [--markdown FILE]

Real MNIST if it is found (``--data-dir``, ``$PYROVAE_DATA``). Compare ratios, not milliseconds, and let nothing else
run. NumPyro and Pythae come with ``pip install "pyrovae[benchmarks]"``; without them, or without a C++ compiler, what
needs them is left out, and says so.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.options import Options
from tests.benchmarks.tables import Table

SECTIONS = (
    "epochs",
    "ahead",
    "steps",
    "likelihoods",
    "bound",
    "replicas",
    "first",
    "startup",
    "growth",
    "memory",
    "quantizer",
    "products",
)
PACKAGES = ("torch", "pyro-ppl", "pyrovae", "jax", "numpyro", "pythae")
UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # of a processor, as Linux names them


def environment(options: Options) -> dict[str, Any]:
    """Machine and versions."""
    import torch

    cuda = options.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if cuda else _about_processor("model name") or platform.machine(),
        "units": " ".join(u for u in UNITS if u in _about_processor("flags").split()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load at start": os.getloadavg()[0],
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        **{name: _version(name) for name in PACKAGES},
    }


def _about_processor(key: str) -> str:
    """What the system tells of the first processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.split("\t")[0] == key), "")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "0.1.0 (not installed)" if name == "pyrovae" else "absent"


def _cell(text: str) -> tuple[int, int]:
    batch, k = text.split("x")
    return int(batch), int(k)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Options()
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between them")
    parser.add_argument("--seconds", type=float, default=default.seconds, help="per contender and setting")
    parser.add_argument("--warmup", type=int, default=default.warmup, help="training steps before all timing")
    parser.add_argument("--networks", default=",".join(default.networks), help="mlp, conv or both")
    parser.add_argument("--cells", type=_cell, nargs="+", default=(), help="batch x k, such as 20x5 100x50")
    parser.add_argument("--contenders", nargs="+", default=(), help="of epochs and memory; all by default")
    parser.add_argument("--on", type=int, nargs="+", default=default.cores, help="numbers of cores, for epochs")
    parser.add_argument("--rounds", type=int, default=default.rounds, help="epochs of each that are timed")
    parser.add_argument("--epoch-steps", type=int, default=default.steps, help="steps of an epoch; 2 to 5 seconds")
    parser.add_argument("--target", type=float, default=default.target, help="bound to train to, nats per image")
    parser.add_argument("--epochs", type=int, default=default.epochs, help="at most, on the way to that bound")
    parser.add_argument("--replicas", type=int, nargs="+", default=default.replicas, help="numbers at once: 1 2 4 ...")
    parser.add_argument("--samples", type=int, default=default.samples, help="of log p(x)")
    parser.add_argument("--images", type=int, default=default.images, help="for log p(x)")
    parser.add_argument("--device", default=default.device, help="cpu or cuda")
    parser.add_argument("--data-dir", type=Path, help="folder with MNIST/raw")
    parser.add_argument("--compile-mode", help="torch.compile's mode for the hand-written step")
    parser.add_argument("--cold", action="store_true", help="compile from an empty cache")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args(arguments)
    if unknown := set(options.only.split(",")) - set(SECTIONS):
        parser.error(f"unknown sections {sorted(unknown)}: give some of {', '.join(SECTIONS)}")
    return options


def write(asked: argparse.Namespace, about: dict[str, Any], tables: dict[str, list[Table]]) -> None:
    """Both files, as far as the sections are done."""
    if asked.json:
        sections = {name: [asdict(table) for table in found] for name, found in tables.items()}
        asked.json.write_text(json.dumps({"environment": about, "sections": sections}, indent=2) + "\n")
    if asked.markdown:
        head = ", ".join(f"{name} {value}" for name, value in about.items())
        parts = [f"## {name}\n\n" + "\n".join(t.markdown() for t in found) for name, found in tables.items()]
        asked.markdown.write_text("\n".join([f"{head}\n", *parts]))


def main() -> None:
    asked = parse()
    options = Options(
        asked.seconds, asked.warmup, tuple(asked.networks.split(",")), tuple(asked.cells), asked.samples, asked.images,
        asked.device, asked.data_dir and asked.data_dir.resolve(), asked.compile_mode, tuple(asked.contenders),
        tuple(asked.on), asked.rounds, asked.epoch_steps, asked.target, asked.epochs, tuple(asked.replicas),
    )  # fmt: skip
    tables: dict[str, list[Table]] = {}
    with ExitStack() as stack:
        if asked.cold:
            folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        about = environment(options) | {"cache": "empty at start" if asked.cold else "as found"}
        print(about, file=sys.stderr)
        for name in asked.only.split(","):
            tables[name] = importlib.import_module(f"tests.benchmarks.{name}").run(options)
            print("\n".join(table.markdown() for table in tables[name]), flush=True)
            write(asked, about, tables)


if __name__ == "__main__":
    main()
