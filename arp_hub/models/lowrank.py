"""``arp_lowrank``, the timm entrypoint that rebuilds any decomposed backbone from its name and its plan.

A saved ``config.json`` names this architecture and carries both as ``model_args``. The backbone is built by its own
entrypoint, the plan is applied, then timm loads the weights. So every argument of ``timm.create_model`` works as for
the dense backbone. Two layers may differ from the saved ones, and are then built dense:

- the classifier, when the number of classes changes: its saved factors are dropped, as timm drops those of a dense one;
- the first convolution, when the input channels change: its factors are merged, and timm adapts the merged weight.

The config may come from anybody: only names of registered backbones, plain values and safetensors files are accepted.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import FeatureListNet, PretrainedCfg, build_model_with_cfg, model_entrypoint, register_model
from timm.models._hub import download_from_hf
from timm.utils import reparameterize_model
from torch import Tensor, nn

from .._utils.parse import shown
from ..errors import ArpHubError
from ..layers.apply_plan import apply_plan
from ..layers.cfg_names import name_factors, names_of, with_layer_names
from ..plan import RankPlan
from ._checkpoint import CheckpointAdapter, weights_source
from ._skip_init import SkipInit
from ._untrusted import check_args, check_build, check_cfg, read_header

__all__: list[str] = []

NAME = "arp_lowrank"
_BACKBONE = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?")
_UNTRUSTED = frozenset({"url", "state_dict", "hf_hub_filename", "custom_load"})
"""Keys of a pretrained_cfg that could make timm load another file than the safetensors file of the folder."""
_SAME_LAYERS = frozenset(
    {"num_classes", "in_chans", "img_size", "features_only", "out_indices", "feature_cls", "cache_dir"}
    | {"drop_rate", "drop_path_rate", "drop_block_rate", "pretrained_model_args"}
)
"""Arguments that add no layer to a model, apart from the classifier."""
_SAME_SHAPES = _SAME_LAYERS - {"img_size"}
"""Arguments of `_SAME_LAYERS` that change no shapes, apart from the classifier's and the first convolution's."""
_NOT_THE_MODEL = frozenset({"features_only", "out_indices", "feature_cls", "cache_dir", "pretrained_model_args"})
_MOST_BRANCHES = 16
"""Most tensors that ``reparameterize_model`` merges into one."""
OURS = frozenset({"backbone", "plan", "reparameterized"})
"""Arguments of `arp_lowrank` itself."""
OF_THE_WEIGHTS = frozenset(
    {"architecture", "tag", "custom_load", "label_offset", "origin_url", "notes", "description", *_UNTRUSTED}
)
"""Keys of a pretrained_cfg that describe the published weights, not the model."""


@register_model
def arp_lowrank(
    pretrained: bool = False,
    *,
    backbone: str = "",
    plan: RankPlan | Mapping[str, Any] | None = None,
    reparameterized: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Build a decomposed model.

    Args:
        pretrained: Load the weights of the ``local-dir:`` or ``hf-hub:`` folder that the model is created from.
        backbone: Any registered timm name, with or without a tag.
        plan: The rank plan or its JSON form.
        reparameterized: Whether the backbone's branches were merged (``timm.utils.reparameterize_model``) before it
            was decomposed.
        **kwargs: Further arguments of the backbone.

    Raises:
        ArpHubError: If the backbone is unknown, the plan does not fit it, or the weights do not fit both.

    Example:
        >>> plan = {"format_version": 1, "layers": {"layer1.0.conv1": {"scheme": "cp", "rank": 16}}}
        >>> model = timm.create_model("arp_lowrank", backbone="resnet18", plan=plan)
    """
    entrypoint = _entrypoint(backbone)
    rank_plan = plan if isinstance(plan, RankPlan) else RankPlan.from_dict(plan)
    given = kwargs.pop("pretrained_cfg", None)
    cfg = _merged_cfg(backbone, given, kwargs.pop("pretrained_cfg_overlay", None))
    if not given:  # the plan is of the model as it is asked for: transformers passes no cfg beside it
        cfg |= _asked_for(cfg, kwargs, rank_plan)
    if pretrained:
        cfg |= _weights_file(cfg, kwargs.get("cache_dir"))
    _check_saved(entrypoint, cfg, kwargs.get("pretrained_model_args"))
    features_only = kwargs.get("features_only", False)
    classifiers, first_convs = frozenset(names_of(cfg["classifier"])), frozenset(names_of(cfg["first_conv"]))
    channels = (cfg["input_size"][0], kwargs.get("in_chans", cfg["input_size"][0]))
    dense: frozenset[str] = frozenset()
    if features_only or kwargs.get("num_classes", cfg["num_classes"]) != cfg["num_classes"]:
        dense |= classifiers
    if channels[0] != channels[1]:
        dense |= first_convs
    same_shapes = _same_as_saved(kwargs, _SAME_SHAPES) or reparameterized
    no_classifier = bool(cfg["num_classes"]) and kwargs.get("num_classes") == 0  # some heads lose more than that layer
    if not same_shapes or no_classifier:
        dense |= _removed(rank_plan, entrypoint, cfg, kwargs)
    kept = RankPlan({name: layer for name, layer in rank_plan.layers.items() if name not in dense})

    all_loaded = pretrained and same_shapes and not dense

    def build(**model_kwargs: Any) -> nn.Module:
        with SkipInit() if all_loaded else nullcontext():
            return build_as_saved(**model_kwargs)

    def build_as_saved(**model_kwargs: Any) -> nn.Module:
        model = entrypoint(pretrained=False, pretrained_cfg=dict(cfg), **model_kwargs)
        if reparameterized:
            model = reparameterize_model(
                model.eval(), inplace=True
            ).train()  # some backbones merge only in evaluation mode
        return apply_plan(model, kept)

    adapter = CheckpointAdapter(
        rank_plan,
        kept,
        first_convs,
        channels,
        may_lack=classifiers if cfg["num_classes"] and _same_as_saved(kwargs, _SAME_LAYERS) else None,
        load=None if same_shapes else partial(_load_dense, entrypoint, cfg, kwargs, rank_plan),
        source=weights_source(cfg),
    )
    try:
        model = build_model_with_cfg(
            build,
            NAME,
            pretrained,
            pretrained_cfg=cfg,
            pretrained_filter_fn=adapter,
            feature_cfg=_feature_cfg(entrypoint, cfg, kwargs) if features_only else None,
            **kwargs,
        )
    except RuntimeError as error:
        if not pretrained:
            raise
        mismatch = str(error).strip().splitlines()[-1].strip(" \t.")  # torch lists all of them, each on a line
        raise ArpHubError(
            f"the weights in '{adapter.source}' do not fit {backbone} with its plan: {mismatch:.300}: leave out "
            "arguments that change the model, or save or download it again"
        ) from error
    name_factors(model)
    return model


def _entrypoint(backbone: str) -> Callable[..., nn.Module]:
    """The entrypoint of the backbone, which must be a registered dense model."""
    if not isinstance(backbone, str) or not backbone:
        raise ArpHubError(f"{NAME} needs backbone= (a timm name) and plan=; got backbone={shown(backbone)}")
    if not _BACKBONE.fullmatch(backbone):
        raise ArpHubError(f"backbone {backbone[:100]!r} is not a timm name (like 'resnet50' or 'resnet50.a1_in1k')")
    name = backbone.partition(".")[0]
    if name == NAME:
        raise ArpHubError(f"the backbone of {NAME} cannot be {NAME} itself: name the dense model")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise ArpHubError(
            f"unknown backbone '{name}'{hint}: timm {timm.__version__} has no such model: import the package that "
            "registers it, or upgrade timm"
        )
    return model_entrypoint(name)


def _merged_cfg(backbone: str, given: Any, overlay: Mapping[str, Any] | None) -> dict[str, Any]:
    """The backbone's pretrained_cfg without its weights, updated by the saved one, then by the caller's overlay."""
    if isinstance(given, str):
        raise ArpHubError(f"{NAME} has no tags, got '{given}': create local-dir:FOLDER or hf-hub:USER/NAME")
    given = given.to_dict() if isinstance(given, PretrainedCfg) else given or {}
    trusted = {key: value for key, value in given.items() if key not in _UNTRUSTED}
    cfg = {**backbone_cfg(backbone), **trusted, "architecture": NAME, **(overlay or {})}
    try:
        return with_layer_names(PretrainedCfg(**cfg).to_dict())
    except TypeError as error:
        raise ArpHubError(f"timm {timm.__version__} does not know this pretrained_cfg: {error}") from None


def backbone_cfg(backbone: str) -> dict[str, Any]:
    """The pretrained_cfg of a registered model, without the entries about its published weights."""
    own = timm.get_pretrained_cfg(backbone) or timm.get_pretrained_cfg(backbone.partition(".")[0]) or PretrainedCfg()
    return {key: value for key, value in own.to_dict(remove_source=True).items() if key not in OF_THE_WEIGHTS}


def _asked_for(cfg: Mapping[str, Any], kwargs: Mapping[str, Any], plan: RankPlan) -> dict[str, Any]:
    """The entries of a cfg that say how many classes and channels a model has, as the arguments say."""
    channels, *size = cfg["input_size"]
    classes = kwargs.get("num_classes") or cfg["num_classes"]  # 0 takes the classifier away
    ranks = [plan.layers[name].rank for name in names_of(cfg["classifier"]) if name in plan.layers]
    if ranks and max(ranks) > classes:  # the plan is of a model with more classes
        classes = cfg["num_classes"]
    return {
        "num_classes": classes,
        "input_size": (kwargs.get("in_chans", channels), *size),
    }


def _check_saved(entrypoint: Callable[..., nn.Module], cfg: Mapping[str, Any], saved: Any) -> None:
    """Check a config from a folder or the Hub, before it can cost time or memory."""
    if saved is None:
        return
    source = weights_source(cfg)
    args = {key: value for key, value in check_args(saved, source).items() if key not in OURS}
    check_cfg(cfg, source)
    if (file := Path(cfg.get("file") or "")).is_file():
        header = read_header(file)
        branches = _MOST_BRANCHES if saved.get("reparameterized") else 1
        check_build(lambda: entrypoint(pretrained=False, pretrained_cfg=dict(cfg), **args), header, source, branches)


def _weights_file(cfg: Mapping[str, Any], cache_dir: Any) -> dict[str, Any]:
    """Changes to the cfg that make timm load ``model.safetensors``, never a pickle."""
    if cfg.get("source") == "local-dir":
        file = Path(cfg["file"]) / "model.safetensors"
        if not file.is_file():
            raise ArpHubError(
                f"no weights in '{cfg['file']}': it holds no model.safetensors: save or download the model again"
            )
        return {"source": None, "file": str(file)}
    if cfg.get("source") == "hf-hub":
        file = download_from_hf(cfg["hf_hub_id"], "model.safetensors", cache_dir=cache_dir)
        return {"source": "file", "file": str(file)}
    if any(cfg.get(key) for key in ("file", "url", "state_dict", "hf_hub_id")):  # the caller's own overlay
        return {}
    raise ArpHubError(
        f"{NAME} has no weights of its own: create local-dir:FOLDER or hf-hub:USER/NAME, or pass pretrained=False"
    )


def _same_as_saved(kwargs: Mapping[str, Any], harmless: frozenset[str]) -> bool:
    """Whether the caller's arguments equal the saved ones, apart from ``harmless`` ones."""
    saved = kwargs.get("pretrained_model_args") or {}
    return all(key in harmless or (key in saved and saved[key] == value) for key, value in kwargs.items())


def _removed(
    plan: RankPlan, entrypoint: Callable[..., nn.Module], cfg: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> frozenset[str]:
    """The planned layers that exist with the saved arguments, but not with the caller's."""
    present = dict(_without_memory(entrypoint, cfg, kwargs).named_modules(remove_duplicate=False))
    if not (missing := plan.layers.keys() - present.keys()):
        return frozenset()
    saved = _without_memory(entrypoint, cfg, kwargs.get("pretrained_model_args") or {})
    return frozenset(missing & dict(saved.named_modules(remove_duplicate=False)).keys())


def _load_dense(
    entrypoint: Callable[..., nn.Module],
    cfg: Mapping[str, Any],
    kwargs: Mapping[str, Any],
    plan: RankPlan,
    state: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Adapt dense weights to the caller's arguments, through the backbone's own loading code.

    Expanded scalars, which need no memory, stand in for the decomposed layers.
    """
    saved = _without_memory(entrypoint, cfg, kwargs.get("pretrained_model_args") or {})
    modules = dict(saved.named_modules(remove_duplicate=False))
    planned = {modules[name] for name in plan.layers if name in modules}
    paths = {name for name, module in modules.items() if module in planned}  # a shared layer has several
    factors = {key: value for key, value in state.items() if key.partition(".factors.")[0] in paths}
    dense = {key: value for key, value in state.items() if key not in factors}
    stand_ins = {
        key: torch.zeros((), dtype=value.dtype).expand(value.shape)
        for key, value in saved.state_dict().items()
        if key.rpartition(".")[0] in paths and key not in dense
    }
    given = {**cfg, "source": None, "file": None, "hf_hub_id": None, "state_dict": {**dense, **stand_ins}}
    model = entrypoint(pretrained=True, pretrained_cfg=given, **_model_args(kwargs))
    adapted = {key: value for key, value in model.state_dict().items() if key not in stand_ins}
    return adapted | factors


def _without_memory(
    entrypoint: Callable[..., nn.Module], cfg: Mapping[str, Any], arguments: Mapping[str, Any]
) -> nn.Module:
    """The dense backbone on the meta device."""
    with torch.device("meta"):
        return entrypoint(pretrained=False, pretrained_cfg=dict(cfg), **_model_args(arguments))


def _model_args(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that define the model, not how it is loaded or wrapped."""
    return {key: value for key, value in kwargs.items() if key not in _NOT_THE_MODEL | OURS}


def _feature_cfg(
    entrypoint: Callable[..., nn.Module], cfg: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Settings that extract the same features from a decomposed backbone as from the dense one.

    The dense feature extractor is built on the meta device to read its settings. timm's list extractor is kept; all
    others, including custom classes, are replaced by the extractor that calls ``forward_intermediates``.
    """
    with torch.device("meta"):
        dense: Any = entrypoint(pretrained=False, pretrained_cfg=dict(cfg), **kwargs)
    info = dense.feature_info
    if isinstance(dense, FeatureListNet):
        nested = any("." in name for name in info.module_name())
        return {"feature_cls": FeatureListNet, "out_indices": info.out_indices, "flatten_sequential": nested}
    return {"feature_cls": "getter", "out_indices": info.out_indices}
