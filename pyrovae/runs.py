"""The run directory: config, checkpoints, metrics, resume. Nothing in it is code, and every write is atomic."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyrovae.arguments import one_line
from pyrovae.engine.randomness import isolated_rng
from pyrovae.errors import CheckpointError
from pyrovae.files import replacing

CONFIG, METRICS, RESULTS = "config.json", "metrics.jsonl", "results.json"
WEIGHTS, STATE = "weights.safetensors", "state.pt"  # of a checkpoint


class LateState(TypedDict, total=False):
    """What a checkpoint says of tensors that the first batch does not reach; those of before said nothing."""

    order: list[str]  # of the optimizer's parameters, by name
    late: list[str]  # the names of the tensors
    examples: list[tuple[int, tuple[Any, ...]]]  # seeds and batches that reach them


class State(LateState):
    """The training loop's state at a checkpoint."""

    epoch: int
    best_epoch: int | None
    finished: bool
    optimizer: dict[str, Any]
    rng: dict[str, Any]


def write_text(path: Path, text: str) -> None:
    """Replace a file whole."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """Write ``content`` as strict JSON: what is not finite becomes null."""
    write_text(path, json.dumps(as_json(content), indent=2, allow_nan=False) + "\n")


def as_json(content: object) -> Any:
    """``content`` as it reads back from JSON: numbers that are not finite become null, tuples and tensors lists.

    What JSON cannot hold becomes its name.
    """
    if isinstance(content, Mapping):
        return {str(key): as_json(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [as_json(value) for value in content]
    if isinstance(content, Tensor | np.ndarray | np.generic):
        return as_json(content.tolist())
    if isinstance(content, float):
        return float(content) if math.isfinite(content) else None
    if content is None or isinstance(content, str | int):
        return content
    if isinstance(content, os.PathLike):
        return str(content)
    return getattr(content, "__qualname__", type(content).__name__)


class Run:
    """One run directory, ``runs/NAME``.

    >>> import tempfile
    >>> run = Run(Path(tempfile.mkdtemp()) / "first")
    >>> run.start({"seed": 0})
    >>> run.log({"epoch": 1, "bound": -90.0})
    >>> run.history()
    [{'epoch': 1, 'bound': -90.0}]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def exists(self) -> bool:
        """Whether a run was started here."""
        return (self.path / CONFIG).is_file()

    def start(self, config: Mapping[str, object]) -> None:
        """Begin a run: make the folder, write its config, drop what an attempt without a checkpoint left."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / METRICS).unlink(missing_ok=True)
        write_json(self.path / CONFIG, config)

    def config(self) -> dict[str, Any]:
        """What the run was made of, its classes by their paths of today; or a CheckpointError.

        By name: model and objective (class and arguments, or None), versions, training, settings and data, or more.
        """
        try:
            config = json.loads((self.path / CONFIG).read_text(encoding="utf-8"))
            if not isinstance(config, dict):
                raise ValueError(f"it holds a {type(config).__name__}")
            for described in (config.get("model"), config.get("objective")):
                if isinstance(described, dict) and "class" in described:
                    described["class"] = public_path(str(described["class"]))
            return config
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f'"{self.path}" holds no run: {CONFIG} is absent or unreadable ({reason(error)}); pass the folder that '
                "pyrovae train or pyrovae.fit(run_dir=...) wrote"
            ) from error

    def log(self, metrics: Mapping[str, object]) -> None:
        """Append one epoch's metrics, and wait until they are on disk: no checkpoint may be ahead of them."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(as_json(metrics), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def results(self) -> dict[str, Any]:
        """What was measured last, or nothing."""
        path = self.path / RESULTS
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def history(self) -> list[dict[str, Any]]:
        """The metrics of every epoch; a last line cut short by a crash is left out."""
        path = self.path / METRICS
        rows = []
        with suppress(json.JSONDecodeError):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
                rows.append(json.loads(line))
        return list(itertools.takewhile(lambda row: isinstance(row, dict), rows))

    def rewind(self, epoch: int) -> list[dict[str, Any]]:
        """Forget the metrics of epochs after ``epoch``, which a resumed run will log again."""
        rows = self.history()[:epoch]
        if [row.get("epoch") for row in rows] != list(range(1, epoch + 1)):
            raise CheckpointError(
                f'"{self.path / METRICS}" is damaged: its epochs do not run from 1 to {epoch}, where the '
                "last checkpoint is; restore it, or train again"
            )
        write_text(self.path / METRICS, "".join(json.dumps(row) + "\n" for row in rows))
        return rows

    def save(self, name: str, weights: Mapping[str, Tensor], state: Mapping[str, object] | None = None) -> None:
        """Write the checkpoint ``name`` ("last" or "best") aside, then swap it in."""
        new, old = self.path / f"{name}.new", self.path / f"{name}.old"
        if old.exists() and not (self.path / name).exists():  # a crash came between two renames: the old one counts
            old.replace(self.path / name)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in weights.items()}, new / WEIGHTS)
        if state is not None:
            torch.save(dict(state), new / STATE)
        for path in new.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(old, ignore_errors=True)
        if (self.path / name).exists():
            (self.path / name).replace(old)
        new.replace(self.path / name)
        shutil.rmtree(old, ignore_errors=True)

    def checkpoint(self, name: str = "last") -> Path | None:
        """The folder of a complete checkpoint, or None. A crash between two renames leaves it under the old name."""
        places = self.path / name, self.path / f"{name}.old"
        return next((place for place in places if (place / WEIGHTS).is_file()), None)

    def weights(self, name: str = "last") -> dict[str, Tensor]:
        """The tensors of a checkpoint."""
        if (folder := self.checkpoint(name)) is None:
            raise CheckpointError(
                f'"{self.path}" has no checkpoint "{name}": train at least one epoch, or pass another run'
            )
        try:
            return load_file(folder / WEIGHTS)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f'"{folder / WEIGHTS}" is damaged ({reason(error)}): restore it, or train again'
            ) from error

    def state(self) -> State | None:
        """The loop's state at the last checkpoint, or None before the first."""
        if (folder := self.checkpoint()) is None:
            return None
        try:
            state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
            if not (isinstance(state, dict) and State.__required_keys__ <= state.keys()):
                raise ValueError("it is no state of a run")
            return cast(State, state)
        except Exception as error:
            raise CheckpointError(
                f'"{folder / STATE}" is damaged ({reason(error)}): restore it, or train again'
            ) from error


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    packages = {name: version(name) for name in ("torch", "pyro-ppl", "numpy")}
    from pyrovae import __version__

    return {"pyrovae": __version__, "python": platform.python_version(), **packages}


def class_path(cls: type) -> str:
    """Where a class is found, ``module:Class``; one of ours in the package that exports it."""
    return public_path(f"{cls.__module__}:{cls.__qualname__}")


def public_path(path: str) -> str:
    """The path of a class without the file of ours that it is written in, which may change.

    >>> public_path("pyrovae.models.vae:VAE"), public_path("my_models.vae:MyVAE")
    ('pyrovae.models:VAE', 'my_models.vae:MyVAE')
    """
    return re.sub(r"^(pyrovae\.(?:models|objectives))\.[\w.]+:", r"\1:", path)


def describe(owner: object) -> dict[str, object] | None:
    """How to build a model object again: its class and its arguments, or None if it does not say (no ``.config``)."""
    arguments = getattr(owner, "config", None)
    if owner is None or not isinstance(arguments, dict):
        return None
    return {"class": class_path(type(owner)), "arguments": arguments}


def find_class(path: str, *, outside: Path | None = None) -> type:
    """The model class at ``module:Class``; a ValueError where there is none, or it is no ``nn.Module``.

    With ``outside`` nothing that lies in that folder is imported.
    """
    module, _, name = path.partition(":")
    if outside is not None and lies_in(outside, module):
        raise ValueError(f'the class "{path}" lies in the run itself, whose code is never executed: move it elsewhere')
    try:
        cls: object = importlib.import_module(module)
    except (ImportError, TypeError, ValueError) as error:
        raise ValueError(f'cannot import "{module}" for the model "{path}" ({error}): run where it can be') from error
    for part in name.split("."):
        cls = getattr(cls, part, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(f'"{path}" is no model class: name an nn.Module with .model and .guide as module:Class')
    return cls


def lies_in(folder: Path, module: str) -> bool:
    """Whether a part of a dotted module path would be read from the folder; nothing in the folder is executed."""
    folder, parts = folder.resolve(), module.split(".")
    for i in range(len(parts)):
        try:
            spec = importlib.util.find_spec(".".join(parts[: i + 1]))  # imports the parts before it
        except (ImportError, ValueError):
            return False
        if spec is None:
            return False
        places = [spec.origin] if spec.has_location and spec.origin else []
        places += spec.submodule_search_locations or ()
        if any(Path(place).resolve().is_relative_to(folder) for place in places):
            return True
    return False


def load(run_dir: str | os.PathLike[str], *, pair: nn.Module | None = None, checkpoint: str = "last") -> nn.Module:
    """Build the model of a run again, with its weights, in eval mode.

    No code in the run is executed: the config is JSON, the weights are safetensors, and the class is imported from the
    installed package (or your own module) and must be an ``nn.Module``.

    :param pair: an object to load the weights into, for a class that has no ``.config``.
    :param checkpoint: ``"last"`` or ``"best"``.
    :raises CheckpointError: if the folder holds no run, or its files are damaged or of another class.

    >>> load("runs/digits").guide  # doctest: +SKIP
    """
    run = Run(run_dir)
    described = run.config().get("model")
    if pair is None:
        if not (isinstance(described, dict) and described.keys() >= {"class", "arguments"}):
            raise ValueError(
                f'the run "{run.path}" was made of programs without a .config, which cannot be built again: '
                "build the pair yourself and pass pair="
            )
        with isolated_rng():
            pair = find_class(described["class"], outside=run.path)(**described["arguments"])
    elif described and as_json(describe(pair)) not in (None, described):
        raise CheckpointError(
            f'the run "{run.path}" holds {described}, the pair is {describe(pair)}: pass the same model'
        )
    restore(dict(pair.state_dict(keep_vars=True)), run.weights(checkpoint), where=str(run.path))
    return pair.eval()


def restore(targets: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, where: str) -> None:
    """Copy ``weights`` into the tensors of the same names; any difference in names or shapes is an error."""
    for name, tensor in targets.items():
        if is_lazy(tensor) and name in weights:
            tensor.materialize(weights[name].shape)  # type: ignore[operator]
    missing, extra = sorted(targets.keys() - weights.keys()), sorted(weights.keys() - targets.keys())
    shapes = [n for n in targets.keys() & weights.keys() if targets[n].shape != weights[n].shape]
    if missing or extra or shapes:
        raise CheckpointError(
            f'the weights of "{where}" are of another model: missing {shortened(missing)}, unknown {shortened(extra)}, '
            f"of other shape {shortened(sorted(shapes))}; pass the model they were saved from"
        )
    with torch.no_grad():
        for name, tensor in targets.items():
            tensor.copy_(weights[name])


def shortened(names: Sequence[str]) -> str:
    """The first names of some, for a message."""
    return ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])]) or "none"


def reason(error: BaseException) -> str:
    """What an error says in one line, or else its class."""
    return one_line(error) or type(error).__name__
