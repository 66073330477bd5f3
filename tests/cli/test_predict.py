"""``arp-hub predict``: the classes of image files."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import create_transform, resolve_data_config

import arp_hub
from arp_hub.hub.load import load_model
from arp_hub.training import load_data, note_crop
from arp_hub_cli.app import app
from arp_hub_cli.classify import class_names


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            app([str(word) for word in words])
        return (int(stop.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ARP_HUB_PICTURES", "0")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3).eval()
    return arp_hub.save_pretrained(model, tmp_path / "out", label_names=["cat", "dog", "[owl]"])


def images(folder: Path, count: int, side: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(0, 256, (count, side, side + 30, 3), dtype=torch.uint8, generator=torch.manual_seed(1))
    paths = [folder / f"{number}.png" for number in range(count)]
    for path, image in zip(paths, pixels.numpy(), strict=True):
        Image.fromarray(image).save(path)
    return paths


def test_probabilities_are_those_of_the_model(call: Any, saved: Path, tmp_path: Path) -> None:
    paths = images(tmp_path / "photos", 2, 150)
    code, out, err = call("predict", f"local-dir:{saved}", *paths, "--top-k", 2, "--json")
    assert code == 0, err
    model = timm.create_model(f"local-dir:{saved}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config({}, model=model))
    for path, found in zip(paths, json.loads(out)["predictions"], strict=True):
        with torch.no_grad():
            expected = model(transform(Image.open(path))[None])[0].softmax(0).topk(2)
        assert found["image"] == str(path)
        assert [one["index"] for one in found["classes"]] == expected.indices.tolist()
        assert [one["name"] for one in found["classes"]] == [["cat", "dog", "[owl]"][k] for k in expected.indices]
        assert [one["probability"] for one in found["classes"]] == pytest.approx(expected.values.tolist(), rel=1e-4)


CROPS = {  # side of the images, crop of the model, crop that is saved with it
    "small images are taken whole": (40, ("center", 0.875), ("squash", 1.0)),
    "large images are cropped as the model says": (150, ("center", 0.875), ("center", 0.875)),
    "large images are squashed as the model says": (150, ("squash", 0.9), ("squash", 0.9)),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["read at random", "streamed"])
@pytest.mark.parametrize("case", CROPS)
def test_a_saved_model_prepares_images_as_those_it_was_measured_on(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, streaming: bool
) -> None:
    side, (mode, share), expected = CROPS[case]
    monkeypatch.setenv("ARP_HUB_PICTURES", "0")
    torch.manual_seed(0)
    crop = {"crop_mode": mode, "crop_pct": share, "test_crop_pct": 1.0}
    model = timm.create_model("test_resnet", num_classes=3, pretrained_cfg_overlay=crop).eval()
    paths = images(tmp_path / "photos", 3, side)
    with tarfile.open(tmp_path / "train-0000.tar", "w") as shard:
        for path in paths:
            shard.add(path, path.name)
    source = str(tmp_path / "train-{0000..0000}.tar") if streaming else str(tmp_path / "photos")
    data = load_data(source, model, require_labels=False, streaming=streaming)
    assert model.pretrained_cfg["crop_pct"] == share  # opening data leaves the model as it is
    split = data.test.measured(3)
    pixels = torch.cat(list(split.images.evaluation(split.indices, 8, torch.device("cpu"), 0)))
    with torch.no_grad():
        measured = model(pixels).softmax(1)
    note_crop(model, data.form)
    saved = arp_hub.save_pretrained(model, tmp_path / "out")
    cfg = json.loads((saved / "config.json").read_text())["pretrained_cfg"]
    assert (cfg["crop_mode"], cfg["crop_pct"]) == expected
    code, out, _ = call("predict", f"local-dir:{saved}", tmp_path / "photos", "--json", "--top-k", 3)
    listed = json.loads(out)["predictions"]
    assert code == 0 and len(listed) == 3
    given = sorted([{one["index"]: one["probability"] for one in found["classes"]}[0] for found in listed])
    assert given == pytest.approx(sorted(measured[:, 0].tolist()), rel=1e-5)  # a stream has an order of its own
    assert given[2] - given[0] > 1e-4  # the images differ by more


def test_a_model_measured_on_digits_classifies_their_files_alike(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARP_HUB_PICTURES", "0")
    torch.manual_seed(0)
    bilinear = {"interpolation": "bilinear", "crop_pct": 0.875}  # not what digits are enlarged by
    model = timm.create_model("test_resnet", num_classes=10, pretrained_cfg_overlay=bilinear).eval()
    with torch.no_grad():  # a random classifier hardly tells images apart
        model.get_classifier().weight.mul_(30)
    data = load_data("digits", model)
    split = data.test.measured(20)
    pixels = torch.cat(list(split.images.evaluation(split.indices, 20, torch.device("cpu"), 0)))
    with torch.no_grad():
        measured = model(pixels).softmax(1)[:, 0]
    note_crop(model, data.form)
    saved = arp_hub.save_pretrained(model, tmp_path / "out")
    digits = load_digits()
    _, test = train_test_split(np.arange(1797), test_size=0.2, stratify=digits.target, random_state=0)
    (tmp_path / "photos").mkdir()
    for place, index in enumerate(np.sort(test)[split.indices]):
        levels = (digits.images[index] * 255 / 16).round().astype(np.uint8)
        Image.fromarray(levels).save(tmp_path / "photos" / f"{place:02}.png")
    code, out, _ = call("predict", f"local-dir:{saved}", tmp_path / "photos", "--json", "--top-k", 10)
    listed = json.loads(out)["predictions"]
    given = [{one["index"]: one["probability"] for one in found["classes"]}[0] for found in listed]
    assert code == 0 and given == pytest.approx(measured.tolist(), rel=1e-2)
    assert measured.std() > 0.04 * measured.mean()  # the digits differ by more


def test_dark_images_of_16_bits_stay_dark_beside_others(call: Any, saved: Path, tmp_path: Path) -> None:
    """All of a call share one value of white, as all images of a data set do."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, high in (("bright", 60_000), ("dark", 1000)):
        Image.fromarray(np.linspace(0, high, 32 * 32).astype(np.uint16).reshape(32, 32)).save(folder / f"{name}.png")
        Image.fromarray((np.linspace(0, high, 32 * 32) / 257).astype(np.uint8).reshape(32, 32)).save(
            tmp_path / f"{name}8.png"
        )
    code, out, err = call("predict", str(saved), str(folder), "--json")
    assert code == 0 and "warning: 65535 is taken for white in grey images" in err
    found = json.loads(out)["predictions"]
    for name in ("bright", "dark"):
        same = json.loads(call("predict", str(saved), str(tmp_path / f"{name}8.png"), "--json")[1])
        (of_16,) = (one["classes"][0] for one in found if Path(one["image"]).stem == name)
        assert of_16["probability"] == pytest.approx(same["predictions"][0]["classes"][0]["probability"], abs=0.02)


def test_a_broken_image_is_one_line_and_the_others_are_classified(call: Any, saved: Path, tmp_path: Path) -> None:
    (good, broken, _) = images(tmp_path / "photos", 3, 150)
    broken.write_bytes(broken.read_bytes()[:300])
    code, out, err = call("predict", f"local-dir:{saved}", tmp_path / "photos")
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1 and str(broken) in errors[0] and "cannot be read as an image" in errors[0]
    assert out.count(".png") == 2 and str(good) in out.replace("\n", "") and "[owl]" in out and "%" in out
    code, out, err = call("predict", f"local-dir:{saved}", broken)
    assert (code, out, len(err.splitlines())) == (2, "", 1)


def test_a_model_that_gives_nan_predicts_nothing(call: Any, tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    model.bn1.running_mean[0] = torch.nan
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    words = ["test_resnet", "--num-classes", 3, "--checkpoint", tmp_path / "model.safetensors"]
    code, out, err = call("predict", *words, *images(tmp_path / "photos", 1, 40), "--json")
    assert (code, out) == (2, "") and "the model gives NaN for an image: its weights are damaged" in err
    model.fc.bias.data[0] = torch.nan
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for command in ("inspect --model", "predict"):
        code, out, err = call(*command.split(), *words, *([tmp_path / "photos"] if command == "predict" else []))
        assert (code, out) == (2, "") and "'fc.bias' holds NaN or infinite values" in err


def test_a_folder_may_hold_files_that_are_no_images(call: Any, saved: Path, tmp_path: Path) -> None:
    photo = images(tmp_path / "photos", 1, 40)[0]
    for name in ("notes.pdf", "notes.txt", "clip.mpo"):
        (tmp_path / "photos" / name).write_bytes(b"no image")
    code, out, err = call("predict", f"local-dir:{saved}", tmp_path / "photos", "--json")
    assert code == 0, err
    assert [found["image"] for found in json.loads(out)["predictions"]] == [str(photo)]


def test_names_of_imagenet_are_used_for_its_classes(call: Any, tmp_path: Path) -> None:
    (path,) = images(tmp_path / "photos", 1, 150)
    code, out, _ = call("predict", "test_resnet", path, "--no-pretrained", "--top-k", 5000, "--json")
    classes = json.loads(out)["predictions"][0]["classes"]
    assert code == 0 and len(classes) == 1000
    assert {one["index"]: one["name"] for one in classes}[207] == "golden retriever"
    assert sum(one["probability"] for one in classes) == pytest.approx(1, rel=1e-4)
    code, out, _ = call("predict", "test_resnet", path, "--no-pretrained", "--num-classes", 7, "--json")
    assert {one["name"] for one in json.loads(out)["predictions"][0]["classes"]} == {""}


REFUSED = {
    "no image": ("{tmp}/nix.jpg", "no image at"),
    "an empty folder": ("{tmp}/empty", "holds no images"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_image_is_refused_before_the_model_is_loaded(call: Any, tmp_path: Path, case: str) -> None:
    words, message = REFUSED[case]
    (tmp_path / "empty").mkdir()
    code, out, err = call("predict", "nosuch", words.format(tmp=tmp_path))
    assert (code, out, len(err.splitlines())) == (2, "", 1) and message in err


def test_a_model_without_classes_is_refused(call: Any, tmp_path: Path) -> None:
    (path,) = images(tmp_path / "photos", 1, 150)
    code, out, err = call("predict", "test_resnet", path, "--no-pretrained", "--num-classes", 0)
    assert (code, out) == (2, "") and "the model has no classifier" in err


COMPRESSED = {  # side of the images, with labels or without, crop that is saved
    "small images with labels": (40, True, ("squash", 1.0)),
    "small images without labels": (40, False, ("center", 0.95)),
    "large images with labels": (150, True, ("center", 0.95)),
}


@pytest.mark.parametrize("case", COMPRESSED)
def test_compress_saves_the_crop_of_the_images_that_it_measured(call: Any, tmp_path: Path, case: str) -> None:
    side, labelled, expected = COMPRESSED[case]
    for split, name in (("train", "cat"), ("train", "dog"), ("test", "cat"), ("test", "dog")):
        images(tmp_path / "data" / split / name if labelled else tmp_path / "data", 4, side)
    out = tmp_path / "out"
    words = ("--model", "test_resnet", "--no-pretrained", "--num-classes", 2, "--keep-params", 0.6, "--effort", "fast")
    code, _, err = call("compress", *words, "--schemes", "channel", "--data", tmp_path / "data", "--output", out)
    assert code == 0, err
    cfg = json.loads((out / "config.json").read_text())["pretrained_cfg"]
    assert (cfg["crop_mode"], cfg["crop_pct"]) == expected
    if expected[0] == "squash":  # a size for testing would be another input than the measured one
        assert cfg.get("test_input_size") is cfg.get("test_crop_pct") is None


def test_a_warning_of_the_library_is_one_plain_line(call: Any, saved: Path, tmp_path: Path) -> None:
    for split, name in (("train", "cat"), ("train", "dog"), ("train", "[owl]"), ("test", "cat"), ("test", "dog")):
        images(tmp_path / "data" / split / name, 2, 40)
    (tmp_path / "data" / "train" / "cat" / "\x1b[31mnotes.txt").write_text("no image")
    code, _, err = call("compress", "--model", saved, "--keep-params", 0.9, "--schemes", "channel", "--effort", "fast",
                        "--data", tmp_path / "data", "--output", tmp_path / "small")  # fmt: skip
    warned = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert code == 0 and "\x1b" not in err, err
    assert any("notes.txt" in line for line in warned)


NAMES: dict[str, tuple[Any, list[str]]] = {
    "a list": (["cat", "dog", "emu"], ["cat", "dog", "emu"]),
    "by number": ({"2": "emu", "0": "cat", "1": "dog"}, ["cat", "dog", "emu"]),
    "with a gap": ({"0": "cat", "1": "dog", "7": "emu"}, []),
    "too few": (["cat"], []),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_of_classes_are_read_in_both_of_timm_s_forms(case: str, tmp_path: Path) -> None:
    given, names = NAMES[case]
    model = timm.create_model("test_resnet", num_classes=3)
    timm.models.save_for_hf(model, tmp_path / "in", model_config={"label_names": given}, safe_serialization=True)
    model = load_model(f"local-dir:{tmp_path / 'in'}")
    assert list(class_names(model)) == names
    folder = arp_hub.save_pretrained(model, tmp_path / "out")
    assert json.loads((folder / "config.json").read_text()).get("label_names", []) == names
    exported = arp_hub.export(folder, tmp_path / "export", format="torch-export")
    assert exported.record.get("label_names", []) == names
