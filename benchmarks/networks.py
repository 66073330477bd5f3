"""The trained networks of the benchmarks, with their calibration and test images.

All come from one folder: checkpoints under ``weights/``, and data as parquet under ``data/``. CIFAR-10 is calibrated on
training images; ImageNet networks on one image of each class, and tested on images of the validation set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from arp_hub.hub.load import load_model
from arp_hub.training import Split, calibration_images, load_data

SEED = 0


@dataclass(frozen=True)
class Network:
    """A trained network and its data.

    Attributes:
        model: timm name.
        checkpoint: File under ``weights/``, without its ending; empty if rows train the dense network first.
        title: Name in tables.
        data: Folder under ``data/`` with the calibration images.
        images: Number of unlabelled calibration images.
        test: Folder under ``data/`` with the test images; ``data`` if empty.
        args: Arguments of the model.
    """

    model: str
    checkpoint: str
    title: str
    data: str = "cifar10"
    images: int = 1024
    test: str = ""
    args: Mapping[str, Any] = field(default_factory=dict)


def _imagenet(model: str, **args: Any) -> Network:
    return Network(model, f"{model}_imagenet", f"{model}, ImageNet", "imagenet-sample", 256, "imagenet-val", args=args)


NETWORKS = {
    "resnet20": Network("cifar_resnet20", "resnet20_cifar10", "ResNet-20, CIFAR-10"),
    "resnet56": Network("cifar_resnet56", "resnet56_cifar10", "ResNet-56, CIFAR-10"),
    "resnet110": Network("cifar_resnet110", "", "ResNet-110, CIFAR-10"),
    "lite0": _imagenet("tf_efficientnet_lite0"),
    "mobilenetv2": _imagenet(
        "mobilenetv2_100",
        pad_type="same",
        bn_eps=1e-3,
        pretrained_cfg_overlay={"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear", "crop_pct": 0.875},
    ),
    "vit": Network(
        "vit_small_patch14_dinov2",
        "vit_small_patch14_dinov2_cifar10_112",
        "ViT-S/14, CIFAR-10 at 112 px",
        images=256,
        args={
            "img_size": 112,
            "num_classes": 10,
            "pretrained_cfg_overlay": {"input_size": (3, 112, 112), "crop_pct": 1.0},
        },
    ),
}


def load_network(name: str, shared: Path) -> nn.Module:
    """The dense network with its trained weights in float32, in evaluation mode."""
    network = NETWORKS[name]
    model = load_model(network.model, pretrained=False, **network.args)
    state = load_file(shared / "weights" / f"{network.checkpoint}.safetensors")
    model.load_state_dict({key: value.float() for key, value in state.items()})
    return model.eval()


def calibration_of(
    name: str, model: nn.Module, shared: Path, count: int | None = None, copies: int | None = None, seed: int = SEED
) -> Tensor:
    """Unlabelled training images, the network's own number of them by default, with copies as recipes make them."""
    network = NETWORKS[name]
    data = load_data(str(shared / "data" / network.data), model, seed=seed)
    return calibration_images(data, count or network.images, copies=copies, seed=seed)


def held_out_of(name: str, model: nn.Module, shared: Path, count: int, seed: int = SEED) -> Split:
    """Labelled training images that `calibration_of` with the same seed does not take, to choose settings by."""
    data = load_data(str(shared / "data" / NETWORKS[name].data), model, seed=seed)
    return data.train.excerpt(count, seed, from_end=True)


def test_images_of(name: str, model: nn.Module, shared: Path, count: int | None = None) -> Split:
    """Labelled test images, which nothing is chosen on."""
    network = NETWORKS[name]
    split = load_data(str(shared / "data" / (network.test or network.data)), model, seed=SEED).test
    count = count or len(split)
    labels = None if split.labels is None else split.labels[:count]
    return dataclasses.replace(split, labels=labels, indices=split.indices[:count])
