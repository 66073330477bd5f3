"""The command line of the recipes: one option for each setting of `TrainConfig`, with the recipe's defaults."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from tqdm.contrib.logging import logging_redirect_tqdm

from ..errors import ArpHubError
from ..processes import first_to_end
from .config import TrainConfig, read_config
from .config_fields import GROUPS, nearest
from .config_text import commented_yaml
from .preemption import EXIT_CODE, Preempted
from .trainer import run

_EPILOG = """
examples:
  accelerate launch {name}
      with the defaults, on the GPUs chosen in `accelerate config`, or in one CPU process
  python -m torch.distributed.run --nproc_per_node 2 {name} --cpu
      in two CPU processes (or, without --cpu, on two GPUs)
  python {name} --max-steps 3
      a trial run through every phase
  python {name} --config my.yaml --lr 0.02
      settings from a file, one of them overridden
  python {name} --print-config > my.yaml
      all settings with their help, as a file to edit
  python {name} --resume
      continue a stopped run with the same settings

The command line takes precedence over the --config file, which takes precedence over the defaults above. The finished
model is in OUTPUT; checkpoints, log.jsonl and config.yaml (which --config reads) are in OUTPUT-run.
Exit codes: 0 success, 2 bad input, 130 interrupted, 75 stopped by SIGTERM (continue with --resume).
"""


def main(description: str, **defaults: Any) -> dict[str, Any]:
    """Run a recipe from the command line.

    Args:
        description: What the recipe does, for the top of ``--help``.
        **defaults: The recipe's settings.

    Returns:
        The numbers of the run, as `arp_hub.training.run` gives them. Bad input ends the process with code 2 and one
        line on stderr.
    """
    logging.basicConfig(level=logging.INFO if _is_main() else logging.ERROR, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "httpx2", "huggingface_hub", "datasets", "timm", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        config = parse_command(description, defaults, sys.argv[1:])
        with logging_redirect_tqdm():
            return run(config)
    except KeyboardInterrupt as stop:
        how = str(stop) or "Continue from the last checkpoint with --resume auto"
        _end(f"interrupted. {how}", 130)
    except Preempted as stop:
        _end(str(stop), EXIT_CODE)
    except ArpHubError as error:
        _end(f"error: {error}", 2)


def _end(why: str, code: int) -> NoReturn:
    """End this process. Of several, one prints why."""
    if first_to_end():
        print(why, file=sys.stderr, flush=True)
    sys.exit(code)


def parse_command(description: str, defaults: dict[str, Any], arguments: Sequence[str]) -> TrainConfig:
    """Settings from a recipe's defaults, a ``--config`` file and command-line options. Later ones take precedence.

    With ``--print-config``, the settings are printed and the process ends.

    Raises:
        ArpHubError: If an option is unknown or a value is invalid.
    """
    parser = _parser(description, defaults)
    given, rest = parser.parse_known_args(arguments)
    if rest:
        known = [f"--{setting.name.replace('_', '-')}" for setting in dataclasses.fields(TrainConfig)]
        raise ArpHubError(f"unknown option '{rest[0]}'{nearest(rest[0].split('=')[0], known)}")
    options = vars(given)
    file, wanted = options.pop("config", None), options.pop("print_config", False)
    config = TrainConfig.from_layers(defaults, read_config(file) if file else {}, options)
    if wanted:
        if _is_main():
            print(commented_yaml(config), end="")
        sys.exit()
    return config


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ArpHubError(message)


def _parser(description: str, defaults: dict[str, Any]) -> argparse.ArgumentParser:
    parser = _Parser(
        usage="%(prog)s [options]",
        description=description,
        epilog=_EPILOG.replace("{name}", sys.argv[0]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="settings from a YAML file")
    parser.add_argument("--print-config", action="store_true", help="print all settings as YAML to edit, and stop")
    groups = {group: parser.add_argument_group(group) for group in GROUPS}
    for setting in dataclasses.fields(TrainConfig):
        default = defaults.get(setting.name, setting.default)
        groups[setting.metadata["group"]].add_argument(
            f"--{setting.name.replace('_', '-')}",
            help=setting_help(setting, default).replace("%", "%%"),
            **_shape(setting),
        )
    return parser


def _shape(setting: dataclasses.Field[Any]) -> dict[str, Any]:
    """The number of words that an option takes. `TrainConfig` checks their types, as it does for YAML."""
    if setting.type == "bool":
        return {"action": argparse.BooleanOptionalAction}
    if str(setting.type).startswith("tuple"):
        return {"nargs": "*", "metavar": "NAME"}
    if str(setting.type).startswith("dict"):
        return {"nargs": "*", "metavar": "NAME=VALUE"}
    shape = {"metavar": "CHECKPOINT" if setting.name == "resume" else setting.name.upper().split("_")[-1]}
    if bare := setting.metadata.get("bare"):
        shape |= {"nargs": "?", "const": bare}
    return shape


def setting_help(setting: dataclasses.Field[Any], default: Any) -> str:
    """What a setting does, its choices and its default."""
    text = setting.metadata["help"]
    choices = setting.metadata.get("choices")
    parts = [f"one of {', '.join(choices)}"] if choices else []
    if default not in (None, "", (), False):
        words = [f"{name}={value}" for name, value in default.items()] if isinstance(default, dict) else default
        parts.append(f"default: {' '.join(words) if isinstance(words, (list, tuple)) else words}")
    return f"{text} ({'; '.join(parts)})" if parts else text


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"
