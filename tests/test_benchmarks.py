"""The benchmarks at a tiny size: they measure, say what is absent and who trains otherwise, and write both files."""

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.benchmarks import ahead, bound, contenders, epochs, first, gpu, images, likelihoods, rates, run
from tests.benchmarks.children import Child
from tests.benchmarks.options import Options
from tests.benchmarks.tables import Table, show
from tests.benchmarks.trainers import FIT, FLOOR, HAND, NUMPYRO
from tests.benchmarks.turns import Run

ROOT = Path(__file__).resolve().parents[1]


def test_epochs_without_jax(tmp_path, monkeypatch, capsys):
    """One command measures whoever is there, and names the extra that brings whoever is not."""
    (tmp_path / "jax.py").write_text("raise ModuleNotFoundError('No module named jax')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    words = "--only epochs --cells 4x2 --on 1 --rounds 2 --epoch-steps 3 --data-dir no-such-folder --json"
    files = [str(tmp_path / "found.json"), "--markdown", str(tmp_path / "found.md")]
    monkeypatch.setattr(sys, "argv", ["run.py", *words.split(" "), *files, "--contenders", HAND, FLOOR, NUMPYRO])
    run.main()
    left_out = f'!! {NUMPYRO} is left out: pip install "pyrovae[benchmarks]"'
    assert [line for line in capsys.readouterr().err.splitlines() if "left out" in line] == [left_out]
    found = json.loads((tmp_path / "found.json").read_text())
    times, compilations, losses = (table["rows"][0] for table in found["sections"]["epochs"])
    assert (times["cores"], times["batch"], times["k"], times["steps"]) == (1, 4, 2, 3)
    assert times["cpu ms"][HAND] > times["cpu ms"][FLOOR] > 0  # it does the same products, and more
    assert NUMPYRO not in {**times, **compilations, **losses}
    assert 0 < losses[HAND] < 784 * math.log(2)
    assert {"device", "units", "torch", "jax"} <= found["environment"].keys()
    assert f"| 1 | 4 | 2 | {show(times[HAND])} | {show(times[FLOOR])} |" in (tmp_path / "found.md").read_text()


def test_likelihoods_and_time_to_a_bound_without_jax(tmp_path, monkeypatch, capsys):
    """The children of both read the weights and data that they are given, and name the extra."""
    (tmp_path / "numpyro.py").write_text("raise ModuleNotFoundError('No module named numpyro')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setattr(rates, "NAMES", (NUMPYRO, HAND))
    monkeypatch.setattr(bound, "NAMES", (NUMPYRO, HAND))
    options = Options(warmup=2, samples=3, images=2, data_dir=Path("no-such-folder"), cores=(1,), rounds=1, steps=2)
    rate, time = likelihoods.beside_numpyro(options), bound.run(replace(options, epochs=1, target=-1e9))[0]
    assert rate.rows[0][HAND] > 0
    vae = contenders.trained(contenders.Setting("mlp", 20), options)
    x = images.load(options.data_dir)[1].x[:2]  # grey: its log p(x) is near that of its bits
    assert abs(rate.rows[0][f"log p(x), {HAND}"] - contenders.hand_log_likelihood(vae, x, 50).mean().item()) < 50
    assert [row[f"epochs, {HAND}"] for row in time.rows] == [1, 1]
    assert all(-784 * math.log(2) < row[f"bound, {HAND}"] < 0 < row[HAND] for row in time.rows)
    for table in (rate, time):
        assert table.notes[-1] == f'Left out: {NUMPYRO} (pip install "pyrovae[benchmarks]").'
    assert capsys.readouterr().err.count("left out") == 2


def test_the_first_step_finds_the_compiler_once():
    """The second process has the graph from the cache that the first one filled."""
    (table,) = first.run(Options(cores=(1,), cells=((2, 1),), contenders=(FIT,)))
    empty, filled = table.rows
    assert (empty["cache"], filled["cache"]) == first.CACHES
    assert empty["of it the C++ compiler"] > filled["of it the C++ compiler"]
    assert min(row[figure] for row in table.rows for figure in ("imports", "seconds", "CPU")) > 0


def test_steps_of_both_kinds():
    """Epochs go by turns, and both train."""
    options = Options(networks=("mlp",), cells=((4, 1),), rounds=1, steps=3, contenders=("AdamW, clip_norm",))
    row = ahead.run(replace(options, data_dir=Path("no-such-folder")))[0].rows[0]
    assert row[ahead.CPP] > 0 < row[ahead.PYTHON]
    assert row["C++ / Python"] == row[ahead.CPP] / row[ahead.PYTHON]


@pytest.mark.parametrize(("other", "far"), [(-100.5, False), (-101.0, True), (math.nan, True)])
def test_another_log_likelihood_is_named(other, far):
    ours = Run(None, losses=[-100.0], errors=[0.1])
    assert len(likelihoods.unequal({"pyrovae": ours, NUMPYRO: Run(None, losses=[other], errors=[math.nan])})) == far


@pytest.mark.parametrize(
    ("own", "fault"),
    [([200.0, 150.0], None), ([200.0, 154.0], None), ([200.0, 170.0], "170.0"), ([140.0, 150.0], "140.0"),
     ([200.0, math.nan], "nan")],
)  # fmt: skip
def test_who_trains_otherwise_is_named(own, fault):
    runs = {HAND: [200.0, 151.0], NUMPYRO: own, FLOOR: [math.nan, math.nan]}
    said = epochs.unlike({name: Run(None, losses=losses) for name, losses in runs.items()})
    assert [NUMPYRO in line and fault in line for line in said] == ([True] if fault else [])


def test_a_child_that_dies_says_why():
    with Child("trainers", "nobody", 1, 1, 1, "not a number", "") as child, pytest.raises(RuntimeError, match="number"):
        child.answer()


@pytest.mark.parametrize("words", ["--only nothing", "--cells 20", "--cells 20x"])
def test_unknown_arguments_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        run.parse(words.split())
    assert "error" in capsys.readouterr().err


def test_a_table_shows_what_was_not_measured():
    table = Table("T", ["a", "b"], [{"a": 1234.5, "b": None}, {"a": 0.123, "b": 20}], ["A note."])
    assert table.markdown().splitlines()[2:6] == ["| a | b |", "| --- | --- |", "| 1,234 | – |", "| 0.12 | 20 |"]
    assert table.markdown().endswith("A note.\n")


FIRST = """
import sys, json, time
where = sys.argv[sys.argv.index("--json") + 1]
time.sleep(float(sys.argv[1]))
rows = [{"a": 1.0}]
table = {"title": "T", "columns": ["a"], "rows": rows, "notes": []}
open(where, "w").write(json.dumps({"environment": {"device": "none"}, "sections": {"x": [table]}}))
"""


OTHERS = ("replicas, 20x1", "epochs, 20x1")


def asked(monkeypatch, folder, seconds, minutes=0.2):
    """The command for a card, whose parts wait for so many seconds each."""
    command = [sys.executable, "-c", FIRST]

    def instead(card, part):
        return [*command, str(seconds.get(part, 0)), "--json", str(card.path(part, ".json"))]

    monkeypatch.setattr(gpu.Card, "command", instead)
    words = f"gpu.py --minutes {minutes} --folder {folder} --device cpu --only memory replicas epochs"
    monkeypatch.setattr(sys, "argv", words.split(" "))
    gpu.main()
    return json.loads((folder / "found.json").read_text())


def test_a_card_that_is_cut_off_keeps_what_it_answered_and_goes_on(monkeypatch, tmp_path):
    found = asked(monkeypatch, tmp_path, {"replicas, 20x1": 60}, minutes=0.05)
    assert found["ended"] == {"memory, 100x50": "done", **dict.fromkeys(OTHERS, "out of minutes")}
    assert list(found["parts"]) == ["memory, 100x50"]
    before = (tmp_path / "memory-100x50.json").stat().st_mtime_ns
    found = asked(monkeypatch, tmp_path, {})
    assert found["ended"] == dict.fromkeys(OTHERS, "done")
    assert set(found["parts"]) == {"memory, 100x50", *OTHERS}
    assert (tmp_path / "memory-100x50.json").stat().st_mtime_ns == before
    text = (tmp_path / "found.md").read_text()
    assert text.count("### T") == 3
    assert "Tests on the card: not run." in text


def test_an_answer_that_was_cut_off_is_none(tmp_path):
    card = gpu.Card(tmp_path, "cpu", True, 0.0)
    card.path("likelihoods", ".json").write_text('{"sections": {"likeli')
    assert not card.answered("likelihoods")
    card.write({})
    assert json.loads((tmp_path / "found.json").read_text())["parts"] == {}


def test_a_part_that_fails_says_why_and_is_asked_again(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.Card, "command", lambda *_: [sys.executable, "-c", "raise OSError('no card')"])
    monkeypatch.setattr(sys, "argv", f"gpu.py --folder {tmp_path} --device cpu --only memory".split(" "))
    gpu.main()
    assert json.loads((tmp_path / "found.json").read_text())["ended"] == {
        "memory, 100x50": "failed (1): OSError: no card"
    }
    assert "- memory, 100x50: failed (1): OSError: no card" in (tmp_path / "found.md").read_text()
    assert not gpu.Card(tmp_path, "cuda", False, 0.0).answered("memory, 100x50")


@pytest.mark.parametrize(("device", "rate", "dry"), [("cuda", 30.0, False), ("cuda", 0.1, True), ("cpu", 2.0, True)])
def test_a_dry_run_is_of_tiny_sizes_and_never_a_cards_answer(device, rate, dry, monkeypatch, tmp_path):
    """Where a processor works, under its own name or as a card."""
    cards = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu, "run_child", lambda *_: {"device": device, "rate": rate})
    monkeypatch.setattr(gpu, "ask", lambda card, _: cards.append(card))
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    gpu.main()
    (card,) = cards
    assert (card.device, card.quick) == (device, dry)
    assert card.folder.name == (f"dry-{device}" if dry else "gpu")
    assert ("4x2" in card.command("replicas, 20x1")) == dry


def test_a_card_that_is_absent_is_named(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "run_child", lambda *_: {"error": "no devices"})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cuda"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "no card answers as cuda: no devices" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_a_card_has_started_ends_with_it(tmp_path, number):
    started = tmp_path / "started"
    waits = f"import os, time; open({str(started)!r}, 'a').write(f'{{os.getpid()}} '); time.sleep(60)"
    starts = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {waits!r}]); {waits}"
    part = [sys.executable, "-c", starts]
    words = f"from tests.benchmarks import gpu; gpu.Card.command = lambda *_: {part!r}; gpu.main()"
    asked = ["--folder", str(tmp_path), "--device", "cpu", "--only", "memory"]
    job = subprocess.Popen([sys.executable, "-c", words, *asked], cwd=gpu.ROOT)
    while not started.exists() or started.read_text().count(" ") < 2:
        time.sleep(0.05)
    job.send_signal(number)
    assert job.wait(60) == -number
    until = time.monotonic() + 20
    while any(map(runs, started.read_text().split())):
        assert time.monotonic() < until
        time.sleep(0.05)


def runs(pid):
    """Whether a process is there, and no zombie that nobody has waited for."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_the_outcomes_of_tests_are_known_when_they_are_cut_off(tmp_path):
    outcomes = gpu.Outcomes(tmp_path / "tests.jsonl", writes=True)
    report = SimpleNamespace(when="call", passed=True, nodeid="a.py::one", outcome="passed", longrepr="")
    outcomes.pytest_runtest_logreport(report)
    with (tmp_path / "tests.jsonl").open("a") as file:
        file.write('{"test": "a.py::two", "outc')  # as it was written
    items = [SimpleNamespace(nodeid="a.py::one"), SimpleNamespace(nodeid="a.py::two")]
    outcomes.pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items] == ["a.py::two"]
    outcomes.pytest_runtest_logreport(SimpleNamespace(**vars(report) | {"nodeid": "a.py::two"}))
    assert list(gpu.outcomes(outcomes.file)) == ["a.py::one", "a.py::two"]
