"""The mathematics of every scheme on every kind of layer: exactness, costs, nearest points, fits."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from arp_hub import ArpHubError, LayerPlan
from arp_hub.layers.low_rank import effective_weight, low_rank_layer
from arp_hub.layers.model import count_params
from arp_hub.schemes import SCHEMES, make_scheme, relative_error
from arp_hub.schemes.linalg import orthonormal, solve_spd
from arp_hub.schemes.shapes import LayerShape, chain_macs

SHAPES = {
    "3x3": LayerShape(12, 8, (3, 3), padding=(1, 1)),
    "strided": LayerShape(8, 12, (3, 3), stride=(2, 1), padding=(1, 1)),
    "dilated": LayerShape(8, 8, (3, 3), padding=(2, 1), dilation=(2, 1)),
    "rectangular": LayerShape(12, 8, (3, 5), padding=(1, 2)),
    "patchify": LayerShape(16, 4, (4, 4), stride=(4, 4)),
    "1x7": LayerShape(8, 8, (1, 7), padding=(0, 3)),
    "1x1": LayerShape(24, 8),
    "grouped": LayerShape(12, 8, (3, 3), padding=(1, 1), groups=2),
    "linear": LayerShape(24, 8, kind="linear"),
}
CASES = [
    pytest.param(shape, name, groups, id=f"{kind}-{name}-{groups}")
    for kind, shape in SHAPES.items()
    for name, scheme in SCHEMES.items()
    for groups in ((1, 2) if scheme.grouped else (1,))
    if scheme.refusal(shape, groups) is None
]


def dense_layer(shape: LayerShape) -> nn.Module:
    torch.manual_seed(0)
    if shape.kind == "linear":
        return nn.Linear(shape.in_channels, shape.out_channels).double()
    geometry = (shape.kernel_size, shape.stride, shape.padding, shape.dilation, shape.groups)
    return nn.Conv2d(shape.in_channels, shape.out_channels, *geometry).double()


def images(shape: LayerShape) -> torch.Tensor:
    torch.manual_seed(1)
    size = (2, 5, shape.in_channels) if shape.kind == "linear" else (2, shape.in_channels, 12, 13)
    return torch.randn(size, dtype=torch.float64)


def low_rank(dense: nn.Module, name: str, groups: int, rank: int) -> nn.Module:
    layer = low_rank_layer(dense, LayerPlan(name, rank, groups))
    layer.load_factors(layer.scheme.nearest(effective_weight(dense), rank), dense.bias)
    return layer


def columns(kind):
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(2, 60, 20), full_matrices=False)
    if kind == "decaying":
        s = torch.logspace(0, -3, 20).expand(2, -1)
    elif kind == "dependent":
        s = s * (torch.arange(20) < 8)
    elif kind == "zero":
        s = torch.zeros(2, 20)
    return (u * s[:, None]) @ v if kind != "scaled" else u * torch.logspace(-18, 18, 20)


@pytest.mark.parametrize("kind", ["random", "decaying", "scaled", "dependent", "zero"])
def test_an_orthonormal_basis_spans_the_columns(kind):
    matrix = columns(kind)
    basis = orthonormal(matrix)
    assert basis.isfinite().all()
    norms = matrix.norm(dim=-2, keepdim=True).clamp_min(1e-30)
    torch.testing.assert_close(basis @ (basis.mT @ (matrix / norms)), matrix / norms, rtol=0, atol=1e-4)
    if kind in ("random", "decaying", "scaled"):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(20).expand(2, -1, -1), rtol=0, atol=1e-4)
    else:
        assert torch.linalg.svdvals(basis).max() < 1.01


@pytest.mark.parametrize("degenerate", [False, True])
def test_wider_numbers_solve_alike_and_never_fail(degenerate):
    torch.manual_seed(0)
    mode = torch.randn(2, 12, 30)
    if degenerate:
        mode[:, 6:] = mode[:, :6] + 1e-4 * torch.randn(2, 6, 30)
    right = torch.randn(2, 12, 5)
    wide = mode.double() @ mode.double().mT
    found = solve_spd(wide, right)
    assert found.dtype == torch.float32
    ridge = wide.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * 100 * torch.finfo(torch.float32).eps
    expected = torch.linalg.solve(wide + ridge * torch.eye(12, dtype=torch.float64), right.double())
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shape", "name", "groups"), CASES)
def test_full_rank_is_exact(shape, name, groups):
    dense, x = dense_layer(shape), images(shape)
    layer = low_rank(dense, name, groups, make_scheme(name, shape, groups).max_rank)
    assert (layer(x) - dense(x)).norm() < 1e-5 * dense(x).norm()


@pytest.mark.parametrize(("shape", "name", "groups"), CASES)
def test_chain_equals_its_dense_form_and_costs_what_it_says(shape, name, groups):
    dense, x = dense_layer(shape), images(shape)
    scheme = make_scheme(name, shape, groups)
    rank = max(1, scheme.max_rank // 2)
    layer = low_rank(dense, name, groups, rank)
    merged = layer.dense_layer()
    torch.testing.assert_close(layer(x), merged(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.weight, merged.weight.detach())
    assert count_params(layer) == scheme.params(rank) + dense.bias.numel()
    if shape.kind == "conv":
        convs, size, macs = scheme.convs(rank), (12, 13), 0
        for conv in convs:
            size = conv.output_size(size)
            macs += math.prod(conv.weight_shape) * math.prod(size)
        assert size == tuple(dense(x).shape[-2:])
        assert chain_macs(convs, (12, 13)) == macs


@pytest.mark.parametrize(("shape", "name", "groups"), CASES)
def test_nearest_falls_with_rank_and_beats_chance(shape, name, groups):
    weight = effective_weight(dense_layer(shape))
    scheme = make_scheme(name, shape, groups)
    ranks = sorted({1, max(1, scheme.max_rank // 3), max(1, scheme.max_rank // 2), scheme.max_rank})
    errors = [float(relative_error(weight, scheme.compose(scheme.nearest(weight, rank)))) for rank in ranks]
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(errors))
    assert errors[0] < 1
    assert errors[-1] < 1e-9


@pytest.mark.parametrize(("shape", "name", "groups"), CASES)
def test_warm_start_settles_on_a_point_of_the_set(shape, name, groups):
    weight = effective_weight(dense_layer(shape))
    scheme = make_scheme(name, shape, groups)
    rank = max(1, scheme.max_rank // 2)
    on_set = scheme.compose(scheme.nearest(weight, rank))
    start = scheme.basis(scheme.nearest(weight + 0.05 * weight.std() * torch.randn_like(weight), rank))
    error = float(relative_error(on_set, scheme.compose(scheme.nearest(on_set, rank, start=start, sweeps=50))))
    assert error < 5e-3


@pytest.mark.parametrize(("shape", "name", "groups"), CASES)
def test_fit_in_a_metric_beats_the_weight_metric(shape, name, groups):
    weight = effective_weight(dense_layer(shape))
    scheme = make_scheme(name, shape, groups)
    columns = shape.group_in * shape.taps
    x = torch.randn(shape.groups, columns, 3 * columns, dtype=torch.float64) * torch.linspace(0.1, 3, columns)[:, None]
    moment = x @ x.mT / x.shape[-1]
    rank = max(1, scheme.max_rank // 3)
    plain = scheme.nearest(weight, rank)
    fitted = scheme.fit(weight, moment, plain)
    before, after = (float(relative_error(weight, scheme.compose(f), moment)) for f in (plain, fitted))
    assert after < before
    assert [f.shape for f in fitted] == [conv.weight_shape for conv in scheme.convs(rank)]


@pytest.mark.parametrize(("shape", "name", "groups"), CASES)
def test_a_stack_is_fitted_as_its_layers_are_one_by_one(shape, name, groups):
    torch.manual_seed(0)
    scheme, columns, layers = make_scheme(name, shape, groups), shape.group_in * shape.taps, 3
    rank = max(1, scheme.max_rank // 3)
    weights = torch.randn(layers, shape.out_channels, shape.group_in, *shape.kernel_size, dtype=torch.float64)
    roots = torch.randn(layers, shape.groups, columns, 2 * columns, dtype=torch.float64)
    moments = roots @ roots.mT / columns * torch.tensor([1e-3, 1.0, 1e3])[:, None, None, None]
    starts = [scheme.fit_start(weight, rank) for weight in weights]
    stacked = scheme.stacked(layers)
    start = stacked.fit_start(weights.flatten(0, 1), rank)
    for parts, one in zip(zip(*(factor.chunk(layers) for factor in start), strict=True), starts, strict=True):
        torch.testing.assert_close(scheme.compose(parts), scheme.compose(one))
    together = stacked.fit(weights.flatten(0, 1), moments.flatten(0, 1), start, 300, layers)
    apart = zip(*(factor.chunk(layers) for factor in together), strict=True)
    for weight, moment, one, found in zip(weights, moments, starts, apart, strict=True):
        alone = scheme.fit(weight, moment, one, 300)
        errors = [float(relative_error(weight, scheme.compose(factors), moment)) for factors in (found, alone)]
        assert errors[0] == pytest.approx(errors[1], rel=0.05)


def test_a_layer_without_weights_does_not_end_the_fits_beside_it():
    shape = LayerShape(8, 8, (3, 3))
    scheme = make_scheme("cp", shape)
    weights = torch.randn(3, 8, 8, 3, 3)
    weights[1] = 0
    start = scheme.stacked(3).fit_start(weights.flatten(0, 1), 4, 12)
    moment = torch.eye(72).expand(3, 72, 72)
    found = scheme.stacked(3).fit(weights.flatten(0, 1), moment, start, 200, layers=3)
    for weight, factors in zip(weights, zip(*(factor.chunk(3) for factor in found), strict=True), strict=True):
        alone = scheme.nearest(weight, 4)
        assert (
            float(relative_error(weight, scheme.compose(factors)))
            <= float(relative_error(weight, scheme.compose(alone))) * 1.05
        )


def test_equations_that_cannot_be_solved_do_not_change_those_beside_them():
    torch.manual_seed(0)
    roots = torch.randn(2, 6, 12, dtype=torch.float64)
    gram, right = roots @ roots.mT, torch.randn(2, 6, 3, dtype=torch.float64)
    indefinite = gram.clone()
    indefinite[1] -= 1e-6 * gram[1].trace() * torch.eye(6)
    indefinite[1, 0] = indefinite[1, :, 0] = 0  # a dead feature, and a negative eigenvalue
    indefinite[1, 0, 0] = -1e-7 * float(gram[1].trace())
    torch.testing.assert_close(solve_spd(indefinite, right)[0], solve_spd(gram, right)[0], rtol=0, atol=0)
    wide = solve_spd(indefinite, right.float())
    torch.testing.assert_close(wide[0].double(), solve_spd(gram, right)[0], rtol=1e-3, atol=1e-4)


@settings(max_examples=30)
@given(
    out=st.integers(1, 10), inner=st.integers(1, 10), kh=st.integers(1, 4), kw=st.integers(1, 4),
    own=st.integers(1, 3), data=st.data(),
)  # fmt: skip
def test_any_shape_any_rank(out, inner, kh, kw, own, data):
    shape = LayerShape(out * own, inner * own, (kh, kw), groups=own)
    name = data.draw(st.sampled_from(sorted(SCHEMES)))
    groups = data.draw(st.sampled_from([1, 2, 5])) if SCHEMES[name].grouped else 1
    if SCHEMES[name].refusal(shape, groups):
        with pytest.raises(ArpHubError, match="does not fit this layer"):
            make_scheme(name, shape, groups)
        return
    scheme = make_scheme(name, shape, groups)
    rank = data.draw(st.integers(1, scheme.max_rank))
    weight = torch.randn(out * own, inner, kh, kw, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    factors = scheme.nearest(weight, rank, sweeps=3)
    assert [f.shape for f in factors] == [conv.weight_shape for conv in scheme.convs(rank)]
    assert sum(f.numel() for f in factors) == scheme.params(rank)
    assert float(relative_error(weight, scheme.compose(factors))) <= 1 + 1e-9
    torch.testing.assert_close(scheme.compose(scheme.balance(factors)), scheme.compose(factors))


@pytest.mark.parametrize(("shape", "name", "groups"), CASES)
def test_a_design_times_a_moment_is_the_plain_product(shape, name, groups):
    scheme, columns = make_scheme(name, shape, groups), shape.group_in * shape.taps
    design = scheme.design(scheme.nearest(effective_weight(dense_layer(shape)), 2)[:-1])
    root = torch.randn(shape.groups, columns, 2 * columns, dtype=torch.float64)
    moment = root @ root.mT
    plain = design @ moment.repeat_interleave(scheme.blocks // shape.groups, dim=0)
    torch.testing.assert_close(scheme.design_moment(design, moment), plain)


def test_groups_buy_total_rank_for_one_by_one_layers():
    expand, squeeze = LayerShape(64, 16), LayerShape(16, 64)
    plain = make_scheme("channel", expand)
    split = make_scheme("group_out", expand, 4)
    assert split.params(4) / 16 < plain.params(16) / 16
    assert make_scheme("group_in", squeeze, 4).params(4) < make_scheme("channel", squeeze).params(16)


def test_a_zero_weight_stays_zero():
    weight = torch.zeros(8, 8, 3, 3, dtype=torch.float64)
    for name in SCHEMES:
        scheme = make_scheme(name, LayerShape(8, 8, (3, 3)))
        composed = scheme.compose(scheme.nearest(weight, 2))
        assert composed.isfinite().all()
        assert composed.abs().max() < 1e-6
