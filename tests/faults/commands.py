"""The command line: arguments, exit codes, streams."""

from pathlib import Path

from tests.faults.matrix import fault, small_run


@fault("D", "train", 2, "unknown model 'vea': did you mean 'vae'")
def a_model_is_misspelt(folder: Path):
    yield "train", "vea"
    assert not (folder / "runs").exists()


@fault("D", "evaluate", 4, r"holds no run: config\.json is absent")
def a_folder_is_no_run(folder: Path):
    yield "evaluate", folder


@fault("D", "evaluate", 0, r"test NLL +\d+\.\d+ ± \d")
def a_run_is_measured(folder: Path):
    run = small_run(folder / "run")
    outcome = yield "evaluate", run, "--samples", "20", "--device", "cpu"
    assert (run / "results.json").stat().st_size > 100, outcome
