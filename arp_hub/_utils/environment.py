"""Facts to reproduce a measurement: the command, hardware and versions of this process."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .secrets import redact

RECIPES = (
    "any_backbone.py cifar_resnet110.py cifar_resnet20.py cifar_resnet56.py cifar_vgg16.py custom_loop.py "
    "quickstart.py resnet50.py vit.py"
).split()
"""Scripts under ``recipes/`` of the repository."""
MODULE = "__main__.py"
"""Recorded name of ``python -m arp_hub``."""
_PACKAGES = ("arp-hub", "torch", "timm", "accelerate", "safetensors")


def environment() -> dict[str, Any]:
    """The facts of this process, in the format of ``metrics.json``.

    Returns:
        ``hardware``, ``versions`` and, unless in a notebook or shell, ``command``.

    Example:
        >>> sorted(environment()["hardware"])[:2]
        ['cores', 'cpu']
    """
    facts: dict[str, Any] = {"hardware": _hardware(), "versions": _versions()}
    if command := _command():
        facts["command"] = command
    return facts


def _command() -> str | None:
    """The command line without tokens, and without the folders of this machine: it may be published."""
    path = Path(sys.argv[0] if sys.argv else "")
    if path.name in ("", "-c", "-m") or hasattr(sys, "ps1") or "ipykernel" in path.name:
        return None
    return redact(shlex.join([_program(path), *(without_machine(word) for word in sys.argv[1:])]))


def _program(path: Path) -> str:
    """The name of the running script, after ``./`` if it only shares its name with a program of the project."""
    folder = path.absolute().parent
    if path.name == MODULE:
        ours = folder.resolve() == Path(__file__).resolve().parents[1]
    else:
        ours = path.name not in RECIPES or (folder.name == "recipes" and (folder / RECIPES[0]).is_file())
    return path.name if ours else f"./{path.name}"


def without_machine(word: str) -> str:
    """A word of a command line, or the name of a model or of data, without the folders of this machine.

    Of an absolute path, what is below the working directory stays, or else the last name.
    """
    option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    kind = next((kind for kind in ("local-dir:", "timm:", "wds:") if value.startswith(kind)), "")
    path = Path(value.removeprefix(kind))
    if not path.is_absolute():
        return word
    here = Path.cwd()
    return option + equals + kind + (path.relative_to(here).as_posix() if path.is_relative_to(here) else path.name)


def _hardware() -> dict[str, Any]:
    hardware: dict[str, Any] = {"cpu": _cpu_name(), "instructions": torch.backends.cpu.get_cpu_capability()}
    hardware |= {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        hardware["gpu"] = torch.cuda.get_device_name()
    return hardware


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    if names:
        return names[0]
    parts = [line for line in lines if line.startswith(("CPU implementer", "CPU part"))]  # of ARM, which has no names
    numbers = sorted({line.partition(":")[2].strip() for line in parts})
    return " ".join([platform.processor() or platform.machine(), *numbers])


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
