"""The settings of a training run: one dataclass, checked when it is built, from code, YAML or the command line."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm.optim
import yaml

from .._utils.files import read_text, write_atomically
from .._utils.parse import parse_yaml, shown
from ..effort import EFFORTS
from ..errors import ArpHubError, checked_path
from ..models.arguments import plain_arguments, read_arguments
from ..schemes import SCHEMES

GROUPS = ("model and data", "budget", "phases", "optimisation", "regularisation", "run")
"""Headings of the settings, in the order of ``--help``."""


def _setting(group: str, default: Any, help: str, **limits: Any) -> Any:
    """A field with its help, its heading, and its ``low``, ``high``, ``above``, ``below`` or ``choices``."""
    return dataclasses.field(default=default, metadata={"group": group, "help": help, **limits})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of a run. Equal settings give equal numbers on the same machine.

    Raises:
        ArpHubError: If a value is of the wrong type or out of range, naming the setting and the way out.

    Example:
        >>> config = TrainConfig(model="cifar_resnet20", data="digits", keep_params=0.35, epochs=10)
        >>> config.run_folder.as_posix()
        'runs/cifar_resnet20-run'
    """

    model: str = _setting("model and data", "", "a timm name, local-dir:FOLDER or hf-hub:USER/NAME")
    checkpoint: str = _setting("model and data", "", "weights of the dense model: a safetensors or torch weights file")
    model_kwargs: dict[str, Any] | None = _setting(
        "model and data", None, "arguments of the model, such as img_size=112 pad_type=same; kept with the saved model"
    )
    pretrained: bool = _setting("model and data", False, "start from the weights published under a timm name")
    data: str = _setting(
        "model and data",
        "digits",
        "'digits', a folder of parquet files, tar shards or class folders, a pattern of shards, a Hub id, timm:NAME",
    )
    data_dir: str = _setting("model and data", "", "folder of a data set of timm")
    train_split: str = _setting("model and data", "", "split to train on; by default train")
    test_split: str = _setting("model and data", "", "split to test on; by default test, or else validation")
    streaming: bool = _setting(
        "model and data", False, "read tar shards, parquet files or a Hub dataset in order, without a download"
    )
    epoch_images: int = _setting(
        "model and data", 0, "images of an epoch of a stream; 0: all training images, where the data tells them", low=0
    )
    image_key: str = _setting("model and data", "", "image column; by default the one of type Image")
    label_key: str = _setting("model and data", "", "label column; by default the one of type ClassLabel")
    val_fraction: float = _setting(
        "model and data", 0.0, "share of the training images held out for validation", low=0, below=1
    )
    max_bad_images: int = _setting(
        "model and data",
        0,
        "images of a split that may fail to decode; each is named and becomes the mean colour",
        low=0,
    )
    workers: int = _setting("model and data", 4, "DataLoader workers of each process, for large images", low=0)

    keep_params: float | None = _setting("budget", None, "share of the parameters to keep", above=0, below=1)
    keep_macs: float | None = _setting("budget", None, "share of the multiply-accumulates to keep", above=0, below=1)
    schemes: tuple[str, ...] = _setting("budget", (), "schemes to choose from; by default all", choices=tuple(SCHEMES))
    rank_multiple: int = _setting("budget", 1, "ranks are multiples of this", low=1)
    exclude: tuple[str, ...] | None = _setting(
        "budget", None, "layers that stay dense, by name or pattern; by default the first convolution"
    )
    calibration_images: int | None = _setting(
        "budget",
        None,
        "unlabelled training images for plan and fit; by default 1,024 small or 256 large; 0: none",
        low=0,
    )
    calibration_copies: int | None = _setting(
        "budget",
        None,
        "augmented copies added for each calibration image; by default 1 for small images, 0 for large ones",
        low=0,
    )

    effort: str = _setting(
        "budget", "balanced", "preset that trades CPU time of plan and fit for accuracy", choices=tuple(EFFORTS)
    )

    dense_epochs: int = _setting("phases", 0, "epochs of dense training before the plan is made", low=0)
    epochs: int = _setting(
        "phases",
        10,
        "epochs of penalty training, ramp and hold together; 0: none, so that fine-tuning starts from the fit",
        low=0,
    )
    ramp: float = _setting(
        "phases", 0.65, "share of penalty training that is the ramp; the rest is the hold", low=0, below=1
    )
    refine_minutes: float = _setting(
        "phases", 0.0, "minutes of refining the fit on unlabelled images, before the penalty; 0: none", low=0
    )
    refine_images: int = _setting("phases", 1000, "training images to refine the fit on", low=20)
    finetune_epochs: int = _setting("phases", 0, "epochs of fine-tuning the factors after decomposition", low=0)
    start_from: str = _setting(
        "phases",
        "fit",
        "whether penalty training starts from the data-aware fit or from the dense model",
        choices=("fit", "dense"),
    )
    freeze_norms: bool = _setting(
        "phases", False, "keep BatchNorm statistics fixed in penalty training and fine-tuning"
    )
    max_steps: int = _setting(
        "phases",
        0,
        "trial run: at most this many steps in each phase, with few images for fit and test; 0: no limit",
        low=0,
    )

    batch_size: int = _setting("optimisation", 128, "images per optimiser step, over all processes", low=1)
    accumulation: int = _setting(
        "optimisation", 1, "forward passes into which each process splits its share of a batch", low=1
    )
    optimizer: str = _setting("optimisation", "sgd", "timm optimiser")
    lr: float = _setting("optimisation", 0.05, "learning rate of penalty training", above=0)
    dense_lr: float | None = _setting("optimisation", None, "learning rate of dense training; by default lr", above=0)
    finetune_lr: float | None = _setting(
        "optimisation", None, "learning rate of fine-tuning; by default lr / 10", above=0
    )
    weight_decay: float = _setting("optimisation", 1e-4, "weight decay", low=0)
    momentum: float = _setting("optimisation", 0.9, "momentum", low=0, below=1)
    schedule: str = _setting(
        "optimisation", "cosine", "timm schedule", choices=("cosine", "multistep", "poly", "step", "tanh")
    )
    warmup_epochs: float = _setting("optimisation", 0.0, "epochs in which the learning rate rises from 0", low=0)
    clip_grad: float = _setting("optimisation", 0.0, "largest gradient norm; 0: off", low=0)
    channels_last: bool = _setting(
        "optimisation", True, "channels-last memory layout, in which most convolutions run faster"
    )
    mixed_precision: str = _setting(
        "optimisation", "no", "number format of the forward pass", choices=("no", "bf16", "fp16")
    )
    cuda_graphs: bool = _setting(
        "optimisation", False, "replay each step from CUDA graphs: faster for small networks on one GPU"
    )

    distill: float = _setting(
        "regularisation",
        0.0,
        "weight of distillation from the teacher, by default the dense model; the labels get 1 - weight",
        low=0,
        high=1,
    )
    temperature: float = _setting("regularisation", 4.0, "temperature of distillation", above=0)
    teacher: str = _setting(
        "regularisation", "", "another model to distil from: a timm name, local-dir:FOLDER or hf-hub:USER/NAME"
    )
    teacher_checkpoint: str = _setting("regularisation", "", "weights of the teacher; by default those of its name")
    smoothing: float = _setting("regularisation", 0.0, "label smoothing", low=0, below=1)
    mixup: float = _setting("regularisation", 0.0, "mixup alpha; 0: off", low=0)
    cutmix: float = _setting("regularisation", 0.0, "cutmix alpha; 0: off", low=0)
    auto_augment: str = _setting(
        "regularisation", "", "timm augmentation in addition to crops and flips, such as rand-m9-mstd0.5"
    )
    ema_decay: float = _setting("regularisation", 0.0, "decay of the weights' moving average; 0: off", low=0, below=1)

    output: str = _setting("run", "", "folder for the finished model; by default runs/MODEL")
    resume: str = _setting("run", "", "checkpoint folder to resume from; 'auto': the newest one of this output, if any")
    overwrite: bool = _setting("run", False, "replace a finished model and start a new run")
    push_to_hub: str = _setting("run", "", "USER/NAME to publish the finished model as; checked before training")
    hub_private: bool = _setting("run", False, "make a new repository on the Hub private")
    seed: int = _setting("run", 0, "seed of every random choice", low=0, high=2**32 - 1)
    checkpoint_every: int = _setting("run", 0, "steps between checkpoints; 0: one per epoch", low=0)
    keep_checkpoints: int = _setting("run", 2, "checkpoints to keep", low=1)
    log_every: int = _setting("run", 50, "steps between tracker entries", low=1)
    tracker: str = _setting("run", "tensorboard", "experiment tracker of Accelerate, or none; skipped if not installed")
    cpu: bool = _setting("run", False, "use CPUs even if there is a GPU; required for several CPU processes")

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            value = parse(setting, getattr(self, setting.name))
            _check(setting, value)
            object.__setattr__(self, setting.name, value)
        if not self.model:
            raise ArpHubError("model is not set: give a timm name, local-dir:FOLDER or hf-hub:USER/NAME")
        if (self.keep_params is None) == (self.keep_macs is None):
            given = "none" if self.keep_params is None else "both"
            raise ArpHubError(f"set one budget, keep_params or keep_macs (got {given})")
        if self.calibration_images == 0 and self.start_from == "fit":
            raise ArpHubError(
                "start_from='fit' needs calibration images: set calibration_images, or start_from='dense'"
            )
        if self.teacher and not self.distill:
            raise ArpHubError(f"teacher='{self.teacher}' has no effect with distill=0: set distill, for example 0.9")
        if self.teacher_checkpoint and not self.teacher:
            raise ArpHubError(f"teacher_checkpoint='{self.teacher_checkpoint}' needs the teacher's name: set teacher")
        if self.epochs == 0 and self.start_from == "dense":
            raise ArpHubError(
                "epochs=0 means no penalty training, which needs start_from='fit': set it, or raise epochs"
            )
        if self.refine_minutes and self.start_from == "dense":
            raise ArpHubError(
                f"refine_minutes={self.refine_minutes:g} refines the fit, and start_from='dense' makes none: set "
                "refine_minutes=0, or start_from='fit'"
            )
        if (self.mixup or self.cutmix) and self.batch_size // self.accumulation % 2:
            raise ArpHubError(
                f"mixup and cutmix mix pairs of images, but batch_size={self.batch_size} in "
                f"accumulation={self.accumulation} parts leaves an odd number: choose a multiple of "
                f"{2 * self.accumulation}"
            )
        if self.cuda_graphs and self.accumulation > 1:
            raise ArpHubError(f"cuda_graphs records a whole batch, so accumulation={self.accumulation} must be 1")
        if self.optimizer.lower() not in (optimizers := [str(name) for name in timm.optim.list_optimizers()]):
            raise ArpHubError(f"optimizer: timm has no '{self.optimizer}'{nearest(self.optimizer, optimizers)}")
        if not self.output:
            object.__setattr__(self, "output", f"runs/{self.model.split(':')[-1].strip('/').replace('/', '_')}")

    @property
    def run_folder(self) -> Path:
        """Checkpoints, log and settings of the run: a folder beside the finished model."""
        output = Path(self.output)
        return output.with_name(output.name + "-run")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML or JSON hold them."""
        plain = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    def save(self, path: Path) -> None:
        """Write the settings as YAML that `read_config` and ``--config`` take."""
        write_atomically(path, yaml.safe_dump(self.to_dict(), sort_keys=False))

    @classmethod
    def from_layers(cls, *layers: Mapping[str, Any]) -> TrainConfig:
        """Build a config from dictionaries. Later ones take precedence.

        A budget replaces an earlier budget of the other kind. Trained weights replace earlier ``dense_epochs``. A
        dictionary that sets both keeps both.

        Raises:
            ArpHubError: If a key is unknown, with the nearest right one, or a value is bad.
        """
        merged: dict[str, Any] = {}
        for layer in map(without_retired, layers):
            check_names(layer)
            for budget, other in (("keep_params", "keep_macs"), ("keep_macs", "keep_params")):
                if layer.get(budget) is not None and layer.get(other) is None:
                    merged.pop(other, None)
            if (layer.get("checkpoint") or layer.get("pretrained")) and "dense_epochs" not in layer:
                merged.pop("dense_epochs", None)
            merged.update(layer)
        return cls(**merged)


def read_config(path: str | Path) -> dict[str, Any]:
    """Settings from a YAML file.

    Raises:
        ArpHubError: If the file cannot be read, or does not hold known settings.
    """
    path = checked_path(path, "config")
    try:
        data = parse_yaml(read_text(path))
    except (OSError, ValueError) as error:
        raise ArpHubError(f"cannot read the config '{path}': {error}") from error
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ArpHubError(f"the config '{path}' must be a list of 'setting: value' lines, got {type(data).__name__}")
    data = without_retired(data)
    check_names(data)
    return data


def without_retired(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those that older versions had and that allow one value only.

    Raises:
        ArpHubError: If such a setting has another value.
    """
    if settings.get("method", "tracking") != "tracking":
        raise ArpHubError(
            f"method={shown(settings['method'])}: the penalty has one method, 'tracking': leave method out"
        )
    return {name: value for name, value in settings.items() if name != "method"}


def check_names(layer: Mapping[Any, Any]) -> None:
    """Refuse unknown settings, with the nearest right name."""
    known = [setting.name for setting in dataclasses.fields(TrainConfig)]
    for name in layer:
        if name not in known:
            raise ArpHubError(f"unknown setting '{name}'{nearest(str(name), known)}")


def nearest(name: str, known: list[str]) -> str:
    """The end of an error message: the known name most similar to ``name``, or where to find all names."""
    near = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    return f": did you mean '{near[0]}'?" if near else " (--help lists all settings)"


def parse(setting: dataclasses.Field[Any], value: Any) -> Any:
    """A value converted to the type of its setting. The command line and YAML may give text.

    Raises:
        ArpHubError: If it is not of that type.
    """
    kind, optional = _kind(setting)
    if value is None and optional:
        return None
    if kind is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if isinstance(items, (list, tuple)) and all(isinstance(item, str) for item in items):
            return tuple(item for item in items if item)
    elif kind is dict:
        if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
            return plain_arguments(value, setting.name)
        if isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value):
            return read_arguments(value, setting.name)
    elif kind is bool:
        if isinstance(value, bool):
            return value
    elif kind is str:
        if isinstance(value, (str, Path)):
            return str(value)
    elif not isinstance(value, bool):
        try:
            number = kind(value)
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is not None and (isinstance(value, str) or number == value):
            return number
    names = {
        tuple: "a list of words",
        dict: "a table of NAME: VALUE",
        bool: "true or false",
        str: "text",
        int: "a whole number",
        float: "a number",
    }
    raise ArpHubError(f"{setting.name} must be {names[kind]}, got {shown(value)}")


def _kind(setting: dataclasses.Field[Any]) -> tuple[Any, bool]:
    """The plain type of a field, and whether None is allowed."""
    kind = typing.get_type_hints(TrainConfig)[setting.name]
    if isinstance(kind, types.UnionType):
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
        return typing.get_origin(kind) or kind, True
    return typing.get_origin(kind) or kind, False


def _check(setting: dataclasses.Field[Any], value: Any) -> None:
    limits = setting.metadata
    if choices := limits.get("choices"):
        for item in value if isinstance(value, tuple) else (value,):
            if item not in choices:
                raise ArpHubError(f"{setting.name}: unknown value '{item}': choose from {', '.join(choices)}")
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    tests = {
        "low": ("at least", value >= limits.get("low", value)),
        "above": ("above", value > limits.get("above", -math.inf)),
        "high": ("at most", value <= limits.get("high", value)),
        "below": ("below", value < limits.get("below", math.inf)),
    }
    if not math.isfinite(value) or not all(holds for _, holds in tests.values()):
        allowed = " and ".join(f"{words} {limits[name]}" for name, (words, _) in tests.items() if name in limits)
        raise ArpHubError(f"{setting.name} must be {allowed or 'finite'}, got {value}")
