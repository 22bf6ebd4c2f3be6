"""What the command was asked for, as every section reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GRID = ((20, 1), (20, 5), (20, 50), (100, 1), (100, 50), (1000, 1))


@dataclass(frozen=True)
class Options:
    """Settings of one run of the suite."""

    seconds: float = 3.0
    warmup: int = 300
    networks: tuple[str, ...] = ("mlp", "conv")
    cells: tuple[tuple[int, int], ...] = GRID
    samples: int = 5000
    images: int = 100
    device: str = "cpu"
    data_dir: Path | None = None
    compile_mode: str | None = None
