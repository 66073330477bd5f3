"""Check model folders from strangers before anything is built or loaded.

The header of the weights file declares its tensors, and these bound the model. The model that the config describes is
first built on the meta device. Building stops once it has more tensors, or far more numbers, than the file could fill.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from timm.models import build_model_with_cfg
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from .._utils.parse import read_json, shown
from ..errors import ArpHubError
from ._skip_init import SkipInit


@dataclass(frozen=True)
class Limits:
    """Bounds on a folder from a stranger. Published models stay below a tenth of each.

    Attributes:
        config_bytes: Bytes of ``config.json``.
        header_bytes: Bytes of a safetensors header: `tensors` at 400 bytes each, twice what timm's longest names take.
        tensors: Tensors of a file.
        classes: Classes of a classifier.
        number: Largest whole number among the arguments, such as a width.
        items: Entries of all lists and objects in the arguments together.
        text: Characters of a text or of a tensor's name.
        depth: Levels of nested lists and objects in the arguments.
        compression: Numbers of the dense model for each number in a decomposed file.
        slack: Numbers on top of that, and in buffers that no file keeps.
        slack_tensors: Tensors of the dense model beyond those in the file.
    """

    config_bytes: int = 2**22
    header_bytes: int = 2**23
    tensors: int = 20_000
    classes: int = 2**20
    number: int = 2**16
    items: int = 10_000
    text: int = 1_000
    depth: int = 6
    compression: int = 100
    slack: int = 2**22
    slack_tensors: int = 64


LIMITS = Limits()
_CROP_MODES = ("", "center", "squash", "border")
_INTERPOLATIONS = ("", "random", "nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
"""What timm's transforms know, and nothing."""
_RESERVED = frozenset(
    {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "device", "dtype"}
    | {"scriptable", "exportable", "no_jit", "features_only", "feature_cls"}
    | set(inspect.signature(build_model_with_cfg).parameters)
) - {"kwargs"}
"""Arguments that control how a model is loaded, and do not define it."""
_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
BAD_CONFIG = (
    ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, NameError, OSError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip
"""What timm and torch raise when they build a model from senseless arguments."""


def read_config(path: Path) -> dict[str, Any]:
    """Read a ``config.json``, and check the entries that timm relies on.

    Raises:
        ArpHubError: If it cannot be read, is too large, or is not a model config.
    """
    try:
        found = read_json(path, LIMITS.config_bytes)
    except (OSError, ValueError) as error:
        raise ArpHubError(f"cannot read '{path}': {error}: save or download the model again") from error
    if not isinstance(found, dict) or not isinstance(found.get("architecture"), str):
        raise ArpHubError(f"'{path}' is not a timm model config: it names no architecture")
    for key in ("model_args", "pretrained_cfg"):
        if not isinstance(found.get(key, {}), dict):
            raise ArpHubError(f"'{path}' is not a timm model config: {key} must be an object, got {shown(found[key])}")
    return found


def check_args(args: Any, source: str) -> dict[str, Any]:
    """Check that a config's ``model_args`` are plain, small, and define only the model.

    Raises:
        ArpHubError: Naming the argument.
    """
    if not isinstance(args, Mapping):
        raise ArpHubError(f"the config of '{source}': model_args must be an object, got {shown(args)}")
    check_arguments(args, f"the config of '{source}': model_args must not hold")
    return dict(args)


def check_arguments(args: Mapping[str, Any], refused: str) -> None:
    """Check that arguments define a model and nothing else, and that their values are plain and small.

    Args:
        args: The arguments by name.
        refused: The beginning of a message, which the argument follows.

    Raises:
        ArpHubError: Naming the argument.
    """
    if reserved := sorted(str(key) for key in args if key in _RESERVED or str(key).startswith("pretrained")):
        raise ArpHubError(f"{refused} {reserved[0]!r}, which says how a model is loaded, and not what it is")
    for name, value in args.items():
        if name != "plan":  # RankPlan.from_dict checks it
            largest = LIMITS.classes if name == "num_classes" else LIMITS.number
            _check_value(value, f"{refused} this value of {shown(name)}: it", largest)


def check_cfg(cfg: Mapping[str, Any], source: str) -> None:
    """Check the entries of a pretrained_cfg that the model or its transforms are built from.

    Raises:
        ArpHubError: Naming the entry.
    """
    channels = cfg["input_size"][0] if _is_size(cfg.get("input_size")) else 3
    kinds: dict[str, tuple[Callable[[Any], bool], str]] = {
        "num_classes": (_is_count, f"a whole number up to {LIMITS.classes}"),
        "input_size": (_is_size, "three whole numbers of at least 1"),
        "test_input_size": (_is_size, "three whole numbers of at least 1"),
        "min_input_size": (_is_size, "three whole numbers of at least 1"),
        "mean": (partial(_are_numbers, channels), f"a finite number for each of {channels} channels"),
        "std": (partial(_are_numbers, channels, above=0), f"a number above 0 for each of {channels} channels"),
        "crop_pct": (_is_crop, "a number from 0.1 to 2"),
        "test_crop_pct": (_is_crop, "a number from 0.1 to 2"),
        "crop_mode": (_CROP_MODES.__contains__, f"one of {', '.join(_CROP_MODES[1:])}"),
        "interpolation": (_INTERPOLATIONS.__contains__, f"one of {', '.join(_INTERPOLATIONS[1:])}"),
        "label_names": (_is_list_of_text, "a list of names"),
        "classifier": (_is_name, "a name or a list of names"),
        "first_conv": (_is_name, "a name or a list of names"),
    }
    for key, (holds, wanted) in kinds.items():
        if cfg.get(key) is not None and not holds(cfg[key]):
            raise ArpHubError(f"the config of '{source}': {key} must be {wanted}, got {shown(cfg[key])}")


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors in a safetensors file. Only the header is read.

    Raises:
        ArpHubError: If it is not a whole safetensors file, or its header exceeds `LIMITS`.
    """
    try:
        with path.open("rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
        if LIMITS.header_bytes < size <= path.stat().st_size:
            raise ArpHubError(f"'{path}' has a header of {size:,} bytes, {LIMITS.header_bytes:,} are allowed")
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            if len(names) > LIMITS.tensors:
                raise ArpHubError(f"'{path}' declares {len(names)} tensors, more than the {LIMITS.tensors} allowed")
            if longest := next((name for name in names if len(name) > LIMITS.text), None):
                raise ArpHubError(
                    f"'{path}' declares a tensor name of {len(longest):,} characters, {LIMITS.text:,} are allowed"
                )
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (OSError, SafetensorError) as error:
        raise ArpHubError(f"'{path}' is not a whole safetensors file: {error}: save or download it again") from error


def check_build(
    build: Callable[[], nn.Module], header: Mapping[str, tuple[int, ...]], source: str, branches: int = 1
) -> None:
    """Build a model on the meta device, and stop once it outgrows what its weights declare.

    Args:
        build: Builds the dense model, as the saved config describes it.
        header: Shapes of the saved tensors, by name.
        source: Where the model comes from, for messages.
        branches: Most tensors that reparameterisation may have merged into one.

    Raises:
        ArpHubError: If the model would be larger than the weights allow, or cannot be built.
    """
    declared = sum(math.prod(shape) for shape in header.values())
    try:
        with (
            _bounded(branches * len(header) + LIMITS.slack_tensors, declared, source),
            torch.device("meta"),
            SkipInit(),
        ):
            build()
    except ArpHubError:
        raise
    except BAD_CONFIG as error:
        reason = " ".join(str(error).split())[:300]
        raise ArpHubError(
            f"the config of '{source}' describes a model that cannot be built: {type(error).__name__}: {reason}"
        ) from error


def check_tensors(tensors: Mapping[str, Tensor], model: nn.Module, source: str) -> None:
    """Check the types and values of saved weights.

    Raises:
        ArpHubError: If a value is NaN or infinite, or a tensor has another kind of type than the model's.
    """
    own = model.state_dict()
    for name, tensor in tensors.items():
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype not in _DTYPES:
            raise ArpHubError(f"the weights in '{source}': '{name}' holds {tensor.dtype}: save it as float32")
        expected = own.get(name)
        if expected is not None and expected.is_floating_point() != tensor.is_floating_point():
            raise ArpHubError(f"the weights in '{source}': '{name}' holds {tensor.dtype}, the model {expected.dtype}")
        if tensor.is_floating_point():
            if not bool(tensor.isfinite().all()):
                raise ArpHubError(f"the weights in '{source}': '{name}' holds NaN or infinite values")


@contextmanager
def _bounded(tensors: int, declared: int, source: str) -> Iterator[None]:
    """While the block runs, bound the parameters and buffers that modules of this thread register."""
    thread = threading.get_ident()
    parameters, numbers, buffered = 0, 0, 0

    def refuse(what: str) -> ArpHubError:
        return ArpHubError(
            f"the config of '{source}' describes a model with {what} than its weights could fill "
            f"({declared:,} numbers): it is damaged or malicious, do not use it"
        )

    def parameter(module: nn.Module, name: str, value: Tensor | None) -> None:
        nonlocal parameters, numbers
        if value is None or threading.get_ident() != thread:
            return
        parameters, numbers = parameters + 1, numbers + value.numel()
        if parameters > tensors:
            raise refuse("more tensors")
        if numbers > LIMITS.compression * declared + LIMITS.slack:
            raise refuse("far more parameters")

    def buffer(module: nn.Module, name: str, value: Tensor | None) -> None:
        nonlocal buffered
        if value is None or threading.get_ident() != thread:
            return
        buffered += value.numel()
        if buffered > declared + LIMITS.slack:
            raise refuse("larger buffers")

    handles = [
        hooks.register_module_parameter_registration_hook(parameter),
        hooks.register_module_buffer_registration_hook(buffer),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_value(value: Any, what: str, largest: int) -> None:
    for count, (item, depth) in enumerate(_parts(value)):
        if depth > LIMITS.depth or count > LIMITS.items:
            raise ArpHubError(f"{what} is nested too deeply or too long")
        if isinstance(item, str) and len(item) > LIMITS.text:
            raise ArpHubError(f"{what} holds a text of {len(item)} characters")
        if isinstance(item, (int, float)) and not isinstance(item, bool) and not abs(item) <= largest:
            raise ArpHubError(f"{what} holds the number {shown(item)}, which is beyond {largest}")


def _parts(value: Any, depth: int = 0) -> Iterator[tuple[Any, int]]:
    """A value and all its parts with their depths, down to the allowed depth."""
    yield value, depth
    if depth <= LIMITS.depth:
        inner = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
        for item in inner if isinstance(inner, (list, tuple)) else ():
            yield from _parts(item, depth + 1)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LIMITS.classes


def _is_size(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 3 and all(_is_count(n) and n > 0 for n in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def _are_numbers(channels: int, value: Any, above: float = -math.inf) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) not in (1, 3, channels):  # timm repeats one number
        return False
    return all(_is_number(number) and number > above for number in value)


def _is_crop(value: Any) -> bool:
    return _is_number(value) and (value == 0 or 0.1 <= value <= 2)  # 0 is timm's default


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, (list, tuple, dict)) and all(isinstance(name, str) for name in value)


def _is_name(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) <= 16 and all(isinstance(name, str) for name in value)
    return isinstance(value, str)
