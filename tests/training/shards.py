"""Tiny data for tests of shards and streams: each image has a grey of its own, which augmentation keeps."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

CLASSES = 4


def png(grey: int, size: int = 8) -> bytes:
    """An image of one grey."""
    file = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), grey, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, samples: Iterable[dict[str, bytes]], first: int = 0) -> None:
    """A tar shard. A sample is its members by extension; keys are numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, members in enumerate(samples, first):
            for extension, content in members.items():
                header = tarfile.TarInfo(f"{key:06d}.{extension}")
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))


def write_shards(folder: Path, split: str, sizes: Sequence[int]) -> str:
    """Tar shards of a split with so many images each. The class of an image is its grey modulo `CLASSES`."""
    grey = 0
    for number, size in enumerate(sizes):
        samples = [{"png": png(grey + k), "cls": str((grey + k) % CLASSES).encode()} for k in range(size)]
        write_tar(folder / f"{split}-{number:04d}.tar", samples, grey)
        grey += size
    return str(folder)


def seen(form, batches: Iterable[tuple[Tensor, Tensor]]) -> list[int]:
    """The greys of labelled batches, in order. Each label must be that of its grey."""
    found = []
    for images, labels in batches:
        greys = ((images[:, 0, 16, 16] * form.std[0] + form.mean[0]) * 255).round().int().tolist()
        assert [grey % CLASSES for grey in greys] == labels.tolist()
        found += greys
    return found
