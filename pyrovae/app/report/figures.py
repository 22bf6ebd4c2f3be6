"""The charts of a report: training, units, likelihoods, codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pyrovae.app.report.drawing import INCHES, chart
from pyrovae.plots.charts import (
    BLUE,
    IDLE,
    ORANGE,
    PANELS,
    add_legend,
    class_colours,
    dress,
    fit_axis,
    histogram,
    lines_of,
    new_figure,
    scatter,
)

FEW = 12  # units that have a line each; more are a picture


class Drawn(NamedTuple):
    """A chart, and what it shows in a line."""

    title: str
    chart: Markup
    wide: bool = False


def curves(history: Sequence[Mapping[str, Any]]) -> list[Drawn]:
    """Training epoch by epoch, a chart for each of the panels of :func:`pyrovae.plots.curves`."""
    drawn = []
    for title, keys in PANELS:
        if lines := lines_of(history, keys):
            figure = new_figure(*INCHES)
            axes = dress(figure.add_subplot(), x="epoch")
            colours = [BLUE, ORANGE] if len(lines) <= 2 else class_colours(len(lines))
            for (name, x, y), colour in zip(lines, colours, strict=False):
                marker = "o" if len(x) < 3 else None
                axes.plot(x, y, color=colour, linewidth=1.6, label=name, marker=marker, markersize=4)
            fit_axis(axes, title, lines)
            if len(lines) > 1:
                add_legend(axes)
            plain = title.replace("$\\log p(x|z)$", "log p(x | z)")
            drawn.append(Drawn(plain, chart(figure, f"{plain}, by epoch")))
    return drawn


def units(history: Sequence[Mapping[str, Any]], active: Mapping[str, Tensor]) -> list[Drawn]:
    """For each site the KL of its units now, those not active in grey, and as it came about.

    :param active: by site, which units are.
    """
    drawn = []
    for site in history[-1].get("kl_per_unit", {}) if history else ():
        rows = [row for row in history if len(row.get("kl_per_unit", {}).get(site, ())) > 0]
        kl = np.array([row["kl_per_unit"][site] for row in rows], dtype=float).reshape(len(rows), -1)
        order, count = np.argsort(-kl[-1], kind="stable"), kl.shape[1]
        figure = new_figure(*INCHES)
        axes = dress(figure.add_subplot(), x=f'unit of "{site}", by KL', y="nats", grid="y")
        on = active[site].flatten().numpy() if site in active and active[site].numel() == count else kl[-1] > 0.01
        axes.bar(np.arange(count), kl[-1][order], color=list(np.where(on[order], BLUE, IDLE)), width=0.8)
        middle, half = (count - 1) / 2, max(count, FEW / 2) / 2 + 0.1  # so that few bars are no walls
        axes.set_xlim(middle - half, middle + half)
        axes.set_xticks(np.arange(count) if count <= 20 else [], [str(unit) for unit in order] if count <= 20 else [])
        said = f'KL of each unit of "{site}": {int(on.sum())} of {count} are active'
        drawn.append(Drawn(said, chart(figure, said)))
        if len(rows) > 1:
            epochs = [row.get("epoch", i + 1) for i, row in enumerate(rows)]
            said = f'How the units of "{site}" came to carry it'
            figure = new_figure(*INCHES)
            axes = dress(figure.add_subplot(), x="epoch", y="nats" if count <= FEW else "unit, by KL")
            develop(axes, epochs, kl[:, order], order)
            drawn.append(Drawn(said, chart(figure, f"{said}, by epoch")))
    return drawn


def develop(axes: Axes, epochs: Sequence[int], kl: np.ndarray, order: np.ndarray) -> None:
    """The KL of units over epochs: a line for each of few, a row of colours for each of many."""
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if kl.shape[1] <= FEW:
        for i, unit in enumerate(order):
            axes.plot(epochs, kl[:, i], color=class_colours(len(order))[i], linewidth=1.2, label=str(unit))
        add_legend(axes, beside=True)
        return
    axes.grid(False)
    extent = (epochs[0] - 0.5, epochs[-1] + 0.5, kl.shape[1] - 0.5, -0.5)
    image = axes.imshow(kl.T, aspect="auto", cmap="viridis", extent=extent, interpolation="nearest", vmin=0)
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.05)  # type: ignore[union-attr]
    bar.outline.set_visible(False)  # type: ignore[operator]
    dress(bar.ax, y="nats", grid="")


def likelihoods(log_prob: Tensor) -> Drawn:
    """How log p(x) is spread over data."""
    figure = new_figure(*INCHES)
    axes = dress(figure.add_subplot(), x="log p(x), nats", y="data", grid="y")
    values = log_prob.numpy()
    axes.hist(values, bins=min(50, max(10, len(values) // 15)), color=BLUE)
    axes.axvline(values.mean(), color=ORANGE, linewidth=1.4)
    said = f"log p(x) of {len(values):,} test data; the line is their mean"
    return Drawn(said, chart(figure, said))


def plane(codes: Tensor, labels: Tensor | None) -> Drawn:
    """Codes in the plane of the two units that vary most, coloured by label."""
    figure = new_figure(4.8, 3.8)
    axes, names = figure.add_subplot(), None if labels is None else labels.numpy()
    if codes.shape[1] == 1:
        histogram(axes, codes[:, 0].numpy(), names)
    else:
        scatter(axes, codes.numpy(), names)
        for points in axes.collections:
            points.set_rasterized(len(points.get_offsets()) > 0)  # type: ignore[arg-type]
    coloured = "" if labels is None else ", coloured by label"
    said = f"Codes of {len(codes):,} test data{coloured}"
    return Drawn(said, chart(figure, said))


def codebook(counts: Tensor) -> Drawn:
    """How often each code is used, the most used first."""
    figure = new_figure(*INCHES)
    axes = dress(figure.add_subplot(), x="code, by use", y="share", grid="y")
    share = (counts / counts.sum()).sort(descending=True).values.numpy()
    axes.fill_between(np.arange(len(share)), share, step="mid", color=BLUE, linewidth=0)
    axes.axhline(1 / len(share), color=ORANGE, linewidth=1.2, linestyle="--")
    axes.margins(x=0.01)
    axes.set_ylim(bottom=0)
    used = int((counts > 0).sum())
    said = f"Use of the codebook: {used:,} of {len(share):,} codes occur; the dashed line is equal use"
    return Drawn(said, chart(figure, said))


class Series(NamedTuple):
    """One run among several: epochs, minutes and a figure of each epoch."""

    name: str
    epochs: list[int]
    minutes: list[float]
    values: list[float]


def overlaid(series: Sequence[Series], title: str) -> list[Drawn]:
    """A figure of several runs, against epochs and against minutes; nothing without any."""
    drawn: list[Drawn] = []
    if not series:
        return drawn
    for over, attribute in (("epoch", "epochs"), ("minutes of training", "minutes")):
        figure = new_figure(5.4, 3.2)
        axes = dress(figure.add_subplot(), x=over, y="nats")
        for line, colour in zip(series, class_colours(len(series)), strict=True):
            axes.plot(getattr(line, attribute), line.values, color=colour, linewidth=1.6, label=line.name)
        fit_axis(axes, "bound", [(s.name, getattr(s, attribute), s.values) for s in series])
        if over != "epoch":
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.set_xlim(left=0)
        add_legend(axes)
        drawn.append(Drawn(f"{title}, by {over}", chart(figure, f"{title} of {len(series)} runs, by {over}")))
    return drawn
