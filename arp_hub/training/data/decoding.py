"""Decode one stored image to RGB, after a check of its size. Grey values of any range are scaled to 0..255."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from ...errors import ArpHubError
from ..seeds import keyed_generator

_logger = logging.getLogger(__name__)

SMALL_SIDE = 96
"""Longest side in pixels of a small image: the largest common set of such images is STL-10, of 96 pixels."""
_MOST_PIXELS = 2**26
"""Pixels of an image that is decoded, 67 million: Pillow holds them in 256 MiB, and each loader worker may do so."""
_SAMPLED = 128
"""Images of a split whose headers are read. If one in twenty is large, one sample in 700 misses them all."""
_WHITES = (1, 255, 1023, 4095, 16383, 65535)
"""Values that are white in grey images of floats and of 1, 8, 10, 12, 14 and 16 bits."""
_OVERSHOOT = 0.02
"""Share of white by which floats may lie outside black and white, as bicubic resizing leaves them; they are clipped."""
_PROGRAMS = {"EPS", "WMF"}
"""Formats that are programs: to decode them, Pillow starts Ghostscript, or has Windows run them."""


def open_image(source: Path | str | BinaryIO) -> Image.Image:
    """A picture, with only its header read. Formats that are programs are refused, whatever the name of the file.

    Raises:
        PIL.UnidentifiedImageError: If it is no picture.
    """
    return Image.open(source, formats=image_formats())


def image_formats() -> list[str]:
    """The formats that `open_image` reads, as Pillow names them."""
    Image.init()
    return [kind for kind in Image.ID if kind in Image.OPEN and kind not in _PROGRAMS]


class Rows(Protocol):
    """The images of one split, as they are stored."""

    white: Mapping[str, int]
    """Value of white in grey images, by the kind of their numbers (`number_kind`)."""

    def __len__(self) -> int: ...

    def open(self, row: int) -> Image.Image:
        """An image, with only its header read."""

    def name(self, row: int) -> str:
        """The name of the image in messages."""


class ImageFiles:
    """Image files below a folder.

    Args:
        root: The folder.
        paths: The files, relative to it.
    """

    def __init__(self, root: Path, paths: list[str]) -> None:
        self.root, self.paths = root, paths
        self.white: Mapping[str, int] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, row: int) -> Image.Image:
        """The image of a file."""
        return open_image(self.root / self.paths[row])

    def name(self, row: int) -> str:
        """The path of the file."""
        return f"image '{self.paths[row]}'"


class ImageColumn:
    """The image column of a table.

    Args:
        table: A table of the datasets library.
        key: Name of the column.
    """

    def __init__(self, table: Any, key: str) -> None:
        import datasets

        self.table, self.key = table.select_columns([key]).cast_column(key, datasets.Image(decode=False)), key
        self.white: Mapping[str, int] = {}

    def __len__(self) -> int:
        return len(self.table)

    def open(self, row: int) -> Image.Image:
        """The image of a row.

        Raises:
            ArpHubError: If the row holds none.
        """
        from datasets.utils.file_utils import xopen

        stored = self.table[row][self.key]
        if stored is None:
            raise ArpHubError(f"data: {self.name(row)} is missing: remove the row, or give it an image")
        if stored["bytes"] is not None:
            return open_image(BytesIO(stored["bytes"]))
        if Path(stored["path"]).is_file():
            return open_image(stored["path"])
        with xopen(stored["path"], "rb") as file:  # inside an archive, or on the Hub
            return open_image(BytesIO(file.read()))

    def name(self, row: int) -> str:
        """The number of the row and the name of the column."""
        return f"image {row} of column '{self.key}'"


def decoded(rows: Rows, row: int) -> Image.Image:
    """One image as RGB, rotated by its EXIF orientation.

    Raises:
        ArpHubError: If the row holds no image.
        Exception: Of any kind, if the image cannot be decoded.
    """
    with rows.open(row) as image:
        return as_rgb(_load(image), rows.white)


def _load(image: Image.Image) -> Image.Image:
    """Decode an image that is not too large, or a larger JPEG at half its size.

    Raises:
        ValueError: If it is too large.
    """
    width, height = image.size
    # Pillow holds a progressive JPEG in memory at its full size, even if it decodes it to a smaller one.
    if width * height > _MOST_PIXELS and isinstance(image, JpegImageFile) and not image.info.get("progressive"):
        image.draft(image.mode, (width // 2, height // 2))  # enough: Pillow refuses larger ones itself
    if image.width * image.height > _MOST_PIXELS:
        raise ValueError(
            f"its {width} x {height} pixels are more than the limit of {_MOST_PIXELS / 1e6:.0f} million: "
            "make it smaller"
        )
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return image


def number_kind(mode: str) -> str | None:
    """``float`` or ``int`` for grey images of more than 8 bits, None for all other modes of Pillow."""
    return "float" if mode == "F" else "int" if mode.startswith("I") else None


def as_rgb(image: Image.Image, white: Mapping[str, int] | None = None) -> Image.Image:
    """An image of any mode as RGB.

    Palettes are applied, alpha is dropped, and Pillow converts CMYK, YCbCr and HSV. Grey images of integers or floats
    are scaled so that white becomes 255.

    Args:
        image: The image.
        white: Value of white by `number_kind`. A missing one is derived from the largest value of this image.

    Raises:
        ValueError: If Pillow cannot convert the mode, or values lie outside black and white.
    """
    if kind := number_kind(image.mode):
        values = np.array(image, np.float32)
        low, high = _bounds(values)
        top = (white or {}).get(kind) or _white(high, kind)
        slack = _OVERSHOOT * top if kind == "float" else 0
        if low < -slack or high > top + slack:
            raise ValueError(
                f"its values {low:g} to {high:g} are not all between 0 and {top}, which is white in the other images: "
                "scale all images to 16 bits"
            )
        values *= 255 / top
        return Image.fromarray(values.clip(0, 255, out=values).round(out=values).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _bounds(values: np.ndarray) -> tuple[float, float]:
    """Smallest and largest value.

    Raises:
        ValueError: If one is NaN or infinite.
    """
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("it holds values that are NaN or infinite")
    return low, high


def _white(high: float, kind: str) -> int:
    """The smallest of the usual values of white that is not below ``high``, the largest value of an image.

    Raises:
        ValueError: If there is none, or if it is so far above ``high`` that the image would be nearly black.
    """
    slack = 1 + _OVERSHOOT if kind == "float" else 1
    white = next((white for white in _WHITES if high <= white * slack), None)
    if white is None or 1 < white > 4 * high:
        raise ValueError(
            f"its largest value, {high:g}, does not show which value is white: scale it to 0..255, 0..65535 or "
            "floats of 0..1"
        )
    return white


@dataclass(frozen=True)
class Survey:
    """Properties of a data set, from a sample of its images.

    Attributes:
        small: Whether no image has a side longer than `SMALL_SIDE`.
        white: Value of white in grey images of more than 8 bits, by `number_kind`.
    """

    small: bool
    white: dict[str, int]


def survey(splits: Collection[Rows]) -> Survey:
    """Examine a fixed sample of each split, and decide for all splits together.

    Images that cannot be read are skipped here and reported when they are decoded.
    """
    sides: list[int] = []
    highest: dict[str, int] = {}
    for rows in splits:
        chosen = torch.randperm(len(rows), generator=keyed_generator("survey", len(rows)))[:_SAMPLED]
        for row in chosen.sort().values.tolist():
            try:
                with rows.open(row) as image:
                    sides.append(max(image.size))
                    if kind := number_kind(image.mode):
                        high = _bounds(np.asarray(_load(image), np.float32))[1]
                        if high > 0:  # a black image does not show which value is white
                            highest[kind] = max(_white(high, kind), highest.get(kind, 0))
            except Exception:  # decoders raise a dozen kinds
                continue
    return Survey(bool(sides) and max(sides) <= SMALL_SIDE, highest)
