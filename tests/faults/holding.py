"""What held before and goes on holding: no global state changed, nothing executed, nothing written unasked."""

import errno
import functools
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch

import pyrovae as pv
from tests.faults.matrix import command, fault, once, small_run
from tests.pairs import Noisy

BITS = (torch.rand(12, 6, generator=torch.Generator().manual_seed(0)) > 0.5).float()


# --- imports -------------------------------------------------------------------------------------------------------

LOOK = """
import json, locale, logging, os, random, signal, sys, threading, time, warnings
sys.path.insert(0, {root!r})
import numpy, pyro, pyro.distributions, torch, torch.distributions, matplotlib

def look():
    return json.loads(json.dumps(dict(
        dtype=torch.get_default_dtype(), device=str(torch.get_default_device()), threads=torch.get_num_threads(),
        interop=torch.get_num_interop_threads(), torch=torch.get_rng_state().tolist(), random=random.getstate(),
        numpy=[str(part) for part in numpy.random.get_state()], filters=warnings.filters,
        showwarning=repr(warnings.showwarning), handlers={{str(s): repr(signal.getsignal(s)) for s in signal.Signals}},
        pyro=pyro.settings.get(), store=list(pyro.get_param_store().keys()), backend=dict(matplotlib.rcParams),
        validate=torch.distributions.Distribution._validate_args, pyplot="matplotlib.pyplot" in sys.modules,
        environment=dict(os.environ), hook=repr(sys.excepthook), streams=[repr(sys.stdout), repr(sys.stderr)],
        folder=os.getcwd(), locale=locale.setlocale(locale.LC_ALL), level=logging.getLogger().level,
        of_log=len(logging.getLogger().handlers), running=threading.active_count(), grad=torch.is_grad_enabled(),
        deterministic=torch.are_deterministic_algorithms_enabled(), matmul=torch.get_float32_matmul_precision(),
        numpy_errors=numpy.geterr(), recursion=sys.getrecursionlimit(), umask=[os.umask(os.umask(0o022)), 0][1],
        started=[p for p in os.listdir(".")]), default=str))

before = look()
import {module}
after = look()
drawn = {module!r} == "pyrovae.app.cli"  # where typer brings in rich, which draws names of styles
print(json.dumps([k for k in before if before[k] != after[k] and not (drawn and k == "random")]))
"""


@fault("E", "import", each={name: name for name in ("pyrovae", "pyrovae.app.cli", "pyrovae.models", "pyrovae.parts")})
def an_import_changes_no_state(folder: Path, module: str):
    look = LOOK.format(module=module, root=str(Path(pv.__file__).parent.parent))
    outcome = yield lambda: subprocess.check_output([sys.executable, "-W", "error::UserWarning", "-c", look])
    assert json.loads(outcome.value) == []


# --- functions -----------------------------------------------------------------------------------------------------


def state() -> dict[str, object]:
    """All global state that a function could leave changed."""
    import matplotlib

    return {
        "torch": torch.get_rng_state().tolist(), "numpy": [str(part) for part in np.random.get_state()],
        "random": random.getstate(), "validation": pyro.settings.get(), "grad": torch.is_grad_enabled(),
        "distributions": torch.distributions.Distribution._validate_args, "dtype": torch.get_default_dtype(),
        "stack": list(pyro.poutine.runtime._PYRO_STACK), "store": sorted(pyro.get_param_store().keys()),
        "threads": torch.get_num_threads(), "folder": os.getcwd(),
        "environment": {k: v for k, v in os.environ.items() if "INDUCTOR" not in k},  # which torch sets for itself
        "deterministic": torch.are_deterministic_algorithms_enabled(), "backend": matplotlib.get_backend(),
        "matmul": torch.get_float32_matmul_precision(), "signals": [signal.getsignal(s) for s in signal.Signals],
        "autocast": torch.is_autocast_enabled("cpu"), "inference": torch.is_inference_mode_enabled(),
    }  # fmt: skip


def marks(pair: torch.nn.Module) -> dict[str, object]:
    """What of a pair no measurement may change: modes, weights, buffers, gradients, hooks."""
    tensors = dict(pair.state_dict(keep_vars=True))
    return {
        "modes": {name: module.training for name, module in pair.named_modules()},
        "values": {name: tensor.tolist() for name, tensor in tensors.items()},
        "needs": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "gradients": {name: tensor.grad is None for name, tensor in tensors.items()},
        "hooks": {
            name: [len(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")]
            for name, module in pair.named_modules()
        },
        "of tensors": {name: bool(tensor._backward_hooks) for name, tensor in tensors.items()},
        "attributes": {name: sorted(vars(module)) for name, module in pair.named_modules()},
    }


class Failing(Noisy):
    """A pair whose model raises at the so-manieth call."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.left = calls

    def model(self, x: torch.Tensor) -> None:
        object.__setattr__(self, "left", self.left - 1)
        if self.left < 0:
            raise KeyError("a user's own mistake")
        super().model(x)


class Counted(Noisy):
    """A pair whose methods count their runs in buffers, in place and anew, in every mode."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.register_buffer("runs", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(()))

    def count(self, x: torch.Tensor) -> None:
        self.runs += 1
        self.mean = self.mean + x.mean()

    def model(self, x: torch.Tensor) -> None:
        self.count(x)
        super().model(x)

    def guide(self, x: torch.Tensor) -> None:
        self.count(x)
        super().guide(x)


class InPlace(Counted):
    """The same, in place only, so that its step can be compiled."""

    def count(self, x: torch.Tensor) -> None:
        self.runs += 1
        self.mean += x.mean()


class Outer:
    """No module itself, but its attribute is; or so is one in a list of its own."""

    def __init__(self, *pairs: Counted) -> None:
        self.pair, self.pairs = pairs[0] if len(pairs) == 1 else None, list(pairs)

    def model(self, x: torch.Tensor) -> None:
        (self.pair or self.pairs[0]).model(x)

    def guide(self, x: torch.Tensor) -> None:
        (self.pair or self.pairs[0]).guide(x)


class Programs:
    """A model and a guide."""

    def __init__(self, model: Callable[..., object], guide: Callable[..., object]) -> None:
        self.model, self.guide = model, guide


NAMED = Counted()


def named_model(x: torch.Tensor) -> None:
    relay("model", x)


def named_guide(x: torch.Tensor) -> None:
    relay("guide", x)


def relay(name: str, x: torch.Tensor) -> None:
    getattr(NAMED, name)(x)


def closed(pair: Counted) -> Programs:
    return Programs(lambda x: pair.model(x), lambda x: [pair.guide(x) for _ in range(1)])


def scaled(pair: Counted) -> Programs:
    return Programs(*(pyro.poutine.scale(program, scale=1.0) for program in (pair.model, pair.guide)))


def partial_of(pair: Counted) -> Programs:
    return Programs(*(functools.partial(getattr(type(pair), name), pair) for name in ("model", "guide")))


HOLDINGS: dict[str, Callable[[Counted], Any]] = {
    "methods": lambda pair: pair, "closures": closed, "an object": Outer, "a handler": scaled,
    "a list of an object": lambda pair: Outer(pair, Counted()), "partial functions": partial_of,
    "names of a file": lambda pair: Programs(named_model, named_guide),
}  # fmt: skip
Use = Callable[[Any, torch.Tensor], object]
MEASURES: dict[str, Use] = {
    "log_likelihood": lambda p, x: pv.log_likelihood(p.model, p.guide, x, num_samples=40, seed=1),
    "log_likelihood in chunks": lambda p, x: pv.log_likelihood(
        p.model, p.guide, x, num_samples=40, chunk_size=7, batch_size=5, seed=1, num_draws=3
    ),
    "log_likelihood, refined": lambda p, x: pv.log_likelihood(
        p.model, pv.refine(p.model, p.guide, x, steps=3, seed=1), x, num_samples=40, seed=1
    ),
    "log_likelihood, inflated": lambda p, x: pv.log_likelihood(
        p.model, pv.inflate(p.guide), x, num_samples=40, seed=1
    ),
    "ais_log_likelihood": lambda p, x: pv.ais_log_likelihood(
        p.model, x, num_chains=2, num_temperatures=5, seed=1, progress=False
    ),
    "bdmc": lambda p, x: pv.bdmc(p.model, 3, like=x, num_chains=2, num_temperatures=5, seed=1),
    "active_units": lambda p, x: pv.active_units(p.guide, x),
    "information": lambda p, x: pv.information(p.model, p.guide, x, seed=1),
    "posterior_gap": lambda p, x: pv.posterior_gap(p.model, p.guide, x, num_samples=64, refine_steps=2, seed=1),
    "gradient_snr": lambda p, x: pv.gradient_snr(
        pv.IWAE(2), p.model, p.guide, x, repetitions=10, seed=1
    ),
    "sample": lambda p, x: pv.sample(p.model, 5, like=x, seed=1),
}  # fmt: skip
REPLICAS = [Noisy(0.0), Noisy(0.0)]
TRAINING: dict[str, Use] = {
    "fit": lambda p, x: pv.fit(
        p.model, p.guide, x, objective=pv.IWAE(2), epochs=2, batch_size=5, validation=x, progress=False, device="cpu"
    ),
    "fit, annealed": lambda p, x: pv.fit(
        p.model, p.guide, x, objective=pv.ELBO(1), epochs=2, kl_warmup=2, clip_norm=1.0, progress=False, device="cpu"
    ),
    "fit_replicas": lambda p, x: pv.fit_replicas(
        REPLICAS, x, objective=pv.ELBO(1), epochs=2, batch_size=6, progress=False, device="cpu"
    ),
}  # fmt: skip


def watched(use: Use, pair: torch.nn.Module, programs: Any = None, *, frozen: bool) -> Callable[[], object]:
    """A call after which global state, the data and what it leaves of the pair are as they were, come what may."""
    pyro.set_rng_seed(3)
    pair.train()
    pair.encoder.eval()
    data, kept = BITS.clone(), BITS.clone()
    before, of_pair = state(), marks(pair)

    def call() -> object:
        try:
            return use(programs or pair, data)
        finally:
            after, pair_after = state(), marks(pair)
            changed = [key for key in before if before[key] != after[key]]
            changed += [key for key in of_pair if of_pair[key] != pair_after[key] and (frozen or key == "hooks")]
            if changed or not torch.equal(data, kept):
                raise RuntimeError(f"changed: {changed or 'the data'}")

    return call


def empty(folder: Path) -> bool:
    return not any(folder.rglob("*")) and not any(p for p in Path.home().iterdir() if p.name[0] == ".")


@fault("E", "measure", each=MEASURES)
def a_measurement_leaves_all_as_it_was(folder: Path, use: Use):
    yield watched(use, Noisy(), frozen=True)
    assert empty(folder)


@fault("A9", "measure", each={f"{name}, {held}": (use, held) for name, use in MEASURES.items() for held in HOLDINGS
                             if held in ("methods", "closures") or name in ("log_likelihood", "sample")})  # fmt: skip
def a_measurement_leaves_buffers_that_methods_move(folder: Path, case: tuple[Use, str]):
    pair = NAMED if case[1] == "names of a file" else Counted()
    yield watched(case[0], pair, HOLDINGS[case[1]](pair), frozen=True)


STEPS: dict[str, dict[str, Any]] = {
    "eager": {"compile": False}, "compiled": {"compile": True},
    "of particles": {"objective": pv.ELBO(2, gradient="dreg")},
    "by Pyro": {"objective": pyro.infer.Trace_ELBO()}, "validated": {"validation": BITS},
}  # fmt: skip


@fault("A9", "fit", each={f"{name}, {held}": (name, held) for name in STEPS for held in HOLDINGS
                         if held == "methods" or name in ("eager", "compiled")})  # fmt: skip
def buffers_that_methods_move_are_moved_by_steps_alone(folder: Path, case: tuple[str, str]):
    pair = NAMED if case[1] == "names of a file" else Counted()
    yield lambda: trained_on_halves(HOLDINGS[case[1]](pair), **STEPS[case[0]])
    assert pair.runs == 2 * 2 * 3
    assert torch.isclose(pair.mean, pair.runs / 2)


@fault("A9", "fit", each={held: held for held in HOLDINGS if held != "names of a file"})
def buffers_that_methods_move_in_place_are_moved_by_compiled_steps_alone(folder: Path, held: str):
    pair = InPlace()
    outcome = yield lambda: trained_on_halves(HOLDINGS[held](pair), compile=True)
    assert pair.runs == 2 * 2 * 3
    assert torch.isclose(pair.mean, pair.runs / 2)
    own = held in ("methods", "a handler", "partial functions")
    assert ("cannot compile" in outcome.message) is not own


def trained_on_halves(programs: Any, **options: Any) -> object:
    """Two epochs of three steps, on data of which each has the mean 1/2."""
    settings = {"objective": pv.ELBO(), "epochs": 2, "batch_size": 5, "progress": False, "device": "cpu"} | options
    halves = torch.stack([torch.eye(6)[:, torch.randperm(6)[:3]].sum(1) for _ in BITS])
    return pv.fit(programs.model, programs.guide, halves, **settings)


@fault("E", "fit", each=TRAINING)
def training_leaves_global_state_as_it_was(folder: Path, use: Use):
    yield watched(use, Noisy(0.0), frozen=False)
    assert empty(folder)


@fault("E", "measure", 1, "own mistake", each={f"{n}, call {i}": (u, i) for n, u in MEASURES.items() for i in (0, 1)
                                              if n != "active_units" and (n, i) != ("sample", 1)})  # fmt: skip
def a_program_that_raises_leaves_all_as_it_was(folder: Path, case: tuple[Use, int]):
    yield watched(case[0], Failing(case[1]), frozen=True)
    assert empty(folder)


@fault("E", "fit", 1, "own mistake", each={f"{n}, call {i}": (u, i) for n, u in TRAINING.items() for i in (0, 3)
                                           if n != "fit_replicas"})  # fmt: skip
def a_program_that_raises_in_training_leaves_global_state(folder: Path, case: tuple[Use, int]):
    yield watched(case[0], Failing(case[1]), frozen=False)
    assert empty(folder)


@fault("E", "list")
def listing_writes_nothing(folder: Path):
    yield ("list",)
    assert empty(folder)


@fault("E", "data.load", each={b: b for b in ("none", "dynamic", "static", "threshold")})
def reading_data_leaves_global_state_as_it_was(folder: Path, binarization: str):
    before = state()
    outcome = yield lambda: pv.data.load("digits", binarization=binarization, validation=0.1, seed=5)
    assert len(outcome.value.train) == 1293
    assert state() == before
    assert empty(folder)


@fault("E", "models", each={name: name for name in ("VAE", "HierarchicalVAE", "VQVAE", "RBM")})
def models_with_a_run_of_their_own_leave_the_generator_where_a_seed_is_given(folder: Path, name: str):
    made = {
        "VAE": lambda: pv.models.VAE((6,), latent_dim=2, hidden=(3,)),
        "HierarchicalVAE": lambda: pv.models.HierarchicalVAE((6,), latent_dims=(3, 2), hidden=((4,), (3,))),
        "VQVAE": lambda: pv.models.VQVAE((1, 4, 4), num_codes=5, code_dim=3, channels=8, num_downsamplings=1),
        "RBM": lambda: pv.models.RBM(6, 3),
    }  # fmt: skip
    pair = made[name]()
    before = state()
    x = BITS if name != "VQVAE" else BITS[:, :1].reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    outcome = yield lambda: pv.sample(pair.model, 4, seed=2, like=x)
    assert len(outcome.value) == 4
    assert state() == before


# --- nothing in a file is executed ---------------------------------------------------------------------------------


class Evil:
    """What writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch owned",)


def evil(kind: str) -> bytes:
    return pickle.dumps(Evil()) if kind == "pickle" else b"cos\nsystem\n(S'touch owned'\ntR."


def zipped(path: Path) -> None:
    torch.save({"epoch": 1, "best_epoch": None, "finished": True, "optimizer": {}, "rng": {"x": Evil()}}, path)


@fault("E", "evaluate", 4, each={f: f for f in ("last/state.pt", "last/weights.safetensors", "config.json")})
def a_pickle_in_a_run_is_not_executed(folder: Path, file: str):
    run = small_run(folder / "run")
    (run / "last" / "state.pt").unlink() if file == "config.json" else None
    (run / file).write_bytes(evil("pickle"))
    yield "train", "--resume", "--run-dir", run, "--device", "cpu"
    assert not list(folder.rglob("owned"))


@fault("E", "train --resume", 4)
def a_pickle_in_torchs_own_format_is_not_executed(folder: Path):
    run = small_run(folder / "run")
    zipped(run / "last" / "state.pt")
    yield "train", "--resume", "--run-dir", run, "--device", "cpu"
    assert not list(folder.rglob("owned"))


@fault("E", "evaluate --override", 4, each={"weights": "last/weights.safetensors", "config": "config.json"})
def a_pickle_is_not_executed_where_changes_are_overridden(folder: Path, file: str):
    run = small_run(folder / "run")
    (run / file).write_bytes(evil("pickle"))
    yield "evaluate", run, "--override", "--device", "cpu"
    assert not list(folder.rglob("owned"))


@fault("E", "train --override", 4, each={"a pickle": True, "torch's own format": False})
def a_pickled_state_is_not_executed_where_changes_are_overridden(folder: Path, bare: bool):
    run = small_run(folder / "run")
    zipped(run / "last" / "state.pt")
    if bare:
        (run / "last" / "state.pt").write_bytes(evil("pickle"))
    yield "train", "--resume", "--override", "--run-dir", run, "--device", "cpu"
    assert not list(folder.rglob("owned"))


@fault("E", "data.load", 3, each={"objects": "x", "labels": "y", "in the test part": "x_test"})
def an_archive_of_objects_is_not_unpickled(folder: Path, key: str):
    arrays: dict[str, Any] = {name: np.zeros((3, 4)) for name in ("x", "x_test")} | {"y": np.zeros(3, int)}
    arrays[key] = np.array([Evil(), Evil(), Evil()], object)
    np.savez(folder / "d.npz", **arrays)
    yield lambda: pv.data.load(f"npz:{folder / 'd.npz'}", labels=None)
    assert not list(folder.rglob("owned"))


@fault("E", "data.load", 3, each={"a pickle": "pickle", "its first protocol": "text"})
def a_pickle_under_the_name_of_an_archive_is_not_executed(folder: Path, kind: str):
    (folder / "d.npz").write_bytes(evil(kind))
    yield lambda: pv.data.load(f"npz:{folder / 'd.npz'}")
    assert not list(folder.rglob("owned"))


@fault("E", "data.load", 3, each={"data": "data_batch_1", "names": "batches.meta", "test": "test_batch"})
def a_batch_of_cifar_that_is_another_pickle_is_not_executed(folder: Path, victim: str):
    batches = folder / "cifar-10-batches-py"
    batches.mkdir()
    for name in ("batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        (batches / name).write_bytes(evil("pickle") if name == victim else pickle.dumps({b"data": []}))
    yield lambda: pv.data.load("cifar10", folder, download=False)
    assert not list(folder.rglob("owned"))


@fault("E", "data.load", 3, each={"mat": "chardata.mat", "png": "a.png", "amat": "binarized_mnist_train.amat",
                                 "idx": "MNIST/raw/train-images-idx3-ubyte"})  # fmt: skip
def a_pickle_under_the_name_of_a_data_file_is_not_executed(folder: Path, file: str):
    names = {".mat": "omniglot28", ".png": f"folder:{folder}", ".amat": "binarized_mnist", "": "mnist"}
    for part in ("train", "valid", "test"):
        (folder / f"binarized_mnist_{part}.amat").write_text("0 1\n")
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        path = folder / "MNIST" / "raw" / f"{part}-ubyte"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (folder / file).write_bytes(evil("pickle"))
    yield lambda: pv.data.load(names[Path(file).suffix], folder, download=False)
    assert not list(folder.rglob("owned"))


# --- signals and disks ---------------------------------------------------------------------------------------------


def at_change(number: int, do: Callable[[], object], ending: str = "") -> None:
    """Do something just before the so-manieth time that this process changes a file of that name."""
    left = iter(range(number))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("os.mkdir", "os.rename") and ending in str(arguments[0]) and next(left, None) is None:
            left_of_it, done[0] = done[0], True
            if not left_of_it:
                do()

    done = [False]
    sys.addaudithook(hook)


TRAIN = (
    "train", "--resume", "--device", "cpu", "--epochs", "3", "--samples", "20", "--latent-dim", "3", "--set",
    "hidden=[16]", "--batch-size", "400",
)  # fmt: skip


def undisturbed(run: Path, samples: bool = True) -> None:
    """Go on with a run, and find what one without a disturbance finds."""
    assert command(*TRAIN, "--run-dir", run).code == 0
    once(str(TRAIN), run.parent / "whole", lambda: command(*TRAIN, "--run-dir", run.parent / "whole"))
    for name in ("metrics.jsonl", "results.json"):
        mine, theirs = ((r / name).read_text() for r in (run, run.parent / "whole"))
        if name == "results.json":
            found = [json.loads(text) for text in (mine, theirs)]
            assert found[0]["nll"] == found[1]["nll"]
        else:
            bounds = [[json.loads(line)["bound"] for line in text.splitlines()] for text in (mine, theirs)]
            assert bounds[0] == bounds[1]
    weights = [(r / "last" / "weights.safetensors").read_bytes() for r in (run, run.parent / "whole")]
    assert weights[0] == weights[1]


@fault("E", "train", 130, "interrupted", each={f"change {i}": i for i in (0, 2, 5, 9, 14)})
def an_interrupted_run_goes_on_to_the_same_bits(folder: Path, change: int):
    run = folder / "run"
    at_change(change, lambda: os.kill(os.getpid(), signal.SIGINT), str(run))
    yield *TRAIN, "--run-dir", run
    undisturbed(run)


@fault("E", "train", 143, each={f"change {i}": i for i in (0, 2, 5, 9, 14)})
def a_terminated_run_goes_on_to_the_same_bits(folder: Path, change: int):
    run = folder / "run"
    at_change(change, lambda: os.kill(os.getpid(), signal.SIGTERM), str(run))
    yield *TRAIN, "--run-dir", run
    undisturbed(run)


def full(size: int) -> None:
    """From now on no file grows beyond so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@fault("E", "train", 6, each={f"{size} bytes": size for size in (0, 100, 3000, 9000)})
def a_full_disk_leaves_the_checkpoint_of_before(folder: Path, size: int):
    run = folder / "run"
    at_change(8, lambda: full(size), str(run))
    yield *TRAIN, "--run-dir", run
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    pv.load(run)
    undisturbed(run)


@fault("E", "fit", 6, each={"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EDQUOT": errno.EDQUOT})
def a_disk_that_fails_while_it_is_synchronised_leaves_the_checkpoint_of_before(folder: Path, kind: int):
    pair, wanted = Noisy(), {"objective": pv.ELBO(1), "batch_size": 6, "run_dir": folder / "run", "progress": False}
    pv.fit(pair.model, pair.guide, BITS, epochs=1, **wanted)
    kept = {name: value.clone() for name, value in pair.state_dict().items()}

    def failing(descriptor: int) -> None:
        raise OSError(kind, os.strerror(kind))

    from pyrovae.runs import Run

    def save() -> None:
        os.fsync = failing
        Run(folder / "run").save("last", Noisy().state_dict(), Run(folder / "run").state())

    yield save
    for name, value in Run(folder / "run").weights().items():
        assert torch.equal(value, kept[name])
