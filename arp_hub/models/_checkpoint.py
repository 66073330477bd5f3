"""Adapt saved weights to a decomposed model, before ``load_state_dict``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import ArpHubError
from ..layers.low_rank import layer_shape
from ..plan import RankPlan
from ..schemes import make_scheme
from ._untrusted import check_tensors

StateDict = dict[str, Tensor]

_FACTOR = re.compile(r"(?P<layer>.+)\.factors\.\d+\.(weight|bias)")


def _as_built(saved: Tensor, built: Tensor | None) -> Tensor:
    """Add or drop the 1x1 kernel of a factor: some arguments make a backbone build a linear layer as a convolution."""
    if built is None or saved.numel() != built.numel():
        return saved
    flat, conv = sorted((tuple(saved.shape), tuple(built.shape)), key=len)
    return saved.reshape(built.shape) if len(flat) == 2 and conv == (*flat, 1, 1) else saved


def weights_source(cfg: Mapping[str, Any]) -> str:
    """Where the weights come from, for messages."""
    return str(cfg.get("hf_hub_id") or cfg.get("file") or "the given state_dict")


@dataclasses.dataclass(frozen=True)
class CheckpointAdapter:
    """The ``pretrained_filter_fn`` of a decomposed model: checks the factors, and lets the backbone adapt the rest.

    Attributes:
        saved: The plan of the saved weights.
        kept: The part of it that the model was built with. The caller's arguments make the other layers dense.
        first_convs: Names of the layers that read the input image.
        channels: Channels of the input image in the saved weights, and in the model.
        may_lack: Layers that the saved weights may lack. None: any layer, because the caller's arguments add layers.
        load: Lets the backbone adapt dense weights to the caller's arguments, such as position embeddings to the image
            size. None: those arguments change no shapes.
        source: Where the weights come from, for messages.
    """

    saved: RankPlan
    kept: RankPlan
    first_convs: frozenset[str]
    channels: tuple[int, int]
    may_lack: frozenset[str] | None
    load: Callable[[StateDict], StateDict] | None
    source: str

    def __call__(self, state: StateDict, model: nn.Module) -> StateDict:
        """The saved weights, with the names and shapes of ``model``.

        Raises:
            ArpHubError: If the factors do not match the plan, or weights are missing.
        """
        check_tensors(state, model, self.source)
        own = model.state_dict()
        factors: dict[str, StateDict] = {name: {} for name in self.saved.layers}
        for key, value in state.items():
            if (match := _FACTOR.fullmatch(key)) and match["layer"] in factors:
                factors[match["layer"]][key] = _as_built(value, own.get(key))
        self._check(state, factors, model)
        taken = {key for found in factors.values() for key in found}
        dense = {key: value for key, value in state.items() if key not in taken}
        modules = dict(model.named_modules(remove_duplicate=False))
        merged = self.first_convs & (self.saved.layers.keys() - self.kept.layers.keys())
        for name in merged:
            dense |= self._merged(name, factors[name], modules[name])
        if self.load is not None:
            dense = self.load(dense)
        adapted = dense | {key: value for name in self.kept.layers for key, value in factors[name].items()}
        self._check_complete(adapted, model)
        return adapted

    def _check(self, state: StateDict, factors: Mapping[str, StateDict], model: nn.Module) -> None:
        own = model.state_dict()
        for name in self.kept.layers:
            expected = {key: tuple(v.shape) for key, v in own.items() if key.startswith(f"{name}.factors.")}
            found = {key: tuple(v.shape) for key, v in factors[name].items()}
            if found != expected:
                raise self._misfit(name, sorted(expected.values()), sorted(found.values()))
        for key in state.keys() - own.keys():
            match = _FACTOR.fullmatch(key)
            if match and match["layer"] not in self.saved.layers:
                raise ArpHubError(
                    f"the weights in '{self.source}' hold factors of the layer '{match['layer']}', which the plan "
                    "leaves dense: they belong to another plan"
                )

    def _check_complete(self, state: StateDict, model: nn.Module) -> None:
        """Refuse missing weights: if the number of classes changes, timm would leave them random without an error."""
        if self.may_lack is None:
            return
        optional = tuple(f"{name}." for name in self.may_lack)
        missing = [key for key in model.state_dict() if key not in state and not key.startswith(optional)]
        if missing:
            raise ArpHubError(
                f"the weights in '{self.source}' do not fit the backbone: they lack '{missing[0]}' "
                f"({len(missing)} tensors are missing)"
            )

    def _merged(self, name: str, found: StateDict, module: nn.Module) -> StateDict:
        """The merged weight of a first convolution with its saved input channels, which timm then adapts."""
        layer = self.saved.layers[name]
        weights = [found[key] for key in sorted(found) if key.endswith(".weight")]
        saved_channels, channels = self.channels
        shape = layer_shape(module)
        shape = dataclasses.replace(shape, in_channels=shape.in_channels * saved_channels // channels)
        scheme = make_scheme(layer.scheme, shape, layer.groups)
        expected = [conv.weight_shape for conv in scheme.convs(layer.rank)]
        weights = [w if w.dim() == 4 else w[..., None, None] for w in weights]
        if [tuple(w.shape) for w in weights] != expected:
            raise self._misfit(name, expected, [tuple(w.shape) for w in weights])
        merged = scheme.compose([w.double() for w in weights]).to(weights[0].dtype)
        others = {f"{name}.bias": value for key, value in found.items() if key.endswith(".bias")}
        if isinstance(
            gain := getattr(module, "gain", None), Tensor
        ):  # standardised convolutions keep their scale in a separate gain
            others[f"{name}.gain"] = (merged.flatten(1).std(1, correction=0) / _scale(module, merged)).view_as(gain)
        return {f"{name}.weight": merged[..., 0, 0] if shape.kind == "linear" else merged, **others}

    def _misfit(self, name: str, expected: Sequence[tuple[int, ...]], found: Sequence[tuple[int, ...]]) -> ArpHubError:
        layer = self.saved.layers[name]
        return ArpHubError(
            f"the weights in '{self.source}' do not fit the plan of the layer '{name}' ({layer.scheme}, "
            f"rank {layer.rank}, groups {layer.groups}): the plan makes tensors of {expected}, the file holds "
            f"{found or 'none'}"
        )


def _scale(module: Any, weight: Tensor) -> float:
    """The scale of a standardised convolution for a weight with other input channels."""
    return float(module.scale * (module.weight[0].numel() / weight[0].numel()) ** 0.5)
