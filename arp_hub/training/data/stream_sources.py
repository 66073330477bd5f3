"""Open tar shards and parquet files as streams, on this machine or on the Hub, through the datasets library."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ArpHubError
from .files import class_folders, holds_tars, parquet_splits
from .sources import Treatment, hub_tables, opening, place_and_config
from .streams import ImageStream, Sample
from .tables import Columns, LabelledTables
from .tars import check_ends, is_tar_source, read_index, tar_splits
from .timm_sets import TimmName, TimmSamples, class_names


@dataclass(frozen=True)
class StreamTable:
    """One split of a data set as a stream.

    Attributes:
        images: The images.
        count: Number of images; None if it is not known.
        class_names: Names of the classes, where the data has them.
    """

    images: ImageStream
    count: int | None
    class_names: tuple[str, ...] = ()


class TableSamples:
    """The samples of an iterable table of the datasets library.

    Args:
        table: The table.
        image_key: Its image column.
        label_key: Its label column, or a field of its ``json`` column; empty without labels.
    """

    def __init__(self, table: Any, image_key: str, label_key: str) -> None:
        import datasets

        columns = set(table.features)
        self.image_key, self.label_key = image_key, label_key
        self.in_json = bool(label_key) and label_key not in columns
        wanted = {image_key, "json" if self.in_json else label_key, "__key__", "__url__"} & columns
        self.table = table.select_columns(sorted(wanted)).cast_column(image_key, datasets.Image(decode=False))

    def order(self, seed: int | None, rank: int = 0, world: int = 1) -> Iterable[Sample]:
        """One process's samples: those of its shards, or of too few shards every n-th sample."""
        from datasets.distributed import split_dataset_by_node

        table = self.table if seed is None else self.table.shuffle(seed=seed)
        if world > 1 and self.table.num_shards >= world:
            table = table.shard(world, rank, contiguous=False)
        elif world > 1:
            table = split_dataset_by_node(table, rank, world)
        return map(self._sample, table)

    def workers(self, wanted: int, world: int) -> int:
        """At most one worker for each shard of a process."""
        shards = self.table.num_shards
        return min(wanted, shards // world if shards >= world else shards)

    def _sample(self, row: Mapping[str, Any]) -> Sample:
        image, key = row[self.image_key], row.get("__key__")
        label = (row["json"] or {}).get(self.label_key) if self.in_json else row.get(self.label_key)
        path = image["path"] if image else None
        name = f"sample '{key}' of shard '{row.get('__url__')}'" if key else f"image '{path}'" if path else "an image"
        return Sample(image, label, name)


def open_streams(
    source: str, columns: Columns, treatment: Treatment, classes: int, *, counted: bool = True
) -> dict[str, StreamTable]:
    """The splits of a data set as streams.

    Args:
        source: A folder, a pattern of tar shards, or the id of a Hub dataset.
        columns: Which columns to read.
        treatment: What happens to each image.
        classes: Number of classes of the model, for data that does not name its classes.
        counted: Whether to count the images of tar shards, for which all shards are read once.

    Raises:
        ArpHubError: If the data cannot be streamed, or if a column cannot be found.
    """
    with opening(source):
        tables, counts = _open(source, columns, counted)
        found = LabelledTables(source, tables, _with_cls(columns, next(iter(tables.values())).features))
        names = found.class_names
        splits = {}
        for name, table in tables.items():
            samples = TableSamples(table, found.image_key, found.label_key)
            known = (len(names) or classes) if found.label_key else 0
            images = ImageStream(source, samples, treatment, known)
            splits[str(name)] = StreamTable(images, counts.get(str(name)), names)
        ImageStream.treat_alike([split.images for split in splits.values()])
    return splits


def timm_streams(wanted: TimmName, treatment: Treatment, epoch_images: int, classes: int) -> dict[str, StreamTable]:
    """The splits of a data set of timm that can be read in order only.

    Raises:
        ArpHubError: If timm or a library that it needs cannot open it.
    """

    def opened(split: str, count: int | None) -> StreamTable:
        samples = TimmSamples(wanted, split, count)
        names = class_names(samples.create())
        return StreamTable(ImageStream(wanted.source, samples, treatment, len(names) or classes), samples.count, names)

    train, test = wanted.splits
    tables = {"train": opened(train or "train", epoch_images or None)}
    for name in (test,) if test else ("validation", "test"):
        try:
            tables["test" if test else name] = opened(name, None)
            break
        except ArpHubError:
            if test:
                raise
            # timm cannot tell which splits there are
    ImageStream.treat_alike([table.images for table in tables.values()])
    return tables


def _with_cls(columns: Columns, features: Mapping[str, Any]) -> Columns:
    """The columns, with ``cls`` for the labels of tar shards if none is named."""
    return dataclasses.replace(columns, label="cls") if not columns.label and "cls" in features else columns


def _open(source: str, columns: Columns, counted: bool) -> tuple[Mapping[str, Any], dict[str, int]]:
    """The tables of the splits, and the numbers of their images as far as they are known."""
    import datasets

    if source == "digits":
        raise ArpHubError("data 'digits' is in memory: leave streaming out")
    place, config = place_and_config(source)
    folder = Path(place).expanduser()
    patterns = is_tar_source(source)
    if not patterns and folder.is_dir() and class_folders(place, folder):
        raise ArpHubError(f"data '{source}': class folders are read at random: leave streaming out")
    if patterns or folder.is_dir() and holds_tars(folder):
        shards = tar_splits(source if patterns else place, remote=True)
        local = {split: files for split, files in shards.items() if not any("://" in file for file in files)}
        counts = {}
        for split, paths in local.items() if counted else ():
            counts[split] = len(read_index(source, split, paths, columns.image, columns.label).offset)
        if not counted:
            check_ends([path for paths in local.values() for path in paths])
        tables = datasets.load_dataset("webdataset", data_files=_escaped(shards), streaming=True)
        return tables, counts
    if folder.is_dir():
        import pyarrow.parquet as pq

        files, features = parquet_splits(place, folder, config)
        tables = datasets.load_dataset("parquet", data_files=_escaped(files), features=features, streaming=True)
        return tables, {split: sum(pq.read_metadata(file).num_rows for file in paths) for split, paths in files.items()}
    tables = hub_tables(source, place, config, streaming=True)
    known = {name: (table.info.splits or {}).get(name) for name, table in tables.items()}
    return tables, {str(name): split.num_examples for name, split in known.items() if split and split.num_examples}


def _escaped(files: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Paths of local files with wildcards escaped, and URLs as they are."""
    return {split: [path if "://" in path else glob.escape(path) for path in paths] for split, paths in files.items()}
