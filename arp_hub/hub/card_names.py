"""What a card says of places on the machine that made it: names of data sets, teachers and commands, never paths."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

import timm

from .._utils.environment import MODULE, RECIPES

_DATA = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "digits": "scikit-learn's digits",
    "imagenet": "ImageNet",
    "imagenet-1k": "ImageNet",
    "imagenet-sample": "a sample of ImageNet",
    "imagenet-val": "ImageNet",
    "mnist": "MNIST",
}
"""Names that readers know, by the last part of a folder's or a Hub id's name."""
_PROGRAMS = {"arp-hub": "arp-hub", MODULE: "python -m arp_hub"} | {name: f"python recipes/{name}" for name in RECIPES}
"""Programs of the project by their recorded name."""
_OWN_OPTIONS = {
    "--checkpoint-every": 1,
    "--hub-private": 0,
    "--json": 0,
    "--keep-checkpoints": 1,
    "--log-every": 1,
    "--overwrite": 0,
    "--push-to-hub": 1,
    "--resume": 1,
    "--tracker": 1,
    "--workers": 1,
}
"""Options that change nothing in the model, with the number of their values: a printed command leaves them out."""

_FILES = (".safetensors", ".pth", ".pt", ".bin", ".json", ".yaml", ".yml")
"""Endings of files that only the author has."""
_FILE_OPTIONS = ("--checkpoint", "--plan", "--teacher-checkpoint")
"""Options whose value is a file, whatever its name."""
_MODEL_OPTIONS = ("--model", "--teacher")


def data_name(metrics: Mapping[str, Any]) -> str:
    """The data set by its name: an id on the Hub with a link, or the last part of a folder's name; else empty."""
    dataset = str(metrics.get("dataset") or "")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", dataset):
        configuration = _configuration(metrics)
        named = f", configuration `{inline(configuration)}`" if configuration else ""
        return f"[{dataset}](https://huggingface.co/datasets/{dataset}){named}"
    return plain_data_name(metrics)


def _configuration(metrics: Mapping[str, Any]) -> str:
    """The configuration of a data set on the Hub, as ``data`` names it after the id; empty without one."""
    before, _, configuration = str(metrics.get("data") or "").partition(f"{metrics.get('dataset')}:")
    return "" if before else configuration


def plain_data_name(metrics: Mapping[str, Any]) -> str:
    """The same without a link."""
    given = metrics.get("dataset") or metrics.get("data") or ""
    last = _last_part(given)
    if last == "digits" and given != "digits":  # somebody's folder
        return last
    name, images = _DATA.get(last.lower(), last), metrics.get("images")
    # ImageNet has 50,000 images to validate on; a part of them may be easier
    return "a sample of ImageNet" if name == "ImageNet" and isinstance(images, int) and images < 50_000 else name


def model_name(name: str) -> str:
    """A model by its name: of a folder, the last part."""
    kind, colon, rest = name.partition(":")
    return rest if colon and kind == "hf-hub" else _last_part(rest if colon else name)


def inline(value: Any) -> str:
    """A value inside one line of Markdown."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def command(metrics: Mapping[str, Any]) -> str:
    """The recorded command as a reader can run it; empty if it needs files or scripts that only its author has."""
    recorded = metrics.get("command")
    if not isinstance(recorded, str):
        return ""
    try:
        program, *words = shlex.split(recorded)
    except ValueError:
        return ""
    printed = _PROGRAMS.get(program)
    options = _options(words)
    if not printed or options is None:
        return ""
    kept = []
    for option, values in options:
        if option in _OWN_OPTIONS:
            continue
        if option == "--output":
            values = ["out"]
        elif option == "--data":
            if metrics.get("dataset") and not values[0].startswith(f"{metrics['dataset']}:"):
                values = [metrics["dataset"]]
            if values != ["digits"] and not metrics.get("dataset"):
                return ""
        elif (
            option in _FILE_OPTIONS
            or (option in _MODEL_OPTIONS and not all(_is_published(value) for value in values))
            or any(_is_local(value) for value in values)
        ):
            return ""
        kept += [option, *values]
    if isinstance(count := metrics.get("processes"), int) and count > 1 and printed.startswith("python "):
        printed = printed.replace("python", f"python -m torch.distributed.run --nproc_per_node {count}", 1)
    return f"{printed} {shlex.join(word for word in kept if word)}".rstrip()


def _options(words: list[str]) -> list[tuple[str, list[str]]] | None:
    """Options with their values; the words before the first option come with an empty name."""
    found: list[tuple[str, list[str]]] = [("", [])]
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            found.append((name, [value] if equals else []))
        elif _is_full(found[-1]):
            return None  # a value that belongs to no option known to take one
        else:
            found[-1][1].append(word)
    return found


def _is_full(option: tuple[str, list[str]]) -> bool:
    return len(option[1]) >= _OWN_OPTIONS.get(option[0], 1_000)


def _is_published(model: str) -> bool:
    """Whether a name is one of timm's or the Hub's, rather than a folder's."""
    return model.startswith("hf-hub:") or timm.is_model(model.partition(".")[0])


def _is_local(word: str) -> bool:
    """Whether a word names a file or folder, rather than a Hub id, a number or a name."""
    kind, colon, rest = word.partition(":")
    if colon and kind == "hf-hub":
        return False
    if colon and kind == "local-dir":
        return True
    return word.endswith(_FILES) or "/" in word or "\\" in word


def _last_part(path: Any) -> str:
    return next((part for part in reversed(re.split(r"[\\/]", str(path))) if part not in ("", ".", "..")), "")
