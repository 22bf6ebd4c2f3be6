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
from pyrovae.sampling import sample as draw

PLANE_POINTS = 5000


def pictures(
    pair: Pair, test: Images, history: Sequence[Mapping[str, object]], folder: Path, *, seed: int
) -> list[Path]:
    """Curves, samples, reconstructions and the latent plane (and, for two units, the manifold) as PNG.

    Labels colour the plane, whether the pair takes them or not.
    """
    drawn = [plots.curves(history, folder / "curves.png")] if has_curves(history) else []
    classes, test = test.labels, as_seen_by(pair, test).fixed(seed)
    shown = plots.is_image(test.event_shape)
    if shown:
        columns = columns_for(pair)
        number = (columns or 8) * max(1, 64 // (columns or 8))  # 64, or as many whole rows of all classes
        with suppress(ValueError):  # the pair may need more than that to generate
            means = draw(pair.module, number, *labels_for(pair, number), returns="means", seed=seed, like=test.x[:1])
            drawn.append(plots.image_grid(means, folder / "samples.png", columns=columns))
        few = test.subset(slice(0, 16))
        if (rebuilt := reconstruct(pair, few.columns, seed)) is not None:
            drawn.append(plots.reconstructions(few.x, rebuilt, folder / "reconstructions.png"))
    some = test.subset(slice(0, PLANE_POINTS)).to(device_of(pair.model) or test.x.device)
    with torch.no_grad(), isolated_rng(seed), evaluating(pair.model, pair.guide):
        codes = {name: average.mean for name, average in mean_draws(pair.guide, some.columns).items()}
    vectors = [mean for mean in codes.values() if mean.dim() == 2]
    if vectors:
        labels = None if classes is None else classes[:PLANE_POINTS]
        drawn.append(plots.latent_plane(vectors[0].cpu(), folder / "latent_plane.png", labels=labels))
        # The plane is laid out by the prior of a pair with this one latent, and decoded without labels.
        planar = len(codes) == 1 and vectors[0].shape[1] == 2 and pair.likelihood_is is not None
        if shown and planar and pair.decodes and not pair.conditional:
            drawn.append(plots.manifold(pair.decode, folder / "manifold.png", event_shape=test.event_shape))
    return drawn


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
