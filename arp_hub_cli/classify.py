"""Classify image files with a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich import box
from rich.table import Table
from rich.text import Text
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from arp_hub.errors import ArpHubError
from arp_hub.models.label_names import label_names
from arp_hub.reports.tables import printable
from arp_hub.training.data.decoding import ImageFiles, decoded, image_formats, survey
from arp_hub.training.data.images import StreamedImages
from arp_hub.training.data.input_format import input_format

from .terminal import note


@dataclass(frozen=True)
class Prediction:
    """One class of an image.

    Attributes:
        index: Number of the class.
        name: Its name; empty if the model has none.
        probability: By the softmax of the model's logits.
    """

    index: int
    name: str
    probability: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Classifier:
    """A model that takes image files.

    Args:
        model: A classifier in evaluation mode.
        top_k: Number of classes to give of each image, at most all.
        files: The images. Those of grey with more than 8 bits share one value of white, as in a data set.

    Raises:
        ArpHubError: If the model has no classifier, or takes no images of three channels.
    """

    def __init__(self, model: nn.Module, top_k: int, files: Sequence[Path] = ()) -> None:
        if not getattr(model, "num_classes", 0):
            raise ArpHubError("the model has no classifier (num_classes=0), so that it predicts no classes")
        self.model, self.top_k = model, top_k
        self.names = class_names(model)
        self.device = next(model.parameters()).device
        self.form = input_format(model)
        self.white = survey([ImageFiles(file.parent, [file.name]) for file in files[:128]]).white
        for kind, white in self.white.items():
            note(f"warning: {white} is taken for white in grey images of type {kind}")

    def read(self, file: Path) -> Tensor:
        """An image, resized and cropped as the model's config says.

        Raises:
            Exception: Of any kind, if the image cannot be decoded.
        """
        rows = ImageFiles(file.parent, [file.name])
        rows.white = self.white
        transform = StreamedImages(rows, self.form).eval_transform
        return self.form.normalise(transform(decoded(rows, 0))[None].to(self.device))

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> list[Prediction]:
        """The most probable classes of an image, the first one first."""
        probabilities = self.model(pixels)[0].float().softmax(0)
        if probabilities.isnan().any():
            raise ArpHubError("the model gives NaN for an image: its weights are damaged; load others")
        top = probabilities.topk(min(self.top_k, len(probabilities)))
        return [
            Prediction(index, self.names[index] if self.names else "", probability)
            for index, probability in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]


def class_names(model: nn.Module) -> Sequence[str]:
    """Names of the classes: those saved with the model, or ImageNet's for weights of timm; empty if unknown."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    if names := label_names(model):
        described = cfg.get("label_descriptions") or {}
        return [str(described.get(name, name)) if isinstance(described, Mapping) else str(name) for name in names]
    subset = infer_imagenet_subset(model)
    return list(ImageNetInfo(subset).label_descriptions()) if subset else ()


def image_files(places: Sequence[Path]) -> list[Path]:
    """Image files, with those below each folder in the order of their names.

    Raises:
        ArpHubError: If a place does not exist, or a folder holds no image file.
    """
    kinds = image_formats()
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in kinds}
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            inside = sorted(path for path in place.rglob("*") if path.suffix.lower() in endings and path.is_file())
            if not inside:
                raise ArpHubError(f"the folder '{place}' holds no images: give image files, or a folder with some")
            found += inside
        elif place.exists():
            found.append(place)
        else:
            raise ArpHubError(f"no image at '{place}': give the path of an image file, or of a folder of images")
    return found


def predictions_table(found: Mapping[str, Sequence[Prediction]]) -> Table:
    """One line a class; the name of an image stands in its first line."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("image", "class"):
        table.add_column(name, overflow="fold")
    for name in ("index", "probability"):
        table.add_column(name, justify="right", overflow="fold")
    for image, classes in found.items():
        for first, one in zip([image, *[""] * len(classes)], classes, strict=False):
            shown = Text(printable(first)), Text(printable(one.name))
            table.add_row(*shown, str(one.index), f"{100 * one.probability:.1f} %")
        table.add_section()
    return table
