"""Passes that start behind stored blocks see what full passes see."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from arp_hub import decompose, make_plan
from arp_hub.calibration import resumption
from arp_hub.calibration.resumption import ResumedPasses, block_chain


class Skipping(nn.Module):
    """A network whose last block reads the first one's output too."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.one(x)
        return self.three(self.two(first) + first).mean((2, 3))


class InPlace(nn.Module):
    """A network that changes the output of a block before the next one reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        x += 1
        return self.two(x).mean((2, 3))


TWO = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64}


def small(name: str) -> nn.Module:
    """A network of timm, with two blocks where it is a large transformer."""
    sizes = {"vit_small_patch16_dinov3": TWO, "eva02_tiny_patch14_224": {**TWO, "patch_size": 8}}
    sizes["naflexvit_base_patch16_gap"] = {"embed_dim": 192, "depth": 2, "num_heads": 3}
    sizes["cait_xxs24_224"] = {**TWO, "num_heads": 4, "depth": 6}
    return timm.create_model(name, num_classes=10, **sizes.get(name, {})).eval()


@pytest.mark.parametrize(
    ("name", "size", "inside"),
    [
        ("vit_small_patch16_dinov3", 64, {"blocks.0", "blocks.1"}),  # rotary embeddings beside the activations
        ("eva02_tiny_patch14_224", 64, {"blocks.0", "blocks.1"}),
        ("naflexvit_base_patch16_gap", 64, {"blocks.0", "blocks.1"}),
        ("cait_xxs24_224", 64, {"blocks.0", "blocks.1"}),
        ("pvt_v2_b0", 64, {"stages.0", "stages.3"}),
        ("cifar_resnet20", 32, {"conv1", "bn1", "layer2.1", "fc"}),
        ("test_resnet", 64, {"layer1", "layer4", "fc"}),
        ("test_vit", 160, {"blocks.0", "blocks.5", "norm"}),
        ("test_efficientnet", 64, {"conv_stem", "classifier"}),
        ("test_convnext", 64, {"stages.0", "head.fc"}),
    ],
)
def test_blocks_of_networks_are_found(name, size, inside):
    chain = block_chain(small(name), torch.randn(1, 3, size, size))
    assert inside <= set(chain)
    assert all(size > 0 for size in chain.values())


class ByFurtherArguments(nn.Module):
    """A network whose last block also takes what the first one gives, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), Sum()

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        return self.three(self.two(one), other=one).mean((2, 3))


class Sum(nn.Module):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return x + other.mean(1, keepdim=True)


class Mostly(nn.Module):
    """A chain of two small layers beside a large one."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(8, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        x = torch.cat([x, x], 1)[:, :4]
        return self.large(torch.cat([self.small(x), x], 1))


@pytest.mark.parametrize("network", [Skipping, InPlace, ByFurtherArguments, Mostly])
def test_a_network_that_is_no_chain_has_no_blocks(network):
    assert block_chain(network().eval(), torch.randn(1, 3, 8, 8)) == {}


@pytest.mark.parametrize(("name", "size"), [("cifar_resnet20", 32), ("test_vit", 160), ("test_efficientnet", 64)])
def test_stored_activations_change_nothing(monkeypatch, name, size):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    x = torch.randn(12, 3, size, size)
    plan = make_plan(model, keep_params=0.6, schemes=["channel"])
    found = []
    for stored in (2**30, 0):
        monkeypatch.setattr(resumption, "_STORED_BYTES", stored)
        found.append(decompose(copy.deepcopy(model), plan, x)(x))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_activations_of_one_block_make_room_for_those_of_the_next(monkeypatch):
    """Tensors that exist at the same time: those of one block at most, and those of one batch more."""
    model = timm.create_model("cifar_resnet20").eval()
    passes = ResumedPasses([model], torch.randn(5, 3, 32, 32).split(1), 5)
    compute, held = passes._output, []

    def output(*args):
        found = compute(*args)
        held.append(sum(len(outputs) for outputs in passes._stored.values()))
        return found

    monkeypatch.setattr(passes, "_output", output)
    passes.advance("layer1.1.conv1")
    assert set(held) == {0}  # batch 0 is seen twice
    held.clear()
    passes.advance("layer1.2.conv1")
    assert held == [5, 5, 4, 3, 2, 1]


class Leaving(nn.Module):
    """Its first block leaves its output on the third one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Conv2d(3 if first else 8, 8, 3, padding=1) for first in (1, 0, 0, 0)))
        self.head = nn.Linear(8, 4)
        self.blocks[0].register_forward_hook(self.leave)
        self.blocks[2].register_forward_hook(lambda module, args, output: output + self.left)

    def leave(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        self.left = output

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


def test_blocks_that_read_what_an_earlier_one_left_are_no_chain():
    torch.manual_seed(0)
    assert block_chain(Leaving().eval(), torch.randn(1, 3, 8, 8)) == {}
