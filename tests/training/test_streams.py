"""Data read in the order of its shards: each image once an epoch, over processes and workers, and after a resume."""

import io
import json
import os
import sys
from collections import Counter
from pathlib import Path
from subprocess import run

import datasets
import numpy as np
import pytest
import torch
from helpers import ON_TWO, both_ended_clean, search_path
from PIL import Image
from shards import CLASSES, png, seen, write_shards, write_tar

from arp_hub.errors import ArpHubError
from arp_hub.hub.load import load_model
from arp_hub.training import calibration_images, evaluate, load_data, refinement_images
from arp_hub.training.data.input_format import input_format

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model():
    return load_model("cifar_resnet20", pretrained=False, num_classes=CLASSES)


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    """Four shards of ten images to train on, two of five to test on."""
    folder = tmp_path_factory.mktemp("even")
    write_shards(folder, "train", [10] * 4)
    return write_shards(folder, "test", [5] * 2)


def epoch(split, parts, *, size=2, seed=7, workers=0, rank=0, world=1):
    """The greys of one process, in order."""
    stream = split.images
    return seen(stream.form, stream.training(size, parts, seed, CPU, workers, rank, world))


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (5, 0), (1, 2), (2, 2)])
def test_each_image_is_seen_once_an_epoch(even, model, world, workers):
    """Four shards: dealt to up to four processes; read by all of five, each of which takes every fifth image."""
    data = load_data(even, model, streaming=True)
    assert (len(data.train), len(data.test)) == (40, 10)
    steps = range(40 // (2 * world))
    found = [epoch(data.train, steps, workers=workers, rank=rank, world=world) for rank in range(world)]
    assert {len(part) for part in found} == {40 // world}
    assert sorted(sum(found, [])) == list(range(40))
    measured = [
        seen(data.test.images.form, data.test.labelled(3, CPU, workers, rank=r, world=world)) for r in range(world)
    ]
    assert sorted(sum(measured, [])) == list(range(10))


def test_epochs_and_seeds_differ_in_order(even, model):
    train = load_data(even, model, streaming=True).train
    one, same, other = (epoch(train, range(20), seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert one != sorted(one)


def test_unequal_shards_leave_no_process_waiting(tmp_path, model):
    """The process with the larger shard leaves its last images out; the other starts over."""
    train = load_data(write_shards(tmp_path, "train", [4, 12]), model, streaming=True).train
    found = [epoch(train, range(4), rank=rank, world=2) for rank in range(2)]
    assert [len(part) for part in found] == [8, 8]
    few, many = sorted(found, key=lambda part: len(set(part)))
    assert set(Counter(few).values()) == {2}
    assert len(set(many)) == 8
    assert not set(few) & set(many)


@pytest.mark.parametrize(("workers", "world"), [(0, 1), (0, 5), (1, 2), (2, 1)])
def test_a_resumed_epoch_goes_on_where_it_stopped(even, model, workers, world):
    train = load_data(even, model, streaming=True).train
    batches = 40 // world // 3
    whole = epoch(train, range(batches), size=3, workers=workers, world=world)
    for stop in (1, batches - 1):
        rest = epoch(train, range(stop, batches), size=3, workers=workers, world=world)
        assert rest == whole[3 * stop :]


def test_a_resumed_epoch_goes_on_in_a_second_pass(tmp_path, model):
    train = load_data(write_shards(tmp_path, "train", [5, 3]), model, streaming=True, epoch_images=20).train
    assert len(train) == 20
    whole = epoch(train, range(10), workers=2)
    assert epoch(train, range(6, 10), workers=2) == whole[12:]
    assert sorted(whole[:8]) == sorted(whole[8:16]) == list(range(8))


def test_augmentation_is_the_same_after_a_resume(tmp_path, model):
    write_tar(tmp_path / "train.tar", [{"png": picture(k), "cls": b"1"} for k in range(8)])
    stream = load_data(str(tmp_path), model, streaming=True).train.images
    whole = [images for images, _ in stream.training(2, range(4), 3, CPU, 1, 0, 1)]
    rest = [images for images, _ in stream.training(2, range(2, 4), 3, CPU, 1, 0, 1)]
    assert torch.equal(torch.stack(whole[2:]), torch.stack(rest))
    other = next(stream.training(2, range(1), 4, CPU, 1, 0, 1))[0]
    assert not torch.equal(other, whole[0])


def picture(seed):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_calibration_and_refinement_read_different_images(even, model):
    data = load_data(even, model, streaming=True)
    greys = []
    for images in (calibration_images(data, 20, copies=0), torch.cat(refinement_images(data, 20))):
        form = data.train.images.form
        greys.append(set(((images[:, 0, 16, 16] * form.std[0] + form.mean[0]) * 255).round().int().tolist()))
    assert [len(part) for part in greys] == [20, 20]
    assert not greys[0] & greys[1]
    assert calibration_images(data, 4, copies=2).shape == (12, 3, 32, 32)


def test_accuracy_is_that_of_images_read_at_random(even, model):
    ours, theirs = (load_data(even, model, streaming=streaming).test for streaming in (True, False))
    streamed, indexed = evaluate(model, ours, batch_size=3, workers=1), evaluate(model, theirs, batch_size=3)
    assert streamed == pytest.approx(indexed, abs=1e-4)
    assert evaluate(model, ours, max_images=4)["images"] == 4


def test_parquet_files_are_streamed_with_their_class_names(tmp_path, model):
    features = datasets.Features(picture=datasets.Image(), kind=datasets.ClassLabel(names=["a", "b", "c", "d"]))
    for split, count in (("train", 12), ("test", 4)):
        for shard in range(2):
            rows = range(shard * count // 2, (shard + 1) * count // 2)
            columns = {"picture": [{"bytes": png(k), "path": None} for k in rows], "kind": [k % CLASSES for k in rows]}
            table = datasets.Dataset.from_dict(columns, features=features)
            table.to_parquet(tmp_path / f"{split}-{shard:05d}-of-00002.parquet")
    data = load_data(str(tmp_path), model, streaming=True)
    assert (data.class_names, len(data.train), len(data.test)) == (("a", "b", "c", "d"), 12, 4)
    found = [epoch(data.train, range(3), rank=rank, world=2, workers=1) for rank in range(2)]
    assert sorted(sum(found, [])) == list(range(12))


def test_labels_are_checked_as_they_are_read(tmp_path, model):
    samples = [{"png": png(k), "cls": str(label).encode()} for k, label in enumerate([0, 1, 9])]
    write_tar(tmp_path / "train.tar", samples)
    data = load_data(str(tmp_path), model, streaming=True)
    with pytest.raises(ArpHubError, match=r"sample '000002' of shard '.*train.tar' has the label 9, where 4 classes"):
        list(data.train.labelled(2, CPU, 1))


def test_a_bad_image_is_counted_once_and_named(tmp_path, model, caplog):
    write_tar(tmp_path / "train.tar", [{"png": b"no image", "cls": b"0"}, {"png": png(1), "cls": b"1"}])
    with pytest.raises(ArpHubError, match=r"sample '000000' of shard '.*train.tar' cannot be decoded"):
        list(load_data(str(tmp_path), model, streaming=True).train.labelled(2, CPU, 1))
    data = load_data(str(tmp_path), model, streaming=True, max_bad_images=1)
    for _ in range(2):
        assert sum(len(labels) for _, labels in data.train.labelled(2, CPU, 1)) == 2
    assert data.bad_images() == 1


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("digits", {}, "data 'digits' is in memory"),
        ("{}", {"val_fraction": 0.1}, "val_fraction=0.1 cannot be held out of a stream"),
        ("{}", {"label_key": "kind"}, "label_key='kind'"),
        ("{}/train-{{0000..0009}}.tar", {}, "6 of 10 tar shards are missing"),
        ("{}/train-{{0000..0009}}.tar", {"epoch_images": 9}, "6 of 10 tar shards are missing"),
        ("http://localhost:9/train-{{0..3}}.tar", {}, "cannot load the data"),
    ],
)
def test_what_cannot_be_streamed_is_refused(even, model, source, options, words):
    with pytest.raises(ArpHubError) as error:
        load_data(source.format(even), model, streaming=True, **options)
    assert words in str(error.value)


def test_a_cut_shard_is_named_whether_or_not_shards_are_counted(tmp_path, model):
    write_shards(tmp_path, "train", [20, 20])
    shard = tmp_path / "train-0001.tar"
    shard.write_bytes(shard.read_bytes()[:9000])
    with pytest.raises(ArpHubError, match=r"train-0001.tar' cannot be read after member"):
        load_data(str(tmp_path), model, streaming=True)
    with pytest.raises(ArpHubError, match=r"train-0001.tar' is cut off at 9000 bytes"):
        load_data(str(tmp_path), model, streaming=True, epoch_images=40)


def command(folder, output, *more):
    script = str(ROOT / "recipes/any_backbone.py")
    return [sys.executable, *ON_TWO, script, "--model", "cifar_resnet20", "--no-pretrained", "--data", folder,
            "--streaming", "--keep-params", "0.5", "--dense-epochs", "1", "--epochs", "2", "--batch-size", "8",
            "--workers", "2", "--calibration-images", "8", "--output", str(output), "--tracker", "none", "--cpu",
            "--seed", "3", "--checkpoint-every", "1", "--keep-checkpoints", "99", *more]  # fmt: skip


def trained(folder, output, *more):
    """Run a recipe on two processes; the losses that it logs."""
    environment = os.environ | {"PYTHONPATH": search_path(ROOT)}
    done = run(command(folder, output, *more), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert both_ended_clean(done.stdout + done.stderr)
    rows = map(json.loads, (output.with_name(output.name + "-run") / "log.jsonl").read_text().splitlines())
    return {(row["phase"], row["step"]): row["loss"] for row in rows if "loss" in row}


@pytest.mark.slow
def test_two_processes_train_on_unequal_shards_and_resume_exactly(tmp_path):
    folder = write_shards(tmp_path / "data", "train", [7, 12, 13])
    write_shards(tmp_path / "data", "test", [3, 4, 2])
    whole = trained(folder, tmp_path / "out")
    assert [step for phase, step in whole if phase == "compress"] == [4, 8]
    middle = tmp_path / "out-run/checkpoints"
    middle = next(path for path in middle.iterdir() if path.name.startswith("compress") and path.name.endswith("6"))
    again = trained(folder, tmp_path / "out", "--resume", str(middle))
    assert again == pytest.approx(whole, rel=1e-6)


def test_splits_of_a_stream_are_resized_alike(tmp_path):
    for split, size in (("train", 40), ("test", 150)):
        write_tar(tmp_path / f"{split}-0000.tar", [{"png": png(9, size), "cls": b"0"}])
    model = load_model("test_resnet", pretrained=False, num_classes=CLASSES)
    for streaming in (False, True):
        data = load_data(str(tmp_path), model, streaming=streaming)
        assert data.train.images.form == data.test.images.form == input_format(model)
