"""Optimizers as users give them; those that cannot take a step of a pair are refused by name before the first."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler

from pyrovae.arguments import in_range
from pyrovae.train.plan import MakeOptimizer

EXAMPLE = "pass, for instance, lambda parameters: torch.optim.SGD(parameters, lr=0.1)"


def optimizer_maker(make: MakeOptimizer | PyroOptim | None, lr: float | None) -> tuple[float | None, MakeOptimizer]:
    """The learning rate, where it is ours to know, and what makes the optimizer."""
    if make is None:
        rate = 1e-3 if lr is None else in_range("lr", lr, 0.0)
        return rate, lambda parameters: torch.optim.Adam(parameters, lr=rate, fused=True)
    if lr is not None:
        raise ValueError(f"lr={lr} belongs to the default optimizer: set it in optimizer=, or leave optimizer out")
    if isinstance(make, Optimizer) or not callable(make):
        raise TypeError(f"optimizer must be a function of the parameters, got {type(make).__name__}: {EXAMPLE}")
    if getattr(make, "__module__", "").startswith("pyro.optim.") and inspect.isfunction(make):
        raise TypeError(
            f'pyro.optim.{make.__name__} is called with its arguments: pass it as called, with {{"lr": 1e-3}}'
        )
    maker: MakeOptimizer = of_pyro(make) if isinstance(make, PyroOptim) else make

    def checked(parameters: Iterable[Tensor]) -> Optimizer:
        own = list(parameters)
        return check_optimizer(maker(own), own)

    return None, checked


def of_pyro(wrapped: PyroOptim) -> MakeOptimizer:
    """One of ``pyro.optim``, with one dict of arguments for all parameters, as the torch optimizer that it makes."""
    name = getattr(wrapped.pt_optim_constructor, "__name__", "optimizer")
    if isinstance(wrapped, PyroLRScheduler):
        raise TypeError(f"schedulers of pyro.optim count steps of their own, got one of {name}: pass schedule= instead")
    if wrapped.pt_clip_args:
        raise ValueError(f"clipping by pyro.optim is of each parameter apart, got {name}: pass clip_norm= instead")
    if not isinstance(arguments := wrapped.pt_optim_args, dict):
        raise TypeError(f"pyro.optim with arguments for each parameter is not known here, got {name}: {EXAMPLE}")
    constructor: Any = wrapped.pt_optim_constructor
    return lambda parameters: constructor(parameters, **arguments)


def check_optimizer(optimizer: object, parameters: Sequence[Tensor]) -> Optimizer:
    """An optimizer that moves parameters of a pair by one evaluation of its gradients, or one clear error."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        instead = "pass schedule= for it" if isinstance(optimizer, LRScheduler) else "pass torch.optim.Adam or its kin"
        raise TypeError(f"the optimizer must be one of torch.optim over the pair's parameters, got {name}: {instead}")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(f"{name} evaluates the loss several times a step, which is drawn anew each time: pass Adam")
    groups, own = optimizer.param_groups, set(map(id, parameters))
    if not any(id(p) in own for group in groups for p in group["params"]):
        raise ValueError(f"the optimizer {name} holds none of the pair's parameters: make it of those it is given")
    for rate in (float(group["lr"]) for group in groups):
        if not 0 <= rate < math.inf:
            raise ValueError(f"a learning rate must be a number in [0, inf), got {rate:g} in {name}: pass such")
    return optimizer


def check_sparse(optimizer: Optimizer, modules: Iterable[nn.Module]) -> None:
    """Refuse embeddings whose gradients are sparse where the optimizer takes dense ones, and the other way round."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    children = (child for module in modules for child in module.modules())
    weights = {id(child.weight) for child in children if isinstance(child, kinds) and child.sparse}
    held, name = [id(p) for group in optimizer.param_groups for p in group["params"]], type(optimizer).__name__
    sparse = [p for p in held if p in weights]
    if dense := isinstance(optimizer, SparseAdam) and len(held) - len(sparse):
        raise ValueError(f"{name} takes sparse gradients only, which {dense} parameters do not have: pass Adam")
    if sparse and not isinstance(optimizer, SGD | Adagrad | SparseAdam):
        raise ValueError(f"an embedding has sparse gradients, which {name} does not take: build it with sparse=False")
