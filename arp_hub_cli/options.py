"""The options of ``arp-hub``. This module imports no heavy package, so that help is printed quickly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SCHEMES = ("channel", "spatial", "group_in", "group_out", "cp", "tucker2")
"""Names of all schemes; a test compares them with `arp_hub.schemes.SCHEMES`."""
DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Floating-point types of a workload; a test compares them with `arp_hub.timing.DTYPES`."""
EFFORTS = ("fast", "balanced", "thorough")
"""Presets of effort; a test compares them with `arp_hub.effort.EFFORTS`."""

Model = Annotated[str, typer.Option(help="A timm name such as resnet50, local-dir:FOLDER, or hf-hub:USER/NAME.")]
Checkpoint = Annotated[Path | None, typer.Option(help="Weights: a .safetensors file, or a torch file of tensors.")]
Pretrained = Annotated[
    bool | None,
    typer.Option(
        "--pretrained/--no-pretrained",
        help="Load pretrained weights, or start from random ones. By default, load them if the model has any.",
        show_default=False,
    ),
]
NumClasses = Annotated[
    int | None,
    typer.Option(help="Number of classes of --checkpoint, if it differs from the model's.", min=0, max=2**20),
]
ModelKwargs = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE ...",
        help="Arguments of the model, such as img_size=112 pad_type=same. Saved with the model.",
        show_default=False,
    ),
]
InputSize = Annotated[
    tuple[int, int, int] | None,
    typer.Option(metavar="C H W", help="Input size; by default the model's own.", show_default=False),
]
DATA_HELP = "digits, a folder of class folders or of parquet files, or a Hub dataset: USER/NAME or USER/NAME:CONFIG."
MAX_IMAGES_HELP = "this many images of the split, chosen at random but equal at every call."
Data = Annotated[str | None, typer.Option(help=DATA_HELP)]
ImageKey = Annotated[str | None, typer.Option(help="Image column; by default the one of type Image.")]
LabelKey = Annotated[
    str | None,
    typer.Option(help="Label column: numbers, bools or class names; by default the one of type ClassLabel."),
]
KeepParams = Annotated[float | None, typer.Option(help="Share of the parameters to keep, above 0 and below 1.")]
KeepMacs = Annotated[float | None, typer.Option(help="Share of the multiply-accumulates to keep.")]
KeepLatency = Annotated[float | None, typer.Option(help="Share of the measured latency on --device to keep.")]
BatchSize = Annotated[int, typer.Option(help="Images of the timed forward pass.")]
Dtype = Annotated[str, typer.Option(help=f"Floating-point type of the timed forward pass: {', '.join(DTYPES)}.")]
ChannelsLast = Annotated[bool, typer.Option("--channels-last", help="Time in the channels-last memory format.")]
Schemes = Annotated[
    str | None, typer.Option(help=f"Schemes to choose from, separated by commas: {','.join(SCHEMES)}. By default all.")
]
RankMultiple = Annotated[int, typer.Option(help="Ranks are multiples of this, to suit the hardware.")]
Exclude = Annotated[
    str | None,
    typer.Option(
        help="Layers that stay dense: names or patterns (layer1.*), with commas. By default the first convolution."
    ),
]
Calibration = Annotated[
    int | None,
    typer.Option(
        "--calibration-images",
        help="Training images of --data to calibrate on, without labels; by default 1,024 small or 256 large ones.",
        min=1,
    ),
]
Copies = Annotated[
    int | None,
    typer.Option(
        "--calibration-copies",
        help="Augmented copies added for each calibration image; by default 1 for small images, 0 for large ones.",
        min=0,
    ),
]
Effort = Annotated[
    str,
    typer.Option(
        help=f"Preset that trades CPU time of plan and fit for accuracy: {', '.join(EFFORTS)}.", metavar="PRESET"
    ),
]
Refine = Annotated[
    bool, typer.Option("--refine", help="Refine the fit by gradient steps on unlabelled images; needs --data.")
]
RefineMinutes = Annotated[
    float | None, typer.Option(help="Minutes of --refine; by default 10.", show_default=False, metavar="MINUTES")
]
RefineSteps = Annotated[
    int | None, typer.Option(help="Optimiser steps of --refine, in place of minutes.", show_default=False)
]
RefineImages = Annotated[int, typer.Option(help="Training images to refine on, without labels.")]
Workers = Annotated[int, typer.Option(help="Processes that decode large images.", min=0)]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda, ...; by default cuda if available. `plan` also takes meta, and then uses shapes only."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.", min=0, max=2**32 - 1)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace --output, even if it holds other files.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout and nothing else.")]
