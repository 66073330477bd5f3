"""Examine this machine for problems: versions, devices, access to the Hub, disk space, threads.

Packages are imported inside functions, because one that does not import is what this module has to report.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from rich.markup import escape
from rich.table import Table

_PACKAGES = ("torch", "torchvision", "timm", "huggingface_hub", "arp_hub")
"""What a run imports, each before those that need it."""
_TIMEOUT = 5.0
"""Seconds to wait for the Hub."""
_LOW_DISK = 5 * 2**30
"""Bytes of free space below which a disk is a problem: two checkpoints of a ViT-L with momentum take as much."""


def examine(endpoint: str | None = None) -> dict[str, Any]:
    """Examine everything that a run depends on.

    Args:
        endpoint: Address of the Hub; by default the one that huggingface_hub uses (``HF_ENDPOINT``).

    Returns:
        ``versions``, ``hardware``, ``devices``, ``hub`` and ``extras``; ``problems``, one line each; and ``notes`` on
        what only some runs need, such as the Hub. If a package does not import, ``hardware``, ``devices`` and ``hub``
        are empty.

    Example:
        >>> sorted(examine())  # doctest: +SKIP
        ['devices', 'extras', 'hardware', 'hub', 'notes', 'problems', 'versions']
    """
    unmet, extras = _requirements()
    found: dict[str, Any] = {"versions": _versions(), "hardware": {}, "devices": [], "extras": extras, "hub": {}}
    if broken := _broken_import():
        package, problem = broken
        named = any(line.startswith(f"{package} is missing") for line in unmet)
        return {**found, "problems": unmet if named else [*unmet, problem], "notes": []}
    import huggingface_hub

    from arp_hub._utils.environment import environment

    hub, hub_problems, hub_notes = _hub(endpoint or huggingface_hub.constants.ENDPOINT)
    found |= {"hardware": environment()["hardware"], "devices": _devices(), "hub": hub}
    return {**found, "problems": [*unmet, *hub_problems, *_disk(), *_threads()], "notes": hub_notes}


def _versions() -> dict[str, str]:
    """Versions of Python and of the installed packages, read without importing them."""
    found = {"python": platform.python_version()}
    for package in ("arp-hub", "torch", "torchvision", "timm", "accelerate", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _broken_import() -> tuple[str, str] | None:
    """The first package that does not import, and the problem. Those after it may fail for the same reason."""
    for package in _PACKAGES:
        try:
            import_module(package)
        except Exception as error:  # a library built for another torch raises many kinds
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            return package, f"{package} does not import ({reason:.200}): {_way_to_import(package)}"
    return None


def _way_to_import(package: str) -> str:
    """What to do about a package that does not import."""
    versions = _versions()
    if package == "torchvision":
        return (
            f"torchvision {versions.get(package, '')} and torch {versions.get('torch', '')} must fit each other: "
            "install both from one index, pip install --upgrade --force-reinstall torch torchvision"
        )
    return f"pip install --upgrade --force-reinstall {package.replace('_', '-')}"


def _requirements() -> tuple[list[str], dict[str, bool]]:
    """Problems with requirements, and whether each extra is installed."""
    problems: list[str] = []
    extras: dict[str, bool] = {}
    try:
        described = metadata("arp-hub")
    except PackageNotFoundError:
        return ["arp_hub is not installed, only imported: run pip install in its folder"], {}
    names = described.get_all("Provides-Extra") or []
    for needed in map(Requirement, described.get_all("Requires-Dist") or []):
        wanted = needed.marker is None or needed.marker.evaluate({"extra": ""})
        wanting = [name for name in names if needed.marker and needed.marker.evaluate({"extra": name})]
        try:
            found = version(needed.name)
        except PackageNotFoundError:
            found = ""
        met = bool(found) and needed.specifier.contains(found, prereleases=True)
        if not wanted:
            extras |= {name: extras.get(name, True) and met for name in wanting}
        elif not met:
            problems.append(
                f"{needed.name} is {found or 'missing'}, but {needed.name}{needed.specifier} is required: "
                f'pip install --upgrade "{needed.name}{needed.specifier}"'
            )
    return problems, extras


def _devices() -> list[str]:
    """Devices that models can run on, the fastest last."""
    import torch

    found = ["cpu"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(f"cuda:{index} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)")
    return found


def _hub(endpoint: str) -> tuple[dict[str, Any], list[str], list[str]]:
    """Whether the Hub can be reached and who is logged in; problems; and notes, because a run can do without the Hub.

    The token is sent to the Hub only.
    """
    import huggingface_hub
    from huggingface_hub import HfApi
    from huggingface_hub.utils import get_session

    token = huggingface_hub.get_token()
    state: dict[str, Any] = {"endpoint": endpoint, "reachable": None, "user": None, "token": token is not None}
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        note = "the Hub is switched off by HF_HUB_OFFLINE=1: only cached models load; unset it to push or pull"
        return state, [], [note]
    try:
        get_session().get(f"{endpoint}/api/models?limit=1", timeout=_TIMEOUT)
        state["reachable"] = True
    except Exception as error:  # every client raises its own kinds
        state["reachable"] = False
        note = (
            f"the Hub at {endpoint} cannot be reached ({type(error).__name__}): to push or pull, check the network, "
            "HF_ENDPOINT and proxies; local folders and cached models still load"
        )
        return state, [], [note]
    if token is None:
        return state, [], []
    try:
        state["user"] = HfApi(endpoint=endpoint, token=token).whoami()["name"]
    except Exception as error:  # of the HTTP library that this version of the client uses
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status not in (401, 403):  # such as a connection that broke between the two calls
            return state, [], [f"the Hub did not say who is logged in ({status or type(error).__name__}): try again"]
        return state, [f"the Hub refuses the stored token ({status}): log in again with `hf auth login`"], []
    return state, [], []


def _disk() -> Iterator[str]:
    """Problems with the two folders that arp_hub writes to: the cache of the Hub and the current directory."""
    import huggingface_hub

    for what, place in (("the cache", Path(huggingface_hub.constants.HF_HOME)), ("the current directory", Path.cwd())):
        there = next(path for path in (place, *place.parents) if path.exists())
        if not os.access(there, os.W_OK):
            yield f"{what} '{place}' cannot be written: set HF_HOME, or work in a folder of your own"
        elif (free := shutil.disk_usage(there).free) < _LOW_DISK:
            yield f"{what} '{place}' has {free / 2**30:.1f} GiB left: make room, or set HF_HOME to another disk"


def _threads() -> Iterator[str]:
    import torch

    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    if threads > cores:
        yield f"torch uses {threads} threads on {cores} cores: set OMP_NUM_THREADS={cores}"


def table(found: Mapping[str, Any]) -> Table:
    """A table of what `examine` found, without the problems and notes."""
    rows = {"versions": ", ".join(f"{name} {number}" for name, number in found["versions"].items())}
    if hardware := found["hardware"]:
        rows["processor"] = f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} threads in use"
        rows["devices"] = ", ".join(found["devices"])
    extras = sorted(found["extras"].items())
    rows["extras"] = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in extras)
    if hub := found["hub"]:
        reach = {True: "reachable", False: "not reachable", None: "switched off"}[hub["reachable"]]
        login = "a token is stored" if hub["token"] else "not logged in"
        user = f"logged in as {hub['user']}" if hub["user"] else login
        rows["Hub"] = f"{hub['endpoint']}, {reach}, {user}"
    result = Table(box=None, show_header=False, pad_edge=False)
    for name, value in rows.items():
        result.add_row(name, escape(value))
    return result
