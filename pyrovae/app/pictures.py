"""What a run looks like: curves, samples, reconstructions, the latent plane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from pyrovae import plots
from pyrovae.app.job import as_seen_by
from pyrovae.app.measure import reconstruct
from pyrovae.data.images import Images
from pyrovae.engine.programs import device_of, evaluating
from pyrovae.engine.randomness import isolated_rng
from pyrovae.evaluate.units import mean_draws
from pyrovae.models.base import Pair
from pyrovae.plots.charts import has_curves
from pyrovae.plots.images import save
from pyrovae.sampling import sample as draw

PLANE_POINTS = 5000


def pictures(
    pair: Pair, training: Images, test: Images, history: Sequence[Mapping[str, object]], folder: Path, *, seed: int
) -> list[str]:
    """Curves, samples beside data, reconstructions, the latent plane (and, for two units, the manifold): names of PNGs.

    Labels colour the plane, whether the pair takes them or not.
    """
    drawn = {}
    if has_curves(history):
        drawn["curves"] = plots.curves(history)
    classes, test = test.labels, as_seen_by(pair, test).fixed(seed)
    shown = plots.is_image(test.event_shape)
    if shown:
        columns = columns_for(pair)
        number = (columns or 8) * max(1, 64 // (columns or 8))  # 64, or as many whole rows of all classes
        with suppress(ValueError):  # the pair may need more than that to generate
            means = draw(pair.module, number, *labels_for(pair, number), returns="means", seed=seed, like=test.x[:1])
            groups = {"training data": beside(training, number, columns), "samples of the model": means}
            drawn["samples"] = plots.side_by_side(groups, columns=columns, smooth=True)
        few = test.subset(slice(0, 16))
        if (rebuilt := reconstruct(pair, few.columns, seed)) is not None:
            drawn["reconstructions"] = plots.reconstructions(few.x, rebuilt, columns=8, smooth=True)
    some = test.subset(slice(0, PLANE_POINTS)).to(device_of(pair.model) or test.x.device)
    with torch.no_grad(), isolated_rng(seed), evaluating(pair.model, pair.guide):
        codes = {name: average.mean for name, average in mean_draws(pair.guide, some.columns).items()}
    vectors = vectors_of(codes)
    if vectors is not None:
        labels = None if classes is None else classes[:PLANE_POINTS]
        drawn["latent_plane"] = plots.latent_plane(vectors.cpu(), labels=labels)
        # The plane is laid out by the normal prior of a pair with this one latent, and decoded without labels.
        planar = len(codes) == 1 and vectors.shape[1] == 2 and pair.likelihood_is is not None
        normal = not isinstance(pair.config, dict) or pair.config.get("prior", "normal") == "normal"
        if shown and planar and normal and pair.decodes and not pair.conditional:
            drawn["manifold"] = plots.manifold(pair.decode, event_shape=test.event_shape, steps=16, smooth=True)
    for name, figure in drawn.items():
        save(figure, folder / f"{name}.png")
    return [f"{name}.png" for name in drawn]


def vectors_of(codes: Mapping[str, Tensor]) -> Tensor | None:
    """Codes of the first latent site that has a vector for a datum; rather not labels or bits, which fill no plane."""
    vectors = [mean for mean in codes.values() if mean.dim() == 2]
    return next((mean for mean in vectors if (mean != mean.round()).any()), vectors[0] if vectors else None)


def beside(training: Images, number: int, columns: int | None) -> Tensor:
    """Data to show beside so many samples, undrawn: with columns for classes, of these, as far as there are any."""
    chosen = torch.arange(len(training))
    if columns is not None and training.labels is not None:
        classes, row = [chosen[training.labels == label] for label in range(columns)], torch.arange(number // columns)
        if all(map(len, classes)):
            chosen = torch.stack([own[row % len(own)] for own in classes], 1).flatten()
    return training.x[chosen[:number]]


def labels_for(pair: Pair, number: int, label: str | None = None) -> tuple[Tensor, ...]:
    """What a conditional pair is to generate by: the label asked for, or all classes in turn; nothing for others."""
    if not pair.conditional:
        if label is not None:
            raise ValueError(f"{type(pair.module).__name__} is not conditional, got label {label}: leave the label out")
        return ()
    classes = pair.num_classes
    if classes is None:
        try:
            row = [float(v) for v in (label or "").split(",")]
        except ValueError as error:
            count = pair.num_attributes or "as many as the model takes"
            raise ValueError(f"label must be {count} numbers, got {label!r}: write such as 0.5,-1") from error
        return (torch.tensor(row).expand(number, -1),)
    if label is None:
        return (torch.arange(classes).repeat(-(-number // classes))[:number],)
    if not (label.isdecimal() and len(label) < 10 and int(label) < classes):
        raise ValueError(f"label must be one of 0 ... {classes - 1}, got {label[:20]!r}: pass such")
    return (torch.full((number,), int(label)),)


def columns_for(pair: Pair, label: str | None = None) -> int | None:
    """A column for every class, where samples go through the classes in turn; None for a square grid."""
    return pair.num_classes if pair.conditional and label is None else None
