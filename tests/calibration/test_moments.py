"""Second moments: streamed, sampled, shifted, shrunk; images in batches."""

import pytest
import torch
from torch import nn

from arp_hub.calibration.images import batches, limited
from arp_hub.calibration.moments import Moments, patches
from arp_hub.layers.low_rank import layer_shape

CPU = torch.device("cpu")
PLENTY = 1e12
"""A bound on multiply-accumulates that allows every position."""


def exact_moment(conv: nn.Conv2d, images: torch.Tensor, centred: bool) -> torch.Tensor:
    columns = patches(images, layer_shape(conv)).permute(1, 2, 0, 3).flatten(2)
    if centred:
        return torch.stack([rows.cov(correction=0) for rows in columns])
    return columns @ columns.mT / columns.shape[-1]


@pytest.mark.parametrize("centred", [False, True])
def test_moments_do_not_depend_on_batches_and_match_the_plain_sum(centred):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2, bias=False).double()
    shape, images = layer_shape(conv), torch.randn(400, 4, 9, 8, dtype=torch.float64) + 2
    weight = conv.weight.detach()
    problems = []
    for size in (400, 30):
        moments = Moments(shape, CPU, PLENTY, centred)
        for batch in images.split(size):
            moments.update(batch, conv(batch).detach())
        problems.append(moments.regression(weight))
        assert moments.count == 400 * 5 * 4
    for problem in problems:
        exact = exact_moment(conv, images, centred)
        assert float((problem.moment - exact).norm() / exact.norm()) < 0.01  # what is shrunk
        torch.testing.assert_close(problem.target, weight, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(problem.bias(weight), weight.new_zeros(6), rtol=0, atol=1e-9)
    torch.testing.assert_close(problems[0].x_mean, problems[1].x_mean)


@pytest.mark.parametrize(
    ("channels", "side"),
    [(2, 6), (5, 3), (230, 3)],
    ids=["a part has more patches than columns", "fewer", "fewer, and the product in blocks of rows"],
)
def test_shrinkage_follows_the_scatter_of_parts(channels, side):
    """Against the formula of Ledoit and Wolf, with the moment of every part written out."""
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, 2, 3, padding=1, bias=False)
    images = torch.randn(40, channels, side, side) + torch.randn(40, 1, 1, 1)
    moments, parts = Moments(layer_shape(conv), CPU, PLENTY), []
    for number, batch in enumerate(images.split(20)):
        moments.update(batch, conv(batch).detach(), number=number)
        parts += [patches(part, layer_shape(conv)).transpose(0, 2).flatten(1).double() for part in batch.split(2)]
    sums, counts = [part @ part.T for part in parts], torch.tensor([float(part.shape[1]) for part in parts])
    plain = sum(sums) / counts.sum()
    spread = sum(total.square().sum() for total in sums) - counts.square().sum() * plain.square().sum()
    variance = spread / (counts.sum() ** 2 - counts.square().sum())
    level = plain.diagonal().mean()
    even = level * torch.eye(len(plain), dtype=torch.float64)
    share = float(variance / (plain - even).square().sum())
    assert 0.01 < share < 0.9
    torch.testing.assert_close(
        moments.moment(torch.float64)[0], (1 - share) * plain + share * even, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("mean", [0.0, 3.0, 100.0])
def test_a_mean_that_is_taken_out_does_not_add_to_the_shrinkage(mean):
    """With a mean three times the spread, shrinkage of an uncentred moment would be far too strong."""
    torch.manual_seed(0)
    linear = nn.Linear(16, 4)
    shares = []
    for offset in (0.0, mean):
        torch.manual_seed(1)
        images = torch.randn(256, 20, 16) @ torch.randn(16, 16) + offset
        moments = Moments(layer_shape(linear), CPU, PLENTY, centred=True)
        moments.update(images, images @ linear.weight.detach().T)
        moment, exact = (
            moments.regression(linear.weight.detach()[..., None, None]).moment[0],
            images.flatten(0, 1).T.cov(),
        )
        shares.append(1 - float((moment.triu(1) * exact.triu(1)).sum() / exact.triu(1).square().sum()))
    assert shares[1] == pytest.approx(shares[0], abs=0.005)
    assert shares[1] < 0.05


def test_windows_of_one_image_are_one_image():
    """Window attention splits images. Windows of one image are similar, so few images are a small sample."""
    torch.manual_seed(0)
    linear = nn.Linear(24, 4)
    weight = linear.weight.detach()[..., None, None]
    images = torch.randn(24, 1, 1, 24).expand(24, 50, 1, 24) + 0.1 * torch.randn(24, 50, 4, 24)  # 50 windows each
    windows = images.flatten(0, 1)
    exact = windows.flatten(0, 1).T @ windows.flatten(0, 1) / windows[..., 0].numel()
    shares = {}
    for told in (2, 100):  # each batch holds two images, that is 100 windows
        moments = Moments(layer_shape(linear), CPU, PLENTY)
        for batch in windows.split(100):
            moments.update(batch, batch @ linear.weight.detach().T, images=told)
        shares[told] = 1 - float(moments.regression(weight).moment[0, 0, 1] / exact[0, 1])
    assert shares[2] > 2 * shares[100]
    assert shares[2] > 0.3  # 24 samples of 24 dimensions say little about their covariance


@pytest.mark.parametrize("stride", [1, 2])
def test_patches_at_some_positions_are_those_of_all(stride):
    conv = nn.Conv2d(4, 6, (3, 5), padding=(1, 2), stride=stride, dilation=(1, 2), groups=2)
    images, positions = torch.randn(3, 4, 13, 14), torch.tensor([0, 5, 17, 2])
    shape = layer_shape(conv)
    torch.testing.assert_close(patches(images, shape, positions=positions), patches(images, shape)[..., positions])


@pytest.mark.parametrize(("macs", "known", "images"), [(2.5e8, False, 16), (1e8, False, 40), (2.5e8, True, 60)])
def test_few_positions_of_a_large_map_stand_for_all(macs, known, images):
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 8, 3, padding=1)
    smooth = nn.functional.conv2d(torch.randn(images, 3, 68, 68), torch.randn(64, 3, 5, 5))
    found = Moments(layer_shape(conv), CPU, macs, paired=False, images=images if known else None)
    found.update(smooth, conv(smooth))
    assert found.count < images * 64 * 64 * (0.1 if known else 1)
    exact = exact_moment(conv, smooth, centred=False)
    moment = found.regression(conv.weight.detach()).moment
    assert float((moment - exact).norm() / exact.norm()) < 0.11


def test_few_images_tell_something_of_a_large_layer():
    torch.manual_seed(0)
    conv = nn.Conv2d(128, 8, 3, padding=1, bias=False)
    images = torch.randn(128, 1, 1) * torch.randn(4, 1, 12, 12) + 0.1 * torch.randn(4, 128, 12, 12)
    found = Moments(layer_shape(conv), CPU, 1e8)
    found.update(images, conv(images))
    moment = found.regression(conv.weight.detach()).moment
    assert float(moment.triu(1).norm() / moment.norm()) > 0.1  # more than a multiple of the identity


def test_batches_of_a_loader():
    loader = [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])), (torch.zeros(1, 3, 8, 8), torch.tensor([1]))]
    assert [len(batch) for batch in batches(loader)] == [2, 1]
    assert [len(batch) for batch in batches(loader, most=1)] == [1]
    assert [len(batch) for batch in batches(loader, most=9)] == [2, 1]


def test_a_limit_takes_evenly_spaced_images():
    images = torch.arange(100.0).view(100, 1, 1, 1)
    assert limited(images, 5).flatten().tolist() == [0, 25, 50, 74, 99]
    assert limited(images, 0) is images and limited(images, 100) is images
    assert sum(len(batch) for batch in batches(limited([images[:60], images[60:]], 70))) == 70
