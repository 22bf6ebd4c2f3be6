"""The command line: arguments, exit codes, streams, signals, samples, memory."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tests.faults.matrix import Outcome, fault, small_run

QUICK = ["--epochs", 1, "--samples", 5, "--device", "cpu", "--set", "hidden=[4]"]
LONG = ["train", "--epochs", 100_000, "--device", "cpu", "--set", "hidden=[4]", "--run-dir", "run"]


def forked(
    *words: object,
    out: Path | None = None,
    encoding: str = "utf-8",
    during: Callable[[int], object] = lambda pid: None,
    before: Callable[[], object] = lambda: None,
) -> Outcome:
    """The command line in a fork of this process, which flushes its own standard streams in the end as Python does.

    :param out: where standard output goes, else to a file of its own.
    :param during: gets the fork's number while it runs.
    :param before: is called in the fork first.
    """
    from pyrovae.app.cli import main

    if (pid := os.fork()) == 0:
        code = 1
        signal.alarm(100)  # its parent may be gone by then
        try:
            for number, path in ((1, out or Path("out")), (2, Path("err"))):
                os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), number)
            sys.stdout = os.fdopen(1, "w", encoding=encoding, closefd=False)
            sys.stderr = os.fdopen(2, "w", 1, encoding, "backslashreplace", closefd=False)
            before()
            main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
            try:
                sys.stdout and sys.stdout.flush()
            except OSError:
                code = 120
        finally:
            os._exit(code)
    during(pid)
    _, status = os.waitpid(pid, 0)
    said, printed = (
        path.read_text(encoding, errors="replace") if path.exists() else "" for path in map(Path, ("err", "out"))
    )
    return Outcome(os.waitstatus_to_exitcode(status), said, printed)


def until(path: Path) -> None:
    """Wait for a file."""
    while not path.exists():
        time.sleep(0.005)


# --- exit codes and arguments ----------------------------------------------------------------------------------


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


SETTINGS = {
    "no list": ("hidden=3", r"hidden must be a sequence of integers, got 3: pass such as \[200, 200\]"),
    "null": ("hidden=null", "hidden must be a sequence of integers, got None"),
    "a mapping": ("hidden={}", "hidden must be a sequence of integers, got {}"),
    "below one": ("hidden=[-1]", "every entry of hidden must be an integer of at least 1, got -1"),
    "more than 64 bits": ("hidden=[1000000000000000000000]", "must be an integer of at most 9223372036854775807"),
    "deep": ("hidden=" + "[" * 500 + "]" * 500, "hidden has lists in lists 20 deep and more"),
    "very deep": ("hidden=" + "[" * 100_000, "hidden has lists in lists 20 deep and more"),
    "a number for a name": ("likelihood=5", "unknown likelihood 5: did you mean"),
    "null for a name": ("activation=null", "unknown activation None: did you mean"),
    "NaN": ("kl_weight=NaN", "kl_weight must be a number .* got nan"),
    "infinite": ("kl_weight=1e999", r"kl_weight must be a number in \[0, inf\), got inf"),
    "unknown": ("x=NaN", "unknown setting .* 'x'"),
    "no key": ("=3", "takes KEY=VALUE"),
    "a word for a switch": ("vectorize_particles=no", "vectorize_particles must be true or false, got 'no'"),
    "a number for a choice of arguments": ("fold_particles=3", "fold_particles must be true or false, got 3"),
    "workers": ("num_workers=-1", "num_workers must be an integer of at least 0, got -1"),
    "no workers": ("num_workers=a", "num_workers must be an integer of at least 0, got 'a'"),
    "validation": ("validation=a", r"validation must be a count or a fraction in \[0, 1\), received 'a'"),
    "empty": ("", r"an argument is empty"),
}


@fault("D", "train", 2, r".", each=SETTINGS)
def a_setting_is_wrong(folder: Path, case: tuple[str, str]):
    setting, says = case
    outcome = yield "train", *QUICK[:-2], "--set", setting
    assert re.search(says, outcome.message), outcome.message
    assert not (folder / "runs").exists()


OPTIONS = {
    "no epochs": (["--epochs", 0], "epochs must be an integer of at least 1, got 0"),
    "epochs below 0": (["--epochs", -1], "epochs must be an integer of at least 1, got -1"),
    "epochs as a float": (["--epochs", "1e9"], "--epochs"),
    "no batch": (["--batch-size", 0], "batch_size must be an integer of at least 1, got 0"),
    "a batch beyond 64 bits": (["--batch-size", 10**20], "batch_size must be an integer of at most"),
    "lr NaN": (["--lr", "nan"], "lr must be a number .* got nan"),
    "lr below 0": (["--lr", -1], "lr must be a number .* got -1"),
    "no samples": (["--samples", 0], "samples must be an integer of at least 1, got 0"),
    "seed below 0": (["--seed", -1], "--seed.*greater than or equal to 0"),
    "seed beyond 64 bits": (["--seed", 2**70], "--seed.*less than or equal to 9223372036854775807"),
    "latent beyond 64 bits": (["--latent-dim", 10**20], "latent_dim must be an integer of at most"),
    "particles": (["--particles", 0], "num_particles must be an integer of at least 1, got 0"),
    "latent twice": (["--latent-dim", 3, "--set", "latent_dim=5"], "latent_dim is given twice, got 5 and 3"),
    "empty folder": (["--run-dir", ""], 'an argument is empty, got "pyrovae train .*--run-dir ": write it'),
    "empty value": (["--run-dir="], 'an argument is empty, got "pyrovae train .*--run-dir=": write it'),
    "empty data": (["--data", ""], "an argument is empty"),
    "unknown option": (["--epoch", 3], "No such option"),
    "nul": (["--run-dir", "a\0b"], "null byte"),
}


@fault("D", "train", 2, r".", each=OPTIONS)
def an_option_is_wrong(folder: Path, case: tuple[list[object], str]):
    options, says = case
    outcome = yield "train", *QUICK, *options
    assert re.search(says, outcome.message), outcome.message
    assert not list(folder.iterdir())


@fault("D", "train", 2, r"^error: WORLD_SIZE=2 says .*MASTER_PORT is not set.*start with torchrun")
def other_processes_have_no_place_to_meet(folder: Path):
    os.environ["WORLD_SIZE"] = "2"
    yield "train", *QUICK
    assert not list(folder.iterdir())


@fault(
    "D", "train", 6, "^error: the 2 processes did not find each other at 127.0.0.1:9 within 2 s .*: start all of them"
)
def other_processes_are_not_there(folder: Path):
    there = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9", "PYROVAE_TIMEOUT": "2"}
    os.environ |= there
    yield "train", *QUICK
    assert not list(folder.iterdir())


@fault("D", "train", 0)
def a_switch_is_written_as_in_python(folder: Path):
    yield "train", *QUICK, "--set", "vectorize_particles=False", "--run-dir", "run"
    described = json.loads((folder / "run" / "config.json").read_text())["objective"]
    assert described["arguments"]["vectorize_particles"] is False


@fault("D", "fit", 2, "seed must be an integer of 64 bits, got 1267650600228229401496703205376: pass")
def a_seed_is_too_long(folder: Path):
    import pyrovae as pv

    vae, data = pv.models.VAE((3,), latent_dim=1, hidden=(2,)), torch.rand(8, 3).round()
    yield lambda: pv.fit(vae.model, vae.guide, data, objective=pv.ELBO(), epochs=1, seed=2**100)


DEVICES = {"meta": "META", "mps": "MPS", "xpu": "XPU", "cuda": "CUDA", "cpu:7": "CPU", "vulkan": "VULKAN", "hpu": "HPU"}


@fault("C", "train", 2, r"device \"\S+\" was asked for, but \d [A-Z]+ devices are here: pass", each=DEVICES | {})
def a_device_is_not_here(folder: Path, kind: str):
    device = next(name for name, upper in DEVICES.items() if upper == kind)
    outcome = yield "train", *QUICK, "--device", device
    assert f"{kind} devices" in outcome.message
    assert not list(folder.iterdir())


@fault(
    "C", "train", 2, "unknown device '.*': pass \"auto\"", each={"bogus": "bogus", "cpu:": "cpu:", "cuda:-1": "cuda:-1"}
)
def a_device_is_unknown(folder: Path, device: str):
    yield "train", *QUICK, "--device", device


@fault("C", "evaluate", 2, "META devices are here")
def a_run_is_to_be_measured_on_meta(folder: Path):
    yield "evaluate", small_run(folder / "run"), "--device", "meta"


@fault("C", "fit", 2, "MPS devices are here", each={"mps": None})
def fit_is_to_train_on_what_is_not_here(folder: Path, _: None):
    import pyrovae as pv

    vae, data = pv.models.VAE((3,), latent_dim=1, hidden=(2,)), torch.rand(8, 3).round()
    yield lambda: pv.fit(vae.model, vae.guide, data, objective=pv.ELBO(), epochs=1, device="mps")


@fault("D", "evaluate", 2, "samples must be an integer of at least 1, got 0")
def no_samples_are_to_measure(folder: Path):
    run = small_run(folder / "run")
    before = (run / "results.json").read_bytes()
    yield "evaluate", run, "--samples", 0
    assert (run / "results.json").read_bytes() == before


@fault("D", "any verb", 2, "unknown checkpoint 'middle'", each={"evaluate": "evaluate", "sample": "sample"})
def a_checkpoint_is_neither_last_nor_best(folder: Path, verb: str):
    yield verb, small_run(folder / "run"), "--checkpoint", "middle"


@fault(
    "D", "any verb", 2, "an argument is empty", each={"evaluate": "evaluate", "sample": "sample", "compare": "compare"}
)
def a_run_is_an_empty_string(folder: Path, verb: str):
    run = small_run(folder / "run")
    os.chdir(run)  # which "" would name
    before = (run / "results.json").read_bytes()
    yield verb, ""
    assert (run / "results.json").read_bytes() == before
    assert not (run / "samples.new").exists()


@fault("D", "compare", 2, "Missing argument 'RUN...'")
def nothing_is_to_be_compared(folder: Path):
    yield ("compare",)


@fault("D", "compare", 4, '"nowhere" holds no run')
def one_of_the_runs_to_compare_is_absent(folder: Path):
    outcome = yield "compare", small_run(folder / "run"), "nowhere"
    assert not outcome.printed


@fault("D", "compare", 0, r"run +digits.*\n *run +digits")
def a_run_is_compared_with_itself(folder: Path):
    run = small_run(folder / "run")
    yield "compare", run, run


@fault("D", "list", 2, "unexpected extra argument")
def a_list_is_asked_of_something(folder: Path):
    yield "list", "vae"


VERBS = {verb: verb for verb in ("train", "evaluate", "sample", "report", "compare", "list")}


@fault("D", "any verb", 0, "Usage", each=VERBS)
def help_is_asked_for(folder: Path, verb: str):
    outcome = yield verb, "--help"
    assert not outcome.message


@fault("D", "any verb", 2)
def nothing_is_asked_for(folder: Path):
    outcome = yield ("--debug",)
    assert not outcome.message
    assert "Usage" in outcome.printed


@fault(
    "D", "train", 1, r"^error: ZeroDivisionError.*--debug shows where$|^error: KeyError: 'oops'; --debug shows where$"
)
def a_class_of_the_users_fails(folder: Path):
    text = "class Mine(__import__('torch').nn.Module):\n    def __init__(self): raise KeyError('oops')\n"
    (folder / "mine.py").write_text(text)
    yield "train", "mine:Mine", *QUICK[:-2]


# --- what is printed, and where --------------------------------------------------------------------------------

NAMES = {
    "markup": "[red]", "a closing tag": "[/]", "an emoji": ":smile:", "a snowman": "naïve ☃", "two lines": "a\nb",
    "no text": os.fsdecode(b"r\xff\xfen"),
}  # fmt: skip


@fault("C", "sample", 0, r"wrote", each=NAMES)
def a_run_has_an_odd_name(folder: Path, name: str):
    run = small_run(folder / name)
    outcome = yield lambda: forked("sample", run, "-n", 4)
    if name.isascii() and "\n" not in name:
        assert f"{name}/samples-0.png" in outcome.printed
    assert (run / "samples-0.png").read_bytes().startswith(b"\x89PNG")


@fault("C", "evaluate", 0, r"test NLL", each=NAMES)
def a_run_with_an_odd_name_has_a_model_card(folder: Path, name: str):
    run = small_run(folder / name)
    yield lambda: forked("evaluate", run, "--samples", 5)
    assert "| test NLL, nats per datum |" in (run / "README.md").read_text(encoding="utf-8")


def a_link(place: Path) -> None:
    (place.parent / "kept").write_text("kept")
    place.symlink_to("kept")


@fault("C", "evaluate", 0, r"test NLL", each={
    "a folder": Path.mkdir, "a pipe": os.mkfifo, "a link": a_link, "one's own": lambda place: place.write_text("own"),
})  # fmt: skip
def something_else_has_the_name_of_a_model_card(folder: Path, make: Callable[[Path], object]):
    run = small_run(folder / "run")
    card = run / "README.md"
    card.unlink(missing_ok=True)
    make(card)
    before = os.lstat(card).st_mode, card.read_text() if card.is_file() else None
    yield "evaluate", run, "--samples", 5
    assert before == (os.lstat(card).st_mode, card.read_text() if card.is_file() else None)


@fault("A4", "export", 4, r"weights\.safetensors\" is damaged or was changed")
def damaged_weights_are_not_exported(folder: Path):
    run = small_run(folder / "run")
    place = run / "last" / "weights.safetensors"
    place.write_bytes(place.read_bytes()[:-1] + b"!")
    yield "export", run
    assert not list(run.glob("*.onnx"))


@fault("C", "new", 2, r"is there already", each={"a file": Path.touch, "a folder": Path.mkdir, "a pipe": os.mkfifo})
def a_starter_would_replace_something(folder: Path, make: Callable[[Path], object]):
    make(folder / "my_model.py")
    yield "new", "my_model.py"


@fault("C", "report", 0, r"wrote", each=NAMES)
def a_run_with_an_odd_name_is_reported_on(folder: Path, name: str):
    run = small_run(folder / name)
    yield lambda: forked("report", run)
    assert "Explore the latent space" in (run / "report.html").read_text(encoding="utf-8")


@fault("A3", "report", 0, "note: ", each={
    "weights": ("last/weights.safetensors", "Explore"), "metrics": ("metrics.jsonl", "How it was trained"),
    "results": ("results.json", ""), "state": ("last/state.pt", ""),
})  # fmt: skip
def a_run_with_a_damaged_file_is_reported_on(folder: Path, damaged: tuple[str, str]):
    run, (name, lost) = small_run(folder / "run"), damaged
    (run / name).write_bytes(b"\x00damaged")
    yield "report", run
    page = (run / "report.html").read_text()
    assert "In doubt or missing" in page
    assert "What was trained" in page
    assert not lost or lost not in page


@fault("C", "report", 2, "no regular file", each={"a folder": False, "a link in a circle": True})
def a_page_cannot_be_written(folder: Path, circle: bool):
    place = folder / "page.html"
    place.symlink_to(place) if circle else place.mkdir()
    yield "report", small_run(folder / "run"), "--output", place


@fault("C", "report", 2, "report.html, which no run made")
def a_link_has_the_name_of_the_page(folder: Path):
    run, other = small_run(folder / "run"), folder / "other.txt"
    other.write_text("keep")
    (run / "report.html").symlink_to(other)
    yield "report", run
    assert other.read_text() == "keep"


@fault("C", "compare", 0, r"(\+/-|±) 0\.\d+", each={"ascii": "ascii", "latin-1": "latin-1"})
def output_has_few_characters(folder: Path, encoding: str):
    runs = [small_run(folder / name) for name in ("a", "naïve ☃", os.fsdecode(b"r\xff\xfen"))]
    expected = r"na\xefve \u2603" if encoding == "ascii" else r"naïve \u2603"
    outcome = yield lambda: forked("compare", *runs, encoding=encoding)
    assert expected in outcome.printed
    assert r"r\udcff\udcfen" in outcome.printed
    assert ("± 0." if encoding == "latin-1" else "+/- 0.") in outcome.printed


@fault("C", "train", 0, r"pictures in r\\udcff")
def a_run_is_trained_where_no_text_names_it(folder: Path):
    run = folder / os.fsdecode(b"r\xff")
    yield lambda: forked("train", *QUICK, "--run-dir", run.name, encoding="ascii")
    assert (run / "results.json").is_file()


@fault("D", "any verb", 6, r"error: standard output could not be written \(No space left on device\); all else", each={
    "list": ["list"], "compare": ["compare", "run"], "sample": ["sample", "run", "-n", "4"],
    "train": ["train", *QUICK, "--run-dir", "new"], "evaluate": ["evaluate", "run", "--samples", "5"],
})  # fmt: skip
def the_disk_of_the_output_is_full(folder: Path, words: list[object]):
    run = small_run(folder / "run")
    yield lambda: forked(*words, out=Path("/dev/full"))
    assert words[0] != "sample" or (run / "samples-0.png").is_file()
    assert words[0] != "train" or "nll" in json.loads((folder / "new" / "results.json").read_text())
    assert words[0] != "evaluate" or json.loads((run / "results.json").read_text())["num_samples"] == 5


@fault("D", "list", 6, "standard output could not be written")
def output_is_closed(folder: Path):
    yield lambda: forked("list", before=lambda: setattr(sys, "stdout", None))


@fault("D", "train", 0)
def the_reader_of_the_output_has_gone(folder: Path):
    read, write = os.pipe()
    os.close(read)
    outcome = yield lambda: forked("train", *QUICK, "--run-dir", "run", before=lambda: os.dup2(write, 1))
    assert not [line for line in outcome.message.splitlines() if not line.startswith("warning: ")]
    assert "nll" in json.loads((folder / "run" / "results.json").read_text())


# --- signals ---------------------------------------------------------------------------------------------------

SIGNALS = {
    "SIGINT": (signal.SIGINT, "interrupted"),
    "SIGTERM": (signal.SIGTERM, "terminated"),
    "SIGHUP": (signal.SIGHUP, "stopped"),
}


def stopping(number: int, again: bool = False) -> Callable[[int], None]:
    """Sends a signal to a training once it has a checkpoint."""

    def send(pid: int) -> None:
        until(Path("run/last/state.pt"))
        os.kill(pid, number)
        if again:
            time.sleep(0.001)
            os.kill(pid, number)

    return send


def save_often() -> None:
    """Have a checkpoint after every epoch, however short it is."""
    from pyrovae.runs import Run

    Run.due = property(lambda self: True)


def stopped(number: int, word: str) -> Callable[[], Outcome]:
    """A training that a signal stops; its code as 0 where that and its words are right."""

    def act() -> Outcome:
        outcome = forked(*LONG, during=stopping(number), before=save_often)
        right = outcome.code == 128 + number and outcome.message == f"error: {word}; go on with --resume\n"
        return Outcome(0 if right else 1, "" if right else f"{outcome.code}: {outcome.message}")

    return act


@fault("D", "train", 0, each=SIGNALS)
def a_training_is_stopped(folder: Path, case: tuple[int, str]):
    import pyrovae as pv

    yield stopped(*case)
    run = pv.runs.Run(folder / "run")
    epoch = run.state()["epoch"]
    assert epoch >= 1
    assert len(run.history()) >= epoch
    assert not list((folder / "run").glob("*.new"))
    pv.load(folder / "run")


@fault("D", "train", 143, "^error: terminated(; go on with --resume)?$")
def a_training_is_stopped_twice(folder: Path):
    def act() -> Outcome:
        outcome = forked(*LONG, during=stopping(signal.SIGTERM, again=True), before=save_often)
        lines = outcome.message.splitlines()  # whichever line was out when the second came
        assert set(lines) <= {"error: terminated", "error: terminated; go on with --resume"}
        return Outcome(outcome.code, lines[-1])

    yield act
    assert __import__("pyrovae").runs.Run(folder / "run").state()["epoch"] >= 1


@fault("D", "train", 143, "^error: terminated$")
def a_second_signal_comes_where_the_first_is_not_heard(folder: Path):
    """A class that swallows the first, as some callbacks of other packages do."""
    (folder / "deaf.py").write_text(
        "import time, pathlib, torch\nclass Deaf(torch.nn.Module):\n    def __init__(self):\n        try:\n"
        "            pathlib.Path('here').touch(); time.sleep(60)\n        except BaseException:\n"
        "            pathlib.Path('heard').touch(); time.sleep(60)\n"
    )

    def twice(pid: int) -> None:
        for path in ("here", "heard"):
            until(Path(path))
            time.sleep(0.05)
            os.kill(pid, signal.SIGTERM)

    yield lambda: forked("train", "deaf:Deaf", *QUICK[:-2], during=twice)


@fault("D", "train", 0)
def a_hangup_is_ignored_under_nohup(folder: Path):
    def send(pid: int) -> None:
        until(Path("run/metrics.jsonl"))
        os.kill(pid, signal.SIGHUP)

    ignoring = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    yield lambda: forked("train", *QUICK, "--run-dir", "run", during=send, before=ignoring)
    assert (folder / "run" / "results.json").is_file()


@fault("D", "evaluate", 130, "^error: interrupted$")
def a_measurement_is_interrupted(folder: Path):
    run = small_run(folder / "run")
    before = (run / "results.json").read_bytes()
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    yield "evaluate", run, "--samples", 2_000_000
    assert (run / "results.json").read_bytes() == before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@fault("D", "any verb", 130, "^error: interrupted$", each={"module": "-m", "script": "-c"})
def an_import_is_interrupted(folder: Path, how: str):
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(
        "import pathlib, time\npathlib.Path('here').touch()\n"
        "try: time.sleep(60)\nexcept BaseException: pass\n"  # as what is imported may, looking for something else
    )
    what = "pyrovae" if how == "-m" else "import sys; from pyrovae.__main__ import main; sys.exit(main())"

    def act() -> Outcome:
        paths = os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])
        process = subprocess.Popen(
            [sys.executable, how, what, "list"],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": paths},
        )
        until(folder / "here")
        process.send_signal(signal.SIGINT)
        said = process.communicate()[1]
        return Outcome(process.returncode, said)

    yield act


@fault("D", "main", 0)
def a_program_that_calls_the_command_keeps_its_handlers(folder: Path):
    mine = lambda *_: None  # noqa: E731
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, mine)
    streams = sys.stdout, sys.stderr
    yield ("list",)
    assert {signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} == {mine}
    assert streams == (sys.stdout, sys.stderr)


# --- files that are written ------------------------------------------------------------------------------------


@fault("B4", "sample", 2, "is there and is no regular file", each={
    "device": "/dev/null", "folder": "folder.png", "pipe": "pipe.png", "circle": "circle.png", "link": "link.png",
})  # fmt: skip
def samples_are_to_replace_what_is_no_file(folder: Path, output: str):
    run = small_run(folder / "run")
    Path("folder.png").mkdir()
    os.mkfifo("pipe.png")
    Path("circle.png").symlink_to("circle.png")
    Path("link.png").symlink_to("/dev/null" if output == "link.png" else "folder.png")
    if output == "/dev/null":
        output = "null.png"
        Path(output).symlink_to("/dev/null")
    before = os.lstat(output)
    yield "sample", run, "-n", 4, "--output", output
    assert os.lstat(output).st_mode == before.st_mode
    assert os.path.exists("/dev/null")
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@fault(
    "B4",
    "sample",
    2,
    r"samples go to \.png, \.npz, \.csv files, got",
    each={"jpg": "a.jpg", "none": "a"},
)
def samples_have_another_suffix(folder: Path, output: str):
    yield "sample", small_run(folder / "run"), "-n", 4, "--output", output
    assert not Path("a.jpg").exists()


@fault("B4", "sample", 2, r"samples go to \.png, \.npz, \.csv files, got")
def samples_go_to_a_device(folder: Path):
    """One of the row's own, where it may make one: a library that is not right replaces it."""
    device = folder / "full" if os.geteuid() == 0 else Path("/dev/full")
    if os.geteuid() == 0:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 7))
    yield "sample", small_run(folder / "run"), "-n", 4, "--output", device
    assert device.is_char_device()


@fault("B4", "image_grid", 2, "is there and is no regular file")
def a_picture_is_to_replace_a_pipe(folder: Path):
    import pyrovae as pv

    os.mkfifo("pipe.png")
    yield lambda: pv.plots.image_grid(torch.rand(4, 8, 8), "pipe.png")
    assert Path("pipe.png").is_fifo()


@fault("B4", "curves", 2, r"pictures are PNG files, got \"a\.jpg\"")
def a_chart_has_another_suffix(folder: Path):
    import pyrovae as pv

    yield lambda: pv.plots.curves([{"bound": 1.0}], "a.jpg")
    assert not list(folder.iterdir())


@fault("B4", "sample", 0, "wrote link.png")
def samples_go_through_a_link(folder: Path):
    Path("there.png").write_bytes(b"old")
    Path("link.png").symlink_to("there.png")
    yield "sample", small_run(folder / "run"), "-n", 4, "--output", "link.png"
    assert Path("link.png").is_symlink()
    assert Path("there.png").read_bytes().startswith(b"\x89PNG")


@fault("B4", "sample", 0, "wrote new/deep/a.png")
def samples_go_to_a_new_folder(folder: Path):
    yield "sample", small_run(folder / "run"), "-n", 4, "--output", "new/deep/a.png"
    assert Path("new/deep/a.png").read_bytes().startswith(b"\x89PNG")


@fault("B4", "evaluate", 2, r"holds results\.json, which no run made here and none will replace")
def results_are_a_pipe(folder: Path):
    run = small_run(folder / "run")
    (run / "results.json").unlink()
    os.mkfifo(run / "results.json")
    yield "evaluate", run, "--samples", 5
    assert (run / "results.json").is_fifo()


@fault("D", "sample", 6, "Permission denied|Read-only|No such file")
def samples_may_not_be_written(folder: Path):
    yield "sample", small_run(folder / "run"), "-n", 4, "--output", "/proc/a.png"


# --- samples of tables, labels ---------------------------------------------------------------------------------


def table_run(folder: Path) -> Path:
    """A run on vectors of three numbers: the first near 5, the second near -5, the third wide."""
    rows = np.random.RandomState(0).randn(400, 3) * [0.1, 0.1, 3] + [5, -5, 0]
    np.savez("rows.npz", x=rows.astype(np.float32))
    options = [
        "--epochs",
        10,
        "--samples",
        5,
        "--device",
        "cpu",
        "--set",
        "likelihood=gaussian",
        "--set",
        "hidden=[16]",
    ]
    found = forked("train", "--data", f"npz:{folder / 'rows.npz'}", *options, "--lr", 0.01, "--run-dir", "table")
    assert found.code == 0, found
    return folder / "table"


@fault("D", "sample", 0, r"wrote .*table/samples-3\.npz")
def a_table_is_sampled(folder: Path):
    run = table_run(folder)
    yield "sample", run, "-n", 500, "--draws", "--seed", 3
    with np.load(run / "samples-3.npz") as found:
        assert list(found) == ["x"]
        x = found["x"]
    assert x.shape == (500, 3)
    assert x.dtype == np.float32
    assert np.abs(x.mean(0) - [5, -5, 0]).max() < 1.5


@fault("D", "sample", 0, r"wrote rows\.csv")
def a_table_is_sampled_as_text(folder: Path):
    import pyrovae as pv

    run = table_run(folder)
    yield "sample", run, "-n", 7, "--output", "rows.csv", "--seed", 3
    head, *lines = Path("rows.csv").read_text().splitlines()
    assert head == "x0,x1,x2"
    found = np.array([[float(v) for v in line.split(",")] for line in lines], np.float32)
    assert (found == pv.sample(pv.load(run), 7, seed=3).numpy()).all()


@fault("D", "sample", 2, r"data of shape \[3\] are no images, got \"a\.png\": name an \.npz or \.csv file")
def a_table_is_to_be_a_picture(folder: Path):
    yield "sample", table_run(folder), "-n", 7, "--output", "a.png"


def conditional(folder: Path) -> Path:
    return small_run(folder / "run", "conditional")


@fault("D", "sample", 0, r"wrote a\.npz")
def samples_keep_their_labels(folder: Path):
    import pyrovae as pv

    run = conditional(folder)
    yield "sample", run, "-n", 23, "--output", "a.npz"
    with np.load("a.npz") as found:
        x, y = found["x"], found["y"]
    assert y.tolist() == [i % 10 for i in range(20)] + [0, 1, 2]
    assert x.shape == (23, 1, 8, 8)
    train, _, test = pv.data.load("npz:a.npz", labels=True)  # what was written can be read as data
    assert len(train) + len(test) == 23


@fault("D", "sample", 0, r"wrote a\.csv")
def samples_of_one_class_are_a_table(folder: Path):
    yield "sample", conditional(folder), "-n", 3, "--label", 7, "--output", "a.csv"
    head, *lines = Path("a.csv").read_text().splitlines()
    assert head.split(",")[-2:] == ["x63", "y0"]
    assert [line.split(",")[-1] for line in lines] == ["7"] * 3


@fault("D", "sample", 0)
def many_samples_are_drawn_in_passes(folder: Path):
    import pyrovae as pv

    run = small_run(folder / "run")
    yield "sample", run, "-n", 10_003, "--output", "a.npz", "--seed", 5
    with np.load("a.npz") as found:
        x = torch.from_numpy(found["x"])
    assert len(x) == 10_003
    assert (x[:10_000] == pv.sample(pv.load(run), 10_000, seed=5)).all()
    assert (x[10_000:] != x[:3]).any()


LABELS = {"beyond": "10", "below 0": "-1", "a word": "a", "two": "1,2", "superscript": "³", "long": "9" * 5000}


@fault("D", "sample", 2, r"label must be one of 0 \.\.\. 9, got", each=LABELS)
def a_label_is_no_class(folder: Path, label: str):
    yield "sample", conditional(folder), "--label", label


@fault("D", "sample", 2, "VAE is not conditional, got label 3")
def a_label_is_given_to_a_model_without(folder: Path):
    yield "sample", small_run(folder / "run"), "--label", 3


SAMPLES = {
    "none": (["-n", 0], "number must be an integer of at least 1, got 0"),
    "beyond 64 bits": (["-n", 10**30], "number must be an integer of at most"),
    "temperature below 0": (["--temperature", -1], "temperature must be a number .* got -1"),
    "temperature NaN": (["--temperature", "nan"], "temperature must be a number .* got nan"),
    "temperature 0": (["--temperature", 0], "temperature must be above 0"),
    "a large picture": (["-n", 5_000_000], "make a picture of .* pixels, a side has at most 50,000: draw fewer images"),
}


@fault("D", "sample", 2, ".", each=SAMPLES)
def samples_are_asked_for_wrongly(folder: Path, case: tuple[list[object], str]):
    run = small_run(folder / "run")
    before = set(run.iterdir())
    outcome = yield "sample", run, *case[0]
    assert re.search(case[1], outcome.message), outcome.message
    assert set(run.iterdir()) == before


# --- memory ----------------------------------------------------------------------------------------------------


@fault(
    "C", "sample", 6, r"1,000,000,000,000 samples of shape \[1, 8, 8\] takes [\d,.]+ GiB of memory, .*: lower --number$"
)
def more_samples_than_memory_holds(folder: Path):
    yield "sample", small_run(folder / "run"), "-n", 10**12, "--output", "a.npz"
    assert not Path("a.npz").exists()


@fault("C", "evaluate", 6, r"the tail of 1,000,000,000,000 weights of a datum takes [\d,.]+ GiB .*: lower num_samples$")
def more_weights_than_memory_holds(folder: Path):
    run = small_run(folder / "run")
    before = (run / "results.json").read_bytes()
    yield "evaluate", run, "--samples", 10**12
    assert (run / "results.json").read_bytes() == before


@fault("C", "log_likelihood", 6, "the tail of .* weights of a datum takes .* GiB")
def more_weights_than_memory_holds_in_python(folder: Path):
    import pyrovae as pv

    vae = pv.models.VAE((3,), latent_dim=1, hidden=(2,))
    yield lambda: pv.log_likelihood(vae.model, vae.guide, torch.rand(4, 3).round(), num_samples=10**13)


MODELS = {
    "hidden": ["--set", "hidden=[1000000000000]"], "latent": ["--latent-dim", 10**12],
    "two layers": ["--set", "hidden=[300000,300000]"],
}  # fmt: skip


@fault(
    "C", "train", 6, r"a weight of the model, a tensor of shape \[\d+, \d+\], takes [\d,.]+ GiB of memory", each=MODELS
)
def a_model_is_larger_than_memory(folder: Path, options: list[object]):
    yield "train", *QUICK[:-2], *options
    assert not (folder / "runs").exists()


@fault("C", "train", 6, "out of memory|bytes of memory could not be had|GiB of memory")
def a_limit_of_memory_is_met(folder: Path):
    import resource

    def limit() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))

    yield lambda: forked("train", *QUICK[:-2], "--set", "hidden=[9000,9000]", before=limit)
