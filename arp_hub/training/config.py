"""The settings of a training run: one dataclass, checked when it is built, from code, YAML or the command line."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm.optim
import yaml

from .._utils.files import read_text, write_atomically
from .._utils.parse import parse_yaml, shown
from ..errors import ArpHubError, checked_path
from ..hub.load import is_saved_model
from .config_fields import check_needs, checked, nearest, without_effect
from .config_run import BudgetSettings, DataSettings, PhaseSettings, RunSettings
from .config_training import AugmentationSettings, LossSettings, OptimisationSettings

ARGUMENTS = {"drop": "drop_rate", "drop_path": "drop_path_rate", "img_size": "img_size"}
"""Settings that are arguments of the model, with timm's names of these."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    RunSettings,  # the fields of the last base come first
    LossSettings,
    AugmentationSettings,
    OptimisationSettings,
    PhaseSettings,
    BudgetSettings,
    DataSettings,
):
    """All settings of a run. Equal settings give equal numbers on the same machine.

    Raises:
        ArpHubError: If a value is of the wrong type or out of range, naming the setting and the way out.

    Example:
        >>> config = TrainConfig(model="cifar_resnet20", data="digits", keep_params=0.35, epochs=10)
        >>> config.run_folder.as_posix()
        'runs/cifar_resnet20-run'
    """

    def __post_init__(self) -> None:
        hints, fields = typing.get_type_hints(type(self)), dataclasses.fields(self)
        for field in fields:
            object.__setattr__(self, field.name, checked(field, hints, getattr(self, field.name)))
        if not self.model:
            raise ArpHubError("model is not set: give a timm name, a saved folder or hf-hub:USER/NAME")
        if (self.keep_params is None) == (self.keep_macs is None):
            given = "none" if self.keep_params is None else "both"
            raise ArpHubError(f"set one budget, keep_params or keep_macs (got {given})")
        check_needs({field.name: getattr(self, field.name) for field in fields}, fields)
        for name in ("output", "checkpoint", "teacher_checkpoint", "resume"):
            if getattr(self, name).startswith("~/"):  # no shell has read a configuration file
                object.__setattr__(self, name, str(Path(getattr(self, name)).expanduser()))
        self._check_output()
        self._check_phases()
        self._check_batches()
        self._check_optimisation()
        if not self.output:
            object.__setattr__(self, "output", f"runs/{self.model.split(':')[-1].strip('/').replace('/', '_')}")

    def _check_phases(self) -> None:
        if self.calibration_images == 0 and self.start_from == "fit":
            raise ArpHubError(
                "start_from='fit' needs calibration images: set calibration_images, or start_from='dense'"
            )
        if self.calibration_copies and self.calibration_images == 0:
            raise ArpHubError(
                f"calibration_copies={self.calibration_copies} has no effect with calibration_images=0: set "
                "calibration_images, or leave calibration_copies out"
            )
        if self.teacher and not self.distill:
            raise ArpHubError(f"teacher='{self.teacher}' has no effect with distill=0: set distill, for example 0.9")
        if self.teacher_checkpoint and not self.teacher:
            raise ArpHubError(f"teacher_checkpoint='{self.teacher_checkpoint}' needs the teacher's name: set teacher")
        if self.epochs == 0 and self.start_from == "dense":
            raise ArpHubError(
                "epochs=0 means no penalty training, which needs start_from='fit': set it, or raise epochs"
            )
        if self.refine_minutes and self.refine_steps:
            raise ArpHubError(
                f"refine_minutes={self.refine_minutes:g} and refine_steps={self.refine_steps} both bound the "
                "refinement: set one of them"
            )
        if (self.refine_minutes or self.refine_steps) and self.start_from == "dense":
            name = "refine_minutes" if self.refine_minutes else "refine_steps"
            raise ArpHubError(
                f"{name}={getattr(self, name):g} refines the fit, and start_from='dense' makes none: set {name}=0, or "
                "start_from='fit'"
            )
        for name, argument in ARGUMENTS.items():
            if getattr(self, name) and argument in (self.model_kwargs or {}):
                raise ArpHubError(f"{name}={getattr(self, name)} and {argument} in model_kwargs are the same: give one")

    def _check_output(self) -> None:
        if self.output and not Path(self.output).name:
            raise ArpHubError(f"output='{self.output}' names no folder to write: give one such as runs/mine")

    def _check_batches(self) -> None:
        if (self.mixup or self.cutmix) and self.batch_size // self.accumulation % 2:
            raise ArpHubError(
                f"mixup and cutmix mix pairs of images, but batch_size={self.batch_size} in "
                f"accumulation={self.accumulation} parts leaves an odd number: choose a multiple of "
                f"{2 * self.accumulation}"
            )
        if self.aug_repeats > self.batch_size:
            raise ArpHubError(
                f"aug_repeats={self.aug_repeats} versions of an image do not fit into batch_size={self.batch_size}: "
                "lower aug_repeats"
            )
        if self.cuda_graphs and self.accumulation > 1:
            raise ArpHubError(f"cuda_graphs records a whole batch, so accumulation={self.accumulation} must be 1")
        if self.cuda_graphs and self.torchcompile:
            raise ArpHubError(f"cuda_graphs and torchcompile={self.torchcompile} exclude each other: choose one")

    def _check_optimisation(self) -> None:
        if self.optimizer.lower() not in (optimizers := [str(name) for name in timm.optim.list_optimizers()]):
            raise ArpHubError(f"optimizer: timm has no '{self.optimizer}'{nearest(self.optimizer, optimizers)}")
        if self.min_lr and self.schedule not in (ending := ("cosine", "poly", "tanh")):
            raise ArpHubError(
                f"min_lr={self.min_lr} has no effect with schedule={self.schedule}: choose {' or '.join(ending)}, or "
                "leave min_lr out"
            )
        for name, rate in self.rates().items():
            if self.min_lr > rate:
                raise ArpHubError(f"min_lr={self.min_lr} is above {name}={rate:g}: lower min_lr")

    def rates(self) -> dict[str, float]:
        """The peak learning rate of each phase that trains, by the name of its setting."""
        rates = {"lr": self.lr} if self.epochs else {}
        if self.dense_epochs:
            rates["dense_lr"] = self.dense_lr or self.lr
        if self.finetune_epochs:
            rates["finetune_lr"] = self.finetune_lr or self.lr / 10
        return rates

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
        """Write the settings as YAML that `read_config` and ``--config`` take.

        ``overwrite`` is left out: a later run with these settings must not delete what it finds.
        """
        kept = {name: value for name, value in self.to_dict().items() if name != "overwrite"}
        write_atomically(path, yaml.safe_dump(kept, sort_keys=False))

    @classmethod
    def from_layers(cls, *layers: Mapping[str, Any]) -> TrainConfig:
        """Build a config from dictionaries. Later ones take precedence.

        A budget replaces an earlier budget of the other kind. Trained weights replace earlier ``dense_epochs``. A
        dictionary that sets both keeps both. What turns a setting off also drops earlier ones that need it, such as
        ``dense_lr``.

        Raises:
            ArpHubError: If a key is unknown, with the nearest right one, or a value is bad.
        """
        merged: dict[str, Any] = {}
        origin: dict[str, int] = {}  # the last layer that sets a name, or turns it off
        for number, layer in enumerate(map(without_retired, layers)):
            check_names(layer)
            for budget, other in (("keep_params", "keep_macs"), ("keep_macs", "keep_params")):
                if layer.get(budget) is not None and layer.get(other) is None:
                    merged.pop(other, None)
            trained = layer.get("checkpoint") or layer.get("pretrained") or is_saved_model(layer.get("model") or "")
            if trained and "dense_epochs" not in layer:
                merged.pop("dense_epochs", None)
                origin["dense_epochs"] = number
            merged.update(layer)
            origin.update(dict.fromkeys(layer, number))
        for name, needs in idle_settings(merged).items():
            if max(origin.get(need, 0) for need in needs) > origin[name]:
                del merged[name]
        return cls(**merged)


def read_config(path: str | Path) -> dict[str, Any]:
    """Settings from a YAML file.

    Raises:
        ArpHubError: If the file cannot be read, or does not hold known settings.
    """
    path = checked_path(path, "config")
    if not path.exists():
        raise ArpHubError(f"there is no config '{path}': --print-config > {path} writes one with every setting")
    try:
        data = parse_yaml(read_text(path))
    except (OSError, ValueError) as error:
        raise ArpHubError(f"cannot read the config '{path}': {error}") from error
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ArpHubError(f"the config '{path}' must be a list of 'setting: value' lines, got {type(data).__name__}")
    data = without_retired(data)
    try:
        check_names(data)
    except ArpHubError as error:
        raise ArpHubError(f"the config '{path}': {error}") from error
    return data


def idle_settings(settings: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Settings that have no effect beside the others, with what they need; missing ones have their default.

    Raises:
        ArpHubError: If a value is bad.
    """
    hints, fields = typing.get_type_hints(TrainConfig), dataclasses.fields(TrainConfig)
    values = {field.name: checked(field, hints, settings.get(field.name, field.default)) for field in fields}
    return without_effect(values, fields)


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
