"""How options become the arguments of a plan, a model and its data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arp_hub.effort import EFFORTS
from arp_hub.errors import ArpHubError
from arp_hub.hub.load import load_model
from arp_hub.plan import RankPlan
from arp_hub.schemes import SCHEMES
from arp_hub.timing import Workload
from arp_hub.training import ImageData, calibration_images, load_data


def plan_options(
    keep_params: float | None,
    keep_macs: float | None,
    keep_latency: float | None,
    workload: Workload,
    schemes: str | None,
    rank_multiple: int,
    exclude: str | None,
    plan: Path | None = None,
) -> dict[str, Any]:
    """Arguments of `make_plan`, checked before any work is done."""
    shares = {"keep_params": keep_params, "keep_macs": keep_macs, "keep_latency": keep_latency}
    budget = {name: share for name, share in shares.items() if share is not None}
    if len(budget) + (plan is not None) != 1:
        raise ArpHubError(
            "give exactly one of --keep-params, --keep-macs and --keep-latency (or, to compress, a --plan)"
        )
    if keep_latency is None and workload != Workload():
        raise ArpHubError("--batch-size, --dtype and --channels-last say what --keep-latency is for: give it, too")
    if plan is not None and (schemes is not None or exclude is not None or rank_multiple != 1):
        raise ArpHubError("--schemes, --exclude and --rank-multiple are for making a plan, not for a given --plan")
    for name, share in budget.items():
        if not 0 < share < 1:
            raise ArpHubError(f"{name} must lie between 0 and 1 (the share to keep, 0.5 for half), got {share:g}")
    chosen = _list(schemes)
    for name in chosen or ():
        if name not in SCHEMES:
            raise ArpHubError(f"unknown scheme '{name}': choose from {', '.join(SCHEMES)}")
    if rank_multiple < 1:
        raise ArpHubError(f"rank_multiple must be at least 1, got {rank_multiple}")
    timed = {} if keep_latency is None else {"workload": workload}
    return {**budget, **timed, "schemes": chosen, "rank_multiple": rank_multiple, "exclude": _list(exclude)}


def _list(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def batch_sizes(text: str) -> list[int]:
    """Batch sizes from ``1,32``."""
    try:
        return [int(part) for part in _list(text) or ()] or [1]
    except ValueError:
        raise ArpHubError(f"--batch-size takes whole numbers with commas, such as 1,32, got '{text}'") from None


def check_effort(name: str) -> None:
    """Refuse an unknown preset before any work."""
    if name not in EFFORTS:
        raise ArpHubError(f"unknown --effort '{name}': choose {', '.join(EFFORTS)}")


def check_plan_file(path: Path, overwrite: bool) -> None:
    """Refuse to write a plan over a file that is none."""
    if not path.parent.is_dir():
        raise ArpHubError(f"cannot write '{path}': there is no folder '{path.parent}'")
    if path.is_dir():
        raise ArpHubError(f"cannot write the plan '{path}': it is a folder")
    if path.exists() and not overwrite:
        try:
            RankPlan.load(path)
        except ArpHubError:
            raise ArpHubError(f"'{path}' exists and holds no plan: name another --output, or add --overwrite") from None


def open_model(
    name: str,
    checkpoint: Path | None,
    num_classes: int | None,
    input_size: tuple[int, int, int] | None,
    device: str | None,
    seed: int = 0,
) -> nn.Module:
    """The model on its device; the seed decides the weights of one that has none.

    Raises:
        ArpHubError: If there is no such model or device, or the checkpoint does not fit.
    """
    place = _device(device)
    torch.manual_seed(seed)
    if place.type == "meta" and checkpoint is not None:
        raise ArpHubError(f"--device meta holds no weights: leave out --checkpoint {checkpoint}, or choose cpu")
    overlay: dict[str, Any] = {} if input_size is None else {"pretrained_cfg_overlay": {"input_size": input_size}}
    if place.type == "meta":  # its structure alone, at once and without memory
        with place:
            return load_model(name, pretrained=False, num_classes=num_classes, **overlay)
    return load_model(name, checkpoint, num_classes=num_classes, **overlay).to(place)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ArpHubError(f"cannot use the device '{name}': {str(error).splitlines()[0]}") from error
    return device


def open_data(source: str | None, model: nn.Module, image_key: str | None, label_key: str | None) -> ImageData | None:
    """The data, labelled or not; None if none was named."""
    if source is None:
        return None
    return load_data(source, model, image_key=image_key, label_key=label_key, require_labels=False)


def open_images(
    data: ImageData | None, count: int | None, copies: int | None, seed: int, workers: int
) -> Tensor | None:
    """Calibration images of the data; None without data."""
    if data is None:
        return None
    return calibration_images(data, count, copies=copies, seed=seed, workers=workers)
