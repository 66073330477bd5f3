"""``arp-hub plan``: choose scheme, groups and rank of every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    Model,
    ModelKwargs,
    NumClasses,
    Precision,
    Pretrained,
    RankMultiple,
    Runtime,
    Schemes,
    Seed,
    Streaming,
    Workers,
    output_option,
)
from ..processes import is_first
from ..terminal import note, print_json, print_tables


def plan(
    model: Model,
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
    workers: Workers = 0,
    device: Device = None,
    seed: Seed = 0,
    output: Annotated[Path, output_option(metavar="FILE", help="Plan file to write.")] = Path("plan.json"),
    overwrite: Annotated[
        bool,
        output_option("--overwrite", help="Replace --output even if it is no plan; a plan is replaced in any case."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Choose scheme, groups and rank of every layer under one budget: print the table, write the plan.

    Example:
        arp-hub plan --model resnet50 --keep-params 0.4 --output plan.json
    """
    from arp_hub.errors import check_inputs_outside
    from arp_hub.planning.make_plan import check_plannable, make_plan
    from arp_hub.reports import summary, tables
    from arp_hub.runtimes.timed import check_installed
    from arp_hub.training.data.excerpts import calibration_counts

    from ..inputs import (
        ModelChoice,
        check_data_options,
        check_effort,
        check_plan_file,
        effort_images,
        open_data,
        open_images,
        open_model,
        plan_options,
        timed_workload,
        warn_of_few_images,
    )

    workload = timed_workload(batch_size, dtype, channels_last, runtime, precision)
    options = plan_options(keep_params, keep_macs, keep_latency, workload, schemes, rank_multiple, exclude)
    check_installed(workload)
    check_effort(effort)
    check_data_options(
        data,
        image_key=image_key,
        label_key=label_key,
        streaming=streaming,
        calibration_images=calibration,
        calibration_copies=copies,
        workers=workers or None,
    )
    check_inputs_outside(output, {"--data": data, "--checkpoint": checkpoint})
    check_plan_file(output, overwrite)
    choice = ModelChoice(model, checkpoint, pretrained, num_classes, model_kwargs, input_size, device, seed)
    network, random = open_model(choice, meta=data is None)
    check_plannable(network, options["exclude"])
    found = open_data(data, network, image_key, label_key, streaming)
    most = effort_images(effort)
    images = open_images(found, calibration, copies, seed, workers, most)
    warn_of_few_images(calibration_counts(found, calibration, copies, most)[0] if found else 0)
    made = make_plan(network, **options, calibration=images, effort=effort, progress=True)
    if not is_first():
        return
    counted = summary.plan_report(network, made)
    made.save(output)
    if as_json:
        described = {"plan": made.to_dict(), "output": str(output), **random}
        print_json({**described, **counted.to_dict()})
    else:
        print_tables(tables.plan_table(counted, f"Plan of {model}"), tables.dense_table(counted))
        note(f"plan written to {output}")
