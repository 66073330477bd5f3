"""Open labelled images by name: scikit-learn's digits, a folder, tar shards, or a dataset of the Hub."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from ...errors import ArpHubError
from ...hub.client import bounded_waits, cache_if_offline
from .augment import Augmentation
from .decoding import ImageFiles, Rows, survey
from .files import ClassFolders, choose_configuration, class_folders, holds_tars, parquet_splits
from .images import BadImages, DecodedImages, Images, StreamedImages, decode_all
from .input_format import InputFormat
from .tables import Columns, LabelledTables, Splits, class_numbers, numbered
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


AnyTable = TypeVar("AnyTable")


@dataclass(frozen=True)
class Treatment:
    """What happens to each image.

    Attributes:
        form: Input format of the model.
        augmentation: How training images are varied.
        max_bad_images: Largest number of images of a split that may fail to decode.
    """

    form: InputFormat
    augmentation: Augmentation = Augmentation()
    max_bad_images: int = 0


def open_tables(source: str, columns: Columns, treatment: Treatment) -> dict[str, Table]:
    """The splits of a data set, with labels read and images in the input format of a model.

    Raises:
        ArpHubError: If the data or one of its columns cannot be found, or if labels have a wrong type.
    """
    if not isinstance(source, str):
        raise ArpHubError(f"data must be named by text, got {type(source).__name__} {source!r:.100}")
    if source == "digits":
        if columns.image or columns.label:
            raise ArpHubError("data 'digits' has no columns to choose from: leave out image_key and label_key")
        return _digits(replace(treatment.form.uncropped(), interpolation=_ENLARGED_BY), treatment.augmentation)
    return bind(source, *_open(source, columns), treatment)


def bind(source: str, splits: Splits, class_names: tuple[str, ...], treatment: Treatment) -> dict[str, Table]:
    """Stored images in the input format of a model. Empty splits are left out.

    Raises:
        ArpHubError: If all are empty.
    """
    splits = {name: split for name, split in splits.items() if len(split[0])}
    if not splits:
        raise ArpHubError(f"data '{source}' has no images: every split is empty")
    images = _resized(source, {name: rows for name, (rows, _) in splits.items()}, treatment)
    return {name: Table(images[name], labels, class_names) for name, (_, labels) in splits.items()}


def renamed(source: str, tables: Mapping[str, AnyTable], chosen: tuple[str, str]) -> dict[str, AnyTable]:
    """The splits, with those that are chosen for training and testing under the names ``train`` and ``test``.

    Raises:
        ArpHubError: If there is no such split.
    """
    result = dict(tables)
    for role, name in zip(("train", "test"), chosen, strict=True):
        if name and name not in tables:
            raise ArpHubError(
                f"data '{source}' has no split {role}_split='{name}': choose one of {', '.join(sorted(tables))}"
            )
        if name:
            result[role] = tables[name]
    return result


def _resized(source: str, splits: Mapping[str, Rows], treatment: Treatment) -> dict[str, Images]:
    """Decide for all splits together how images are resized and where they are held."""
    seen = survey(splits.values())
    for kind, white in seen.white.items():
        _logger.warning("data '%s': %d is white in its grey images of type %s", source, white, kind)
    form, augmentation = treatment.form.uncropped() if seen.small else treatment.form, treatment.augmentation
    height, width = form.size
    in_memory = seen.small and max(map(len, splits.values())) * 3 * height * width <= _MEMORY
    images: dict[str, Images] = {}
    for name, rows in splits.items():
        rows.white = seen.white
        bad = BadImages(len(rows), treatment.max_bad_images)
        if in_memory:
            decode = partial(decode_all, rows, form, bad)
            images[name] = DecodedImages(len(rows), decode, form, augmentation=augmentation, bad=bad)
        else:
            images[name] = StreamedImages(rows, form, augmentation, bad)
    return images


_ENLARGED_BY = "bicubic"
"""Interpolation that enlarges the digits, whatever that of the model."""


def _digits(form: InputFormat, augmentation: Augmentation) -> dict[str, Table]:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; one fixed, stratified fifth is for testing."""
    digits = load_digits()
    grey = torch.from_numpy(digits.images).float().mul_(255 / 16)[:, None]
    labels = torch.from_numpy(digits.target).long()
    parts = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=digits.target, random_state=0)

    def enlarge(chosen: Tensor) -> Tensor:
        # with antialias the kernel is that of Pillow, with which images of files are resized
        pixels = F.interpolate(grey[chosen], size=form.size, mode=_ENLARGED_BY, align_corners=False, antialias=True)
        return pixels.round_().clamp_(0, 255).byte().expand(-1, 3, -1, -1).contiguous()

    tables = {}
    for name, part in zip(("train", "test"), parts, strict=True):
        chosen = torch.from_numpy(np.sort(part))
        images = DecodedImages(len(chosen), partial(enlarge, chosen), form, flip=False, augmentation=augmentation)
        tables[name] = Table(images, labels[chosen], tuple(str(digit) for digit in range(10)))
    return tables


def _open(source: str, columns: Columns) -> tuple[Splits, tuple[str, ...]]:
    """The splits of a folder or Hub dataset, with the names of its classes."""
    place, config = place_and_config(source)
    folder = Path(place).expanduser()
    with opening(source):
        if is_tar_source(source):
            return _from_tars(source, columns)
        if folder.is_dir():
            if found := class_folders(place, folder):
                return _from_folders(place, folder, found, config, columns)
            if holds_tars(folder):
                choose_configuration(source, config, (), None)
                return _from_tars(place, columns)
            return LabelledTables(source, _load_parquet(place, folder, config), columns).read()
        return LabelledTables(source, hub_tables(source, place, config), columns).read()


@contextmanager
def opening(source: str) -> Iterator[None]:
    """Turn the errors of the datasets library and its parsers into one that names the data."""
    try:
        yield
    except ArpHubError:
        raise
    except Exception as error:  # the library, its parsers and its HTTP client raise dozens of kinds
        cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
        reason = str(cause).strip().splitlines()
        raise ArpHubError(
            f"cannot load the data '{source}': {type(cause).__name__}: {reason[0] if reason else 'no message'}. Give "
            "'digits', a folder of parquet files, tar shards or class folders, or a Hub dataset that you can reach"
        ) from error


def place_and_config(source: str) -> tuple[str, str | None]:
    """A folder or Hub id, and the configuration after the colon, if any."""
    place, colon, config = source.rpartition(":")
    if not colon or os.path.exists(Path(source).expanduser()):  # noqa: PTH110 - False for names that no file has
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
        split: TarImages(shards, read_index(source, split, shards, columns.image, columns.label))
        for split, shards in tar_splits(source).items()
    }
    texts = {split: images.index.label.tolist() for split, images in found.items()}
    if columns.labelled and not any(map(any, texts.values())):
        raise ArpHubError(
            f"data '{source}' has no labels: its samples have no cls member. Name the extension of the labels, or a "
            "field of the json members, with label_key"
        )
    whole = all(re.fullmatch(r"-?\d+", text) for split in texts.values() for text in split if text)
    names = {} if whole else numbered({text for split in texts.values() for text in split if text})
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


def hub_tables(source: str, place: str, config: str | None, *, streaming: bool = False) -> Mapping[str, Any]:
    """The splits of a Hub dataset.

    Raises:
        ArpHubError: If this cannot be the name of one, or if its configuration must be chosen.
    """
    import datasets

    if Path(place).expanduser().exists():
        raise ArpHubError(f"data '{source}' is a file: give the folder it is in")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", place):
        raise ArpHubError(
            f"unknown data '{source}': no such folder; give 'digits', a folder of parquet files, tar shards or class "
            "folders, or a Hub dataset id such as uoft-cs/cifar10"
        )
    try:
        with bounded_waits(), cache_if_offline():
            return datasets.load_dataset(place, config, streaming=streaming)
    except ValueError as error:  # datasets raises it for a missing or unknown configuration
        if "config" not in str(error).lower():
            raise
        configs = datasets.get_dataset_config_names(place)
        choose_configuration(place, config, configs, None)
        raise
