"""Like layers as the groups of one layer, so that one call finds the nearest low-rank weights of all of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ArpHubError
from ..schemes import Factors, Scheme
from ..schemes.linalg import factorising
from .sharding import from_owner, gathered, move, sharers


@dataclass
class PlannedLayer:
    """One layer that a plan decomposes.

    Attributes:
        name: Its name in the model.
        weight: Its weight, which training changes.
        scheme: Its scheme.
        rank: Its rank.
        factors: Factors near the weight that a first search starts from, if there are any.
    """

    name: str
    weight: nn.Parameter
    scheme: Scheme
    rank: int
    factors: Factors | None


@dataclass
class Solution:
    """The nearest low-rank weights of a stack.

    Attributes:
        factors: Their factors.
        weight: The weights, one below the other, ``(layers * O, I, kh, kw)``.
        violations: Relative violation of every layer, ``(layers,)``.
    """

    factors: Factors
    weight: Tensor
    violations: Tensor


class LayerStack:
    """Layers of one shape, scheme and rank as the groups of one layer, with what the penalty remembers of them.

    A scheme treats groups alike and apart, so one call serves the whole stack. On a GPU a pull of small layers costs as
    much as its kernel launches.

    Args:
        layers: The layers.
    """

    def __init__(self, layers: Sequence[PlannedLayer]) -> None:
        self.layers = list(layers)
        self.scheme = layers[0].scheme.stacked(len(layers))
        given = [layer.factors for layer in layers if layer.factors is not None]
        self.basis: Factors | None = self._kept_of(joined(given)) if given else None
        self.factors: Factors | None = None
        self.start: Tensor | None = None

    def dense_weights(self, weights: Sequence[Tensor] | None = None) -> Tensor:
        """Weights one below the other, ``(layers * O, I, kh, kw)``, in single precision; by default the model's own."""
        weights = weights or [layer.weight for layer in self.layers]
        weight = torch.cat([gathered(one.detach()) for one in weights]).float().contiguous()
        return weight if weight.dim() == 4 else weight[..., None, None]

    def nearest(self, weight: Tensor) -> Factors:
        """The factors of the nearest low-rank weights, starting from those of the last pull."""
        with factorising(self.layers[0].name):
            return self._nearest(weight)

    def _nearest(self, weight: Tensor) -> Factors:
        if self.basis is None:  # layer by layer, because each search for a start has its own length
            parts = zip(self.layers, weight.chunk(len(self.layers)), strict=True)
            return joined([layer.scheme.nearest(part, layer.rank) for layer, part in parts])
        start = tuple(part.to(weight) for part in self.basis)  # the model may have moved to another device
        return self.scheme.nearest(weight, self.layers[0].rank, start=start)

    def remember(self, factors: Factors, keep: bool) -> None:
        """Keep what the next pull starts from, and all of the factors if ``keep``."""
        self.basis = self._kept_of(factors)
        # contiguous, as they come back from a checkpoint: sums of other strides round differently
        self.factors = tuple(part.contiguous() for part in factors) if keep else None

    def _kept_of(self, factors: Factors) -> Factors:
        """The part of the factors that a pull starts from, scaled to 1 and in half precision.

        A start needs no more precision than the weights' way between two pulls. For ResNet-50 at 45 % it takes 17 % of
        the weights' memory (results/penalty_cost.json).
        """
        basis = self.scheme.basis(factors)
        largest = [part.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(part.dtype).tiny) for part in basis]
        return tuple((part / most).half().contiguous() for part, most in zip(basis, largest, strict=True))

    def solve(self, weight: Tensor) -> Solution:
        """The nearest low-rank weights and their violations, of the result of `dense_weights`."""
        factors = self.nearest(weight)
        nearest = self.scheme.compose(factors)
        apart, whole = (part.view(len(self.layers), -1).square().sum(1) for part in (weight - nearest, weight))
        return Solution(factors, nearest, apart / whole.clamp_min(torch.finfo(whole.dtype).tiny))

    def move(self, nearest: Tensor, shares: Tensor | None) -> None:
        """Move each layer by its share of the way to its nearest point, or all the way without shares."""
        for number, (layer, target) in enumerate(zip(self.layers, nearest.chunk(len(self.layers)), strict=True)):
            move(layer.weight, target.view(layer.weight.shape), None if shares is None else shares[number])

    @property
    def cost(self) -> float:
        """Work of `nearest` beside that of other stacks: a product of the weight with its basis."""
        return float(self.layers[0].rank * sum(layer.weight.numel() for layer in self.layers))

    def empty_solution(self) -> tuple[Factors, Tensor]:
        """Factors without values and violations that are NaN, where those of another process are to be written."""
        layer, count = self.layers[0], len(self.layers)
        shapes, device = [conv.weight_shape for conv in layer.scheme.convs(layer.rank)], layer.weight.device
        factors = tuple(torch.empty(count * shape[0], *shape[1:], device=device) for shape in shapes)
        return factors, torch.full((count,), torch.nan, device=device)

    def apart(self, whole: Factors | None) -> list[Factors]:
        """The factors, or bases, of each layer; an empty list if there are none yet."""
        parts = [part.chunk(len(self.layers)) for part in whole or ()]
        return list(zip(*parts, strict=True))


def rounds(stacks: Sequence[LayerStack]) -> list[list[LayerStack]]:
    """Stacks in the order in which `solved` takes them, those together that different processes solve.

    Processes that hold parts of the weights solve as many stacks at a time as they are, of similar cost.
    """
    group = sharers(stacks[0].layers[0].weight)
    count = 1 if group is None else dist.get_world_size(group)
    order = sorted(stacks, key=lambda stack: -stack.cost) if count > 1 else stacks
    return [list(order[start : start + count]) for start in range(0, len(order), count)]


def solved(stacks: Sequence[LayerStack]) -> Iterator[Solution]:
    """The nearest low-rank weights of stacks that `rounds` put together, one stack after the other.

    Sharded weights are gathered one stack at a time. The process with the number of a stack finds its factors, and
    sends them to the others, so that none holds more than two stacks of whole weights.

    Raises:
        ArpHubError: In all processes, if a factorisation fails in one.
    """
    group = sharers(stacks[0].layers[0].weight)
    if group is None:
        for stack in stacks:
            yield stack.solve(stack.dense_weights())
        return
    own = dist.get_rank(group)
    found, failure = None, None
    try:
        if (weight := _gathered_of(stacks, own)) is not None:
            found = stacks[own].solve(weight)
            del weight
    except ArpHubError as error:
        failure = error
    for number, stack in enumerate(stacks):
        factors, violations = stack.empty_solution()
        if number == own and found is not None:
            factors, violations = tuple(part.contiguous() for part in found.factors), found.violations
            found = None  # its whole weights make room for those of the others
        from_owner([*factors, violations], number, group)
        if failure is not None and number == own:
            raise failure
        if violations.isnan().any():
            raise ArpHubError(
                f"layer '{stack.layers[0].name}': its factorisation failed in process {number}, whose message says why"
            )
        yield Solution(factors, stack.scheme.compose(factors), violations)


def _gathered_of(stacks: Sequence[LayerStack], own: int) -> Tensor | None:
    """The whole weights of the stack of one number. All processes take part in gathering each stack, with theirs."""
    mine = None
    for number, stack in enumerate(stacks):
        weight = stack.dense_weights()
        if number == own:
            mine = weight
    return mine


@contextmanager
def side_by_side(streams: Sequence[torch.cuda.Stream]) -> Iterator[Callable[[], AbstractContextManager[object]]]:
    """Contexts whose work a GPU may overlap, after all earlier work and before all later work.

    Factorisations of small matrices leave most of a GPU idle. Without streams, the contexts do nothing.
    """
    if not streams:
        yield nullcontext
        return
    current, turns = torch.cuda.current_stream(streams[0].device), itertools.cycle(streams)
    for stream in streams:
        stream.wait_stream(current)
    yield lambda: torch.cuda.stream(next(turns))
    for stream in streams:
        current.wait_stream(stream)


def joined(factors: Sequence[Factors]) -> Factors:
    """The factors, or the basis, of a stack, from those of its layers."""
    return tuple(torch.cat(parts) for parts in zip(*factors, strict=True))


def stacked(layers: Sequence[PlannedLayer]) -> list[LayerStack]:
    """Like layers in stacks whose copies stay small beside the model."""
    alike: dict[Any, list[PlannedLayer]] = {}
    for layer in layers:
        scheme, shape = layer.scheme, layer.scheme.shape
        kind = scheme.name, scheme.groups, layer.rank, layer.weight.shape, shape.groups, layer.weight.device
        alike.setdefault(kind, []).append(layer)
    stacks = []
    for group in alike.values():
        most = max(1, 2**22 // group[0].weight.numel())  # 16 MB of weights: small beside most models
        stacks += [LayerStack(group[start : start + most]) for start in range(0, len(group), most)]
    return stacks
