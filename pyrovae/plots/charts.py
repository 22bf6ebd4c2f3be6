"""Charts of training and of latent spaces."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, cast

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from pyrovae.arguments import positive_int, sizes
from pyrovae.engine.programs import evaluating, held_by
from pyrovae.plots.images import DPI, GAP, INK, LINES, MUTED, Picture, StrPath, as_numpy, mosaic, rgb, save

BLUE, ORANGE, IDLE = "#2f6796", "#d0743c", "#c9ccd2"
MAX_NAMED = 20  # classes with a colour and a legend entry each; beyond, a colour bar


def curves(history: Sequence[Mapping[str, object]], path: StrPath | None = None) -> Figure:
    """Training epoch by epoch: the bound, reconstruction and KL, active units, and the gradient's norm.

    :param history: one dict per epoch, as of :class:`pyrovae.Fit`; keys that are missing are left out, as is a
        panel without any. A value may be a number, or a dict of numbers by site.
    :param path: a PNG to write as well.
    """
    if not history:
        raise ValueError("history is empty: pass one dict per epoch")
    panels = [(title, lines) for title, keys in PANELS if (lines := lines_of(history, keys))]
    if not panels:
        raise ValueError(f"history has nothing to draw, only {', '.join(map(str, history[0]))}: pass Fit.history")
    columns = min(len(panels), 2 if len(panels) in (2, 4) else 3)
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(3.6 * columns, 2.6 * rows)
    for i, (title, lines) in enumerate(panels):
        axes = dress(figure.add_subplot(rows, columns, i + 1), title=title, x="epoch")
        colours = [BLUE, ORANGE] if len(lines) <= 2 else class_colours(len(lines))
        for (name, x, y), colour in zip(lines, colours, strict=False):
            axes.plot(x, y, color=colour, linewidth=1.6, label=name, marker="o" if len(x) < 3 else None, markersize=4)
        fit_axis(axes, title, lines)
        if len(lines) > 1:
            add_legend(axes)
    return save(figure, path)


def has_curves(history: Sequence[Mapping[str, object]]) -> bool:
    """Whether :func:`curves` finds anything to draw."""
    return any(lines_of(history, keys) for _, keys in PANELS)


def latent_plane(means: Tensor, path: StrPath | None = None, *, labels: Tensor | None = None) -> Figure:
    """Posterior means as points in the plane, coloured by label.

    :param means: ``[N, D]``. With D = 2 both units are drawn; with D > 2 the two whose means vary most, which the axes
        name; with D = 1 a histogram.
    :param path: a PNG to write as well.
    :param labels: ``[N]`` integers.
    :raises ValueError: means that are not ``[N, D]``, or labels that are not ``[N]``.
    """
    points = as_numpy(means)
    if points.ndim != 2 or not points.size:
        raise ValueError(
            f"means must be [N, D], got {tuple(points.shape)}: flatten every datum's latents to one vector"
        )
    classes = None if labels is None else as_numpy(labels)
    if classes is not None and classes.shape != points.shape[:1]:
        raise ValueError(f"labels must be [{len(points)}], one per row of means, got {tuple(classes.shape)}")
    figure = new_figure(5.4 if classes is not None else 4.8, 4.6)
    axes = figure.add_subplot()
    if points.shape[1] == 1:
        histogram(axes, points[:, 0], classes)
    else:
        scatter(axes, points, classes)
    return save(figure, path)


def unit_activity(
    kl_per_unit: Tensor, variances: Tensor, path: StrPath | None = None, *, threshold: float = 0.01
) -> Figure:
    """Latent units sorted by their KL: how many nats each carries, and the variance of its posterior mean over data.

    :param kl_per_unit: ``[D]``, nats per datum.
    :param variances: ``[D]``, as of :func:`pyrovae.active_units`.
    :param path: a PNG to write as well.
    :param threshold: units whose variance exceeds it are called active and drawn in colour.
    """
    kl, variance = as_numpy(torch.as_tensor(kl_per_unit)), as_numpy(torch.as_tensor(variances))
    if kl.ndim != 1 or kl.shape != variance.shape or not kl.size:
        raise ValueError(
            f"kl_per_unit and variances must both be [D], got {tuple(kl.shape)} and {tuple(variance.shape)}: "
            "pass one number per latent unit"
        )
    order = np.argsort(-kl, kind="stable")
    active = variance[order] > threshold
    floor = max(threshold / 1000, variance.min() / 2)  # where the logarithmic axis ends: a variance may be 0
    figure = new_figure(7.2, 4.4)
    top, bottom = figure.subplots(2, 1, sharex=True)
    for axes, height, title in (
        (top, kl[order], f"KL, nats ({kl.sum():.1f} in all)"),
        (bottom, variance[order].clip(floor), f"variance of the posterior mean ({active.sum()} of {len(kl)} active)"),
    ):
        dress(axes, title=title, grid="y").margins(x=0.01)
        axes.bar(np.arange(len(kl)), height, color=list(np.where(active, BLUE, IDLE)), width=0.8)
    bottom.set_yscale("log")
    bottom.set_ylim(bottom=floor)
    bottom.axhline(threshold, color=ORANGE, linewidth=1, linestyle="--")
    bottom.set_xlabel("latent unit, by KL", fontsize=9, color=MUTED)
    bottom.set_xticks(*((np.arange(len(kl)), order) if len(kl) <= 30 else ([],)))
    return save(figure, path)


PANELS: tuple[tuple[str, dict[str, str]], ...] = (
    ("bound, nats per datum", {"bound": "train", "validation_bound": "validation"}),
    ("reconstruction $\\log p(x|z)$, nats", {"reconstruction": ""}),
    ("KL, nats", {"kl": ""}),
    ("active units", {"active_units": ""}),
    ("perplexity of the codes", {"perplexity": ""}),
    ("pseudo-likelihood, nats", {"pseudo_log_likelihood": ""}),
    ("reconstruction, squared error", {"reconstruction_error": ""}),
    ("gradient norm", {"grad_norm": ""}),
)
Line = tuple[str, list[float], list[float]]


def lines_of(history: Sequence[Mapping[str, object]], keys: Mapping[str, str]) -> list[Line]:
    """What is drawn in one panel: for each key, and each site where values are given by site, the name, x and y."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for i, row in enumerate(history):
        for key, name in keys.items():
            value = row.get(key)
            by_site = value if isinstance(value, Mapping) else {name: value}
            for site, number in by_site.items():
                if isinstance(number, int | float):
                    x, y = found.setdefault(site, ([], []))
                    x.append(cast(int, row.get("epoch", i + 1)))
                    y.append(float(number))
    return [(name, x, y) for name, (x, y) in found.items()]


def fit_axis(axes: Axes, title: str, lines: list[Line]) -> None:
    """Ticks and limits of a panel, by what it shows."""
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if len({epoch for _, x, _ in lines for epoch in x}) == 1:
        axes.set_xlim(lines[0][1][0] - 1, lines[0][1][0] + 1)
    values = np.concatenate([y for _, _, y in lines])
    values = values[np.isfinite(values)]
    if title == "gradient norm" and (values > 0).any():
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
    if title == "active units":
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_ylim(bottom=0)
    if title.startswith(("bound", "reconstruction")) and len(values) >= 20:
        # The first epochs, far below all others, would flatten the part that one wants to compare.
        low, high = np.quantile(values, 0.05), values.max()
        if high > low:
            axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))


def plain_ticks(axis: Axis) -> None:
    """1, 2, 5, 10 ... along a logarithmic axis, as they are; within a decade, round values as on other axes."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 10 * low else MaxNLocator(5))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def scatter(axes: Axes, points: np.ndarray, classes: np.ndarray | None) -> None:
    """Points in the plane of the two units that vary most, coloured by class."""
    variances = points.var(0)
    # The two of largest variance, in their own order: units 3 and 7, not 7 and 3.
    first, second = sorted(np.argsort(-variances, kind="stable")[:2])
    across, along = (
        f"unit {i} (variance {variances[i]:#.2g})" if len(variances) > 2 else f"unit {i}" for i in (first, second)
    )
    title = f"the two of {len(variances)} units that vary most" if len(variances) > 2 else ""
    dress(axes, title=title, x=across, y=along)
    # Shuffled, so that no class covers another only because it comes later in the data.
    order = np.random.RandomState(0).permutation(len(points))
    draw_points(axes, points[order, first], points[order, second], None if classes is None else classes[order])
    # Equal scales in a square: were limits to follow from the layout, it would not know how wide their ticks are.
    limits = np.array([axes.get_xlim(), axes.get_ylim()])
    (x, y), reach = limits.mean(1), np.ptp(limits, 1).max() / 2
    axes.set(box_aspect=1, xlim=(x - reach, x + reach), ylim=(y - reach, y + reach))


def draw_points(axes: Axes, x: np.ndarray, y: np.ndarray, classes: np.ndarray | None) -> None:
    """Points in the colours of their classes, and what says which is which."""
    size = float(np.clip(12_000 / len(x), 1.5, 14))
    if classes is None:
        axes.scatter(x, y, s=size, color=BLUE, alpha=0.6, linewidths=0)
        return
    names, index = np.unique(classes, return_inverse=True)
    if len(names) > MAX_NAMED:
        drawn = axes.scatter(x, y, s=size, c=classes, cmap="viridis", alpha=0.7, linewidths=0)
        bar = axes.figure.colorbar(drawn, ax=axes, fraction=0.04)
        bar.outline.set_visible(False)
        dress(bar.ax, y="label", grid="")
        return
    colours = np.array(class_colours(len(names)))
    axes.scatter(x, y, s=size, color=colours[index], alpha=0.75, linewidths=0)
    for name, colour in zip(names, colours, strict=True):
        axes.scatter([], [], s=24, color=colour, linewidths=0, label=str(name))
    add_legend(axes, beside=True)


def histogram(axes: Axes, values: np.ndarray, classes: np.ndarray | None) -> None:
    """Values of one unit, stacked by class."""
    dress(axes, x="unit 0", y="data", grid="y")
    bins = np.histogram_bin_edges(values, bins=min(60, max(10, round(math.sqrt(len(values)))))).tolist()
    names = [] if classes is None else list(np.unique(classes))
    if classes is None or len(names) > MAX_NAMED:
        axes.hist(values, bins=bins, color=BLUE)
        return
    parts = [values[classes == name] for name in names]
    axes.hist(parts, bins=bins, stacked=True, color=class_colours(len(names)), label=list(map(str, names)))
    add_legend(axes, beside=True)


def class_colours(count: int) -> list[tuple[float, float, float, float]]:
    """A colour for each class, or line."""
    palette = mpl.colormaps["tab10" if count <= 10 else "tab20"]
    return [palette(i % palette.N) for i in range(count)]


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches, apart from pyplot's."""
    return Picture(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def dress(axes: Axes, *, title: str = "", x: str = "", y: str = "", grid: Literal["both", "y", ""] = "both") -> Axes:
    """Thin grey lines, small muted type, no box."""
    for side, spine in axes.spines.items():
        spine.set_visible(bool(grid) and side in ("left", "bottom"))
        spine.set_color(IDLE)
    axes.tick_params(which="both", colors=MUTED, labelsize=8, length=0)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=LINES, linewidth=0.7)
    if title:
        axes.set_title(title, fontsize=9, color=INK, loc="left")
    axes.set_xlabel(x, fontsize=9, color=MUTED)
    axes.set_ylabel(y, fontsize=9, color=MUTED)
    return axes


def add_legend(axes: Axes, *, beside: bool = False) -> None:
    """A legend without a box, in small type; to the right of the axes, or where it hides least."""
    axes.legend(
        loc="center left" if beside else "best", bbox_to_anchor=(1.01, 0.5) if beside else None,
        frameon=False, fontsize=8, labelcolor=INK, handletextpad=0.4, borderaxespad=0.3,
    )  # fmt: skip


def manifold(
    decode: Callable[[Tensor], Tensor],
    path: StrPath | None = None,
    *,
    latent_dim: int = 2,
    event_shape: Sequence[int],
    steps: int = 20,
    smooth: bool = False,
) -> Figure:
    """What the decoder makes of a square of latents, spaced so that the prior N(0, I) gives every cell the same mass.

    :param decode: ``[N, latent_dim]`` to ``[N, *event_shape]``, such as ``vae.decode``.
    :param path: a PNG to write as well.
    :param latent_dim: number of latent units; those after the second are held at 0.
    :param event_shape: shape of an image, ``(H, W)`` or ``(C, H, W)``.
    :param steps: images per side.
    :param smooth: enlarge by cubic interpolation and leave gaps: images of few pixels run into each other without.
    """
    latent_dim, steps = positive_int("latent_dim", latent_dim, minimum=2), positive_int("steps", steps, minimum=2)
    event_shape = sizes("event_shape", event_shape)
    levels = torch.special.ndtri((torch.arange(steps, dtype=torch.float64) + 0.5) / steps)
    up, right = torch.meshgrid(levels.flip(0), levels, indexing="ij")
    z = torch.zeros(steps * steps, latent_dim, dtype=torch.float64)
    z[:, 0], z[:, 1] = right.flatten(), up.flatten()
    parameter = next((tensor for tensor in held_by(decode) if tensor.is_floating_point()), torch.empty(0))
    with torch.no_grad(), evaluating(decode):
        images = decode(z.to(parameter.device, parameter.dtype))
    pixels = rgb(images.reshape(len(z), *event_shape), "what decode returns")
    figure = new_figure(6.4, 6.4)
    axes = dress(figure.add_subplot(), x="unit 0", y="unit 1", grid="")
    axes.imshow(mosaic(pixels, steps, gap=GAP if smooth else 0, smooth=smooth), extent=(0, 1, 0, 1), aspect="auto")
    axes.set_box_aspect(event_shape[-2] / event_shape[-1])
    ticks = [-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5]
    mass = torch.special.ndtr(torch.tensor(ticks)).tolist()
    names = [f"{tick:g}".replace("-", "\N{MINUS SIGN}") for tick in ticks]
    axes.set_xticks(mass, names)
    axes.set_yticks(mass, names)
    if latent_dim > 2:
        axes.set_title(f"two of {latent_dim} latent units, the others at 0", fontsize=9, color=INK, loc="left")
    return save(figure, path)
