"""The tables' cells: each has one record, made by one command, and goes on where it was interrupted; and their page."""

import json
import os
import re
import runpy
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
import records
import results
import tables
from cells import SLOW

import pyrovae as pv
from pyrovae.train import loop
from pyrovae.train.trainee import Trainee
from tests.benchmarks import figures as figures_of

ROOT = Path(__file__).resolve().parents[1]
FIELDS = {
    "table", "dataset", "layers", "objective", "gradient", "particles", "groups", "nll", "nll_std_error", "num_samples",
    "active_units", "epochs", "batch_size", "minutes", "device", "seed", "commit", "command",
}  # fmt: skip
TIMES = {"minutes", "cpu_minutes"}


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Run the script with arguments, its files in a folder of the test; the records that are there then."""

    def run(*arguments):
        files = ["--runs", str(tmp_path / "runs"), "--records", str(tmp_path / "records")]
        monkeypatch.setattr(sys, "argv", ["tables.py", *arguments, *files])
        monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
        runpy.run_path(str(ROOT / "examples" / "tables.py"), run_name="__main__")
        return [json.loads(path.read_text()) for path in sorted((tmp_path / "records").glob("*.json"))]

    return run


SMALL = ["--epochs", "3", "--train", "200", "--samples", "20", "--batch-size", "50"]
VAE = ["a", "--layers", "1", "--particles", "1", *SMALL]
ONE = ["a", "--layers", "2", "--objective", "IWAE", "--particles", "5", *SMALL]


def named(found):
    return {records.name(records.asked(record)): record for record in found}


class Interrupting:
    """A method that dies once, before it does anything, at a call of that number."""

    def __init__(self, method, at):
        self.method, self.at, self.calls = method, at, 0

    def __get__(self, owner, _=None):
        def call(*arguments):
            self.calls += 1
            if self.calls == self.at:
                raise KeyboardInterrupt
            return self.method(owner, *arguments)

        return call


def without_times(record):
    kept = {key: value for key, value in record.items() if key not in TIMES}
    if "curve" in kept:
        points = [{k: v for k, v in point.items() if k != "minutes"} for point in kept["curve"]["points"]]
        kept["curve"] = kept["curve"] | {"points": points}
    return kept


def test_a_record_says_how_its_figures_came_about_and_its_command_makes_them_again(table, tmp_path):
    (record,) = table(*ONE)
    assert record.keys() >= FIELDS
    assert (record["table"], record["dataset"], record["layers"], record["epochs"]) == ("A", "digits", 2, 3)
    assert record["active_units"].keys() == {"z1", "z2"}
    assert record["minutes"] > 0
    assert str(tmp_path) not in json.dumps(record)
    python, script, *arguments = shlex.split(record["command"])
    assert (python, script) == ("python", "examples/tables.py")
    (path,) = (tmp_path / "records").iterdir()
    path.unlink()
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    (again,) = table(*arguments)
    assert without_times(again) == without_times(record)


def test_a_cell_that_was_interrupted_has_no_record_and_ends_with_the_same_figures(table, monkeypatch, tmp_path):
    (whole,) = table(*ONE)
    (tmp_path / "records").rename(tmp_path / "others")
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    run_epoch, calls = loop.run_epoch, []

    def dying(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run_epoch(*arguments)

    monkeypatch.setattr(loop, "run_epoch", dying)
    with pytest.raises(KeyboardInterrupt):
        table(*ONE)
    assert not (tmp_path / "records").exists()
    monkeypatch.setattr(loop, "run_epoch", lambda *arguments: calls.append(arguments) or run_epoch(*arguments))
    (resumed,) = table(*ONE)
    assert len(calls) == 4, "two epochs were trained before, one is left"
    assert without_times(resumed) == without_times(whole)


def test_a_finished_cell_is_not_trained_again_and_other_settings_have_another_record(table, monkeypatch):
    (record,) = table(*ONE)
    trained = loop.run_epoch
    monkeypatch.setattr(loop, "run_epoch", lambda *arguments: pytest.fail("a finished cell was trained"))
    assert table(*ONE) == [record]
    monkeypatch.setattr(loop, "run_epoch", trained)
    other = ["--lr", "1e-4", "--gradient", "dreg"]
    assert sorted(r["gradient"] for r in table(*ONE, *other)) == ["dreg", "total"]


def test_a_budget_in_minutes_becomes_epochs(table):
    (record,) = table(
        "a", "--layers", "1", "--particles", "1", "--minutes", "0.001", "--train", "200", "--samples", "5"
    )
    assert record["epochs"] >= 1
    assert record["budget_minutes"] == 0.001


def test_a_second_stage_begins_with_the_network_of_its_first_which_is_trained_once(table, monkeypatch, tmp_path):
    ((name, first),) = named(table(*VAE)).items()
    stages = ["b", "--objective", "IWAE", *SMALL]
    run_epoch, calls = loop.run_epoch, []
    monkeypatch.setattr(loop, "run_epoch", lambda *arguments: calls.append(arguments) or run_epoch(*arguments))
    still = named(table(*stages, "--second", "1", "--second-lr", "1e-12"))
    assert len(calls) == 1
    (record,) = (record for record in still.values() if record["table"] == "B")
    assert record["nll"] == pytest.approx(first["nll"], abs=1e-4)  # such a rate changes nothing
    assert record["continues"] == records.asked(first)
    assert record["continued"]["record"] == name
    assert record["continued"]["epochs"] == 3

    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    (tmp_path / "records").rename(tmp_path / "others")
    calls.clear()
    (record,) = table(*shlex.split(record["command"])[2:])
    assert len(calls) == 4, "without the first stage's run both are trained"
    assert without_times(record) == without_times(next(r for r in still.values() if r["table"] == "B"))

    calls.clear()
    assert len(table(*stages)) == 2
    (record,) = (record for record in table(*stages) if record["epochs"] == 2)
    assert (len(calls), record["lr"]) == (2, 2e-4), "2/3 as long, with a tenth of the rate"


def test_a_second_stage_waits_for_a_first_that_another_process_trains(table, monkeypatch, capsys, tmp_path):
    (first,) = table(*VAE)
    with tables.mine(tmp_path / "runs" / records.name(records.asked(first))):
        assert len(table("b", "--objective", "IWAE", *SMALL)) == 1
    assert "another process is at work on table a, 1 layer, VAE, k = 1, with which it begins" in capsys.readouterr().out


def test_table_c_has_the_gap_in_the_end_and_along_the_training_however_often_interrupted(table, monkeypatch, tmp_path):
    monkeypatch.setattr(Trainee, "save", interrupted := Interrupting(Trainee.save, at=2))
    exact = pv.posterior_gap
    monkeypatch.setattr(pv, "posterior_gap", lambda *data, **options: exact(*data, **options | {"num_samples": 128}))
    cell = ["c", "--objective", "MIWAE", "--groups", "4", *SMALL, "--samples", "100"]
    with pytest.raises(KeyboardInterrupt):
        table(*cell)
    assert interrupted.calls == 2
    (record,) = table(*cell)
    assert [point["epoch"] for point in record["curve"]["points"]] == [1, 2, 3]
    assert record["log_p"] == -record["nll"]
    assert record["minus_kl"] == pytest.approx(record["iwae_64"] - record["log_p"])
    assert (record["particles"], record["groups"]) == (16, 4)
    for point in record["curve"]["points"]:
        assert point["iwae_64"] < point["log_p"]
    assert record["curve"]["points"][0]["log_p"] < record["curve"]["points"][-1]["log_p"]
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    (tmp_path / "records").rename(tmp_path / "others")
    (whole,) = table(*cell)
    assert without_times(whole) == without_times(record)


BEYOND = ["d", "--layers", "1", "--gradient", "dreg", "--variant", "vamp", *SMALL, "--epochs", "5", "--samples", "64"]


def test_a_cell_beyond_the_tables_grows_and_has_its_curve_in_minutes(table, monkeypatch, tmp_path):
    exact, particles, run_epoch = pv.posterior_gap, [], loop.run_epoch
    monkeypatch.setattr(pv, "posterior_gap", lambda *data, **options: exact(*data, **options | {"num_samples": 64}))

    def seeing(*given):
        found = run_epoch(*given)
        particles.append(found["num_particles"])
        return found

    monkeypatch.setattr(loop, "run_epoch", seeing)
    (record,) = table(*BEYOND)
    assert particles == [1, 5, 5, 5, 20], "6x1,11x5,3x20 of 5 epochs"
    assert (record["variant"], record["growth"], record["particles"]) == ("vamp", SLOW, 20)
    minutes = [point["minutes"] for point in record["curve"]["points"]]
    assert len(minutes) == 5
    assert minutes == sorted(minutes)
    assert minutes[-1] == pytest.approx(record["minutes"])
    config = tmp_path / "runs" / records.name(records.asked(record)) / "run" / "config.json"
    assert '"prior": "vamp"' in config.read_text()
    monkeypatch.setattr(loop, "run_epoch", lambda *arguments: pytest.fail("the cell's own command names another"))
    assert table(*shlex.split(record["command"])[2:]) == [record]


def test_every_cell_beyond_the_tables_has_a_network_and_a_command_of_its_own(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tables.py", "d"])
    options = tables.parse().parse_args()
    commands = set()
    for cell in tables.chosen(options):
        assert cell.network((1, 8, 8)).config.items() >= {"input_shape": [1, 8, 8]}.items()
        command = tables.command_of(tables.settings_of(cell, options))
        commands.add(command)
        monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
        assert tables.chosen(tables.parse().parse_args()) == [cell]
    assert len(commands) == len(tables.TABLES["d"])


def test_a_request_to_end_is_met_after_an_epoch_whose_checkpoint_is_kept(table, monkeypatch, tmp_path):
    (whole,) = table(*VAE)
    shutil.rmtree(tmp_path / "runs")
    shutil.rmtree(tmp_path / "records")
    run_epoch, calls = loop.run_epoch, []

    def asked(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return run_epoch(*arguments)

    monkeypatch.setattr(loop, "run_epoch", asked)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="the same command goes on with it"):
        table(*VAE)
    assert signal.getsignal(signal.SIGTERM) == before
    assert (len(calls), (tmp_path / "records").exists()) == (2, False)
    (resumed,) = table(*VAE)
    assert len(calls) == 3, "both epochs were kept"
    assert without_times(resumed) == without_times(whole)


def test_the_commit_of_a_copy_without_its_repository_is_what_it_is_told(monkeypatch, tmp_path):
    told = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setenv("PYROVAE_COMMIT", told)
    assert records.commit() != told, "the repository knows better"
    monkeypatch.setattr(records, "ROOT", tmp_path)
    assert records.commit() == told
    monkeypatch.setenv("PYROVAE_COMMIT", "main")
    with pytest.raises(ValueError, match="must be a commit of 40 digits, got 'main'"):
        records.commit()
    monkeypatch.delenv("PYROVAE_COMMIT")
    assert records.commit() == "unknown"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["e"], "invalid choice: 'e'"),
        (["d", "--gradient", "steepest"], "no such cell: choose among 1 layer, VAE, k = 1;"),
        (["a", "--particles", "7"], "no such cell: choose among 1 layer, VAE, k = 1;"),
        (["c", "--objective", "VAE", "--samples", "63"], "more samples than IWAE-64, got 63"),
        (["b", "--gradient", "steepest"], "steepest"),
        (["a", "--data", "mnsit"], "did you mean 'mnist'"),
        (["a", "--data", "omniglot28", "--data-dir", "nowhere"], "chardata.mat"),
        (["a", "--epochs", "2", "--paper"], "not allowed with argument --epochs"),
    ],
)
def test_what_is_unknown_or_missing_is_said(table, capsys, arguments, said):
    with pytest.raises(SystemExit, match="2"):
        table(*arguments)
    assert said in capsys.readouterr().err


def trained(monkeypatch, *arguments, **found):
    """A record of the one cell that the arguments of the script name, with these figures."""
    monkeypatch.setattr(sys, "argv", ["tables.py", *arguments])
    options = tables.parse().parse_args()
    (cell,) = tables.chosen(options)
    settings = tables.settings_of(cell, options)
    known = {
        "epochs": options.epochs, "nll": 87.0, "nll_std_error": 0.004, "minutes": 9.0, "cpu_minutes": 8.0, "threads": 1,
        "active_units": {"z": {"at_one_draw": 18, "averaged": 18, "of": 50}}, "device": "cpu", "processor": "abacus",
        "path": "compiled", "versions": {"torch": "2"}, "commit": "c0ffee0", "command": tables.command_of(settings),
    }  # fmt: skip
    return settings | known | found


def rows_of(page):
    """The cells of all tables of a page, by their first."""
    lines = [line.strip("| ").split(" | ") for line in page.replace(results.KEPT, " ").splitlines() if line[:2] == "| "]
    return [(name, row) for name, *row in lines if name[:1].isdigit()]


MNIST = ["a", "--data", "mnist", "--layers", "1"]


def test_the_page_sets_figures_beside_the_published_and_says_what_was_not_run(monkeypatch):
    vae = trained(monkeypatch, *MNIST, "--particles", "1")
    iwae = trained(monkeypatch, *MNIST, "--particles", "50", "--objective", "IWAE", nll=85.5)
    page = results.page([vae, iwae])
    rows = dict(rows_of(page))
    assert rows["1 layer, VAE, k = 1"][:6] == ["87.00 ± 0.004", "86.76", "+0.24", "18", "18", "19"]
    assert rows["1 layer, IWAE, k = 50"][:3] == ["85.50 ± 0.004", "84.78", "+0.72"]
    assert [name for name, row in rows.items() if row[0] == "*not run*"] == [
        str(cell) for cell in tables.TABLES["a"] if (cell.layers, cell.objective, cell.particles) not in
        {(1, "VAE", 1), (1, "IWAE", 50)}
    ]  # fmt: skip
    for known in (
        *map(results.wrapped, (vae["command"], iwae["command"])),
        "abacus",
        "c0ffee0",
        "On OMNIGLOT *not run*",
    ):
        assert known in page


@pytest.mark.parametrize(
    "other",
    [{"commit": "decade5"}, {"epochs": 31}, {"seed": 1}, {"lr": 1e-4}, {"precision": "bfloat16"}, {"num_samples": 9}],
    ids=str,
)
def test_cells_of_another_commit_schedule_or_seed_stand_in_a_table_of_their_own(monkeypatch, other):
    vae = trained(monkeypatch, *MNIST, "--particles", "1")
    iwae = trained(monkeypatch, *MNIST, "--particles", "50", "--objective", "IWAE") | other
    rows = rows_of(results.page([vae, iwae]))
    assert len(rows) == 2 * len(tables.TABLES["a"])
    assert sum(row[0] != "*not run*" for _, row in rows) == 2


def test_orderings_are_counted_and_those_that_fail_are_named(monkeypatch):
    vae = trained(monkeypatch, *MNIST, "--particles", "1")
    five = trained(monkeypatch, *MNIST, "--particles", "5", "--objective", "IWAE", nll=86.0)
    fifty = trained(monkeypatch, *MNIST, "--particles", "50", "--objective", "IWAE", nll=86.5)
    page = results.page([vae, five, fifty])
    assert "* IWAE is better with more particles: 1 of 2; not IWAE k = 50, 1 layer.\n" in page


def test_the_other_tables_beside_the_published(monkeypatch):
    first = trained(monkeypatch, *MNIST, "--particles", "1")
    (name,) = named([first])
    second = trained(
        monkeypatch, "b", "--data", "mnist", "--objective", "IWAE", nll=85.0,
        continued={"record": name, "epochs": 30, "commit": "facade5", "train_bound": -87.0},
    )  # fmt: skip
    gap = {"iwae_64": -86.0, "log_p": -84.5, "minus_kl": -1.5}
    curve = {"images": 7, "samples": 128, "points": [{"epoch": 1, "iwae_64": -100.0, "log_p": -98.0}]}
    miwae = trained(
        monkeypatch, "c", "--data", "mnist", "--objective", "MIWAE", "--groups", "8", **gap, nll=84.5, curve=curve
    )
    page = results.page([first, second, miwae])
    rows = dict(rows_of(page))
    assert rows["1 layer, VAE, k = 1, then IWAE, k = 50"][:6] == [
        "87.00, 18", "85.00 ± 0.004", "84.88", "+0.12", "18", "22"
    ]  # fmt: skip
    assert "facade5" in page
    assert rows["1 layer, MIWAE, k = 8 x 8"][:9] == [
        "-86.00", "-85.69 ± 0.04", "-0.31", "-84.50", "-84.97 ± 0.10", "+0.47", "-1.50", "-0.72 ± 0.11", "-0.78"
    ]  # fmt: skip
    assert "first 7 test images, log p-hat in them from 128 samples" in page


def test_what_is_beyond_the_tables_is_said_with_its_cost(monkeypatch, tmp_path):
    points = [{"epoch": e, "minutes": 4.0 * e, "iwae_64": -90.0 / e, "log_p": -88.0 / e} for e in (1, 2)]
    more = {
        "iwae_64": -85.5, "log_p": -84.5, "minus_kl": -1.0, "curve": {"images": 7, "samples": 128, "points": points}
    }  # fmt: skip
    cell = ["d", "--data", "mnist", "--layers", "1", "--objective", "IWAE", "--variant", "plain", "--particles"]
    dreg = trained(monkeypatch, *cell, "50", "--growth", "fixed", "--gradient", "dreg", nll=84.5, **more)
    plain = trained(monkeypatch, *cell, "50", "--growth", "fixed", "--gradient", "total", nll=85.0, **more)
    page = results.page([dreg, plain])
    rows = dict(rows_of(page))
    assert rows["1 layer, IWAE, k = 50, dreg"][:3] == ["84.50 ± 0.004", "84.78", "-0.28"]
    assert rows["1 layer, IWAE, k = 50"][:3] == ["85.00 ± 0.004", "84.78", "+0.22"]
    assert "Better than the best published of 1 layer, 84.78: IWAE, k = 50, dreg: 84.50 in 9.0 minutes.\n" in page
    ((_, by_cell),) = results.grouped([dreg, plain])
    assert len(by_cell) == 2, "gradients stand together, machines do not"
    assert len(results.grouped([dreg, plain | {"processor": "pebbles"}])) == 2
    results.draw(by_cell, "D", tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 0


def test_what_is_no_record_of_a_finished_cell_is_refused(monkeypatch, tmp_path):
    record = trained(monkeypatch, *MNIST, "--particles", "1")
    path = tmp_path / f"{records.name(records.asked(record))}.json"
    path.write_text(json.dumps(record))
    assert records.read(tmp_path) == [record]
    for broken, said in [
        (json.dumps(record)[:-9], "no record of a finished cell"),
        (json.dumps({key: value for key, value in record.items() if key != "nll"}), "it lacks nll"),
        (json.dumps(record | {"seed": 3}), "its settings are those of"),
    ]:
        path.write_text(broken)
        with pytest.raises(ValueError, match=said):
            records.read(tmp_path)
    with pytest.raises(ValueError, match="stand in no table"):
        results.page([record | {"particles": 7}])


def test_the_page_in_the_documentation_is_what_its_records_give():
    folder = ROOT / "docs" / "results"
    text = (folder / "tables.md").read_text(encoding="utf-8")
    assert text == results.page(records.read(folder)), "make it again: python examples/results.py"
    for drawn in re.findall(r"\]\((.*\.png)\)", text):
        assert (folder / drawn).is_file()


@pytest.fixture
def figures(monkeypatch, tmp_path):
    """Run the script of the figures with arguments, its files in a folder of the test; its page."""

    def run(*arguments):
        files = ["--folder", str(tmp_path / "figures"), "--page", str(tmp_path / "page.md")]
        monkeypatch.setattr(sys, "argv", ["figures.py", *files, *arguments])
        figures_of.main()
        return (tmp_path / "page.md").read_text(encoding="utf-8")

    return run


def test_what_a_command_prints_is_recorded_and_shown(figures, tmp_path):
    printed = "some steps were left out\n### Times\n\n| k | ms |\n| --- | --- |\n| 1 | 2.5 |\n| 5 | – |\n"
    command = [sys.executable, "-c", f"print({printed!r})"]
    page = figures("--part", "Memory", "--title", "Of a step", "--", *command)
    ((path, record),) = [(p, json.loads(p.read_text())) for p in (tmp_path / "figures").glob("*.json")]
    assert path.name == "memory-of-a-step.json"
    assert record["tables"][0]["rows"] == [{"k": "1", "ms": "2.5"}, {"k": "5", "ms": "–"}]
    assert record["printed"] == ["some steps were left out"]
    assert shlex.split(record["commands"][0]) == command
    assert record["commit"] == records.commit()
    for shown in ("## Memory\n\n### Of a step", "| 1 | 2.5 |\n| 5 | – |", f"Commit {record['commit'][:7]}"):
        assert shown in page
    assert figures() == page
    path.write_text(json.dumps(record | {"title": "Of another"}))
    with pytest.raises(ValueError, match="is no record of 'Memory', 'Of another'"):
        figures()
    path.write_text(json.dumps({key: value for key, value in record.items() if key != "commit"}))
    with pytest.raises(ValueError, match="lacks commit"):
        figures()


def test_the_page_of_results_is_what_its_records_give():
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    known = figures_of.read(ROOT / "docs" / "results" / "figures")
    assert page == figures_of.page(known), "make it again: python tests/benchmarks/figures.py"
