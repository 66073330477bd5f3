"""Kept models and stored plans give the plans and outputs in `golden/`.

    python tests/test_golden.py --shared ../shared      rewrites golden/ after an intended change

Outputs are recorded for several CPUs, each with its torch. There they are compared bit for bit; elsewhere kernels round
differently, and outputs are compared to 1e-4. Fits by images are iterative: elsewhere ranks may be one or two off, and
rounding moves the outputs of one fit by 1 to 5 %. So the mean of several fits by the recorded plan is compared to 3 %,
where switching one heuristic of the fit off changes 10 % and more. The mean may come from any CPU.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest
import timm
import torch
from datasets import load_dataset
from safetensors.torch import load_file, save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

import arp_hub

HERE = Path(__file__).parent
GOLDEN, KEPT = HERE / "golden", HERE.parent / "benchmarks" / "models"
MODELS = sorted(folder.name for folder in KEPT.iterdir())
BY_SHAPE = {"cifar_resnet20": 0.35, "cifar_resnet56": 0.35, "tf_efficientnet_lite0": 0.7, "resnet50": 0.4}
BY_WEIGHTS = {
    "cifar_resnet20": ("resnet20_cifar10.safetensors", 0.5),
    "cifar_resnet56": ("resnet56_cifar10.safetensors", 0.35),
    "tf_efficientnet_lite0": ("tf_efficientnet_lite0_imagenet.safetensors", 0.7),
}


def machine() -> dict[str, str]:
    """Facts that the last bits of an output depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    kind = {name: facts.get(name, "unknown") for name in ("cpu family", "model", "stepping")}
    return {"cpu": facts.get("model name", "unknown"), **kind, "torch": torch.__version__, "timm": timm.__version__}


def batch(side: int) -> Tensor:
    return torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0)).mul_(4).sub_(2)


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    return model.eval()(batch(32 if type(model).__name__.startswith("Cifar") else 224))


def kept_model(name: str) -> nn.Module:
    return timm.create_model(f"local-dir:{KEPT / name}", pretrained=True)


def plan_by_shape(name: str) -> arp_hub.RankPlan:
    with torch.device("meta"), pytest.warns(UserWarning, match="meta device"):
        return arp_hub.make_plan(timm.create_model(name), keep_params=BY_SHAPE[name])


def decomposed_by_shape(name: str) -> nn.Module:
    """Seeded weights, decomposed by the stored plan."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    return arp_hub.decompose(model, arp_hub.RankPlan.load(GOLDEN / f"{name}-shape.json"))


def trained(name: str, shared: Path) -> nn.Module:
    model = timm.create_model(name).eval()
    model.load_state_dict(load_file(shared / "weights" / BY_WEIGHTS[name][0]), strict=False)
    return model


def plan_by_weights(name: str, shared: Path) -> arp_hub.RankPlan:
    return arp_hub.make_plan(trained(name, shared), keep_params=BY_WEIGHTS[name][1])


def calibration(shared: Path) -> Tensor:
    """128 training images of CIFAR-10."""
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    files = str(shared / "data/cifar10/train-*.parquet")
    rows = load_dataset("parquet", data_files=files, split="train[:128]")
    pixels = torch.stack([pil_to_tensor(image.convert("RGB")) for image in rows["img"]])
    return (pixels / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def by_images(shared: Path) -> tuple[arp_hub.RankPlan, Tensor]:
    """ResNet-20 planned and fitted on images: the plan, and the outputs."""
    model = trained("cifar_resnet20", shared)
    images = calibration(shared)
    plan = arp_hub.make_plan(model, keep_params=0.35, calibration=images, effort="fast")
    return plan, outputs(arp_hub.decompose(model, plan, images, effort="fast"))


def mean_of_fits(shared: Path, plan: arp_hub.RankPlan, fits: int = 6) -> Tensor:
    """The mean outputs of fits whose images differ by as much as kernels round."""
    images, found = calibration(shared), []
    for seed in range(fits):
        rounding = 1e-6 * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
        model = trained("cifar_resnet20", shared)
        found.append(outputs(arp_hub.decompose(model, plan, images * (1 + rounding), effort="fast")))
    return torch.stack(found).mean(0)


def recorded(file: str) -> tuple[Path, bool]:
    """The folder with a file to compare with, and whether a machine like this one made it: then every bit counts."""
    folders = sorted(path.parent for path in GOLDEN.glob(f"*/{file}"))
    for folder in folders:
        if json.loads((folder / "machine.json").read_text()).items() <= machine().items():
            return folder, True
    return folders[0], False


def same(found: Tensor, key: str) -> bool:
    folder, exactly = recorded("outputs.safetensors")
    expected = load_file(folder / "outputs.safetensors")
    if key not in expected:  # the model is newer than what this machine recorded
        exactly = False
        expected = next(one for path in GOLDEN.glob("*/outputs.safetensors") if key in (one := load_file(path)))
    return torch.equal(found, expected[key]) if exactly else torch.allclose(found, expected[key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_kept_models_load_evaluate_and_save(name: str, tmp_path: Path) -> None:
    model = kept_model(name)
    assert same(outputs(model), name)
    saved = arp_hub.save_pretrained(model, tmp_path / "out")
    kept = load_file(KEPT / name / "model.safetensors")
    again = load_file(saved / "model.safetensors")
    assert list(again) == list(kept)
    assert all(torch.equal(again[key], kept[key]) for key in kept)
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (saved, KEPT / name))
    assert config["pretrained_cfg"].pop("label_names") == before["label_names"]  # timm notes them there, too
    assert config == before


@pytest.mark.parametrize("name", BY_SHAPE)
def test_plans_by_shape(name: str) -> None:
    stored = arp_hub.RankPlan.load(GOLDEN / f"{name}-shape.json")
    assert plan_by_shape(name) == stored
    assert stored.to_json() + "\n" == (GOLDEN / f"{name}-shape.json").read_text()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "resnet50" else name for name in BY_SHAPE]
)
def test_stored_plans_decompose_evaluate_and_save(name: str, tmp_path: Path) -> None:
    model = decomposed_by_shape(name)
    found = outputs(model)
    assert same(found, f"{name}-shape")
    saved = arp_hub.save_pretrained(model, tmp_path / "out")
    assert torch.equal(outputs(timm.create_model(f"local-dir:{saved}", pretrained=True)), found)


@pytest.mark.parametrize("name", BY_WEIGHTS)
def test_plans_by_weights(name: str, shared: Path) -> None:
    assert plan_by_weights(name, shared) == arp_hub.RankPlan.load(GOLDEN / f"{name}-weights.json")


def test_plan_and_fit_by_images(shared: Path) -> None:
    folder, exactly = recorded("cifar_resnet20-images.json")
    stored = arp_hub.RankPlan.load(folder / "cifar_resnet20-images.json")
    plan, found = by_images(shared)
    if exactly:
        assert plan == stored
        assert same(found, "cifar_resnet20-images")
    else:
        assert {name: layer.scheme for name, layer in plan.layers.items()} == {
            name: layer.scheme for name, layer in stored.layers.items()
        }
        for name, layer in plan.layers.items():
            assert layer.rank == pytest.approx(stored.layers[name].rank, rel=0.03, abs=1), name
        expected = load_file(folder / "outputs.safetensors")["cifar_resnet20-images-mean"]
        assert (mean_of_fits(shared, stored) - expected).norm() < 0.03 * expected.norm()


def write(shared: Path) -> None:
    torch.set_num_threads(1)
    folder = GOLDEN / re.sub(r"\W+", "-", machine()["cpu"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "machine.json").write_text(json.dumps(machine(), indent=2) + "\n")
    found = {name: outputs(kept_model(name)) for name in MODELS}
    for name in BY_SHAPE:
        plan_by_shape(name).save(GOLDEN / f"{name}-shape.json")
        found[f"{name}-shape"] = outputs(decomposed_by_shape(name))
    for name in BY_WEIGHTS:
        plan_by_weights(name, shared).save(GOLDEN / f"{name}-weights.json")
    plan, found["cifar_resnet20-images"] = by_images(shared)
    plan.save(folder / "cifar_resnet20-images.json")
    found["cifar_resnet20-images-mean"] = mean_of_fits(shared, plan)
    save_file(found, folder / "outputs.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ and weights/")
    write(parser.parse_args().shared)
