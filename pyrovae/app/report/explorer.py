"""The latent explorer: what the page needs to decode any code, and to show where the data lie."""

from __future__ import annotations

import base64
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrovae.app.report.decoder import Decode, Decoder, NotInPage
from pyrovae.app.report.drawing import pictures, spread
from pyrovae.app.report.gathered import Gathered
from pyrovae.engine.programs import device_of
from pyrovae.models.base import Pair

UNITS, POINTS, STARTS, TRIED = 12, 1500, 10, 64  # sliders; data in the plane; data to begin at; codes tried, twice
SIDE, STEPS = 15, 11  # of the grid in place of an explorer: images a side of a plane, or along a unit


class Codes:
    """The codes of data, ``[N, D]``, those of attributes with the attributes as further units.

    :ivar units: the most active ones: those whose codes vary most over the data.
    :raises ValueError: a pair without such codes.
    """

    def __init__(self, found: Gathered) -> None:
        pair = found.pair
        if pair is None or not pair.decodes or not found.shown:
            raise ValueError("only a model that decodes codes into images can be explored")
        self.images, *given = found.columns(POINTS)
        place = device_of(pair.model) or self.images.device
        with torch.no_grad():
            codes = pair.encode(self.images.to(place), *(y.to(place) for y in given)).cpu()
        if codes.dim() != 2 or not codes.is_floating_point():
            raise ValueError(f"a code is no vector of units here, but of shape {tuple(codes.shape[1:])}")
        self.size, self.pair = codes.shape[1], pair
        self.labels = found.labels[: len(codes)] if found.labels is not None else next(iter(given), None)
        attributes = pair.conditional and pair.num_classes is None
        self.all = torch.cat([codes, *given], -1) if attributes else codes
        self.classes = pair.num_classes if pair.conditional and not attributes else None
        order = self.all[:, : self.size].var(0).argsort(descending=True, stable=True)[:UNITS].tolist()
        self.units = sorted(order[:2]) + order[2:] + list(range(self.size, self.all.shape[1]))
        low, high = self.all.quantile(0.005, 0), self.all.quantile(0.995, 0)
        room = torch.where(high - low > 1e-3, 0.15 * (high - low), 2.0)  # of one that is always the same, as it may be
        self.low, self.high = low - room, high + room

    def ways(self) -> list[Decode]:
        """How to decode, by label."""
        pair = self.pair.cpu()
        if self.pair.conditional and self.classes is None:
            return [lambda code: pair.decode(code[:, : self.size], code[:, self.size :])]
        if self.classes is None:
            return [pair.decode]
        return [partial(decode_as, pair, torch.tensor([y])) for y in range(self.classes)]

    def tried(self) -> Tensor:
        """Codes as the page may ask for: some of data, and others that lie anywhere between the ends of the units."""
        some = self.all[:TRIED]
        moved, place = some.clone(), torch.rand(some.shape, generator=torch.Generator().manual_seed(0))
        moved[:, self.units] = (self.low + place * (self.high - self.low))[:, self.units]
        return torch.cat([some, moved])

    def name(self, unit: int) -> str:
        """What a unit is called."""
        return f"unit {unit}" if unit < self.size else f"attribute {unit - self.size}"


def decode_as(pair: Pair, label: Tensor, code: Tensor) -> Tensor:
    """The image of codes, all of one label."""
    return pair.decode(code, label.expand(len(code)))


def explorer(found: Gathered) -> dict[str, Any]:
    """All that the page's explorer reads; where the page cannot decode, a grid of images and the reason.

    :raises ValueError: a model without codes that could be explored.
    """
    codes = Codes(found)
    ways = codes.ways()
    try:
        decoder = Decoder(ways, tried := codes.tried())
    except NotInPage as error:
        return {"reason": str(error), **grid(codes, ways[0])}
    starts = start_at(codes)
    units, low, high = codes.units, codes.low, codes.high
    scaled = (codes.all - low) / (high - low)
    variances = codes.all.var(0)
    return {
        "decoder": decoder.payload(),
        "error": decoder.error,
        "tried": len(tried),
        "shape": list(found.shape),
        "size": codes.all.shape[1],
        "units": [
            {"index": u, "name": codes.name(u), "low": rounded(low[u]), "high": rounded(high[u]),
             "variance": rounded(variances[u])} for u in units
        ],
        "mean": [rounded(v) for v in codes.all.mean(0)],
        "points": base64.b64encode((scaled[:, units].clamp(0, 1) * 255).round().byte().numpy().tobytes()).decode(),
        "labels": None if codes.labels is None or codes.labels.dim() != 1 else codes.labels.tolist(),
        "classes": codes.classes,
        "own": found.test is None,
        "starts": [
            {"image": image, "code": [rounded(v) for v in codes.all[i]],
             "label": None if codes.labels is None or codes.labels.dim() != 1 else int(codes.labels[i])}
            for i, image in zip(starts, pictures(codes.images[starts]), strict=True)
        ],
    }  # fmt: skip


def start_at(codes: Codes) -> list[int]:
    """Data to begin at: the first of every class, or the first ones."""
    if codes.labels is None or codes.labels.dim() != 1:
        return list(range(min(STARTS, len(codes.all))))
    firsts = [int(i) for i in np.unique(codes.labels.numpy(), return_index=True)[1]]
    return spread(firsts, STARTS)


def rounded(value: Tensor | float) -> float:
    """A number as short as it serves."""
    return float(f"{float(value):.5g}")


def grid(codes: Codes, decode: Decode) -> dict[str, Any]:
    """Images over the plane of two units, or along each of the most active ones, rows of data URIs."""
    first, *_ = codes.all
    if codes.size == 2:
        up, across = (torch.linspace(float(codes.low[u]), float(codes.high[u]), SIDE) for u in (1, 0))
        rows = [torch.stack([across, torch.full_like(across, float(v))], -1) for v in up.flip(0)]
        said = "the plane of unit 0 (from left to right) and unit 1 (upwards)"
    else:
        rows = [traverse(first, u, codes.low[u], codes.high[u]) for u in codes.units[: UNITS // 2]]
        said = f"a row for each of {', '.join(map(codes.name, codes.units[: UNITS // 2]))}, the others as of a datum"
    with torch.no_grad():
        return {"rows": [pictures(decode(row)) for row in rows], "said": said}


def traverse(code: Tensor, unit: int, low: Tensor, high: Tensor) -> Tensor:
    """A code with one unit at values between two others."""
    moved = code.repeat(STEPS, 1)
    moved[:, unit] = torch.linspace(float(low), float(high), STEPS)
    return moved
