"""What keeps a pair from steps whose loss or gradients are no numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from pyrovae.engine.updates import Update, slices
from pyrovae.errors import NumericalError

Place = tuple[dict[str, Tensor], str]


class Guard:
    """Withholds steps of one pair or several: parameters, what optimizers keep, and buffers then stay as they were.

    On a CPU a step is judged before its optimizer runs. On CUDA the verdict stays on the device, where the update
    follows it, and nothing waits for it; but for an optimizer's first step, and where it counts steps on the host.

    :param modules: of each pair; more may be added to a list.
    :param lasting: whether a pair that was withheld a step is withheld all that follow.
    :ivar withheld: 1 for each pair whose step is, ``[R]``.
    """

    def __init__(self, modules: Sequence[list[nn.Module]], device: torch.device, *, lasting: bool = False) -> None:
        self.withheld = torch.zeros(len(modules), device=device, dtype=torch.float32)
        self.one = torch.ones((), device=device, dtype=torch.float32)
        self.each, self.lasting, self.waits = self.withheld.unbind(), lasting, device.type != "cuda"
        self.shadows, self.begun = [Shadow(own) for own in modules], set[int]()

    def begin(self) -> None:
        """Before the forward pass of a step."""
        if not self.lasting:
            self.withheld.zero_()
        for shadow in self.shadows:
            shadow.keep()

    def judge(self, losses: Tensor, gradients: Sequence[Iterable[Tensor]]) -> None:
        """After the backward pass: losses become NaN where a step is withheld, and buffers are put back."""
        for r, (loss, own) in enumerate(zip(losses.unbind() if losses.dim() else (losses,), gradients, strict=True)):
            withheld, shadow = self.each[r], self.shadows[r]
            found = [loss, *own]
            if recording(withheld):
                found = [part for tensor in found for part in slices(tensor)]
            try:  # what GradScaler uses: one pass over all, which it multiplies by 1
                torch._amp_foreach_non_finite_check_and_unscale_(found, withheld, self.one)
            except RuntimeError:  # a gradient is complex or sparse, or expanded from fewer numbers
                reals = [numbers(t).clone() for t in found]
                torch._amp_foreach_non_finite_check_and_unscale_(reals, withheld, self.one)
            shadow.settle()
            if not self.waits:
                loss.masked_fill_(withheld > 0, math.nan)
                shadow.restore(withheld > 0)
            elif withheld.item():
                loss.fill_(math.nan)
                shadow.restore()

    def undo(self) -> None:
        """After a step that failed: put all buffers back."""
        for shadow in self.shadows:
            shadow.restore()

    def idle(self, r: int) -> bool:
        """Whether a pair's step is withheld, as far as one may ask."""
        return self.waits and bool(self.each[r].item())

    def move(self, r: int, update: Update) -> None:
        """Let the optimizer of a pair take its step, unless that is withheld."""
        withheld, optimizer = self.each[r], update.optimizer
        kept = [] if self.waits else kept_by(optimizer)
        if self.waits or id(optimizer) not in self.begun or any(t.device != withheld.device for t in kept):
            if not withheld.item():
                update()
                self.begun.add(id(optimizer))
        elif recording(withheld) and update.in_slices(withheld):
            pass
        elif getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = withheld  # type: ignore[attr-defined]
            optimizer.step()
            del optimizer.found_inf  # type: ignore[attr-defined]
        else:
            then = [t.clone() for t in kept]
            optimizer.step()
            for tensor, old in zip(kept, then, strict=True):
                torch.where(withheld > 0, old, tensor, out=tensor)


def recording(tensor: Tensor) -> bool:
    """Whether what a device does with a tensor becomes part of a graph, where the Python around it costs nothing."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def numbers(gradient: Tensor) -> Tensor:
    """A gradient's reals, stored densely."""
    dense = gradient._values() if gradient.is_sparse else gradient
    return torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense


@contextmanager
def last_good(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Refuse what makes a parameter infinite inside; after a :class:`NumericalError` it is as it was before."""
    then = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def lost() -> list[str]:
        return [name for name, old in then.items() if (old.isfinite() & ~parameters[name].isfinite()).any()]

    try:
        yield
        if names := lost():
            raise NumericalError(f'an update made parameter "{names[0]}" infinite, from a finite gradient: lower lr')
    except NumericalError:
        if lost():
            with torch.no_grad():
                for name, old in then.items():
                    parameters[name].copy_(old)
        raise


def kept_by(optimizer: Optimizer) -> list[Tensor]:
    """The tensors that a step of an optimizer changes: parameters, and what it keeps of them."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    state = chain.from_iterable(own.values() for own in optimizer.state.values())
    return [t.detach() for t in (*parameters, *state) if isinstance(t, Tensor)]


class Shadow:
    """The tensors of modules that a forward pass changes (averages, codebooks), as they were before it."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules, self.number, self.settled = modules, 0, True
        self.places: list[Place] = []
        self.live: list[Tensor] = []
        self.copies: list[Tensor] = []

    def keep(self) -> None:
        """Copy them."""
        if self.number != len(self.modules):
            self.number, self.settled, self.places = len(self.modules), False, places(self.modules)
        if not self.places:
            return
        live = [owner[name].detach() for owner, name in self.places]
        if [t.shape for t in live] == [t.shape for t in self.copies]:
            torch._foreach_copy_(self.copies, live)
        else:
            self.copies = [t.clone() for t in live]
        self.live = [owner[name] for owner, name in self.places]

    def settle(self) -> None:
        """After the first pass: frozen parameters that it left alone will be left alone, buffers may move later."""
        if not self.settled:
            held = list(zip(self.places, self.live, self.copies, strict=True))
            frozen = [isinstance(t, nn.Parameter) and o[n] is t and torch.equal(t, c) for (o, n), t, c in held]
            moving = [i for i, still in enumerate(frozen) if not still]
            self.places, self.live = [self.places[i] for i in moving], [self.live[i] for i in moving]
            self.copies = [self.copies[i] for i in moving]
            self.settled = True

    @torch.no_grad()
    def restore(self, where: Tensor | None = None) -> None:
        """Put them back; on a device ``where`` that is true."""
        for (owner, name), tensor, copy in zip(self.places, self.live, self.copies, strict=True):
            if where is None:
                owner[name] = tensor
                tensor.copy_(copy)
            else:
                now = owner[name].detach()
                torch.where(where, copy, now, out=now)


def places(modules: list[nn.Module]) -> list[Place]:
    """Where the tensors of modules are that no optimizer moves, each once."""
    found: dict[int, Place] = {}
    for module in chain.from_iterable(root.modules() for root in modules):
        for owner in (module._buffers, module._parameters):
            for name, tensor in owner.items():
                if tensor is not None and not is_lazy(tensor) and not tensor.requires_grad:
                    found.setdefault(id(tensor), (owner, name))  # type: ignore[arg-type]
    return list(found.values())
