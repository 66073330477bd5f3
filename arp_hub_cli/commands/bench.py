"""``arp-hub bench``: latency of a compressed model against its dense form."""

from __future__ import annotations

from typing import Annotated

from ..options import (
    AsJson,
    ChannelsLast,
    Checkpoint,
    Device,
    Dtype,
    InputSize,
    Model,
    ModelKwargs,
    NumClasses,
    Precision,
    Pretrained,
    Runtime,
    timing_option,
)
from ..terminal import print_json, print_tables


def bench(
    model: Model,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: NumClasses = None,
    model_kwargs: ModelKwargs = None,
    batch_size: Annotated[
        str, timing_option(metavar="N,N", help="Images per forward pass; several values separated by commas.")
    ] = "1,32",
    dtype: Dtype = "float32",
    channels_last: ChannelsLast = False,
    runtime: Runtime = "torch",
    precision: Precision = "float32",
    compiled: Annotated[bool, timing_option("--compile", help="Compile both models with torch.compile first.")] = False,
    seconds: Annotated[float, timing_option(metavar="SECONDS", help="Seconds to measure each batch size.")] = 10.0,
    input_size: InputSize = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure the latency of a compressed model and of its dense form, in turns: medians with quartiles.

    A ratio below 1 is faster than dense. With OMP_NUM_THREADS=1, times are CPU seconds, which other processes hardly
    affect. --runtime exports both models to temporary files and times these.

    Example:
        arp-hub bench --model local-dir:out --batch-size 1,32 --json
    """
    from arp_hub._utils.environment import environment
    from arp_hub._utils.progress import counted
    from arp_hub.errors import ArpHubError
    from arp_hub.reports import tables
    from arp_hub.reports.benchmark import benchmark
    from arp_hub.runtimes.timed import check_installed, runtime_versions

    from ..inputs import ModelChoice, batch_sizes, open_model, timed_workload

    workloads = [timed_workload(size, dtype, channels_last, runtime, precision) for size in batch_sizes(batch_size)]
    if compiled and not workloads[0].in_torch:
        raise ArpHubError(f"--compile has no effect with --runtime {runtime}: leave it out")
    check_installed(workloads[0])
    choice = ModelChoice(model, checkpoint, pretrained, num_classes, model_kwargs, input_size, device)
    network, random = open_model(choice)
    found = [
        benchmark(network, workload, compiled=compiled, seconds=seconds)
        for workload in counted(workloads, "time batch sizes")
    ]
    if as_json:
        facts = environment()
        facts["versions"] |= runtime_versions(workloads[0])
        described = {"model": model, **random, **facts}
        print_json({**described, "latency": [one.to_dict() for one in found]})
    else:
        print_tables(tables.latency_table(found, model))
