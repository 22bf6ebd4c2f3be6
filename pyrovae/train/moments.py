"""What an optimizer remembers, as a checkpoint brings it back: looked at before compiled kernels read it unasked."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyrovae.compile.recording import settle


def load_moments(optimizer: Optimizer, packed: dict[str, Any]) -> None:
    """Put a saved state into an optimizer whose step would have made it.

    :raises ValueError: for options of other kinds, and where a parameter's entries, their shapes or dtypes are not
        those that one step leaves behind.
    """
    groups, saved = optimizer.state_dict()["param_groups"], packed["param_groups"]
    if [len(own["params"]) for own in groups] != [len(then["params"]) for then in saved]:
        raise ValueError("its groups of parameters are not the optimizer's")
    for own, then in zip(groups, saved, strict=True):
        if strange := [name for name in own.keys() & then.keys() if not alike(own[name], then[name])]:
            raise ValueError(f"the optimizer's {strange[0]} cannot be {str(then[strange[0]])[:50]}")
    saved = [{**own, **then} for own, then in zip(groups, saved, strict=True)]  # other releases have other options
    for i, expected in enumerate(after_one_step(optimizer, saved)):
        found = packed["state"].get(i)
        if found and not expected.items() <= kinds(found).items():
            raise ValueError(f"what the optimizer is to know of parameter {i} is of other entries, shapes or dtypes")
    optimizer.load_state_dict({"state": packed["state"], "param_groups": saved})


def alike(own: Any, then: Any) -> bool:
    """Whether an option may be what was saved: numbers that are finite, switches, sequences of as many."""
    if isinstance(own, Tensor | float | int) and not isinstance(own, bool):
        value = then.item() if isinstance(then, Tensor) and then.numel() == 1 else then
        return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)
    if isinstance(own, list | tuple):
        return isinstance(then, list | tuple) and len(own) == len(then) and all(map(alike, own, then))
    return own is None or then is None or type(own) is type(then)


def after_one_step(optimizer: Optimizer, groups: list[dict[str, Any]]) -> list[dict[str, object]]:
    """What the optimizer, with saved options, would know of each parameter after a step, by kind.

    Nothing where a step on gradients of zero cannot be tried; no compiled kernel meets the state there.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        twin = copy.deepcopy(optimizer)
        twin.load_state_dict({"state": {}, "param_groups": groups})
        settle(twin)
        parameters = [p for group in twin.param_groups for p in group["params"]]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        type(twin).step(twin)
    except Exception:  # it needs a closure, or sparse gradients
        return [{}] * len(parameters)
    return [kinds(twin.state[parameter]) for parameter in parameters]


def kinds(entries: dict[str, Any]) -> dict[str, object]:
    """Shapes and dtypes of tensors, and the types of what else an optimizer notes of a parameter, by name."""
    return {k: (tuple(v.shape), v.dtype) if isinstance(v, Tensor) else type(v) for k, v in entries.items()}
