"""Results as pictures and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pyrovae import plots
from pyrovae.data import Images
from pyrovae.evaluate.diagnostics import posterior_means
from pyrovae.programs import device_of, evaluating, isolated_rng
from pyrovae.sampling import sample
from pyrovae.sites import counts, latent, record_pair

PLANE_POINTS = 5000


def pictures(
    pair: Any, test: Images, classes: Tensor | None, history: list[dict[str, Any]], folder: Path, *, seed: int = 0
) -> list[Path]:
    """Curves, samples, reconstructions and the latent plane (and, for two units, the manifold) as PNG.

    :param test: data as the pair takes them.
    :param classes: labels to colour by, whether the pair takes them or not.
    """
    drawn = [plots.curves(history, folder / "curves.png")] if plots.has_curves(history) else []
    test = test.fixed(seed)
    if plots.is_image(test.event_shape):
        if (generated := _generate(pair, test, seed)) is not None:
            drawn.append(plots.image_grid(generated, folder / "samples.png", columns=columns_for(pair)))
        few = test.subset(slice(0, 16))
        if (rebuilt := reconstruct(pair, _batch(few), seed=seed)) is not None:
            drawn.append(plots.reconstructions(few.x, rebuilt, folder / "reconstructions.png"))
    some = test.subset(slice(0, PLANE_POINTS))
    with torch.no_grad(), isolated_rng(seed), evaluating(pair.model, pair.guide):
        means = posterior_means(pair.guide, _batch(some.to(_device(pair, some.x))))
    vectors = [mean for mean in means.values() if mean.dim() == 2]
    if vectors:
        labels = None if classes is None else classes[:PLANE_POINTS]
        drawn.append(plots.latent_plane(vectors[0].cpu(), folder / "latent_plane.png", labels=labels))
        # The plane is laid out by the prior of a pair with this one latent, and decoded without labels.
        planar = len(means) == 1 and vectors[0].shape[1] == 2 and getattr(pair, "likelihood_is", "estimate") is not None
        decodes = hasattr(pair, "decode") and not getattr(pair, "conditional", False)
        if planar and decodes and plots.is_image(test.event_shape):
            path = folder / "manifold.png"
            drawn.append(plots.manifold(pair.decode, path, latent_dim=2, event_shape=test.event_shape))
    return [Path(path) for path in drawn]


def _generate(pair: Any, test: Images, seed: int) -> Tensor | None:
    """64 samples, or as many whole rows of all classes; None where the pair generates only when told more."""
    columns = columns_for(pair) or 8
    number = columns * max(1, 64 // columns)
    try:
        labels = labels_for(pair, number)
        return sample(pair, number, *labels, returns="means", seed=seed, like=test.x[:1])
    except ValueError:
        return None


def labels_for(pair: Any, number: int, label: str | None = None) -> tuple[Tensor, ...]:
    """What a conditional pair is to generate by: the label asked for, or all classes in turn; nothing for others."""
    if not getattr(pair, "conditional", False):
        if label is not None:
            raise ValueError(f"{type(pair).__name__} is not conditional, got label {label}: leave the label out")
        return ()
    classes = pair.config.get("num_classes")
    if classes is None:
        try:
            row = [float(v) for v in (label or "").split(",")]
        except ValueError as error:
            count = pair.config["num_attributes"]
            raise ValueError(f"label must be {count} numbers, got {label!r}: write such as 0.5,-1") from error
        return (torch.tensor(row).expand(number, -1),)
    if label is None:
        return (torch.arange(classes).repeat(-(-number // classes))[:number],)
    if not (label.isdigit() and int(label) < classes):
        raise ValueError(f"label must be one of 0 ... {classes - 1}, got {label!r}: pass such")
    return (torch.full((number,), int(label)),)


def columns_for(pair: Any, label: str | None = None) -> int | None:
    """A column for every class, where samples go through the classes in turn; None for a square grid."""
    if not getattr(pair, "conditional", False) or label is not None:
        return None
    return pair.config.get("num_classes")


def _batch(images: Images) -> tuple[Tensor, ...]:
    """All of a set as one batch."""
    return (images.x,) if images.labels is None else (images.x, images.labels)


def _device(pair: Any, x: Tensor) -> torch.device:
    return device_of(pair.model) or x.device


def reconstruct(pair: Any, batch: tuple[Tensor, ...], *, seed: int = 0) -> Tensor | None:
    """Mean of p(x' | z) at one draw z from q(z | x); None where no latent is drawn, or x has no mean."""
    x = batch[0]
    place = _device(pair, x)
    with torch.no_grad(), isolated_rng(seed), evaluating(pair.model, pair.guide):
        drawn, joint = record_pair(pair.model, pair.guide, tuple(a.to(place) for a in batch), {})
    observed = [s for s in joint.values() if counts(s) and s["is_observed"] and s["value"].shape == x.shape]
    try:
        return observed[0]["fn"].mean.to(x.device) if observed and latent(drawn) else None
    except NotImplementedError:
        return None


def reconstruction_error(pair: Any, test: Images, *, seed: int = 0, batch_size: int = 500) -> float | None:
    """Squared distance of data to their reconstructions, summed over a datum and averaged over data; or None."""
    total, fixed = 0.0, test.fixed(seed)
    for index in torch.arange(len(fixed)).split(batch_size):
        batch = _batch(fixed.subset(index))
        rebuilt = reconstruct(pair, batch, seed=seed)
        if rebuilt is None:
            return None
        total += (batch[0] - rebuilt).square().sum(dtype=torch.float64).item()
    return total / len(fixed)


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
