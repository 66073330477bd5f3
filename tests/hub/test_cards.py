"""What a reader of a card may and may not meet: no path, no row name, one number for one thing."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from helpers import low_rank_model
from safetensors.torch import save_file

import arp_hub
from arp_hub._utils.environment import RECIPES
from arp_hub.hub.card import keep_by_hand, model_card
from arp_hub.hub.card_names import command, data_name
from arp_hub.training import TrainConfig, run
from arp_hub_cli.app import app

ROOT = Path(__file__).parents[2]
STORED = sorted(
    path for folder in ("benchmarks/models", "docs/examples") for path in (ROOT / folder).glob("*/README.md")
)
PATH = re.compile(r"\.\./|(?<![\w.-])runs/|(?:^|[\s\"'`(=:])(?:/(?!owner)[A-Za-z.]|[A-Za-z]:\\|~/)", re.M)
ROW = re.compile(r"\b(?:fit|weights|svd|train|long|long-teacher|teacher|ramp|factors|uniform-cp)/\w+/0\.\d")
FIT = ["--keep-params", "0.6", "--schemes", "channel", "--effort", "fast"]
TRAINED = {
    "model": "cifar_resnet20", "data": "digits", "keep_params": 0.5, "schemes": ("channel",), "calibration_images": 4,
    "max_steps": 2, "batch_size": 16, "cpu": True, "tracker": "none", "epochs": 1, "ramp": 0.0,
}  # fmt: skip


def check(card: str) -> None:
    """Fail if a card names a place of a machine or a row of a benchmark."""
    assert [match[0] for match in PATH.finditer(card)] == []
    assert [match[0] for match in ROW.finditer(card)] == []


def arp(*words: object) -> None:
    with pytest.raises(SystemExit) as stop:
        app([str(word) for word in words])
    assert not stop.value.code


def read_card(folder: Path) -> str:
    card = (folder / "README.md").read_text(encoding="utf-8")
    check(card)
    for path in (str(folder), str(folder.parent)):
        assert path not in card
    return card


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.parent.name)
def test_what_is_stored_beside_a_card_names_no_other_folder(path: Path) -> None:
    for name in ("metrics.json", "config.json"):
        text = (path.parent / name).read_text(encoding="utf-8")
        assert not re.findall(r"\.\./[\w./-]*|\"/\w[\w./-]*", text), name


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.parent.name)
def test_stored_cards_name_no_path_and_no_row(path: Path) -> None:
    card = path.read_text(encoding="utf-8")
    check(card)
    assert re.search(r"Top-1 accuracy is [\d.]+ % on (CIFAR-10|a sample of ImageNet), (test|validation) split;", card)
    folder = path.parent.relative_to(ROOT)
    if folder.parts[0] == "benchmarks":
        assert f'"local-dir:{folder.as_posix()}"' in card


@pytest.mark.parametrize(
    "text",
    ["../shared/data", "in runs/out here", "from /data/x", "`~/weights`", "C:\\models", "--data=/data", "train/r/0.5"],
)
def test_the_check_finds_what_must_not_be_there(text: str) -> None:
    with pytest.raises(AssertionError):
        check(f"a card\n{text}")


def test_a_card_without_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["compress", "--model", "test_resnet", "--no-pretrained", *FIT, "--output", str(tmp_path / "small")]
    monkeypatch.setattr("sys.argv", ["arp-hub", *words])
    arp(*words)
    card = read_card(tmp_path / "small")
    assert "Top-1" not in card and "No training: the factors were computed from the weights." in card
    assert "had random weights" in card and "No accuracy was measured" in card
    assert command_of(card) == [*words[:-1], "out"]
    assert card.index("```python") < card.index("## Results") < card.index("| parameters |") < card.index("## Use")


def test_a_card_of_a_model_fitted_and_refined_on_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ("--data", "digits", "--calibration-images", 32, "--max-images", 32)
    refine = ("--refine", "--refine-steps", 4, "--refine-images", 40)
    words = ("compress", "--model", "cifar_resnet20", *data, *FIT, *refine, "--output", tmp_path / "small")
    monkeypatch.setattr("sys.argv", ["arp-hub", *map(str, words)])
    arp(*words)
    card = read_card(tmp_path / "small")
    assert "on scikit-learn's digits, test split; the dense model reaches" in card
    assert "- measured on: scikit-learn's digits, test split" in card
    assert "fitted to each layer's output on 32 unlabelled images" in card
    assert "calibration images: 32 without labels" in card
    assert re.search(r"fell from [\d.]+ to [\d.]+ nats on \d+ other images|the fit is unchanged", card)
    assert command_of(card)[:5] == ["compress", "--model", "cifar_resnet20", "--data", "digits"]
    numbers = json.loads((tmp_path / "small" / "metrics.json").read_text())
    assert set(numbers["spectra"]) == set(numbers["plan"]["layers"])


def command_of(card: str) -> list[str]:
    """The arguments of the command that a card prints."""
    program, *words = shlex.split(card.split("```bash\n")[1].split("```")[0])
    assert program == "arp-hub"
    return words


@pytest.mark.parametrize("kind", ["penalty", "teacher and fine-tuning"])
def test_a_card_of_a_training_run(tmp_path: Path, kind: str) -> None:
    changes: dict[str, Any] = {}
    if kind != "penalty":
        torch.manual_seed(0)
        mean_and_std = {key: timm.create_model("cifar_resnet20").pretrained_cfg[key] for key in ("mean", "std")}
        teacher = timm.create_model("cifar_resnet20", pretrained_cfg_overlay=mean_and_std)
        arp_hub.save_pretrained(teacher, tmp_path / "taught")
        changes = {"distill": 0.5, "teacher": f"local-dir:{tmp_path / 'taught'}", "finetune_epochs": 2}
    run(TrainConfig(**TRAINED, output=str(tmp_path / "small"), **changes))
    card = read_card(tmp_path / "small")
    assert "Trained with the adaptive rank penalty for 1 epoch, starting from the fitted model." in card
    rates = "0.05" if kind == "penalty" else "0.05 (penalty), 0.005 (fine-tuning)"
    assert (
        f"learning rate {rates}, batch size 16" in card and "| after penalty training, before decomposition |" in card
    )
    assert ("The factors were fine-tuned for 2 epochs. The loss distils from `taught`." in card) == (kind != "penalty")


def test_a_card_of_a_recipe_without_training_tells_of_none(tmp_path: Path) -> None:
    refined = {"epochs": 0, "finetune_epochs": 0, "distill": 0.9, "refine_steps": 4, "refine_images": 40}
    run(TrainConfig(**TRAINED | refined, output=str(tmp_path / "small")))
    text = read_card(tmp_path / "small").split("## How it was made")[-1]
    assert re.search(
        r"factors were fitted to each layer's output on \d+ unlabelled images. The fit was refined on", text
    )
    for words in ("distils", "optimiser", "learning rate", "Trained"):
        assert words not in text


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"epochs": 3}, "learning rate 0.03"),
        ({"epochs": 0, "finetune_epochs": 2}, "learning rate 0.003"),
        ({"epochs": 0, "finetune_epochs": 2, "finetune_lr": 0.02}, "learning rate 0.02"),
        ({"dense_epochs": 5, "dense_lr": 0.1, "epochs": 3}, "learning rate 0.1 (dense training), 0.03 (penalty)"),
        ({"dense_epochs": 5, "epochs": 3}, "learning rate 0.03"),
        ({"epochs": 0}, ""),
    ],
    ids=str,
)
def test_the_rates_are_those_of_the_phases_that_took_place(changes: dict[str, Any], shown: str) -> None:
    text = rendered(config={"lr": 0.03, "optimizer": "sgd", **changes})
    assert f"optimiser sgd, {shown}." in text if shown else "optimiser" not in text


@pytest.mark.parametrize(
    ("limited", "shown"), [(True, "name: CIFAR-10 (96 images of the split)"), (False, "name: CIFAR-10")]
)
def test_accuracy_of_a_part_of_a_split_says_so_in_the_head(limited: bool, shown: str) -> None:
    known = {"dataset": "uoft-cs/cifar10", "data": "uoft-cs/cifar10", "split": "test", "images": 96}
    head = rendered(**known, **({"limited": True} if limited else {})).split("---")[1]
    assert re.search(rf"{re.escape(shown)}$", head, re.MULTILINE)


@pytest.mark.parametrize("own", [True, False])
def test_weights_of_one_s_own_have_no_licence_of_timm_s(tmp_path: Path, own: bool) -> None:
    model = timm.create_model("cifar_resnet20")
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "license": "cc-by-nc-4.0"}
    arp_hub.save_pretrained(model, tmp_path / "named")
    words = ["compress", "--model", f"local-dir:{tmp_path / 'named'}", *FIT, "--output", tmp_path / "small"]
    if own:
        save_file(model.state_dict(), tmp_path / "own.safetensors")
        words += ["--checkpoint", tmp_path / "own.safetensors"]
    arp(*words)
    assert ("license: cc-by-nc-4.0" in read_card(tmp_path / "small")) is not own


def numbers(**changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    args = {"backbone": "resnet18", "plan": {"layers": {"a": {"scheme": "cp", "rank": 3}}}}
    config = {"architecture": "arp_lowrank", "num_classes": 10, "pretrained_cfg": {}, "model_args": args}
    metrics = {"params": 50, "macs": 60, "bytes": 2_000_000, "top1": 70.0, "input_size": [3, 32, 32],
               "dense": {"params": 100, "macs": 100, "bytes": 4_000_000, "top1": 71.0}}  # fmt: skip
    return config, metrics | changes


def rendered(export: Any = None, **changes: Any) -> str:
    return model_card(*numbers(**changes), "hf-hub:ann/small", export=export)


@pytest.mark.parametrize(
    ("ms", "words"),
    [
        ((28.48, 27.98), "| 98 % |.*As fast as the dense model .* it takes 98 % of the time"),
        ((10.0, 9.96), "| 100 % |.*As fast .* it takes 100 % of the time"),
        ((10.0, 14.0), "| 140 % |.*Slower than the dense model .* it takes 140 % of the dense model's time"),
        ((10.0, 5.0), "| 50 % |"),
    ],
)
def test_a_latency_is_one_number(ms: tuple[float, float], words: str) -> None:
    dense, small = ms
    timing = {"device": "cpu", "threads": 1, "dtype": "float32", "batch_size": 1, "ratio": {"median": 1.001},
              "dense_latency_ms": {"median": dense}, "latency_ms": {"median": small}}  # fmt: skip
    card = rendered(latency=[timing])
    assert re.search(words.replace("| ", r"\| ", 2), card, re.S)
    shares = set(re.findall(r"(?<!\.)\b(\d+) % (?:\||of the (?:time|dense model's))", card))
    assert shares == {str(round(100 * small / dense))}


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (
            0.188,
            0.188,
            "no step brought it closer to the dense model's predictions on 50 other images: the fit is unch",
        ),
        (0.3, 0.1, "fell from 0.300 to 0.100 nats on 50 other images."),
        (0.18841, 0.18839, "fell from 0.18841 to 0.18839 nats"),
    ],
)
def test_a_refinement_says_whether_it_helped(before: float, after: float, words: str) -> None:
    refinement = {"before": before, "after": after, "images": 100, "held_out": 50, "steps": 9, "seconds": 60.0}
    card = rendered(trained=False, calibration_images=64, refinement=refinement)
    assert words in card and "No labels were used: the factors were fitted" in card


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"data": "digits", "dataset": None}, "scikit-learn's digits"),
        ({"data": "photos/digits", "dataset": None}, "digits"),
        ({"data": "imagenet-val", "images": 900}, "a sample of ImageNet"),
        ({"data": "imagenet-val", "images": 50_000}, "ImageNet"),
        ({"data": "imagenet-val"}, "ImageNet"),
        ({"data": "ann/pets:small", "dataset": "ann/pets"},
         "[ann/pets](https://huggingface.co/datasets/ann/pets), configuration `small`"),
        ({"data": "here/pets", "dataset": "ann/pets"}, "[ann/pets](https://huggingface.co/datasets/ann/pets)"),
    ],
)  # fmt: skip
def test_data_is_named_by_what_it_is(metrics: dict[str, Any], words: str) -> None:
    assert data_name(metrics) == words


def test_accuracy_in_int8_stands_in_the_table_only_if_it_is_of_the_same_images() -> None:
    parity = {"images": 500, "top1": 69.0, "torch_top1": 70.0, "agreement": 97.0, "divergence": 0.02, "source": "test"}
    export = {"format": "onnx", "precision": "int8", "file": "model.onnx", "size_bytes": 600_000, "parity": parity}
    export["params"] = numbers()[1]["params"]
    card = rendered(export, images=10_000)
    assert "| 0.60 MB |" in card and "| top-1, % | 71.00 | 70.00 |  |  |" in card
    assert "top-1 69.00 % (in PyTorch 70.00 %), same top-1 class as PyTorch for 97.0 % of 500 test images" in card
    assert "| top-1, % | 71.00 | 70.00 |  | 69.00 |" in rendered(export, images=500)


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"trained": False}, "calibration used some of the test images, without their labels"),
        ({"config": {"epochs": 0, "finetune_epochs": 0}}, "calibration used some of the test images"),
        ({"config": {"epochs": 3}}, "the model was trained and tested on the same images"),
        ({"config": {"epochs": 0, "finetune_epochs": 1}}, "the model was trained and tested on the same images"),
    ],
)
def test_images_for_both_training_and_testing_are_told(metrics: dict[str, Any], words: str) -> None:
    assert words in rendered(shared_images=True, **metrics)


@pytest.mark.parametrize("export", [None, {}, [], 3, {"onnx": {"bytes": 5}}, {"int8": {"size_bytes": "many"}}])
def test_other_exports_leave_the_table_as_it_is(export: Any) -> None:
    assert "int8" not in rendered(export)


def test_the_folder_of_an_exported_model_gives_the_column(tmp_path: Path) -> None:
    from arp_hub.hub.export_files import read_export

    model = low_rank_model("test_resnet", {"layer1.0.conv1": "channel"})
    folder = arp_hub.save_pretrained(model, tmp_path / "small")
    assert read_export(folder) is None
    (folder / "export.json").write_text("not JSON")
    assert read_export(folder) is None
    (folder / "export.json").write_text('{"precision": "int8"}')
    assert read_export(folder) == {"precision": "int8"}


@pytest.mark.parametrize(
    ("recorded", "dataset", "printed"),
    [
        ("arp-hub compress --model resnet18 --data digits --output runs/x --json", None,
         "arp-hub compress --model resnet18 --data digits --output out"),
        ("__main__.py compress --model resnet18 --data here/pets --output=o", "ann/pets",
         "python -m arp_hub compress --model resnet18 --data ann/pets --output out"),
        ("resnet50.py --epochs 3 --resume auto --push-to-hub ann/small --tracker none", None,
         "python recipes/resnet50.py --epochs 3"),
        ("arp-hub compress --model hf-hub:ann/big --keep-params 0.5", None,
         "arp-hub compress --model hf-hub:ann/big --keep-params 0.5"),
        ("arp-hub compress --model resnet18 --checkpoint weights.safetensors", None, ""),
        ("arp-hub compress --model resnet18 --checkpoint best.pth.tar", None, ""),
        ("arp-hub compress --model resnet18 --checkpoint last", None, ""),
        ("arp-hub compress --model resnet18 --plan mine", None, ""),
        ("resnet50.py --teacher big --epochs 3", None, ""),
        ("resnet50.py --teacher-checkpoint=big.ckpt --epochs 3", None, ""),
        ("arp-hub compress --model dense", None, ""),
        ("arp-hub compress --model local-dir:big", None, ""),
        ("arp-hub compress --model resnet18 --data pets", None, ""),
        ("accuracy.py run train/resnet20/0.5 --shared ../shared", None, ""),
        ("arp-hub compress --model resnet18.a1_in1k --data ann/pets:small --output o", "ann/pets",
         "arp-hub compress --model resnet18.a1_in1k --data ann/pets:small --output out"),
        ("mine.py --fast", None, ""),
        ("./vit.py --fast", None, ""),
        ("./__main__.py --epochs 3", None, ""),
        ("arp-hub 'unbalanced", None, ""),
        (None, None, ""),
    ],
)  # fmt: skip
def test_a_command_is_printed_where_a_reader_can_run_it(recorded: Any, dataset: Any, printed: str) -> None:
    assert command({"command": recorded, "dataset": dataset}) == printed
    assert ("```bash\n" in rendered(command=recorded, dataset=dataset)) == bool(printed)


def test_a_command_of_several_processes_starts_as_many() -> None:
    recorded = {"command": "resnet50.py --cpu --epochs 3", "processes": 2}
    launched = "python -m torch.distributed.run --nproc_per_node 2 recipes/resnet50.py --cpu --epochs 3"
    assert command(recorded) == launched
    assert "in a clone of" in rendered(**recorded)
    assert command(recorded | {"processes": None}) == "python recipes/resnet50.py --cpu --epochs 3"


def test_recipes_whose_commands_are_printed_exist() -> None:
    assert sorted(RECIPES) == sorted(path.name for path in (ROOT / "recipes").glob("*.py"))


def test_the_card_quotes_what_timm_says_without_the_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = arp_hub.save_pretrained(low_rank_model("test_resnet", {"layer1.0.conv1": "channel"}), tmp_path / "small")
    monkeypatch.delitem(timm.models._registry._model_entrypoints, "arp_lowrank")
    with pytest.raises(RuntimeError, match=r"^Unknown model \(arp_lowrank\)$") as raised:
        timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert f"Without it, timm says `{raised.value}`" in read_card(folder)


@pytest.mark.parametrize(("classes", "shown"), [(5, False), (6, True)])
def test_a_top5_that_is_always_right_is_no_row(tmp_path: Path, classes: int, shown: bool) -> None:
    model = low_rank_model("test_resnet", {"layer3.0.conv1": "channel"}, num_classes=classes)
    metrics = {"top1": 70.0, "top5": 100.0, "dense": {"top1": 71.0, "top5": 100.0}}
    assert ("top-5, %" in read_card(arp_hub.save_pretrained(model, tmp_path / "out", metrics=metrics))) is shown


NAMES = {
    "main": ("hf-hub:ann/small", "small", "hf-hub:ann/small@v1"),
    "a branch": ("hf-hub:ann/small@trial", "small", "hf-hub:ann/small@v1"),
    "a branch with a slash": ("hf-hub:ann/small@feature/foo", "small", "hf-hub:ann/small@v1"),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_on_a_card_load(case: str) -> None:
    """Timm takes one revision in a name."""
    name, title, tagged = NAMES[case]
    card = model_card(*numbers(), name, tag="v1", dense="trial-dense")
    assert f"\n# {title}\n" in card and f'Load `"{tagged}"`' in card
    assert f'timm.create_model("{name}", pretrained=True)' in card
    assert '"hf-hub:ann/small@trial-dense"' in card and not re.search(r"@\S+@", card)


def test_a_merged_model_names_the_branch_that_it_is_of() -> None:
    config, metrics = numbers()
    merged = {**metrics, "merged_from": "ann/small@trial"}
    card = model_card(config, merged, "hf-hub:ann/small@trial-dense")
    assert "[ann/small@trial](https://huggingface.co/ann/small/tree/trial)" in card


def test_the_owner_s_entries_of_both_cards_are_kept() -> None:
    """The Hub's count first; a line of dashes in an entry does not end the head."""
    card = model_card(*numbers(), "hf-hub:ann/small")
    here = card.replace("\ntags:\n", "\nlanguage: de\nnote: run---1\ntags:\n- cats\n")
    there = card.replace("\ntags:\n", "\nlanguage: en\ntags:\n- dogs\n")
    notes = there.replace("between these two lines -->\n", "between these two lines -->\nFrom the Hub.")
    for found in (keep_by_hand(card, there, here), keep_by_hand(card, notes, here)):
        head = yaml.safe_load(found.split("---\n")[1])
        assert head["language"] == "en" and head["note"] == "run---1" and {"cats", "dogs"} <= set(head["tags"])
        again = keep_by_hand(card, found)
        assert again == found and found.count("license:") == card.count("license:")
    assert "\n- cats\n" in keep_by_hand(card, "", here)


HEADS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "a licence": ("license: mit\n", "", {"license": "mit"}),
    "a licence of its own": (
        "license: other\nlicense_name: made-up\nlicense_link: a-b\n", "",
        {"license": "other", "license_name": "made-up", "license_link": "a-b"},
    ),
    "a licence that the push knows": ("license: mit\n", "license: apache-2.0\n", {"license": "apache-2.0"}),
    "another kind of licence": (
        "license: other\nlicense_name: made-up\n", "license: mit\n", {"license": "mit", "license_name": None}
    ),
    "a base and data": (
        "base_model: ann/dense\nbase_model_relation: quantized\ndatasets:\n- ann/pets\n", "",
        {"base_model": "ann/dense", "base_model_relation": "quantized", "datasets": ["ann/pets"]},
    ),
    "another base": (
        "base_model: ann/dense\nbase_model_relation: merge\n", "base_model: bob/dense\n",
        {"base_model": "bob/dense", "base_model_relation": None},
    ),
    "a base that an earlier push named": (
        "base_model: ann/dense\nbase_model_relation: finetune\n", "", {"base_model": None, "base_model_relation": None}
    ),
    "data that an earlier push named": (
        "datasets:\n- ann/pets\nmodel-index:\n- results:\n  - dataset:\n      type: ann/pets\n", "",
        {"datasets": None, "model-index": None},
    ),
    "data beside results on other data": (
        "datasets:\n- ann/pets\nmodel-index:\n- results:\n  - dataset:\n      type: imagefolder\n", "",
        {"datasets": ["ann/pets"], "model-index": None},
    ),
    "results": ("metrics:\n- accuracy\n", "", {"metrics": None}),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADS)
def test_what_the_owner_says_of_origin_and_licence_stays_where_a_push_knows_nothing(case: str) -> None:
    before, now, kept = HEADS[case]
    found = keep_by_hand(f"---\n{now}tags:\n- timm\n---\nNew.\n", f"---\n{before}tags:\n- timm\n---\nOld.\n")
    head = yaml.safe_load(found.split("---\n")[1])
    assert {key: head.get(key) for key in kept} == kept


def test_a_snippet_for_pictures_is_printed_for_three_channels_only() -> None:
    config, metrics = numbers()
    for channels in (1, 3, 4):
        card = model_card(config, metrics | {"input_size": [channels, 32, 32]}, "hf-hub:ann/small")
        assert ("a PIL image" in card) == (channels == 3)
