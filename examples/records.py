"""Records of trained cells: what a table is made of, and where it came from."""

import hashlib
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from pyrovae import runs

ROOT = Path(__file__).resolve().parents[1]
#: What a cell's figures depend on.
CODE = ("pyrovae", *(f"examples/{name}.py" for name in ("tables", "cells", "records", "head")))

#: What a record says, beside the settings it was asked for.
FOUND = (
    "epochs", "nll", "nll_std_error", "active_units", "minutes", "cpu_minutes", "device", "processor", "threads",
    "path", "versions", "commit", "command",
)  # fmt: skip


#: What a cell is asked to be, as far as a record says it, and "epochs", where no budget in minutes decides them.
ASKED = (
    "table", "layers", "objective", "particles", "groups", "gradient", "beta", "continues", "variant", "growth",
    "dataset", "budget_minutes", "batch_size", "lr", "schedule", "adam", "precision", "train", "num_samples", "seed",
)  # fmt: skip


def asked(record):
    """The settings of a record."""
    names = ASKED if "budget_minutes" in record else (*ASKED, "epochs")
    return {key: record[key] for key in names if key in record}


def digest(settings):
    """A short name for any settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def name(settings):
    """A name for a cell of these settings and no others."""
    said = (settings[key] for key in ("table", "dataset", "layers", "objective", "particles", "seed"))
    return "-".join(map(str, (*said, digest(settings)))).lower()


def of(folder, settings):
    """The finished record of these settings, or None."""
    path = Path(folder) / f"{name(settings)}.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    if {key: record.get(key) for key in settings} != settings or not set(FOUND) <= record.keys():
        raise ValueError(f'"{path}" is no record of {settings}: move it away')
    return record


def write(folder, settings, found):
    """Write the record of a cell that is finished."""
    if missing := [key for key in FOUND if key not in found]:
        raise ValueError(f"a record needs {', '.join(FOUND)}, got none of {', '.join(missing)}: measure them")
    path = Path(folder) / f"{name(settings)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(path, settings | found)


def read(folder):
    """All records of a folder, in the order of their names; what is none of a finished cell is refused."""
    return [checked(path) for path in sorted(Path(folder).glob("*.json"))]


def checked(path):
    """The record in a file, which bears the name that its settings give it."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if missing := [key for key in FOUND if key not in record]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        if path.stem != (right := name(asked(record))):
            raise ValueError(f'its settings are those of "{right}.json"')
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'"{path}" is no record of a finished cell ({error}): move it away') from error
    return record


def commit():
    """The commit of the code, with "-changed" where files of it differ from that.

    Of a copy without its repository it is what PYROVAE_COMMIT says, or "unknown".
    """
    try:
        found = git("rev-parse", "HEAD")
        return found + ("-changed" if git("status", "--porcelain", "--", *CODE) else "")
    except (OSError, subprocess.CalledProcessError):
        said = os.environ.get("PYROVAE_COMMIT", "unknown")
    if not re.fullmatch("[0-9a-f]{40}(-changed)?|unknown", said):
        raise ValueError(f"PYROVAE_COMMIT must be a commit of 40 digits, got {said!r}: set it to git rev-parse HEAD")
    return said


def git(*arguments):
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def processor(device):
    """The model of the GPU or of the processor."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8").splitlines() if known.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
