"""Kill training at random moments, go on, and compare with a run that was left alone; read and write a run at once.

    python tests/faults/kill.py [--kills 100] [--seed 0] [--loads 200]

Half of the deaths come by the clock (a tenth of all in a fresh interpreter, which may not have imported anything yet),
half between two calls by which the child changes its run's folder: those are counted, and the child ends itself by
SIGKILL before one of them. One in three resumed runs is killed again. In the end weights, the optimizer's and the
generators' state, metrics and results must be the same bits; only clocks may differ. Then many processes load a run
while another saves it, each time the weights of one epoch; and two resume one run at once, of which one must give way.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

JOB = (
    "train", "--resume", "--device", "cpu", "--epochs", "6", "--batch-size", "400", "--samples", "20", "--particles",
    "2", "--objective", "iwae", "--latent-dim", "2", "--set", "hidden=[8]", "--set", "validation=100", "--set",
    "schedule=cosine", "--set", "kl_warmup=2",
)  # fmt: skip
CLOCKS = ("seconds", "cpu_seconds", "images_per_second", "timings", "seconds_per_epoch")
LEFT = re.compile(r"/\.|\.old(/|$)")  # by a death while it was taken away; the next save does so
CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")


def words(run: Path, kind: str) -> list[str]:
    return [*JOB, "--run-dir", str(run), "--set", f"compile={'true' if kind == 'compiled' else 'false'}"]


def forked(do: Callable[[], object], log: Path) -> int:
    """Start something in a process of its own, which ends with its exit code; what it prints goes to a file."""
    if child := os.fork():
        return child
    code = 1
    try:
        stream = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        do()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def train(run: Path, kind: str, *, last_change: int | None = None, counted: Path | None = None) -> None:
    """The job; it dies before the ``last_change``-th change of a file in its run, or writes down how many there are."""
    changes = 0

    def watching(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        if event not in CHANGES or not isinstance(arguments[0], str | os.PathLike):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if str(arguments[0]).startswith(str(run)):
            if changes == last_change:
                os.kill(os.getpid(), signal.SIGKILL)
            changes += 1

    if last_change is not None or counted is not None:
        sys.addaudithook(watching)
    from pyrovae.app.cli import main
    from pyrovae.runs import Run
    from pyrovae.train import within

    within.FIRST, Run.due = 0.0, property(lambda self: True)  # within epochs too
    try:
        main(words(run, kind))
    finally:
        if counted is not None:
            counted.write_text(str(changes))


def ended(child: int, seconds: float | None = None) -> int:
    """A child's exit code; after so many seconds it is killed."""
    if seconds is not None:
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def freshly_killed(run: Path, kind: str, seconds: float, log: Path) -> int:
    """The job in an interpreter that has yet to import everything, killed after so many seconds."""
    with log.open("a") as stream:
        process = subprocess.Popen([sys.executable, "-m", "pyrovae", *words(run, kind)], stdout=stream, stderr=stream)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def facts(run: Path) -> dict[str, Any]:
    """All that a finished run holds, but for what a clock says."""
    import torch
    from safetensors.torch import load_file

    def timeless(content: Any) -> Any:
        return {k: v for k, v in content.items() if k not in CLOCKS}

    lines = (run / "metrics.jsonl").read_text().splitlines()
    state = torch.load(run / "last" / "state.pt", weights_only=True)
    return {
        "weights": {name: load_file(run / name / "weights.safetensors") for name in ("last", "best")},
        "state": state, "metrics": [timeless(json.loads(line)) for line in lines],
        "results": timeless(json.loads((run / "results.json").read_text())),
        "files": sorted(str(path.relative_to(run)) for path in run.rglob("*") if not LEFT.search(str(path))),
    }  # fmt: skip


def differences(mine: Any, theirs: Any, where: str = "") -> Iterator[str]:
    """Where two nests of values are not the same, bit by bit."""
    import torch

    if isinstance(mine, dict) and isinstance(theirs, dict) and mine.keys() == theirs.keys():
        for key in mine:
            yield from differences(mine[key], theirs[key], f"{where}/{key}")
    elif isinstance(mine, list | tuple) and isinstance(theirs, list | tuple) and len(mine) == len(theirs):
        for i, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            yield from differences(one, other, f"{where}/{i}")
    elif isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor):
        if mine.dtype != theirs.dtype or not torch.equal(mine, theirs):
            yield where
    elif mine != theirs:
        yield f"{where} ({str(mine)[:60]} for {str(theirs)[:60]})"


class Trials:
    """One kind of step, its undisturbed run, and its kills."""

    def __init__(self, kind: str, base: Path, chance: random.Random) -> None:
        self.kind, self.base, self.chance, self.log = kind, base, chance, base / f"{kind}.log"
        self.found: Counter[str] = Counter()
        whole = base / f"{kind}-whole"
        began = time.monotonic()
        code = ended(forked(lambda: train(whole, kind, counted=base / "counted"), self.log))
        assert code == 0, self.log.read_text()[-2000:]
        self.seconds, self.whole = time.monotonic() - began, facts(whole)
        self.changes = int((base / "counted").read_text())

    def kill(self, how: str, run: Path) -> bool:
        """Kill the job once; whether it had not ended before."""
        moment = self.chance.random()
        if how == "import":
            return freshly_killed(run, self.kind, 0.2 + moment * 4, self.log) == -signal.SIGKILL
        if how == "clock":
            return ended(forked(lambda: train(run, self.kind), self.log), moment * self.seconds) == -signal.SIGKILL
        change = self.chance.randrange(self.changes)
        return ended(forked(lambda: train(run, self.kind, last_change=change), self.log)) == -signal.SIGKILL

    def trial(self, how: str, number: int) -> None:
        """Kill a run, perhaps twice, go on, compare."""
        run = self.base / f"{self.kind}-{how}-{number}"
        self.found[f"{how} kills"] += self.kill(how, run)
        if self.chance.random() < 1 / 3:
            self.found["again kills"] += self.kill(self.chance.choice(["clock", "save"]), run)
        code = ended(forked(lambda: train(run, self.kind), self.log))
        wrong = [f"exit {code}: {self.log.read_text()[-300:]}"] if code else list(differences(facts(run), self.whole))
        self.found[f"{how} wrong"] += bool(wrong)
        if wrong:
            print(f"{run.name}: {'; '.join(wrong[:5])}", flush=True)
        else:
            shutil.rmtree(run)


def loads(base: Path, number: int) -> int:
    """Load a run in many processes while it is saved; how many got anything but the weights of one epoch."""
    import torch

    import pyrovae as pv

    x = pv.data.load("digits", binarization="threshold").train.subset(slice(0, 40))
    run, stop, parent = base / "read", base / "stop", os.getpid()

    vae = pv.models.VAE((1, 8, 8), latent_dim=2, hidden=(64,))
    pv.fit(vae.model, vae.guide, x, objective=pv.ELBO(1), epochs=1, run_dir=run, compile=False, progress=False)

    def save() -> None:
        from pyrovae.runs import Run

        state = Run(run).state()
        for i in range(10**6):
            with torch.no_grad():
                for parameter in vae.parameters():
                    parameter.fill_(i)
            Run(run).save("last", vae.state_dict(), state)
            if stop.exists() or os.getppid() != parent:
                break

    def load() -> None:
        for _ in range(5):
            values = {p.flatten()[0].item() for p in pv.load(run).parameters() if (p == p.flatten()[0]).all()}
            assert len(values) == 1, values

    writer = forked(save, base / "writer.log")
    time.sleep(0.5)
    readers = [forked(load, base / f"reader-{i}.log") for i in range(number)]
    wrong = 0
    for i, reader in enumerate(readers):
        if ended(reader):
            wrong += 1
            print((base / f"reader-{i}.log").read_text()[-300:], flush=True)
    stop.touch()
    assert ended(writer) == 0, (base / "writer.log").read_text()[-1000:]
    return wrong


def two_writers(trials: Trials, number: int) -> int:
    """Resume one run twice at once, again and again; how many times not just one went on."""
    wrong = 0
    for i in range(number):
        run, log = trials.base / f"two-{i}", trials.base / f"two-{i}.log"
        ended(forked(lambda run=run: train(run, trials.kind), trials.log), trials.seconds / 2)
        both = [forked(lambda run=run: train(run, trials.kind), log) for _ in range(2)]
        codes = sorted(ended(child) for child in both)
        said = log.read_text()
        fair = codes == [0, 6] and any(str(child) in said for child in both)
        if not (fair or codes == [0, 0]) or list(differences(facts(run), trials.whole)):
            wrong += 1
            print(f"{run.name}: exit codes {codes}, {said[-300:]}", flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--loads", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=4, help="of writers at once")
    parser.add_argument("--seconds", type=float, default=3600.0, help="after which no more runs are killed")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "MPLBACKEND": "Agg"}
    import matplotlib.pyplot
    import sklearn.datasets
    import torch

    import pyrovae.app.cli
    import pyrovae.app.train

    loaded = matplotlib.pyplot, sklearn.datasets, pyrovae.app.cli, pyrovae.app.train
    assert all(loaded)
    torch.set_num_threads(1)
    began, wrong = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        chance = random.Random(options.seed)
        kinds = []
        for kind in ("eager", "compiled"):
            if kind == "compiled":  # here once, so that forks find it compiled
                train_here(Path(folder, "here"))
            kinds.append(Trials(kind, Path(folder), chance))
        hows = ["import", "save", *["clock", "save"] * 4]
        for i in range(10**6):
            kills = sum(count for t in kinds for name, count in t.found.items() if "kills" in name)
            if kills >= options.kills or time.monotonic() - began > options.seconds:
                break
            kinds[i % 2].trial(hows[i // 2 % len(hows)], i)
            print(f"{kills} kills", end="\r", flush=True)
        for t in kinds:
            took = f"a run takes {t.seconds:.1f} s and changes files {t.changes} times"
            print(f"{t.kind}: {dict(sorted(t.found.items()))}; {took}", flush=True)
            wrong += sum(count for name, count in t.found.items() if "wrong" in name)
        failed = loads(Path(folder), options.loads)
        print(f"{options.loads - failed} of {options.loads} processes loaded one epoch's weights 5 times", flush=True)
        unfair = two_writers(kinds[0], options.pairs)
        print(f"{options.pairs - unfair} of {options.pairs} pairs of writers: one gave way")
    print(f"{time.monotonic() - began:.0f} s, {wrong + failed + unfair} wrong")
    return int(bool(wrong + failed + unfair))


def train_here(run: Path) -> None:
    """The compiled job in this process."""
    with contextlib.suppress(SystemExit), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        train(run, "compiled")


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    sys.exit(main())
