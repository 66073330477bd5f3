"""``arp-hub predict``: the classes of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options import (
    MODEL_HELP,
    AsJson,
    Checkpoint,
    Device,
    InputSize,
    ModelKwargs,
    NumClasses,
    Pretrained,
    model_name,
    output_option,
)
from ..terminal import note, print_json, print_tables


def predict(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False, callback=model_name),
    ],
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE", help="Image files, and folders of image files.", show_default=False),
    ],
    top_k: Annotated[int, output_option(metavar="N", help="Classes to show of each image.", min=1)] = 5,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    num_classes: NumClasses = None,
    model_kwargs: ModelKwargs = None,
    input_size: InputSize = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Print the most probable classes of images, with their probabilities.

    Images are resized and cropped as the model's config says.

    A path that does not exist is an error before any work. A file that cannot be decoded is one line on stderr; the
    others are still classified, and the exit code is 2.

    Names are those saved with the model, or those of ImageNet for a model with its classes.

    Example:
        arp-hub predict local-dir:out photo.jpg --top-k 3
    """
    from arp_hub._utils.progress import counted

    from ..classify import Classifier, image_files, predictions_table
    from ..inputs import ModelChoice, open_model

    files = image_files(images)
    choice = ModelChoice(model, checkpoint, pretrained, num_classes, model_kwargs, input_size, device)
    network, random = open_model(choice)
    classify = Classifier(network, top_k, files)
    found, failures = {}, []
    for file in counted(files, "classify images", shown=len(files) > 1):
        try:
            pixels = classify.read(file)
        except Exception as error:  # decoders raise a dozen kinds
            reason = " ".join(str(error).split()) or type(error).__name__
            failures.append(f"error: '{file}' cannot be read as an image: {reason}")
        else:
            found[str(file)] = classify(pixels)
    if as_json:
        listed = [{"image": name, "classes": [one.to_dict() for one in classes]} for name, classes in found.items()]
        print_json({"model": model, **random, "predictions": listed})
    elif found:
        print_tables(predictions_table(found))
    for failure in failures:
        note(failure)
    if failures:
        raise typer.Exit(2)
