"""A run's weights, back in a model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyrovae.arguments import one_of
from pyrovae.engine.probe import look
from pyrovae.engine.programs import Program
from pyrovae.engine.randomness import isolated_rng
from pyrovae.errors import CheckpointError, DataError
from pyrovae.runs.classes import describe, find_class
from pyrovae.runs.files import CHECKPOINTS, CONFIG, as_json, reason
from pyrovae.runs.run import Run

Place = str | os.PathLike[str]
Programs = tuple[Program, Program]


@overload
def load(
    run_dir: Place, *, pair: nn.Module | None = ..., checkpoint: str = ..., trust: bool = ..., override: bool = ...
) -> nn.Module: ...


@overload
def load(
    run_dir: Place, *, pair: Programs, data: object = ..., checkpoint: str = ..., override: bool = ...
) -> Programs: ...


def load(
    run_dir: Place,
    *,
    pair: nn.Module | Programs | None = None,
    data: object = None,
    checkpoint: str = "last",
    trust: bool = False,
    override: bool = False,
) -> nn.Module | Programs:
    """Build the model of a run again, with its weights, in eval mode.

    No code in the run is executed, and none is imported for it: the config is JSON, the weights are safetensors, and
    the class must be one of pyrovae's, unless you say otherwise. The files must hold what was saved, by SHA-256.

    :param pair: an object to load the weights into, or two programs ``(model, guide)`` as :func:`pyrovae.fit` took
        them, whatever they use: modules, ``pyro.param`` (the weights go into Pyro's parameter store), leaves.
    :param data: what two programs take, one batch or a tuple of arguments: they are run on it once, to find what they
        use. Where parameters are one for each datum, all data.
    :param checkpoint: ``"last"`` or ``"best"``.
    :param trust: import whatever class the config names, such as one of your own, and call it.
    :param override: go on, with a warning, where files were changed since they were written, are of another run or of
        a newer version, or weights are of another dtype, which is converted.
    :raises CheckpointError: if the folder holds no run, or its files are damaged, changed, or of another class.

    >>> load("runs/digits").guide  # doctest: +SKIP
    """
    run = Run.of(run_dir, override=override)
    one_of("checkpoint", checkpoint, CHECKPOINTS)
    described = run.config().get("model")
    if isinstance(pair, tuple):
        return load_programs(run, pair, data, checkpoint)
    if pair is None:
        if not (isinstance(described, dict) and described.keys() >= {"class", "arguments"}):
            raise ValueError(
                f'the run "{run.path}" was made of programs without a .config, which cannot be built again: '
                "build the pair yourself and pass pair=, of functions pair=(model, guide) with data="
            )
        with isolated_rng(), opening(run.path):
            module: nn.Module = find_class(described["class"], trust=trust)(**described["arguments"])
    else:
        module = pair
        if described and as_json(describe(pair)) not in (None, described):
            raise CheckpointError(
                f'the run "{run.path}" holds {described}, the pair is {describe(pair)}: pass the same model'
            )
    restore(dict(module.state_dict(keep_vars=True)), run.weights(checkpoint), run)
    return module.eval()


def load_programs(run: Run, pair: Programs, data: object, checkpoint: str) -> Programs:
    """Put the weights of a run into all that two programs reach on data, and what they reached only while training."""
    if data is None:
        raise ValueError("the tensors that programs use are found by a run of them: pass data=, a batch that they take")
    state = look(*pair, data if isinstance(data, tuple) else (data,), validate=False).state
    saved = run.state()
    for seed, batch in [] if saved is None else saved.get("examples", []):
        with isolated_rng(seed):
            found = look(*pair, batch, validate=False)
            state.add(found.state, found.leaves())
    restore(state.tensors, run.weights(checkpoint), run)
    for module in state.modules:
        module.eval()
    return pair


@contextmanager
def opening(run: Path) -> Iterator[None]:
    """Whatever cannot be made as a run's config says is the run's fault."""
    try:
        yield
    except (CheckpointError, DataError):
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f'the run "{run}" cannot be opened, its {CONFIG} asks for what there is not: {reason(error)}'
        ) from error


def restore(targets: Mapping[str, Tensor], weights: Mapping[str, Tensor], run: Run) -> None:
    """Copy a run's weights into the tensors of the same names; other names, shapes or dtypes are an error."""
    for name, tensor in targets.items():
        if is_lazy(tensor) and name in weights:
            tensor.materialize(weights[name].shape)  # type: ignore[operator]
    missing, extra = sorted(targets.keys() - weights.keys()), sorted(weights.keys() - targets.keys())
    shapes = [n for n in targets.keys() & weights.keys() if targets[n].shape != weights[n].shape]
    if missing or extra or shapes:
        raise CheckpointError(
            f'the weights of "{run.path}" are of another model: missing {shortened(missing)}, unknown '
            f"{shortened(extra)}, of other shape {shortened(sorted(shapes))}; pass the model they were saved from"
        )
    if cast := [name for name in sorted(targets) if targets[name].dtype != weights[name].dtype]:
        example = f"{cast[0]} is {weights[cast[0]].dtype}, the model's is {targets[cast[0]].dtype}"
        run.doubt(f'the weights of "{run.path}" are of another dtype ({example}): pass the model they were saved from')
    with torch.no_grad():
        for name, tensor in targets.items():
            tensor.copy_(weights[name])


def shortened(names: Sequence[str]) -> str:
    """The first names of some, for a message."""
    return ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])]) or "none"
