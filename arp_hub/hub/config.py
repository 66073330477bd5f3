"""The ``config.json`` of a model: what timm needs to build it again."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_model_input_config
from timm.models._hub import save_config_for_hf
from timm.utils import reparameterize_model
from torch import nn

from .._utils.parse import shown
from .._version import __version__
from ..errors import ArpHubError
from ..layers.apply_plan import plan_of
from ..layers.cfg_names import with_layer_names
from ..models._untrusted import BAD_CONFIG, check_arguments
from ..models.label_names import label_names as names_of
from ..models.lowrank import NAME, OF_THE_WEIGHTS, OURS, backbone_cfg
from .load import set_input_size


def write_config(
    model: nn.Module,
    path: Path,
    *,
    backbone: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    label_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Describe a model in timm's config format.

    Args:
        model: A timm model, dense or decomposed.
        path: The file to write.
        backbone: Name of the dense timm model. Default: the name that timm stored on the model.
        model_args: Replacements for arguments that timm stored; needed for those that JSON cannot hold.
        label_names: Names of the classes, in order.

    Returns:
        The config that was written.

    Raises:
        ArpHubError: If the model's architecture is unknown, or an argument or label cannot be stored.
    """
    if not isinstance(model_args or {}, Mapping):
        raise ArpHubError(f"model_args must hold arguments by name, got {type(model_args).__name__}")
    num_classes = getattr(model, "num_classes", None)
    if not isinstance(num_classes, int):
        raise ArpHubError(
            f"{type(model).__name__} is not a timm classifier, so timm could not build it again: pass the whole bare "
            "model, not a feature extractor, and unwrapped (accelerator.unwrap_model(model)); of a model from another "
            "library, keep the plan (plan.save) and the state_dict"
        )
    name = _backbone(model, backbone)
    base, plan = backbone_cfg(name), plan_of(model)
    args: dict[str, Any] = {"backbone": name, "plan": plan.to_dict()} if plan.layers else {}
    args |= {key: value for key, value in _noted_args(model).items() if key not in ("backbone", "plan")}
    if plan.layers and _is_reparameterized(model, name, args, dict(model_args or {})):
        args["reparameterized"] = True
    # timm writes the cfg and arguments stored on a model: this shallow copy shares the weights and has its own.
    view: Any = copy.copy(model)
    noted = getattr(model, "pretrained_cfg", None) or base
    view.pretrained_cfg = with_layer_names({k: value for k, value in noted.items() if k not in OF_THE_WEIGHTS})
    view._traits = with_layer_names(getattr(model, "_traits", {}))
    size = get_model_input_config(model)["input_size"]  # with img_size= and in_chans= in it
    if noted.get("input_size") and tuple(noted["input_size"]) != tuple(size):
        set_input_size(view, size)
    view.pretrained_cfg["architecture"] = NAME if plan.layers else name
    view._model_args = args | dict(model_args or {})
    check_arguments(view._model_args, f"the arguments of {name} cannot be saved: model_args must not hold")
    extra: dict[str, Any] = {"arp_hub": {"version": __version__}}
    if label_names is None:  # timm keeps them in the cfg, transformers reads them beside it
        label_names = names_of(model) or None
    if label_names is not None:
        extra["label_names"] = _labels(label_names, num_classes)
    try:
        save_config_for_hf(view, str(path), model_config=extra, model_args=dict(model_args or {}))
    except (TypeError, ValueError, RecursionError) as error:
        raise ArpHubError(
            f"the arguments that {name} was made with cannot be stored: {error} "
            "(pass model_args={name: value} with values that JSON and timm take)"
        ) from error
    config = json.loads(path.read_text(encoding="utf-8"))
    # Loading overlays this cfg on the backbone's default one: null removes entries that this model lacks.
    config["pretrained_cfg"] = {**dict.fromkeys(base), **config["pretrained_cfg"], "num_classes": config["num_classes"]}
    # transformers passes the number of classes by itself, and a second one in model_args would be an error.
    config["model_args"].pop("num_classes", None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return config


def check_rebuilds(config: Mapping[str, Any], model: nn.Module) -> None:
    """Build the model that ``config`` describes on the meta device, and compare it with the one to be saved.

    Raises:
        ArpHubError: If it cannot be built, or has other weights or convolutions, so that loading would give another
            model.
    """
    what = f"{config['architecture']} with {shown(config['model_args'])}"
    way_out = "pass backbone= and model_args=, as given to timm.create_model"
    try:
        with torch.device("meta"):
            rebuilt = timm.create_model(
                config["architecture"], pretrained_cfg=dict(config["pretrained_cfg"]), **config["model_args"]
            )
    except (ArpHubError, AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ArpHubError(f"timm cannot build {what}: {error}: {way_out}") from error
    expected = {key: tuple(value.shape) for key, value in rebuilt.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if differing := [key for key in {**expected, **found} if expected.get(key) != found.get(key)]:
        key = differing[0]
        raise ArpHubError(
            f"the model is not what {what} builds: '{key}' is {found.get(key, 'absent')} here and "
            f"{expected.get(key, 'absent')} there ({len(differing)} tensors differ): {way_out}"
        )
    modules = dict(model.named_modules())
    for name, module in rebuilt.named_modules():
        here, there = type(modules.get(name)).__name__, type(module).__name__
        if isinstance(module, nn.Conv2d) and here != there:
            raise ArpHubError(
                f"layer '{name}' is a {here}, but {what} builds a {there}, which computes something else from the same "
                "weight: save the decomposed model, before to_dense"
            )


def _is_reparameterized(model: nn.Module, backbone: str, *args: Mapping[str, Any]) -> bool:
    """Whether a decomposed model's backbone went through ``reparameterize_model`` first."""
    options = {key: value for given in args for key, value in given.items() if key not in OURS}
    options.setdefault("num_classes", getattr(model, "num_classes", None))
    try:
        with torch.device("meta"):
            dense = timm.create_model(backbone, **options).eval()  # some merge in evaluation mode only
            found = _dense_keys(model)
            return found != _dense_keys(dense) and found == _dense_keys(reparameterize_model(dense))
    except BAD_CONFIG:  # check_rebuilds reports the fault
        return False


def _dense_keys(model: nn.Module) -> set[str]:
    """The names of a model's weights; factors have the name of their layer."""
    return {re.sub(r"\.factors\.\d+\.", ".", key) for key in model.state_dict()}


def _backbone(model: nn.Module, backbone: str | None) -> str:
    """The name of the dense model, without a tag."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    name = backbone or _noted_args(model).get("backbone") or cfg.get("architecture")
    if not name:
        raise ArpHubError(
            f"this {type(model).__name__} does not say which timm model it is: create it with timm.create_model, or "
            "pass backbone='resnet50' (its timm name) and model_args={...} (the arguments it was made with)"
        )
    name = str(name).partition(".")[0]
    if name == NAME or not timm.is_model(name):
        raise ArpHubError(f"backbone {name!r} is no registered timm model: pass backbone= with the dense model's name")
    return name


def _noted_args(model: nn.Module) -> dict[str, Any]:
    """The arguments that ``timm.create_model`` stored on the model."""
    noted: Any = getattr(model, "_model_args", None)
    return dict(noted or {})


def _labels(label_names: Sequence[str], num_classes: int) -> list[str]:
    names = [] if isinstance(label_names, (str, Mapping)) or not isinstance(label_names, Iterable) else [*label_names]
    if len(names) != num_classes or not all(isinstance(name, (str, Integral)) for name in names):
        raise ArpHubError(f"label_names must be a list of all {num_classes} classes, got {shown(label_names)}")
    return [str(name) for name in names]
