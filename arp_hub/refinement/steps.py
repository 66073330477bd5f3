"""Optimiser steps of a refinement, each on a batch of unlabelled images that both models see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from ..calibration.images import Place
from ..calibration.resumption import block_chain
from ..layers.model import low_rank_layers
from ..processes import Processes
from .losses import BlockTargets, divergence

_SMALL = 64
"""Sides up to which images are shifted, as small data sets are augmented; larger ones are cropped and resized."""


@contextmanager
def learning(student: nn.Module, dense: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The parameters that a refinement changes; all others need no gradient during the block.

    They are the factors, and every vector: biases, norms and scales. Frozen ones stay as they are.
    """
    factors = {id(parameter) for layer in low_rank_layers(student).values() for parameter in layer.parameters()}
    every = [*student.parameters(), *dense.parameters()]
    needed = [parameter.requires_grad for parameter in every]
    chosen = [p for p in student.parameters() if p.requires_grad and (id(p) in factors or p.dim() <= 1)]
    for parameter in every:
        parameter.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    try:
        yield chosen
    finally:
        for parameter, before in zip(every, needed, strict=True):
            parameter.requires_grad_(before)
        for parameter in chosen:
            parameter.grad = None


@contextmanager
def not_checkpointing(model: nn.Module) -> Iterator[None]:
    """Keep all activations during the block: a block that is recomputed would be compared with its target twice."""
    flags = ("grad_checkpointing", "gradient_checkpointing")  # of timm, of transformers
    found = [(module, flag) for module in model.modules() for flag in flags if getattr(module, flag, None) is True]
    for module, flag in found:
        setattr(module, flag, False)
    try:
        yield
    finally:
        for module, flag in found:
            setattr(module, flag, True)


class Steps:
    """Optimiser steps on one set of parameters, the same in all processes.

    Args:
        student: The decomposed model, in evaluation mode.
        dense: The dense model, in evaluation mode.
        parameters: What is learnt.
        images: Images to learn from, ``(N, C, H, W)``.
        held_out: Images that only measure.
        batch_size: Images of a step, over all processes.
        seed: Seed of order and augmentation.
        processes: The processes that share each batch; they start from the parameters of the first one.

    Attributes:
        parameters: What is learnt.
        blocks: Names of consecutive blocks of both models; empty if there are none.
    """

    def __init__(
        self,
        student: nn.Module,
        dense: nn.Module,
        parameters: Sequence[nn.Parameter],
        images: Tensor,
        held_out: Tensor,
        batch_size: int,
        seed: int,
        processes: Processes,
    ) -> None:
        self.parameters = list(parameters)
        self._student, self._dense = student, dense
        self._images, self._held_out, self._seed = images, held_out, seed
        self._place = Place.of(dense, images)
        self.blocks = list(block_chain(dense, self._place.take(images[:1])))
        self._targets = BlockTargets(dense, student, self.blocks)
        self._processes = processes
        self._batch_size = -(-min(batch_size, len(images)) // processes.count) * processes.count
        self._augment = _augmentation((images.shape[-2], images.shape[-1]))
        if processes.count > 1:
            self.load(processes.of_first(lambda: self.vector().cpu()).to(self._place.device))

    def vector(self) -> Tensor:
        """A copy of all parameters as one vector."""
        return torch.cat([parameter.detach().flatten() for parameter in self.parameters])  # any memory format

    def load(self, vector: Tensor) -> None:
        """Copy a vector into the parameters."""
        parts = vector.split([parameter.numel() for parameter in self.parameters])
        with torch.no_grad():
            for parameter, part in zip(self.parameters, parts, strict=True):
                parameter.copy_(part.view_as(parameter))

    def optimizer(self) -> torch.optim.Adam:
        """A fresh optimiser of the parameters."""
        return torch.optim.Adam(self.parameters, lr=0.0)

    def step(self, optimizer: torch.optim.Optimizer, rate: float, number: int, by_blocks: bool) -> None:
        """One step.

        Args:
            optimizer: The optimiser.
            rate: Learning rate.
            number: Number of the step; it decides the images and their augmentation.
            by_blocks: Whether each block learns from its own error, or all parameters from that of the predictions.
        """
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        self._losses(self._batch(number), by_blocks, learn=True)
        self._average_gradients()
        optimizer.step()

    @property
    def held_out(self) -> int:
        """Number of held-out images."""
        return len(self._held_out)

    def hold_out(self, most: int) -> None:
        """Measure on at most so many of the held-out images from now on."""
        self._held_out = self._held_out[:most]

    def divergence(self, most: int | None = None) -> float:
        """The divergence of the predictions from the dense model's, on all held-out images or the first ones."""
        found = self._measure(False, most)
        return 0.0 if found < 0 else found  # rounding takes that of equal predictions below zero

    def loss(self, by_blocks: bool) -> float:
        """What steps minimise, on the held-out images."""
        return self._measure(by_blocks)

    @torch.no_grad()
    def _measure(self, by_blocks: bool, most: int | None = None) -> float:
        total = torch.zeros(2, dtype=torch.float64)
        for part in self._held_out[:most][self._processes.index :: self._processes.count].split(self._batch_size):
            if not len(part):  # fewer images than processes
                continue
            loss = self._losses(self._place.take(part), by_blocks, learn=False)
            total += torch.tensor([float(loss) * len(part), len(part)], dtype=torch.float64)
        self._processes.add([total])
        return float(total[0] / total[1])

    def _losses(self, images: Tensor, by_blocks: bool, learn: bool) -> Tensor:
        """The sum of all losses on some images; with ``learn`` they are propagated back."""
        total = torch.zeros((), device=images.device)

        def count(loss: Tensor) -> None:
            nonlocal total
            total = total + loss.detach()
            if learn and loss.requires_grad:
                loss.backward()

        with self._precision():
            with torch.no_grad(), self._targets.remembered() if by_blocks else nullcontext():
                exact = self._dense(images)
            with self._targets.compared(count) if by_blocks else nullcontext():
                found = self._student(images)
            count(divergence(self._dense, exact, found, len(images)))
        return total

    def _precision(self) -> torch.autocast:
        """Forward passes in bfloat16 on GPUs that compute in it."""
        device = self._place.device.type
        return torch.autocast(device, torch.bfloat16, enabled=device == "cuda" and torch.cuda.is_bf16_supported())

    def _batch(self, number: int) -> Tensor:
        """This process's share of the images of one step, augmented."""
        first, count = number * self._batch_size, len(self._images)
        order = torch.cat(
            [self._order(epoch) for epoch in range(first // count, (first + self._batch_size) // count + 1)]
        )
        chosen = order[first % count :][: self._batch_size].tolist()
        images = []
        with torch.random.fork_rng(devices=[]):
            for place in range(self._processes.index, self._batch_size, self._processes.count):
                # the same for any number of processes; torch.manual_seed would seed the GPU, too
                torch.random.default_generator.manual_seed((self._seed * 2**32 + first + place) % 2**63)
                images.append(self._augment(self._images[chosen[place]]))
        return self._place.take(torch.stack(images))

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed((self._seed * 2**32 + epoch) % 2**63)
        return torch.randperm(len(self._images), generator=generator)

    def _average_gradients(self) -> None:
        if self._processes.count == 1:
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        vector = torch.cat([gradient.flatten() for gradient in gradients])
        self._processes.add([vector])
        vector /= self._processes.count
        for parameter, part in zip(self.parameters, vector.split([p.numel() for p in self.parameters]), strict=True):
            parameter.grad = part.view_as(parameter)


def _augmentation(size: tuple[int, int]) -> v2.Transform:
    """Random crops and mirrored images, as timm augments small and large images. Teacher and student see the same."""
    if max(size) <= _SMALL:
        top, left = (min(max(1, side // 8), side - 1) for side in size)  # reflection needs a smaller one than the side
        crop: v2.Transform = v2.RandomCrop(size, padding=[left, top], padding_mode="reflect")
    else:
        shape = size[1] / size[0]  # crops keep the shape of the images, but for a third
        crop = v2.RandomResizedCrop(size, scale=(0.35, 1.0), ratio=(0.75 * shape, shape / 0.75), antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip()])
