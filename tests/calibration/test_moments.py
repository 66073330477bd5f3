"""Second moments: streamed, sampled, shrunk; images in batches."""

import pytest
import torch
from torch import nn

from arp_hub.calibration.images import batches
from arp_hub.calibration.moments import PatchMoments, StationaryMoments, patches
from arp_hub.calibration.passes import all_moments
from arp_hub.layers.low_rank import layer_shape
from arp_hub.schemes import SCHEMES


def test_moments_do_not_depend_on_batches_and_match_the_plain_sum():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2, bias=False).double()
    shape, images = layer_shape(conv), torch.randn(10, 4, 9, 8, dtype=torch.float64)
    whole, parts = (PatchMoments(shape, torch.device("cpu"), 1e9) for _ in range(2))
    whole.update(images, conv(images))
    for batch in images.split(3):
        parts.update(batch, conv(batch))
    for name in ("xx", "yx", "x", "y"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name))
    columns = patches(images, shape).permute(1, 2, 0, 3).flatten(2)
    torch.testing.assert_close(whole.xx.triu(), (columns @ columns.mT).triu())
    assert whole.count == parts.count == columns.shape[-1]
    problem = whole.regression(conv.weight.detach())
    torch.testing.assert_close(problem.target, conv.weight.detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("stride", [1, 2])
def test_patches_at_some_positions_are_those_of_all(stride):
    conv = nn.Conv2d(4, 6, (3, 5), padding=(1, 2), stride=stride, dilation=(1, 2), groups=2)
    images, positions = torch.randn(3, 4, 13, 14), torch.tensor([0, 5, 17, 2])
    shape = layer_shape(conv)
    torch.testing.assert_close(patches(images, shape, positions=positions), patches(images, shape)[..., positions])


@pytest.mark.parametrize(("macs", "known", "images"), [(2.5e8, False, 16), (1e8, False, 40), (2.5e8, True, 150)])
def test_few_positions_of_a_large_map_stand_for_all(macs, known, images):
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 8, 3, padding=1)
    smooth = nn.functional.conv2d(torch.randn(images, 3, 68, 68), torch.randn(64, 3, 5, 5))
    shape, device = layer_shape(conv), torch.device("cpu")
    found = PatchMoments(shape, device, macs, paired=False, images=images if known else None)
    found.update(smooth, conv(smooth))
    assert found.count < images * 64 * 64 * (0.1 if known else 1)
    columns = patches(smooth, layer_shape(conv)).permute(1, 2, 0, 3).flatten(2)
    exact = columns @ columns.mT / columns.shape[-1]
    moment = found.regression(conv.weight.detach()).moment
    assert float((moment - exact).norm() / exact.norm()) < 0.1


@pytest.mark.parametrize(
    ("kernel", "dilation", "groups"), [((3, 3), (1, 1), 1), ((3, 5), (2, 1), 2), ((1, 3), (1, 2), 1)]
)
def test_stationary_moments_are_those_of_patches_everywhere(kernel, dilation, groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, kernel, padding=1, dilation=dilation, groups=groups, bias=False)
    shape, images = layer_shape(conv), 0.3 * torch.randn(10, 4, 9, 8) + torch.randn(10, 1, 9, 1) + 1
    cpu = torch.device("cpu")
    found, exact = StationaryMoments(shape, cpu, 1e9), PatchMoments(shape, cpu, 1e9, paired=False)
    for batch in images.split(4):
        found.update(batch, conv(batch))
        exact.update(batch, conv(batch))
    (down, right), (height, width) = dilation, kernel
    reach = ((width - 1) * right,) * 2 + ((height - 1) * down,) * 2
    everywhere = nn.functional.unfold(nn.functional.pad(images, reach), kernel, dilation)
    columns = everywhere.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(2)
    covariances = torch.stack([rows.cov(correction=0) for rows in columns])
    for problem, moment in (
        (found.regression(conv.weight.detach()), columns @ columns.mT / columns.shape[-1]),
        (found.regression(conv.weight.detach(), centred=True), covariances),
    ):
        kept, whole = problem.moment.triu(1), moment.triu(1)  # the diagonal is shrunk to
        share = (kept * whole).sum((1, 2), keepdim=True) / whole.square().sum((1, 2), keepdim=True)
        assert 0.2 < float(share.min()) <= 1
        torch.testing.assert_close(kept, share * whole, rtol=1e-3, atol=1e-5)
        assert torch.linalg.eigvalsh(problem.moment).min() > 0
    known = exact.regression(conv.weight.detach())
    torch.testing.assert_close((problem.x_mean, problem.y_mean), (known.x_mean, known.y_mean), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(problem.bias(conv.weight.detach()), torch.zeros(6), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [PatchMoments, StationaryMoments])
def test_few_images_tell_something_of_a_large_layer(kind):
    torch.manual_seed(0)
    conv = nn.Conv2d(128, 8, 3, padding=1, bias=False)
    images = torch.randn(128, 1, 1) * torch.randn(4, 1, 12, 12) + 0.1 * torch.randn(4, 128, 12, 12)
    found = kind(layer_shape(conv), torch.device("cpu"), 1e8)
    found.update(images, conv(images))
    moment = found.regression(conv.weight.detach()).moment
    assert float(moment.triu(1).norm() / moment.norm()) > 0.1  # no mere identity


def test_planning_holds_little_of_large_kernels_and_ranks_layers_alike():
    torch.manual_seed(0)
    smooth = nn.functional.interpolate(torch.randn(48, 8, 6, 6), scale_factor=2, mode="bilinear")
    model = nn.Sequential(nn.Conv2d(8, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 32, 3, padding=1, bias=False))
    layers = {"2": model[2]}
    rough, exact = (all_moments(model, layers, smooth, 1e8, stationary=stationary)["2"] for stationary in (True, False))
    assert isinstance(rough, StationaryMoments)
    curves = []
    for moments in (rough, exact):
        moment = moments.regression(model[2].weight.detach()).moment
        values = SCHEMES["channel"](layer_shape(model[2])).spectrum(model[2].weight.detach(), moment)[0].square()
        curves.append(1 - values.cumsum(0) / values.sum())
    assert curves[0][15] == pytest.approx(float(curves[1][15]), rel=0.2)


def test_batches_of_a_loader():
    loader = [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])), (torch.zeros(1, 3, 8, 8), torch.tensor([1]))]
    assert [len(batch) for batch in batches(loader)] == [2, 1]
    assert [len(batch) for batch in batches(loader, most=1)] == [1]
    assert [len(batch) for batch in batches(loader, most=9)] == [2, 1]
