"""What a Pyro program is made of: its modules, its randomness, its buffers, its parameters.

A program is any callable with Pyro primitives inside: a module, a bound method, a plain function that
closes over networks. These helpers find what such a callable reaches without asking it to register anything.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyro.poutine as poutine
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

Program = Callable[..., Any]


def roots(*programs: Program) -> list[nn.Module]:
    """The modules that the programs are, or are methods of, each once and in order.

    Partial functions are looked into: Pyro's handlers (``poutine.scale(model, ...)``) hold a program as an argument.
    """
    found: dict[nn.Module, None] = {}
    pending: list[Any] = list(programs)
    while pending:
        program = pending.pop(0)
        if isinstance(program, partial):
            pending = [program.func, *program.args, *program.keywords.values(), *pending]
        for candidate in (program, getattr(program, "__self__", None)):
            if isinstance(candidate, nn.Module):
                found[candidate] = None
    return list(found)


def device_of(*programs: Program) -> torch.device | None:
    """Where the first parameter of the programs' modules lives; None if they have none."""
    return next((p.device for module in roots(*programs) for p in module.parameters()), None)


@contextmanager
def isolated_rng(seed: int | None = None) -> Iterator[None]:
    """Leave every random generator as it was found; inside, start from ``seed`` if one is given."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            seed_everything(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def seed_everything(seed: int) -> None:
    """Seed torch (every device), numpy and Python, as Pyro programs may draw from any of them."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def replayed_rng(state: Tensor, cuda_states: list[Tensor]) -> Iterator[None]:
    """Draw again what was drawn from ``state`` on, then go on as if nothing had been drawn."""
    now, cuda_now = rng_state()
    _set_rng_state(state, cuda_states)
    try:
        yield
    finally:
        _set_rng_state(now, cuda_now)


def rng_state() -> tuple[Tensor, list[Tensor]]:
    """The states of torch's generators: the CPU's, and those of CUDA where it is in use."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _set_rng_state(state: Tensor, cuda_states: list[Tensor]) -> None:
    torch.set_rng_state(state)
    if cuda_states:
        torch.cuda.set_rng_state_all(cuda_states)


@contextmanager
def _on_forward(hook: Callable[[nn.Module], None]) -> Iterator[None]:
    handle = register_module_forward_pre_hook(lambda module, _: hook(module))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def protected_buffers() -> Iterator[None]:
    """Let every module that runs inside work on copies of its buffers (BatchNorm's averages stay as they were)."""
    originals: dict[nn.Module, dict[str, Tensor | None]] = {}

    def lend_copies(module: nn.Module) -> None:
        if module._buffers and module not in originals:
            originals[module] = dict(module._buffers)
            module._buffers.update({k: None if b is None else b.clone() for k, b in module._buffers.items()})

    with _on_forward(lend_copies):
        try:
            yield
        finally:
            for module, buffers in originals.items():
                module._buffers.update(buffers)


@contextmanager
def reached_modules(*programs: Program) -> Iterator[dict[nn.Module, None]]:
    """Collect, while the programs run inside, every module that they are, belong to or call."""
    found: dict[nn.Module, None] = dict.fromkeys(roots(*programs))
    with _on_forward(lambda module: found.setdefault(module)):
        yield found


@contextmanager
def eval_mode(modules: Iterable[nn.Module], *, training: bool = False) -> Iterator[None]:
    """Run the modules, and all below them, in eval mode (or train mode); restore each one's own mode afterwards."""
    modes = {child: child.training for module in modules for child in module.modules()}
    with ExitStack() as stack:
        for module, mode in modes.items():
            stack.callback(setattr, module, "training", mode)
            module.training = training
        yield


@contextmanager
def evaluating(*programs: Program) -> Iterator[None]:
    """Run the programs in eval mode, with every module that they are, belong to or come to call; restore the modes."""
    modes: dict[nn.Module, bool] = {}

    def enter(module: nn.Module) -> None:
        if module not in modes:
            for child in module.modules():
                modes.setdefault(child, child.training)
                child.training = False

    for root in roots(*programs):
        enter(root)
    with _on_forward(enter):
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def graph_leaves(root: Tensor) -> list[Tensor]:
    """The leaf tensors that require grad and that ``root`` depends on, in the graph's order."""
    found: dict[int, Tensor] = {}
    seen, stack = set(), [root.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found.setdefault(id(variable), variable)
        stack.extend(parent for parent, _ in reversed(node.next_functions))
    return list(found.values())


def depends_on(root: Tensor, nodes: set[Any]) -> bool:
    """Whether the graph of ``root`` passes through one of the autograd ``nodes``."""
    seen: set[Any] = set()
    stack = [root.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if node in nodes:
            return True
        seen.add(node)
        stack.extend(parent for parent, _ in node.next_functions)
    return False


@dataclass
class Reach:
    """What a pair of programs reaches: its modules, its parameters, and tensors that belong to no module, by name."""

    modules: list[nn.Module]
    parameters: dict[str, Tensor]
    loose: dict[str, Tensor]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold, as it is now: a module may have put other tensors in its buffers' place."""
        return _module_state(self.modules) | self.loose

    def to(self, device: torch.device) -> None:
        """Move everything, in place."""
        for module in self.modules:
            module.to(device)
        for tensor in self.loose.values():
            tensor.data = tensor.data.to(device)


def reach(model: Program, guide: Program, log_prob: Callable[[], Tensor]) -> Reach:
    """Find the parameters of a pair, wherever they live, while ``log_prob`` runs it once.

    In this order, each tensor once: those of the modules that the programs are, belong to or call; those of Pyro's
    parameter store; leaves that the programs close over.
    """
    with protected_buffers(), reached_modules(model, guide) as found, poutine.trace(param_only=True) as store:
        leaves = graph_leaves(log_prob())
    below = {child for module in found for child in module.modules() if child is not module}
    modules = [module for module in found if module not in below]
    tensors = _module_state(modules)
    known = {id(tensor) for tensor in tensors.values()}
    loose = {}
    stored = {f"param.{name}": site["value"].unconstrained() for name, site in store.trace.nodes.items()}  # type: ignore[union-attr]
    for name, tensor in (stored | {f"leaf.{i}": leaf for i, leaf in enumerate(leaves)}).items():
        if id(tensor) not in known:
            known.add(id(tensor))
            loose[name] = tensor
    tensors |= loose
    unique = {id(tensor): name for name, tensor in reversed(tensors.items()) if tensor.requires_grad}
    parameters = {name: tensors[name] for name in reversed(unique.values())}
    return Reach(modules, parameters, loose)


def _module_state(modules: list[nn.Module]) -> dict[str, Tensor]:
    prefixes = [""] if len(modules) == 1 else [f"{i}." for i in range(len(modules))]
    return {
        prefix + name: tensor
        for prefix, module in zip(prefixes, modules, strict=True)
        for name, tensor in module.state_dict(keep_vars=True).items()
    }
