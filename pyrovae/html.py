"""Tables as notebooks show them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[object]], note: str | None = None) -> str:
    """A table with a title above and a note below; what users name things is text, and no markup.

    >>> table("one <b>", ["a"], [[1.23456]])
    '<p><strong>one &lt;b&gt;</strong></p><table><tr><th>a</th></tr><tr><td>1.235</td></tr></table>'
    """
    lines = "".join([cells(head, "th"), *(cells(row, "td") for row in rows)]) if head else ""
    inside, below = f"<table>{lines}</table>" if lines else "", "" if note is None else f"<p>{escape(note)}</p>"
    return f"<p><strong>{escape(title)}</strong></p>{inside}{below}"


def cells(row: Sequence[object], kind: str) -> str:
    """One row; numbers with the digits that one reads."""
    said = (
        f"{cell:.4g}" if isinstance(cell, float) else f"{cell:,}" if type(cell) is int else str(cell) for cell in row
    )
    return f"<tr>{''.join(f'<{kind}>{escape(text)}</{kind}>' for text in said)}</tr>"
