"""WebDataset tar shards that are read image by image."""

import gzip
import json
from collections import Counter

import pytest
import torch
from shards import CLASSES, png, seen, write_shards, write_tar

from arp_hub.errors import ArpHubError
from arp_hub.hub.load import hub_dataset, load_model
from arp_hub.training import evaluate, load_data
from arp_hub.training.data.batches import epoch_batches
from arp_hub.training.data.images import StreamedImages, TrainBatch
from arp_hub.training.data.tars import expanded, read_index

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return load_model("cifar_resnet20", pretrained=False, num_classes=CLASSES)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ARP_HUB_CACHE", str(folder))
    return folder


def greys(split):
    return seen(split.images.form, split.labelled(4, CPU, 0))


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
    ],
)
def test_braces_are_expanded(pattern, paths):
    assert expanded(pattern) == paths


@pytest.mark.parametrize("source", ["{}", "wds:{}", "{}/{{train,val}}-{{0000..0001}}.tar",
                                    "{0}/train-{{0000..0001}}.tar::{0}/val-{{0000,0001}}.tar"])  # fmt: skip
def test_a_folder_and_patterns_give_the_same_splits(tmp_path, model, source):
    write_shards(tmp_path, "train", [5, 3])
    write_shards(tmp_path, "val", [2, 2])
    data = load_data(source.format(tmp_path), model)
    assert (data.test.name, data.num_classes) == ("validation", CLASSES)
    assert greys(data.train) == list(range(8))
    assert greys(data.test) == list(range(4))
    assert evaluate(model, data.test)["images"] == 4


def test_many_patterns_are_no_file_name(tmp_path, model):
    """Joined, they are longer than a name on any disk."""
    for split in ("train", "val"):
        write_shards(tmp_path / "a" / split, split, [2] * 12)
    source = "::".join(str(path) for path in sorted(tmp_path.rglob("*.tar")))
    data = load_data(source, model)
    assert (len(data.train), len(data.test)) == (24, 24)
    assert hub_dataset(source) is None


def test_large_images_of_shards_are_each_seen_once_by_workers_of_two_processes(tmp_path, model):
    write_tar(tmp_path / "train.tar", [{"png": png(k, 100), "cls": b"1"} for k in range(8)])
    data = load_data(str(tmp_path), model)
    images = data.train.images
    assert isinstance(images, StreamedImages)
    found = []
    for rank in range(2):
        share = slice(2 * rank, 2 * rank + 2)
        jobs = [TrainBatch(batch, 1, share) for batch in epoch_batches(8, 4, 0, 0)]
        for pixels in images.training(jobs, CPU, 2):
            found += ((pixels[:, 0, 9, 9] * images.form.std[0] + images.form.mean[0]) * 255).round().int().tolist()
    assert sorted(found) == list(range(8))


def test_labels_are_numbers_names_or_fields_of_json(tmp_path, model):
    names = [b"dog", b"cat", b"dog"]
    write_tar(tmp_path / "names/train.tar", [{"jpg": png(k), "cls": name} for k, name in enumerate(names)])
    data = load_data(str(tmp_path / "names"), model)
    assert (data.class_names, data.train.labels.tolist()) == (("cat", "dog"), [1, 0, 1])
    fields = [json.dumps({"kind": k}).encode() for k in (2, 0, 1)]
    write_tar(tmp_path / "json/train.tar", [{"png": png(k), "json": text} for k, text in enumerate(fields)])
    assert load_data(str(tmp_path / "json"), model, label_key="kind").train.labels.tolist() == [2, 0, 1]
    stream = load_data(str(tmp_path / "json"), model, label_key="kind", streaming=True)
    batches = stream.train.labelled(4, torch.device("cpu"), 0)
    assert [int(label) for _, labels in batches for label in labels] == [2, 0, 1]
    assert load_data(str(tmp_path / "json"), model, require_labels=False).train.labels is None


def test_the_index_is_kept_until_a_shard_changes(tmp_path, cache, monkeypatch):
    write_shards(tmp_path, "train", [3])
    shard = str(tmp_path / "train-0000.tar")
    first = read_index("x", "train", [shard], None, None)
    monkeypatch.setattr("arp_hub.training.data.tars._samples", lambda shard: pytest.fail("the shard is read again"))
    assert read_index("x", "train", [shard], None, None).offset.tolist() == first.offset.tolist()
    monkeypatch.undo()
    monkeypatch.setenv("ARP_HUB_CACHE", str(cache))
    whole = next(cache.iterdir()).read_bytes()
    for damaged in (b"damaged", b"", whole[: len(whole) // 2], whole[:-30]):
        next(cache.iterdir()).write_bytes(damaged)
        assert len(read_index("x", "train", [shard], None, None).offset) == 3
    write_shards(tmp_path, "train", [5])
    assert len(read_index("x", "train", [shard], None, None).offset) == 5


def truncate(path):
    path.write_bytes(path.read_bytes()[:1800])


def damage(path):
    content = bytearray(path.read_bytes())
    content[2048:2500] = b"x" * 452
    path.write_bytes(content)


def compress(path):
    path.write_bytes(gzip.compress(path.read_bytes()))


def empty(path):
    write_tar(path, [])


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (truncate, {}, ["train-0001.tar", "after member '000002.cls'", "unexpected end of data"]),
        (damage, {}, ["train-0001.tar", "after member", "a header is damaged"]),
        (compress, {}, ["train-0001.tar", "compressed archives must be unpacked"]),
        (lambda path: path.unlink(), {}, ["1 of 2 tar shards are missing", "train-0001.tar"]),
        (lambda path: write_tar(path, [{"cls": b"1"}]), {}, ["train-0001.tar", "no image", "its members are cls"]),
        (lambda path: write_tar(path, [{"png": png(1), "jpg": png(1), "cls": b"1"}]), {}, ["more than one image"]),
        (lambda path: write_tar(path, [{"png": png(1)}]), {}, ["1 of 3 images of split 'train' have no label"]),
        (lambda path: None, {"label_key": "kind"}, ["'000000'", "train-0000.tar", "label_key='kind'", "png, cls"]),
        (lambda path: None, {"image_key": "jpg"}, ["'000000'", "train-0000.tar", "image_key='jpg'", "png, cls"]),
        (lambda path: None, {"train_split": "practice"}, ["train_split='practice'", "choose one of train"]),
        (lambda path: None, {"epoch_images": 3}, ["epoch_images=3", "set streaming"]),
        (lambda path: None, {"data_dir": "x"}, ["data_dir='x'", "leave it out"]),
    ],
)
def test_a_wrong_shard_or_key_is_one_error_that_names_it(tmp_path, model, change, options, words):
    write_shards(tmp_path, "train", [2, 2])
    change(tmp_path / "train-0001.tar")
    with pytest.raises(ArpHubError) as error:
        load_data(f"{tmp_path}/train-{{0000..0001}}.tar", model, **options)
    assert all(word in str(error.value) for word in words), error.value


def test_an_empty_split_and_shards_elsewhere_are_refused(tmp_path, model):
    write_shards(tmp_path, "train", [2])
    empty(tmp_path / "test-0000.tar")
    with pytest.raises(ArpHubError, match="split 'test' hold no samples"):
        load_data(str(tmp_path), model)
    with pytest.raises(ArpHubError, match="'https://example.org/train-0.tar' is not on this machine: set streaming"):
        load_data("https://example.org/train-{0..3}.tar", model)


def test_an_image_that_cannot_be_decoded_is_named_with_its_shard(tmp_path, model):
    write_tar(tmp_path / "train.tar", [{"png": b"no image", "cls": b"1"}, {"png": png(5), "cls": b"1"}])
    with pytest.raises(
        ArpHubError, match=r"image '000000.png' of shard '.*train.tar' cannot be decoded: cannot identify"
    ):
        greys(load_data(str(tmp_path), model).train)
    data = load_data(str(tmp_path), model, max_bad_images=1)
    assert Counter(data.train.images.pixels(CPU)[1].flatten().tolist()) == {5: 3 * 32 * 32}
    assert data.bad_images() == 1
