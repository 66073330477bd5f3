"""Open labelled images by name: scikit-learn's digits, a folder, or a dataset of the Hub.

Feature types decide which column holds the images and which the labels.
"""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from ...errors import ArpHubError
from .decoding import ImageColumn, ImageFiles, Rows, survey
from .files import ClassFolders, choose_configuration, class_folders, holds_tars, parquet_splits
from .images import BadImages, DecodedImages, Images, StreamedImages, decode_all
from .input_format import InputFormat
from .tars import TarImages, is_tar_source, read_index, tar_splits

_logger = logging.getLogger(__name__)

_MEMORY = 2**30
"""Largest size in bytes of a split of small images, at the model's input size, that is held in memory: 1 GiB, an eighth
of the memory of a small GPU."""


@dataclass(frozen=True)
class Table:
    """One split of a data set as it is stored."""

    images: Images
    labels: Tensor | None
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Columns:
    """Which columns of a data set to read.

    Attributes:
        image: Name of the image column; None for the one of type Image.
        label: Name of the label column; None for the one of type ClassLabel.
        labelled: Whether labels are required.
    """

    image: str | None = None
    label: str | None = None
    labelled: bool = True


def open_tables(
    source: str, columns: Columns, form: InputFormat, auto_augment: str, max_bad_images: int
) -> dict[str, Table]:
    """The splits of a data set, with labels read and images in the input format of a model.

    Raises:
        ArpHubError: If the data or one of its columns cannot be found, or if labels have a wrong type.
    """
    if not isinstance(source, str):
        raise ArpHubError(f"data must be named by text, got {type(source).__name__} {source!r:.100}")
    if source == "digits":
        if columns.image or columns.label:
            raise ArpHubError("data 'digits' has no columns to choose from: leave out image_key and label_key")
        return _digits(form, auto_augment)
    splits, class_names = _open(source, columns)
    splits = {name: split for name, split in splits.items() if len(split[0])}
    if not splits:
        raise ArpHubError(f"data '{source}' has no images: every split is empty")
    images = _bind(source, {name: rows for name, (rows, _) in splits.items()}, form, auto_augment, max_bad_images)
    return {name: Table(images[name], labels, class_names) for name, (_, labels) in splits.items()}


def _bind(
    source: str, splits: Mapping[str, Rows], form: InputFormat, auto_augment: str, max_bad_images: int
) -> dict[str, Images]:
    """Decide for all splits together how images are resized and where they are held."""
    seen = survey(splits.values())
    for kind, white in seen.white.items():
        _logger.warning("data '%s': %d is white in its grey images of type %s", source, white, kind)
    height, width = form.size
    in_memory = seen.small and max(map(len, splits.values())) * 3 * height * width <= _MEMORY
    images: dict[str, Images] = {}
    for name, rows in splits.items():
        rows.white = seen.white
        bad = BadImages(len(rows), max_bad_images)
        if in_memory:
            decode = partial(decode_all, rows, form, bad)
            images[name] = DecodedImages(len(rows), decode, form, auto_augment=auto_augment, bad=bad)
        else:
            images[name] = StreamedImages(rows, form, auto_augment, bad, crop=not seen.small)
    return images


def _digits(form: InputFormat, auto_augment: str) -> dict[str, Table]:
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
        tables[name] = Table(images, labels[chosen], tuple(str(digit) for digit in range(10)))
    return tables


Splits = dict[str, tuple[Rows, Tensor | None]]
"""Stored images and labels of each split."""


def _open(source: str, columns: Columns) -> tuple[Splits, tuple[str, ...]]:
    """The splits of a folder or Hub dataset, with the names of its classes."""
    place, config = _place_and_config(source)
    folder = Path(place).expanduser()
    try:
        if is_tar_source(source) and not Path(source).is_dir():
            return _from_tars(source, columns)
        if folder.is_dir():
            if found := class_folders(place, folder):
                return _from_folders(place, folder, found, config, columns)
            if holds_tars(folder):
                choose_configuration(source, config, (), None)
                return _from_tars(place, columns)
            return _Labelled(source, _load_parquet(place, folder, config), columns).read()
        if folder.exists():
            raise ArpHubError(f"data '{source}' is a file: give the folder it is in")
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", place):
            raise ArpHubError(
                f"unknown data '{source}': no such folder; give 'digits', a folder of parquet files, tar shards or "
                "class folders, or a Hub dataset id such as uoft-cs/cifar10"
            )
        return _Labelled(source, _load_from_hub(place, config), columns).read()
    except ArpHubError:
        raise
    except Exception as error:  # the library, its parsers and its HTTP client raise dozens of kinds
        cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
        reason = str(cause).strip().splitlines()
        raise ArpHubError(
            f"cannot load the data '{source}': {type(cause).__name__}: {reason[0] if reason else 'no message'}. Give "
            "'digits', a folder of parquet files or of class folders, or the id of a Hub dataset that you can reach"
        ) from error


def _place_and_config(source: str) -> tuple[str, str | None]:
    """A folder or Hub id, and the configuration after the colon, if any."""
    place, colon, config = source.rpartition(":")
    if not colon or Path(source).expanduser().exists():
        return source, None
    return place, config


def _from_folders(
    source: str, folder: Path, found: ClassFolders, config: str | None, columns: Columns
) -> tuple[Splits, tuple[str, ...]]:
    choose_configuration(source, config, (), None)
    for what, named in (("image", columns.image), ("label", columns.label)):
        if named not in (None, what):
            raise ArpHubError(
                f"data '{source}' has no column {what}_key='{named}': the columns of class folders are image and label"
            )
    splits: Splits = {}
    for name, paths in found.splits.items():
        labels = found.labels[name]
        splits[name] = ImageFiles(folder, paths), None if labels is None else torch.tensor(labels)
    return splits, found.classes


def _from_tars(source: str, columns: Columns) -> tuple[Splits, tuple[str, ...]]:
    found = {
        split: TarImages(shards, read_index(source, shards, columns.image, columns.label))
        for split, shards in tar_splits(source).items()
    }
    texts = {split: images.index.label.tolist() for split, images in found.items()}
    if columns.labelled and not any(map(any, texts.values())):
        raise ArpHubError(
            f"data '{source}' has no labels: its samples have no cls member. Name the extension of the labels, or a "
            "field of the json members, with label_key"
        )
    whole = all(re.fullmatch(r"-?\d+", text) for split in texts.values() for text in split if text)
    names = {} if whole else _numbered({text for split in texts.values() for text in split if text})
    splits: Splits = {}
    for split, images in found.items():
        values = [text and (names[text] if names else int(text)) for text in texts[split]]
        splits[split] = images, class_numbers(source, split, values, {})
    return splits, tuple(names)


def _load_parquet(source: str, folder: Path, config: str | None) -> Mapping[str, Any]:
    import datasets  # here, because its import takes a second that digits and class folders do not need

    files, features = parquet_splits(source, folder, config)
    escaped = {split: [glob.escape(path) for path in paths] for split, paths in files.items()}
    return datasets.load_dataset("parquet", data_files=escaped, features=features)


def _load_from_hub(source: str, config: str | None) -> Mapping[str, Any]:
    import datasets

    try:
        return datasets.load_dataset(source, config)
    except ValueError as error:  # datasets raises it for a missing or unknown configuration
        if "config" not in str(error).lower():
            raise
        configs = datasets.get_dataset_config_names(source)
        choose_configuration(source, config, configs, None)
        raise


class _Labelled:
    """Tables of the datasets library, one for each split, and their columns of images and labels."""

    def __init__(self, source: str, tables: Mapping[str, Any], columns: Columns) -> None:
        import datasets

        self.source, self.tables = source, dict(tables)
        self.features = next(iter(tables.values())).features
        images = [name for name, kind in self.features.items() if isinstance(kind, datasets.Image)]
        images = images or [name for name, kind in self.features.items() if _stores_images(kind)]
        classes = [name for name, kind in self.features.items() if isinstance(kind, datasets.ClassLabel)]
        self.image_key = self._choose("image", columns.image, images, required=True)
        self.label_key = self._choose("label", columns.label, classes, required=columns.labelled)
        if self.image_key not in images:
            raise ArpHubError(
                f"data '{source}': column '{self.image_key}' holds no images; columns found: {self._columns()}"
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

    def read(self) -> tuple[Splits, tuple[str, ...]]:
        """Stored images and labels of each split, and the names of the classes."""
        columns = {str(name): ImageColumn(table, self.image_key) for name, table in self.tables.items()}
        if not self.label_key:
            return {name: (rows, None) for name, rows in columns.items()}, ()
        values = {str(name): table[self.label_key][:] for name, table in self.tables.items()}
        labels, class_names = self._labels(values)
        return {name: (rows, labels[name]) for name, rows in columns.items()}, class_names

    def _labels(self, values: Mapping[str, list[Any]]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Class numbers of each split, and the names of the classes if the data has them."""
        kind = self.features[self.label_key]
        names, dtype = getattr(kind, "names", None), str(getattr(kind, "dtype", ""))
        numbers: Mapping[Any, int] = {}
        if dtype == "bool":
            numbers = {False: 0, True: 1}
        elif dtype in ("string", "large_string"):
            numbers = _numbered({label for split in values.values() for label in split if label})
        elif not names and not re.fullmatch(r"u?int\d+", dtype):
            raise ArpHubError(
                f"data '{self.source}': column '{self.label_key}' holds neither numbers nor names of classes; columns "
                f"found: {self._columns()}"
            )
        labels = {name: class_numbers(self.source, name, split, numbers) for name, split in values.items()}
        return labels, tuple(names or map(str, numbers))


def class_numbers(source: str, split: str, values: Sequence[Any], numbers: Mapping[Any, int]) -> Tensor:
    """Class numbers of labels, through ``numbers`` if there are any. Without any label, all are -1, as on the Hub.

    Raises:
        ArpHubError: If some images have no label.
    """
    absent = sum(1 for value in values if value is None or value == "")
    if absent == len(values):
        return torch.full((len(values),), -1)
    if absent:
        raise ArpHubError(
            f"data '{source}': {absent} of {len(values)} images of split '{split}' have no label: label or remove them"
        )
    largest = torch.iinfo(torch.int64).max
    return torch.tensor([numbers[value] if numbers else min(value, largest) for value in values])


def _stores_images(kind: Any) -> bool:
    """Whether a column may hold encoded images although it is not of type Image, as in parquet files of pandas."""
    return isinstance(kind, dict) and {"bytes", "path"} == set(kind) or getattr(kind, "dtype", "") == "binary"


def _numbered(names: Collection[str]) -> dict[str, int]:
    """Classes in order of their names; names that are whole numbers in order of the numbers."""
    order = sorted(names, key=int if all(name.isdecimal() for name in names) else str)
    return {name: number for number, name in enumerate(order)}
