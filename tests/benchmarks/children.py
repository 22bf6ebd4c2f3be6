"""Measurements that need a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from tests.benchmarks.options import ROOT


def run_child(module: str, *arguments: object, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What ``python -m tests.benchmarks.MODULE ARGUMENTS`` prints as JSON in its last line, or why it did not."""
    command = [sys.executable, "-m", f"tests.benchmarks.{module}", *map(str, arguments)]
    variables = {**os.environ, **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"!! {module} {' '.join(map(str, arguments))} failed: {reason}", file=sys.stderr)
        return {"error": reason}
    return json.loads(done.stdout.strip().splitlines()[-1])
