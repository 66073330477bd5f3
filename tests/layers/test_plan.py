"""Plans: JSON round trips, refusals, and the plan of a decomposed model."""

import copy
import dataclasses
import json
import pickle

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from arp_hub import ArpHubError, LayerPlan, RankPlan, decompose, make_plan
from arp_hub.layers.apply_plan import apply_plan, check_plan, plan_of
from arp_hub.schemes import SCHEMES

layer_plans = st.builds(
    lambda scheme, rank, groups: LayerPlan(scheme, rank, groups if SCHEMES[scheme].grouped else 1),
    st.sampled_from(sorted(SCHEMES)),
    st.integers(1, 10**6),
    st.integers(1, 64),
)
plans = st.builds(RankPlan, st.dictionaries(st.text(), layer_plans), st.dictionaries(st.text(), st.text()))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(plans)
def test_round_trip(plan):
    again = RankPlan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    turned = RankPlan(dict(reversed(plan.layers.items())), dict(reversed(plan.dense.items())))
    assert (turned, hash(turned)) == (plan, hash(plan))
    assert copy.deepcopy(plan) == pickle.loads(pickle.dumps(plan)) == plan


def test_a_layer_written_as_a_dict_is_refused():
    with pytest.raises(ArpHubError, match="layer 'fc' of a plan must be a LayerPlan, got .*RankPlan.from_dict"):
        RankPlan({"fc": {"scheme": "channel", "rank": 2}})


def test_file_round_trip(tmp_path):
    plan = RankPlan({"layer1.0.conv1": LayerPlan("cp", 16)}, {"conv1": "first convolution"})
    plan.save(tmp_path / "plan.json")
    assert RankPlan.load(tmp_path / "plan.json") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@settings(max_examples=300)
@given(
    json_values
    | st.fixed_dictionaries(
        {"format_version": json_values | st.just(1), "layers": json_values | st.just({})},
        optional={
            "dense": json_values,
            "requires": json_values,
            "model": json_values | st.fixed_dictionaries({"architecture": st.text(), "shapes": json_values}),
        },
    )
    | st.fixed_dictionaries(
        {
            "format_version": st.just(1),
            "layers": st.dictionaries(
                st.text(max_size=5),
                st.fixed_dictionaries(
                    {"scheme": json_values | st.just("cp"), "rank": json_values, "groups": json_values}
                ),
                max_size=2,
            ),
        }
    )
)
@pytest.mark.filterwarnings("ignore:.*does not know")
def test_garbage_raises_nothing_but_our_error(data):
    try:
        RankPlan.from_json(json.dumps(data))
    except ArpHubError as error:
        assert len(str(error)) < 600


GOOD = {"format_version": 1, "layers": {"conv": {"scheme": "cp", "rank": 4}}}
BAD_FILES = {
    "not JSON": ("{", "not valid JSON"),
    "not an object": ([], "JSON object"),
    "no version": ({"layers": {}}, "format_version"),
    "newer version": ({"format_version": 2, "layers": {}}, "pip install --upgrade"),
    "no layers": ({"format_version": 1}, "'layers'"),
    "unknown scheme": ({"format_version": 1, "layers": {"a": {"scheme": "svd", "rank": 4}}}, "choose one of channel"),
    "rank zero": ({"format_version": 1, "layers": {"a": {"scheme": "cp", "rank": 0}}}, "rank must be"),
    "rank a float": ({"format_version": 1, "layers": {"a": {"scheme": "cp", "rank": 1.5}}}, "rank must be"),
    "no rank": ({"format_version": 1, "layers": {"a": {"scheme": "cp"}}}, "lacks rank"),
    "groups without a grouped scheme": (
        {"format_version": 1, "layers": {"a": {"scheme": "cp", "rank": 1, "groups": 2}}},
        "makes no groups",
    ),
    "a required key from the future": (GOOD | {"bits": 4, "requires": ["bits"]}, "pip install --upgrade"),
    "a required layer key": (
        {
            "format_version": 1,
            "requires": ["bits"],
            "layers": {"a": {"scheme": "cp", "rank": 4, "bits": 4}},
        },
        "layer 'a' requires",
    ),
}


@pytest.mark.parametrize(("data", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file(data, message):
    text = data if isinstance(data, str) else json.dumps(data)
    with pytest.raises(ArpHubError, match=message):
        RankPlan.from_json(text)


def test_unknown_optional_key_warns():
    with pytest.warns(UserWarning, match="'colour'"):
        assert RankPlan.from_dict(GOOD | {"colour": "red"}) == RankPlan.from_dict(GOOD)


def test_deep_nesting_is_refused():
    with pytest.raises(ArpHubError):
        RankPlan.from_json("[" * 100_000)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"layer1.0.conv9": LayerPlan("cp", 4)}, "did you mean 'layer1.0.conv"),
        ({"layer1": LayerPlan("cp", 4)}, "cannot be decomposed"),
        ({"layer1.0.conv1": LayerPlan("cp", 10**6)}, "beyond"),
        ({"layer1.0.conv1": LayerPlan("group_in", 4, groups=7)}, "cannot be split into 7 groups"),
        ({"fc": LayerPlan("cp", 4)}, "1x1"),
        ({"fc": LayerPlan("spatial", 4)}, "length 1"),
    ],
)
def test_plan_that_does_not_fit(layers, message):
    model = timm.create_model("resnet18", num_classes=10)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ArpHubError, match=message):
        apply_plan(model, RankPlan(layers))
    assert [type(module) for module in model.modules()] == before


def test_plan_of_reads_a_model_back():
    plan = RankPlan({"layer1.0.conv1": LayerPlan("cp", 7), "fc": LayerPlan("group_in", 3, 4)})
    model = apply_plan(timm.create_model("resnet18", num_classes=10), plan)
    assert plan_of(model).layers == plan.layers
    with pytest.raises(ArpHubError, match="decomposed already"):
        check_plan(model, plan)


def test_a_shared_module_is_planned_once_and_stays_shared():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(8, 8)})
    model["b"] = model["a"]
    with pytest.raises(ArpHubError, match="one shared module"):
        check_plan(model, RankPlan({"a": LayerPlan("channel", 2), "b": LayerPlan("channel", 2)}))
    apply_plan(model, RankPlan({"a": LayerPlan("channel", 2)}))
    assert model["a"] is model["b"]


def small_plan(name: str, **kwargs: object) -> RankPlan:
    with torch.device("meta"), pytest.warns(UserWarning, match="meta device"):
        return make_plan(timm.create_model(name, **kwargs), keep_params=0.5, schemes=["channel"])


@pytest.mark.parametrize(
    ("made_for", "used_for", "message"),
    [
        (
            "cifar_resnet20",
            {"model_name": "cifar_resnet56"},
            "made for cifar_resnet20, and this model is cifar_resnet56",
        ),
        ("cifar_resnet20", {"model_name": "cifar_resnet20", "num_classes": 100, "in_chans": 1}, None),
        ("test_vit", {"model_name": "test_vit", "img_size": 96}, None),
        ("test_vit", {"model_name": "test_vit", "num_classes": 7}, "layer 'head'.* weight of 1000x64, .* one of 7x64"),
        ("resnet18", {"model_name": "resnet18.a1_in1k"}, None),
    ],
)
def test_a_plan_fits_the_architecture_it_was_made_for(made_for, used_for, message):
    plan = RankPlan.from_json(small_plan(made_for).to_json())
    with torch.device("meta"):
        model = timm.create_model(**used_for)
    if message is None:
        assert list(plan_of(apply_plan(model, plan)).layers) == list(plan.layers)
    else:
        with pytest.raises(ArpHubError, match=message):
            apply_plan(model, plan)


def test_a_plan_knows_models_that_timm_did_not_create():
    def network(depth):
        return nn.Sequential(*(nn.Linear(64, 64) for _ in range(depth)))

    plan = make_plan(network(3), keep_params=0.5, input_size=(1, 1, 64), schemes=["channel"])
    assert decompose(network(3), plan)
    with pytest.raises(ArpHubError, match="Sequential with 3 layers, .* Sequential with 5 layers"):
        decompose(network(5), plan)


def test_plans_are_equal_by_their_layers_and_older_files_stay_as_they_are():
    plan = small_plan("cifar_resnet20")
    older = dataclasses.replace(plan, model=None)
    assert (older, hash(older)) == (plan, hash(plan))
    assert "model" not in older.to_dict()
    assert set(plan.to_dict()) == {"format_version", "layers", "dense", "model"}
    again = copy.deepcopy(RankPlan.from_json(plan.to_json()))
    assert again.model == plan.model is not None
    assert apply_plan(timm.create_model("cifar_resnet56"), older)
