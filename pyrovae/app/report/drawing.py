"""What is drawn for a page: images as data, figures as SVG that takes its colours from the page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor
from torch.nn.functional import avg_pool2d

from pyrovae.plots.charts import BLUE, IDLE, ORANGE
from pyrovae.plots.images import INK, LINES, MUTED, rgb

LARGEST = 128  # pixels of a side
SMALL = 64 * 64  # pixels, from which on an image is written as a photograph is
INCHES = 3.6, 2.4  # of a chart that stands beside others
VARIABLES = {INK: "ink", MUTED: "muted", LINES: "lines", BLUE: "accent", ORANGE: "second", IDLE: "idle"}


def pictures(images: Tensor) -> list[str]:
    """Images ``[N, H, W]`` or ``[N, C, H, W]`` as data URIs, one each; large ones made smaller."""
    if (factor := math.ceil(max(images.shape[-2:]) / LARGEST)) > 1:
        images = avg_pool2d(images.float(), factor)
    return [data_uri(pixels) for pixels in rgb(images, "images")]


def data_uri(pixels: np.ndarray) -> str:
    """8-bit RGB ``[H, W, 3]``, as a PNG where it is small."""
    kind, file = ("png" if pixels.shape[0] * pixels.shape[1] <= SMALL else "jpeg"), io.BytesIO()
    if kind == "png":
        imsave(file, pixels, format="png")
    else:
        imsave(file, pixels, format="jpeg", pil_kwargs={"quality": 88})
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def chart(figure: Figure, label: str) -> Markup:
    """A figure as inline SVG, as wide as there is room; ``label`` is what a screen reader says."""
    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    head, body = text.split(">", 1)
    box = head.split('viewBox="')[1].split('"')[0]
    for colour, name in VARIABLES.items():
        body = body.replace(colour, f"var(--{name})")
    width = float(box.split()[2])
    opening = f'<svg viewBox="{box}" style="max-width:{width:.0f}pt" role="img" aria-label="{escape(label)}">'
    return Markup(opening + body)  # matplotlib escapes what it writes


def spread(items: Iterable[int], most: int) -> list[int]:
    """At most so many of some numbers, evenly spaced, the first and last among them."""
    given = list(items)
    if len(given) <= most:
        return given
    return [given[round(i)] for i in np.linspace(0, len(given) - 1, most)]
