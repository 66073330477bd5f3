"""``save_pretrained``: the content of the folder, loading bit for bit elsewhere, and no half-written folder."""

from __future__ import annotations

import ctypes
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import half_rank_plan, load, low_rank_model
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import arp_hub
from arp_hub._utils.files import remove_unfinished
from arp_hub.hub.save import check_folder
from arp_hub.layers.apply_plan import plan_of
from arp_hub.layers.model import count_params
from arp_hub.layers.trace import count_macs
from arp_hub.reports.run_page import write_report

FILES = ["README.md", "config.json", "metrics.json", "model.safetensors"]
PICTURED = [*FILES, "ranks.png"]
RESNET = {"layer1.0.conv1": "cp", "layer3.1.conv2": "channel", "fc": "channel"}


def small_model(**kwargs: object) -> nn.Module:
    return low_rank_model("cifar_resnet20", RESNET, **kwargs)


def read(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- loading in another process -------------------------------------------------------------------------------------

TINY_COAT = {"embed_dims": [32] * 4, "serial_depths": [1] * 4, "parallel_depth": 1, "img_size": 64}
ELSEWHERE: dict[str, Callable[[], nn.Module]] = {
    "cifar": small_model,
    "dense": lambda: timm.create_model("cifar_resnet20", num_classes=3).eval(),
    "vit": lambda: low_rank_model("test_vit", {"blocks.0.attn.qkv": "group_out", "head": "channel"}, img_size=96),
    "half": lambda: small_model().half(),
    "arguments": lambda: low_rank_model("test_resnet", {"layer1.0.conv1": "tucker2"}, act_layer="silu", in_chans=1),
    "shared modules": lambda: low_rank_model("coat_tiny", {"parallel_blocks.0.mlp2.fc1": "channel"}, **TINY_COAT),
    "channels last": lambda: small_model().to(memory_format=torch.channels_last),
    "standardised": lambda: low_rank_model("test_nfnet", {"stages.0.0.conv1": "channel"}),
}

LOADER = """
import sys, timm, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
folder = Path(sys.argv[1])
torch.set_num_threads(1)
try:
    timm.create_model(f"local-dir:{folder / 'cifar'}", pretrained=True)
    sys.exit("loaded without arp_hub")
except RuntimeError as error:
    assert "Unknown model (arp_lowrank)" in str(error)
import arp_hub
outputs = {}
for name, x in load_file(folder / "inputs.safetensors").items():
    source = f"hf-hub:someone/{name.removeprefix('hub ')}" if name.startswith("hub ") else f"local-dir:{folder / name}"
    with torch.no_grad():
        outputs[name] = timm.create_model(source, pretrained=True, dtype=x.dtype).eval()(x)
save_file(outputs, folder / "outputs.safetensors")
arp_hub.save_pretrained(timm.create_model(f"local-dir:{folder / 'cifar'}", pretrained=True), folder / "again")
print({"rich", "typer", "accelerate", "datasets", "sklearn"} & set(sys.modules))
"""


def put_in_hub_cache(folder: Path, hub: Path) -> None:
    """Lay a saved folder out as the Hub's client caches a downloaded repository."""
    repository = hub / f"models--someone--{folder.name}"
    commit = "0123456789" * 4
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


def test_bit_equal_in_a_fresh_process_that_imports_nothing_else(tmp_path: Path) -> None:
    inputs, expected = {}, {}
    for name, make in ELSEWHERE.items():
        model = make()
        size = read(arp_hub.save_pretrained(model, tmp_path / name))["pretrained_cfg"]["input_size"]
        inputs[name] = torch.randn(2, *size).to(next(model.parameters()).dtype)
        with torch.no_grad():
            expected[name] = model.to(memory_format=torch.contiguous_format)(inputs[name])
    put_in_hub_cache(tmp_path / "cifar", tmp_path / "home" / "hub")
    inputs["hub cifar"], expected["hub cifar"] = inputs["cifar"].clone(), expected["cifar"]
    save_file(inputs, tmp_path / "inputs.safetensors")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOADER, str(tmp_path)]
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    assert done.stdout.endswith("set()\n")
    found = load_file(tmp_path / "outputs.safetensors")
    assert found.keys() == expected.keys()
    for name, y in expected.items():
        assert found[name].isfinite().all() and torch.equal(found[name], y), name


# --- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("pictures")
def test_files_and_config(tmp_path: Path) -> None:
    model = small_model()
    folder = arp_hub.save_pretrained(model, tmp_path / "new" / "out", label_names=list("abcdefghij"))
    assert names_in(folder) == PICTURED
    config = read(folder)
    assert config["architecture"] == "arp_lowrank"
    args = config["model_args"]
    assert args["backbone"] == "cifar_resnet20" and config["num_classes"] == 10 and "num_classes" not in args
    assert arp_hub.RankPlan.from_dict(args["plan"]) == plan_of(model)
    assert config["pretrained_cfg"]["mean"] == [0.485, 0.456, 0.406]
    loaded = load(folder)
    assert loaded.pretrained_cfg["label_names"] == list("abcdefghij")
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        assert tensors.keys() == sorted(model.state_dict())
    modes = {(folder / name).stat().st_mode & 0o777 for name in FILES}
    assert len(modes) == 1


def test_nothing_of_the_published_weights_is_left_in_the_config(tmp_path: Path) -> None:
    model = timm.create_model("resnet18.tv_in1k")
    assert {"url", "hf_hub_id", "tag", "origin_url"} <= model.pretrained_cfg.keys()
    arp_hub.decompose(model, half_rank_plan(model, {"layer1.0.conv1": "channel"}))
    loaded = load(arp_hub.save_pretrained(model, tmp_path / "out"))
    assert not {"url", "hf_hub_id", "tag", "origin_url"} & loaded.pretrained_cfg.keys()
    for key in ("mean", "crop_pct", "interpolation", "license", "first_conv", "classifier", "pool_size"):
        assert as_json(loaded.pretrained_cfg[key]) == as_json(model.pretrained_cfg[key])
    # resnet18's default cfg has a test size, the tag tv_in1k has none
    assert "test_input_size" in timm.get_pretrained_cfg("resnet18").to_dict()
    assert "test_input_size" not in loaded.pretrained_cfg


def test_numbers_are_counted_on_the_model(tmp_path: Path) -> None:
    model = small_model()
    low_rank, macs = count_params(model), count_macs(model)
    given = {"top1": 91.23, "seed": 3, "command": "me --fast", "dense": {"top1": 92.5}, "note": "a | b\nc"}
    folder = arp_hub.save_pretrained(model, tmp_path / "out", metrics=given)
    arp_hub.to_dense(model)
    numbers = read(folder, "metrics.json")
    assert (numbers["params"], numbers["macs"]) == (low_rank, macs)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    expected = {"top1": 92.5, "params": count_params(model), "macs": count_macs(model), "bytes": size}
    assert numbers["dense"] == expected
    assert numbers["kept"]["params"] == pytest.approx(low_rank / count_params(model), abs=1e-4)
    assert all(numbers[key] == given[key] for key in ("top1", "seed", "command", "note"))
    assert numbers["versions"]["timm"] == timm.__version__ and numbers["hardware"]["cores"] == os.cpu_count()
    assert numbers["hardware"]["instructions"] == torch.backends.cpu.get_cpu_capability()


def test_metrics_name_no_folder_of_this_machine(tmp_path: Path) -> None:
    """They are uploaded as they are."""
    where = {"data": str(tmp_path / "photos"), "model": f"local-dir:{tmp_path / 'mine'}"}
    config = {**where, "checkpoint": str(tmp_path / "a" / "w.safetensors"), "output": "runs/mine", "lr": 0.1}
    folder = arp_hub.save_pretrained(small_model(), tmp_path / "out", metrics={**where, "config": config})
    numbers = read(folder, "metrics.json")
    assert (numbers["data"], numbers["model"]) == ("photos", "local-dir:mine")
    assert numbers["config"] == {
        "data": "photos", "model": "local-dir:mine", "checkpoint": "w.safetensors", "output": "runs/mine", "lr": 0.1
    }  # fmt: skip
    assert not [path.name for path in folder.iterdir() if str(tmp_path).encode() in path.read_bytes()]


def test_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = {"top1": 91.234, "dense": {"top1": 92.5}, "seed": 3}
    folder = arp_hub.save_pretrained(small_model(), tmp_path / "my-model", metrics=metrics)
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "timm"
    numbers = read(folder, "metrics.json")
    assert f"| parameters | {numbers['dense']['params']:,} | {numbers['params']:,} |" in card.text
    assert "| top-1, % | 92.50 | 91.23 |" in card.text and "- seed: 3" in card.text
    assert "top-5" not in card.text  # no top-5 was given
    assert "| `cp` | 1 |" in card.text and "| `channel` | 2 |" in card.text
    snippet = card.text.split("```python\n")[1].split("```")[0]
    assert "import arp_hub" in snippet
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert isinstance(names["model"], nn.Module) and plan_of(names["model"]).layers


def test_a_dense_model_keeps_its_architecture(tmp_path: Path) -> None:
    dense = timm.create_model("cifar_resnet20", num_classes=4, global_pool="max").eval()
    folder = arp_hub.save_pretrained(dense, tmp_path / "dense")
    assert read(folder)["architecture"] == "cifar_resnet20" and "dense" not in read(folder, "metrics.json")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(load(folder)(x), dense(x))
    merged = arp_hub.to_dense(load(arp_hub.save_pretrained(small_model(), tmp_path / "out")))
    folder = arp_hub.save_pretrained(merged, tmp_path / "merged")
    assert read(folder)["architecture"] == "cifar_resnet20" and "plan" not in read(folder)["model_args"]
    assert torch.equal(load(folder)(x), merged(x))


@pytest.mark.parametrize("arguments", [{}, {"num_classes": 3}, {"in_chans": 1}, {"global_pool": "max"}])
def test_a_loaded_model_saves_again(arguments: dict[str, Any], tmp_path: Path) -> None:
    layers = {**RESNET, "conv1": "cp"}
    folder = arp_hub.save_pretrained(low_rank_model("cifar_resnet20", layers), tmp_path / "first")
    model = load(folder, **arguments)
    again = load(arp_hub.save_pretrained(model, tmp_path / "second"))
    x = torch.randn(1, arguments.get("in_chans", 3), 32, 32)
    assert torch.equal(again(x), model(x)) and plan_of(again) == plan_of(model)
    model.reset_classifier(5)
    assert load(arp_hub.save_pretrained(model, tmp_path / "third"))(x).shape == (1, 5)


def test_tied_and_sliced_weights(tmp_path: Path) -> None:
    model = small_model()
    model.layer3[0].bn1.weight = model.layer3[0].bn2.weight
    model.layer3[1].bn1.bias.data = torch.arange(128.0)[::2]
    loaded = load(arp_hub.save_pretrained(model, tmp_path / "out")).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 1.1 * sum(v.nbytes for v in loaded.values())


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = small_model().train()
    noted = dict(model._model_args), dict(model.pretrained_cfg)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    arp_hub.save_pretrained(model, tmp_path / "out")
    assert (dict(model._model_args), dict(model.pretrained_cfg)) == noted and model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


# --- what is refused ------------------------------------------------------------------------------------------------


def test_models_that_do_not_say_what_they_are(tmp_path: Path) -> None:
    from timm.models.resnet import BasicBlock, ResNet

    torch.manual_seed(0)
    model = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=5).eval()
    out = tmp_path / "out"
    with pytest.raises(arp_hub.ArpHubError, match="pass backbone="):
        arp_hub.save_pretrained(model, out)
    with pytest.raises(arp_hub.ArpHubError, match="is not what resnet18 .* builds.*pass backbone= and model_args="):
        arp_hub.save_pretrained(model, out, backbone="resnet18")
    with pytest.raises(arp_hub.ArpHubError, match="timm cannot build resnet18 .*magic"):
        arp_hub.save_pretrained(model, out, backbone="resnet18", model_args={"magic": 1})
    with pytest.raises(arp_hub.ArpHubError, match="'resnet999' is no registered timm model"):
        arp_hub.save_pretrained(model, out, backbone="resnet999")
    assert not list(tmp_path.iterdir())
    arp_hub.save_pretrained(model, out, backbone="resnet18", model_args={"layers": [1, 1, 1, 1]})
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(load(out)(x), model(x))


def test_arguments_that_json_cannot_hold(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", act_layer=nn.SiLU).eval()
    with pytest.raises(arp_hub.ArpHubError, match="act_layer"):
        arp_hub.save_pretrained(model, tmp_path / "out")
    folder = arp_hub.save_pretrained(model, tmp_path / "out", model_args={"act_layer": "silu"})
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(load(folder)(x), model(x))


def test_a_merged_standardised_model_would_load_as_another(tmp_path: Path) -> None:
    model = arp_hub.to_dense(low_rank_model("vit_tiny_r_s16_p8_224", {"patch_embed.backbone.conv": "channel"}))
    with pytest.raises(arp_hub.ArpHubError, match="'patch_embed.backbone.conv' is a Conv2dSame.*before to_dense"):
        arp_hub.save_pretrained(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda: nn.Linear(2, 2), {}, "Linear is not a timm classifier"),
        (lambda: timm.create_model("cifar_resnet20", features_only=True), {}, "FeatureListNet is not a timm"),
        (lambda: nn.DataParallel(small_model()), {}, "unwrapped"),
        (lambda: small_model().to("meta"), {}, "meta device"),
        (small_model, {"metrics": {"top1": float("nan")}}, "finite numbers"),
        (small_model, {"metrics": {"model": object()}}, "what JSON holds"),
        (small_model, {"metrics": {"top1": 250.0}}, "metrics\\['top1'\\] must lie between 0 and 100"),
        (small_model, {"metrics": {"dense": {"top5": -1}}}, "metrics\\['dense'\\]\\['top5'\\] must lie"),
        (small_model, {"metrics": {"dense": 3}}, "metrics\\['dense'\\]"),
        (small_model, {"label_names": ["cat", "dog"]}, "all 10 classes"),
        (small_model, {"model_args": {"num_classes": 3}}, "num_classes"),
    ],
)
def test_bad_input(make: Any, arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(arp_hub.ArpHubError, match=message):
        arp_hub.save_pretrained(make(), tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


# --- the folder -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("pictures")
def test_an_earlier_model_is_replaced_and_anything_else_is_not(tmp_path: Path) -> None:
    folder = arp_hub.save_pretrained(small_model(), tmp_path / "out")
    (folder / "spectra.png").write_bytes(b"a picture of the old model")
    arp_hub.save_pretrained(timm.create_model("cifar_resnet20", num_classes=2), folder)
    assert read(folder)["num_classes"] == 2 and names_in(folder) == FILES

    write_report(folder)
    arp_hub.save_pretrained(timm.create_model("cifar_resnet20", num_classes=3), folder)
    assert read(folder)["num_classes"] == 3 and names_in(folder) == FILES

    (folder / "notes.txt").write_text("mine")
    with pytest.raises(arp_hub.ArpHubError, match="'notes.txt'.*overwrite=True"):
        arp_hub.save_pretrained(small_model(), folder)
    assert (folder / "notes.txt").read_text() == "mine" and read(folder)["num_classes"] == 3
    arp_hub.save_pretrained(small_model(), folder, overwrite=True)
    assert names_in(folder) == PICTURED and names_in(tmp_path) == ["out"]


def test_what_the_owner_added_stays(tmp_path: Path) -> None:
    folder = arp_hub.save_pretrained(small_model(), tmp_path / "out")
    card = folder / "README.md"
    text = card.read_text().replace("<!-- /owner -->", "Made for cats.\n<!-- /owner -->")
    card.write_text(text.replace("\ntags:\n", "\nlanguage: en\ntags:\n- cats\n"))
    (folder / "mine.png").write_bytes(b"a picture of a cat")
    arp_hub.save_pretrained(timm.create_model("cifar_resnet20", num_classes=2), folder)
    kept = card.read_text()
    assert read(folder)["num_classes"] == 2 and (folder / "mine.png").read_bytes() == b"a picture of a cat"
    assert all(words in kept for words in ("Made for cats.", "language: en", "- cats", "cifar_resnet20"))

    (folder / "mine.png").chmod(0o444)
    for metrics, license, name in (
        ({"license": "made-up-nc"}, "other", "made-up-nc"),
        ({"license": "mit"}, "mit", None),
        ({"license": "made-up-nc"}, "other", "made-up-nc"),
        (None, "apache-2.0", None),  # that of the architecture's weights
    ):
        arp_hub.save_pretrained(small_model(), folder, metrics=metrics)
        head = ModelCard.load(card).data.to_dict()
        assert (head["license"], head.get("license_name")) == (license, name)
    assert (folder / "mine.png").exists()
    for make in (lambda path: path.mkdir(), lambda path: path.symlink_to(tmp_path / "gone")):
        make(folder / "b.png")
        with pytest.raises(arp_hub.ArpHubError, match="holds 'b.png', no file of a saved model"):
            arp_hub.save_pretrained(small_model(), folder)
        (folder / "b.png").unlink() if (folder / "b.png").is_symlink() else (folder / "b.png").rmdir()

    arp_hub.save_pretrained(small_model(), folder, overwrite=True)
    assert not (folder / "mine.png").exists() and "cats" not in card.read_text()


def test_folders_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    other.mkdir()
    check_folder(other)
    check_folder(tmp_path / "new")
    if Path("/proc").is_dir():  # its modes allow what the system refuses
        with pytest.raises(arp_hub.ArpHubError, match="nothing can be written in '/proc'"):
            check_folder("/proc/new")
    (other / "config.json").write_text('{"architecture": "resnet18"}')
    with pytest.raises(arp_hub.ArpHubError, match="another model"):
        check_folder(other)
    check_folder(other, overwrite=True)
    with pytest.raises(arp_hub.ArpHubError, match="is a file"):
        check_folder(other / "config.json", overwrite=True)
    monkeypatch.chdir(other)
    for here in (Path(), other, tmp_path):
        with pytest.raises(arp_hub.ArpHubError, match="contains the current directory"):
            check_folder(here, overwrite=True)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(arp_hub.ArpHubError, match="nothing can be written in '.*file'"):
        arp_hub.save_pretrained(small_model(), tmp_path / "file" / "out")


def nested(depth: int = 5_000) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


ODD: dict[str, dict[str, Any]] = {
    **{f"metrics {key} {value!r}": {"metrics": {key: value}}
       for key, values in {"top1": ("80", None, [1]), "dense": ("x", None, [1]), "history": (5, [1, 2], [{}, {}]),
                           "plan": (5, {"dense": 5}, {"dense": [1]}), "latency": (5, [5]), "scores": (5,)}.items()
       for value in values},
    "spectra": {"metrics": {"spectra": 5, "dense": {"spectra": 5}}},
    "spectra of text": {"metrics": {"spectra": {"a": "x"}, "dense": {"spectra": {"a": [1, 2]}}}},
    "top-1 of the dense model": {"metrics": {"top1": 5.0, "dense": {"top1": "x"}}},
    "nested metrics": {"metrics": {"a": nested()}},
    "an endless number": {"metrics": {"top1": float("inf")}},
    "a number of 5,001 digits": {"metrics": {"top1": 10**5_000}},
    "a tensor": {"metrics": {"top1": torch.tensor(3.0)}},
    "metrics in a list": {"metrics": [1, 2]},
    "labels are a number": {"label_names": 5},
    "labels by number": {"label_names": {k: f"class {k}" for k in range(10)}},
    "labels are one text": {"label_names": "abcdefghij"},
    "too few labels": {"label_names": ["a"]},
    "labels are missing": {"label_names": [None] * 10},
    "nested labels": {"label_names": [nested()] * 10},
    "arguments in a list": {"model_args": [1]},
    "nested arguments": {"model_args": {"x": nested()}},
    "an argument of loading": {"model_args": {"pretrained_strict": False}},
    "a tensor as an argument": {"model_args": {"x": torch.ones(2)}},
    "a backbone of numbers": {"backbone": 5},
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_odd_metrics_labels_and_arguments_are_refused(
    case: str, earlier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARP_HUB_PICTURES", "1")
    folder = Path(shutil.copytree(earlier, tmp_path / "out"))
    before = contents(folder)
    with pytest.raises(arp_hub.ArpHubError) as raised:
        arp_hub.save_pretrained(small_model(), folder, **ODD[case])
    assert len(str(raised.value)) < 500
    assert contents(folder) == before and names_in(tmp_path) == ["out"]


def test_half_a_surrogate_is_spelled_out(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(arp_hub.ArpHubError, match="not UTF-8"):
        arp_hub.save_pretrained(small_model(), tmp_path / os.fsdecode(b"\xff"))
    arp_hub.save_pretrained(small_model(), folder, metrics={"data": "\ud800", "top1": 5.0}, label_names=["\ud800"] * 10)
    assert "\\ud800" in (folder / "README.md").read_text(encoding="utf-8")
    assert load(folder).num_classes == 10


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model that is copied for each failure."""
    return arp_hub.save_pretrained(small_model(), tmp_path_factory.mktemp("earlier") / "out")


def in_child(work: Callable[..., None], *arguments: Any) -> None:
    """Run a check in a forked process, because audit hooks and limits of a process cannot be taken back."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def save_with_each_operation_failing(place: Path, error: BaseException, swap: bool) -> None:
    """Replace the model in ``old`` while the n-th file operation fails, for every n."""
    if not swap:
        ctypes.CDLL = lambda *arguments, **options: None  # a system that cannot exchange two folders in one step
    model = timm.create_model("cifar_resnet20")
    old, new = contents(place / "old"), contents(arp_hub.save_pretrained(model, place / "reference" / "out"))
    folder, seen, failing = place / "work" / "out", 0, 0

    def fail(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event in ("open", "os.rename", "os.mkdir", "os.chmod") and str(folder.parent) in str(arguments[:2]):
            seen += 1
            if seen == failing:
                raise error

    sys.addaudithook(fail)
    for number in itertools.count(1):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(place / "old", folder)
        seen, failing, refused = 0, number, False
        try:
            arp_hub.save_pretrained(model, folder)
        except (arp_hub.ArpHubError, KeyboardInterrupt) as raised:
            refused = isinstance(raised, arp_hub.ArpHubError)
        reached, failing = seen >= number, 0
        found = contents(folder)
        assert found in ([old] if refused else [old, new]), f"operation {number}"
        left = names_in(folder.parent) != ["out"]
        assert not left or found == new, f"operation {number}"  # what fails may be the deletion of the old folder
        for path in folder.parent.glob(".out.*"):
            shutil.rmtree(path)
        if not reached:
            break
    assert contents(folder) == new and number > 12


@pytest.mark.parametrize("swap", [True, False], ids=["swap", "no swap"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_a_failure_leaves_a_whole_folder(error: BaseException, swap: bool, earlier: Path, tmp_path: Path) -> None:
    shutil.copytree(earlier, tmp_path / "old")
    in_child(save_with_each_operation_failing, tmp_path, error, swap)


def save_with_little_space(folder: Path, sizes: list[int]) -> None:
    model, before = small_model(), contents(folder)
    for size in sizes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        with pytest.raises(arp_hub.ArpHubError, match=r"cannot save in .*the earlier content is unchanged"):
            arp_hub.save_pretrained(model, folder)
        assert contents(folder) == before and names_in(folder.parent) == [folder.name]


def test_a_file_that_is_cut_off_leaves_the_old_folder(earlier: Path, tmp_path: Path) -> None:
    """The first size stops the config, the last the weights, and those between stop the card and the picture."""
    folder = Path(shutil.copytree(earlier, tmp_path / "out"))
    written = sorted(path.stat().st_size for path in folder.iterdir())
    in_child(save_with_little_space, folder, [0, *(size - 1 for size in written)])


def save_until_a_rename(folder: Path, number: int) -> None:
    """End the process, as a kill does, before the n-th rename of a system without an exchange of folders."""
    ctypes.CDLL = lambda *arguments, **options: None
    model = timm.create_model("cifar_resnet20")
    count = itertools.count(1)
    sys.addaudithook(lambda event, _: os._exit(9) if event == "os.rename" and next(count) == number else None)
    arp_hub.save_pretrained(model, folder)
    os._exit(9)


@pytest.mark.parametrize(("rename", "is_new"), [(1, False), (2, False), (3, True)])
def test_what_a_kill_between_two_renames_leaves_is_put_back(
    rename: int, is_new: bool, earlier: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(earlier, tmp_path / "out"))
    old = contents(folder)
    process = multiprocessing.get_context("fork").Process(target=save_until_a_rename, args=(folder, rename))
    process.start()
    process.join()
    assert process.exitcode == 9
    remove_unfinished(folder)
    assert names_in(tmp_path) == ["out"] and (contents(folder) != old) == is_new


def save_forever(folder: Path, first: int) -> None:
    model = timm.create_model("cifar_resnet20")
    for number in itertools.count(first):
        nn.init.constant_(model.fc.bias, number)
        arp_hub.save_pretrained(model, folder)


def test_a_killed_process_leaves_a_whole_folder(tmp_path: Path) -> None:
    folder = arp_hub.save_pretrained(timm.create_model("cifar_resnet20"), tmp_path / "out")
    for moment in range(1, 5):
        process = multiprocessing.get_context("fork").Process(target=save_forever, args=(folder, 100 * moment))
        process.start()
        try:
            while int(load(folder).fc.bias[0]) < 100 * moment + 1:  # a reader finds a whole folder at any moment
                assert process.is_alive()
                process.join(0.05)  # loading all the time would slow the saves
            process.join(0.07 * moment)
        finally:
            process.kill()
            process.join()
        assert names_in(folder) == FILES
        assert 0 < load(folder).fc.bias[0] - 100 * moment < 100
    arp_hub.save_pretrained(small_model(), folder)
