"""``arp-hub evaluate``: accuracy and size of a model."""

from __future__ import annotations

from typing import Annotated

from ..options import (
    DATA_HELP,
    AsJson,
    Checkpoint,
    Device,
    ImageKey,
    InputSize,
    LabelKey,
    MaxImages,
    Model,
    ModelKwargs,
    NumClasses,
    Pretrained,
    Streaming,
    Workers,
    data_option,
    machine_option,
)
from ..terminal import print_json, print_tables


def evaluate(
    model: Model,
    data: Annotated[str, data_option(metavar="DATA", help=DATA_HELP)],
    split: Annotated[
        str, data_option(metavar="NAME", help="Split to measure on: test (the default), train, or any other.")
    ] = "test",
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: NumClasses = None,
    model_kwargs: ModelKwargs = None,
    image_key: ImageKey = None,
    label_key: LabelKey = None,
    streaming: Streaming = False,
    input_size: InputSize = None,
    batch_size: Annotated[int, machine_option(metavar="N", help="Images per forward pass.", min=1)] = 256,
    max_images: MaxImages = None,
    workers: Workers = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure top-1 and top-5 (per cent), loss (nats), parameters and multiply-accumulates.

    Example:
        arp-hub evaluate --model local-dir:out --data uoft-cs/cifar10 --json
    """
    from arp_hub._utils.progress import stage
    from arp_hub.layers.model import count_params
    from arp_hub.layers.trace import count_macs
    from arp_hub.reports import tables
    from arp_hub.training import evaluate

    from ..inputs import ModelChoice, open_labelled, open_model

    choice = ModelChoice(model, checkpoint, pretrained, num_classes, model_kwargs, input_size, device)
    network, random = open_model(choice)
    part = open_labelled(data, network, image_key, label_key, streaming, split).split(split)
    with stage("measure accuracy"):
        scores = evaluate(network, part, batch_size=batch_size, workers=workers, max_images=max_images)
    result = {**scores, "params": count_params(network), "macs": count_macs(network)}
    if as_json:
        print_json({"model": model, **random, "data": data, "split": part.name, **result})
    else:
        print_tables(tables.comparison_table({model: result}, f"{data}, split {part.name}"))
