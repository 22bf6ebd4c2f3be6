"""Figures of a run in plain words."""

from __future__ import annotations

import inspect
import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from markupsafe import Markup

from pyrovae import models, objectives
from pyrovae.app.results import Results
from pyrovae.app.settings import Settings
from pyrovae.app.tables import KINDS
from pyrovae.app.tables import nll as nll_of

DOUBTFUL = 0.01  # of the data: the share whose weights are unreliable, from which on a figure is said to be doubtful
PLACES = ("data_dir", "device")  # settings that are of one machine, and no one else's business
#: Where a docstring has its equation: by itself, or in a line.
EQUATIONS = (r"\.\. math::(.*?)(?:\n\s*\n|\Z)", r":math:`([^`]*=[^`]*)`")

#: What letters of an objective's equation stand for, by where they occur in it.
SYMBOLS = {
    r"\bw(?![a-z])": "w is the weight p(x, z) / q(z | x) of a particle z drawn from q(z | x)",
    r"\\beta\\,\(\\log p": "\N{GREEK SMALL LETTER BETA} is kl_weight, 1 unless set",
}


class Verdict(NamedTuple):
    """What a likelihood is worth."""

    sound: bool
    title: str
    sentences: list[str]


def likelihood(results: Results, noun: str) -> Verdict:
    """The likelihood, its errors and its diagnostics.

    :param noun: what a datum is, in the plural.
    """
    kind = results["likelihood_is"]
    if kind is None:
        return Verdict(True, "This model has no log p(x)", ["It is not a generative model: it has no likelihood."])
    bits = f", or {results['bits_per_dim']:z.4f} bits per dimension" if "bits_per_dim" in results else ""
    said = [
        f"The negative log-likelihood (NLL) of the test {noun} is {nll_of(results)} nats on average{bits}; lower is "
        "better."
    ]
    over = results["nll_data_std_error"]
    if over is not None and not math.isnan(over):
        said.append(
            f"Other test {noun} of the same kind would have given another mean: the {results['num_images']:,} measured "
            f"here determine it to ± {over:.2g}."
        )
    if kind in KINDS:
        titles = {"exact": "An exact likelihood", "bound": "A bound on the likelihood", "annealed": "Annealed"}
        return Verdict(kind != "annealed", titles[kind], [*said, f"It was measured {KINDS[kind]}."])
    share, ess, count = results["unreliable"], results["median_ess"], results["num_samples"]
    said.append(
        f"It is an estimate by importance sampling, with {count:,} samples for each of {results['num_images']:,} "
        f"{noun}; the ± beside it, {results['nll_std_error']:.2g}, is the standard error of that sampling."
    )
    said.append(
        f"For half of the {noun}, the samples are worth {ess:,.0f} independent ones or more (the effective sample "
        "size)."
    )
    criterion = results.get("criterion", "Pareto k > 0.7")
    if share < DOUBTFUL:
        said.append(f"The weights behave well: {criterion} for only {share:.1%} of the {noun}.")
        return Verdict(True, "An estimate to rely on", said)
    said.append(
        f"For {share:.1%} of the {noun} a few samples carry nearly all the weight ({criterion}). Such estimates tend "
        "to be too pessimistic, and their standard errors too small: more samples (pyrovae evaluate --samples), or "
        "annealing (--ais), say more."
    )
    return Verdict(False, "An estimate to take with care", said)


def diagnosed(results: Results) -> list[str]:
    """Annealing, and where the bound is lost, where these were measured."""
    said = []
    if "ais" in results:
        found = results["ais"]
        said.append(
            f"Annealed importance sampling, an independent and more expensive check, finds {found['nll']:.2f} ± "
            f"{found['nll_std_error']:.2g} nats on {found['num_images']:.0f} data, where importance sampling finds "
            f"{found['importance_nll']:.2f} ± {found['importance_nll_std_error']:.2g}."
        )
    if "diagnostics" in results:
        gap: Mapping[str, Any] = results["diagnostics"]["posterior_gap"]
        said.append(
            f"The ELBO lies {gap['gap']:.2f} nats below log p(x): {gap['amortisation']:.2f} because one network must "
            f"serve all data (amortisation), {gap['approximation']:.2f} because the posterior's family is too simple."
        )
    return said


def objective(config: Mapping[str, Any]) -> str:
    """The objective as it would be written in Python."""
    described = config.get("objective")
    if not isinstance(described, dict):
        return "a rule of its own"
    arguments, defaults = described.get("arguments", {}), {}
    cls = known_class(described.get("class"))
    if cls is not None and hasattr(cls, "defaults"):
        defaults = cls.defaults()
    shown = [
        f"{k}={v!r}" for k, v in arguments.items() if k.startswith("num_") or k not in defaults or defaults[k] != v
    ]
    return f"{str(described.get('class', '?')).rpartition(':')[2].rpartition('.')[2]}({', '.join(shown)})"


def known_class(path: object) -> Any:
    """A class of pyrovae's by the path that a config gives, or None; nothing else is imported."""
    module, _, name = str(path).partition(":")
    package = {"pyrovae.models": models, "pyrovae.objectives": objectives}.get(module)
    return getattr(package, name) if package is not None and name in package.__all__ else None


def formula(path: object) -> str:
    """The first equation of a class's documentation, or of a class's that it is made from; empty if there is none."""
    cls = known_class(path)
    documented = [inspect.getdoc(each) or "" for each in cls.__mro__[:-1]] if cls else []
    found = [m for doc in documented for pattern in EQUATIONS if (m := re.search(pattern, doc, re.S))]
    return " ".join(found[0][1].split()).replace("&", " ") if found else ""


def equation(path: object) -> Markup | None:
    """The formula of a class as MathML."""
    return Markup(mathml(written)) if (written := formula(path)) else None  # of our own docstrings


def symbols(path: object) -> list[str]:
    """What the letters of an objective's equation stand for, where a reader may not know."""
    return [means for pattern, means in SYMBOLS.items() if re.search(pattern, formula(path))]


def mathml(tex: str, display: str = "block") -> str:
    """TeX as a browser shows it by itself, with what the converter lacks: the space after log, letters of sets."""
    from latex2mathml.converter import convert

    tex = re.sub(r"\\sim\b", "\N{TILDE OPERATOR}", tex)
    tex = re.sub(r"\\mathbb\s*\{?E\}?", "\N{MATHEMATICAL DOUBLE-STRUCK CAPITAL E}", tex)
    tex = re.sub(r"\\(log|max|min|exp)\b(?!\s*(?:[_^(\[]|\\left))", r"\\\1\\,", tex)
    return convert(tex, display=display)


def shareable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the places of one machine."""
    given = config.get("settings")
    kept = {k: v for k, v in given.items() if k not in PLACES} if isinstance(given, dict) else given
    return dict(config) | ({"settings": kept} if "settings" in config else {})


def command(config: Mapping[str, Any]) -> str | None:
    """The command that trains such a run again; None for one made in Python."""
    given = config.get("settings")
    if not isinstance(given, dict):
        return None
    default, words = asdict(Settings()), ["pyrovae", "train", str(given.get("model", "vae"))]
    for name, value in given.items():
        if name not in ("model", "settings", *PLACES) and value != default.get(name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    for name, value in given.get("settings", {}).items():
        words += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    return shlex.join(words)


def seconds(value: float) -> str:
    """A time that is easy to read.

    >>> seconds(8.25), seconds(200), seconds(9000)
    ('8.2 s', '3.3 min', '2.5 h')
    """
    for size, unit in ((3600, "h"), (60, "min")):
        if value >= 2 * size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.1f} s"
