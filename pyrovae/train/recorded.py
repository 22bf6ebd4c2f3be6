"""A step on CUDA as one graph: one launch a step, and nothing read back."""

from __future__ import annotations

import time
from collections.abc import Callable

import pyro.infer
import torch
from torch import Tensor

from pyrovae.compile.checked import signature, tensors
from pyrovae.compile.recording import Recording, capturable
from pyrovae.data.feed import Feed
from pyrovae.data.images import Images
from pyrovae.engine.programs import Batch
from pyrovae.train.step import Step


class Recorded:
    """A :class:`pyrovae.train.step.Step` recorded whole: gather, binarisation, loss, gradients, clipping, optimizer.

    Batches of another size, and what has no static gradients, take the step itself.

    :param images: the data, if they live on the device; a step then takes the index of its batch and gathers (and
        binarises) it within the graph.
    """

    def __init__(self, step: Step, images: Images | None = None) -> None:
        self.step, self.images, self.takes_index = step, images, images is not None
        self.whole = all(map(capturable, step.optimizers))
        self.recorded: dict[int, Recording] = {}
        self.recording_seconds = 0.0
        example = step.gradients.example
        if images is None:
            self.slots: Batch = tuple(a.clone() if isinstance(a, Tensor) else a for a in example)
        else:
            self.slots = (torch.arange(len(example[0]), device=images.x.device),)
        self.set_lr, self.metrics, self.finite = step.set_lr, step.metrics, step.finite

    @property
    def kind(self) -> str:
        """How it runs: as the step does, but "cuda graph" where that is compiled."""
        return "cuda graph" if self.step.kind == "compiled" else self.step.kind

    @property
    def compile_seconds(self) -> float:
        """What compiling and recording have taken so far."""
        return self.step.compile_seconds + self.recording_seconds

    def __call__(self, objective: pyro.infer.ELBO, batch: Batch) -> Tensor | float:
        """One step on a batch, or on the index of one where the data live on the device."""
        same = signature(batch) == signature(self.slots)
        gradients = self.step.gradients.static(objective) if same else None
        if gradients is None:
            return self.step(objective, gathered(self.images, batch))
        for slot, given in zip(tensors(self.slots), tensors(batch), strict=True):
            slot.copy_(given, non_blocking=True)
        if objective.num_particles not in self.recorded:
            self.recorded[objective.num_particles] = self.record(gradients)
        losses = self.recorded[objective.num_particles].replay()
        if not self.whole:
            self.step.update()
        return losses

    def record(self, gradients: Callable[[Batch], Tensor]) -> Recording:
        """The step on what the slots hold, without its optimizers where they read on the host."""

        def body() -> Tensor:
            self.step.clear()
            losses = gradients(gathered(self.images, self.slots))
            if self.whole:
                self.step.update()
            return losses

        began = time.perf_counter()
        recording = Recording(body, self.step.gradients.states, self.step.optimizers)
        self.recording_seconds += time.perf_counter() - began
        return recording


def gathered(images: Images | None, batch: Batch) -> Batch:
    """A batch of data from its index, where the data live on the device; else the batch as it is."""
    if images is None:
        return batch
    found = images.batch(batch[0])
    return found if isinstance(found, tuple) else (found,)


def on_device(step: Step, feed: Feed) -> Step | Recorded:
    """The step as a job takes it: recorded where there is a CUDA device, and gradients that are compiled."""
    return Recorded(step, feed.images) if feed.device.type == "cuda" and step.kind != "eager" else step
