"""Data folders: class folders as torchvision's ImageFolder reads them, and parquet files by their names."""

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from arp_hub.errors import ArpHubError
from arp_hub.hub.load import hub_dataset, load_model
from arp_hub.training import evaluate, load_data
from arp_hub.training.data.files import parquet_splits

TWO = ["cat/1.png", "cat/2.png", "dog/1.png"]


@pytest.fixture(scope="module")
def model():
    return load_model("cifar_resnet20", pretrained=False)


def write(root: Path, files):
    """Write images, each of a different grey, and text into all other files."""
    for grey, name in enumerate(files):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".png", ".bmp", ".tif", ".jpeg"):
            Image.fromarray(np.full((8, 8), 9 * grey, np.uint8)).save(path)
        else:
            path.write_text("text")
    return str(root)


def under(folder, files):
    return [f"{folder}/{name}" for name in files]


def found(split):
    """Grey and class of each image, in order."""
    greys = split.images.pixels(torch.device("cpu"))[:, 0, 0, 0]
    return [(int(greys[row]), split.class_names[label]) for row, label in zip(split.indices, split.labels, strict=True)]


def expected(folder):
    """Grey and class of each image, as torchvision reads them."""
    data = ImageFolder(folder)
    return [(image.getpixel((0, 0))[0], data.classes[label]) for image, label in data]


LAYOUTS = {
    "class folders": (TWO, {"train": "."}),
    "split words in file names": (
        ["cat/test_1.png", "cat/val-2.png", "cat/train.png", "dog/x test.png", "dog/eval.3.png", "dog/dev_4.png"],
        {"train": "."},
    ),
    "split words in class names": (
        ["test_tube/1.png", "train-station/2.png", "val d'or/3.png", "cat/4.png"],
        {"train": "."},
    ),
    "a class called train": (["train/1.png", "bus/1.png", "test/1.png"], {"train": "."}),
    "a class called train, nested": (["train/a/1.png", "bus/a/1.png"], {"train": "."}),
    "splits": (under("train", TWO) + under("test", TWO[1:]), {"train": "train", "test": "test"}),
    "splits in capitals": (under("Train", TWO) + under("TEST", TWO[1:]), {"train": "Train", "test": "TEST"}),
    "other words": (under("training", TWO) + under("Val", TWO[1:]), {"train": "training", "validation": "Val"}),
    "three splits": (
        under("train", TWO) + under("val", TWO) + under("test", TWO),
        {"train": "train", "validation": "val", "test": "test"},
    ),
    "one split": (under("validation", TWO), {"validation": "validation"}),
    "classes called as splits in splits": (
        under("train", ["train/1.png", "test/test.png"]) + under("test", ["train/val.png", "test/train.png"]),
        {"train": "train", "test": "test"},
    ),
    "images in folders of a class": (
        ["cat/a/1.png", "cat/a-b/2.png", "cat/a/b/3.png", "cat/4.png", "dog/test/5.png", "dog/6.png"],
        {"train": "."},
    ),
    "capitals and suffixes": (["cat/1.PNG", "cat/2.bmp", "Dog/3.TIF", "Dog/4.png"], {"train": "."}),
    "stray files": (
        [*under("train", TWO), *under("test", TWO), "logo.png", "train/x.png", "docs/a.png", "labels.csv"],
        {"train": "train", "test": "test"},
    ),
    "numbers": (["10/1.png", "9/1.png", "1/1.png"], {"train": "."}),
    "split words inside a class": (
        ["cat/train/a/1.png", "cat/other/2.png", "dog/test/a/3.png", "dog/4.png"],
        {"train": "."},
    ),
}


@pytest.mark.parametrize("name", ["data", "a[1]", "what?*", "{x} [!a] #é", "test", "train-images"])
@pytest.mark.parametrize(("files", "folders"), [LAYOUTS["splits"], LAYOUTS["class folders"]], ids=["splits", "classes"])
def test_the_folder_may_have_any_name(tmp_path, model, name, files, folders):
    data = load_data(write(tmp_path / name, files), model)
    for split, folder in folders.items():
        assert found(data.split(split)) == expected(tmp_path / name / folder)


@pytest.mark.parametrize(("files", "folders"), LAYOUTS.values(), ids=LAYOUTS)
def test_class_folders_are_what_imagefolder_finds(tmp_path, model, files, folders):
    data = load_data(write(tmp_path, files), model)
    splits = {"train": data.train, **data.others} if "train" in folders else dict(data.others)
    assert splits.keys() == folders.keys()
    for split, folder in folders.items():
        where = tmp_path / folder
        assert found(splits[split]) == expected(where)


def test_links_are_followed_but_not_in_a_circle(tmp_path, model):
    write(tmp_path / "elsewhere", ["1.png"])
    root = tmp_path / "data"
    write(root, ["cat/2.png"])
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    assert [name for _, name in found(load_data(str(root), model).train)] == ["cat", "dog"]
    (root / "cat" / "again").symlink_to(root)
    assert [name for _, name in found(load_data(str(root), model).train)] == ["cat", "dog"]


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ([*TWO, "logo.png"], "1 of 4 files are not used: logo.png"),
        ([*TWO, "cat/x.gif", "dog/noending"], "2 of 5 files are not used: cat/x.gif, dog/noending"),
        ([*TWO, "cat/.ipynb_checkpoints/1.png"], "1 of 4 files are not used: cat/.ipynb_checkpoints/1.png"),
        ([*under("train", TWO), *under("test", TWO), "extra/cat/9.png"], "1 of 7 files are not used: extra/cat/9.png"),
        ([*TWO, "README.md", "cat/.DS_Store"], None),
        ([*under("train", TWO), "val/cat/1.png"], "split 'validation' has no images of 1 class: dog"),
        ([*under("train", TWO), *under("test", ["Cat/1.png", "dog/2.png"])], "'train' has no images of 1 class: Cat"),
        (["images/1.png", "images/2.png"], "has one class, 'images': is there a folder for each class?"),
    ],
)
def test_what_is_left_out_is_named(tmp_path, model, caplog, files, named):
    load_data(write(tmp_path, files), model)
    lines = [line for line in caplog.messages if "one usable split" not in line]
    assert (named in lines[0]) if named else not lines


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["train/cat/1.png", "docs/x.png"], ["'train' may be a split or a class beside 'docs'", "/train'"]),
        (under("train", TWO) + under("Train", TWO), ["'Train' and 'train' are both the split 'train'"]),
        (under("val", TWO) + under("train", TWO) + under("valid", TWO), ["'val' and 'valid' are both"]),
        (under("train", TWO) + under("holdout", TWO), ["'holdout' holds the same class folders", "rename"]),
        (under("test", TWO) + under("a", TWO) + under("b", ["x/1.png"]), ["'a' holds the same class folders"]),
        ([*TWO, "notes/a.txt"], ["1 class folders hold no images (notes)"]),
        ([*under("train", TWO), "train/emu/a.txt"], ["no images (emu)"]),
        (under("cats/train", TWO) + under("cats/test", TWO), ["'cats' is no class, because it holds splits", "/cats'"]),
        ([f"{top}/{split}/1.png" for top in "ab" for split in ("train", "test")], ["'a' is no class"]),
        (["a.txt", "b/c.gif"], ["no images, parquet files or tar shards", ".png"]),
        (["1.png", "2.png"], ["no split has labels"]),
        (["train/1.png", "test/2.png"], ["no split has labels"]),
    ],
)  # fmt: skip
def test_folders_in_doubt_are_refused(tmp_path, model, files, words):
    with pytest.raises(ArpHubError) as caught:
        load_data(write(tmp_path, files), model)
    for word in words:
        assert word in str(caught.value)


def test_images_without_class_folders_calibrate_without_labels(tmp_path, model):
    data = load_data(write(tmp_path, ["train/1.png", "test/2.png"]), model, require_labels=False)
    assert (data.num_classes, data.train.labels, len(data.train), len(data.test)) == (0, None, 1, 1)
    with pytest.raises(ArpHubError, match="not measured: split 'test' has no labels"):
        evaluate(model, data.test)


def test_a_split_with_labels_is_for_testing_before_one_without(tmp_path, model):
    """As in ImageNet, whose test images have no labels."""
    files = [*under("train", TWO), *under("val", TWO), "test/1.png", "test/2.png"]
    source = write(tmp_path, files)
    for required in (True, False):
        data = load_data(source, model, require_labels=required)
        assert data.test.name == "validation" and data.test.label_range == (0, 1)
        chosen = load_data(source, model, require_labels=required, test_split="validation")
        assert chosen.test.name == "validation"


@pytest.mark.parametrize("key", ["image_key", "label_key"])
def test_class_folders_have_two_columns(tmp_path, model, key):
    root = write(tmp_path, TWO)
    load_data(root, model, **{key: key[:5]})
    with pytest.raises(ArpHubError, match=f"no column {key}='x': the columns of class folders are image and label"):
        load_data(root, model, **{key: "x"})


SHARDS = ["train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"]
PARQUET = {
    "shards": (SHARDS, {"train": SHARDS[:2], "validation": SHARDS[2:]}),
    "shards in a folder": (
        under("data", SHARDS), {"train": under("data", SHARDS[:2]), "validation": under("data", SHARDS[2:])}
    ),
    "with a fingerprint": (["test-00000-of-00001-0123456789ab"], {"test": ["test-00000-of-00001-0123456789ab"]}),
    "a split of its own name": (
        ["extra_2-00000-of-00001", "train"], {"train": ["train"], "extra_2": ["extra_2-00000-of-00001"]}
    ),
    "whole names": (["Test", "train", "val"], {"train": ["train"], "test": ["Test"], "validation": ["val"]}),
    "a name before": (["cifar10-train", "cifar10-test"], {"train": ["cifar10-train"], "test": ["cifar10-test"]}),
    "a name before a shard": (["x-test-00000-of-00001"], {"test": ["x-test-00000-of-00001"]}),
    "numbers": (["train_0", "train_1", "test.2"], {"train": ["train_0", "train_1"], "test": ["test.2"]}),
    "folders": (["train/0000", "Test/0000"], {"train": ["train/0000"], "test": ["Test/0000"]}),
    "no split in a name": (["part-1", "part-2"], {"train": ["part-1", "part-2"]}),
    "a word in the middle": (["food-test-kitchen", "food"], {"train": ["food-test-kitchen", "food"]}),
    "both words": (["train-test", "x"], {"train": ["train-test", "x"]}),
}  # fmt: skip


@pytest.mark.parametrize("name", ["data", "test[1]"])
@pytest.mark.parametrize(("files", "splits"), PARQUET.values(), ids=PARQUET)
def test_parquet_files_are_sorted_into_splits_by_their_names(tmp_path, name, files, splits):
    root = tmp_path / name
    write(root, [f"{file}.parquet" for file in files])
    full = {split: [str(root / f"{file}.parquet") for file in chosen] for split, chosen in splits.items()}
    result = parquet_splits(str(root), root, None)[0]
    assert result == full
    assert next(iter(result)) == ("train" if "train" in splits else next(iter(splits)))


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["train", "test", "metadata"], "1 of 3 files are not used: metadata.parquet"),
        (["train-00000-of-00294", "test"], "1 of the 294 files of split 'train' are here"),
        (SHARDS, None),
    ],
)
def test_parquet_files_that_are_missing_or_left_out_are_named(tmp_path, caplog, files, named):
    parquet_splits("data", Path(write(tmp_path, [*(f"{file}.parquet" for file in files), "README.txt"])), None)
    assert caplog.messages == ([f"data 'data': {named}"] if named else [])


def test_the_same_part_of_a_split_in_two_folders_is_refused(tmp_path):
    write(tmp_path, [f"{name}/train-00000-of-00001.parquet" for name in ("en", "fr")])
    with pytest.raises(ArpHubError, match="same part of split 'train'.*give one of the folders"):
        parquet_splits("data", tmp_path, None)


def table(path, labels, **more):
    """Write a parquet file as pandas does: images as bytes, without types of the datasets library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path.with_suffix(".png"))
    data = path.with_suffix(".png").read_bytes()
    path.with_suffix(".png").unlink()
    pq.write_table(pa.table({"image": [{"bytes": data, "path": None}] * len(labels), "label": labels, **more}), path)


LABELS = {
    "uint8": (pa.array([2, 0, 1], pa.uint8()), [2, 0, 1], ()),
    "uint64": (pa.array([2, 0, 1], pa.uint64()), [2, 0, 1], ()),
    "int16": (pa.array([2, 0, 1], pa.int16()), [2, 0, 1], ()),
    "bool": (pa.array([True, False, True]), [1, 0, 1], ("False", "True")),
    "string": (pa.array(["dog", "cat", "emu"]), [1, 0, 2], ("cat", "dog", "emu")),
    "large string": (pa.array(["b", "a", "b"], pa.large_string()), [1, 0, 1], ("a", "b")),
    "numbers as strings": (pa.array(["10", "9", "0"]), [2, 1, 0], ("0", "9", "10")),
}


@pytest.mark.parametrize(("labels", "numbers", "names"), LABELS.values(), ids=LABELS)
def test_labels_of_any_type_are_read(tmp_path, model, labels, numbers, names):
    table(tmp_path / "a[b]" / "train.parquet", labels)
    table(tmp_path / "a[b]" / "test.parquet", labels[1:])
    data = load_data(str(tmp_path / "a[b]"), model, label_key="label")
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == (numbers, numbers[1:])
    assert (data.class_names, data.test.class_names) == (names, names)
    assert data.num_classes == 3 - (len(names) == 2)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (pa.array(["a", None, "b"]), "1 of 3 images of split 'train' have no label"),
        (pa.array(["a", "", "b"]), "1 of 3 images of split 'train' have no label"),
        (pa.array(["", "", ""]), "no split has labels"),
        (pa.array([True, None, False]), "1 of 3 images of split 'train' have no label"),
        (pa.array([2**64 - 1, 0, 1], pa.uint64()), "look like image numbers"),
        (pa.array([0.0, 1.0, 2.0]), "'label' holds neither numbers nor names of classes"),
        (pa.array([[0], [1], [2]]), "'label' holds neither numbers nor names of classes"),
    ],
)
def test_labels_that_make_no_sense_are_refused(tmp_path, model, labels, words):
    table(tmp_path / "train.parquet", labels)
    with pytest.raises(ArpHubError, match=words):
        load_data(str(tmp_path), model, label_key="label")


@pytest.fixture
def configured(tmp_path):
    """A parquet folder with the configurations ``fine`` and ``coarse``, as in a clone from the Hub."""
    root = tmp_path / "pets[2]"
    for name, labels in (("fine", [0, 1, 2]), ("coarse", [0, 0, 1])):
        table(root / name / "train-00000-of-00001.parquet", pa.array(labels))
        table(root / name / "test-00000-of-00001.parquet", pa.array(labels))
    (root / "README.md").write_text(f"---\n{json.dumps({'configs': [config('fine'), config('coarse')]})}\n---\n")
    return root


def config(name, **more):
    files = [{"split": split, "path": f"{name}/{split}-*"} for split in ("train", "test")]
    return {"config_name": name, "data_files": files, **more}


def test_a_configuration_is_chosen_after_a_colon(configured, model):
    for name, classes in (("fine", 3), ("coarse", 2)):
        assert load_data(f"{configured}:{name}", model, label_key="label").num_classes == classes
    for source, words in {
        f"{configured}": r"several configurations: name one of fine, coarse after a colon, as in '.*:coarse'",
        f"{configured}:x": r"no configuration 'x': name one of fine, coarse after a colon",
        f"{configured / 'fine'}:x": r"has no configurations: leave out ':x'",
    }.items():
        with pytest.raises(ArpHubError, match=words):
            load_data(source, model, label_key="label")
    readme = {"configs": [config("fine"), config("coarse", default=True)]}
    (configured / "README.md").write_text(f"---\n{json.dumps(readme)}\n---\n")
    assert load_data(str(configured), model, label_key="label").num_classes == 2
    (configured / "coarse" / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(ArpHubError, match="README says that split 'test' is in 'coarse/test-.', but there is no such"):
        load_data(str(configured), model, label_key="label")
    write(configured / "classes", TWO)
    with pytest.raises(ArpHubError, match="has no configurations: leave out ':x'"):
        load_data(f"{configured / 'classes'}:x", model)


def test_a_configuration_of_a_hub_dataset_is_chosen_after_a_colon(tmp_path, configured, model, monkeypatch):
    local = str(configured.rename(tmp_path / "pets"))  # the folder that the Hub's name is mapped to
    load, names = datasets.load_dataset, datasets.get_dataset_config_names
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, **more: load(local, config, **more))
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: names(local))
    stream = load_data("me/pets:coarse", model, label_key="label", streaming=True)
    labels = [batch.tolist() for _, batch in stream.test.labelled(2, torch.device("cpu"), 0)]
    assert (sum(labels, []), stream.num_classes) == ([0, 0, 1], model.num_classes)
    assert load_data("me/pets:coarse", model, label_key="label").num_classes == 2
    for source in ("me/pets", "me/pets:x"):
        with pytest.raises(ArpHubError, match=r"name one of fine, coarse after a colon, as in 'me/pets:coarse'"):
            load_data(source, model, label_key="label")
    assert (hub_dataset("me/pets:coarse"), hub_dataset("me/pets"), hub_dataset(local)) == ("me/pets", "me/pets", None)


def test_a_broken_parquet_file_gives_its_own_reason(tmp_path, model):
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(ArpHubError, match="cannot load the data .*[Pp]arquet"):
        load_data(str(tmp_path), model)
