import itertools
import json
import random
import re
import struct
import warnings
import zlib

import datasets
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import arp_hub
from arp_hub.errors import ArpHubError
from arp_hub.hub.load import load_model, set_input_size
from arp_hub.layers.trace import count_macs, trace
from arp_hub.training import calibration_images, evaluate, load_data
from arp_hub.training.data.augment import crop_and_flip
from arp_hub.training.data.batches import epoch_batches
from arp_hub.training.data.decoding import ImageFiles
from arp_hub.training.data.images import StreamedImages, TrainBatch
from arp_hub.training.data.input_format import InputFormat, input_format

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return load_model("cifar_resnet20", pretrained=False)


def picture(value, size=16, mode="RGB"):
    return Image.fromarray(np.full((size, size), value, np.uint8)).convert(mode)


def class_folders(root, size=16, classes=("cat", "dog"), count=3):
    for split in ("train", "test"):
        for k, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture(40 * k + i, size).save(root / split / name / f"{i}.png")
    return str(root)


def parquet(root, features, **columns):
    root.mkdir(exist_ok=True)
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    for split in ("train", "test"):
        table.to_parquet(root / f"{split}-00000-of-00001.parquet")
    return str(root)


def test_digits_are_always_split_the_same_way(model):
    data = load_data("digits", model)
    assert (len(data.train), len(data.test), data.num_classes) == (1437, 360, 10)
    assert torch.bincount(data.test.labels).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    again = load_data("digits", model, seed=5)
    assert torch.equal(again.test.labels, data.test.labels)
    images, labels = data.test.tensors()
    assert images.shape == (360, 3, 32, 32)
    means = torch.stack([images[labels == digit].mean(0) for digit in range(10)])
    nearest = torch.cdist(images.flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == labels).float().mean() > 0.85  # images and labels belong together
    assert data.train.images.flip is False


def test_held_out_images_are_stratified_and_not_trained_on(model):
    data = load_data("digits", model, val_fraction=0.1, seed=3)
    assert not set(data.train.indices.tolist()) & set(data.val.indices.tolist())
    assert len(data.train) + len(data.val) == 1437
    whole = load_data("digits", model).train.tensors()
    for part in (data.train, data.val):
        for all_of_it, of_part in zip(whole, part.tensors(), strict=True):
            assert torch.equal(all_of_it[part.indices], of_part)
    assert torch.bincount(data.val.labels).float().std() < 1
    calibration = calibration_images(data, 20_000, copies=0)
    assert len(calibration) == len(data.train)


def test_calibration_images_are_normalised_and_keyed_by_seed(model):
    data = load_data("digits", model)
    first, same, other = (calibration_images(data, 32, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    lowest = (0 - torch.tensor(model.pretrained_cfg["mean"])) / torch.tensor(model.pretrained_cfg["std"])
    assert torch.allclose(first.amin((0, 2, 3)), lowest)


def test_each_calibration_image_is_followed_by_its_copies(model, shared):
    for source, default in (("digits", 1), (shared / "data" / "imagenet-sample", 0)):
        data = load_data(str(source), model if default else timm.create_model("resnet18"))
        plain = calibration_images(data, 4, copies=0)
        assert len(calibration_images(data, 4)) == 4 * (1 + default)
        varied = calibration_images(data, 4, copies=2)
        assert torch.equal(varied, calibration_images(data, 4, copies=2))
        originals, first, second = varied.unflatten(0, (4, 3)).unbind(1)
        assert torch.equal(originals, plain)
        for one, other in ((first, originals), (second, originals), (first, second)):
            assert ((one - other).abs().mean((1, 2, 3)) > 0.01).all()
    with pytest.raises(ArpHubError, match="calibration_copies must be 0 or more, got -1"):
        calibration_images(data, 4, copies=-1)


def test_class_folders_and_parquet_give_the_same_images(tmp_path, model):
    folders = load_data(class_folders(tmp_path / "folders"), model)
    features = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])}
    rows = [(picture(40 * k + i), k) for k in range(2) for i in range(3)]
    tables = load_data(
        parquet(tmp_path / "tables", features, picture=[r[0] for r in rows], kind=[r[1] for r in rows]), model
    )
    for data in (folders, tables):
        assert data.class_names == ("cat", "dog")
        assert data.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    pixels = [torch.cat(list(d.test.images.evaluation(d.test.indices, 4, CPU, 0))) for d in (folders, tables)]
    assert torch.equal(*pixels)
    assert pixels[0].shape == (6, 3, 32, 32)


ORDERS = {
    "two splits": ({"train": "ab", "test": "ba"}, ""),
    "two shards": ({"train-00000-of-00002": "ab", "train-00001-of-00002": "abc", "test": "ab"}, ""),
    "the README": ({"train": "ab", "test": "ab"}, "ba"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("files", "declared"), ORDERS.values(), ids=ORDERS)
def test_parquet_files_that_number_their_classes_differently_are_refused(tmp_path, model, files, declared, streaming):
    for name, names in files.items():
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(names)))
        table = datasets.Dataset.from_dict({"image": [picture(1), picture(2)], "label": [0, 1]}, features=features)
        table.to_parquet(tmp_path / f"{name}.parquet")
    if declared:
        kinds = "".join(f"\n          '{number}': {name}" for number, name in enumerate(declared))
        label = f"  - name: label\n    dtype:\n      class_label:\n        names:{kinds}\n"
        head = f"dataset_info:\n  features:\n  - name: image\n    dtype: image\n{label}"
        (tmp_path / "README.md").write_text(f"---\n{head}---\n")
    with pytest.raises(ArpHubError, match="number the classes of column 'label' differently: write all files"):
        load_data(str(tmp_path), model, streaming=streaming)


def test_cifar_and_imagenet_are_found_by_feature_type(shared, model, caplog):
    data = load_data(str(shared / "data" / "cifar10"), model)
    assert (len(data.train), len(data.test), data.num_classes) == (50_000, 10_000, 10)
    assert data.class_names[3] == "cat"
    sample = load_data(str(shared / "data" / "imagenet-sample"), timm.create_model("test_resnet"))
    assert "one usable split, 'validation'" in caplog.text
    assert (len(sample.train), len(sample.test), sample.num_classes) == (1000, 1000, 1000)
    assert sample.split("validation").labels.tolist() == sample.test.labels.tolist()
    assert calibration_images(sample, 3).shape == (3, 3, 160, 160)


FEATURES = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"]), "size": datasets.Value("int64")}


@pytest.mark.parametrize(
    ("features", "columns", "options", "words"),
    [
        (FEATURES, {"label": [0, 1]}, {"label_key": "x"}, ["label_key='x'", "image (Image)", "label (ClassLabel)"]),
        (FEATURES, {"label": [0, 1]}, {"image_key": "size"}, ["'size' holds no images", "size (Value)"]),
        (FEATURES, {"label": [0, 1]}, {"label_key": "image"}, ["'image' holds neither numbers nor names"]),
        (FEATURES | {"more": datasets.Image()}, {"label": [0, 1]}, {}, ["more than one image column", "image_key"]),
        (FEATURES | {"top": datasets.ClassLabel(names=["a"])}, {"label": [0, 1]}, {}, ["more than one label column"]),
        ({"image": datasets.Image(), "size": datasets.Value("int64")}, {}, {}, ["no label column", "label_key"]),
        (FEATURES | {"size": datasets.Value("float32")}, {}, {"label_key": "size"}, ["neither numbers nor"]),
        (FEATURES, {"size": [7, 10**9]}, {"label_key": "size"}, ["1000000000", "image numbers"]),
        (FEATURES | {"k": datasets.Value("int64")}, {"k": [0, -3]}, {"label_key": "k"}, ["-3..0", "out of range"]),
        (FEATURES, {"label": [-1, -1]}, {}, ["no split has labels"]),
        (FEATURES, {"label": [-1, 1]}, {}, ["1 labels of split 'train' are out of range", "0..1"]),
    ],
)  # fmt: skip
def test_columns_that_make_no_sense(tmp_path, model, features, columns, options, words):
    rows = {name: [picture(1), picture(2)] if isinstance(kind, datasets.Image) else [0, 0]
            for name, kind in features.items()}  # fmt: skip
    path = parquet(tmp_path / "data", features, **(rows | columns))
    with pytest.raises(ArpHubError) as caught:
        load_data(path, model, **options)
    for word in words:
        assert word in str(caught.value)


def test_named_columns_settle_what_types_do_not(tmp_path, model):
    features = FEATURES | {"kind": datasets.Value("int64")}
    columns = {"image": [picture(1), picture(2)], "label": [0, 1], "size": [0, 0], "kind": [4, 2]}
    data = load_data(parquet(tmp_path / "data", features, **columns), model, label_key="kind")
    assert data.train.labels.tolist() == [4, 2]
    assert data.num_classes == 5


def test_sources_that_are_not_there(tmp_path, model, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # saves the client's retries
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    cases = {
        "no-such-data": "no such folder",
        str(tmp_path / "missing"): "no such folder",
        str(tmp_path / "empty"): "no images",
        str(tmp_path): "no images",
        str(tmp_path / "notes.txt"): "is a file",
        "someone/no-such-dataset": "cannot load the data 'someone/no-such-dataset'",
    }
    for source, words in cases.items():
        with pytest.raises(ArpHubError, match=words):
            load_data(source, model)


def test_splits_that_do_not_fit_together(tmp_path, model):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    table = datasets.Dataset.from_dict(
        {"image": [picture(1), picture(2)], "label": [0, 1]}, features=datasets.Features(features)
    )
    for split in ("train", "unsupervised"):
        table.to_parquet(tmp_path / f"{split}.parquet")
    card = {"configs": [{"config_name": "default", "data_files": [
        {"split": split, "path": f"{split}.parquet"} for split in ("train", "unsupervised")]}]}  # fmt: skip
    (tmp_path / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    with pytest.raises(ArpHubError, match="'train' and 'test'.*unsupervised"):
        load_data(str(tmp_path), model)
    with pytest.raises(ArpHubError, match="no split 'val': choose one of test, train"):
        load_data("digits", model).split("val")
    with pytest.raises(ArpHubError, match=r"val_fraction=0\.999"):
        load_data("digits", model, val_fraction=0.999)


def test_a_corrupt_image_is_named(tmp_path, model):
    root = class_folders(tmp_path)
    (tmp_path / "train" / "dog" / "1.png").write_bytes(b"\x89PNG not really")
    with pytest.raises(ArpHubError, match="^image 'train/dog/1.png' cannot be decoded"):
        calibration_images(load_data(root, model), 100)
    large = load_model("test_resnet", pretrained=False)
    for split in ("train", "test"):
        for path in (tmp_path / split).rglob("?.png"):
            if path.stat().st_size > 20:
                picture(9, size=100).save(path)
    for workers in (0, 1):
        with pytest.raises(ArpHubError, match="^image 'train/dog/1.png' cannot be decoded"):
            calibration_images(load_data(root, large), 100, workers=workers)


@pytest.mark.parametrize("flip", [True, False])
def test_shifts_and_flips_are_what_pad_and_crop_would_give(flip):
    pixels = torch.randint(1, 255, (64, 3, 32, 32), dtype=torch.uint8)
    moved = crop_and_flip(pixels, slice(0, 64), 64, seed=7, padding=4, flip=flip)
    flipped = shifted = 0
    for before, after in zip(pixels, moved, strict=True):
        padded = {mirror: F.pad(before.flip(2) if mirror else before, (4,) * 4) for mirror in (False, True)}
        candidates = [
            (mirror, dy, dx)
            for mirror, dy, dx in itertools.product((False, True), range(9), range(9))
            if torch.equal(padded[mirror][:, dy : dy + 32, dx : dx + 32], after)
        ]
        assert len(candidates) == 1
        flipped += candidates[0][0]
        shifted += candidates[0][1:] != (4, 4)
    assert shifted > 50
    assert 20 < flipped < 44 if flip else flipped == 0


@pytest.mark.parametrize("small", [True, False])
def test_batches_do_not_depend_on_how_they_are_shared_out(tmp_path, model, small):
    data = load_data("digits", model)
    images = data.train.images
    if not small:
        form = InputFormat((24, 24), (0.5,) * 3, (0.5,) * 3)
        for k in range(40):
            picture(k, 40).save(tmp_path / f"{k}.png")
        images = StreamedImages(ImageFiles(tmp_path, [f"{k}.png" for k in range(40)]), form, "rand-m9-mstd0.5")
    indices = torch.randperm(40)[:12]
    whole = next(images.training([TrainBatch(indices, 5, slice(0, 12))], CPU, 0))
    parts = [TrainBatch(indices, 5, slice(k, k + 4)) for k in (0, 4, 8)]
    assert torch.equal(torch.cat(list(images.training(parts, CPU, 0))), whole)
    other = next(images.training([TrainBatch(indices, 6, slice(0, 12))], CPU, 0))
    assert not torch.equal(other, whole)
    if not small:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(torch.cat(list(images.training(parts, CPU, 2))), whole)


def test_augmentation_leaves_the_global_generators_alone(model):
    data = load_data("digits", model, augmentation="rand-m9-mstd0.5")
    drawn = []
    for augmented in (False, True):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        if augmented:
            next(iter(data.train.images.training([TrainBatch(torch.arange(8), 3, slice(0, 8))], CPU, 0)))
            calibration_images(data, 8, copies=1)
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(("images", "batch", "steps"), [(100, 32, 3), (32, 32, 1), (10, 32, 1)])
def test_an_epoch_sees_every_image_once_or_fills_one_batch(images, batch, steps):
    order = epoch_batches(images, batch, seed=1, epoch=0)
    assert order.shape == (steps, batch)
    counts = torch.bincount(order.flatten(), minlength=images)
    assert counts.max() <= max(1, -(-batch // images))
    assert counts.max() - counts.min() <= 1
    assert not torch.equal(order, epoch_batches(images, batch, seed=1, epoch=1))
    assert torch.equal(order, epoch_batches(images, batch, seed=1, epoch=0))


def test_evaluate_counts_every_image_once_whatever_the_batch(model):
    data = load_data("digits", model)
    scores = [evaluate(model, data.test, batch_size=size) for size in (7, 360)]
    assert scores[0]["images"] == 360
    for key in ("top1", "top5", "loss"):
        assert scores[0][key] == pytest.approx(scores[1][key], rel=1e-5)
    images = torch.cat(list(data.test.images.evaluation(data.test.indices, 360, CPU, 0)))
    with torch.no_grad():
        logits = model(images)
    assert scores[0]["top1"] == pytest.approx(100 * (logits.argmax(1) == data.test.labels).float().mean().item())
    assert not model.training


def test_evaluate_refuses_labels_that_the_model_lacks():
    small = load_model("cifar_resnet20", pretrained=False, num_classes=4)
    with pytest.raises(ArpHubError, match="not measured: the model has 4 classes, split 'test' has 10 classes"):
        evaluate(small, load_data("digits", small).test)


def test_published_accuracy_of_a_checkpoint(shared):
    model = load_model("cifar_resnet20", shared / "weights" / "resnet20_cifar10.safetensors")
    data = load_data(str(shared / "data" / "cifar10"), model)
    scores = evaluate(model, data.test, max_images=2000)
    assert scores["images"] == 2000
    assert scores["top1"] == pytest.approx(91.65, abs=0.1)


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "no image": lambda data: b"MZ" + bytes(200),
    "header only": lambda data: data[:30],
    "bits flipped": lambda data: data[:40] + bytes(255 - byte for byte in data[40:]),
    "huge": lambda data: bomb(),
}


def bomb():
    """A PNG of a few bytes whose header declares 40,000 x 40,000 pixels."""
    head = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


@pytest.mark.parametrize("size", [16, 120], ids=["in memory", "streamed"])
def test_damaged_images_are_counted_named_and_refused_beyond_a_limit(tmp_path, model, caplog, size):
    root = class_folders(tmp_path, size=size, count=5)
    files = sorted((tmp_path / "train").rglob("*.png"))
    for file, damage in zip(files, DAMAGES.values(), strict=False):  # the first image is among them
        file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ArpHubError, match=r"image 'train/.*' cannot be decoded: .*6 bad, 5 allowed.*max_bad_images"):
        calibration_images(load_data(root, model, max_bad_images=5), 10)
    for workers in (0, 1):
        caplog.clear()
        data = load_data(root, model, max_bad_images=6)
        images = [calibration_images(data, 10, seed=seed, workers=workers) for seed in (1, 2)]
        assert data.bad_images() == 6
        if not workers:  # warnings of workers bypass pytest
            named = [match[1] for line in caplog.messages if (match := re.search(r"image '(.*?)' cannot", line))]
            assert sorted(named) == [str(file.relative_to(tmp_path)) for file in files[:6]]
        grey = (images[0].abs().amax((1, 2, 3)) < 0.02).sum()
        assert grey == 6
    assert evaluate(load_model("cifar_resnet20", pretrained=False, num_classes=2), data.test)["images"] == 10
    with pytest.raises(ArpHubError, match="max_bad_images must be at least 0, got -1"):
        load_data(root, model, max_bad_images=-1)


def test_fewer_images_than_a_batch_and_a_class_that_train_lacks(tmp_path, model):
    root = class_folders(tmp_path, count=1, classes=("cat", "dog", "emu"))
    (tmp_path / "train" / "cat" / "0.png").unlink()
    data = load_data(root, model)
    assert data.num_classes == 3
    assert data.train.labels.tolist() == [1, 2]
    assert epoch_batches(len(data.train), 64, seed=0, epoch=0).shape == (1, 64)
    small = load_model("cifar_resnet20", pretrained=False, num_classes=3)
    assert evaluate(small, data.test, batch_size=2)["images"] == 3


@pytest.mark.parametrize(("labels", "words"), [([0, None], "1 of 2 images of split 'train' have no label"),
                                               ([None, None], "no split has labels")])  # fmt: skip
def test_images_without_a_label_are_counted(tmp_path, model, labels, words):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    path = parquet(tmp_path / "data", features, image=[picture(1), picture(2)], label=labels)
    with pytest.raises(ArpHubError, match=words):
        load_data(path, model)


def test_auto_augment_changes_small_images_too_and_is_keyed(model):
    plain, strong = load_data("digits", model), load_data("digits", model, augmentation="rand-m9-mstd0.5")
    batch = TrainBatch(torch.arange(8), seed=3, share=slice(0, 8))
    half = TrainBatch(torch.arange(8), seed=3, share=slice(4, 8))

    def first(data, job):
        return next(iter(data.train.images.training([job], torch.device("cpu"), 0)))

    assert not torch.equal(first(plain, batch), first(strong, batch))
    assert torch.equal(first(strong, batch), first(strong, batch))
    assert torch.equal(first(strong, batch)[4:], first(strong, half))


def test_an_unknown_augmentation_is_refused(model):
    data = load_data("digits", model, augmentation="v0")  # which sometimes posterises to zero bits
    for _ in data.train.images.training([TrainBatch(torch.arange(1000), 0, slice(0, 1000))], CPU, 0):
        pass
    with pytest.raises(ArpHubError, match="auto_augment: timm knows no augmentation 'sometimes'"):
        load_data("digits", model, augmentation="sometimes")


@pytest.mark.parametrize(
    ("wrap", "message"),
    [(torch.nn.DataParallel, "wrapped in DataParallel.*model.module"), (torch.compile, "compiled.*_orig_mod")],
    ids=["parallel", "compiled"],
)
def test_a_wrapped_model_hides_its_config_and_is_refused(model, wrap, message):
    with pytest.raises(ArpHubError, match=message):
        load_data("digits", wrap(model))


SIZES = {
    "by img_size": ("test_vit", {"img_size": 96}, (96, 96)),
    "by img_size, fixed": ("vit_tiny_patch16_224", {"img_size": (96, 64), "depth": 1}, (96, 64)),
    "its own": ("test_vit", {}, (160, 160)),
    "any": ("test_resnet", {}, (160, 160)),
}


@pytest.mark.parametrize("case", SIZES)
def test_images_macs_and_the_saved_config_have_the_size_that_a_model_was_built_for(case, tmp_path):
    name, arguments, size = SIZES[case]
    model = timm.create_model(name, **arguments)
    assert input_format(model).size == size
    folder = arp_hub.save_pretrained(model, tmp_path / "out")
    saved, metrics = (json.loads((folder / file).read_text()) for file in ("config.json", "metrics.json"))
    assert saved["pretrained_cfg"]["input_size"] == metrics["input_size"] == [3, *size]
    again = load_model(f"local-dir:{folder}")
    assert input_format(again).size == size and count_macs(again) == metrics["macs"]


def test_a_size_that_is_set_later_is_that_of_the_model():
    model = timm.create_model("test_vit").eval()
    images = torch.randn(2, 3, 96, 96)
    before = model(images)
    set_input_size(model, (3, 96, 96))
    assert input_format(model).size == (96, 96) and trace(model) == trace(model, (3, 96, 96))
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)


def test_models_of_other_channels_are_refused_before_any_work():
    with pytest.raises(ArpHubError, match="images of 1 channels, the data has 3"):
        load_data("digits", timm.create_model("test_resnet", in_chans=1))
