"""The columns of a data set that hold its images and labels, chosen by their types, and the numbers of its classes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ArpHubError
from .decoding import ImageColumn, Rows

Splits = dict[str, tuple[Rows, Tensor | None]]
"""Stored images and labels of each split."""


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


class LabelledTables:
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
            if named not in self.features and not (what == "label" and named in self._json_fields()):
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

    def _json_fields(self) -> Collection[str]:
        """Fields of the ``json`` member of tar shards that are read in order: one of them may hold the labels."""
        import datasets

        fields = self.features.get("json")
        streamed = all(isinstance(table, datasets.IterableDataset) for table in self.tables.values())
        return fields if streamed and isinstance(fields, Mapping) else ()

    def _columns(self) -> str:
        return ", ".join(f"{name} ({type(kind).__name__})" for name, kind in self.features.items())

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes that the type of the label column gives."""
        return tuple(getattr(self.features.get(self.label_key), "names", None) or ())

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
            numbers = numbered({label for split in values.values() for label in split if label})
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


def numbered(names: Collection[str]) -> dict[str, int]:
    """Classes in order of their names; names that are whole numbers in order of the numbers."""
    whole = all(name.isdecimal() for name in names)
    order = sorted(names, key=lambda name: (int(name) if whole else 0, name))  # a set has no order: "1" and "01" differ
    return {name: number for number, name in enumerate(order)}
