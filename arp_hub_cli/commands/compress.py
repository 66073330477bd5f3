"""``arp-hub compress``: plan, decompose and save a model, without training."""

from __future__ import annotations

import copy
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..options import (
    AsJson,
    BatchSize,
    Calibration,
    ChannelsLast,
    Checkpoint,
    Copies,
    Data,
    Device,
    Dtype,
    Effort,
    Exclude,
    ImageKey,
    InputSize,
    KeepLatency,
    KeepMacs,
    KeepParams,
    LabelKey,
    MaxImages,
    Model,
    ModelKwargs,
    NumClasses,
    Overwrite,
    PlanFile,
    Precision,
    Pretrained,
    RankMultiple,
    Refine,
    RefineImages,
    RefineMinutes,
    RefineSteps,
    Runtime,
    Schemes,
    Seed,
    Streaming,
    Workers,
    output_option,
)
from ..processes import is_first
from ..terminal import note, print_json, print_tables

if TYPE_CHECKING:
    from torch import nn

    from arp_hub.training import ImageData, Split, StreamedSplit


def compress(
    model: Model,
    output: Annotated[
        Path,
        output_option(
            metavar="FOLDER",
            help="Folder to save the compressed model in. A model that it holds is replaced only with --overwrite.",
            show_default=False,
        ),
    ],
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: NumClasses = None,
    model_kwargs: ModelKwargs = None,
    keep_params: KeepParams = None,
    keep_macs: KeepMacs = None,
    keep_latency: KeepLatency = None,
    batch_size: BatchSize = 1,
    dtype: Dtype = "float32",
    channels_last: ChannelsLast = False,
    runtime: Runtime = "torch",
    precision: Precision = "float32",
    plan: PlanFile = None,
    data: Data = None,
    image_key: ImageKey = None,
    label_key: LabelKey = None,
    streaming: Streaming = False,
    schemes: Schemes = None,
    rank_multiple: RankMultiple = None,
    exclude: Exclude = None,
    calibration: Calibration = None,
    copies: Copies = None,
    effort: Effort = "balanced",
    input_size: InputSize = None,
    refine: Refine = False,
    refine_minutes: RefineMinutes = None,
    refine_steps: RefineSteps = None,
    refine_images: RefineImages = None,
    max_images: MaxImages = None,
    workers: Workers = 0,
    device: Device = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Plan and decompose a model without training, and save the result.

    With --data, each layer is fitted to its output on calibration images; without it, only to its weights. If the data
    has labels, top-1 and top-5 are measured on the test split before and after.

    --refine adds ten minutes of gradient steps on unlabelled images. If it is interrupted, the same command resumes it
    from a file beside --output.

    Example:
        arp-hub compress --model resnet50 --keep-params 0.5 --data dogs --output out
    """
    from arp_hub._utils.progress import stage
    from arp_hub.decomposition import decompose
    from arp_hub.errors import ArpHubError, check_inputs_outside
    from arp_hub.hub.load import change_config, hub_dataset, published_name
    from arp_hub.hub.save import check_folder, is_saved_folder, save_pretrained
    from arp_hub.layers.apply_plan import check_plan
    from arp_hub.plan import RankPlan
    from arp_hub.planning.make_plan import check_plannable, make_plan
    from arp_hub.reports import spectra
    from arp_hub.runtimes.timed import check_installed
    from arp_hub.training import note_crop
    from arp_hub.training.data.excerpts import calibration_counts

    from ..inputs import (
        ModelChoice,
        RefineChoice,
        check_data_options,
        check_effort,
        effort_images,
        open_data,
        open_images,
        open_model,
        plan_options,
        state_file,
        timed_workload,
        warn_of_few_images,
    )
    from ..outcome import before_after, next_steps, refinement_effect, weight_bytes

    workload = timed_workload(batch_size, dtype, channels_last, runtime, precision)
    options = plan_options(keep_params, keep_macs, keep_latency, workload, schemes, rank_multiple, exclude, plan)
    check_installed(workload)
    check_effort(effort)
    refinement = RefineChoice(refine, refine_minutes, refine_steps, refine_images)
    refinement.check(data)
    check_data_options(
        data,
        image_key=image_key,
        label_key=label_key,
        streaming=streaming,
        calibration_images=calibration,
        calibration_copies=copies,
        max_images=max_images,
        workers=workers or None,
    )
    local = model if model.startswith("local-dir:") else None
    check_inputs_outside(output, {"--data": data, "--checkpoint": checkpoint, "--plan": plan, "--model": local})
    check_folder(output, overwrite=overwrite)
    if is_saved_folder(output) and not overwrite:
        raise ArpHubError(f"'{output}' already holds a model: choose another --output, or replace it with --overwrite")
    refinement.check_state(output, seed)
    given = None if plan is None else RankPlan.load(plan)
    choice = ModelChoice(model, checkpoint, pretrained, num_classes, model_kwargs, input_size, device, seed)
    network, random = open_model(choice)
    if given is None:
        check_plannable(network, options["exclude"])
    else:
        check_plan(network, given)
    found = open_data(data, network, image_key, label_key, streaming)
    refinement.check_data(found)
    most = effort_images(effort)
    counts = calibration_counts(found, calibration, copies, most) if found else (0, 0)
    images = open_images(found, calibration, copies, seed, workers, most)
    warn_of_few_images(counts[0])
    test = _test_split(network, found)
    # of several processes the first one measures and saves
    before = _figures(network, test, max_images, workers) if is_first() else {}
    before_bytes = weight_bytes(network)
    dense = copy.deepcopy(network) if refinement.wanted else network
    start = time.perf_counter()
    made = given or make_plan(network, **options, calibration=images, effort=effort, progress=True)
    falls = spectra.decays(network, made) if is_first() else {}
    decompose(network, made, images, effort=effort, progress=True)
    fit_seconds = time.perf_counter() - start
    refined = refinement.run(network, dense, found, output, seed, workers, timed=None if keep_latency is None else made)
    if not is_first():
        return
    seconds = fit_seconds + (refined.seconds if refined else 0)  # a resumed refinement counts its earlier parts
    after, after_bytes = _figures(network, test, max_images, workers), weight_bytes(network)
    result: dict[str, Any] = {
        "model": model,
        "data": data,
        **({"split": test.name} if test is not None else {}),
        "calibration_images": counts[0],
        "calibration_copies": counts[1],
        "effort": effort,
        "trained": False,
        **({"limited": True} if max_images and test is not None and after["images"] != len(test) else {}),
        **({"refinement": asdict(refined)} if refined else {}),
        **random,
        "seconds": round(seconds, 2),
        "seed": seed,
        "dense": before,
        **after,
    }
    names = _names(network, found) if found is not None and test is not None else ()
    metrics = {
        **result,
        "base_model": None if checkpoint or random["random_weights"] else published_name(model, network),
        "dataset": hub_dataset(data),
        "shared_images": test is not None and found is not None and found.shares_images,
        "plan": made.to_dict(),
        "spectra": falls,
    }
    if found is not None and test is not None:
        note_crop(network, found.form)
    if checkpoint or random["random_weights"]:  # the licence of weights that are not in this model
        change_config(network, {"license": None})
    with stage("save"):
        save_pretrained(network, output, metrics=metrics, label_names=names or None, overwrite=overwrite)
    if refined:
        state_file(output).unlink(missing_ok=True)
    if as_json:
        print_json({**result, "weights_bytes": after_bytes, "output": str(output)})
        return
    what = "refined without labels" if refined else "no training"
    figures = ({**before, "bytes": before_bytes}, {**after, "bytes": after_bytes})
    print_tables(before_after(f"{model}: {what}, {seconds:.0f} s", *figures, test.name if test is not None else None))
    if refined:
        print(refinement_effect(refined))
    used = {
        "--data": data,
        "--image-key": image_key,
        "--label-key": label_key,
        "--streaming": "" if streaming else None,
    }
    print(next_steps(output, used, test is not None, workload if keep_latency is not None else None))


def _names(model: nn.Module, data: ImageData) -> tuple[str, ...]:
    """Names of the classes for the saved model: those of the data, if the model has none and they say something."""
    from arp_hub.models.label_names import label_names

    synsets = all(re.fullmatch(r"n\d{8}", name) for name in data.class_names)  # timm and transformers know their names
    return () if synsets or label_names(model) else data.class_names


def _figures(
    model: nn.Module, test: Split | StreamedSplit | None, max_images: int | None, workers: int
) -> dict[str, Any]:
    """Size, and accuracy if there are test images."""
    from arp_hub._utils.progress import stage
    from arp_hub.layers.model import count_params
    from arp_hub.layers.trace import count_macs
    from arp_hub.training import evaluate

    size = {"params": count_params(model), "macs": count_macs(model)}
    if test is None:
        return size
    with stage("measure accuracy"):
        return {**evaluate(model, test, workers=workers, max_images=max_images), **size}


def _test_split(model: nn.Module, data: ImageData | None) -> Split | StreamedSplit | None:
    """The test images, if they have labels that fit the classes of the model."""
    from arp_hub.training.evaluate import why_not_measured

    if data is None:
        return None
    if data.test.label_range is None:
        note(f"accuracy is not measured: split '{data.test.name}' has no labels")
        return None
    if reason := why_not_measured(model, data.test):
        note(f"accuracy is not measured: {reason}")
        return None
    data.warn_of_shared_images()
    return data.test
