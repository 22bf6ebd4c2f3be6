"""Several processes: the numbers of one, or a refusal that says why; what is lost is named."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

import pyrovae as pv
from pyrovae import ranks
from pyrovae.app import several
from pyrovae.compile import rows
from tests import ranked

ENDS = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What jobs come to in one process, and in each of two."""
    folder = tmp_path_factory.mktemp("ranked")
    one = ranked.launch(1, folder, [*ranked.JOBS, *ranked.ALIKE])[0]
    return one, ranked.launch(2, folder, [*ranked.JOBS, *ranked.ALIKE, *ranked.REFUSED])


def close(got, expected):
    """Whether results are equal to within rounding of float64."""
    if isinstance(expected, dict):
        return got.keys() == expected.keys() and all(close(got[k], expected[k]) for k in expected)
    if isinstance(expected, list):
        return len(got) == len(expected) and all(map(close, got, expected))
    return torch.allclose(
        torch.as_tensor(got).double(), torch.as_tensor(expected).double(), rtol=1e-9, atol=1e-10, equal_nan=True
    )


@pytest.mark.parametrize("name", ranked.JOBS)
def test_two_processes_have_the_numbers_of_one(found, name):
    one, two = found
    for own in two:
        assert close(own[name], one[name]), (one[name], own[name])


@pytest.mark.parametrize("name", ranked.ALIKE)
def test_all_processes_have_the_same_numbers(found, name):
    one, two = found
    assert isinstance(two[0][name], dict), two[0][name]
    assert name.startswith("resumed in 1") or close(two[0][name], two[1][name])
    assert name == "rejecting" or close(two[0][name], one[name])


@pytest.mark.parametrize("name", ranked.REFUSED)
def test_what_cannot_be_shared_is_refused_by_name(found, name):
    _, two = found
    told = ranked.REFUSED[name][1]
    assert any(told in own[name] for own in two), two[0][name]
    assert all(re.match(r"(Value|Data|Elsewhere)Error: ", own[name]) for own in two), two[1][name]


def test_four_processes_have_the_numbers_of_one(found, tmp_path):
    names = ["iwae, clipped", "few", "evaluated"]
    for own in ranked.launch(4, tmp_path, names):
        assert all(close(own[name], found[0][name]) for name in names)


def test_torchs_own_data_parallel_training_agrees(found, tmp_path):
    ranked.together(2, "tests.ddp", str(tmp_path))
    theirs = torch.load(tmp_path / "ddp.pt")
    for own in (found[0], *found[1]):
        assert close(own["by hand"]["weights"], theirs)


def test_rows_are_shared_out_once():
    for number, size in ((7, 3), (2, 4), (9, 1)):
        shares = [ranks.Ranks(r, size).share(number) for r in range(size)]
        assert [i for own in shares for i in range(number)[own]] == list(range(number))
        assert max(len(range(number)[own]) for own in shares) - min(len(range(number)[own]) for own in shares) <= 1


def test_draws_that_cannot_be_told_apart_are_refused():
    draws, _ = rows.learn(lambda batch: (torch.rand(len(batch[0]), 3), torch.rand(4, 3)), (torch.zeros(8),))
    with pytest.raises(ValueError, match=r"draws of shape \[4, 3\] are of rows"):
        rows.Rows(draws, 8, slice(0, 4))
    with rows.Rows(draws, 8, slice(0, 3)), pytest.raises(ValueError, match="which the first batch did not"):
        torch.rand(5)


def test_no_rendezvous(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE=2 .* RANK, MASTER_ADDR, MASTER_PORT is not set"):
        pv.fit(*[lambda x: None] * 2, torch.zeros(3, 2), objective=pv.ELBO(), epochs=1)
    with ranks.alone():
        assert ranks.ranks().size == 1


def test_processes_that_are_started_again_find_nothing_of_the_former():
    kept = dist.HashStore()

    def found(number: int, rank: int, late: float) -> bytes:
        time.sleep(late)
        store = ranks.fresh_store(kept, rank, 3, 20.0)
        if rank == 0:
            time.sleep(0.1)  # until then a former process's would be found
            store.set("number", str(number))
        return store.get("number")

    for number, late in enumerate([(0.0, 0.0, 0.0), (0.0, 0.1, 0.2), (0.2, 0.0, 0.0)]):
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(found, [number] * 3, range(3), late)) == [str(number).encode()] * 3
    with pytest.raises(RuntimeError, match="process 1, 2 did not come"):
        ranks.fresh_store(kept, 0, 3, 0.1)


def started(folder: Path, *more: str, processes: int = 2, seconds: str = "20"):
    """A job of the command line, started by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0"]
    command += ["--standalone", "--max-restarts", "1", "-m", "pyrovae", "train", "vae"]
    command += ["--data", "digits", "--samples", "20"]
    command += ["--set", "hidden=[8]", "--set", "compile=false", "--run-dir", str(folder), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", ranks.TIMEOUT: seconds}
    return subprocess.Popen(command, env=environment, start_new_session=True, **ENDS)


def workers(job: subprocess.Popen) -> list[int]:
    """The processes that a torchrun has started."""
    tasks = Path(f"/proc/{job.pid}/task").glob("*/children")
    return [int(pid) for task in tasks for pid in task.read_text().split()]


def stamp(path: Path) -> int | None:
    """When something was written last."""
    with suppress(FileNotFoundError):
        return path.stat().st_mtime_ns
    return None


def kill_one(job: subprocess.Popen, written: Path) -> None:
    """Kill a process of a job that has written something more, and wait until its processes are others."""
    before = stamp(written)
    while job.poll() is None and stamp(written) in (None, before):
        time.sleep(0.02)
    if found := workers(job):
        os.kill(found[-1], signal.SIGKILL)
    while job.poll() is None and set(found) & set(workers(job)):
        time.sleep(0.02)


def trained(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """A job of the command line, by itself."""
    command = [sys.executable, "-m", "pyrovae", "train", "vae", "--data", "digits", "--samples", "20"]
    command += ["--set", "hidden=[8]", "--set", "compile=false", "--run-dir", str(folder), *more]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=200, **ENDS)


def test_a_killed_process_ends_the_job_which_goes_on_in_others(tmp_path):
    """Killed with SIGKILL twice: torchrun starts it again, then one process finishes it.

    It ends with the bits of a job that nobody kills, in as many processes for as many epochs.
    """
    killed, calm, settings = tmp_path / "killed", tmp_path / "calm", ("--batch-size", "300", "--epochs")
    job = started(killed, "--resume", *settings, "40")
    kill_one(job, killed / "last")
    kill_one(job, killed / "metrics.jsonl")
    said = job.communicate(timeout=120)
    assert job.returncode != 0, said
    reached = pv.runs.Run(killed).state()["epoch"]
    assert 1 <= reached < 40
    done = [trained(calm, "--processes", "2", *settings, str(reached))]
    assert json.loads((calm / "config.json").read_text())["training"]["processes"] == 2
    done += [trained(folder, "--resume", *settings, "40") for folder in (killed, calm)]
    assert not any(job.returncode for job in done), [job.stderr for job in done]
    one, other = (pv.load(folder).state_dict() for folder in (killed, calm))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_fails_in_one_of_the_commands_processes_ends_all(tmp_path):
    """With its exit code."""
    (tmp_path / "config.json").write_text("{}")
    done = trained(tmp_path, "--processes", "2", "--epochs", "1")
    assert done.returncode == 2, done.stderr
    assert "holds a run already" in done.stderr


def test_processes_in_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"WORLD_SIZE=4 .* --processes 2"):
        several.several(2, ["list"])


HANGS = """
import sys, time, torch, pyrovae as pv
from datetime import timedelta
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=15)
)
if rank == 1:
    time.sleep(300)
else:
    vae = pv.models.VAE((2,), latent_dim=1, hidden=())
    pv.fit(vae.model, vae.guide, torch.ones(8, 2), objective=pv.ELBO(), epochs=1)
"""


def test_a_process_that_hangs_is_named(tmp_path):
    pair = [subprocess.Popen([sys.executable, "-c", HANGS, str(r), str(tmp_path)], **ENDS) for r in range(2)]
    _, said = pair[0].communicate(timeout=280)
    pair[1].kill()
    pair[1].communicate()
    assert "ResourceError: process 1 of 2 ended or does not answer" in said
