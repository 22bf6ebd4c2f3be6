"""Pages: what they hold, in templates that escape whatever a run says of itself."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from pyrovae import __version__
from pyrovae.app.report.decoder import PAGE
from pyrovae.runs.files import write_text

VENDORED = Path(__file__).parent / "vendor"


def write(template: str, path: Path, **given: Any) -> None:
    """Fill a template, and write the page."""
    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=select_autoescape(["html"]), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["options"] = options
    now = datetime.now(UTC)
    page = environment.get_template(template).render(
        version=__version__, date=f"{now.day} {now:%B %Y}", inline=inline, **given
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)


def options(text: str) -> Markup:
    """Text of which no option breaks: after the first of its dashes it would read as another word."""
    return Markup(re.sub(r"(?<!\S)(\(?)(--[\w-]+)", r'\1<span class="option">\2</span>', str(escape(text))))


def inline(name: str) -> Markup:
    """A style sheet or a script of ours, or one that is vendored, as it is."""
    folder = VENDORED if name.endswith(".min.js") else PAGE
    text = (folder / name).read_text(encoding="utf-8")
    return Markup(text[: text.rindex("//# sourceMappingURL")] if "//# sourceMappingURL" in text else text)
