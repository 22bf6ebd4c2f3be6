"""The tables' cells: each has one record, made by one command, and goes on where it was interrupted."""

import json
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from pyrovae.train import loop

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
ONE = ["a", "--layers", "2", "--objective", "IWAE", "--particles", "5", *SMALL]


def without_times(record):
    return {key: value for key, value in record.items() if key not in TIMES}


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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["d"], "invalid choice: 'd'"),
        (["a", "--particles", "7"], "no such cell: choose among 1 layer, VAE, k = 1;"),
        (["a", "--data", "mnsit"], "did you mean 'mnist'"),
        (["a", "--data", "omniglot28", "--data-dir", "nowhere"], "chardata.mat"),
        (["a", "--epochs", "2", "--paper"], "not allowed with argument --epochs"),
    ],
)
def test_what_is_unknown_or_missing_is_said(table, capsys, arguments, said):
    with pytest.raises(SystemExit, match="2"):
        table(*arguments)
    assert said in capsys.readouterr().err
