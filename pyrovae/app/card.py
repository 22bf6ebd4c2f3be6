"""A run's model card: README.md, made of its config and results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pyrovae import runs
from pyrovae.app.results import Results, belongs, readable_results
from pyrovae.arguments import one_line

CARD = "README.md"
MARK = "<!-- Written by pyrovae, anew with every evaluation; delete this line to keep the file as it is. -->"


def write_card(run: runs.Run, repo_id: str | None = None) -> None:
    """Write a run's model card, unless another's file has its name."""
    path = run.path / CARD
    if path.is_symlink() or (path.exists() and not (path.is_file() and MARK in path.read_text("utf-8", "replace"))):
        return
    runs.write_text(path, card(run, repo_id))


def card(run: runs.Run, repo_id: str | None = None) -> str:
    """What a run is, how it was trained, what was measured of it, and how it is used, in Markdown."""
    config, results = run.config(), readable_results(run)
    described, objective = config.get("model") or {}, config.get("objective") or {}
    name = str(described.get("class", "a pair of programs")).rpartition(":")[2]
    data, training = config.get("data") or {}, config.get("training") or {}
    head = {"library_name": "pyrovae", "tags": ["pyrovae", "pyro", "variational-autoencoder"]}
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    about = {
        "model": code(name, described.get("arguments")),
        "data": " ".join(code(data[key]) for key in ("name", "shape", "binarization") if key in data),
        "objective": code(str(objective.get("class", "")).rpartition(":")[2], objective.get("arguments")),
        "training": ", ".join(
            f"{key.replace('_', ' ')} {code(training[key])}" for key in TRAINING if training.get(key)
        ),
        "versions": ", ".join(f"{key} {text(value)}" for key, value in (config.get("versions") or {}).items()),
    }
    parts = [f"---\n{front}\n---", MARK, f"# {text(repo_id or run.path.absolute().name)}", table(about)]
    if results:
        stale = "" if belongs(results, run) else "\n\nThese were measured of other weights than are here."
        parts.append(f"## What was measured\n\n{table(measured(results))}{stale}")
    shown = [name for name in PICTURES if (run.path / f"{name}.png").is_file()]
    parts += [f"## {name.replace('_', ' ').capitalize()}\n\n![{name}]({name}.png)" for name in shown]
    parts.append(f"## Use\n\n```python\n{USE.format(load=loading(repo_id, described))}\n```")
    return ("\n\n".join(parts) + "\n").encode("utf-8", "replace").decode("utf-8")  # a path may be no text


TRAINING = ("epochs", "batch_size", "optimizer", "lr", "schedule", "particles", "kl_warmup", "num_data", "seed")
PICTURES = ("samples", "reconstructions", "curves", "latent_plane", "manifold")  # no other's
USE = """import pyrovae as pv

pair = {load}
x = pv.sample(pair, 16)"""


def loading(repo_id: str | None, described: Mapping[str, Any]) -> str:
    """The line that opens a run, from where it will be."""
    own = not str(described.get("class", "")).startswith("pyrovae.models:")
    verb, where = ("from_pretrained", repo_id) if repo_id else ("load", ".")
    return f"pv.{verb}({json.dumps(where)}{', pair=your_pair' if own else ''})"


def measured(results: Results) -> dict[str, str]:
    """What results.json says, in words."""
    kind, rows = results["likelihood_is"], {}
    if kind is not None:
        about = {"bound": "at most: a bound", "exact": "exact", "annealed": "partition function by annealing"}
        error = results["nll_std_error"]
        by = about.get(kind, f"{results.get('num_samples', 0):,} importance samples, standard error {error:.2g}")
        rows["test NLL, nats per datum"] = f"{results['nll']:.2f} ({by}; {results.get('num_images', 0):,} data)"
    if "bits_per_dim" in results:
        rows["bits/dim"] = f"{results['bits_per_dim']:z.4f}"
    if results.get("reconstruction_error") is not None:
        rows["squared error of reconstructions"] = f"{results['reconstruction_error']:.3g} per datum"
    if results.get("accuracy") is not None:
        rows["accuracy"] = f"{results['accuracy']:.2%}"
    for site, units in results["active_units"].items():
        rows[f"active units at {code(site)}"] = f"{units['active']} of {units['of']}"
    rows |= {"checkpoint": results.get("checkpoint", "last"), "warning": text(results.get("warning") or "")}
    return rows


def table(rows: Mapping[str, str]) -> str:
    """Rows of two cells, those that are empty left out."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {cell} |" for name, cell in rows.items() if cell)])


def text(value: object) -> str:
    """A value as Markdown shows it: one line, with nothing of it taken for markup."""
    return "".join(f"\\{c}" if c in r"\`*_[]<>|#$&!" else c for c in one_line(value, longest=None))


def code(value: object, arguments: object = None) -> str:
    """A value, or a call, in a code span, which no character in it ends."""
    given = arguments if isinstance(arguments, dict) else {}
    call = f"({', '.join(f'{key}={json.dumps(v)}' for key, v in given.items() if v is not None)})" if given else ""
    shown = one_line(f"{value if isinstance(value, str) else json.dumps(value)}{call}", longest=None)
    return f"`{shown.replace('`', chr(39)).replace('|', '/')}`" if shown else ""
