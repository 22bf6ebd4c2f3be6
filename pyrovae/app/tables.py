"""Results: what is measured of a run, and as tables."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pyrovae import data as datasets
from pyrovae import models, objectives, runs
from pyrovae.app.results import Diagnostics, Results, belongs, kept_results
from pyrovae.app.settings import CODES
from pyrovae.engine.programs import warn

#: How an NLL was found, where it is no estimate by importance sampling.
KINDS = {
    "annealed": "with a partition function by annealing, whose mean error makes log p(x) too high",
    "exact": "exactly",
    "bound": "as a bound: the true NLL is at most that",
}

Row = tuple[str, ...]


def print_results(results: Results, out: Console) -> None:
    """Test NLL with its standard error, active units, and a warning where the figure cannot be trusted."""
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    rows, units = likelihood_rows(results), results["active_units"]
    rows += [("checkpoint", results["checkpoint"])] if of_checkpoint(results) else []
    if results["reconstruction_error"] is not None:
        rows.append(("reconstruction", f"squared error {results['reconstruction_error']:.3g} per {datum(results)}"))
    if results.get("accuracy") is not None:
        rows.append(("accuracy", f"{results['accuracy']:.2%}"))
    if results.get("perplexity") is not None:
        rows.append(("perplexity", f"{perplexity(results)} of the codes"))
    rows += [("active units", f'{unit["active"]} of {unit["of"]} at "{name}"') for name, unit in units.items()]
    if "diagnostics" in results:
        rows += diagnosed_rows(results["diagnostics"], counted(results))
    if "ais" in results:
        found = results["ais"]
        effective = f", median ESS {found['median_ess']:.0f}" if "median_ess" in found else ""
        chains = f"{found['num_images']} {counted(results)}, {found['num_chains']} chains{effective}"
        importance = f"by importance sampling {found['importance_nll']:.2f} ± {found['importance_nll_std_error']:.2g}"
        rows.append(("NLL by AIS", f"{found['nll']:.2f} ± {found['nll_std_error']:.2g}; {importance}"))
        rows.append(("", f"{chains}, {found['num_temperatures']:,} temperatures, acceptance {found['acceptance']:.2f}"))
    for row in rows:
        table.add_row(*row)
    out.print(table)
    if results.get("warning"):
        out.print(Text.assemble(("warning:", "yellow"), f" {results['warning']}"))


def likelihood_rows(results: Results) -> list[Row]:
    """The NLL, its errors, and how it was measured."""
    kind = results["likelihood_is"]
    if kind is None:
        return [("test NLL", "none: not a generative model, it has no log p(x)")]
    error, number = results["nll_data_std_error"], f"{results['num_images']:,} {counted(results)}"
    over = f"± {'n/a' if error is None or math.isnan(error) else f'{error:.2g}'} over {counted(results)}"
    bits = f"{results['bits_per_dim']:z.4f} bits/dim; " if "bits_per_dim" in results else ""
    rows = [("test NLL", f"{nll(results)} nats per {datum(results)}"), ("", f"{bits}{over}")]
    if kind in KINDS:
        return [*rows, ("measured", f"{KINDS[kind]}, {number}")]
    criterion = results.get("criterion", "Pareto k > 0.7")
    reliability = (
        f"median ESS {results['median_ess']:.0f}, {criterion} for {results['unreliable']:.1%} of {counted(results)}"
    )
    return [*rows, ("measured with", f"{results['num_samples']:,} samples, {number}"), ("", reliability)]


def diagnosed_rows(found: Diagnostics, noun: str) -> list[Row]:
    """What the units carry, and where the bound is lost."""
    rows = []
    for name, site in found["information"].items():
        kl, information = sum(site["kl"]), sum(site["mutual_information"])
        rows.append((f'units of "{name}"', f"KL {kl:.1f}, information {information:.1f} nats in all"))
    averaged = ", ".join(f'{count} at "{name}"' for name, count in found["active_units_averaged"].items())
    gap = found["posterior_gap"]
    lost = f"approximation {gap['approximation']:.2f}, amortisation {gap['amortisation']:.2f}"
    bounds = f"L_{gap['num_particles']} {gap['iwae']:.2f}, log p {gap['log_p']:.2f}"
    rows.append(("active, averaged", f"{averaged} (means over 64 draws of their parents)"))
    rows.append(("posterior gap", f"{gap['gap']:.2f}: {bounds}"))
    return [*rows, ("", f"log p - ELBO: {lost} nats ({gap['num_images']} {noun})")]


def counted(results: Results) -> str:
    """What was measured on, in the plural."""
    return results.get("counted", "data")


def datum(results: Results) -> str:
    """The same in the singular."""
    return {"images": "image"}.get(counted(results), "datum")


def nll(results: Results) -> str:
    """The NLL and its error; a bound says so."""
    if results["likelihood_is"] is None:
        return "none"
    if results["likelihood_is"] == "bound":
        return f"≤ {results['nll']:z.2f}"
    error = f" ± {results['nll_std_error']:.2g}" if results["nll_std_error"] else ""
    return f"{results['nll']:z.2f}{error}"


def perplexity(results: Results) -> str:
    """Of the codebook, or of each of them."""
    found = results["perplexity"]
    return ", ".join(f"{p:.0f}" for p in (found if isinstance(found, list) else [found]))


COLUMNS = ("run", "data", "parameters", "s/epoch", "error", "test NLL", "in use")
LEFT = {"run", "data", "in use"}  # the columns of text
#: What is said below a table of runs of what stands in it.
SAID = {
    "": "error: squared, per datum; NLL: nats per datum; in use: active units by layer",
    " codes": "codes: their perplexity",
    "\N{LESS-THAN OR EQUAL TO} ": "\N{LESS-THAN OR EQUAL TO}: a bound",
    "stale": "stale: of other weights than are there, pyrovae evaluate measures anew",
    " (best)": "(best): of that checkpoint, all else of the last",
}


def caption(rows: Sequence[Row]) -> str:
    """What the figures of a table of runs mean."""
    return "; ".join(said for mark, said in SAID.items() if any(mark in cell for row in rows for cell in row))


def compare(compared: Sequence[runs.Run], out: Console, *, strict: bool = True) -> None:
    """A table of runs, one row each, from what their results.json say.

    Size, speed, reconstruction, log p(x), and how much of the latent space is in use.

    :param strict: refuse a run that was not measured, instead of saying so in its row.
    """
    rows = compared_rows(compared, strict=strict)
    table = Table(caption=caption(rows), caption_justify="left", box=None)
    for name in COLUMNS:
        left = name in LEFT
        table.add_column(name, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    for row in rows:
        table.add_row(*row)
    out.print(table)


def compared_rows(compared: Sequence[runs.Run], *, strict: bool = True) -> list[Row]:
    """What :func:`compare` says of each run."""
    base, rows = Path(os.path.commonpath([run.path.absolute().parent for run in compared])), list[Row]()
    for run in compared:
        folder = run.path
        data, results = run.config().get("data", {}), kept_results(run)
        if results is None and strict:
            by_command = "settings" in run.config()
            fix = (
                f"run pyrovae evaluate {folder}" if by_command else f'run pv.report("{folder}", data, num_samples=5000)'
            )
            raise datasets.DataError(f'the run "{folder}" has no {runs.RESULTS}: {fix}')
        # Grey images are not bits: their NLL may be a density, and no figure of one compares with the other's.
        grey = data.get("binarization") == "none" and not str(data.get("name")).startswith(CODES)
        name, what = str(folder.absolute().relative_to(base)), f"{data.get('name', '?')}{', grey' if grey else ''}"
        if results is None:
            rows.append((name, what, "", "", "", "not measured", ""))
            continue
        seconds = results.get("seconds_per_epoch")
        rows.append((
            f"{name}{of_checkpoint(results)}", what, f"{results.get('parameters', 0):,}",
            "" if seconds is None else f"{seconds:.1f}", *figures(results, belongs(results, run)),
        ))  # fmt: skip
        if "weights" not in results:
            warn(
                f'"{folder}" does not say which weights its results are of, it may have been trained on since: run '
                f"pyrovae evaluate {folder}"
            )
    return rows


def of_checkpoint(results: Results) -> str:
    """Which checkpoint was measured, where that is not the last one."""
    name = results.get("checkpoint", "last")
    return "" if name == "last" else f" ({name})"


def figures(results: Results, current: bool) -> Row:
    """What was measured, for :func:`compare`: error, NLL and use, or that this was of other weights."""
    if "weights" in results and not current:
        return ("", "stale", "")
    error, active = results.get("reconstruction_error"), results["active_units"]
    used = "+".join(str(units["active"]) for _, units in sorted(active.items()))
    codes = f"{perplexity(results)} codes" if results.get("perplexity") is not None else used
    return ("" if error is None else f"{error:.1f}", nll(results), codes)


def catalogue(out: Console) -> None:
    """Models, objectives and data sets, with one line each."""
    zoo = {**models.MODELS, "my_module:MyPair": "Your own nn.Module with .model(x) and .guide(x)."}
    listed: dict[str, Mapping[str, object]]
    listed = {"Models": zoo, "Objectives": objectives.OBJECTIVES, "Data": datasets.DATASETS}
    for title, rows in listed.items():
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
        table.add_column(style="cyan", no_wrap=True)
        for name, what in rows.items():
            table.add_row(name, what if isinstance(what, str) else (inspect.getdoc(what) or "").split("\n")[0])
        out.print(table, "")
