"""An optimizer's update without the Python around it, which costs a small network as much as the update itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim import optimizer as registered

SLICE = 8192  # numbers, which a block goes through in four turns
NONE: dict[str, Any] = {}
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class Update:
    """What ``optimizer.step()`` does, to the same bits: for fused Adam on a CPU, one call of its kernel for each group.

    Options and state are read anew where the optimizer has them, so that schedules, checkpoints and whoever looks or
    changes anything find the optimizer's own. Whatever else happens in its ``step`` (hooks, a first state) it does.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.counts = optimizer, [Counts() for _ in optimizer.param_groups]

    def __call__(self) -> None:
        """Move the parameters that have gradients."""
        groups, state = self.optimizer.param_groups, self.optimizer.state
        moved = [[p for p in group["params"] if p.grad is not None] for group in groups]
        known = [[state.get(p, NONE) for p in own] for own in moved]
        if not self.plain or not all(map(is_plain, groups, moved, known)):
            self.optimizer.step()
            return
        self.counts += [Counts() for _ in groups[len(self.counts) :]]
        with torch.no_grad():
            for group, own, entries, count in zip(groups, moved, known, self.counts, strict=False):
                if own:
                    step_of(group, own, entries, count(entries))

    def in_slices(self, withheld: Tensor) -> bool:
        """Move the parameters on a device, to the same bits but sooner, unless withheld; False where step must do it.

        torch gives a tensor one block for 65,536 numbers, which leaves most of a card idle. There are many slices to a
        tensor, so this is for recordings.
        """
        groups = self.optimizer.param_groups
        moved = [[p for p in group["params"] if p.grad is not None] for group in groups]
        known = [[self.optimizer.state.get(p, NONE) for p in own] for own in moved]
        if not self.plain or not all(map(is_sliceable, groups, moved, known)):
            return False
        with torch.no_grad():
            for group, own, entries in zip(groups, moved, known, strict=True):
                if own:
                    counts = [state["step"] for state in entries]
                    torch._foreach_add_(counts, 1)
                    step_of(group, own, entries, counts, withheld)
                    torch._foreach_sub_(counts, [withheld] * len(counts))
        return True

    @property
    def plain(self) -> bool:
        """Whether the optimizer is Adam as torch made it, and nothing is to happen before or after its steps."""
        return type(self.optimizer) in (Adam, AdamW) and self.alone

    @property
    def alone(self) -> bool:
        """Whether nothing is to happen before or after the optimizer's steps."""
        optimizer = self.optimizer
        return (
            "step" not in vars(optimizer)  # schedulers of torch put their own there
            and not (optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)
            and not (registered._global_optimizer_pre_hooks or registered._global_optimizer_post_hooks)
        )


def is_plain(group: dict[str, Any], moved: Sequence[Tensor], known: Sequence[dict[str, Any]]) -> bool:
    """Whether one call of the kernel moves a group: all on the CPU and of one kind, with a state already."""
    if not all(known) or not group["fused"] or group["capturable"] or group["differentiable"]:
        return False
    if any(isinstance(beta, Tensor) for beta in group["betas"]):
        return False
    gradients = [p.grad for p in moved if p.grad is not None]
    tensors = (*moved, *gradients, *(entries["exp_avg"] for entries in known))
    dense = all(g.is_cpu and g.layout is torch.strided for g in gradients)
    return dense and len({t.dtype for t in tensors}) <= 1


def is_sliceable(group: dict[str, Any], moved: Sequence[Tensor], known: Sequence[dict[str, Any]]) -> bool:
    """Whether calls of the kernel on slices move a group on a device, with a state already."""
    if not all(known) or not group["fused"] or group["differentiable"] or isinstance(group["betas"][0], Tensor):
        return False
    kept: list[Any] = [t for p, own in zip(moved, known, strict=True) for t in (p, p.grad, *own.values())]
    on_device = all(isinstance(t, Tensor) and t.is_cuda and t.is_contiguous() for t in kept)
    return on_device and not moved[0].is_complex() and len({t.dtype for t in kept if t.dim()}) == 1


def slices(tensor: Tensor) -> Sequence[Tensor]:
    """A contiguous tensor in parts; what lies otherwise is one."""
    return tensor.view(-1).split(SLICE) if tensor.is_contiguous() else (tensor,)


def step_of(
    group: dict[str, Any],
    moved: list[Tensor],
    known: Sequence[dict[str, Any]],
    steps: list[Tensor],
    withheld: Tensor | None = None,
) -> None:
    """Move the parameters of a group by fused Adam, its steps being counted already.

    :param withheld: on a device, 1 where they are to stay, and they go in slices.
    """
    kernel: Any = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    names = MOMENTS if group["amsgrad"] else MOMENTS[:2]
    lists: list[Sequence[Any]] = [
        moved,
        [p.grad for p in moved],
        *([entries[name] for entries in known] for name in names),
    ]
    if withheld is not None:
        steps = [step for p, step in zip(moved, steps, strict=True) for _ in slices(p)]
        lists = [[part for tensor in own for part in slices(tensor)] for own in lists]
    lists += [[]] * (5 - len(lists))
    beta1, beta2 = group["betas"]
    kernel(
        *lists, steps, lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"],
        eps=group["eps"], amsgrad=group["amsgrad"], maximize=group["maximize"], found_inf=withheld,
    )  # fmt: skip


class Counts:
    """Counts the steps of a group's parameters at once: as views of one tensor, where torch adds to one by one."""

    def __init__(self) -> None:
        self.all, self.views = torch.empty(0), list[Tensor]()

    def __call__(self, known: Sequence[dict[str, Any]]) -> list[Tensor]:
        """Add one to each parameter's "step"; gives them."""
        if [id(entries["step"]) for entries in known] != [id(view) for view in self.views]:
            self.all = torch.stack([entries["step"] for entries in known])
            self.views = list(self.all.unbind())
            for entries, view in zip(known, self.views, strict=True):
                entries["step"] = view
        self.all += 1
        return self.views
