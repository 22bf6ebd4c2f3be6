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
from pyrovae.programs import evaluating, isolated_rng, roots
from pyrovae.sampling import sample
from pyrovae.sites import counts, record_pair

PLANE_POINTS = 5000


def pictures(pair: Any, test: Images, history: list[dict[str, Any]], folder: Path, *, seed: int = 0) -> list[Path]:
    """Curves, samples, reconstructions and the latent plane (and, for two units, the manifold) as PNG."""
    drawn = [plots.curves(history, folder / "curves.png")]
    images = test.unlabelled()
    x = images.fixed(seed).x
    if plots.is_image(test.event_shape):
        generated = sample(pair, 64, returns="means", seed=seed, like=x[:1])
        drawn.append(plots.image_grid(generated, folder / "samples.png"))
        rebuilt = reconstruct(pair, x[:16], seed=seed)
        if rebuilt is not None:
            drawn.append(plots.reconstructions(x[:16], rebuilt, folder / "reconstructions.png"))
    device = next((p.device for module in roots(pair.model) for p in module.parameters()), None)
    with torch.no_grad(), isolated_rng(seed), evaluating(pair.model, pair.guide):
        means = posterior_means(pair.guide, (x[:PLANE_POINTS].to(device),))
    vectors = [mean for mean in means.values() if mean.dim() == 2]
    if vectors:
        labels = None if test.labels is None else test.labels[:PLANE_POINTS]
        drawn.append(plots.latent_plane(vectors[0].cpu(), folder / "latent_plane.png", labels=labels))
        if vectors[0].shape[1] == 2 and hasattr(pair, "decode") and plots.is_image(test.event_shape):
            path = folder / "manifold.png"
            drawn.append(plots.manifold(pair.decode, path, latent_dim=2, event_shape=test.event_shape))
    return [Path(path) for path in drawn]


def reconstruct(pair: Any, x: Tensor, *, seed: int = 0) -> Tensor | None:
    """Mean of p(x' | z) at one draw z from q(z | x); None where the observed site has no mean."""
    device = next((p.device for module in roots(pair.model) for p in module.parameters()), x.device)
    with torch.no_grad(), isolated_rng(seed), evaluating(pair.model, pair.guide):
        _, joint = record_pair(pair.model, pair.guide, (x.to(device),), {})
    observed = [s for s in joint.values() if counts(s) and s["is_observed"] and s["value"].shape == x.shape]
    try:
        return observed[0]["fn"].mean.cpu() if observed else None
    except NotImplementedError:
        return None


def print_results(results: dict[str, Any], out: Console) -> None:
    """Test NLL with its standard error, active units, and a warning where the figure cannot be trusted."""
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_row("test NLL", f"{results['nll']:.2f} ± {results['nll_std_error']:.2g} nats per image")
    table.add_row("", f"{results['bits_per_dim']:.4f} bits/dim; ± {_number(results['nll_data_std_error'])} over images")
    table.add_row("measured with", f"{results['num_samples']:,} samples, {results['num_images']:,} images")
    table.add_row(
        "", f"median ESS {results['median_ess']:.0f}, Pareto k > 0.7 for {results['unreliable']:.1%} of images"
    )
    for name, units in results["active_units"].items():
        table.add_row("active units", f'{units["active"]} of {units["of"]} at "{name}"')
    out.print(table)
    if results["warning"]:
        out.print(f"[yellow]warning:[/yellow] {results['warning']}")


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2g}"
