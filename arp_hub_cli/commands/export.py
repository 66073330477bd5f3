"""``arp-hub export``: a file for ONNX Runtime, OpenVINO or torch.export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..options import (
    DATA_HELP,
    MAX_IMAGES_HELP,
    MODEL_HELP,
    AsJson,
    Checkpoint,
    ImageKey,
    InputSize,
    LabelKey,
    ModelKwargs,
    NumClasses,
    Overwrite,
    Pretrained,
    Seed,
    Streaming,
    Workers,
    data_option,
    model_name,
    output_option,
    timing_option,
)
from ..terminal import note, print_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from arp_hub.training import ImageData

FORMATS = ("onnx", "openvino", "torch-export")
"""Names of all formats; a test compares them with `arp_hub.runtimes.formats.RUNTIMES`."""


def export(
    model: Annotated[
        str,
        typer.Argument(metavar="OUT", help=MODEL_HELP, show_default=False, callback=model_name),
    ],
    format: Annotated[str, output_option(metavar="NAME", help=f"Format of the file: {', '.join(FORMATS)}.")] = "onnx",
    int8: Annotated[bool, output_option("--int8", help="Quantise weights and activations; needs --data.")] = False,
    int8_divergence: Annotated[
        float | None,
        output_option(
            metavar="BOUND",
            help="Keep a low-rank layer in float32 if int8 of it alone does more harm: 16 times the divergence (nats) "
            "of predictions softened at temperature 4. By default 0.05; inf: quantise every layer.",
            min=0,
            show_default=False,
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: NumClasses = None,
    model_kwargs: ModelKwargs = None,
    data: Annotated[
        str | None,
        data_option(metavar="DATA", help=f"Images to calibrate int8 and to check the file on: {DATA_HELP}"),
    ] = None,
    image_key: ImageKey = None,
    label_key: LabelKey = None,
    streaming: Streaming = False,
    calibration: Annotated[
        int | None,
        data_option(
            "--calibration-images",
            metavar="N",
            help="Training images of --data to calibrate int8 on; by default 128.",
            min=1,
            show_default=False,
        ),
    ] = None,
    max_images: Annotated[
        int | None,
        data_option(
            metavar="N", help=f"Check the file on {MAX_IMAGES_HELP} By default 500.", min=1, show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None,
        output_option(
            metavar="FOLDER", help="Folder to write; by default OUT-FORMAT, or OUT-FORMAT-int8.", show_default=False
        ),
    ] = None,
    opset: Annotated[
        int | None, output_option(metavar="N", help="Version of the ONNX operators.", show_default=False)
    ] = None,
    dynamic_batch: Annotated[
        bool, output_option("--dynamic-batch", help="Let the file take any number of images.")
    ] = False,
    batch_size: Annotated[
        int, timing_option(metavar="N", help="Images that the file takes, and that are timed in a forward pass.", min=1)
    ] = 1,
    input_size: InputSize = None,
    seconds: Annotated[
        float,
        timing_option(
            metavar="SECONDS", help="Seconds to time the model and its dense form; 0 leaves the timing out.", min=0
        ),
    ] = 10.0,
    workers: Workers = 0,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a model as a file for ONNX Runtime, OpenVINO or torch.export, check it and time it.

    The folder gets the file and export.json. Outputs are compared with PyTorch, on the test split of --data if it is
    given. A compressed model is timed in turns with its dense form, in the same runtime and precision.

    Example:
        arp-hub export out --format onnx --int8 --data dogs
    """
    from arp_hub.deployment.export import export as write
    from arp_hub.deployment.folder import check_output
    from arp_hub.errors import ArpHubError, check_inputs_outside
    from arp_hub.runtimes.formats import runtime_of
    from arp_hub.training import calibration_images, note_crop

    from ..inputs import ModelChoice, check_data_options, open_data, open_model

    runtime_of(format).require(int8)
    if int8 and data is None:
        raise ArpHubError("--int8 needs images to calibrate on: give --data")
    for option, value in {"--calibration-images": calibration, "--int8-divergence": int8_divergence}.items():
        if value is not None and not int8:
            raise ArpHubError(f"{option} is about int8: give --int8, or leave {option} out")
    check_data_options(
        data,
        image_key=image_key,
        label_key=label_key,
        streaming=streaming,
        max_images=max_images,
        workers=workers or None,
    )
    kind = f"{format}-int8" if int8 else format
    target = output or Path(f"{_stem(model)}-{kind}")
    check_inputs_outside(target, {"--data": data, "--checkpoint": checkpoint})
    check_output(target, model, overwrite)
    choice = ModelChoice(model, checkpoint, pretrained, num_classes, model_kwargs, input_size, "cpu", seed)
    network, random = open_model(choice)
    found = open_data(data, network, image_key, label_key, streaming)
    count = 128 if calibration is None else calibration
    images = calibration_images(found, count, copies=0, seed=seed, workers=workers) if found and int8 else None
    shown, labels = _test_images(network, found, max_images or 500, workers) if found else (None, None)
    if int8 and found and found.shares_images and labels is None:
        shown = None  # the check then says that it saw calibration images
    if found:
        note_crop(network, found.form)  # export.json says how the images were resized that the file is checked on
    done = write(
        network,
        target,
        format=format,
        int8=int8,
        int8_divergence=int8_divergence,
        images=images,
        test_images=shown,
        test_labels=labels,
        opset=opset,
        dynamic_batch=dynamic_batch,
        batch_size=batch_size,
        input_size=input_size,
        seconds=seconds,
        overwrite=overwrite,
        progress=True,
    )
    if as_json:
        print_json({"model": model, **random, "data": data, "folder": str(target), **done.record})
        return
    parity = done.parity
    print(f"{target / done.file.name}: {done.record['size_bytes'] / 1e6:.2f} MB")
    print(
        f"on {parity.images} {parity.source} images: largest relative error {parity.relative_error:.2g}, "
        f"same top-1 {parity.agreement:.1f} %, divergence {parity.divergence:.2g} nats"
    )
    if kept := done.record.get("layers_in_float"):
        print(f"in float32, because int8 harms them: {', '.join(kept)}")
    if parity.top1 is not None:
        print(f"top-1 {parity.top1:.1f} %, in PyTorch {parity.torch_top1:.1f} %")
    if "dense" in done.record and "top1" in done.record["dense"]["parity"]:
        print(f"top-1 of the dense form in the same format {done.record['dense']['parity']['top1']:.1f} %")
    if verdict := done.record.get("verdict"):
        print(verdict)
    note(f"export.json written to {target}")


def _stem(model: str) -> str:
    """What the default folder of an export begins with: the name of the model, or the path of its folder."""
    name = model.removeprefix("local-dir:").rpartition("hub:")[2].rstrip("/")
    return str(Path(name).resolve()) if Path(name).name in ("", "..") else name


def _test_images(model: nn.Module, data: ImageData, most: int, workers: int) -> tuple[Tensor, Tensor | None]:
    """The test images that `evaluate` takes, and their labels if they fit the classes of the model."""
    import torch

    from arp_hub._utils.progress import stage
    from arp_hub.training.evaluate import why_not_measured

    split = data.test.measured(most)
    with stage("read test images"):
        batches = split.images.evaluation(split.indices, 128, torch.device("cpu"), workers)
        images = torch.cat(list(batches))
    if split.labels is None:
        return images, None
    if reason := why_not_measured(model, split):
        note(f"accuracy is not measured: {reason}")
        return images, None
    data.warn_of_shared_images()
    return images, split.labels
