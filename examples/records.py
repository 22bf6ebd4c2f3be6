"""Records of trained cells: what a table is made of, and where it came from."""

import hashlib
import json
import platform
import subprocess
from pathlib import Path

import torch

from pyrovae import runs

ROOT = Path(__file__).resolve().parents[1]
CODE = ("pyrovae", "examples/tables.py", "examples/records.py", "examples/head.py")  # what a cell's figures depend on

#: What a record says, beside the settings it was asked for.
FOUND = (
    "epochs", "nll", "nll_std_error", "active_units", "minutes", "cpu_minutes", "device", "processor", "threads",
    "path", "versions", "commit", "command",
)  # fmt: skip


def name(settings):
    """A name for a cell of these settings and no others."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    said = (settings[key] for key in ("table", "dataset", "layers", "objective", "particles", "seed"))
    return "-".join(map(str, (*said, digest))).lower()


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
    """All records of a folder, in the order of their names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))]


def commit():
    """The commit of the code, with "-changed" where files of it differ from that; "unknown" outside a repository."""
    try:
        found = git("rev-parse", "HEAD")
        return found + ("-changed" if git("status", "--porcelain", "--", *CODE) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


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
