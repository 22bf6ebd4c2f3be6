"""Results as tables."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pyrovae import data as datasets
from pyrovae import models, objectives, runs


def print_results(results: dict[str, Any], out: Console) -> None:
    """Test NLL with its standard error, active units, and a warning where the figure cannot be trusted."""
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    kind = results["likelihood_is"]
    if kind is None:
        table.add_row("test NLL", "none: not a generative model, it has no log p(x)")
    else:
        table.add_row("test NLL", f"{_nll(results)} nats per image")
        over_images = f"± {_number(results['nll_data_std_error'])} over images"
        table.add_row("", f"{results['bits_per_dim']:.4f} bits/dim; {over_images}")
        counted = f"{results['num_images']:,} images"
        if kind == "estimate":
            table.add_row("measured with", f"{results['num_samples']:,} samples, {counted}")
            ess = f"median ESS {results['median_ess']:.0f}"
            table.add_row("", f"{ess}, Pareto k > 0.7 for {results['unreliable']:.1%} of images")
        else:
            table.add_row("measured", f"{_KINDS[kind]}, {counted}")
    if results["reconstruction_error"] is not None:
        table.add_row("reconstruction", f"squared error {results['reconstruction_error']:.3g} per image")
    if results.get("accuracy") is not None:
        table.add_row("accuracy", f"{results['accuracy']:.2%}")
    if results.get("perplexity") is not None:
        table.add_row("perplexity", f"{_perplexity(results)} of the codes")
    for name, units in results["active_units"].items():
        table.add_row("active units", f'{units["active"]} of {units["of"]} at "{name}"')
    for what, line in (*_diagnosed(results.get("diagnostics")), *_annealed(results.get("ais"))):
        table.add_row(what, line)
    out.print(table)
    if results.get("warning"):
        out.print(f"[yellow]warning:[/yellow] {results['warning']}")


def _diagnosed(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    if not found:
        return []
    rows = [
        (f'units of "{name}"', f"KL {_sum(site['kl'])}, information {_sum(site['mutual_information'])} nats in all")
        for name, site in found["information"].items()
    ]
    averaged = ", ".join(f'{count} at "{name}"' for name, count in found["active_units_averaged"].items())
    gap = found["posterior_gap"]
    lost = f"approximation {gap['approximation']:.2f}, amortisation {gap['amortisation']:.2f}"
    return [
        *rows,
        ("active, averaged", f"{averaged} (means over 64 draws of their parents)"),
        ("posterior gap", f"{gap['gap']:.2f}: L_{gap['num_particles']} {gap['iwae']:.2f}, log p {gap['log_p']:.2f}"),
        ("", f"log p - ELBO: {lost} nats ({gap['num_images']} images)"),
    ]


def _annealed(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    if not found:
        return []
    chains = f"{found['num_images']} images, {found['num_chains']} chains, {found['num_temperatures']:,} temperatures"
    importance = f"{found['importance_nll']:.2f} ± {found['importance_nll_std_error']:.2g}"
    return [
        ("NLL by AIS", f"{found['nll']:.2f} ± {found['nll_std_error']:.2g}; by importance sampling {importance}"),
        ("", f"{chains}, acceptance {found['acceptance']:.2f}"),
    ]


def _sum(values: Any) -> str:
    return f"{float(sum(values)):.1f}"


_KINDS = {
    "annealed": "with a partition function by annealing, whose mean error makes log p(x) too high",
    "exact": "exactly",
    "bound": "as a bound: the true NLL is at most that",
    "estimate": "by importance sampling",
}


def _nll(results: dict[str, Any]) -> str:
    """The figure and its error; a bound says so."""
    if results["likelihood_is"] is None:
        return "none"
    if results["likelihood_is"] == "bound":
        return f"≤ {results['nll']:.2f}"
    error = f" ± {results['nll_std_error']:.2g}" if results["nll_std_error"] else ""
    return f"{results['nll']:.2f}{error}"


def print_comparison(rows: list[tuple[str, dict[str, Any], dict[str, Any]]], out: Console) -> None:
    """One row per run: size, speed, reconstruction, log p(x), and how much of the latent space is in use."""
    caption = (
        "error: squared, per image; NLL: nats per image, \N{LESS-THAN OR EQUAL TO} marks a bound; "
        "in use: active units by layer, or the perplexity of the codes"
    )
    table = Table(caption=caption, caption_justify="left", box=None)
    for name in ("run", "data", "parameters", "s/epoch", "error", "test NLL", "in use"):
        left = name in ("run", "data", "in use")
        table.add_column(name, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    for name, config, results in rows:
        error, seconds = results.get("reconstruction_error"), results.get("seconds_per_epoch")
        table.add_row(
            name, _name_of_data(config.get("data", {})),
            f"{results.get('parameters', 0):,}",
            "" if seconds is None else f"{seconds:.1f}", "" if error is None else f"{error:.1f}", _nll(results),
            _use(results),
        )  # fmt: skip
    out.print(table)


def _name_of_data(data: dict[str, Any]) -> str:
    """Grey images are not bits: their NLL may be a density, and no figure of one compares with the other's."""
    grey = data.get("binarization") == "none" and not str(data.get("name")).startswith("codes:")
    return f"{data.get('name', '?')}{', grey' if grey else ''}"


def _use(results: dict[str, Any]) -> str:
    """Active units of every layer, or the perplexity of the codes."""
    if results.get("perplexity") is not None:
        return f"{_perplexity(results)} codes"
    return "+".join(str(units["active"]) for _, units in sorted(results["active_units"].items()))


def _perplexity(results: dict[str, Any]) -> str:
    """Of the codebook, or of each of them."""
    found = results["perplexity"]
    return ", ".join(f"{p:.0f}" for p in (found if isinstance(found, list) else [found]))


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2g}"


def compare(folders: Sequence[Path], out: Console) -> None:
    """A table of runs, one row each, from what their results.json say."""
    rows, base = [], Path(os.path.commonpath([folder.absolute().parent for folder in folders]))
    for folder in folders:
        run = runs.Run(folder)
        config, results = run.config(), run.results()
        if not results:
            raise datasets.DataError(f'the run "{folder}" has no {runs.RESULTS}: run pyrovae evaluate {folder}')
        rows.append((str(folder.absolute().relative_to(base)), config, results))
    print_comparison(rows, out)


def catalogue() -> dict[str, dict[str, str]]:
    """Models, objectives and data sets, with one line each."""
    return {
        "Models": {name: _first_line(cls) for name, cls in models.MODELS.items()}
        | {"my_module:MyPair": "Your own nn.Module with .model(x) and .guide(x)."},
        "Objectives": {name: _first_line(cls) for name, cls in objectives.OBJECTIVES.items()},
        "Data": dict(datasets.DATASETS),
    }


def _first_line(cls: type) -> str:
    return (inspect.getdoc(cls) or "").split("\n")[0]
