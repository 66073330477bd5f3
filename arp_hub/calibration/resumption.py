"""Forward passes that start in the middle of a network, from stored activations.

Most networks pass one tensor from block to block. `block_chain` finds such blocks: the input of each is the very output
of the one before. Once the layers of a block are fitted, its output is stored, and later passes start there. So each
layer can be fitted on inputs that all earlier layers disturb, for the cost of a few passes in all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..processes import ALONE, Processes
from .images import Images, Place, batches
from .moments import shared_batches

_STORED_BYTES = 2**30
"""Memory of stored activations, of both models. The larger maps of early blocks are computed in every pass."""


class Halt(Exception):  # not an error: it ends a forward pass early
    """Raised by a hook once a forward pass has given what it was run for."""


@torch.no_grad()
def block_chain(model: nn.Module, image: Tensor) -> dict[str, int]:
    """Consecutive modules, each of which takes the output of the one before.

    Further arguments, such as rotary embeddings, may come from elsewhere, but not from earlier modules of the chain.
    Every boundary is checked: the model gives the same output when it starts there.

    Args:
        model: The model, in evaluation mode.
        image: One image as the model takes it, ``(1, C, H, W)``.

    Returns:
        Bytes of each module's output for the image, by name. Empty if no chain holds half of the model's parameters.
    """
    called: dict[str, list[str]] = {}
    counts: Counter[str] = Counter()
    starts: dict[str, tuple[int, int]] = {}  # a tensor and its version, which every change in place counts up
    ends: dict[str, tuple[int, int]] = {}
    values: dict[str, Tensor] = {}
    kept: list[Tensor] = []  # so that no other tensor gets the id of one of them

    def enter(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            starts[name] = id(args[0]), args[0]._version
            kept.append(args[0])

    def leave(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        counts[name] += 1
        if name in starts and isinstance(output, Tensor):
            ends[name] = id(output), output._version
            kept.append(output)
            values[name] = output.clone()  # a module behind it may change it in place
            called.setdefault(name.rpartition(".")[0], []).append(name)

    hooks = []
    for name, module in model.named_modules():
        if name and not isinstance(module, nn.Identity):
            hooks.append(module.register_forward_pre_hook(partial(enter, name)))
            hooks.append(module.register_forward_hook(partial(leave, name)))
    try:
        exact = model(image)
    finally:
        for hook in hooks:
            hook.remove()

    def linked(names: Sequence[str]) -> Iterator[list[str]]:
        """Parts of the names in which each module takes the output of the one before."""
        part: list[str] = []
        for name in names:
            if part and starts[name] != ends[part[-1]]:
                yield part
                part = []
            part.append(name)
        if part:
            yield part

    def finest(name: str) -> list[str]:
        """The chain that a module itself consists of."""
        (inside, *others) = list(linked(called.get(name, []))) or [[]]
        if others or len(inside) < 2 or starts[inside[0]] != starts[name] or ends[inside[-1]] != ends[name]:
            return [name]
        return [inner for one in inside for inner in finest(one)]

    def parameters(names: Sequence[str]) -> int:
        return sum(p.numel() for name in names for p in model.get_submodule(name).parameters())

    parts = [part for names in called.values() for part in linked([name for name in names if counts[name] == 1])]
    longest = max(parts, key=parameters, default=[])
    chain = [inner for name in longest for inner in finest(name)]
    if len(chain) < 2 or not isinstance(exact, Tensor):
        return {}
    if 2 * parameters(longest) < sum(p.numel() for p in model.parameters()):
        return {}
    modules = [model.get_submodule(name) for name in chain]
    # What a block leaves on a module for later ones is now that of another image. The last boundaries come first:
    # checks of the others run such blocks on this image.
    model(1 - image)
    for place, name in reversed(list(enumerate(chain))):
        with _starting_behind(modules[: place + 1], values[name]):
            try:
                same = torch.allclose(model(image), exact, rtol=1e-4, atol=1e-5)
            except Exception:  # whatever a model does with inputs that it never gets
                same = False
        if not same:
            return {}
    return {name: values[name].nbytes for name in chain}


@contextmanager
def _starting_behind(modules: Sequence[nn.Module], output: Tensor) -> Iterator[None]:
    """Let the last of some consecutive modules give a stored output; those before it compute nothing."""

    def nothing(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x

    def stored(*args: Any, **kwargs: Any) -> Tensor:
        return output.clone()  # modules behind it may work in place

    own = [module.__dict__.get("forward") for module in modules]
    try:
        for module in modules[:-1]:
            module.forward = nothing
        modules[-1].forward = stored
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


class ResumedPasses:
    """Passes over calibration images through two models of one structure, from where both have been computed to.

    Args:
        models: The models, in evaluation mode.
        images: Calibration images.
        count: Number of images.
        processes: The processes that share the passes.
    """

    def __init__(self, models: Sequence[nn.Module], images: Images, count: int, processes: Processes = ALONE) -> None:
        self.place, self.processes = Place.of(models[0], images), processes
        self._models, self._images = list(models), images
        first = next(batches(images, self.place))[:1]
        share = count * len(self._models) / processes.count
        self._sizes = {name: size * share for name, size in block_chain(models[0], first).items()}
        self._chain = list(self._sizes)
        self._behind = 0
        self._stored: dict[int, list[Tensor]] = {}

    @property
    def blocks(self) -> int:
        """Number of blocks that passes can start behind."""
        return max(1, len(self._chain))

    def advance(self, layer: str) -> None:
        """Store what the block with a layer takes, if memory suffices. The layers before it must be final."""
        inside = [k for k, name in enumerate(self._chain) if layer == name or layer.startswith(f"{name}.")]
        if not inside or inside[0] <= self._behind or self._sizes[self._chain[inside[0] - 1]] > _STORED_BYTES:
            return
        last = self._chain[inside[0] - 1]
        stored: dict[int, list[Tensor]] = {}
        with self.processes.agreed():
            for number, batch, counted in self.batches(None):
                stored[number] = [self._output(model, batch, number, last) for model in self._models]
                if counted:
                    self._stored.pop(number, None)  # both blocks together would take twice the memory
        self._stored, self._behind = stored, inside[0]

    def batches(self, most: int | None) -> Iterator[tuple[int, Tensor, bool]]:
        """This process's batches among those of at most ``most`` images, see `shared_batches`."""
        return shared_batches(batches(self._images, self.place, most=most), self.processes)

    @contextmanager
    def resumed(self, model: nn.Module, number: int, images: int) -> Iterator[None]:
        """Let forward passes of a model start behind the stored block.

        Args:
            model: One of the models.
            number: Number of the batch.
            images: Images of the batch to go on with.
        """
        if not self._behind:
            yield
            return
        which = next(k for k, one in enumerate(self._models) if one is model)
        modules = [model.get_submodule(name) for name in self._chain[: self._behind]]
        with _starting_behind(modules, self._stored[number][which][:images]):
            yield

    @torch.no_grad()
    def _output(self, model: nn.Module, batch: Tensor, number: int, name: str) -> Tensor:
        found: list[Tensor] = []

        def catch(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            found.append(output.clone())
            raise Halt

        hook = model.get_submodule(name).register_forward_hook(catch)
        try:
            with self.resumed(model, number, len(batch)):
                model(batch)
        except Halt:
            pass
        finally:
            hook.remove()
        return found[0]
