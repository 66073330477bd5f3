"""The settings of a run as YAML to edit: every setting in its group, with its help as a comment."""

from __future__ import annotations

import dataclasses
import textwrap

import yaml

from .config import TrainConfig
from .config_fields import GROUPS


def commented_yaml(config: TrainConfig) -> str:
    r"""All settings as YAML with comments, which ``--config`` and `read_config` take.

    Args:
        config: The settings.

    Example:
        >>> config = TrainConfig(model="cifar_resnet20", keep_params=0.35)
        >>> print(commented_yaml(config).split("\n\n")[2])
        # a timm name, a saved folder or hf-hub:USER/NAME
        model: cifar_resnet20
    """
    values = config.to_dict()
    parts = ["# The settings of a run. Edit this file and pass it to a recipe with --config FILE."]
    for group in GROUPS:
        parts.append(f"# {group.upper()}")
        for setting in dataclasses.fields(TrainConfig):
            if setting.metadata["group"] == group:
                value = yaml.safe_dump({setting.name: values[setting.name]}, sort_keys=False, allow_unicode=True)
                parts.append(f"{_comment(setting)}\n{value.strip()}")
    return "\n\n".join(parts) + "\n"


def _comment(setting: dataclasses.Field[object]) -> str:
    text = setting.metadata["help"]
    if choices := setting.metadata.get("choices"):
        text += f" (one of {', '.join(choices)})"
    return textwrap.fill(text, 96, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
