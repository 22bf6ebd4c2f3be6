"""One command as several processes of this machine, which find each other as those that torchrun starts do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from pyrovae.signals import install, restore

GRACE = 60.0  # seconds in which processes see that another has ended, and say so


def several(number: int, arguments: Sequence[str]) -> int:
    """Run the command line in so many processes; the exit code of the one that failed first. All get every signal."""
    if (size := os.environ.get("WORLD_SIZE") or "1") != "1":
        raise ValueError(
            f"WORLD_SIZE={size} says that processes are started already, got --processes {number}: drop it"
        )
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = str(place.getsockname()[1])
    shared = os.environ | {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes: list[subprocess.Popen[bytes]] = []

    def pass_on(signal_number: int, _: object) -> None:
        for process in processes:
            process.send_signal(signal_number)

    before = install(pass_on)
    try:
        for rank in map(str, range(number)):
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "pyrovae", *arguments], env=shared | {"RANK": rank, "LOCAL_RANK": rank},
                    start_new_session=True,  # where signals of the terminal come by way of this process, once
                )
            )  # fmt: skip
        return ended(processes)
    finally:
        pass_on(signal.SIGKILL, None)
        restore(before)


def ended(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all; the exit code of the first that failed, after which the others do not go on for long."""
    code, until = 0, float("inf")
    while any(process.poll() is None for process in processes) and time.monotonic() < until:
        if not code and (code := next((p.returncode for p in processes if p.returncode), 0)):
            until = time.monotonic() + GRACE
        time.sleep(0.05)
    code = code or next((p.returncode for p in processes if p.returncode), 0)
    return 128 - code if code < 0 else code
