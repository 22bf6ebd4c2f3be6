"""The commands that write pages: a report on one run, a comparison of several."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from pyrovae import runs
from pyrovae.app.report.content import content
from pyrovae.app.report.figures import Series, overlaid
from pyrovae.app.report.gathered import Gathered, Notes
from pyrovae.app.report.given import NOTHING, Given, Programs, as_images
from pyrovae.app.report.pages import write
from pyrovae.app.tables import COLUMNS, LEFT, caption, compared_rows
from pyrovae.arguments import one_of, pick_device, positive_int

BOUNDS = {"bound": "Training bound", "validation_bound": "Validation bound"}  # in nats per datum


def report(
    run_dir: str | os.PathLike[str],
    data: object = None,
    *,
    pair: nn.Module | Programs | None = None,
    num_samples: int | None = None,
    output: str | os.PathLike[str] | None = None,
    checkpoint: str = "last",
    trust: bool = False,
) -> Path:
    """Write the page about a run that ``pyrovae report`` writes, with what a run made in Python does not say of itself.

    What a page lacks is said in it, and in a warning each.

    :param run_dir: a run of :func:`pyrovae.fit` or of the command line.
    :param data: the data to measure and to show, in any form that ``fit`` takes, or :class:`pyrovae.data.Splits`, of
        which it takes the test part; labels colour the latent plane, whether the pair takes them or not.
    :param pair: what the weights are loaded into where the run does not say how the pair is built again, as
        :func:`pyrovae.load` takes it: a module, or two programs.
    :param num_samples: measure log p(x) of all the data, with so many samples of each; by default of at most a thousand
        with a hundred, if nobody measured the run. Of a run made in Python, and data that it was not trained on, this
        is kept beside the page, as ``results.json``, which ``pyrovae compare`` reads.
    :param output: the page to write; ``report.html`` in the run.
    :param checkpoint: ``"last"`` or ``"best"``.
    :param trust: import the class that the run names, though it is not pyrovae's.
    :return: the page.
    :raises CheckpointError: a folder without a run, or weights of another pair.
    :raises DataError: data that the pair cannot take.

    >>> report("runs/mine", digits.test, num_samples=5000)  # doctest: +SKIP
    PosixPath('runs/mine/report.html')
    """
    count = None if num_samples is None else positive_int("num_samples", num_samples)
    given = Given(None if data is None else as_images(data), pair, count)
    page = None if output is None else Path(output)
    path, notes = written(Path(run_dir), page, checkpoint, None, "auto", trust, given)
    for note in notes:
        warnings.warn(f"{path}: {note}", stacklevel=2)
    return path


def report_of(
    folder: Path, *, output: Path | None, checkpoint: str, root: str | None, device: str, trust: bool, out: Console
) -> None:
    """Write the report on a run, and say what it lacks."""
    path, notes = written(folder, output, checkpoint, root, device, trust, NOTHING)
    for note in notes:
        out.print(f"note: {note}")
    out.print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


def written(
    folder: Path, output: Path | None, checkpoint: str, root: str | None, device: str, trust: bool, given: Given
) -> tuple[Path, Notes]:
    """The page, and what it lacks."""
    one_of("checkpoint", checkpoint, runs.CHECKPOINTS)
    place = pick_device(device)
    found = Gathered.of(folder, checkpoint=checkpoint, root=root, device=place, trust=trust, given=given)
    if output is None:
        found.run.check_files()
        if found.keeps and given.samples is not None:
            runs.write_json(folder / runs.RESULTS, found.results)
    path, page = output or folder / runs.REPORT, content(found)
    write("report.html", path, page=page)
    return path, page.notes


def compare(compared: Sequence[runs.Run], *, output: Path | None, out: Console) -> Path:
    """Write a page with the table of several runs, their bounds by epoch and minute, and where settings differ."""
    rows = compared_rows(compared, strict=False)
    notes, histories = Notes(), []
    for run, (name, *_) in zip(compared, rows, strict=True):
        with notes.missing(f'the curves of "{name}"'):
            histories.append((name, run.history()))
            if not any("bound" in row for row in histories[-1][1]):
                notes.add(f'"{name}" has no bound by epoch')
    drawn = [overlaid(series(histories, key), title) for key, title in BOUNDS.items()]
    base, here = Path(os.path.commonpath([run.path.absolute().parent for run in compared])), Path.cwd()
    path = output or (base.relative_to(here) if base.is_relative_to(here) else base) / runs.COMPARED
    given = {"rows": rows, "columns": COLUMNS, "left": LEFT, "caption": caption(rows), "notes": notes}
    write("compare.html", path, charts=drawn, differing=differing([run.config() for run in compared]), **given)
    out.print(f"wrote {path}")
    return path


def series(histories: Sequence[tuple[str, list[dict[str, Any]]]], key: str) -> list[Series]:
    """What is drawn of each run that has such a figure, by epoch and by minutes of training."""
    drawn = []
    for name, history in histories:
        line, seconds = Series(name, [], [], []), 0.0
        for epoch, row in enumerate(history, 1):
            seconds += float(row.get("seconds") or 0.0)
            if isinstance(value := row.get(key), int | float):
                line.epochs.append(int(row.get("epoch", epoch)))
                line.minutes.append(seconds / 60)
                line.values.append(float(value))
        drawn += [line] if line.values else []
    return drawn


def differing(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The settings that are not the same in all runs that have them, each with its value in every one."""
    flat = [flattened({k: c.get(k) for k in ("model", "objective", "data", "training")}) for c in configs]
    names = dict.fromkeys(name for one in flat for name in one)
    shown = {name: [str(one[name]) if name in one else "\N{EN DASH}" for one in flat] for name in names}
    return [(name, values) for name, values in shown.items() if len({*values} - {"\N{EN DASH}"}) > 1]


def flattened(given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        inner = flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
        found |= inner
    return {name.replace(".arguments.", "."): plain(value) for name, value in found.items()}


def plain(value: object) -> object:
    """A class without the package that it is from."""
    return value.rpartition(":")[2] if isinstance(value, str) and value.startswith("pyrovae.") else value
