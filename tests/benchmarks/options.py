"""What the command was asked for, as every section reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Options:
    """Settings of one run of the suite."""

    seconds: float = 3.0
    warmup: int = 300
    networks: tuple[str, ...] = ("mlp", "conv")
    cells: tuple[tuple[int, int], ...] = ()  # the section's own
    samples: int = 5000
    images: int = 100
    device: str = "cpu"
    data_dir: Path | None = None
    compile_mode: str | None = None
    contenders: tuple[str, ...] = ()  # all of the section, if it takes some
    cores: tuple[int, ...] = (1, 2)
    rounds: int = 6
    steps: int = 0  # of an epoch; the section's own
    target: float = -120.0  # nats per image, for the time to a bound
    epochs: int = 30  # at most, on the way there
    replicas: tuple[int, ...] = (1, 2, 4, 8)  # at once; one first, then powers of two
