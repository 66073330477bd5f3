"""Spectra, and the tables and pictures made of them and of plans."""

from __future__ import annotations

import io

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from arp_hub.errors import ArpHubError
from arp_hub.layers.apply_plan import apply_plan
from arp_hub.layers.low_rank import layer_shape
from arp_hub.layers.model import count_params
from arp_hub.layers.trace import count_macs
from arp_hub.plan import LayerPlan, RankPlan
from arp_hub.reports.model_figures import decays_figure, moved, spectra_figure
from arp_hub.reports.plots import save_figure
from arp_hub.reports.spectra import (
    MATRIX_SCHEMES,
    Spectrum,
    decays,
    decomposable_layers,
    output_spectra,
    rank_energies,
    spectrum,
    violation,
)
from arp_hub.reports.summary import plan_report, spectrum_reports
from arp_hub.reports.tables import dense_table, plan_table, spectrum_table
from arp_hub.schemes import make_scheme, relative_error


@given(st.lists(st.floats(0, 100, width=32), min_size=1, max_size=12), st.floats(0.01, 1))
def test_energy_rank_is_the_smallest_that_keeps_the_share(values, share):
    one = Spectrum(torch.tensor([sorted(values, reverse=True)]))
    rank, tail = one.energy_rank(share), one.tail()
    assert tail[rank] <= 1 - share + 1e-9
    assert rank == 0 or tail[rank - 1] > 1 - share
    assert (tail.diff() <= 1e-12).all()


@pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan")])
def test_energy_rank_refuses_a_share_out_of_range(share):
    with pytest.raises(ArpHubError, match="above 0 and at most 1"):
        Spectrum(torch.ones(1, 3)).energy_rank(share)


def test_stable_rank_of_known_matrices():
    assert Spectrum(torch.ones(1, 7)).stable_rank == pytest.approx(7)
    assert Spectrum(torch.tensor([[2.0, 1.0, 0.0]])).stable_rank == pytest.approx(1.25)
    assert Spectrum(torch.tensor([[1.0, 1.0], [1.0, 0.0]])).stable_rank == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("scheme", "groups"), [("channel", 1), ("spatial", 1), ("group_in", 2), ("group_out", 4)], ids=str
)
def test_tail_is_the_error_of_the_nearest_point(scheme, groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, 3)
    bound = make_scheme(scheme, layer_shape(conv), groups)
    tail = spectrum(conv, bound).tail()
    for rank in (1, 2, bound.max_rank):
        weight = conv.weight.detach()
        error = relative_error(weight, bound.compose(bound.nearest(weight, rank)))
        assert float(tail[rank]) == pytest.approx(float(error), abs=1e-5)
        assert violation(conv, bound, rank) == pytest.approx(float(error), abs=1e-5)


@pytest.mark.parametrize("scheme", ["cp", "tucker2"])
def test_violation_falls_with_the_rank(scheme):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3)
    bound = make_scheme(scheme, layer_shape(conv))
    found = [violation(conv, bound, rank) for rank in (1, 3, 6)]
    assert 0 < found[2] < found[1] < found[0] < 1


def test_schemes_that_are_no_matrix_have_no_spectrum():
    conv = nn.Conv2d(8, 8, 3)
    assert MATRIX_SCHEMES == ("channel", "spatial", "group_in", "group_out")
    with pytest.raises(ArpHubError, match="'cp' has no singular values"):
        spectrum(conv, make_scheme("cp", layer_shape(conv)))


@pytest.mark.parametrize(
    ("scheme", "groups"),
    [("channel", 1), ("spatial", 1), ("group_in", 2), ("group_out", 4), ("cp", 1), ("tucker2", 1)],
    ids=str,
)
def test_energies_of_ranks_are_those_of_what_the_scheme_truncates(scheme, groups):
    """They add up to the weight's energy, and the rest beyond a rank is the error there: of a cold start, at least."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, 3)
    bound = make_scheme(scheme, layer_shape(conv), groups)
    weight = conv.weight.detach().double()
    energies = rank_energies(weight, bound)
    shares = energies / energies.sum()
    assert len(shares) == bound.max_rank and (shares >= 0).all()
    for rank in (1, 2, 5):
        error = float(relative_error(weight, bound.compose(bound.nearest(weight, rank))))
        exact = scheme in MATRIX_SCHEMES
        assert float(shares[rank:].sum()) == pytest.approx(error, abs=1e-5) if exact else shares[rank:].sum() > error


def test_the_picture_of_spectra_cuts_every_layer_at_its_rank(resnet):
    falls = decays(resnet, PLAN)
    assert {name: found["full_rank"] for name, found in falls.items()} == {
        "layer1.0.conv1": 64 * 9, "layer2.0.conv1": 128, "layer3.0.conv2": 768, "layer3.0.downsample.0": 64,
        "layer4.1.conv2": 512,
    }  # fmt: skip
    cuts = {name: (entry.scheme, entry.rank) for name, entry in PLAN.layers.items()}
    figure = decays_figure(falls, cuts)
    panels = [axes for axes in figure.axes if axes.lines]
    assert [axes.get_title("left").partition(":")[0] for axes in panels] == [scheme for scheme, _ in cuts.values()]
    for axes, (name, (_, rank)) in zip(panels, cuts.items(), strict=True):
        dots = [float(line.get_xdata()[0]) for line in axes.lines if line.get_marker() == "o"]
        assert dots == [pytest.approx(rank / falls[name]["full_rank"])]


@pytest.mark.parametrize(
    ("means", "drawn"), [([], False), ([0.1], False), ([0.0, 0.0], False), ([1e-7, 3e-8], False), ([0.5, 1e-3], True)]
)
def test_violations_are_drawn_where_they_moved(means, drawn):
    assert moved([{"violation": mean} for mean in means]) == drawn


def test_output_spectrum_holds_the_energy_of_the_outputs():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", pretrained=False).eval()
    images = torch.randn(64, 3, 32, 32)
    layer = model.get_submodule("layer2.0.conv1")
    outputs = []
    hook = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        model(images)
    hook.remove()
    energy = outputs[0].double().square().sum(1).mean()
    found = output_spectra(model, {"layer2.0.conv1": layer}, images)["layer2.0.conv1"]
    assert float(found.values.double().square().sum()) == pytest.approx(float(energy), rel=0.02)
    assert found.energy_rank(0.9) < spectrum(layer).energy_rank(0.9)  # inputs are correlated, so outputs need fewer


def test_layers_whose_weights_are_read_without_a_call_have_a_spectrum():
    torch.manual_seed(0)
    model = timm.create_model("beit_base_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=2).eval()
    layers = decomposable_layers(model)
    assert "blocks.1.attn.qkv" in layers
    assert output_spectra(model, layers, torch.randn(8, 3, 32, 32)).keys() == layers.keys()


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet18", pretrained=False).eval()


PLAN = RankPlan(
    {
        "layer1.0.conv1": LayerPlan("cp", 20),
        "layer2.0.conv1": LayerPlan("tucker2", 16),
        "layer3.0.conv2": LayerPlan("spatial", 30),
        "layer3.0.downsample.0": LayerPlan("group_out", 20, groups=4),
        "layer4.1.conv2": LayerPlan("channel", 64),
    },
    {"conv1": "the first convolution"},
)


def test_decomposed_layers_are_seen_at_their_place_and_rank(resnet):
    low = apply_plan(timm.create_model("resnet18", pretrained=False), PLAN)
    with torch.no_grad():
        for parameter in low.parameters():
            nn.init.normal_(parameter)
    layers = decomposable_layers(low)
    assert list(layers) == list(decomposable_layers(resnet))
    assert spectrum(layers["layer4.1.conv2"]).energy_rank(1 - 1e-6) == 64
    assert layers["conv1"] is low.conv1


def test_plan_report_adds_up_to_what_is_counted_on_the_model(resnet):
    found = plan_report(resnet, PLAN)
    low = apply_plan(timm.create_model("resnet18", pretrained=False), PLAN)
    assert (found.params, found.params_after) == (count_params(resnet), count_params(low))
    assert (found.macs, found.macs_after) == (count_macs(resnet), count_macs(low))
    assert sum(x.params_after - x.params for x in found.layers) == found.params_after - found.params
    assert sum(x.macs_after - x.macs for x in found.layers) == found.macs_after - found.macs
    assert {x.name for x in found.layers} == set(decomposable_layers(resnet))
    assert {x.name: x.reason for x in found.layers}["conv1"] == "the first convolution"
    assert not [module for module in resnet.modules() if type(module).__name__.startswith("LowRank")]


def test_tables_name_every_layer(resnet):
    found = plan_report(resnet, PLAN)
    text = _rendered(plan_table(found)) + _rendered(dense_table(found))
    spectra = {name: spectrum(layer) for name, layer in list(decomposable_layers(resnet).items())[:3]}
    assert all(x.name in text for x in found.layers)
    assert "the first convolution" in text
    rows = spectrum_reports(resnet, spectra, PLAN, {"layer1.0.conv1": 0.25})
    assert "2.50e-01" in _rendered(spectrum_table(rows))


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_picture_is_written_whole(tmp_path, resnet, suffix):
    spectra = {name: spectrum(layer) for name, layer in list(decomposable_layers(resnet).items())[:4]}
    path = tmp_path / f"spectra{suffix}"
    save_figure(spectra_figure(spectra, {"conv1": 9}), path)
    assert path.read_bytes().startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("name", "message"), [("a.txt", "ends in"), ("missing/a.png", "no folder")])
def test_picture_refuses_a_path_it_cannot_write(tmp_path, name, message):
    with pytest.raises(ArpHubError, match=message):
        save_figure(spectra_figure({"fc": Spectrum(torch.ones(1, 3))}), tmp_path / name)


def _rendered(table) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()
