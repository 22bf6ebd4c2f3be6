"""What a run was made with, and what its files hold, by SHA-256."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    packages = {name: version(name) for name in ("torch", "pyro-ppl", "numpy")}
    from pyrovae import __version__

    return {"pyrovae": __version__, "python": platform.python_version(), **packages}


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
