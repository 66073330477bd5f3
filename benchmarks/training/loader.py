"""Images per CPU-second of the loader, beside timm's, on the same JPEG files with the same decoding and transforms.

    python -m benchmarks.training.loader list
    OMP_NUM_THREADS=1 python -m benchmarks.training.loader run '*'
    python -m benchmarks.training.loader table

A row is SOURCE/MODE/WORKERS. ``folder`` reads class folders, ``shards`` reads tar shards at random, ``stream`` reads
them in order; timm reads class folders in all rows. Passes over 1,000 ImageNet images take turns. CPU time is that of
the process and its workers, so that other programs on the machine hardly change it. Results are in
results/loader.json.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import resource
import statistics
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import timm
import torch
from timm.data import create_dataset, create_loader

from arp_hub._utils.environment import environment
from arp_hub.training import load_data
from arp_hub.training.data.batches import epoch_batches
from arp_hub.training.data.images import TrainBatch
from benchmarks.rows import load_results, results_file, row_command, row_parser

RESULTS = results_file("loader")
ROWS = [
    f"{source}/{mode}/{workers}"
    for source, mode, workers in itertools.product(("folder", "shards", "stream"), ("train", "eval"), (1, 2))
]
BATCH = 50
CPU = torch.device("cpu")


@contextmanager
def jpeg_files(sample: Path) -> Iterator[Path]:
    """ImageNet's sample as class folders in ``folder/`` and as four tar shards in ``shards/``, below one folder."""
    files = str(sample / "*.parquet")
    table = datasets.load_dataset("parquet", data_files=files, split="train")
    rows = table.cast_column("image", datasets.Image(decode=False))
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        (root / "shards").mkdir()
        archives = [tarfile.open(root / f"shards/train-{number:04d}.tar", "w") for number in range(4)]
        for number, row in enumerate(rows):
            content, label = row["image"]["bytes"], row["label"]
            folder = root / f"folder/train/{label:04d}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.JPEG").write_bytes(content)
            for extension, data in (("jpeg", content), ("cls", str(label).encode())):
                header = tarfile.TarInfo(f"{number:06d}.{extension}")
                header.size = len(data)
                archives[number % 4].addfile(header, io.BytesIO(data))
        for archive in archives:
            archive.close()
        yield root


def ours(root: Path, source: str, training: bool, workers: int) -> Callable[[], Iterable[Any]]:
    """A pass of the package's loader."""
    folder = root / ("folder" if source == "folder" else "shards")
    split = load_data(str(folder), timm.create_model("resnet50"), streaming=source == "stream").train
    if not training:
        return lambda: (images for images, _ in split.labelled(BATCH, CPU, workers))
    if source == "stream":
        parts = range(len(split) // BATCH)
        return lambda: (images for images, _ in split.images.training(BATCH, parts, 0, CPU, workers, 0, 1))
    order = epoch_batches(len(split), BATCH, 0, 0)
    jobs = [TrainBatch(split.indices[batch], step, slice(0, BATCH)) for step, batch in enumerate(order)]
    return lambda: split.images.training(jobs, CPU, workers)


def theirs(root: Path, training: bool, workers: int) -> Callable[[], Iterable[Any]]:
    """A pass of timm's loader with its prefetcher, the faster of its two ways."""
    dataset = create_dataset("", root=str(root / "folder"), split="train")
    config = timm.data.resolve_data_config({}, model=timm.create_model("resnet50"))
    loader = create_loader(
        dataset,
        config["input_size"],
        BATCH,
        is_training=training,
        color_jitter=0.0,
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        mean=config["mean"],
        std=config["std"],
        num_workers=workers,
        persistent_workers=False,
        device=CPU,
    )
    return lambda: (images for images, _ in loader)


def images_per_cpu_second(one_pass: Callable[[], Iterable[Any]]) -> float:
    """The speed of one pass."""
    began = _cpu_seconds()
    count = sum(len(images) for images in one_pass())
    return count / (_cpu_seconds() - began)


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)


def measure(row: str, args: argparse.Namespace) -> dict[str, Any]:
    """Passes of both loaders in turns. The first pair warms up."""
    source, mode, workers = row.split("/")
    training = mode == "train"
    with jpeg_files(args.shared / "data/imagenet-sample") as root:
        a, b = ours(root, source, training, int(workers)), theirs(root, training, int(workers))
        pairs = [(images_per_cpu_second(a), images_per_cpu_second(b)) for _ in range(args.pairs + 1)][1:]
    ratios = [one / other for one, other in pairs]
    return {
        **environment(),
        "ours": round(statistics.median(one for one, _ in pairs), 1),
        "timm": round(statistics.median(other for _, other in pairs), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "seed": 0,
    }


def table() -> None:
    """Print the rows as Markdown."""
    print("| source | mode | workers | images per CPU-second | timm, class folders | ratio (lowest to highest) |")
    print("|---|---|---|---|---|---|")
    found = load_results(RESULTS)
    for row in (row for row in ROWS if row in found):
        result, ratios = found[row], found[row]["ratios"]
        span = f"{result['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {' | '.join(row.split('/'))} | {result['ours']:.0f} | {result['timm']:.0f} | {span} |")


def main() -> None:
    """Run the command line."""
    torch.set_num_threads(1)
    parser, runner = row_parser(__doc__, "print the rows as Markdown")
    default = Path(os.environ.get("ARP_HUB_SHARED", "../shared"))
    runner.add_argument("--shared", type=Path, default=default, help="folder with data/imagenet-sample")
    runner.add_argument("--pairs", type=int, default=5, help="pairs of passes")
    row_command(parser, ROWS, RESULTS, measure, lambda result: f"{result['ratio']:.3f}", table)


if __name__ == "__main__":
    main()
