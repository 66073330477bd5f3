"""Load models with weights by timm name, from a saved folder, from the Hub, or from a checkpoint file."""

from __future__ import annotations

import difflib
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import get_model_input_config
from timm.models._hub import download_from_hf
from torch import Tensor, nn

from .. import models  # noqa: F401  (its import registers our models with timm, which loading needs)
from .._utils.parse import shown
from ..errors import ArpHubError, checked_path
from ..layers.trace import InputSize
from ..models._untrusted import (
    BAD_CONFIG,
    LIMITS,
    check_args,
    check_build,
    check_cfg,
    check_tensors,
    read_config,
    read_header,
)
from ..models.arguments import unknown_argument
from ..models.lowrank import OF_THE_WEIGHTS
from .client import FAILURES, bounded_waits, cache_if_offline, explain

_PREFIXES = ("local-dir:", "hf-hub:", "hf_hub:")
_WRAPPERS = ("module.", "model.")


def load_model(
    name: str,
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    pretrained: bool | None = None,
    num_classes: int | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a model and give it its weights.

    Args:
        name: Any timm name (``resnet50``, ``resnet50.a1_in1k``), the path of a saved folder (``out`` or
            ``local-dir:out``) or ``hf-hub:user/name``.
        checkpoint: A weights file (safetensors, or a torch file that holds tensors only); overrides ``pretrained``.
        pretrained: Whether to load the weights that belong to the name. Default: if there are any, and no checkpoint
            is given.
        num_classes: Number of classes of a new classifier. Default: that of the model.
        **kwargs: Further arguments of ``timm.create_model``, such as ``img_size=112``. They are kept with a saved
            model, and the model's data config follows ``img_size`` and ``in_chans``.

    Returns:
        The model, in evaluation mode.

    Raises:
        ArpHubError: If the name is unknown, its weights cannot be loaded, or the checkpoint does not fit.

    Example:
        >>> model = load_model("cifar_resnet20", "resnet20_cifar10.safetensors")  # doctest: +SKIP
    """
    check_name(name)
    name = with_prefix(name)
    if pretrained is None:
        pretrained = checkpoint is None and (is_saved_model(name) or timm.models.is_model_pretrained(name))
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    classes = kwargs.get("num_classes", 0)
    if isinstance(classes, bool) or not isinstance(classes, int) or not 0 <= classes <= LIMITS.classes:
        raise ArpHubError(f"num_classes must be a whole number from 0 to {LIMITS.classes}, got {shown(classes)}")
    pretrained = pretrained and checkpoint is None
    remote = name.startswith(_PREFIXES[1:]) or (pretrained and not is_saved_model(name))
    with bounded_waits(), cache_if_offline() if remote else nullcontext() as offline:
        try:
            if is_saved_model(name):
                model = _create_saved(name, pretrained, kwargs)
            else:
                model = timm.create_model(name, pretrained=pretrained, **kwargs)
        except ArpHubError:
            raise
        except (*FAILURES, *BAD_CONFIG) as error:
            if argument := unknown_argument(error, kwargs):
                raise ArpHubError(f"the model '{name}' takes no argument '{argument}': leave it out") from error
            reason = f"the cache does not hold it, and there is {explain(offline)}" if offline else explain(error)
            if len(reason) > 600:  # torch lists every tensor that does not fit
                reason = f"{reason[:600]}…"
            given = f" with {kwargs!r:.200}" if kwargs else ""
            raise ArpHubError(f"cannot load the model '{name}'{given}: {reason}") from error
    if kwargs.keys() & {"img_size", "in_chans"}:
        set_input_size(model, get_model_input_config(model)["input_size"])
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model.eval()


def set_input_size(model: nn.Module, size: InputSize) -> None:
    """Set the size of a model's images: its pretrained_cfg notes it, and position embeddings are resized to it."""
    resize: Any = getattr(model, "set_input_size", None)
    if resize is not None and tuple(get_model_input_config(model)["input_size"])[1:] != tuple(size)[1:]:
        resize(img_size=tuple(size)[1:])
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    changes: dict[str, Any] = {"input_size": tuple(size), "test_input_size": None}
    if tuple(cfg.get("input_size") or ())[1:] != tuple(size)[1:]:
        changes["pool_size"] = None
    change_config(model, changes)


def change_config(model: nn.Module, changes: Mapping[str, Any]) -> None:
    """Change entries of a model's pretrained_cfg, which is saved with it. timm reads it under two names."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    model.pretrained_cfg = model.default_cfg = {**cfg, **changes}  # type: ignore[assignment]  # a Module's attribute may be anything


def is_saved_model(name: str) -> bool:
    """Whether a name refers to a saved folder or a model on the Hub."""
    return with_prefix(name).startswith(_PREFIXES)


def with_prefix(name: str) -> str:
    """A model's name, with ``local-dir:`` before the path of a saved folder. A name of timm keeps its meaning.

    Example:
        >>> with_prefix("out")  # a folder that `save_pretrained` wrote  # doctest: +SKIP
        'local-dir:out'
    """
    # functions of os.path, because those of Path raise for a name that no system could hold
    saved = os.path.isdir(name) and os.path.isfile(os.path.join(name, "config.json"))  # noqa: PTH112, PTH113, PTH118
    return f"local-dir:{name}" if saved and not timm.is_model(name) else name


def published_name(name: str, model: nn.Module) -> str | None:
    """The repository on the Hub that the weights of ``load_model(name)`` come from, or None if there is none.

    Example:
        >>> published_name("hf-hub:user/name@v1", model)  # doctest: +SKIP
        'user/name'
    """
    kind, _, rest = name.partition(":")
    if kind in ("hf-hub", "hf_hub"):
        return rest.partition("@")[0]
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    return cfg.get("hf_hub_id") if timm.is_model(name) and timm.models.is_model_pretrained(name) else None


def hub_dataset(source: str | None) -> str | None:
    """The id of a data set on the Hub, without a configuration. None for any other ``source``, such as a folder."""
    name = (source or "").partition(":")[0]
    if not source or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return None
    return None if os.path.exists(source) or os.path.exists(name) else name  # noqa: PTH110 - False for long names


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a weights file into a model, every tensor of it.

    Raises:
        ArpHubError: If the file cannot be read without executing what is in it, if a tensor is missing, unknown or of
            another shape, or if a weight is NaN or infinite.
    """
    state = read_weights(path)
    own = model.state_dict()
    optional = {key for key in own if key.endswith("num_batches_tracked")}
    missing = [key for key in own if key not in state and key not in optional]
    unknown = [key for key in state if key not in own]
    wrong = [key for key in state if key in own and state[key].shape != own[key].shape]
    kind = type(model).__name__
    if wrong:
        key = wrong[0]
        raise ArpHubError(
            f"checkpoint '{path}': tensor '{key}' has the shape {tuple(state[key].shape)}, this {kind} needs "
            f"{tuple(own[key].shape)} ({len(wrong)} tensors differ in shape): {_way_out(model, state, wrong)}"
        )
    if missing or unknown:
        parts = [f"lacks {_some(missing)}"] if missing else []
        parts += [f"holds {_some(unknown)}, which the model lacks"] if unknown else []
        raise ArpHubError(
            f"checkpoint '{path}' does not fit this {kind}: it {' and '.join(parts)}: "
            "choose the model that the checkpoint was made with"
        )
    weights = {name: state[name] for name, _ in model.named_parameters() if name in state}
    check_tensors(weights, model, os.fspath(path))
    model.load_state_dict(state, strict=False)


def _way_out(model: nn.Module, state: Mapping[str, Tensor], wrong: Sequence[str]) -> str:
    """What to do about tensors of other shapes: where only classifiers differ, the number of classes is wrong."""
    classifiers = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    names = {classifiers} if isinstance(classifiers, str) else set(classifiers)
    classes = {state[key].shape[0] for key in wrong if state[key].dim()}
    if len(classes) == 1 and all(key.rpartition(".")[0] in names for key in wrong):
        count = classes.pop()
        return f"for its classes, give num_classes={count} (in recipes --model-kwargs num_classes={count})"
    return "choose the model that the checkpoint was made with"


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a weights file by name, on the CPU. Nothing in the file is executed.

    The weights of a training checkpoint are found under ``state_dict``, ``model`` or ``state_dict_ema``. The prefixes
    ``module.``, ``model.`` and ``_orig_mod.``, which wrappers put before every name, are dropped.

    Raises:
        ArpHubError: If there is no such file, or it holds anything but tensors.
    """
    path = checked_path(path, "checkpoint")
    if not path.is_file():
        raise ArpHubError(f"no checkpoint file at '{path}': give the path of a .safetensors or torch weights file")
    if not path.stat().st_size:
        raise ArpHubError(f"checkpoint '{path}' is empty: save it again")
    try:
        if path.suffix == ".safetensors":
            read_header(path)
            state: Any = load_file(path)
        else:
            # weights_only loads tensors and plain containers; it refuses to unpickle any other object
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ArpHubError:
        raise
    except SafetensorError as error:
        raise ArpHubError(f"checkpoint '{path}' is not a whole safetensors file: {error}") from error
    except Exception as error:  # torch raises many kinds of errors for an unreadable file
        if zipfile.is_zipfile(path):  # torch.save writes one
            reason = "holds more than tensors, such as a whole model, or is damaged: save model.state_dict()"
        else:
            reason = "is no whole file of weights: give what torch.save wrote of model.state_dict(), or .safetensors"
        raise ArpHubError(f"checkpoint '{path}' {reason}") from error
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ArpHubError(f"checkpoint '{path}' does not hold a state_dict (names with tensors)")
    return _without_wrappers(dict(state))


def _without_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop prefixes that parallel wrappers, ``torch.compile`` and trainers put before every name, in any order."""
    state = {re.sub(r"(^|\.)_orig_mod\.", r"\1", str(key)): value for key, value in state.items()}
    while prefix := next((p for p in _WRAPPERS if all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def check_name(name: str) -> None:
    """Check a model's name first: timm raises a bare AssertionError, KeyError or RuntimeError for a bad one.

    Raises:
        ArpHubError: If there is no such model, or no such weights of it.
    """
    if not isinstance(name, str):
        raise ArpHubError(f"a model's name must be text, got {type(name).__name__} {name!r:.100}")
    if name.startswith("local-dir:"):
        config = checked_path(name.removeprefix("local-dir:"), "the model's folder") / "config.json"
        if not config.is_file():
            reason = "the folder has no config.json" if config.parent.is_dir() else "no such folder"
            raise ArpHubError(f"no model at '{name}': {reason} (arp-hub compress and save_pretrained write one)")
    elif not is_saved_model(name) and not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=1)
        if os.path.isdir(name):  # noqa: PTH112  (Path.is_dir raises for a name that no system could hold)
            near = [f"local-dir:{name}"]
            check_name(near[0])  # says so if the folder holds no model
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise ArpHubError(
            f"unknown model '{name}'{hint}: give a timm name (timm.list_models() lists them), a saved folder or "
            "hf-hub:USER/NAME"
        )
    elif not is_saved_model(name):
        try:
            timm.get_pretrained_cfg(name)
        except RuntimeError as error:
            architecture, _, tag = name.partition(".")
            tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
            choice = f"choose one of {', '.join(tags)}, or leave the tag out" if tags else "leave it out"
            raise ArpHubError(f"model '{architecture}' has no weights with the tag '{tag}': {choice}") from error


def _create_saved(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    """Create a model from a folder or the Hub. Dense models are checked here, decomposed ones by their entrypoint."""
    kind, _, place = name.partition(":")
    cache = kwargs.get("cache_dir")
    if kind == "local-dir":
        config_file = Path(place) / "config.json"
    else:
        config_file = Path(download_from_hf(place, "config.json", cache_dir=cache))
    config = read_config(config_file)
    architecture = config["architecture"].partition(".")[0]
    if architecture == "arp_lowrank" or not timm.is_model(architecture):
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    args, cfg = check_args(config.get("model_args", {}), place), dict(config.get("pretrained_cfg", {}))
    cfg |= {key: config[key] for key in ("num_classes", "label_names") if key in config}
    check_cfg(cfg, place)
    if not pretrained:
        return timm.create_model(name, pretrained=False, **kwargs)
    if kind == "local-dir":
        weights = Path(place) / "model.safetensors"
    else:
        weights = Path(download_from_hf(place, "model.safetensors", cache_dir=cache))
    if not weights.is_file():
        raise ArpHubError(f"no weights in '{place}': it holds no model.safetensors: save or download the model again")
    header = read_header(weights)
    own = {key: value for key, value in cfg.items() if key not in OF_THE_WEIGHTS}  # the input size is in it
    built = {"num_classes": cfg.get("num_classes"), "pretrained_cfg": own or None, **args}
    check_build(lambda: timm.create_model(architecture, **built), header, place)
    with torch.device("meta"):
        saved = timm.create_model(architecture, **built)
    check_tensors(load_file(weights), saved, place)
    # Without this overlay, timm would read a pickle or another file that the config names, which is not checked.
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=_only(weights), **kwargs)
    return model


def _only(weights: Path) -> dict[str, Any]:
    """A pretrained_cfg overlay that makes timm read only this file."""
    return {
        "source": "file",
        "file": str(weights),
        "url": None,
        "state_dict": None,
        "hf_hub_filename": None,
        "custom_load": False,
    }


def _some(names: list[str], limit: int = 3) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
