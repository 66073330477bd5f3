"""Data sets by the names that timm's ``--dataset`` takes."""

import io
import shutil
import tarfile

import datasets
import pytest
import torch
from shards import CLASSES, png, seen, write_shards

from arp_hub.errors import ArpHubError
from arp_hub.hub.load import load_model
from arp_hub.training import TrainConfig, evaluate, load_data
from arp_hub.training.inputs import load_data_and_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return load_model("cifar_resnet20", pretrained=False, num_classes=CLASSES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Class folders in train/ and val/."""
    root = tmp_path_factory.mktemp("folders")
    for split, count in (("train", 12), ("val", 4)):
        for grey in range(count):
            folder = root / split / f"class {grey % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{grey:02d}.png").write_bytes(png(grey))
    return root


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Parquet files of two splits, in two parts each."""
    root = tmp_path_factory.mktemp("tables")
    features = datasets.Features(img=datasets.Image(), kind=datasets.ClassLabel(names=["a", "b", "c", "d"]))
    for split, count in (("train", 12), ("test", 4)):
        for part in range(2):
            rows = range(part * count // 2, (part + 1) * count // 2)
            columns = {"img": [{"bytes": png(k), "path": None} for k in rows], "kind": [k % CLASSES for k in rows]}
            table = datasets.Dataset.from_dict(columns, features=features)
            table.to_parquet(root / f"{split}-{part:05d}-of-00002.parquet")
    return root


def greys(split):
    return seen(split.images.form, split.labelled(4, CPU, 0))


@pytest.mark.parametrize("name", ["timm:", "timm:torch/image_folder"])
def test_class_folders_through_timm_are_those_of_the_package(folders, model, name):
    ours, theirs = load_data(str(folders), model), load_data(name, model, data_dir=str(folders))
    assert theirs.class_names == ours.class_names
    for split in ("train", "test"):
        assert greys(theirs.split(split)) == greys(ours.split(split))
    assert evaluate(model, theirs.test) == evaluate(model, ours.test)


def test_classes_are_numbered_as_in_the_training_split(tmp_path, model):
    """Timm and torchvision number the classes of each folder on their own."""
    for split, kinds in (("train", "abc"), ("validation", "bc"), ("odd", "bz")):
        for kind in kinds:
            (tmp_path / split / kind).mkdir(parents=True)
            (tmp_path / split / kind / "0.png").write_bytes(png(40))
    for name in ("timm:", "timm:torch/image_folder"):
        data = load_data(name, model, data_dir=str(tmp_path))
        assert data.class_names == ("a", "b", "c") and data.test.labels.tolist() == [1, 2]
        assert data.test.name == "validation"
        with pytest.raises(ArpHubError, match="split 'odd' has the class 'z', which the training split lacks"):
            load_data(name, model, data_dir=str(tmp_path), test_split="odd")


LAYOUTS = {
    "train and test": (["train", "test"], {}, "test"),
    "train and val": (["train", "val"], {}, "validation"),
    "only train": (["train"], {}, None),
    "another spelling of train": (["Train", "val"], {}, "timm finds no folder of split 'train'"),
    "no such test split": (["train"], {"test_split": "validation"}, "timm finds no folder of split 'validation'"),
}


@pytest.mark.parametrize("name", ["timm:", "timm:torch/image_folder"])
@pytest.mark.parametrize("case", LAYOUTS)
def test_no_image_is_for_both_training_and_testing(tmp_path, model, case, name):
    """Timm reads the whole folder where it finds none for a split."""
    places, options, expected = LAYOUTS[case]
    for number, place in enumerate(places):
        for label, kind in enumerate("abc"):
            (tmp_path / place / kind).mkdir(parents=True)
            (tmp_path / place / kind / "0.png").write_bytes(png(20 * CLASSES * (number + 1) + label))
    if expected and " " in expected:
        with pytest.raises(ArpHubError, match=expected):
            load_data(name, model, data_dir=str(tmp_path), **options)
        return
    data = load_data(name, model, data_dir=str(tmp_path), **options)
    assert len(data.train) == 3 and data.class_names == ("a", "b", "c")
    assert data.shares_images == (expected is None)
    if expected:
        assert data.test.name == expected and len(data.test) == 3 and not set(greys(data.train)) & set(greys(data.test))


def test_a_tar_of_class_folders_is_refused(tmp_path, model):
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for kind in "ab":
            entry = tarfile.TarInfo(f"{kind}/0.png")
            entry.size = len(png(40))
            tar.addfile(entry, io.BytesIO(png(40)))
    with pytest.raises(ArpHubError, match="tar archive of class folders.*unpack it"):
        load_data("timm:", model, data_dir=str(tmp_path / "images.tar"))


def test_one_folder_for_both_splits_is_told(folders, model, caplog):
    data = load_data("timm:", model, data_dir=str(folders / "train"))
    assert greys(data.train) == greys(data.test)
    assert "has one usable split, 'train'" in caplog.text


def test_tables_of_the_datasets_library(tables, model):
    data = load_data(f"timm:hfds/{tables}", model, image_key="img", label_key="kind", val_fraction=0.34)
    assert data.class_names == ("a", "b", "c", "d")
    assert sorted(greys(data.train) + greys(data.val)) == list(range(12))
    assert greys(data.test) == list(range(4))
    part = load_data(f"timm:hfds/{tables}", model, image_key="img", label_key="kind", train_split="train[:5]")
    assert greys(part.train) == list(range(5))


def test_a_stream_of_timm_goes_through_each_image(tables, model):
    data = load_data(f"timm:hfids/{tables}", model, image_key="img", label_key="kind", epoch_images=12)
    assert (len(data.train), data.num_classes) == (12, CLASSES)
    assert greys(data.test) == list(range(4))
    form, images = data.train.images.form, data.train.images
    found = [seen(form, images.training(2, range(3), 5, CPU, 0, rank, 2)) for rank in range(2)]
    assert sorted(sum(found, [])) == list(range(12))
    whole, rest = (seen(form, images.training(2, range(start, 6), 5, CPU, 1, 0, 1)) for start in (0, 2))
    assert rest == whole[4:]
    measured = [seen(form, data.test.labelled(4, CPU, 0, rank=rank, world=3)) for rank in range(3)]
    assert sorted(sum(measured, [])) == list(range(4))


def test_a_stream_of_unknown_length_needs_epoch_images(tables, tmp_path):
    unread = shutil.copytree(tables, tmp_path / "unread")  # the datasets library knows the length of what it has read
    config = TrainConfig(model="cifar_resnet20", keep_params=0.5, dense_epochs=1, data=f"timm:hfids/{unread}",
                         image_key="img", label_key="kind")  # fmt: skip
    with pytest.raises(ArpHubError, match="does not tell how many images split 'train' has: set epoch_images"):
        load_data_and_model(config)


def test_tar_shards_through_the_webdataset_package(tmp_path, model):
    pytest.importorskip("webdataset")
    write_shards(tmp_path, "train", [6, 6])
    write_shards(tmp_path, "val", [4])
    options = {"train_split": "train-{0000..0001}.tar|12", "test_split": "val-0000.tar|4", "data_dir": str(tmp_path)}
    data = load_data("timm:wds/any", model, **options)
    assert len(data.train) == 12
    images = data.train.images
    assert sorted(seen(images.form, images.training(4, range(3), 1, CPU, 2, 0, 1))) == list(range(12))
    assert greys(data.test) == list(range(4))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("timm:torch/nothing", {"data_dir": "{}"}, ["timm:torch/nothing", "Unknown torchvision dataset nothing"]),
        ("timm:torch/cifar10", {"data_dir": "{}/none"}, ["split 'train'", "none", "Dataset not found"]),
        ("timm:", {}, ["data 'timm:'", "data_dir=''"]),
        ("timm:torch/image_folder", {"data_dir": "{}", "epoch_images": 3}, ["epoch_images=3"]),
    ],
)
def test_what_timm_cannot_open_is_one_error(folders, model, name, options, words):
    options = {key: value.format(folders) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(ArpHubError) as error:
        load_data(name, model, **options)
    assert all(word in str(error.value) for word in words), error.value
