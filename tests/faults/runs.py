"""The run directory: what is changed, damaged, forged, held by others, moved, or in the way."""

import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.faults.matrix import command, fault, small_run

WEIGHTS, STATE = "last/weights.safetensors", "last/state.pt"
DEEP = "[" * 10**5 + "]" * 10**5
CHANGED = r"(config\.json|weights\.safetensors|state\.pt|metrics\.jsonl|manifest\.json).*(changed|missing|damaged)"


def flip(path: Path, place: float = 0.5) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def edit(path: Path, *keys: str, value: object) -> None:
    """Change one entry of a JSON file, as an editor would."""
    content = json.loads(path.read_text())
    inside = content
    for key in keys[:-1]:
        inside = inside[key]
    inside[keys[-1]] = value
    path.write_text(json.dumps(content, indent=2))


def age(run: Path) -> Path:
    """Make a run one of before manifests."""
    for place in run.glob("*/manifest.json"):
        place.unlink()
    config = json.loads((run / "config.json").read_text())
    for name in ("format_version", "run", "sha256"):
        config.pop(name, None)
    (run / "config.json").write_text(json.dumps(config))
    return run


def sign(run: Path) -> None:
    """Let manifest and config say what the files now hold, as a forger would."""
    config = json.loads((run / "config.json").read_text())
    if "sha256" in config:
        rest = {k: v for k, v in config.items() if k != "sha256"}
        edit(run / "config.json", "sha256", value=digest(json.dumps(rest, sort_keys=True).encode()))
    if (place := run / "last" / "manifest.json").exists():
        manifest = json.loads(place.read_text())
        for name in manifest["files"]:
            content = (run / name if name == "metrics.jsonl" else run / "last" / name).read_bytes()
            manifest["files"][name] = {"bytes": len(content), "sha256": digest(content)}
        place.write_text(json.dumps(manifest))


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    """Every regular file below a folder, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def pair(hidden: int = 3):
    """A small model, always the same."""
    import torch

    import pyrovae as pv

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return pv.models.VAE((4,), latent_dim=2, hidden=(hidden,))


def fit(run: Path | None, *, of=None, epochs: int = 2, **options):
    """Train a small model on sixteen data."""
    import torch

    import pyrovae as pv

    x, of = torch.arange(64.0).view(16, 4).remainder(3).clamp(max=1), of or pair()
    settings = {"objective": pv.ELBO(), "epochs": epochs, "batch_size": 8, "device": "cpu", "compile": False}
    return pv.fit(of.model, of.guide, x, run_dir=run, **settings | options)


def stopped(run: Path, epochs: int = 4) -> Path:
    """A run that ended on its way, after its first epoch."""

    def stop(result):
        raise InterruptedError

    with suppress(InterruptedError):
        if sys.modules["pyrovae"].__file__ and "on_epoch" in fit_arguments():
            fit(run, epochs=epochs, on_epoch=stop)
        else:
            from pyrovae.runs import Run

            log = Run.log
            Run.log = lambda self, row: stop(row) if row["epoch"] == 2 else log(self, row)
            try:
                fit(run, epochs=epochs)
            finally:
                Run.log = log
    return run


def fit_arguments():
    import inspect

    import pyrovae as pv

    return inspect.signature(pv.fit).parameters


def forge(run: Path, change) -> None:
    """Change the loop's state, and let all else agree with it."""
    import torch

    state = torch.load(run / STATE, weights_only=True)
    changed = change(state)
    torch.save(changed if isinstance(changed, list | dict) else state, run / STATE)
    sign(run)


def words(verb: str, run: Path) -> tuple[object, ...]:
    """A command that opens a run."""
    return {
        "evaluate": ("evaluate", run, "--samples", "20", "--device", "cpu"),
        "sample": ("sample", run, "-n", "4", "--output", "drawn.png"),
        "train": ("train", "--resume", "--run-dir", run, "--device", "cpu"),
        "compare": ("compare", run),
    }[verb]


# --- A4: edited, mixed, corrupt ---------------------------------------------------------------------

for verb in ("evaluate", "sample", "train"):

    @fault("A4", verb, 4, r"weights\.safetensors.*changed", each={"first": 0.2, "middle": 0.5, "last": 1.0})
    def a_bit_of_the_weights_is_flipped(folder, place, verb=verb):
        run = small_run(folder / "run")
        flip(run / WEIGHTS, place)
        before = contents(run)
        yield words(verb, run)
        assert contents(run) == before
        assert not (folder / "drawn.png").exists()

    @fault("A4", verb, 4, "another run")
    def a_checkpoint_of_another_run_lies_in_it(folder, verb=verb):
        run, other = small_run(folder / "run"), small_run(folder / "other", "--seed", "1")
        shutil.rmtree(run / "last")
        shutil.copytree(other / "last", run / "last")
        before = contents(run)
        yield words(verb, run)
        assert contents(run) == before

    @fault("A4", verb, 4, r"weights\.safetensors.*changed")
    def weights_of_another_run_lie_in_it(folder, verb=verb):
        run, other = small_run(folder / "run"), small_run(folder / "other", "--seed", "1")
        shutil.copy(other / WEIGHTS, run / WEIGHTS)
        yield words(verb, run)

    @fault("A4", verb, 0, "warning: .*made before runs had manifests")
    def a_run_of_before_manifests_is_opened(folder, verb=verb):
        run = age(small_run(folder / "run"))
        outcome = yield words(verb, run)
        assert outcome.message.count("warning") == 1

    @fault("A4", verb, 0, r"warning: .*weights\.safetensors.*changed")
    def a_user_goes_on_knowingly(folder, verb=verb):
        run = small_run(folder / "run")
        flip(run / WEIGHTS)
        yield (*words(verb, run), "--override")


@fault("A4", "load", 4, r"weights\.safetensors.*changed", each={str(i): i / 8 for i in range(1, 9)})
def load_finds_a_flipped_bit(folder, place):
    import pyrovae as pv

    run = small_run(folder / "run")
    flip(run / WEIGHTS, place)
    yield lambda: pv.load(run)


@fault("A4", "load", 0, r"weights\.safetensors.*changed")
def load_goes_on_knowingly(folder):
    import pyrovae as pv

    run = small_run(folder / "run")
    flip(run / WEIGHTS)
    outcome = yield lambda: pv.load(run, override=True)
    assert isinstance(outcome.value, pv.models.VAE)


@fault("A4", "load", 4, r"weights\.safetensors.*changed")
def the_best_weights_are_put_in_the_last_ones_place(folder):
    import pyrovae as pv

    run = fit_validated(folder / "run")
    assert (run / "best/weights.safetensors").read_bytes() != (run / WEIGHTS).read_bytes()
    shutil.copy(run / "best/weights.safetensors", run / WEIGHTS)
    yield lambda: pv.load(run)


@fault("A4", "load", 4, r"best/weights\.safetensors.*changed")
def a_bit_of_the_best_weights_is_flipped(folder):
    import pyrovae as pv

    run = fit_validated(folder / "run")
    flip(run / "best/weights.safetensors", 1.0)
    pv.load(run)
    yield lambda: pv.load(run, checkpoint="best")


def fit_validated(run: Path) -> Path:
    """A run whose best epoch was not its last."""
    import torch

    x = torch.arange(64.0).view(16, 4).remainder(3).clamp(max=1)
    for epochs in (2, 3, 4, 5):
        fit(run, epochs=epochs, lr=2.0, validation=1 - x, seed=epochs)
        if (run / "best/weights.safetensors").read_bytes() != (run / WEIGHTS).read_bytes():
            break
        shutil.rmtree(run)
    return run


@fault(
    "A4", "evaluate", 4, r"config\.json.*changed",
    each={
        "seed": ("settings", "seed", 9), "likelihood": ("model", "arguments", "likelihood", "gaussian"),
        "activation": ("model", "arguments", "activation", "relu"), "data": ("data", "binarization", "none"),
        "data set": ("settings", "data", "mnist"), "class": ("model", "class", "pyrovae.models:PCA"),
        "versions": ("versions", "torch", "2.0.0"), "digest": ("sha256", "0" * 64), "one more": ("note", "mine"),
    },
)  # fmt: skip
def the_config_is_edited(folder, change):
    run = small_run(folder / "run")
    edit(run / "config.json", *change[:-1], value=change[-1])
    before = contents(run)
    yield words("evaluate", run)
    assert contents(run) == before


@fault("A4", "compare", 4, r"config\.json.*changed")
def an_edited_config_is_not_compared(folder):
    run = small_run(folder / "run")
    edit(run / "config.json", "data", "name", value="mnist")
    yield words("compare", run)


@fault("A4", "evaluate", 0, r"test NLL")
def a_config_is_laid_out_anew(folder):
    run = small_run(folder / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    outcome = yield words("evaluate", run)
    assert "warning" not in outcome.message


@fault("A4", "evaluate", 4, "another run")
def the_config_is_of_another_run(folder):
    run, other = small_run(folder / "run"), small_run(folder / "other", "--seed", "1")
    shutil.copy(other / "config.json", run / "config.json")
    yield words("evaluate", run)


@fault("A4", "evaluate", 4, "another run")
def the_config_is_of_an_old_run(folder):
    run, other = small_run(folder / "run"), age(small_run(folder / "other", "--seed", "1"))
    shutil.copy(other / "config.json", run / "config.json")
    yield words("evaluate", run)


@fault(
    "A4", "evaluate", 4, "newer than this pyrovae: update",
    each={
        "format": ("format_version", 99), "word": ("format_version", "two"), "release": ("versions", "pyrovae", "99.1"),
    },
)  # fmt: skip
def a_run_is_from_the_future(folder, change):
    run = small_run(folder / "run")
    edit(run / "config.json", *change[:-1], value=change[-1])
    sign(run)
    yield words("evaluate", run)


@fault("A4", "evaluate", 4, "newer than this pyrovae: update")
def an_old_run_is_from_the_future(folder):
    run = age(small_run(folder / "run"))
    edit(run / "config.json", "versions", "pyrovae", value="99.1")
    yield words("evaluate", run)


@fault("A4", "load", 4, "newer than this pyrovae: update")
def a_manifest_is_from_the_future(folder):
    import pyrovae as pv

    run = small_run(folder / "run")
    edit(run / "last/manifest.json", "format_version", value=2)
    yield lambda: pv.load(run)


@fault("A4", "evaluate", 4, r"manifest\.json.*missing")
def the_manifest_is_missing(folder):
    run = small_run(folder / "run")
    (run / "last/manifest.json").unlink()
    yield words("evaluate", run)


@fault(
    "A4", "load", 4, r"manifest\.json.*damaged",
    each={"empty": "", "list": "[]", "words": '{"files": {"weights.safetensors": 3}}', "deep": DEEP},
)  # fmt: skip
def the_manifest_is_none(folder, text):
    import pyrovae as pv

    run = small_run(folder / "run")
    (run / "last/manifest.json").write_text(text)
    yield lambda: pv.load(run)


@fault("A4", "load", 4, r"weights\.safetensors.*changed")
def the_manifest_knows_nothing_of_the_weights(folder):
    import pyrovae as pv

    run = small_run(folder / "run")
    edit(run / "last/manifest.json", "files", value={})
    yield lambda: pv.load(run)


@fault("A4", "train", 4, r"metrics\.jsonl.*changed")
def the_metrics_are_edited(folder):
    run = small_run(folder / "run")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[0]["bound"] = -1.0
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = contents(run)
    yield words("train", run)
    assert contents(run) == before


@fault("A4", "train", 4, r"state\.pt.*changed", each={"first": 0.1, "middle": 0.5, "last": 1.0})
def a_bit_of_the_state_is_flipped(folder, place):
    run = small_run(folder / "run")
    flip(run / STATE, place)
    yield words("train", run)


@fault("A4", "fit", 4, CHANGED, each={name: name for name in (WEIGHTS, STATE, "config.json", "metrics.jsonl")})
def fit_takes_up_no_changed_file(folder, name):
    run = stopped(folder / "run")
    content = (run / name).read_bytes()
    (run / name).write_bytes(content.replace(b'"epoch": 1', b'"epoch": 7').replace(b'"seed": 0', b'"seed": 1'))
    if (run / name).read_bytes() == content:
        flip(run / name)
    of = pair()
    weights, before = {k: v.clone() for k, v in of.state_dict().items()}, contents(run)
    yield lambda: fit(run, of=of, epochs=4, resume=True)
    assert all(value.equal(weights[key]) for key, value in of.state_dict().items())
    assert contents(run) == before


@fault("A4", "fit", 0, r"weights\.safetensors.*changed")
def fit_goes_on_knowingly(folder):
    run = stopped(folder / "run")
    flip(run / WEIGHTS, 1.0)
    outcome = yield lambda: fit(run, epochs=4, resume=True, override=True)
    assert len(outcome.value.history) == 4


@fault("A4", "fit", 0, "^$")
def a_stopped_run_is_taken_up_as_it_is(folder):
    run = stopped(folder / "run")
    outcome = yield lambda: fit(run, epochs=4, resume=True)
    assert [row["bound"] for row in outcome.value.history] == [row["bound"] for row in fit(None, epochs=4).history]


def cast(run: Path, dtype: str) -> None:
    """Save the weights in another dtype."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(run / WEIGHTS).items()}
    save_file(weights, run / WEIGHTS)
    sign(run)


@fault("A4", "load", 4, r"of another dtype", each={name: name for name in ("int8", "float16", "float64", "bool")})
def weights_are_of_another_dtype(folder, dtype):
    import pyrovae as pv

    run = small_run(folder / "run")
    cast(run, dtype)
    yield lambda: pv.load(run)


@fault("A4", "evaluate", 4, r"of another dtype", each={"old": age, "new": lambda run: run})
def weights_of_another_dtype_are_not_measured(folder, make):
    run = make(small_run(folder / "run"))
    cast(run, "int8")
    yield words("evaluate", run)


@fault("A4", "load", 0, r"of another dtype")
def weights_are_converted_knowingly(folder):
    import torch

    import pyrovae as pv

    run = small_run(folder / "run")
    exact = pv.load(run).state_dict()
    cast(run, "float64")
    outcome = yield lambda: pv.load(run, override=True)
    assert all(v.dtype == exact[k].dtype and torch.equal(v, exact[k]) for k, v in outcome.value.state_dict().items())


@fault("A4", "train", 4, r"weights\.safetensors.*changed")
def the_data_are_codes_of_a_changed_run(folder):
    fit_codes(folder / "vq")
    flip(folder / "vq" / WEIGHTS)
    yield "train", "code_prior", "--data", f"codes:{folder / 'vq'}", "--epochs", "1", "--run-dir", folder / "prior"
    assert not (folder / "prior").exists()


def fit_codes(folder: Path) -> None:
    options = ("--set", "num_codes=4", "--set", "channels=4", "--epochs", "1", "--samples", "5", "--device", "cpu")
    assert command("train", "vqvae", *options, "--run-dir", folder).code == 0


# --- A5: two writers --------------------------------------------------------------------------------

HOLD = """
import sys, time
from pyrovae.runs import Run
with Run(sys.argv[1]).writing():
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def held(run: Path, how: int = signal.SIGKILL):
    """Another process writes to the run meanwhile, and is ended then."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            yield other
        finally:
            other.send_signal(how)


@fault("A5", "train", 6, r"is being written to by another process.*pid.*host|is being written to.*host.*pid")
def two_resume_at_once(folder):
    run = small_run(folder / "run")
    before = contents(run)
    with held(run):
        yield words("train", run)
    assert contents(run).items() >= before.items()


@fault("A5", "train", 6, "is being written to")
def a_folder_is_about_to_be_taken(folder):
    with held(folder / "run"):
        yield "train", "--run-dir", folder / "run", "--epochs", "1", "--device", "cpu"
    assert not (folder / "run/config.json").exists()


@fault("A5", "evaluate", 0, "test NLL")
def a_run_that_is_written_to_is_measured(folder):
    run = small_run(folder / "run")
    with held(run):
        yield words("evaluate", run)


@fault("A5", "fit", 6, "is being written to")
def two_threads_fit_into_one_folder(folder):
    entered, done = threading.Event(), threading.Event()

    def wait(result):
        entered.set()
        done.wait(30)

    first = threading.Thread(target=lambda: fit(folder / "run", on_epoch=wait, epochs=1))
    first.start()
    entered.wait(30)
    before = contents(folder / "run")
    try:
        yield lambda: fit(folder / "run", resume=True, epochs=1)
        assert contents(folder / "run") == before
    finally:
        done.set()
        first.join()


@fault("A5", "fit_replicas", 6, "is being written to")
def a_replicas_folder_is_held(folder):
    import torch

    import pyrovae as pv

    folders = [folder / "a", folder / "b"]
    with held(folders[1]):
        yield lambda: pv.fit_replicas(
            [pair(), pair()], torch.ones(8, 4), objective=pv.ELBO(), epochs=1, run_dirs=folders, device="cpu"
        )
    assert not folders[0].exists()


@fault("A5", "fit_replicas", 2, "run_dirs")
def replicas_share_a_folder(folder):
    import torch

    import pyrovae as pv

    yield lambda: pv.fit_replicas(
        [pair(), pair()], torch.ones(8, 4), objective=pv.ELBO(), epochs=1, run_dirs=[folder / "a", folder / "b/../a"]
    )
    assert not (folder / "a").exists()


@fault("A5", "fit", 0, "^$", each={"killed": signal.SIGKILL, "interrupted": signal.SIGINT})
def the_process_that_held_a_run_is_dead(folder, how):
    run = stopped(folder / "run")
    with held(run, how):
        pass
    outcome = yield lambda: fit(run, epochs=4, resume=True)
    assert len(outcome.value.history) == 4
    assert not (run / "pyrovae.lock").exists()


@fault(
    "A5", "fit", 0, "^$",
    each={"empty": b"", "noise": b"\xff\x00{", "of init": b'{"host": "elsewhere", "pid": 1, "started": "0"}'},
)  # fmt: skip
def a_lock_is_left_that_nobody_holds(folder, content):
    run = stopped(folder / "run")
    (run / "pyrovae.lock").write_bytes(content)
    outcome = yield lambda: fit(run, epochs=4, resume=True)
    assert len(outcome.value.history) == 4


@fault("A5", "fit", 0, "^$")
def the_children_of_a_dead_process_live_on(folder):
    """As a loader's workers do for some seconds."""
    run = stopped(folder / "run")
    script = HOLD.replace("    print", "    import os\n    if os.fork() == 0: time.sleep(20), os._exit(0)\n    print")
    with subprocess.Popen([sys.executable, "-c", script, str(run)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        other.kill()
        other.wait()
        outcome = yield lambda: fit(run, epochs=4, resume=True)
        other.stdout.close()
    assert len(outcome.value.history) == 4


@fault("A5", "train", 6, "symbolic link|no lock of a run", each={"link": True, "pipe": False})
def something_else_lies_where_the_lock_would(folder, link):
    """It is neither written to nor waited for; nothing is lost."""
    run, other = small_run(folder / "run"), folder / "precious"
    other.write_text("mine")
    (run / "pyrovae.lock").symlink_to(other) if link else os.mkfifo(run / "pyrovae.lock")
    yield words("train", run)
    assert other.read_text() == "mine"


# --- B1: a state that must not be used --------------------------------------------------------------


def moments(change):
    """A change of what the optimizer knows of its first parameter."""

    def forged(state):
        state["optimizer"]["state"][0] = change(state["optimizer"]["state"][0])

    return forged


def option(name, value):
    """A change of an option of the optimizer's first group."""

    def forged(state):
        state["optimizer"]["param_groups"][0][name] = value

    return forged


def numpy_position(value):
    def forged(state):
        state["rng"]["numpy"][2] = value

    return forged


FORGED = {
    "shorter moments": moments(lambda m: m | {"exp_avg": m["exp_avg"][:1]}),
    "longer moments": moments(lambda m: m | {"exp_avg_sq": m["exp_avg_sq"].repeat(9, 9)}),
    "flat moments": moments(lambda m: m | {"exp_avg": m["exp_avg"].flatten()}),
    "empty moments": moments(lambda m: m | {"exp_avg": m["exp_avg"][:0]}),
    "float64 moments": moments(lambda m: m | {"exp_avg": m["exp_avg"].double()}),
    "int8 moments": moments(lambda m: m | {"exp_avg": m["exp_avg"].char()}),
    "numbers for moments": moments(lambda m: m | {"exp_avg": 0.5}),
    "no moments": moments(lambda m: {k: v for k, v in m.items() if k != "exp_avg"}),
    "other moments": moments(lambda m: {"momentum_buffer": m["exp_avg"]}),
    "many steps": moments(lambda m: m | {"step": m["step"].repeat(99)}),
    "no groups": lambda s: s["optimizer"].update(param_groups=[]),
    "no state": lambda s: s["optimizer"].pop("state") and None,
    "a list of states": lambda s: s["optimizer"].update(state=[1, 2]),
    "swapped parameters": lambda s: s["optimizer"]["param_groups"][0].update(params=[0, 0, 0]),
    "a rate of words": option("lr", "fast"), "a rate of nan": option("lr", float("nan")),
    "one beta": option("betas", (0.9,)), "betas of words": option("betas", ("a", "b")),
    "eps of none": option("eps", None),
    "amsgrad": option("amsgrad", True),
    "numpy beyond": numpy_position(10**6), "numpy negative": numpy_position(-1), "numpy a float": numpy_position(1.5),
    "short keys": lambda s: s["rng"]["numpy"].__setitem__(1, s["rng"]["numpy"][1][:9]),
    "no generator": lambda s: s["rng"].pop("torch"),
    "short generator": lambda s: s["rng"].update(torch=s["rng"]["torch"][:7]),
    "a blank generator": lambda s: s["rng"].update(torch=s["rng"]["torch"] * 0),
    "python's generator": lambda s: s["rng"].update(python=(3, (1, 2), None)),
    "a billion epochs": lambda s: s.update(epoch=10**9), "no epoch": lambda s: s.update(epoch=-1),
    "half an epoch": lambda s: s.update(epoch=0.5), "true epochs": lambda s: s.update(epoch=True),
    "an epoch in words": lambda s: s.update(epoch="1"), "a best epoch to come": lambda s: s.update(best_epoch=99),
    "finished, perhaps": lambda s: s.update(finished="no"), "unknown order": lambda s: s.update(order=["x"] * 3),
    "an order of numbers": lambda s: s.update(order=[1, 2]), "late tensors": lambda s: s.update(late=["nowhere"]),
    "examples of words": lambda s: s.update(examples=["x"]),
    "examples alone": lambda s: s.update(examples=[(0, ("x",))]),
    "a list": lambda s: [1, 2, 3], "nothing": lambda s: {"epoch": 1},
}  # fmt: skip


@fault("B1", "fit", 4, r"state\.pt\" is damaged|metrics\.jsonl\" is damaged", each=FORGED)
def a_state_is_forged(folder, change):
    run = stopped(folder / "run")
    forge(run, change)
    of, before = pair(), contents(run)
    yield lambda: fit(run, of=of, epochs=4, resume=True)
    assert contents(run) == before


@fault("B1", "train", 4, r"state\.pt\" is damaged|metrics\.jsonl\" is damaged",
       each={k: FORGED[k] for k in ("longer moments", "no moments", "numpy beyond", "a billion epochs")})  # fmt: skip
def a_state_of_a_run_is_forged(folder, change):
    run = age(small_run(folder / "run"))
    forge(run, lambda state: change(state) or state.update(finished=False))
    yield words("train", run)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


@fault("B1", "fit", 0, "^$", each={name: name for name in ("Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "NAdam")})
def other_optimizers_are_taken_up(folder, name):
    import torch

    options = {"SGD": {"momentum": 0.9}, "Adam": {"amsgrad": True, "fused": True}}.get(name, {})

    def make(parameters):
        return getattr(torch.optim, name)(parameters, lr=1e-2, **options)

    def stop(result):
        return False

    whole = fit(None, epochs=4, optimizer=make)
    fit(folder / "run", epochs=4, optimizer=make, on_epoch=stop)
    forge(folder / "run", lambda state: state.update(finished=False))
    outcome = yield lambda: fit(folder / "run", epochs=4, optimizer=make, resume=True)
    assert [row["bound"] for row in outcome.value.history] == [row["bound"] for row in whole.history]


@fault("B1", "load", 4, r"weights\.safetensors\" is damaged")
def a_pickle_lies_in_the_weights_place(folder):
    import pickle

    import pyrovae as pv

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(folder / "boom"),)

    run = small_run(folder / "run")
    (run / WEIGHTS).write_bytes(pickle.dumps(Bomb()))
    sign(run)
    yield lambda: pv.load(run)
    assert not (folder / "boom").exists()


# --- B4: only what the library made is replaced or deleted ------------------------------------------

FOREIGN = ("last/thesis.tex", "last.new/thesis.tex", "last.old/thesis.tex", "best/thesis.tex", "metrics.jsonl",
           "results.json", "samples.png", "curves.png", "vqvae/thesis.tex")  # fmt: skip


def foreign(folder: Path, name: str) -> dict[str, bytes]:
    """Put a file of someone else's into a folder."""
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("mine")
    return contents(folder)


@fault("B4", "train", 2, "no run made", each={name: name for name in FOREIGN})
def a_folder_holds_files_of_others(folder, name):
    before = foreign(folder / "run", name)
    yield "train", "--epochs", "1", "--run-dir", folder / "run", "--device", "cpu", "--set", "validation=0.2"
    assert contents(folder / "run") == before


@fault("B4", "fit", 2, "no run made", each={name: name for name in ("last/thesis.tex", "metrics.jsonl", "best/x")})
def fit_is_given_a_folder_with_files_of_others(folder, name):
    before = foreign(folder / "run", name)
    yield lambda: fit(folder / "run")
    assert contents(folder / "run") == before


@fault("B4", "fit_replicas", 2, "no run made")
def a_replicas_folder_holds_files_of_others(folder):
    import torch

    import pyrovae as pv

    before = foreign(folder / "b", "last/thesis.tex")
    yield lambda: pv.fit_replicas(
        [pair(), pair()], torch.ones(8, 4), objective=pv.ELBO(), epochs=1, run_dirs=[folder / "a", folder / "b"],
        device="cpu",
    )  # fmt: skip
    assert contents(folder / "b") == before


@fault("B4", "train", 4, "holds no run")
def a_config_of_others_is_resumed(folder):
    (folder / "run").mkdir()
    (folder / "run/config.json").write_text('{"model_type": "llama", "vocab_size": 32000}')
    before = contents(folder / "run")
    yield words("train", folder / "run")
    assert contents(folder / "run") == before


@fault("B4", "train", 0, "test NLL", each={name: name for name in ("notes.txt", "slurm-7.out", "data/train.csv")})
def other_files_in_the_folder_are_left(folder, name):
    foreign(folder / "run", name)
    yield "train", "--epochs", "1", "--samples", "5", "--run-dir", folder / "run", "--device", "cpu"
    assert (folder / "run" / name).read_text() == "mine"


@fault("B4", "fit", 2, "no run made", each={name: name for name in ("last/notes.txt", "best/notes.txt")})
def someone_keeps_files_in_a_checkpoint(folder, name):
    run = stopped(folder / "run")
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text("mine")
    before = contents(run)
    yield lambda: fit(run, epochs=4, resume=True)
    assert contents(run) == before


@fault(
    "A4",
    "train",
    4,
    r"(weights\.safetensors|metrics\.jsonl).*(changed|damaged)",
    each={"weights": WEIGHTS, "rows": "metrics.jsonl"},
)
def a_run_by_a_rule_of_its_own_is_changed(folder, name):
    run = folder / "run"
    command(
        "train", "rbm", "--run-dir", run, "--epochs", "2", "--set", "num_hidden=4", "--samples", "5", "--device", "cpu"
    )
    text = (run / name).read_bytes()
    (run / name).write_bytes(
        text.replace(b'"epoch": 2', b'"epoch": 2 ') if name == "metrics.jsonl" else text[:-1] + b"?"
    )
    assert (run / name).read_bytes() != text
    yield words("train", run)


@fault("B4", "fit", 2, "cannot be a folder", each={"file": "run", "parent": "run/more"})
def a_file_is_in_the_folders_place(folder, name):
    (folder / "run").write_text("mine")
    yield lambda: fit(folder / name)
    assert (folder / "run").read_text() == "mine"


@fault(
    "B4", "evaluate or sample", 2, "no run made",
    each={"results": ("results.json", ("evaluate",)), "samples": ("samples-0.png", ("sample", "-n", "4"))},
)  # fmt: skip
def what_a_run_would_replace_is_a_link_to_something_precious(folder, case):
    name, (verb, *options) = case
    run = small_run(folder / "run")
    (folder / "precious").write_text("mine")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(folder / "precious")
    yield verb, run, *options
    assert (folder / "precious").read_text() == "mine"


@fault("B4", "fit", 2, "no run made", each={name: name for name in ("last", "metrics.jsonl", "config.json")})
def a_run_is_made_of_links(folder, name):
    run = stopped(folder / "run")
    (run / name).rename(folder / "elsewhere")
    (run / name).symlink_to(folder / "elsewhere")
    before = contents(folder)
    yield lambda: fit(run, epochs=4, resume=True)
    assert contents(folder) == before


@fault("B4", "load", 0, "^$")
def a_run_of_links_is_read(folder):
    """As hubs' caches lay them out."""
    import pyrovae as pv

    run = small_run(folder / "run")
    for name in (WEIGHTS, "config.json", "last/manifest.json"):
        (run / name).rename(folder / Path(name).name)
        (run / name).symlink_to(folder / Path(name).name)
    outcome = yield lambda: pv.load(run)
    assert isinstance(outcome.value, pv.models.VAE)


# --- C: lost, hung, crashed -------------------------------------------------------------------------


@fault("C", "train", 4, r"weights\.safetensors\" is missing", each={"new": lambda run: run, "old": age})
def the_weights_are_missing_beside_the_state(folder, make):
    run = make(small_run(folder / "run"))
    (run / WEIGHTS).unlink()
    before = contents(run)
    yield words("train", run)
    assert contents(run) == before


@fault("C", "fit", 4, "is missing", each={name: name for name in (WEIGHTS, STATE, "last")})
def a_part_of_the_checkpoint_is_missing(folder, name):
    run = stopped(folder / "run")
    fit(run, epochs=4, resume=True)
    shutil.rmtree(run / name) if name == "last" else (run / name).unlink()
    before = contents(run)
    yield lambda: fit(run, epochs=4, resume=True)
    assert contents(run) == before


@fault("C", "evaluate", 4, r"weights\.safetensors\" is missing")
def there_are_no_weights_to_measure(folder):
    run = small_run(folder / "run")
    (run / WEIGHTS).unlink()
    yield words("evaluate", run)


def moving(run: Path, how: str):
    """What happens to a run's folder while it trains."""

    def act(result):
        if len(result.history) == 1:
            shutil.rmtree(run) if how == "deleted" else run.rename(run.with_name("moved"))
            if how == "replaced":
                run.mkdir()
                (run / "config.json").write_text("{}")

    return act


@fault("C", "fit", 6, "is gone: it was moved or deleted", each={how: how for how in ("moved", "deleted", "replaced")})
def the_run_is_moved_away_meanwhile(folder, how):
    run = folder / "run"
    yield lambda: fit(run, on_epoch=moving(run, how), epochs=3)
    assert (contents(run) if run.exists() else {}) == ({"config.json": b"{}"} if how == "replaced" else {})
    if how != "deleted":
        assert len(fit(folder / "moved", epochs=3, resume=True).history) == 3


def disk_of(size: int) -> None:
    """From now on no file can grow beyond so many bytes."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@fault(
    "C", "fit", 6, r"cannot write the checkpoint .*the one before it is kept", each={"weights": 6000, "state": 16000}
)
def the_disk_is_full_when_a_checkpoint_is_written(folder, size):
    run = folder / "run"
    fit(run, of=pair(300), epochs=4, on_epoch=lambda result: False)
    forge(run, lambda state: state.update(finished=False))
    before = contents(run / "last")

    def fill_up():
        disk_of(size)
        fit(run, of=pair(300), epochs=4, resume=True)

    yield fill_up
    disk_of(10**9)
    assert contents(run / "last") == before
    assert not (run / "last.new").exists()
    again, whole = fit(run, of=pair(300), epochs=4, resume=True), fit(None, of=pair(300), epochs=4)
    assert [row["bound"] for row in again.history] == [row["bound"] for row in whole.history]


@fault("C", "train", 6, r"cannot write|File too large|No space")
def the_disk_is_full_in_the_first_epoch(folder):
    disk_of(2500)
    yield "train", "--epochs", "1", "--run-dir", folder / "run", "--device", "cpu"
    assert not (folder / "run/last.new").exists()


@fault("C", "fit", 6, r"File too large|No space")
def the_disk_is_full_when_metrics_are_logged(folder):
    run = stopped(folder / "run")
    size = (run / "metrics.jsonl").stat().st_size + 10

    def fill_up():
        disk_of(size)
        fit(run, epochs=4, resume=True)

    yield fill_up
    disk_of(10**9)
    again = fit(run, epochs=4, resume=True)
    assert [row["bound"] for row in again.history] == [row["bound"] for row in fit(None, epochs=4).history]


@fault("C", "train", 0, "^$")
def three_are_started_together(folder):
    def start() -> list[str]:
        begin = time.monotonic() + 0.2
        children = []
        for i in range(3):
            if (child := os.fork()) == 0:
                time.sleep(max(begin - time.monotonic(), 0))
                words = ("--epochs", "1", "--samples", "5", "--device", "cpu", "--seed", str(i))
                os._exit(command("train", *words).code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert codes == [0, 0, 0], codes
        return sorted(place.name for place in Path("runs").iterdir())

    outcome = yield start
    assert outcome.value == ["vae-digits-elbo", "vae-digits-elbo-2", "vae-digits-elbo-3"]
    seeds = {
        json.loads((Path("runs") / name / "config.json").read_text())["settings"]["seed"] for name in outcome.value
    }
    assert seeds == {0, 1, 2}


@fault(
    "C", "evaluate", 4, r"config\.json.*nested", each={"bare": DEEP, "inside": '{"versions": {}, "x": ' + DEEP + "}"}
)
def a_config_is_deep(folder, text):
    run = small_run(folder / "run")
    (run / "config.json").write_text(text)
    yield words("evaluate", run)


@fault("C", "train", 4, r"metrics\.jsonl\" is damaged", each={"deep": DEEP, "huge": "1" * 5000, "bytes": "\ud800"})
def metrics_are_no_metrics(folder, text):
    run = small_run(folder / "run")
    (run / "metrics.jsonl").write_bytes(text.encode("utf-8", "surrogatepass") + b"\n")
    sign(run)
    yield words("train", run)


RESULTS = {"list": "[]", "deep": DEEP, "empty": "{}", "words": '{"likelihood_is": 3}', "cut": '{"nll": 1',
           "nested": '{"likelihood_is": "estimate", "nll": {"a": 1}, "active_units": {}}',
           "units": '{"likelihood_is": null, "active_units": [1, 2]}', "bytes": b"\xff\xfe",
           "number": "7"}  # fmt: skip


@fault(
    "C", "compare", 4, r"results\.json.*run pyrovae evaluate", each={k: v for k, v in RESULTS.items() if k != "empty"}
)
def results_that_are_none_are_not_compared(folder, text):
    run = small_run(folder / "run")
    (run / "results.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    yield words("compare", run)


@fault("C", "evaluate", 0, "test NLL", each=RESULTS)
def results_that_are_none_are_measured_anew(folder, text):
    run = small_run(folder / "run")
    (run / "results.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    yield words("evaluate", run)
    assert json.loads((run / "results.json").read_text())["nll"] > 0


@fault(
    "C",
    "evaluate",
    4,
    "no regular file|is missing",
    each={n: n for n in ("config.json", WEIGHTS, "last/manifest.json")},
)
def a_pipe_is_in_a_files_place(folder, name):
    run = small_run(folder / "run")
    (run / name).unlink()
    os.mkfifo(run / name)
    yield words("evaluate", run)


@fault("C", "train", 4, "no regular file|is missing", each={name: name for name in (STATE, WEIGHTS)})
def a_pipe_is_in_the_states_place(folder, name):
    run = small_run(folder / "run")
    (run / name).unlink()
    os.mkfifo(run / name)
    yield words("train", run)


@fault("C", "train", 2, "no run made")
def a_pipe_is_in_the_metrics_place(folder):
    run = small_run(folder / "run")
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    yield words("train", run)


@fault("C", "evaluate", 4, "holds no run|is missing", each={name: name for name in ("config.json", WEIGHTS)})
def links_go_in_a_circle(folder, name):
    run = small_run(folder / "run")
    (run / name).unlink()
    (run / name).symlink_to(run / name)
    yield words("evaluate", run)


HEADERS = {
    "a terabyte": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]},
    "overflow": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]},
    "beyond": {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]},
    "negative": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
    "no kind": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]},
}


@fault("C", "load", 4, r"weights\.safetensors\" is damaged", each=HEADERS)
def weights_declare_what_they_do_not_hold(folder, header):
    import pyrovae as pv

    run = age(small_run(folder / "run"))
    text = json.dumps({"a": header}).encode()
    (run / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    yield lambda: pv.load(run)


def swollen(run: Path) -> Path:
    """Four tebibytes of weights, with nothing in them."""
    text = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    with (run / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 2**42)
    return run


@fault("C", "load", 6, r"weights\.safetensors.*(memory|GiB)")
def weights_are_larger_than_memory(folder):
    import pyrovae as pv

    run = swollen(age(small_run(folder / "run")))
    yield lambda: pv.load(run)


@fault("C", "load", 4, r"weights\.safetensors.*changed")
def weights_are_larger_than_can_be_read(folder):
    import pyrovae as pv

    run = swollen(small_run(folder / "run"))
    yield lambda: pv.load(run)


@fault("C", "load", 0, "^$")
def a_checkpoint_is_replaced_while_it_is_read(folder):
    """Fifty times each: what is read is whole, and of one moment."""
    import pyrovae as pv

    run, ended, of = folder / "run", threading.Event(), pair()
    fit(run)
    from pyrovae.runs import Run

    def save(number):
        for tensor in of.state_dict().values():
            tensor.fill_(number)
        Run(run).save("last", of.state_dict(), {"epoch": number})

    def write():
        for number in range(50):
            save(number)
        ended.set()

    save(-1)

    def read():
        other = threading.Thread(target=write)
        other.start()
        seen = []
        while not ended.is_set():
            seen.append({float(v.flatten()[0]) for v in pv.load(run).state_dict().values()})
        other.join()
        return seen

    outcome = yield read
    assert all(len(values) == 1 for values in outcome.value)
    assert len(set(map(min, outcome.value))) > 1


# --- D: on disk -------------------------------------------------------------------------------------


@fault("D", "fit", 0, "^$")
def everything_is_on_disk_before_it_counts(folder):
    """Files and folders are synced, and the checkpoint's before it is renamed."""
    run, events, sync, rename = folder / "run", [], os.fsync, Path.replace

    def synced(handle):
        events.append(os.readlink(f"/proc/self/fd/{handle}").removeprefix(f"{run}"))
        sync(handle)

    def renamed(self, target):
        events.append(f"{self.name} -> {Path(target).name}")
        return rename(self, target)

    def train():
        os.fsync, Path.replace = synced, renamed
        try:
            fit(run, epochs=1)
        finally:
            os.fsync, Path.replace = sync, rename

    yield train
    moved = events.index("last.new -> last")
    parts = {f"/last.new{name}" for name in ("", "/weights.safetensors", "/state.pt", "/manifest.json")}
    assert parts <= set(events[:moved]), events
    assert "/metrics.jsonl" in events[:moved]
    assert "" in events[moved:], events
    assert any(event.startswith("/.config.json") for event in events), events


@fault("A11", "compare", 3, r"has no results.json: run pv.report\(\".*run\", data, num_samples=5000\)$")
def a_run_of_python_has_no_results(folder):
    fit(folder / "run")
    yield "compare", folder / "run"


# --- what editors, kills and races leave -----------------------------------------------------------------------------

MARK = b"\xef\xbb\xbf"


@fault("A4", "evaluate", 0, r"test NLL +\d", each={f: f for f in ("config.json", "results.json", "last/manifest.json")})
def an_editor_puts_a_mark_in_front(folder: Path, file: str):
    run = small_run(folder / "run")
    path = run / file
    path.write_bytes(MARK + path.read_bytes().replace(b"\n", b"\r\n"))
    yield "evaluate", run, "--samples", "5", "--device", "cpu"


@fault("A4", "load", 4, "config.json is unreadable")
def an_editor_writes_sixteen_bits(folder: Path):
    import pyrovae as pv

    run = small_run(folder / "run")
    (run / "config.json").write_text((run / "config.json").read_text(), encoding="utf-16")
    yield lambda: pv.load(run)


@fault("A4", "history", each={"metrics": MARK})
def a_mark_in_front_of_metrics_hides_no_epoch(folder: Path, mark: bytes):
    from pyrovae.runs import Run

    run = small_run(folder / "run")
    expected = Run(run).history()
    (run / "metrics.jsonl").write_bytes(mark + (run / "metrics.jsonl").read_bytes())
    outcome = yield lambda: Run(run).history()
    assert outcome.value == expected != []


@fault("C", "train --resume", 0, "is finished; its results are in results.json")
def half_deleted_checkpoints_go_with_the_next_writer(folder: Path):
    run = small_run(folder / "run")
    for name, file in (("last.old", "state.pt"), ("last.new", "manifest.json"), ("best.old", "weights.safetensors")):
        (run / name).mkdir()
        (run / name / file).write_bytes(b"half")
    (run / "vqvae").mkdir()
    before = (run / WEIGHTS).read_bytes()
    yield "train", "--resume", "--run-dir", run, "--device", "cpu"
    assert sorted(place.name for place in run.iterdir() if place.is_dir()) == ["best.old", "last", "vqvae"]
    assert (run / WEIGHTS).read_bytes() == before


@fault("C", "writing")
def a_checkpoint_under_its_old_name_is_kept(folder: Path):
    from pyrovae.runs import Run

    run = small_run(folder / "run")
    expected = Run(run).digest()
    (run / "last").rename(run / "last.old")

    def write() -> str:
        with Run(run).writing():
            return Run(run).digest()

    outcome = yield write
    assert outcome.value == expected


@fault("B4", "writing", each={"a file": False, "a link": True})
def what_no_run_made_is_not_tidied_away(folder: Path, link: bool):
    from pyrovae.runs import Run

    run, other = small_run(folder / "run"), folder / "thesis"
    other.mkdir()
    (other / "thesis.tex").write_text("years")
    if link:
        (run / "last.old").symlink_to(other)
    else:
        shutil.copytree(other, run / "last.new")

    def write() -> None:
        with Run(run).writing():
            pass

    yield write
    assert (run / ("last.old" if link else "last.new") / "thesis.tex").read_text() == "years"
    assert (other / "thesis.tex").exists()


@fault("A3", "evaluate", 0, "checkpoint +best")
def a_figure_says_that_it_is_of_the_best_checkpoint(folder: Path):
    run, plain = small_run(folder / "run", "--set", "validation=100"), small_run(folder / "plain")
    yield "evaluate", run, "--samples", "20", "--checkpoint", "best", "--device", "cpu"
    compared = command("compare", run, plain).printed
    assert "run (best)" in compared
    assert "plain (" not in compared
    assert "run (" not in command("compare", plain).printed


@fault("A4", "evaluate")
def weights_are_read_and_hashed_once(folder: Path):
    from unittest.mock import patch

    from pyrovae.app.job import reopen

    run, hashed, original = small_run(folder / "run"), [], hashlib.file_digest
    with patch(
        "hashlib.file_digest", lambda file, kind: (hashed.append(Path(file.name).name), original(file, kind))[1]
    ):
        outcome = yield lambda: reopen(run)
    assert hashed == ["weights.safetensors"]
    assert outcome.value.weights == hashlib.sha256((run / WEIGHTS).read_bytes()).hexdigest()


@fault("C", "fit_replicas", 2, r"b\" hold runs already")
def a_run_begins_while_replicas_are_made_ready(folder: Path):
    import torch

    import pyrovae as pv
    from pyrovae.train import replicas

    original, made = replicas.replicas_of, []

    def slow(*arguments: object) -> object:
        found = original(*arguments)
        with pv.runs.Run(folder / "b").writing():
            pv.runs.Run(folder / "b").start({"of": "another process"})
        made.append((folder / "b" / "config.json").read_bytes())
        return found

    replicas.replicas_of = slow
    pairs = [pv.models.VAE((4,), latent_dim=1, hidden=()) for _ in range(2)]
    places = [folder / "a", folder / "b"]
    yield lambda: pv.fit_replicas(pairs, torch.ones(8, 4), objective=pv.ELBO(), epochs=1, run_dirs=places)
    assert (folder / "b" / "config.json").read_bytes() == made[0]
    assert not (folder / "a").exists()
