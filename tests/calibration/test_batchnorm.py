"""BatchNorms behind dense layers follow what decomposed layers do to their input."""

import copy

import pytest
import torch
from timm.layers import FrozenBatchNormAct2d
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from arp_hub import LayerPlan, RankPlan, decompose, make_plan
from arp_hub.calibration.batchnorm import following_norms, renormalise


class Fading(nn.Module):
    """A layer to decompose, then dense layers behind BatchNorms whose statistics fit its full-rank output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.num_classes = 16
        self.before = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.behind = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1))
        self.last = nn.BatchNorm2d(16)

    def forward(self, x):
        return self.last(self.behind(self.middle(self.before(x)))).mean((2, 3))


def fading_with_statistics():
    model, images = Fading(), torch.randn(256, 16, 8, 8)
    for _ in range(60):
        model(torch.randn(64, 16, 8, 8))  # training mode moves the statistics to other images
    return model.eval(), images


def test_norms_of_dense_layers_follow_and_those_before_stay_as_they_are():
    model, images = fading_with_statistics()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    channels = {}
    for kind, network in (("dense", model), ("small", decompose(copy.deepcopy(model), FADED, [images]))):
        handle = network.last.register_forward_hook(
            lambda module, args, output, kind=kind: channels.update({kind: output})
        )
        with torch.no_grad():
            network(images)
        handle.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for name in ("before.1.running_mean", "before.1.running_var"):
        assert torch.equal(network.state_dict()[name], before[name])
    dense, small = (channels[kind].transpose(0, 1).flatten(1) for kind in ("dense", "small"))
    torch.testing.assert_close(small.mean(1), dense.mean(1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(small.std(1), dense.std(1), rtol=2e-2, atol=0)


FADED = RankPlan({"middle": LayerPlan("channel", 3)}, {})


@pytest.mark.parametrize("batch_size", [256, 32, 1])
def test_norms_follow_alike_in_batches_of_any_size(batch_size):
    model, images = fading_with_statistics()
    found = []
    for seen in ([images], list(images.split(batch_size))):
        small = decompose(copy.deepcopy(model), FADED)
        renormalise(small, model, seen, set())
        found.append(small.state_dict())
    for name in ("behind.1.running_var", "last.running_var"):
        torch.testing.assert_close(found[1][name], found[0][name], rtol=0.1, atol=0)


def test_small_batches_of_a_loader_count_as_a_tensor_does():
    """A BatchNorm that follows three images misleads all those behind it, so that batches are joined."""
    model, images = fading_with_statistics()
    found = []
    for seen in (images[:64], list(images[:64].split(3))):
        small = decompose(copy.deepcopy(model), FADED)
        renormalise(small, model, seen, set())
        found.append(small.state_dict())
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [FrozenBatchNorm2d, FrozenBatchNormAct2d])
def test_frozen_norms_follow_as_others_do(kind):
    model, images = fading_with_statistics()
    frozen = copy.deepcopy(model)
    for parent, name in ((frozen.before, "1"), (frozen.behind, "1"), (frozen, "last")):
        norm = parent.get_submodule(name)
        twin = kind(16, apply_act=False) if kind is FrozenBatchNormAct2d else kind(16)
        state = norm.state_dict()
        twin.load_state_dict({key: state[key] for key in twin.state_dict()})
        parent.add_module(name, twin)
    with torch.no_grad():
        torch.testing.assert_close(frozen(images), model(images), rtol=1e-4, atol=1e-4)
        small, cold = (decompose(one, FADED, images) for one in (model, frozen))
        torch.testing.assert_close(cold(images), small(images), rtol=1e-3, atol=1e-3)


def test_norms_follow_by_as_many_images_as_suffice():
    model, images = fading_with_statistics()
    parts, found = list(images.split(64)), []
    for seen, most in ((parts, 64), (parts[:1], None)):
        small = decompose(copy.deepcopy(model), FADED)
        renormalise(small, model, seen, set(), most)
        found.append(small.state_dict())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_planning_leaves_norms_as_they_were():
    model, images = fading_with_statistics()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    make_plan(model, keep_params=0.6, calibration=images, exclude=(), input_size=(16, 8, 8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Shared(nn.Module):
    """One BatchNorm behind two layers."""

    def __init__(self, shared):
        super().__init__()
        self.one, self.two = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.norm, self.num_classes = nn.BatchNorm2d(8), 8
        self.other = self.norm if shared else nn.BatchNorm2d(8)

    def forward(self, x):
        return self.other(self.two(self.norm(self.one(x)).relu())).mean((2, 3))


@pytest.mark.parametrize("shared", [False, True])
def test_a_norm_behind_two_layers_takes_the_mean_of_neither(shared):
    model = Shared(shared).eval()
    found = following_norms(model, {"one": model.one, "two": model.two}, [torch.randn(4, 8, 6, 6)])
    assert found == ({} if shared else {"one": model.norm, "two": model.other})


class TokenNorm(nn.Module):
    """A linear layer over tokens, whose BatchNorm has the channels in another dimension."""

    def __init__(self, tokens, channels, named):
        super().__init__()
        self.named = named
        self.mix, self.norm = nn.Linear(tokens, 48), nn.BatchNorm1d(channels)
        self.num_classes = 48

    def forward(self, x):
        mixed = self.mix(x.flatten(2))
        return (self.norm(input=mixed) if self.named else self.norm(mixed)).mean(1)


@pytest.mark.parametrize("named", [False, True], ids=["by position", "by name"])
@pytest.mark.parametrize("channels", [48, 32])
def test_a_norm_of_another_dimension_takes_no_shift(channels, named):
    torch.manual_seed(0)
    model, images = TokenNorm(64, channels, named).eval(), torch.randn(96, channels, 8, 8)
    assert not following_norms(model, {"mix": model.mix}, images)
    decompose(model, RankPlan({"mix": LayerPlan("channel", 12)}), images)
