"""Export a model: a file for a runtime, checked against PyTorch and timed beside the dense model."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm.data
import torch
from torch import Tensor, nn

from .._utils.environment import environment
from .._utils.files import remove_unfinished, replacing
from .._utils.progress import stage
from .._utils.torch_utils import ambient_modes_off
from ..calibration.images import Images, batches, check_normalised
from ..errors import ArpHubError, cause, checked_path
from ..hub.export_files import EXPORT, weights_digest
from ..hub.load import load_model, with_prefix
from ..hub.save import is_saved_folder
from ..hub.staging import refresh_card
from ..layers.model import check_model, check_weights, count_params
from ..layers.trace import InputSize, input_size_of
from ..models.label_names import label_names
from ..runtimes.capture import Captured
from ..runtimes.formats import runtime_of
from ..runtimes.runtime import INPUT, OUTPUT
from .folder import check_output
from .job import Job
from .latency import FileLatency
from .parity import Check, Parity

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Export:
    """What `export` wrote and measured.

    Attributes:
        folder: Folder with the file and ``export.json``.
        file: The file.
        parity: Its outputs beside those of the model in PyTorch.
        latency: Latency in the runtime; None if it was not measured.
        record: The content of ``export.json``.
    """

    folder: Path
    file: Path
    parity: Parity
    latency: FileLatency | None
    record: Mapping[str, Any]


@ambient_modes_off()
def export(
    model: nn.Module | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str = "onnx",
    int8: bool = False,
    int8_divergence: float | None = None,
    images: Images | None = None,
    test_images: Images | None = None,
    test_labels: Tensor | Sequence[int] | None = None,
    opset: int | None = None,
    dynamic_batch: bool = False,
    batch_size: int = 1,
    input_size: InputSize | None = None,
    seconds: float = 5.0,
    overwrite: bool = False,
    progress: bool = False,
) -> Export:
    """Write a model as a file for a runtime, check it against PyTorch, and time it beside the dense model.

    The folder ``output`` gets the file and ``export.json``: names and shapes of input and output, classes,
    preprocessing, parity, sizes, latency and versions. It is replaced in one step, so it never holds half an export. If
    it lies in a saved folder, the card there lists the export, and `push_to_hub` uploads it.

    Int8 uses the runtime's own quantiser: static quantisation of ONNX Runtime, NNCF for OpenVINO, PT2E of torchao for
    ``torch-export``. Factors of low-rank layers are balanced before, on a copy. A low-rank layer that int8 harms more
    than ``int8_divergence`` stays in float32; ``export.json`` lists these layers.

    Args:
        model: A timm model, dense or compressed; or a saved folder; or a name such as ``hf-hub:user/name``.
        output: Folder to write.
        format: ``"onnx"``, ``"openvino"`` or ``"torch-export"``.
        int8: Quantise weights and activations; needs ``images``.
        int8_divergence: Harm that int8 may do to one low-rank layer alone, by default 0.05: 16 times the divergence, in
            nats, of predictions softened at a temperature of 4. With ``math.inf`` all layers are quantised.
        images: Unlabelled images, normalised as for the model, on which int8 is calibrated. A tensor or batches.
        test_images: Images to check the file on. By default ``images``, or else random ones.
        test_labels: Their classes, to measure top-1.
        opset: Version of the ONNX operators; by default that of the exporter.
        dynamic_batch: Let the file take any number of images.
        batch_size: Images of a timed forward pass. Without ``dynamic_batch`` the file takes this number only.
        input_size: ``(channels, height, width)``; by default the model's own.
        seconds: How long to time the two models, together; 0 leaves the timing and the dense model out.
        overwrite: Replace the folder even if it holds other files. They are deleted.
        progress: Show progress.

    Returns:
        The folder and file, the comparison with PyTorch, the latency and the content of ``export.json``.

    Raises:
        ArpHubError: If an argument is out of range, a package is missing, or the model cannot be exported. Also if a
            float32 file differs from PyTorch by more than 1e-4 of the largest output. Nothing is written then.

    Example:
        >>> done = arp_hub.export("out", "out-onnx", format="onnx", int8=True, images=images)  # doctest: +SKIP
        >>> done.parity.agreement  # doctest: +SKIP
        98.4
    """
    runtime = runtime_of(format)
    runtime.require(int8)
    _check_arguments(format, opset, batch_size, seconds, int8_divergence)
    if int8_divergence is not None and not int8:
        raise ArpHubError("int8_divergence is about int8: pass int8=True, or leave it out")
    if int8 and images is None:
        raise ArpHubError("int8 needs calibration images: pass images=, normalised as for the model")
    if test_labels is not None and test_images is None:
        raise ArpHubError("test_labels are the classes of test_images: pass both")
    name = None if isinstance(model, nn.Module) else _name(model)
    folder = check_output(output, name, overwrite)
    network: Any = model if name is None else load_model(name)
    check_model(network, mergeable=True)
    check_weights(network, trainable=False)
    if getattr(network, "num_classes", None) == 0:
        raise ArpHubError(
            "export takes classifiers, and this model gives features (num_classes=0): keep its classifier"
        )
    size = input_size_of(network, input_size)
    calibration = None if images is None else _checked(images, "images", network, size)
    if int8 and calibration is not None and len(calibration) < batch_size:
        raise ArpHubError(
            f"int8 is calibrated on batches of {batch_size} images: pass at least {batch_size}, got {len(calibration)}"
        )
    test = calibration if test_images is None else _checked(test_images, "test_images", network, size)
    classes = None if test is None or test_labels is None else _classes(test_labels, len(test))
    captured = Captured.of(network, size, batch_size, dynamic_batch)
    if classes is not None and not 0 <= int(classes.min()) <= int(classes.max()) < captured.classes:
        raise ArpHubError(
            f"test_labels go from {int(classes.min())} to {int(classes.max())}, the model has {captured.classes} "
            "classes: count them from 0, in the order of the model"
        )
    source = "test" if test_images is not None else "random" if test is None else "calibration"
    check = Check.of(captured, source, captured.example() if test is None else test, classes)
    split = (
        [batch for batch in calibration.split(batch_size) if len(batch) == batch_size]
        if int8 and calibration is not None
        else None
    )
    job = Job(runtime, split, opset)
    if int8_divergence is not None:
        job = replace(job, most_divergence=int8_divergence)
    remove_unfinished(folder)
    try:
        with replacing(folder) as new:
            with stage(f"write {runtime.title}, {job.precision}", shown=progress):
                exported = job.write(captured, new, check)
            latency, dense = None, None
            if seconds:
                with stage("compare with the dense model", shown=progress):
                    latency, dense = job.compare(exported, captured, check, seconds)
            record = {
                **_description(network, captured, job),
                "file": exported.file.name,
                **exported.to_dict(),
                **({} if dense is None else {"dense": dense.to_dict()}),
                **({} if latency is None else {"latency": latency.to_dict()}),
            }
            if latency is not None and latency.dense is not None:
                record["verdict"] = latency.verdict(f"{runtime.title}, {job.precision}")
            facts = environment()
            facts["versions"] |= runtime.versions(int8)
            text = json.dumps({**record, **facts}, indent=2) + "\n"
            (new / EXPORT).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ArpHubError(f"cannot write to '{output}': {cause(error)} (the earlier content is unchanged)") from error
    if is_saved_folder(folder.parent):
        _list_in_card(folder.parent)
    return Export(folder, folder / exported.file.name, exported.parity, latency, {**record, **facts})


def _list_in_card(saved: Path) -> None:
    """Add the export to the card of the saved folder that it lies in; a card that cannot be written stays."""
    try:
        refresh_card(saved)
    except (ArpHubError, OSError, UnicodeDecodeError) as error:
        _logger.warning("the card of '%s' does not list the export: %s", saved, error)


def _check_arguments(
    format: str, opset: int | None, batch_size: int, seconds: float, int8_divergence: float | None
) -> None:
    """Refuse numbers that are out of range."""
    if opset is not None:
        if format != "onnx":
            raise ArpHubError(f"opset is a version of the ONNX operators, format '{format}' has none: leave it out")
        if isinstance(opset, bool) or not isinstance(opset, int) or opset < 1:
            raise ArpHubError(f"opset must be a whole number above 0, got {opset!r:.50}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ArpHubError(f"batch_size must be a whole number of at least 1, got {batch_size!r:.50}")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
        raise ArpHubError(f"seconds must be a number of at least 0, got {seconds!r:.50}")
    bound = 0.0 if int8_divergence is None else int8_divergence
    if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not bound >= 0:
        raise ArpHubError(f"int8_divergence must be a number of at least 0, got {bound!r:.50}")


def _classes(labels: Tensor | Sequence[int], images: int) -> Tensor:
    """The classes of some images as a tensor on the CPU."""
    try:
        found = torch.as_tensor(labels).cpu()
    except (TypeError, ValueError) as error:
        raise ArpHubError(f"test_labels must be whole numbers, one class an image: {error}") from error
    if found.dim() != 1 or found.is_floating_point() or found.is_complex() or len(found) != images:
        raise ArpHubError(
            f"test_labels must hold one class an image, {images} whole numbers in all, got the shape "
            f"{tuple(found.shape)} of {found.dtype}"
        )
    return found


def _name(model: object) -> str:
    """The name that `load_model` takes for a folder or a name."""
    return with_prefix(model) if isinstance(model, str) else f"local-dir:{checked_path(model, 'model')}"


def _checked(images: Images, what: str, model: nn.Module, size: InputSize) -> Tensor:
    """Images as one tensor of the model's input size."""
    check_normalised(images, model)
    found = torch.cat([batch.cpu().float() for batch in batches(images)])
    if tuple(found.shape[1:]) != tuple(size):
        raise ArpHubError(f"{what} have the size {tuple(found.shape[1:])}, the model takes {tuple(size)}: resize them")
    return found


def _description(model: nn.Module, captured: Captured, job: Job) -> dict[str, Any]:
    """What a program needs to know to run the file, and what the file is."""
    batch = "batch" if captured.dynamic_batch else captured.batch_size
    found = timm.data.resolve_data_config({}, model=model)
    names = label_names(model) if captured.classes == getattr(model, "num_classes", None) else ()
    return {
        "format": job.runtime.name,
        "precision": job.precision,
        "input": {"name": INPUT, "shape": [batch, *captured.input_size], "dtype": "float32"},
        "output": {"name": OUTPUT, "shape": [batch, captured.classes], "dtype": "float32"},
        "num_classes": captured.classes,
        **({"label_names": list(names)} if names else {}),
        "preprocessing": {
            "input_size": list(captured.input_size),
            # a model of other than three channels may have numbers for three in its config
            **{key: found[key] for key in ("mean", "std") if len(found[key]) == captured.input_size[0]},
            **{key: found[key] for key in ("interpolation", "crop_pct", "crop_mode")},
        },
        "params": count_params(model),
        "weights": weights_digest(model.state_dict()),
        **({"calibration_images": sum(len(batch) for batch in job.calibration)} if job.calibration else {}),
    }
