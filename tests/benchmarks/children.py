"""Measurements that need a process of their own, and processes that take turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from tests.benchmarks.options import ROOT

PAUSE = 0.02  # seconds in which the threads of the last one go to sleep
FRAMES = {"JAX_TRACEBACK_FILTERING": "off"}  # else the last line of an error says how to see more of it


def run_child(module: str, *arguments: object, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What ``python -m tests.benchmarks.MODULE ARGUMENTS`` prints as JSON in its last line, or why it did not."""
    command = _command(module, arguments)
    variables = {**os.environ, **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"!! {module} {' '.join(map(str, arguments))} failed: {reason}", file=sys.stderr)
        return {"error": reason}
    return json.loads(done.stdout.strip().splitlines()[-1])


def _command(module: str, arguments: tuple[object, ...]) -> list[str]:
    return [sys.executable, "-m", f"tests.benchmarks.{module}", *map(str, arguments)]


class Child:
    """``python -m tests.benchmarks.MODULE ARGUMENTS``, which works when it is told to (:class:`Turns` is its side).

    It chooses its threads itself, by the cores that it finds itself held to.
    """

    def __init__(self, module: str, *arguments: object, environment: Mapping[str, str] | None = None) -> None:
        chosen = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "JAX_COMPILATION_CACHE_DIR")
        variables = {name: value for name, value in os.environ.items() if name not in chosen}
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the child)
        self.process = subprocess.Popen(
            _command(module, arguments), cwd=ROOT, env={**variables, **FRAMES, **(environment or {})}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def answer(self) -> dict[str, Any]:
        """Its next answer; the last line of its errors where it has died."""
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.errors.seek(0)
        raise RuntimeError((self.errors.read().strip().splitlines() or ["no message"])[-1])

    def turn(self) -> dict[str, Any]:
        """Tell it to work, and wait for what it says of that."""
        assert self.process.stdin is not None
        time.sleep(PAUSE)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()


class Turns:
    """The side of the child: ``turns(**answer)`` answers, and waits for its next turn."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what else prints does not answer
        self.began = 0.0, 0.0

    def clocks(self) -> dict[str, float]:
        """Seconds since the turn began, on the wall and of this process (all threads together)."""
        return {"seconds": time.perf_counter() - self.began[0], "cpu": time.process_time() - self.began[1]}

    def __call__(self, **answer: object) -> None:
        print(json.dumps(answer), file=self.out, flush=True)
        if not sys.stdin.readline():
            raise SystemExit
        self.began = time.perf_counter(), time.process_time()
