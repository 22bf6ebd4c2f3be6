"""Results as rows of plain values, and their Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


@dataclass
class Table:
    """Rows of plain values; ``columns`` are those that Markdown shows, the JSON has them all."""

    title: str
    columns: Sequence[str]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """Title, table and notes."""
        lines = [
            f"### {self.title}",
            "",
            _line(self.columns),
            _line(["---"] * len(self.columns)),
            *(_line([show(row.get(column)) for column in self.columns]) for row in self.rows),
        ]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)]) + "\n"


def ratio(of: float | None, to: float | None) -> float | None:
    """``of / to``, or None where one of them was not measured."""
    return of / to if of is not None and to else None


def show(value: Any) -> str:
    """A cell: three or four significant digits, thousands set apart, a dash for what was not measured."""
    if value is None:
        return "–"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
