"""A sum of symmetric products is that of whole matrices; wide ones take about half of the memory."""

from __future__ import annotations

import pytest
import torch

from arp_hub.calibration.symmetric_sum import SymmetricSum

CPU = torch.device("cpu")


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("side", [1, 7, 255, 256, 257, 700])
def test_it_is_the_sum_of_whole_products(groups, side):
    generator = torch.Generator().manual_seed(side)
    found, expected = SymmetricSum(groups, side, CPU), torch.zeros(groups, side, side, dtype=torch.float64)
    for count in (1, 40):
        columns = torch.randn(groups, side, count, generator=generator)
        product = columns.double() @ columns.double().mT
        expected += product
        norm = found.add(columns, norm=True).double()
        torch.testing.assert_close(norm, product.square().sum((1, 2)), rtol=1e-5, atol=0)
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.matrix(torch.float64), expected, rtol=0, atol=1e-6 * scale)
    single = found.matrix(torch.float32)
    assert torch.equal(single, found.matrix(torch.float64).float())
    torch.testing.assert_close(single, single.mT, rtol=0, atol=1e-6 * scale)


def test_parts_add_up_to_the_same_in_any_order():
    parts = [torch.randn(2, 300, 20, generator=torch.Generator().manual_seed(k)) for k in range(6)]
    found = []
    for order in ([0, 1, 2, 3, 4, 5], [5, 2, 0, 4, 1, 3]):
        total = SymmetricSum(2, 300, CPU)
        for k in order:
            assert total.add(parts[k]) is None
        found.append(total.matrix(torch.float64))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_a_wide_sum_takes_about_half_of_its_matrix():
    held = sum(block.numel() for block in SymmetricSum(1, 4608, CPU).blocks)
    assert held < 0.53 * 4608**2
