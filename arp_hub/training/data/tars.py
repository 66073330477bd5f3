"""WebDataset tar shards on a local disk: found by folder or pattern, indexed once, then read image by image.

A sample is a run of members with one key: ``a/17.jpg`` and ``a/17.cls`` have the key ``a/17``.
"""

from __future__ import annotations

import json
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..._utils.files import atomic_path, cache_folder
from ...errors import ArpHubError
from .decoding import open_image
from .files import files_by_split, split_of
from .images import progress

PREFIX = "wds:"
"""Start of a source that is read as tar shards, whatever its name looks like."""
_MEMBER = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")
"""Key and extension of a member, as the webdataset and datasets libraries split its path: at the first dot."""
_CHOICE = re.compile(r"\{([^{}]+)\}")


def is_tar_source(source: str) -> bool:
    """Whether a source is a pattern of tar shards rather than a folder or a Hub id."""
    named = source.startswith(PREFIX) or "::" in source or "{" in source or source.endswith(".tar")
    return named and not Path(source).expanduser().is_dir()


def tar_splits(source: str, *, remote: bool = False) -> dict[str, list[str]]:
    """The tar shards of each split.

    Args:
        source: A folder, a shard, or patterns such as ``train-{0000..0063}.tar``, joined by ``::``. ``wds:`` in front
            is left out.
        remote: Whether shards may be URLs, which are not looked up.

    Raises:
        ArpHubError: If a shard is missing, or if there is none.
    """
    place = source.removeprefix(PREFIX)
    folder = Path(place).expanduser()
    if folder.is_dir():
        found = files_by_split(source, folder, ".tar")
        if not any(found.values()):
            raise ArpHubError(f"the folder '{source}' holds no tar shards: give a folder of .tar files")
        return {split: [str(folder / name) for name in names] for split, names in found.items()}
    shards = [path for pattern in place.split("::") for path in expanded(pattern)]
    urls = [shard for shard in shards if "://" in shard]
    if urls and not remote:
        raise ArpHubError(f"data '{source}': '{urls[0]}' is not on this machine: set streaming, or download the shards")
    local = [str(Path(shard).expanduser()) for shard in shards if shard not in urls]
    if missing := [path for path in local if not Path(path).is_file()]:
        raise ArpHubError(
            f"data '{source}': {len(missing)} of {len(shards)} tar shards are missing, the first is '{missing[0]}': "
            "download it, or correct the pattern"
        )
    splits: dict[str, list[str]] = {}
    for shard in [*local, *urls]:
        *_, above, name = ("", *shard.split("/"))
        splits.setdefault(split_of((name,)) or split_of((above, name)), []).append(shard)
    unnamed = splits.pop("", [])
    return {**({"train": unnamed} if unnamed and "train" not in splits else {}), **splits}


def check_ends(shards: Iterable[str]) -> None:
    """Refuse shards that are cut off, by their last block, which is empty in every tar archive.

    Raises:
        ArpHubError: Naming the first one.
    """
    block = tarfile.BLOCKSIZE
    for shard in shards:
        size = Path(shard).stat().st_size
        with Path(shard).open("rb") as file:
            file.seek(max(0, size - block))
            if size % block or size < block or file.read().strip(b"\0"):
                raise ArpHubError(f"the tar shard '{shard}' is cut off at {size} bytes: download it again")


def expanded(pattern: str) -> list[str]:
    """The paths of a brace pattern: ``{a,b}`` is a choice, ``{00..63}`` a range of numbers of two digits."""
    found = _CHOICE.search(pattern)
    if not found:
        return [pattern]
    choices = found[1].split(",")
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
        width = len(span[1])
        choices = [f"{number:0{width}}" for number in range(int(span[1]), int(span[2]) + 1)]
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [path for choice in choices for path in expanded(before + choice + after)]


@dataclass(frozen=True)
class TarIndex:
    """Where each image of some shards is, and its label as text.

    Attributes:
        shard: Number of its shard.
        offset: First byte of the image in the shard.
        size: Its bytes.
        label: Its label; empty where it has none.
    """

    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray


class TarImages:
    """Images inside tar shards.

    Args:
        shards: The files.
        index: Where their images are.
    """

    def __init__(self, shards: Sequence[str], index: TarIndex) -> None:
        self.shards, self.index = shards, index
        self.white: Mapping[str, int] = {}

    def __len__(self) -> int:
        return len(self.index.offset)

    def open(self, row: int) -> Image.Image:
        """The image of a member."""
        return open_image(BytesIO(self._read(row, 0, int(self.index.size[row]))))

    def name(self, row: int) -> str:
        """The shard and the member."""
        block = tarfile.BLOCKSIZE
        member = tarfile.TarInfo.frombuf(self._read(row, -block, block), "utf-8", "surrogateescape")
        return f"image '{member.name}' of shard '{self.shards[self.index.shard[row]]}'"

    def _read(self, row: int, shift: int, size: int) -> bytes:
        with Path(self.shards[self.index.shard[row]]).open("rb") as file:
            file.seek(int(self.index.offset[row]) + shift)
            return file.read(size)


def read_index(
    source: str, split: str, shards: Sequence[str], image_key: str | None, label_key: str | None
) -> TarIndex:
    """Find the images and labels of shards. The index is kept in the cache folder until a shard changes.

    Args:
        source: The data as the user wrote it, for messages.
        split: Name of the split, for messages.
        shards: The files.
        image_key: Extension of the images; by default the one that Pillow knows.
        label_key: Extension of the labels, or a field of the ``json`` members; by default ``cls``.

    Raises:
        ArpHubError: If a shard cannot be read, if a sample lacks its image, or if there is no sample.
    """
    files = [(str(Path(shard).resolve()), (stat := Path(shard).stat()).st_size, stat.st_mtime_ns) for shard in shards]
    marks = json.dumps([files, image_key, label_key])
    place = cache_folder() / f"shards-{zlib.crc32(marks.encode()):08x}.npz"
    if kept := _kept(place, marks):
        return kept
    rows: list[tuple[int, int, int, str]] = []
    for number, shard in enumerate(progress(shards, "indexing tar shards")):
        for sample in _samples(shard):
            image = _image(source, sample, image_key)
            rows.append((number, image.offset_data, image.size, _label(source, sample, label_key)))
    if not rows:
        raise ArpHubError(f"data '{source}': the tar shards of split '{split}' hold no samples: remove or fill them")
    columns = list(zip(*rows, strict=True))
    index = TarIndex(*(np.array(column, kind) for column, kind in zip(columns, ("i4", "i8", "i8", "U"), strict=True)))
    _keep(place, marks, index)
    return index


def _kept(place: Path, marks: str) -> TarIndex | None:
    """The index in a cache file, if it was made of the same files in the same way, as ``marks`` says."""
    try:
        with np.load(place, allow_pickle=False) as stored:
            if str(stored["marks"]) == marks:
                return TarIndex(*(stored[name] for name in ("shard", "offset", "size", "label")))
    except (EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        pass
    return None


def _keep(place: Path, marks: str, index: TarIndex) -> None:
    """Write the cache file. If it cannot be written, the shards are indexed at each start."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(place) as path, path.open("wb") as file:
            np.savez(file, marks=np.array(marks), **vars(index))
    except OSError:
        pass


@dataclass(frozen=True)
class _Sample:
    """The members of one sample by their extensions, and how to read one."""

    shard: str
    key: str
    members: dict[str, tarfile.TarInfo]
    read: Callable[[tarfile.TarInfo], bytes]

    def __str__(self) -> str:
        return f"sample '{self.key}' of shard '{self.shard}'"


def _samples(shard: str) -> Iterator[_Sample]:
    """The samples of a shard, in order.

    Raises:
        ArpHubError: If it is no tar archive, or if it is cut off or damaged.
    """
    last = ""
    try:
        with tarfile.open(shard, "r:") as archive, Path(shard).open("rb") as file:

            def read(member: tarfile.TarInfo) -> bytes:
                file.seek(member.offset_data)
                return file.read(member.size)

            sample = _Sample(shard, "", {}, read)
            for member in archive:
                last = member.name
                archive.members = []  # type: ignore[attr-defined]  # it would hold every header in memory
                parts = _MEMBER.fullmatch(member.name) if member.isfile() else None
                if not parts:
                    continue
                if parts[1] != sample.key:
                    yield from [sample] * bool(sample.members)
                    sample = _Sample(shard, parts[1], {}, read)
                sample.members[parts[2].lower()] = member
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a damaged header for the end
                raise tarfile.ReadError("a header is damaged")
            yield from [sample] * bool(sample.members)
    except (tarfile.TarError, OSError, EOFError) as error:
        where = f" after member '{last}'" if last else ""
        raise ArpHubError(
            f"the tar shard '{shard}' cannot be read{where}: {error}: download it again (compressed archives must be "
            "unpacked to .tar)"
        ) from error


def _image(source: str, sample: _Sample, key: str | None) -> tarfile.TarInfo:
    """The member that holds the image."""
    known = Image.registered_extensions()
    found = [name for name in sample.members if (name == key.lower() if key else f".{name.split('.')[-1]}" in known)]
    if len(found) == 1:
        return sample.members[found[0]]
    number = "no" if not found else "more than one"
    raise ArpHubError(
        f"data '{source}': {sample} has {number} image{f' with the extension image_key={key!r}' if key else ''}; its "
        f"members are {', '.join(sample.members)}. Name the extension of the images with image_key"
    )


def _label(source: str, sample: _Sample, key: str | None) -> str:
    """The label as text, from a member of its own or from a field of the json member; empty if there is none."""
    name = (key or "cls").lower()
    if name in sample.members:
        return sample.read(sample.members[name]).decode(errors="replace").strip()
    if key is None:
        return ""
    if "json" in sample.members:
        try:
            fields = json.loads(sample.read(sample.members["json"]))
        except ValueError as error:
            raise ArpHubError(f"data '{source}': the json member of {sample} cannot be read: {error}") from error
        if isinstance(fields, dict) and key in fields:
            return "" if fields[key] is None else str(fields[key])
        raise ArpHubError(f"data '{source}': {sample} has no label_key='{key}'; its json fields are {_listed(fields)}")
    raise ArpHubError(
        f"data '{source}': {sample} has no label_key='{key}'; its members are {', '.join(sample.members)}"
    )


def _listed(fields: Any) -> str:
    return ", ".join(map(str, fields)) if isinstance(fields, Iterable) else "none"
