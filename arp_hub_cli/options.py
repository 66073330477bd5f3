"""The options of ``arp-hub``. This module imports no heavy package, so that help is printed quickly."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

SCHEMES = ("channel", "spatial", "group_in", "group_out", "cp", "tucker2")
"""Names of all schemes; a test compares them with `arp_hub.schemes.SCHEMES`."""
DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Floating-point types of a workload; a test compares them with `arp_hub.timing.DTYPES`."""
RUNTIMES = ("torch", "onnxruntime", "openvino")
"""Runtimes of a workload; a test compares them with `arp_hub.timing.RUNTIMES`."""
PRECISIONS = ("float32", "int8")
"""Precisions of a workload; a test compares them with `arp_hub.timing.PRECISIONS`."""
EFFORTS = ("fast", "balanced", "thorough")
"""Presets of effort; a test compares them with `arp_hub.effort.EFFORTS`."""

model_option = partial(typer.Option, rich_help_panel="Model", show_default=False)
data_option = partial(typer.Option, rich_help_panel="Data", show_default=False)
budget_option = partial(typer.Option, rich_help_panel="Budget (give one)", show_default=False, metavar="SHARE")
timing_option = partial(typer.Option, rich_help_panel="Timed forward pass")
fit_option = partial(typer.Option, rich_help_panel="Plan and fit")
refine_option = partial(typer.Option, rich_help_panel="Refinement")
machine_option = partial(typer.Option, rich_help_panel="Machine")
hub_option = partial(typer.Option, rich_help_panel="Repository", show_default=False)
card_option = partial(typer.Option, rich_help_panel="Model card", show_default=False)
output_option = partial(typer.Option, rich_help_panel="Output")


def model_name(given: str | None) -> str | None:
    """A model's name, with ``local-dir:`` before the path of a saved folder."""
    if not given or not os.path.isdir(given):  # noqa: PTH112  (Path.is_dir raises for a name that no system could hold)
        return given
    from arp_hub.hub.load import with_prefix  # here, because `arp_hub` imports torch

    return with_prefix(given)


MODEL_HELP = (
    "A timm name such as resnet50, hf-hub:USER/NAME, or a saved folder. For a folder with the name of a timm model, "
    "give local-dir:FOLDER."
)
Model = Annotated[str, model_option(metavar="NAME", help=MODEL_HELP, callback=model_name)]
Checkpoint = Annotated[
    Path | None, model_option(metavar="FILE", help="Weights: a .safetensors file, or a torch file of tensors.")
]
Pretrained = Annotated[
    bool | None,
    model_option(
        "--pretrained/--no-pretrained",
        help="Load pretrained weights, or start from random ones. By default, load them if the model has any.",
    ),
]
NumClasses = Annotated[
    int | None,
    model_option(
        metavar="N", help="Number of classes of --checkpoint, if it differs from the model's.", min=0, max=2**20
    ),
]
ModelKwargs = Annotated[
    list[str] | None,
    model_option(
        metavar="NAME=VALUE ...",
        help="Arguments of the model, such as img_size=112 pad_type=same. Saved with the model.",
    ),
]
InputSize = Annotated[
    tuple[int, int, int] | None, model_option(metavar="C H W", help="Input size; by default the model's own.")
]

DATA_HELP = (
    "digits, timm:NAME, USER/NAME[:CONFIG] on the Hub, a folder, or a pattern of tar shards. "
    "Folders hold class folders, parquet files or tar shards."
)
MAX_IMAGES_HELP = (
    "this many images of the split, chosen at random but equal at every call. Of a stream they are the first ones of "
    "shuffled shards."
)
Data = Annotated[str | None, data_option(metavar="DATA", help=DATA_HELP)]
ImageKey = Annotated[str | None, data_option(metavar="COLUMN", help="Image column; by default the one of type Image.")]
LabelKey = Annotated[
    str | None,
    data_option(
        metavar="COLUMN",
        help="Label column: numbers, bools or class names; by default the one of type ClassLabel.",
    ),
]
Streaming = Annotated[
    bool,
    data_option(help="Read tar shards, parquet files or a Hub dataset in order, without a download."),
]
MaxImages = Annotated[int | None, data_option(metavar="N", help=f"Measure accuracy on {MAX_IMAGES_HELP}", min=1)]
Calibration = Annotated[
    int | None,
    data_option(
        "--calibration-images",
        metavar="N",
        help="Unlabelled training images of --data to calibrate on; by default 1,024 held in memory, or 256 others.",
        min=1,
    ),
]
Copies = Annotated[
    int | None,
    data_option(
        "--calibration-copies",
        metavar="N",
        help="Augmented copies added for each calibration image; by default 1 for images held in memory, 0 for others.",
        min=0,
    ),
]

KeepParams = Annotated[float | None, budget_option(help="Share of the parameters to keep, above 0 and below 1.")]
KeepMacs = Annotated[float | None, budget_option(help="Share of the multiply-accumulates to keep.")]
KeepLatency = Annotated[float | None, budget_option(help="Share of the measured latency on --device to keep.")]
PlanFile = Annotated[
    Path | None, budget_option(metavar="FILE", help="A plan file that `arp-hub plan` wrote, instead of a share.")
]

BatchSize = Annotated[int, timing_option(metavar="N", help="Images of the timed forward pass.")]
Dtype = Annotated[
    str, timing_option(metavar="TYPE", help=f"Floating-point type: {', '.join(DTYPES)}.", autocompletion=lambda: DTYPES)
]
ChannelsLast = Annotated[bool, timing_option("--channels-last", help="Time in the channels-last memory format.")]
Runtime = Annotated[
    str,
    timing_option(
        metavar="NAME",
        help=f"Where to time: {', '.join(RUNTIMES)}. The last two run on the CPU.",
        autocompletion=lambda: RUNTIMES,
    ),
]
Precision = Annotated[
    str,
    timing_option(
        metavar="NAME",
        help="float32, or int8 by the quantiser of the runtime, calibrated on random images.",
        autocompletion=lambda: PRECISIONS,
    ),
]

Schemes = Annotated[
    str | None,
    fit_option(
        metavar="NAMES",
        help=f"Schemes to choose from, with commas: {', '.join(SCHEMES)}. By default all, but group_in and group_out "
        "for k x k layers only.",
        show_default=False,
    ),
]
RankMultiple = Annotated[
    int | None,
    fit_option(
        metavar="N", help="Ranks are multiples of this; by default 1, or 8 with --keep-latency.", show_default=False
    ),
]
Exclude = Annotated[
    str | None,
    fit_option(
        metavar="NAMES",
        help="Layers that stay dense: names or patterns (layer1.*), with commas. By default the first convolution.",
        show_default=False,
    ),
]
Effort = Annotated[
    str,
    fit_option(
        metavar="PRESET",
        help=f"CPU time of plan and fit against accuracy: {', '.join(EFFORTS)}.",
        autocompletion=lambda: EFFORTS,
    ),
]

Refine = Annotated[
    bool, refine_option("--refine", help="Refine the fit by gradient steps on unlabelled images; needs --data.")
]
RefineMinutes = Annotated[
    float | None, refine_option(metavar="MINUTES", help="Minutes of --refine; by default 10.", show_default=False)
]
RefineSteps = Annotated[
    int | None,
    refine_option(metavar="N", help="Optimiser steps of --refine, in place of minutes.", show_default=False),
]
RefineImages = Annotated[
    int | None,
    refine_option(
        metavar="N",
        help="Training images to refine on, without labels; by default 1,000, or up to 10,000 small ones.",
        show_default=False,
    ),
]

Workers = Annotated[int, machine_option(metavar="N", help="Processes that decode large images.", min=0)]
Device = Annotated[
    str | None,
    machine_option(
        metavar="NAME",
        help="cpu, cuda, ...; by default cuda if available. `plan` also takes meta, and then uses shapes only.",
        show_default=False,
    ),
]
Seed = Annotated[int, machine_option(metavar="N", help="Seed of every random choice.", min=0, max=2**32 - 1)]

Overwrite = Annotated[bool, output_option("--overwrite", help="Replace --output, and delete all that it holds.")]
AsJson = Annotated[bool, output_option("--json", help="Print one JSON object to stdout and nothing else.")]
