"""Find the splits and classes in a folder of images, parquet files or tar shards. Warnings name all other files.

Class folders are read as torchvision's ``ImageFolder`` reads them. Only folders decide the split of an image, never the
name of its file.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file

from ...errors import ArpHubError

_logger = logging.getLogger(__name__)

Parts = tuple[str, ...]
"""A path below the folder of the data: its folders, then its own name."""
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Names of splits, in lower case, with the split that each means: the keywords of the datasets library."""
_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]+)?")
"""One of the files of a split, as the datasets library names them."""


@dataclass(frozen=True)
class ClassFolders:
    """The images of a folder.

    Attributes:
        splits: Paths of the images of each split, relative to the folder, in the order of ``ImageFolder``.
        labels: Class of each image; None for a split without class folders.
        classes: Names of the classes, sorted.
    """

    splits: dict[str, list[str]]
    labels: dict[str, list[int] | None]
    classes: tuple[str, ...]


def class_folders(source: str, root: Path) -> ClassFolders | None:
    """Find the images of a folder that is laid out as ``CLASS/image`` or ``SPLIT/CLASS/image``.

    Images in no class folder have no labels. Hidden files and folders are skipped. A warning names the files that are
    not used.

    Args:
        source: The folder as the user wrote it, for messages.
        root: The folder.

    Returns:
        The images, or None if the folder holds parquet files, or tar shards and no images.

    Raises:
        ArpHubError: If there are no images, if a class has none, or if splits and classes cannot be told apart.
    """
    files, folders = _walk(root)
    if _with_suffix(files, ".parquet"):
        return None
    images = [file for file in files if is_image_file(file[-1]) and not _is_hidden(file)]
    if not images and _with_suffix(files, ".tar"):
        return None
    if not images:
        raise ArpHubError(
            f"the folder '{source}' holds no images, parquet files or tar shards: give a folder of such files, or one "
            f"with a folder of images for each class, in train/ and test/ if it is split ({', '.join(IMG_EXTENSIONS)})"
        )
    tops = _split_folders(source, images)
    if not tops:
        _refuse_data_in_classes(source, images)
    level = 1 if tops else 0  # where in a path the class stands
    inside = set(tops.values())
    labelled = [file for file in images if len(file) > level + 1 and (not tops or file[0] in inside)]
    classes = sorted({file[level] for file in labelled})
    named = {folder[level] for folder in folders if len(folder) == level + 1 and (not tops or folder[0] in inside)}
    if classes and (empty := sorted(named.difference(classes))):
        raise ArpHubError(
            f"data '{source}': {len(empty)} class folders hold no images ({_first(empty)}): remove them, or put images "
            "into them"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    splits, labels = {}, {}
    for split, top in tops.items() if tops else [("train", None)]:
        found = [file for file in labelled if top in (None, file[0])]
        found.sort(key=lambda file: (file[level], "/".join(file[:-1]), file[-1]))
        labels[split] = [numbers[file[level]] for file in found] or None
        found = found or sorted(file for file in images if top in (None, file[0]))
        splits[split] = ["/".join(file) for file in found]
    _warn_of_unused(source, files, {path for paths in splits.values() for path in paths})
    _warn_of_missing(source, labels, classes)
    return ClassFolders(splits, labels, tuple(classes))


def _walk(root: Path) -> tuple[list[Parts], list[Parts]]:
    """All files and all folders below a folder. Links are followed, except those that lead to a parent folder."""
    files, folders = [], []

    def refuse(error: OSError) -> None:
        raise error  # os.walk would skip an unreadable folder

    for place, names, found in os.walk(root, onerror=refuse, followlinks=True):
        above = Path(place).relative_to(root).parts
        names[:] = [name for name in names if not _leads_up(Path(place, name))]
        folders += [(*above, name) for name in names if not _is_hidden((*above, name))]
        files += [(*above, name) for name in found]
    return files, folders


def _leads_up(folder: Path) -> bool:
    """Whether a link leads to a folder that contains it, so that following it would never end."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def _is_hidden(file: Parts) -> bool:
    return any(part.startswith(".") for part in file)


def _split_folders(source: str, images: Collection[Parts]) -> dict[str, str]:
    """The top folder of each split; empty if the top folders are classes.

    Raises:
        ArpHubError: If splits and classes cannot be told apart, or if two folders name the same split.
    """
    named, others, deep = _tops(images)
    if not _are_splits(images):
        if deep and deep <= named.keys():
            top, other = min(deep), min(others)
            raise ArpHubError(
                f"data '{source}': the folder '{top}' may be a split or a class beside '{other}': give "
                f"'{source}/{top}' as the data, or move '{other}' away"
            )
        inside = {top: {file[1] for file in images if len(file) > 2 and file[0] == top} for top in deep}
        for top, other in itertools.product(sorted(named.keys() & deep), sorted(others & deep)):
            if len(inside[top]) > 1 and inside[top] == inside[other]:
                raise ArpHubError(
                    f"data '{source}': the folder '{other}' holds the same class folders as '{top}', but its name is "
                    "no split: rename it to val or test, or move it away"
                )
        return {}
    splits: dict[str, str] = {}
    for top, split in named.items():
        if split in splits:
            raise ArpHubError(
                f"data '{source}': the folders '{splits[split]}' and '{top}' are both the split '{split}': merge them, "
                "or move one away"
            )
        splits[split] = top
    return dict(sorted(splits.items(), key=lambda item: (item[0] != "train", item[0])))


def _tops(images: Collection[Parts]) -> tuple[dict[str, str], set[str], set[str]]:
    """Top folders named after splits, with their splits; other top folders; top folders that contain image folders."""
    tops = {file[0] for file in images if len(file) > 1}
    named = {top: _SPLITS[top.lower()] for top in sorted(tops) if top.lower() in _SPLITS}
    return named, tops.difference(named), {file[0] for file in images if len(file) > 2}


def _are_splits(images: Collection[Parts]) -> bool:
    """Whether all top folders are named after splits, or both a train and a test folder contain class folders."""
    named, others, deep = _tops(images)
    return bool(named) and (not others or {split for top, split in named.items() if top in deep} > {"train"})


def _refuse_data_in_classes(source: str, images: Collection[Parts]) -> None:
    """Refuse class folders that are data sets themselves, because their training and test images would be mixed."""
    inside: dict[str, list[Parts]] = {}
    for file in images:
        if len(file) > 1:
            inside.setdefault(file[0], []).append(file[1:])
    for top, files in sorted(inside.items()):
        if all(len(file) > 1 for file in files) and _are_splits(files):
            raise ArpHubError(
                f"data '{source}': the folder '{top}' is no class, because it holds splits: give '{source}/{top}' as "
                "the data, or put the class folders into train/ and test/"
            )


def _first(names: Collection[str]) -> str:
    """``a, b, c``, with at most five names."""
    return ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")


def _warn_of_unused(source: str, files: Collection[Parts], used: Collection[str]) -> None:
    """Name the files that are not used, except the README and hidden files that are not images."""
    left = [
        path
        for file in files
        if (path := "/".join(file)) not in used
        and (_looks_like_data(path) or not _is_hidden(file) and file != ("README.md",))
    ]
    if left:
        _logger.warning("data '%s': %d of %d files are not used: %s", source, len(left), len(files), _first(left))


def _looks_like_data(path: str) -> bool:
    suffix = Path(path).suffix.lower()
    return suffix in (".parquet", ".tar") or suffix in Image.registered_extensions()


def _warn_of_missing(source: str, labels: Mapping[str, list[int] | None], classes: list[str]) -> None:
    """Name the classes without images in a split: a folder may be missing, or its name may be misspelt."""
    if len(classes) == 1:
        _logger.warning("data '%s' has one class, '%s': is there a folder for each class?", source, classes[0])
    for split, numbers in labels.items():
        missing = set(classes).difference(classes[number] for number in numbers or ())
        if numbers and missing:
            text = "data '%s': split '%s' has no images of %d %s: %s"
            noun = "class" if len(missing) == 1 else "classes"
            _logger.warning(text, source, split, len(missing), noun, _first(missing))


def parquet_splits(source: str, root: Path, config: str | None) -> tuple[dict[str, list[str]], Any]:
    """Find the parquet files of each split, from the folder's README or else from their names.

    By name, ``train-00000-of-00003``, ``train/x``, ``train`` and ``cifar-train`` belong to split ``train``. Files whose
    names contain no split are left out with a warning. If no name contains one, all belong to split ``train``.

    Args:
        source: The folder as the user wrote it, for messages.
        root: The folder.
        config: The configuration in the README; None for the default one.

    Returns:
        Full paths of the files of each split, and the features that the README declares, if any.

    Raises:
        ArpHubError: If there is no such configuration, if several folders hold the same part of a split, or if files
            number their classes differently.
    """
    from datasets.data_files import sanitize_patterns
    from datasets.info import DatasetInfosDict
    from datasets.utils.metadata import MetadataConfigs

    readme = root / "README.md"
    data = DatasetCard.load(readme).data if readme.is_file() else DatasetCardData()
    configs = MetadataConfigs.from_dataset_card_data(data)
    name = choose_configuration(source, config, list(configs), configs.get_default_config_name())
    info = DatasetInfosDict.from_directory(str(root)).get(name or "default")
    features = info.features if info else None
    chosen = configs[name] if name else {}
    if "data_files" not in chosen:
        place = root / chosen.get("data_dir", "")
        by_name = files_by_split(source, place, ".parquet")
        found = {split: [str(place / file) for file in files] for split, files in by_name.items()}
        _check_class_numbers(source, found, features)
        return found, features
    found = {}
    for split, patterns in sanitize_patterns(chosen["data_files"]).items():
        below = [f"{pattern}/*" if pattern.endswith("**") else pattern for pattern in patterns]
        files = {file for pattern in below for file in root.glob(pattern) if file.suffix.lower() == ".parquet"}
        if not files:
            raise ArpHubError(
                f"data '{source}': its README says that split '{split}' is in '{', '.join(patterns)}', but there is no "
                "such parquet file: download it, or correct the README"
            )
        found[split] = [str(file) for file in sorted(files)]
    _check_class_numbers(source, found, features)
    return found, features


def _check_class_numbers(source: str, splits: Mapping[str, Sequence[str]], declared: Mapping[str, Any] | None) -> None:
    """Refuse files that number their classes differently: the datasets library reads all of them as it reads the first.

    Raises:
        ArpHubError: Naming the column, both files, and the first classes of each.
    """
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    def classes(features: Mapping[str, Any]) -> dict[str, list[str]]:
        return {name: kind.names for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)}

    known = {column: ("README.md", names) for column, names in classes(declared or {}).items()}
    for path in itertools.chain.from_iterable(splits.values()):
        try:
            features = datasets.Features.from_arrow_schema(pq.read_schema(path))
        except (OSError, pa.ArrowException):  # opening the data refuses the file
            continue
        for column, names in classes(features).items():
            first, expected = known.setdefault(column, (path, names))
            if names != expected:
                orders = ((first, expected), (path, names))
                both = " and ".join(f"'{Path(file).name}' ({', '.join(own[:3])}, ...)" for file, own in orders)
                raise ArpHubError(
                    f"data '{source}': {both} number the classes of column '{column}' differently: write all files "
                    "with the same class names in the same order"
                )


def choose_configuration(source: str, config: str | None, configs: Collection[str], default: str | None) -> str | None:
    """The configuration of a data set to load; None if it has none.

    Raises:
        ArpHubError: If there are several and none is chosen, or if the chosen one does not exist.
    """
    if config is None and (default is not None or not configs):
        return default
    if config in configs:
        return config
    if not configs:
        raise ArpHubError(f"data '{source}' has no configurations: leave out ':{config}'")
    wrong = f"no configuration '{config}'" if config else "several configurations"
    raise ArpHubError(
        f"data '{source}' has {wrong}: name one of {', '.join(configs)} after a colon, as in '{source}:{min(configs)}'"
    )


def holds_tars(root: Path) -> bool:
    """Whether a folder holds tar shards and no parquet files."""
    files = _walk(root)[0]
    return bool(_with_suffix(files, ".tar")) and not _with_suffix(files, ".parquet")


def files_by_split(source: str, root: Path, suffix: str) -> dict[str, list[str]]:
    """The files with a suffix below a folder, by split and relative to it.

    Raises:
        ArpHubError: If several files are the same part of a split.
    """
    everything = _walk(root)[0]
    found: dict[str, list[Parts]] = {}
    parts: dict[tuple[str, str, str], Parts] = {}
    for file in _with_suffix(everything, suffix):
        split = split_of(file)
        found.setdefault(split, []).append(file)
        if shard := _SHARD.fullmatch(_stem(file)):
            other = parts.setdefault((split, shard["number"], shard["count"]), file)
            if other != file:
                raise ArpHubError(
                    f"data '{source}': '{'/'.join(other)}' and '{'/'.join(file)}' are the same part of split "
                    f"'{split}', so they are of different configurations: give one of the folders as the data"
                )
    for split, count in {(split, int(count)) for split, _, count in parts}:
        here = sum(1 for of, _, total in parts if (of, int(total)) == (split, count))
        if here < count:
            _logger.warning("data '%s': %d of the %d files of split '%s' are here", source, here, count, split)
    unnamed = found.pop("", [])
    found = found or {"train": unnamed}
    order = sorted(found, key=lambda split: (split != "train", split))
    splits = {split: ["/".join(file) for file in found[split]] for split in order}
    used = {file for files in splits.values() for file in files}
    _warn_of_unused(source, [file for file in everything if _looks_like_data(file[-1])], used)
    return splits


def _with_suffix(files: Collection[Parts], suffix: str) -> list[Parts]:
    return sorted(file for file in files if file[-1].lower().endswith(suffix) and not _is_hidden(file))


def _stem(file: Parts) -> str:
    return file[-1].rpartition(".")[0]


def split_of(file: Parts) -> str:
    """The split of a parquet file or tar shard; empty if its path names none."""
    if shard := _SHARD.fullmatch(_stem(file)):
        words = [shard["split"].lower(), shard["split"].lower().rpartition("-")[2]]  # also 'cifar10-train'
        return next((_SPLITS[word] for word in words if word in _SPLITS), re.sub(r"\W", "_", shard["split"]))
    for folder in reversed(file[:-1]):
        if folder.lower() in _SPLITS:
            return _SPLITS[folder.lower()]
    words = [word for word in re.split(r"[-_. ]+", _stem(file).lower()) if word and not word.isdigit()]
    splits = {_SPLITS[word] for word in (*words[:1], *words[-1:]) if word in _SPLITS}
    return splits.pop() if len(splits) == 1 else ""
