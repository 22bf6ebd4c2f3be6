"""The parts of a report, each as far as the run has what it takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from pyrovae.app.measure import measure
from pyrovae.app.report import figures, parts, words
from pyrovae.app.report.explorer import explorer
from pyrovae.app.report.figures import Drawn
from pyrovae.app.report.gathered import Gathered, Notes
from pyrovae.data.images import Images
from pyrovae.models import VQVAE
from pyrovae.models.base import Pair

FEW = 20  # pixels a side, below which they are too coarse to be shown as squares


@dataclass
class Content:
    """What the template reads; what is absent is empty."""

    name: str
    notes: Notes
    noun: str
    lead: str = ""
    status: str = ""
    cards: list[tuple[str, str, str]] = field(default_factory=list)
    smooth: bool = False  # whether images are shown without the edges of their pixels, which are few
    epochs: int = 0
    verdict: words.Verdict | None = None
    here: bool = False  # whether the likelihood was measured for this page, as no one had
    fuller: str = ""  # how it is measured on all data
    diagnosed: list[str] = field(default_factory=list)
    ranked: parts.Ranked | None = None
    explorer: dict[str, Any] | None = None
    samples: list[str] = field(default_factory=list)
    columns: int | None = None
    reconstructions: list[tuple[str, str]] = field(default_factory=list)
    interpolations: list[list[str]] = field(default_factory=list)
    units: list[Drawn] = field(default_factory=list)
    plane: Drawn | None = None
    codebook: list[Drawn] = field(default_factory=list)
    curves: list[Drawn] = field(default_factory=list)
    objective: str = ""
    bound: Markup | None = None
    symbols: list[str] = field(default_factory=list)
    family: Markup | None = None
    command: str | None = None
    network: list[tuple[str, str, str]] = field(default_factory=list)
    config: str = ""


def content(found: Gathered) -> Content:
    """Everything that a report on a run says and shows."""
    noun = "images" if found.shown or not found.shape else "data"
    page = Content(found.run.path.absolute().name, found.notes, noun)
    page.epochs, page.smooth = len(found.history), found.shown and min(found.shape[-2:]) < FEW
    if found.pair is not None and found.test is not None:
        likely(page, found, found.pair, found.test)
    with page.notes.missing("a summary"):
        page.lead, page.status, page.cards = parts.lead(found), parts.status(found), parts.cards(found)
    with page.notes.missing("the curves"):
        page.curves = figures.curves(found.history)
    described(page, found.config)
    if found.pair is not None:
        page.network = parts.network(found)
        shown_by(page, found)
    return page


def likely(page: Content, found: Gathered, pair: Pair, test: Images) -> None:
    """How likely test data are, measured on a few of them where no one did."""
    with page.notes.missing("the likelihood of single data"):
        page.ranked = parts.ranked(found)
    if found.results is None:
        with page.notes.missing("the likelihood"):
            count, samples = parts.within_reach(found)
            found.results = measure(pair, test.subset(slice(0, count)), samples=samples, seed=found.seed)
            page.here, page.fuller = True, found.fuller
    if found.results is not None:
        page.verdict, page.diagnosed = words.likelihood(found.results, page.noun), words.diagnosed(found.results)


def described(page: Content, config: Mapping[str, Any]) -> None:
    """What the config says of the run."""
    page.config = json.dumps(words.shareable(config), indent=2, ensure_ascii=False)
    with page.notes.missing("what was trained"):
        page.objective, page.command = words.objective(config), words.command(config)
        objective = (config.get("objective") or {}).get("class")
        page.bound, page.symbols = words.equation(objective), words.symbols(objective)
        page.family = words.equation((config.get("model") or {}).get("class"))


def shown_by(page: Content, found: Gathered) -> None:
    """All that takes the trained pair."""
    notes = found.notes
    if not found.shown and found.shape:
        notes.add(f"the data are of shape {list(found.shape)}, no images: samples and reconstructions are not shown")
    with notes.missing("the units"):
        page.units = parts.unit_charts(found)
    if isinstance(found.pair, VQVAE):
        with notes.missing("the codebook"):
            page.codebook = parts.codebook(found)
    if found.shown:
        with notes.missing("samples"):
            page.samples, page.columns = parts.drawn_samples(found)
        if found.test is not None:
            with notes.missing("reconstructions"):
                page.reconstructions = parts.rebuilt(found)
            with notes.missing("interpolations"):
                page.interpolations = parts.between(found)
        with notes.missing("the explorer"):
            page.explorer = explorer(found)
    if found.test is not None and (page.explorer is None or "reason" in page.explorer):
        with notes.missing("the latent plane"):
            page.plane = parts.plane(found)
