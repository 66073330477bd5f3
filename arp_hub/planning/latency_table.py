"""Times of decomposed layers over those of dense layers, measured when first asked for and kept on disk.

Every layer is timed at its true shape, in the runtime of the workload, in turns with its decomposed form. The file's
keys name device, threads, versions, workload, shape, scheme and rank, so a second plan measures nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .._utils.environment import environment
from .._utils.files import cache_folder, write_atomically
from .._utils.parse import read_json
from .._version import __version__
from ..layers.low_rank import LowRankLayer, low_rank_layer
from ..plan import LayerPlan
from ..runtimes.timed import Call, layer_calls, runtime_versions
from ..schemes import Scheme
from ..schemes.shapes import LayerShape, Pair
from ..timing import Workload, take_turns
from .costs import Floats, rank_at, useful_rank

RANK_MULTIPLE = 8
"""Ranks are multiples of this under a latency budget by default: matrix kernels work in tiles of 8."""
_WORTH_IT = 0.97
"""A decomposed layer takes at most this share of its dense latency: timings differ by about 3 % from run to run."""


class LatencyTable:
    """Times of decomposed layers over those of dense layers.

    Args:
        workload: What is timed.
        device: Where it is timed.
        file: Where measurements are kept; by default ``latency.json`` in the user's cache folder.
    """

    def __init__(self, workload: Workload, device: torch.device, file: Path | None = None) -> None:
        self.workload, self.device = workload, device
        self._file = file or cache_folder() / "latency.json"
        self._known = _read(self._file)
        self._new: dict[str, float] = {}
        versions = "".join(f" {name} {version}" for name, version in runtime_versions(workload).items())
        self._place = f"{_device_name(device)}|arp_hub {__version__}|{torch.__version__}{versions}|{workload}"
        self._curves: dict[tuple[Any, ...], dict[int, float]] = {}
        self._open: tuple[tuple[LayerShape, Pair], Mapping[str, Call]] | None = None

    def costs(self, scheme: Scheme, sizes: Sequence[Pair], share: float) -> Floats:
        """What a layer costs dense, and at rank 1, 2, .. of a scheme; infinite at ranks that are not clearly faster.

        Args:
            scheme: The scheme.
            sizes: The layer's input map at each call.
            share: The dense layer's share of the model's latency, all calls together.
        """
        ranks = np.arange(1, useful_rank(scheme) + 1)
        ratios = np.mean([self._ratios(scheme, ranks, size) for size in sizes], axis=0)
        return np.concatenate([[share], np.where(ratios <= _WORTH_IT, share * ratios, np.inf)])

    def timed(self, scheme: Scheme, rank: int, sizes: Sequence[Pair]) -> float:
        """A layer's latency over that of the dense layer at exactly this rank, over all calls.

        Kernels change with the rank, so a measurement may lie far from the line through its neighbours. Later costs
        include it. Other runtimes than PyTorch are interpolated, because each rank would be exported first.
        """
        ratios = []
        for size in sizes:
            if not self.workload.in_torch:
                ratios.append(float(self._ratios(scheme, np.array([rank]), size)[0]))
                continue
            known = self._measured(scheme, size)
            if rank not in known:
                known[rank] = self._timed_ratio(scheme, rank, size)
            ratios.append(known[rank])
        return float(np.mean(ratios))

    def faster(self, schemes: Sequence[Scheme], sizes: Sequence[Pair]) -> list[Scheme]:
        """The schemes that are clearly faster than the dense layer at some measured rank."""
        if not self.workload.in_torch:
            self._open_all(schemes, sizes[0])
        return [scheme for scheme in schemes if min(self._measured(scheme, sizes[0]).values()) <= _WORTH_IT]

    def dense_seconds(self, scheme: Scheme, size: Pair) -> float:
        """Seconds of one call of the dense layer alone, in another runtime than PyTorch."""
        key = self._dense_key(scheme, size)
        self._measured(scheme, size)
        if key not in self._known:  # a file from which it was lost
            calls = self._forms({"small": (scheme, _ranks(scheme)[0])}, size)
            self._note_dense(scheme, size, take_turns(calls, self.device, seconds=0.1, least=2)["dense"])
        return self._known[key]

    def save(self) -> None:
        """Add new measurements to the file, atomically. If it cannot be written, they are not kept."""
        if not self._new:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, json.dumps({**_read(self._file), **self._new}))
        except OSError:
            return
        self._new = {}

    def _ratios(self, scheme: Scheme, ranks: NDArray[np.int64], size: Pair) -> Floats:
        """Latency over that of the dense layer: lines through the measured ranks that never fall."""
        known = self._measured(scheme, size)
        points = np.array(sorted(known))
        ratios = np.maximum.accumulate([known[rank] for rank in points])
        found = np.interp(ranks, points, ratios)
        if len(points) == 1:
            return found
        slope = (ratios[1] - ratios[0]) / (points[1] - points[0])
        below = np.maximum(ratios[0] + slope * (ranks - points[0]), ratios[0] / 2)
        found = np.where(ranks < points[0], below, found)
        return np.where(ranks > points[-1], ratios[-1] * ranks / points[-1], found)

    def _measured(self, scheme: Scheme, size: Pair) -> dict[int, float]:
        """Latency over that of the dense layer at three ranks, or at fewer if the smallest is slower."""
        key = (scheme.shape, scheme.name, scheme.groups, size)
        if key not in self._curves:
            found: dict[int, float] = {}
            for rank in _ranks(scheme):
                found[rank] = self._timed_ratio(scheme, rank, size)
                if min(found.values()) > 1:  # slower than dense at its smallest rank: so are the others
                    break
            self._curves[key] = found
        return self._curves[key]

    def _timed_ratio(self, scheme: Scheme, rank: int, size: Pair) -> float:
        """The fastest time of a decomposed layer over that of the dense layer: other work only adds time."""
        key = self._key(scheme, rank, size)
        if key not in self._known:
            calls = self._calls(scheme, rank, size)
            with torch.inference_mode():
                samples = take_turns(calls, self.device, seconds=0.1, least=2)
            self._known[key] = self._new[key] = min(samples["small"]) / min(samples["dense"])
            if not self.workload.in_torch:
                self._note_dense(scheme, size, samples["dense"])
        return self._known[key]

    def _note_dense(self, scheme: Scheme, size: Pair, seconds: Sequence[float]) -> None:
        key = self._dense_key(scheme, size)
        self._known[key] = self._new[key] = min([*seconds, self._known.get(key, math.inf)])

    def _key(self, scheme: Scheme, rank: int, size: Pair) -> str:
        return f"{self._place}|{scheme.shape}|{size}|{scheme.name}|{scheme.groups}|{rank}"

    def _dense_key(self, scheme: Scheme, size: Pair) -> str:
        return f"{self._place}|{scheme.shape}|{size}|dense, seconds"

    def _calls(self, scheme: Scheme, rank: int, size: Pair) -> dict[str, Call]:
        """The dense layer and its form at a rank, ready to run."""
        if self.workload.in_torch:
            return self._forms({"small": (scheme, rank)}, size)
        form = _form(scheme, rank)
        if self._open is None or self._open[0] != (scheme.shape, size) or form not in self._open[1]:
            self._open_all([scheme], size)
        _, calls = cast(tuple[Any, Mapping[str, Call]], self._open)
        return {"dense": calls["dense"], "small": calls[form]}

    def _open_all(self, schemes: Sequence[Scheme], size: Pair) -> None:
        """Export a layer in all forms that are not timed yet: together, because each export takes seconds."""
        wanted = {_form(one, rank): (one, rank) for one in schemes for rank in _ranks(one)}
        wanted = {name: form for name, form in wanted.items() if self._key(*form, size) not in self._known}
        if wanted:
            self._open = (schemes[0].shape, size), self._forms(wanted, size)

    def _forms(self, wanted: Mapping[str, tuple[Scheme, int]], size: Pair) -> dict[str, Call]:
        """A dense layer and its forms by scheme and rank, ready to run."""
        shape = next(iter(wanted.values()))[0].shape
        layers = {"dense": _dense_layer(shape, self.device)}
        for name, (scheme, rank) in wanted.items():
            small = low_rank_layer(layers["dense"], LayerPlan(scheme.name, rank, scheme.groups))
            spread_out(small)
            layers[name] = small
        return layer_calls(layers, _input(shape, size, self.workload.batch_size, self.device), self.workload)


@torch.no_grad()
def spread_out(layer: LowRankLayer) -> None:
    """Random factors that keep the scale of their input: denormal numbers would slow a CPU down."""
    for factor in layer.factors:
        weight = cast(Tensor, factor.weight)
        weight.normal_(0, weight[0].numel() ** -0.5)


def _read(file: Path) -> dict[str, float]:
    """The measurements in a file, none if it is missing or damaged."""
    try:
        found = read_json(file)
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, float) and 0 < value < float("inf")}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    hardware = environment()["hardware"]
    return f"{device.type} {hardware['cpu']}, {hardware['threads']} threads"


def _form(scheme: Scheme, rank: int) -> str:
    return f"{scheme.name}, {scheme.groups} groups, rank {rank}"


def _ranks(scheme: Scheme) -> list[int]:
    """The ranks that are timed first."""
    return sorted({_rank_at(scheme, share) for share in (0.15, 0.4, 0.75)})


def _rank_at(scheme: Scheme, share: float) -> int:
    """A rank near a share of the dense weights, a multiple of `RANK_MULTIPLE`."""
    rank = rank_at(scheme, share)
    return min(max(RANK_MULTIPLE, rank // RANK_MULTIPLE * RANK_MULTIPLE), scheme.max_rank)


def _dense_layer(shape: LayerShape, device: torch.device) -> nn.Module:
    if shape.kind == "linear":
        return nn.Linear(shape.in_channels, shape.out_channels, device=device)
    return nn.Conv2d(
        shape.in_channels,
        shape.out_channels,
        shape.kernel_size,
        shape.stride,
        shape.padding,
        shape.dilation,
        shape.groups,
        bias=False,
        device=device,
    )


def _input(shape: LayerShape, size: Pair, batch: int, device: torch.device) -> Tensor:
    if shape.kind == "linear":
        tokens = (batch,) if size[0] == 1 else (batch, size[0])
        return torch.randn(*tokens, shape.in_channels, device=device)
    return torch.randn(batch, shape.in_channels, *size, device=device)
