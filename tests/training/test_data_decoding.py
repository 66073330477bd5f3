"""How stored images become pixels: modes, sizes and limits, the choice of images to measure on, and classes."""

import json
import os
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image

from arp_hub.errors import ArpHubError
from arp_hub.hub.load import load_model
from arp_hub.training import Split, evaluate, load_data
from arp_hub.training.evaluate import why_not_measured
from arp_hub_cli.app import app

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    return load_model("cifar_resnet20", pretrained=False)


@pytest.fixture(scope="module")
def large_input():
    """A model with so large an input that `MANY` images exceed the memory for decoded ones and are streamed."""
    return timm.create_model("test_resnet", pretrained_cfg_overlay={"input_size": (3, 1024, 1024)})


MANY, MISSED = 400, 5
"""Number of images that exceeds the sample whose headers are read, and one of them that the sample leaves out."""


def grey(dtype, low, high, side=32):
    """An image with a dark left and a bright right half."""
    values = np.full((side, side), low, dtype)
    values[:, side // 2 :] = high
    return Image.fromarray(values)


def colour(mode, side):
    return Image.new("RGB", (side, side), (200, 100, 50)).convert(mode)


def palette(side):
    image = Image.new("P", (side, side), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return image


def transparent(image):
    image.putalpha(Image.new("L", image.size, 0))
    return image


MODES = {
    "1 bit": (lambda side: grey(np.uint8, 0, 255, side).convert("1"), "png", (0, 255)),
    "8 bits": (lambda side: grey(np.uint8, 51, 204, side), "png", (51, 204)),
    "grey with alpha": (lambda side: transparent(grey(np.uint8, 51, 204, side)), "png", (51, 204)),
    "10 bits": (lambda side: grey(np.uint16, 0, 1023, side), "png", (0, 255)),
    "12 bits": (lambda side: grey(np.uint16, 819, 4095, side), "png", (51, 255)),
    "12 bits, tif": (lambda side: grey(np.uint16, 819, 4000, side), "tif", (51, 249)),
    "14 bits": (lambda side: grey(np.uint16, 0, 16383, side), "png", (0, 255)),
    "16 bits": (lambda side: grey(np.uint16, 13107, 65535, side), "png", (51, 255)),
    "16 bits, big-endian": (lambda side: grey(">u2", 13107, 65535, side), "tif", (51, 255)),
    "int32, 8 bits": (lambda side: grey(np.int32, 51, 204, side), "tif", (51, 204)),
    "int32, 12 bits": (lambda side: grey(np.int32, 819, 4095, side), "tif", (51, 255)),
    "int32, 16 bits": (lambda side: grey(np.int32, 13107, 65535, side), "tif", (51, 255)),
    "int32, a mask": (lambda side: grey(np.int32, 0, 1, side), "tif", (0, 255)),
    "float, 0 to 1": (lambda side: grey(np.float32, 0.2, 1, side), "tif", (51, 255)),
    "float, beyond 1 by resizing": (lambda side: grey(np.float32, -0.01, 1.01, side), "tif", (0, 255)),
    "float, 0 to 255": (lambda side: grey(np.float32, 51, 204, side), "tif", (51, 204)),
    "float, 0 to 65535": (lambda side: grey(np.float32, 13107, 65535, side), "tif", (51, 255)),
    "black, float": (lambda side: grey(np.float32, 0, 0, side), "tif", (0, 0)),
    "palette": (palette, "png", (200, 100, 50)),
    "RGB": (lambda side: colour("RGB", side), "png", (200, 100, 50)),
    "RGB, bmp": (lambda side: colour("RGB", side), "bmp", (200, 100, 50)),
    "RGB, webp": (lambda side: colour("RGB", side), "webp", (200, 100, 50)),
    "RGB, ppm": (lambda side: colour("RGB", side), "ppm", (200, 100, 50)),
    "RGBA": (lambda side: transparent(colour("RGBA", side)), "png", (200, 100, 50)),
    "CMYK, jpg": (lambda side: colour("CMYK", side), "jpg", (200, 100, 50)),
    "CMYK, tif": (lambda side: colour("CMYK", side), "tif", (200, 100, 50)),
    "YCbCr": (lambda side: colour("YCbCr", side), "jpg", (200, 100, 50)),
}


@pytest.mark.parametrize("side", [32, 128], ids=["in memory", "streamed"])
@pytest.mark.parametrize(("make", "suffix", "values"), MODES.values(), ids=MODES)
def test_every_mode_comes_out_at_its_brightness(tmp_path, model, make, suffix, values, side):
    (tmp_path / "cat").mkdir()
    make(side).save(tmp_path / "cat" / f"1.{suffix}")
    data = load_data(str(tmp_path), model)
    image = next(iter(data.test.images.evaluation(data.test.indices, 1, CPU, 0)))[0]
    mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None] for name in ("mean", "std"))
    left, right = (255 * (image[:, 16, [4, 28]] * std + mean)).T
    wanted = [(values[0],) * 3, (values[1],) * 3] if len(values) == 2 else [values, values]
    for found, pixel in zip((left, right), wanted, strict=True):
        assert (found - torch.tensor(pixel)).abs().max() < (6 if suffix in ("jpg", "webp") else 1.1)


REFUSED = {
    "NaN": (lambda: grey(np.float32, 0, np.nan), "NaN or infinite"),
    "infinite": (lambda: grey(np.float32, 0, np.inf), "NaN or infinite"),
    "float, normalised": (lambda: grey(np.float32, -1.5, 2), "largest value, 2, does not show which value is white"),
    "float, negative": (lambda: grey(np.float32, -0.5, 0.9), "-0.5 to 0.9 are not all between 0 and 1"),
    "float, metres": (lambda: grey(np.float32, 0, 20), "largest value, 20, does not show which value is white"),
    "int32, class numbers": (lambda: grey(np.int32, 0, 20), "largest value, 20, does not show which value is white"),
    "int32, negative": (lambda: grey(np.int32, -1, 100), "-1 to 100 are not all between 0 and 255"),
    "int32, more than 16 bits": (
        lambda: grey(np.int32, 0, 10**6),
        "largest value, 1e.06, does not show which value is white",
    ),
    "float, more than 16 bits": (
        lambda: grey(np.float32, 0, 1e6),
        "largest value, 1e.06, does not show which value is white",
    ),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_a_mode_without_a_meaning_is_refused_by_name(tmp_path, model, make, words):
    (tmp_path / "cat").mkdir()
    make().save(tmp_path / "cat" / "1.tif")
    grey(np.uint8, 0, 255).save(tmp_path / "cat" / "2.tif")
    with pytest.raises(ArpHubError, match=rf"^image 'cat/1.tif' cannot be decoded: .*{words}"):
        load_data(str(tmp_path), model).test.tensors()
    data = load_data(str(tmp_path), model, max_bad_images=1)
    data.test.tensors()
    assert data.bad_images() == 1


def test_dark_images_stay_dark_beside_bright_ones(tmp_path, model, caplog):
    for split, highest in (("train", 4095), ("test", 256)):
        (tmp_path / split / "cat").mkdir(parents=True)
        grey(np.uint16, 0, highest).save(tmp_path / split / "cat" / "1.png")
    data = load_data(str(tmp_path), model)
    assert "4095 is white in its grey images of type int" in caplog.text
    mean, std = (torch.tensor(model.pretrained_cfg[name]) for name in ("mean", "std"))
    brightest = [(255 * (split.tensors()[0].amax((0, 2, 3)) * std + mean)).max() for split in (data.train, data.test)]
    assert [round(float(value)) for value in brightest] == [255, 16]


def test_a_value_above_the_white_of_the_other_images_is_refused(tmp_path, model):
    (tmp_path / "cat").mkdir()
    files = [tmp_path / "cat" / f"{number:03}.png" for number in range(MANY)]
    grey(np.uint16, 0, 4096).save(files[MISSED])
    grey(np.uint16, 0, 4095).save(files[0])
    for file in files:
        if not file.exists():
            os.link(files[0], file)
    with pytest.raises(ArpHubError, match="005.png' cannot be decoded: .*0 to 4096 are not all between 0 and 4095"):
        load_data(str(tmp_path), model).test.tensors()


@pytest.mark.parametrize("kind", ["folder", "parquet", "stream"])
def test_a_picture_that_is_a_program_is_not_run(tmp_path, kind, monkeypatch):
    model = load_model("cifar_resnet20", pretrained=False, num_classes=1)
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **kwargs: started.append(args))
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    if kind == "folder":
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "0.jpg").write_bytes(program)
    else:
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
        rows = {"image": [{"bytes": program, "path": "0.jpg"}], "label": [0]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ArpHubError, match="cannot be decoded|cannot identify image file"):
        evaluate(model, load_data(str(tmp_path), model, streaming=kind == "stream").test)
    assert started == []


def column(root, images, name="train"):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    rows = {"image": images, "label": [0] * len(images)}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(root / f"{name}.parquet")


def noise(*sizes):
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 255, (height, width, 3), np.uint8)) for height, width in sizes]


SIZES = {
    "small": ([(32, 32), (96, 90)], [(8, 8)], True),
    "first small": ([(8, 8), (120, 120), (97, 20)], [(120, 120)], False),
    "last small": ([(120, 120), (8, 8)], [(120, 120)], False),
    "test alone large": ([(32, 32)], [(100, 32)], False),
    "large": ([(120, 120)], [(130, 200)], False),
}


@pytest.mark.parametrize("kind", ["folder", "parquet"])
@pytest.mark.parametrize(("train", "test", "small"), SIZES.values(), ids=SIZES)
def test_all_sizes_together_decide_how_images_are_resized(tmp_path, train, test, small, kind):
    model = timm.create_model("test_resnet", pretrained_cfg_overlay={"input_size": (3, 64, 64), "crop_pct": 0.8})
    for name, sizes in (("train", train), ("test", test)):
        images = noise(*sizes)
        if kind == "parquet":
            column(tmp_path, images, name)
        else:
            (tmp_path / name / "a").mkdir(parents=True)
            for number, image in enumerate(images):
                image.save(tmp_path / name / "a" / f"{number}.png")
    data = load_data(str(tmp_path), model)
    config = timm.data.resolve_data_config({}, model=model)
    sizes = {"crop_pct": 1.0, "crop_mode": "squash"} if small else {}
    transform = timm.data.create_transform(**config | sizes)
    for split, sizes in ((data.train, train), (data.test, test)):
        wanted = torch.stack([transform(image) for image in noise(*sizes)])
        assert torch.allclose(split.tensors()[0], wanted, atol=1e-5)


def test_small_images_are_resized_alike_in_memory_and_streamed(tmp_path, large_input):
    first = noise((32, 32), (40, 20), (96, 96), (7, 7))
    seen = []
    for name, more in (("few", 0), ("many", MANY)):
        (tmp_path / name).mkdir()
        column(tmp_path / name, first + [Image.new("RGB", (8, 8))] * more)
        test = load_data(str(tmp_path / name), large_input).test
        seen.append(next(iter(test.images.evaluation(test.indices[:4], 4, CPU, 0))))
    assert torch.allclose(*seen, atol=1e-5)


def test_a_large_image_that_the_sample_missed_is_named(tmp_path, model, caplog):
    sizes = [(8, 8)] * MANY
    sizes[MISSED] = (100, 100)
    column(tmp_path, noise(*sizes))
    load_data(str(tmp_path), model).test.tensors()
    assert "1 images have more than 96 pixels a side" in caplog.text
    assert "the first is image 5 of column 'image'" in caplog.text


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_of_too_many_pixels_is_not_decoded(tmp_path, model, monkeypatch):
    (tmp_path / "cat").mkdir()
    Image.new("1", (13_300, 13_300)).save(tmp_path / "cat" / "1.png")
    Image.new("RGB", (120, 120)).save(tmp_path / "cat" / "2.png")
    assert (tmp_path / "cat" / "1.png").stat().st_size < 30_000
    monkeypatch.setattr(Image.core, "new", None)  # allocating memory for pixels would fail
    with pytest.raises(
        ArpHubError, match="'cat/1.png' cannot .* its 13300 x 13300 pixels are more than the limit of 67 million"
    ):
        load_data(str(tmp_path), model).split("train").tensors()


@pytest.mark.parametrize(
    ("options", "used"), [({}, True), ({"progressive": True}, False)], ids=["baseline", "progressive"]
)
def test_a_jpeg_of_very_many_pixels_is_used_if_it_can_be_decoded_at_half_its_size(tmp_path, model, options, used):
    (tmp_path / "cat").mkdir()
    Image.new("L", (8193, 8192), 128).save(tmp_path / "cat" / "1.jpg", **options)
    test = load_data(str(tmp_path), model).test
    if used:
        mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
        assert (255 * (test.tensors()[0][0] * std + mean)).round().unique().tolist() == [128]
    else:
        with pytest.raises(ArpHubError, match="its 8193 x 8192 pixels are more than the limit of 67 million"):
            test.tensors()


def test_images_are_turned_as_their_exif_says(tmp_path, model):
    """The camera says that the dark left half is the bottom."""
    exif = Image.Exif()
    exif[0x0112] = 8
    (tmp_path / "cat").mkdir()
    grey(np.uint8, 0, 255).save(tmp_path / "cat" / "1.jpg", exif=exif)
    image = load_data(str(tmp_path), model).test.tensors()[0][0]
    assert image[:, :12].min() > image[:, 20:].max()


def test_a_row_without_an_image_is_named(tmp_path, model):
    column(tmp_path, [*noise((8, 8)), None])
    with pytest.raises(ArpHubError, match="image 1 of column 'image' is missing"):
        load_data(str(tmp_path), model, max_bad_images=5).test.tensors()


@pytest.fixture
def sorted_classes():
    """A split sorted by five classes, in which an image's value is its class."""
    labels = torch.arange(5).repeat_interleave(100)
    images = SimpleNamespace(evaluation=lambda rows, size, device, workers: (labels[part] for part in rows.split(size)))
    return Split("test", images, labels, torch.arange(500))


class Recorder(torch.nn.Module):
    """Takes class numbers as images, and predicts them correctly."""

    def __init__(self, classes=5):
        super().__init__()
        self.num_classes, self.scale, self.seen = classes, torch.nn.Parameter(torch.ones(1)), []

    def forward(self, images):
        self.seen += images.tolist()
        return torch.nn.functional.one_hot(images, self.num_classes) * self.scale


def test_a_part_of_a_sorted_split_holds_all_classes_and_is_the_same_each_time(sorted_classes):
    models = [Recorder(), Recorder()]
    for model in models:
        assert evaluate(model, sorted_classes, batch_size=7, max_images=50)["images"] == 50
        assert evaluate(model, sorted_classes, max_images=50)["top1"] == 100  # labels go with their images
    counts = torch.bincount(torch.tensor(models[0].seen[:50]), minlength=5)
    assert counts.min() >= 5
    assert models[0].seen == models[1].seen
    assert evaluate(Recorder(), sorted_classes, max_images=10**6)["images"] == 500


@pytest.mark.parametrize(("name", "value"), [("max_images", 0), ("max_images", -5), ("batch_size", 0)])
def test_numbers_of_images_are_at_least_one(sorted_classes, name, value):
    with pytest.raises(ArpHubError, match=f"{name} must be at least 1, got {value}"):
        evaluate(Recorder(), sorted_classes, **{name: value})


def test_a_model_that_gives_nan_has_no_accuracy(sorted_classes):
    model = Recorder()
    model.forward = lambda images: torch.full((len(images), 5), torch.nan)
    with pytest.raises(ArpHubError, match="the model gives NaN for images of split '.*weights are damaged"):
        evaluate(model, sorted_classes)


def model_with(classes, names=()):
    return SimpleNamespace(num_classes=classes, pretrained_cfg={"label_names": list(names)} if names else {})


CLASSES = {
    "the same number": (model_with(3), [0, 1, 2], ("a", "b", "c"), None),
    "the same names": (model_with(3, "abc"), [0, 1, 2], ("a", "b", "c"), None),
    "another order, by number": (
        SimpleNamespace(num_classes=3, pretrained_cfg={"label_names": {"2": "b", "0": "a", "1": "c"}}), [0, 1, 2],
        ("a", "b", "c"), "classes of split 'test' in another order",
    ),
    "another order, in other letters": (
        model_with(3, "abC"), [0, 1, 2], ("c", "A", "b"), "classes of split 'test' in another order",
    ),
    "some of the names at other numbers": (
        model_with(3, "abc"), [0, 1, 2], ("b", "c", "d"), "classes of split 'test' in another order",
    ),
    "letters of both cases": (
        model_with(3, "aAb"), [0, 1, 2], ("A", "a", "b"), "classes of split 'test' in another order",
    ),
    "two classes of one name": (model_with(3, "aba"), [0, 1, 2], ("a", "b", "a"), None),
    "other names": (model_with(3, "xyz"), [0, 1, 2], ("a", "b", "c"), None),
    "more": (model_with(4), [0, 1, 2], ("a", "b", "c"), "the model has 4 classes, split 'test' has 3 classes"),
    "fewer": (model_with(2), [0, 1, 1], ("a", "b", "c"), "the model has 2 classes, split 'test' has 3 classes"),
    "another order": (model_with(3, "acb"), [0, 1, 2], ("a", "b", "c"), "classes of split 'test' in another order"),
    "numbers alone": (model_with(4), [0, 1, 2], (), None),
    "a number too large": (model_with(2), [0, 1, 2], (), "the model has 2 classes, split 'test' has the label 2"),
    "no classifier": (model_with(0), [0, 1, 2], (), "the model has 0 classes"),
    "a negative label": (model_with(3), [0, -1, 2], (), "split 'test' has the label -1"),
    "no labels": (model_with(3), None, (), "split 'test' has no labels"),
    "a model that tells nothing": (SimpleNamespace(), [0, 1, 2], ("a", "b", "c"), None),
}  # fmt: skip


@pytest.mark.parametrize(("model", "labels", "names", "words"), CLASSES.values(), ids=CLASSES)
def test_accuracy_is_measured_where_classes_agree(model, labels, names, words):
    labels = None if labels is None else torch.tensor(labels)
    reason = why_not_measured(model, Split("test", None, labels, torch.arange(3), names))
    assert (words in reason) if words else reason is None


def test_a_model_without_a_number_of_classes_is_checked_by_its_logits(sorted_classes):
    model = Recorder(4)
    del model.num_classes
    model.forward = lambda images: torch.zeros(len(images), 4)
    with pytest.raises(ArpHubError, match="the model has 4 classes, split 'test' has the label 4"):
        evaluate(model, sorted_classes)


def test_evaluate_and_compress_go_by_one_rule(tmp_path, capsys):
    overlay = {"input_size": (3, 32, 32)}
    model = timm.create_model("test_resnet", num_classes=2, pretrained_cfg_overlay=overlay)
    names = {"label_names": ["dog", "cat"]}
    timm.models.save_for_hf(model, tmp_path / "model", model_config=names, safe_serialization=True)
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        grey(np.uint8, 0, 255).save(tmp_path / "data" / name / "1.png")
    reason = "accuracy is not measured: the model has the classes of split 'train' in another order (dog, cat, ...)"
    with pytest.raises(SystemExit) as stop:
        app(["evaluate", "--model", f"local-dir:{tmp_path / 'model'}", "--data", str(tmp_path / "data")])
    assert stop.value.code == 2
    assert reason in capsys.readouterr().err
    command = ["compress", "--model", f"local-dir:{tmp_path / 'model'}", "--data", str(tmp_path / "data")]
    with pytest.raises(SystemExit) as stop:
        app([*command, "--keep-params", "0.8", "--effort", "fast", "--output", str(tmp_path / "small")])
    assert not stop.value.code
    assert reason in capsys.readouterr().err
    assert "top1" not in json.loads((tmp_path / "small" / "metrics.json").read_text())
