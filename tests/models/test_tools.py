"""Compressed models in other packages: the code of the pages about them runs and does what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import low_rank_model
from torch import nn

import arp_hub
from arp_hub.layers.model import count_params, low_rank_layers

PAGES = Path(__file__).parents[2] / "docs" / "how-to"


@pytest.fixture
def run_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the code of a page in an empty folder. Returns its names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ARP_HUB_PICTURES", "0")
    torch.manual_seed(0)

    def run(name: str) -> dict[str, Any]:
        names: dict[str, Any] = {"__name__": name}
        text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
        exec("\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)), names)
        return names

    return run


@torch.no_grad()
def output(model: nn.Module, *shape: int) -> torch.Tensor:
    return model.eval()(torch.randn(*shape, generator=torch.Generator().manual_seed(1)))


def load(folder: str) -> nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_peft(run_page: Any) -> None:
    pytest.importorskip("peft")
    page = run_page("peft")
    assert all(name.rpartition(".")[0].endswith("attn.qkv.factors") for name in page["names"])
    expected = output(page["loaded"], 1, 3, 160, 160)  # the adapter on top of the compressed model
    assert not torch.allclose(expected, output(load("out"), 1, 3, 160, 160), atol=1e-4)
    torch.testing.assert_close(output(load("merged"), 1, 3, 160, 160), expected, rtol=1e-4, atol=1e-5)
    assert count_params(load("merged")) == count_params(load("out"))


def test_transformers(run_page: Any) -> None:
    transformers = pytest.importorskip("transformers")
    page = run_page("transformers")
    assert page["wrapped"].config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert {answer["label"] for answer in page["answers"]} == {"cat", "dog", "owl"}
    assert low_rank_layers(page["wrapped"].timm_model)
    expected = output(load("out"), 1, 3, 160, 160)
    torch.testing.assert_close(output(page["wrapped"], 1, 3, 160, 160).logits, expected)
    page["wrapped"].save_pretrained("again")
    again = transformers.AutoModelForImageClassification.from_pretrained("again")
    torch.testing.assert_close(output(again, 1, 3, 160, 160).logits, expected)


def test_transformers_loads_a_decomposed_classifier(tmp_path: Any) -> None:
    """Of another number of classes than the backbone's, which transformers does not pass with a pretrained_cfg."""
    transformers = pytest.importorskip("transformers")
    model = low_rank_model("test_resnet", {"fc": "channel", "layer1.0.conv1": "channel"}, num_classes=100)
    folder = arp_hub.save_pretrained(model, tmp_path / "out")
    found = transformers.AutoModelForImageClassification.from_pretrained(folder)
    torch.testing.assert_close(output(found, 1, 3, 96, 96).logits, output(model.eval(), 1, 3, 96, 96))


def test_segmentation(run_page: Any) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    page = run_page("segmentation")
    assert page["masks"].shape == (2, 2, 64, 64)
    encoder, saved = (dict(model.named_parameters()) for model in (page["unet"].encoder.model, load("out")))
    shared = encoder.keys() & saved.keys()  # all but the classifier
    assert len(shared) > 40 and all(torch.equal(encoder[key], saved[key]) for key in shared)
    assert all(name.startswith("encoder.") for name in low_rank_layers(page["trained"]))
    assert low_rank_layers(page["trained"]).keys() == low_rank_layers(page["loaded"]).keys() != set()
    torch.testing.assert_close(output(page["loaded"], 1, 3, 64, 64), output(page["trained"], 1, 3, 64, 64))
    with pytest.raises(arp_hub.ArpHubError, match="Unet is not a timm classifier"):
        arp_hub.save_pretrained(page["trained"], "whole")
    assert not Path("whole").exists()


def test_lightning(run_page: Any) -> None:
    lightning = pytest.importorskip("lightning")
    page = run_page("lightning")
    assert page["trainer"].callbacks[0].penalty.phase == "done"
    torch.testing.assert_close(output(load("out"), 1, 3, 32, 32), output(page["model"], 1, 3, 32, 32))

    def train(folder: str, resume: str | None = None, **options: Any) -> nn.Module:
        torch.manual_seed(0)
        model = timm.create_model("cifar_resnet20")
        penalty = page["RankPenalty"](page["plan"])
        each = lightning.pytorch.callbacks.ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")
        options = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False, **options}
        trainer = lightning.Trainer(callbacks=[penalty, each], **options)
        loader = torch.utils.data.DataLoader(page["images"], batch_size=4)
        trainer.fit(page["Classifier"](model), loader, ckpt_path=resume)
        assert penalty.steps == trainer.global_step == penalty.penalty.step_count
        return model

    whole = train("whole")
    resumed = train("rest", resume="whole/epoch=0.ckpt")
    torch.testing.assert_close(output(resumed, 1, 3, 32, 32), output(whole, 1, 3, 32, 32))
    train("parts", accumulate_grad_batches=2)


def test_torchvision(run_page: Any) -> None:
    page = run_page("torchvision")
    assert low_rank_layers(page["model"])
    expected = output(page["model"], 1, 3, 64, 64)
    torch.testing.assert_close(output(page["loaded"], 1, 3, 64, 64), expected)
    with pytest.raises(
        arp_hub.ArpHubError, match=r"timm could not build it again.*keep the plan .* and the state_dict"
    ):
        arp_hub.save_pretrained(page["model"], "saved")
    assert not Path("saved").exists()
    dense = arp_hub.to_dense(page["loaded"])
    with pytest.raises(arp_hub.ArpHubError, match="pass input_size="):
        arp_hub.make_plan(dense, keep_params=0.5)
    torch.testing.assert_close(output(dense, 1, 3, 64, 64), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("qkv", ["blocks.0.attn.qkv.factors.0", "blocks.1.attn.qkv"]),
        ("blocks.0.*", ["blocks.0.attn.qkv.factors.0", "blocks.0.attn.proj", "blocks.0.mlp.fc1.factors.0",
                        "blocks.0.mlp.fc1.factors.1", "blocks.0.mlp.fc2"]),
        (["mlp.fc2", "head"], ["blocks.0.mlp.fc2", "blocks.1.mlp.fc2", "head"]),
        ("patch_embed.proj", ["patch_embed.proj"]),
    ],
)  # fmt: skip
def test_names_of_factors(pattern: Any, expected: list[str]) -> None:
    model = timm.create_model("test_vit", depth=2)
    layers = {
        "blocks.0.attn.qkv": arp_hub.LayerPlan("group_out", 4, 4),
        "blocks.0.mlp.fc1": arp_hub.LayerPlan("channel", 4),
    }
    arp_hub.decompose(model, arp_hub.RankPlan(layers))
    assert arp_hub.factor_names(model, pattern) == expected
    modules = dict(model.named_modules())
    assert {type(modules[name]) for name in expected} <= {nn.Linear, nn.Conv2d}


def test_names_of_depthwise_layers_and_factors_are_left_out() -> None:
    model = timm.create_model("test_efficientnet")
    name = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and module.groups > 1)
    assert name not in arp_hub.factor_names(model) and len(arp_hub.factor_names(model)) > 10


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(arp_hub.ArpHubError, match="pattern 'qkv' matches no layer of this ResNet: it has 'conv1.0'"):
        arp_hub.factor_names(timm.create_model("test_resnet"), ["fc", "qkv"])
