"""Labelled images by name: scikit-learn's digits, a local folder, or a dataset of the Hub.

Which column is the image and which the label is told by their feature types; training, held-out and test images are
told by the names of the splits.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from ...errors import ArpHubError
from ..seeds import keyed_generator, keyed_seed
from .images import BadImages, DecodedImages, Images, InputFormat, StreamedImages, decode_all

_logger = logging.getLogger(__name__)

_TEST_NAMES = ("test", "validation", "valid", "val", "dev")
_SMALL_SIDE = 96
"""Images up to this many pixels a side are small ..."""
_SMALL_BYTES = 2**30
"""... and are decoded in memory, if all of a split take no more than this at the model's input size."""
_LOOKED_AT = 16
_SMALL_CALIBRATION, _LARGE_CALIBRATION = 1024, 256
"""Images to calibrate on: a large one has many more patches, and costs as much more."""
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


@dataclass(frozen=True)
class Split:
    """Some labelled images.

    Attributes:
        name: Name for messages, as ``train`` or ``test``.
        images: Where the pixels come from.
        labels: Class of each image, ``(N,)``; None where the data has no labels.
        indices: Which of ``images`` belong to this split, ``(N,)``.
    """

    name: str
    images: Images
    labels: Tensor | None
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All images, normalised and not augmented, ``(N, 3, H, W)``, and their labels ``(N,)``: for small data.

        Raises:
            ArpHubError: If there are no labels.
        """
        if self.labels is None:
            raise ArpHubError(f"split '{self.name}' has no labels")
        return torch.cat(list(self.images.evaluation(self.indices, 256, torch.device("cpu"), 0))), self.labels


@dataclass(frozen=True)
class ImageData:
    """A data set, with what training, choices and the last number are made on.

    Attributes:
        name: As it was asked for.
        num_classes: Number of classes, 0 without labels.
        class_names: Their names, where the data tells.
        train: Images to train on, without those held out.
        val: Images held out of ``train`` for choices, or None.
        test: Images for the last number only.
        others: Every other split of the data, by its own name.
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    train: Split
    val: Split | None
    test: Split
    others: Mapping[str, Split] = field(default_factory=dict)

    def bad_images(self, accelerator: Accelerator | None = None) -> int:
        """How many images could not be decoded so far, by any process, each counted once."""
        splits = (self.train, self.test, *self.others.values())
        seen = torch.cat([images.bad.seen for images in {id(split.images): split.images for split in splits}.values()])
        if accelerator is not None:
            seen = accelerator.reduce(seen.to(accelerator.device, torch.float32), "sum")
        return int((seen > 0).sum())

    def split(self, name: str) -> Split:
        """One split by name: ``train``, ``val``, ``test`` or a name of the data's own.

        Raises:
            ArpHubError: If there is no such split.
        """
        splits = {**self.others, "train": self.train, "test": self.test}
        if self.val is not None:
            splits["val"] = self.val
        if name not in splits:
            raise ArpHubError(f"data '{self.name}' has no split '{name}': choose one of {', '.join(sorted(splits))}")
        return splits[name]


def load_data(
    source: str,
    model: nn.Module,
    *,
    image_key: str | None = None,
    label_key: str | None = None,
    val_fraction: float = 0.0,
    seed: int = 0,
    require_labels: bool = True,
    auto_augment: str = "",
    max_bad_images: int = 0,
) -> ImageData:
    """Find a data set and make it fit a model's input. Pixels are decoded when they are first used.

    Args:
        source: ``digits``; a folder of parquet files or of class folders; or a Hub dataset id.
        model: The model to feed: its pretrained_cfg gives input size, mean and std.
        image_key: Image column; by default the one of type Image.
        label_key: Label column; by default the one of type ClassLabel.
        val_fraction: Share of the training images that is held out, stratified by class.
        seed: Seed of the held-out split.
        require_labels: Whether data without labels is an error.
        auto_augment: timm's augmentation string, as ``rand-m9-mstd0.5``, for training.
        max_bad_images: So many images of a split may fail to decode; an image of the mean colour stands in for each.

    Raises:
        ArpHubError: If the data or one of its columns cannot be found, or the labels make no sense.
    """
    if not 0 <= val_fraction < 1:
        raise ArpHubError(f"val_fraction must be at least 0 and below 1, got {val_fraction}")
    if max_bad_images < 0:
        raise ArpHubError(f"max_bad_images must be at least 0, got {max_bad_images}")
    form = input_format(model)
    if source == "digits":
        tables = _digits(form, auto_augment)
    else:
        found = _Tables(source, _open(source), image_key, label_key, require_labels)
        tables = found.splits(form, auto_augment, max_bad_images)
    return _arrange(source, tables, val_fraction, seed, require_labels)


def input_format(model: nn.Module) -> InputFormat:
    """Input size and normalisation of a model, by its pretrained_cfg.

    Raises:
        ArpHubError: If the model does not take images of three channels.
    """
    config = timm.data.resolve_data_config({}, model=model)
    channels, height, width = config["input_size"]
    if channels != 3:
        raise ArpHubError(f"the model takes images of {channels} channels, the data has 3: build it with in_chans=3")
    return InputFormat(
        (height, width), tuple(config["mean"]), tuple(config["std"]), config["interpolation"], config["crop_pct"]
    )


def calibration_counts(data: ImageData, count: int | None = None, copies: int | None = None) -> tuple[int, int]:
    """How many images `calibration_images` takes, and how many varied copies of each it adds.

    Args:
        data: The data.
        count: Number of images; at most all training images are given. By default 1,024 small or 256 large ones.
        copies: Copies of each; by default one of a small image, none of a large one.

    Raises:
        ArpHubError: If there would be no images, or copies are negative.
    """
    small = isinstance(data.train.images, DecodedImages)
    if count is None:
        count = _SMALL_CALIBRATION if small else _LARGE_CALIBRATION
    if copies is None:
        copies = 1 if small else 0
    if count < 1:
        raise ArpHubError(f"calibration needs at least one image, got {count}")
    if copies < 0:
        raise ArpHubError(f"calibration_copies must be 0 or more, got {copies}")
    return min(count, len(data.train)), copies


def calibration_images(
    data: ImageData, count: int | None = None, *, copies: int | None = None, seed: int = 0, workers: int = 0
) -> Tensor:
    """Training images without labels, normalised: what `make_plan` and `decompose` calibrate on.

    Copies of an image, turned, moved, scaled and recoloured, stand for images that the model has not been trained on.

    Args:
        data: The data.
        count: Number of images; at most all training images are given. By default 1,024 small or 256 large ones.
        copies: Varied copies of each that are added; by default one of a small image, none of a large one.
        seed: Seed of the choice and of the copies.
        workers: DataLoader workers, for large data.

    Returns:
        Images ``(count * (1 + copies), 3, H, W)`` on the CPU, each followed by its copies.

    Raises:
        ArpHubError: If there would be no images, or copies are negative.
    """
    split, device = data.train, torch.device("cpu")
    count, copies = calibration_counts(data, count, copies)
    chosen = split.indices[torch.randperm(len(split), generator=keyed_generator(seed, "calibration"))[:count]]
    versions = [torch.cat(list(split.images.evaluation(chosen, 128, device, workers)))]
    for copy in range(copies):
        key = keyed_seed(seed, "calibration", copy)
        versions.append(torch.cat(list(split.images.varied(chosen, 128, device, workers, key))))
    return torch.stack(versions, dim=1).flatten(0, 1)


@dataclass(frozen=True)
class _Table:
    """One split as the data has it."""

    images: Images
    labels: Tensor | None
    class_names: tuple[str, ...] = ()


def _arrange(source: str, tables: dict[str, _Table], val_fraction: float, seed: int, require_labels: bool) -> ImageData:
    """Decide which table is trained on and which is tested on."""
    usable = {name: table for name, table in tables.items() if not require_labels or _has_labels(table)}
    if not usable:
        raise ArpHubError(f"data '{source}': no split has labels (splits: {', '.join(tables) or 'none'})")
    if "train" in tables and "train" not in usable:
        raise ArpHubError(
            f"data '{source}': the images of split 'train' have no labels; those of {', '.join(usable)} do"
        )
    test_name = next((name for name in _TEST_NAMES if name in usable), None)
    if len(usable) == 1:
        train_name = test_name = next(iter(usable))
        _logger.warning(
            "data '%s' has one usable split, '%s': it is used for training AND testing, so accuracies flatter",
            source,
            train_name,
        )
    elif "train" in usable and test_name:
        train_name = "train"
    else:
        raise ArpHubError(
            f"data '{source}' needs the splits 'train' and 'test' (or 'validation'), it has {', '.join(usable)}"
        )
    splits = {
        name: Split(name, table.images, table.labels if _has_labels(table) else None, torch.arange(len(table.images)))
        for name, table in tables.items()
    }
    class_names = usable[train_name].class_names
    num_classes = _check_labels(source, [splits[train_name], splits[test_name]], len(class_names))
    train, val = _hold_out(splits[train_name], val_fraction, seed)
    others = {name: split for name, split in splits.items() if name != "train"}
    return ImageData(source, num_classes, class_names, train, val, splits[test_name], others)


def _has_labels(table: _Table) -> bool:
    """Whether there are labels; the Hub's convention for hidden ones is -1 throughout."""
    return table.labels is not None and not bool((table.labels == -1).all())


def _check_labels(source: str, splits: list[Split], named: int) -> int:
    """Check that labels lie in 0..classes-1, and return classes: as named, or else as the training labels tell."""
    labelled = [(split.name, split.labels) for split in splits if split.labels is not None]
    if not labelled:
        return 0
    num_classes = named or int(labelled[0][1].max()) + 1
    for name, labels in labelled:
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            wrong = int(((labels < 0) | (labels >= num_classes)).sum())
            raise ArpHubError(
                f"data '{source}': {wrong} labels of split '{name}' are out of range, found {low}..{high} where "
                f"{num_classes} classes allow 0..{num_classes - 1}: correct the labels or name another label_key"
            )
    return num_classes


def _hold_out(train: Split, fraction: float, seed: int) -> tuple[Split, Split | None]:
    if fraction == 0:
        return train, None
    labels = None if train.labels is None else train.labels.numpy()
    try:
        kept, held = train_test_split(train.indices.numpy(), test_size=fraction, stratify=labels, random_state=seed)
    except ValueError as error:
        reason = str(error).split(". ")[0]
        raise ArpHubError(
            f"val_fraction={fraction} cannot be held out of {len(train)} images, stratified by class: {reason}. "
            "Use 0 or another share"
        ) from error
    parts = []
    for name, chosen in (("train", kept), ("val", held)):
        indices = torch.from_numpy(np.sort(chosen))
        parts.append(Split(name, train.images, None if train.labels is None else train.labels[indices], indices))
    return parts[0], parts[1]


def _digits(form: InputFormat, auto_augment: str) -> dict[str, _Table]:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; one fixed, stratified fifth is for testing."""
    digits = load_digits()
    grey = torch.from_numpy(digits.images).float().mul_(255 / 16)[:, None]
    labels = torch.from_numpy(digits.target).long()
    parts = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=digits.target, random_state=0)

    def enlarge(chosen: Tensor) -> Tensor:
        pixels = F.interpolate(grey[chosen], size=form.size, mode="bicubic", align_corners=False)
        return pixels.round_().clamp_(0, 255).byte().expand(-1, 3, -1, -1).contiguous()

    tables = {}
    for name, part in zip(("train", "test"), parts, strict=True):
        chosen = torch.from_numpy(np.sort(part))
        images = DecodedImages(len(chosen), partial(enlarge, chosen), form, flip=False, auto_augment=auto_augment)
        tables[name] = _Table(images, labels[chosen], tuple(str(digit) for digit in range(10)))
    return tables


def _open(source: str) -> Mapping[str, Any]:
    """The splits of a folder or Hub dataset, as tables of the datasets library."""
    import datasets  # its import takes a second, which digits need not pay

    path = Path(source).expanduser()
    try:
        if path.is_dir():
            _check_folder(source, path)
            if any(path.rglob("*.parquet")):
                return datasets.load_dataset(str(path))
            return datasets.load_dataset("imagefolder", data_dir=str(path))
        if path.exists():
            raise ArpHubError(f"data '{source}' is a file: give the folder it is in")
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
            raise ArpHubError(
                f"unknown data '{source}': no such folder; give 'digits', a folder of parquet files or of class "
                "folders, or a Hub dataset id such as uoft-cs/cifar10"
            )
        return datasets.load_dataset(source)
    except ArpHubError:
        raise
    except Exception as error:  # the library, its parsers and its HTTP client raise dozens of kinds
        reason = str(error).strip().splitlines()
        raise ArpHubError(
            f"cannot load the data '{source}': {type(error).__name__}: {reason[0] if reason else 'no message'}. Give "
            "'digits', a folder of parquet files or of class folders, or the id of a Hub dataset that you can reach"
        ) from error


def _check_folder(source: str, path: Path) -> None:
    if not any(file.suffix.lower() in _IMAGE_SUFFIXES | {".parquet"} for file in path.rglob("*")):
        raise ArpHubError(
            f"the folder '{source}' holds no images and no parquet files: give a folder of parquet "
            "files, or one with a folder of images per class, in train/ and test/ if it is split"
        )


class _Tables:
    """The splits of one dataset, with its columns found."""

    def __init__(
        self, source: str, tables: Mapping[str, Any], image_key: str | None, label_key: str | None, labels: bool
    ) -> None:
        import datasets

        self.source, self.tables = source, tables
        self.features = next(iter(tables.values())).features
        images = [name for name, kind in self.features.items() if isinstance(kind, datasets.Image)]
        classes = [name for name, kind in self.features.items() if isinstance(kind, datasets.ClassLabel)]
        self.image_key = self._choose("image", image_key, images, required=True)
        self.label_key = self._choose("label", label_key, classes, required=labels)
        if self.image_key not in images:
            raise ArpHubError(
                f"data '{source}': column '{self.image_key}' holds no images; columns found: {self._columns()}"
            )
        kind = self.features.get(self.label_key)
        if kind is not None and self.label_key not in classes and not str(getattr(kind, "dtype", "")).startswith("int"):
            raise ArpHubError(
                f"data '{source}': column '{self.label_key}' holds no class numbers; columns found: {self._columns()}"
            )

    def _choose(self, what: str, named: str | None, found: list[str], required: bool) -> str:
        if named:
            if named not in self.features:
                raise ArpHubError(
                    f"data '{self.source}' has no column {what}_key='{named}'; columns found: {self._columns()}"
                )
            return named
        if len(found) == 1:
            return found[0]
        if not found and not required:
            return ""
        number = "no" if not found else "more than one"
        raise ArpHubError(
            f"data '{self.source}' has {number} {what} column; columns found: {self._columns()}. "
            f"Name the right one with {what}_key"
        )

    def _columns(self) -> str:
        return ", ".join(f"{name} ({type(kind).__name__})" for name, kind in self.features.items())

    def splits(self, form: InputFormat, auto_augment: str, max_bad_images: int) -> dict[str, _Table]:
        """Labels read, images bound to the model's input."""
        kind = self.features.get(self.label_key)
        names = tuple(getattr(kind, "names", None) or ())
        tables = {}
        for name, table in self.tables.items():
            if not len(table):
                continue
            labels = None
            if self.label_key:
                labels = self._labels(name, np.array(table.with_format("numpy")[self.label_key][:]))
            tables[str(name)] = _Table(self._images(table, form, auto_augment, max_bad_images), labels, names)
        if not tables:
            raise ArpHubError(f"data '{self.source}' has no images: every split is empty")
        return tables

    def _labels(self, split: str, values: np.ndarray) -> Tensor:
        """Class numbers; -1 throughout where there are none, as the Hub has it."""
        absent = np.isnan(values.astype(float))
        if absent.any() and not absent.all():
            raise ArpHubError(
                f"data '{self.source}': {absent.sum()} of {len(values)} images of split '{split}' have no label: "
                "label or remove them"
            )
        return torch.full((len(values),), -1) if absent.all() else torch.from_numpy(values).long()

    def _images(self, table: Any, form: InputFormat, auto_augment: str, max_bad_images: int) -> Images:
        rows = table.select_columns([self.image_key])
        bad = BadImages(len(rows), max_bad_images)
        bytes_needed = len(rows) * 3 * form.size[0] * form.size[1]
        if bytes_needed <= _SMALL_BYTES and self._are_small(rows):
            return DecodedImages(
                len(rows),
                partial(decode_all, rows, self.image_key, form, bad),
                form,
                auto_augment=auto_augment,
                bad=bad,
            )
        return StreamedImages(rows, self.image_key, form, auto_augment, bad)

    def _are_small(self, rows: Any) -> bool:
        """Whether the first image that can be decoded is small; which cannot be is found out and named later."""
        for row in range(min(len(rows), _LOOKED_AT)):
            try:
                first = rows[row][self.image_key]
            except Exception:  # decoders raise a dozen kinds
                continue
            return first is not None and max(first.size) <= _SMALL_SIDE
        return False
