"""The options of ``arp-hub``, and how they become a plan's arguments, a model and its data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from ..errors import ArpHubError
from ..hub.load import load_model
from ..plan import RankPlan
from ..schemes import SCHEMES
from ..timing import DTYPES, Workload
from ..training import ImageData, calibration_images, load_data

Model = Annotated[str, typer.Option(help="A timm name such as resnet50, local-dir:FOLDER, or hf-hub:USER/NAME.")]
Checkpoint = Annotated[Path | None, typer.Option(help="Weights: a .safetensors file, or a torch file of tensors.")]
NumClasses = Annotated[int | None, typer.Option(help="Classes of --checkpoint, where they are not the model's own.")]
InputSize = Annotated[
    tuple[int, int, int] | None,
    typer.Option(metavar="C H W", help="Input size; by default the model's own.", show_default=False),
]
Data = Annotated[
    str | None, typer.Option(help="digits, a folder of parquet files or of class folders, or a Hub dataset id.")
]
ImageKey = Annotated[str | None, typer.Option(help="Image column; by default the one of type Image.")]
LabelKey = Annotated[str | None, typer.Option(help="Label column; by default the one of type ClassLabel.")]
KeepParams = Annotated[float | None, typer.Option(help="Share of the parameters to keep, above 0 and below 1.")]
KeepMacs = Annotated[float | None, typer.Option(help="Share of the multiply-accumulates to keep.")]
KeepLatency = Annotated[float | None, typer.Option(help="Share of the measured latency on --device to keep.")]
BatchSize = Annotated[int, typer.Option(help="Images a forward pass that is timed.")]
Dtype = Annotated[str, typer.Option(help=f"Numbers of a forward pass that is timed: {', '.join(DTYPES)}.")]
ChannelsLast = Annotated[bool, typer.Option("--channels-last", help="Time with channels-last memory layout.")]
Schemes = Annotated[
    str | None, typer.Option(help=f"Schemes to choose from, with commas: {','.join(SCHEMES)}. By default all.")
]
RankMultiple = Annotated[int, typer.Option(help="Hold ranks to multiples of this, for the hardware.")]
Exclude = Annotated[
    str | None,
    typer.Option(
        help="Layers to leave dense, with commas: names, or patterns (layer1.*). By default the first convolution."
    ),
]
Calibration = Annotated[
    int | None,
    typer.Option(
        "--calibration-images",
        help="Training images of --data to calibrate on, without labels; by default 1,024 small or 256 large ones.",
    ),
]
Copies = Annotated[
    int | None,
    typer.Option(
        "--calibration-copies",
        help="Copies of each, turned, moved, scaled and recoloured, that are added; by default 1 of small images.",
    ),
]
Workers = Annotated[int, typer.Option(help="Processes that decode large images.")]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, ...; by default cuda where there is one. For plans also meta: by shape alone."),
]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write over --output, whatever it holds.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout and nothing else.")]


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
