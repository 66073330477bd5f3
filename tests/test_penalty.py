"""The adaptive penalty: exactly low-rank at the end of the ramp, in any training loop; and its errors."""

import contextlib
import copy
import itertools

import pytest
import timm
import timm.optim
import torch
from torch import nn

from arp_hub import AdaptiveRankPenalty, ArpHubError, LayerPlan, RankPlan, decompose, make_plan
from arp_hub.layers.apply_plan import check_plan
from arp_hub.schemes import SCHEMES

STEPS = 24
PLAN = RankPlan(
    {
        "0": LayerPlan("cp", 10),
        "2": LayerPlan("tucker2", 4),
        "4": LayerPlan("spatial", 6),
        "6": LayerPlan("group_in", 2, 2),
        "8": LayerPlan("group_out", 2, 2),
        "12": LayerPlan("channel", 3),
    }
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    convs = [nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.Conv2d(12, 12, 3, padding=1)]
    convs += [nn.Conv2d(12, 8, 1), nn.Conv2d(8, 16, 1)]
    layers = list(itertools.chain.from_iterable((conv, nn.ReLU()) for conv in convs))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def train(model, penalty, steps, *, start=0, optimizer=None, accumulate=1, autocast=False):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    history = []
    for step in range(start, start + steps):
        for part in range(accumulate):
            generator = torch.Generator().manual_seed(1000 * step + part)
            x, y = torch.randn(8, 8, 8, 8, generator=generator), torch.randint(5, (8,), generator=generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = nn.functional.cross_entropy(model(x), y) / accumulate
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        penalty.step()
        history.append(penalty.violations())
    return history


def check_exact(model, plan, penalty):
    x = torch.randn(4, 8, 8, 8)
    with torch.no_grad():
        expected = model(x)
        decompose(model, plan, factors=penalty.factors())
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate": 3},
        {"autocast": True},
        {"optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3)},
        {"optimizer": lambda p: timm.optim.create_optimizer_v2([*p], opt="lamb", lr=1e-3)},
    ],
    ids=["sgd", "accumulation", "bf16", "adamw", "lamb"],
)
def test_exactly_low_rank_at_the_end(options):
    model = network()
    penalty = AdaptiveRankPenalty(model, PLAN, total_steps=STEPS, ramp=0.5)
    if "optimizer" in options:
        options = options | {"optimizer": options["optimizer"](model.parameters())}
    phases = [penalty.phase]
    history = train(model, penalty, 12, **options)
    phases.append(penalty.phase)
    train(model, penalty, 12, start=12, **options)
    assert [*phases, penalty.phase] == ["ramp", "hold", "done"]
    assert all(history[-1][name] < history[0][name] for name in PLAN.layers)
    assert (
        max(penalty.violations().values()) < 5e-6
    )  # measured on the weights; alternating least squares rounds to 1e-6
    check_exact(model, PLAN, penalty)


def test_tracking_follows_its_target():
    model = network()
    penalty = AdaptiveRankPenalty(model, PLAN, total_steps=60, ramp=0.8)
    history = train(model, penalty, 47)
    for name in PLAN.layers:
        path = [violations[name] for violations in history]
        assert path[-1] < 0.02 * path[0]
        assert path[10] > path[-1]


def test_without_a_gradient_the_end_is_the_nearest_point():
    model, plan = network(), RankPlan({"12": LayerPlan("channel", 3)})
    weight = model[12].weight.detach().clone()
    penalty = AdaptiveRankPenalty(model, plan, total_steps=10, ramp=0.5)
    for _ in range(10):
        penalty.step()
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(model[12].weight.detach(), u[:, :3] * s[:3] @ v[:3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("every", [1, 4])
def test_violations_are_measured_on_the_weights_as_they_are(every):
    """Also in the hold, where the optimiser moves layers away from the low-rank set between pulls."""
    model = network()
    penalty = AdaptiveRankPenalty(model, PLAN, total_steps=20, ramp=0, every=every)
    for step in range(20):
        with torch.no_grad():
            for name in PLAN.layers:
                weight = model.get_submodule(name).weight
                weight += 0.05 * weight.norm() / weight.numel() ** 0.5 * torch.randn_like(weight)
        moved = penalty.violations() if step else {}
        penalty.step()
        found = penalty.violations()
        pulled = step % every == 0 or step == 19
        for name in PLAN.layers:
            assert not moved or moved[name] > 1e-4
            assert (found[name] < 5e-6) == pulled
    for name, scheme in check_plan(model, PLAN).items():
        if PLAN.layers[name].scheme == "cp":
            continue  # a cold start of alternating least squares misses an exact weight by 1e-4
        weight = model.get_submodule(name).weight.detach()
        weight = weight if weight.dim() == 4 else weight[..., None, None]
        exact = scheme.compose(scheme.nearest(weight, PLAN.layers[name].rank))
        assert float((weight - exact).square().sum() / weight.square().sum()) < 5e-6, name


def test_measuring_changes_nothing():
    found = []
    for measure in (False, True):
        model = network()
        penalty = AdaptiveRankPenalty(model, PLAN, total_steps=STEPS, ramp=0.5, every=3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        for step in range(STEPS):
            train(model, penalty, 1, start=step, optimizer=optimizer)
            if measure:
                penalty.violations()
                penalty.low_rank_copy(model)
        found.append(model.state_dict())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_a_low_rank_copy_is_what_decomposing_would_give():
    model = network()
    penalty = AdaptiveRankPenalty(model, PLAN, total_steps=STEPS, ramp=0.25, every=6)
    train(model, penalty, 10)  # in the hold, between two pulls
    before = copy.deepcopy(model.state_dict())
    twin, x = penalty.low_rank_copy(model), torch.randn(4, 8, 8, 8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        found = twin(x)
        assert (found - model(x)).norm() > 1e-3 * found.norm()
        factors = penalty.factors()  # pulls the weights
        small = decompose(copy.deepcopy(model), PLAN, factors=factors)
        torch.testing.assert_close(found, small(x), rtol=1e-3, atol=1e-4)


def test_frozen_layers_are_left_alone():
    model = network()
    frozen, *others = PLAN.layers
    model.get_submodule(frozen).requires_grad_(False)
    before = model.get_submodule(frozen).weight.clone()
    penalty = AdaptiveRankPenalty(model, PLAN, total_steps=3, ramp=0)
    penalty.step()
    assert list(penalty.violations()) == others
    assert torch.equal(model.get_submodule(frozen).weight, before)
    with pytest.raises(ArpHubError, match="no layer that can be trained"):
        AdaptiveRankPenalty(network().requires_grad_(False), PLAN, total_steps=3)


def test_weights_that_the_model_no_longer_uses_are_refused():
    model = network()
    penalty = AdaptiveRankPenalty(model, PLAN, total_steps=3, ramp=0)
    name = next(iter(PLAN.layers))
    layer = model.get_submodule(name)
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    with pytest.raises(ArpHubError, match=f"layer '{name}': its weight was replaced after the penalty was built"):
        penalty.step()


CHANGES = {
    "frozen": (lambda model: model[12].requires_grad_(False), "'12' was frozen after the penalty was built: freeze it"),
    "frozen as a whole": (lambda model: model.requires_grad_(False), "'0' was frozen after the penalty was built"),
    "another layer": (lambda model: model.__setitem__(12, nn.Linear(16, 5)), "'12' was replaced after the penalty was"),
    "no layer": (lambda model: model.__delitem__(12), "'12' was replaced after the penalty was built"),
    "decomposed": (lambda model: decompose(model, PLAN), "'0' was replaced after the penalty was built"),
    "other weights": (
        lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
        "'0': its weight was replaced after the penalty was built",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_layers_that_change_after_the_penalty_is_built_are_refused_and_not_pulled(case):
    change, message = CHANGES[case]
    model = network()
    penalty = AdaptiveRankPenalty(model, PLAN, total_steps=3, ramp=0)
    change(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArpHubError, match=f"layer {message}"):
        penalty.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_frozen_layer_is_decomposed_at_its_nearest_point():
    model = network()
    model[0].requires_grad_(False)
    penalty = AdaptiveRankPenalty(model, PLAN, total_steps=2, ramp=0)
    train(model, penalty, 2)
    weight = model[0].weight.clone()
    factors = penalty.factors()
    assert "0" not in factors
    decompose(model, PLAN, factors=factors)
    nearest = decompose(nn.Sequential(copy.deepcopy(network()[0])), RankPlan({"0": PLAN.layers["0"]}))
    torch.testing.assert_close(model[0].weight, nearest[0].weight)
    assert not torch.equal(model[0].weight, weight)


@pytest.mark.parametrize("mode", [lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode])
def test_ambient_modes_change_no_pull(mode):
    found = []
    for within in (contextlib.nullcontext, mode):
        model = network()
        penalty = AdaptiveRankPenalty(model, PLAN, total_steps=4, ramp=0, every=1)
        for _ in range(4):
            with within():
                penalty.step()
        with within():
            violations, factors = penalty.violations(), penalty.factors()
        found.append((model.state_dict(), violations, factors))
    assert all(torch.equal(tensor, found[1][0][name]) for name, tensor in found[0][0].items())
    assert found[0][1] == found[1][1]
    assert not any(part.is_inference() for parts in found[1][2].values() for part in parts)


@pytest.mark.parametrize("cut", [5, 12, 18])
def test_resume_is_exact(cut):
    straight = network()
    penalty = AdaptiveRankPenalty(straight, PLAN, total_steps=STEPS, ramp=0.5)
    optimizer = torch.optim.SGD(straight.parameters(), lr=0.02)
    train(straight, penalty, STEPS, optimizer=optimizer)

    first = network()
    penalty = AdaptiveRankPenalty(first, PLAN, total_steps=STEPS, ramp=0.5)
    train(first, penalty, cut, optimizer=torch.optim.SGD(first.parameters(), lr=0.02))
    state = copy.deepcopy(penalty.state_dict())
    second = network()
    second.load_state_dict(first.state_dict())
    penalty = AdaptiveRankPenalty(second, PLAN, total_steps=STEPS, ramp=0.5)
    penalty.load_state_dict(state)
    train(second, penalty, STEPS - cut, start=cut, optimizer=torch.optim.SGD(second.parameters(), lr=0.02))
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_a_fit_is_taken_over_and_held():
    model, plan = network(), RankPlan({"0": LayerPlan("cp", 10)})
    fitted = decompose(copy.deepcopy(model), plan)
    factors = {"0": fitted[0].factor_weights()}
    model.load_state_dict(copy.deepcopy(model.state_dict()) | {"0.weight": fitted[0].weight.detach()})
    penalty = AdaptiveRankPenalty(model, plan, total_steps=3, ramp=0, factors=factors)
    penalty.step()
    torch.testing.assert_close(model[0].weight.detach(), fitted[0].weight.detach(), rtol=1e-3, atol=1e-4)


ALIKE = {
    "channel": ("1x1", 3),
    "cp": ("3x3", 6),
    "tucker2": ("3x3", 4),
    "spatial": ("3x3", 5),
    "group_in": ("3x3", 2),
    "group_out": ("3x3", 2),
}


def alike(kernel):
    """Five layers of one shape with weights of very different norms, and one layer of another shape."""
    torch.manual_seed(0)
    size = int(kernel[0])
    layers = [nn.Conv2d(8, 8, size, padding=size // 2) for _ in range(5)]
    with torch.no_grad():
        for number, layer in enumerate(layers):
            layer.weight *= 10.0 ** (number - 2)
    return nn.Sequential(*layers, nn.Conv2d(8, 12, size))


@pytest.mark.parametrize("name", ALIKE)
def test_like_layers_are_pulled_as_each_by_itself(name):
    kernel, rank = ALIKE[name]
    groups = 2 if SCHEMES[name].grouped else 1
    plans = {str(number): LayerPlan(name, rank, groups) for number in range(6)}
    together = alike(kernel)
    apart = copy.deepcopy(together)
    schedule = {"total_steps": 12, "ramp": 0.7, "every": 1}
    penalties = [AdaptiveRankPenalty(together, RankPlan(plans), **schedule)]
    penalties += [AdaptiveRankPenalty(apart, RankPlan({key: plan}), **schedule) for key, plan in plans.items()]
    for step in range(12):
        for model in (together, apart):
            torch.manual_seed(step)
            with torch.no_grad():
                for layer in model:
                    layer.weight += 0.01 * layer.weight.norm() / 24 * torch.randn_like(layer.weight)
        for penalty in penalties:
            penalty.step()
        found = penalties[0].violations()
        assert list(found) == list(plans)
        expected = {key: value for penalty in penalties[1:] for key, value in penalty.violations().items()}
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(
            one.weight, other.weight, rtol=1e-3, atol=1e-4 * float(other.weight.detach().abs().max())
        )
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        expected = together(x)
        decompose(together, RankPlan(plans), factors=penalties[0].factors())
        torch.testing.assert_close(together(x), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("layer", "scheme", "rank", "most"),
    [
        (nn.Conv2d(64, 64, 3), "channel", 32, 0.06),
        (nn.Conv2d(64, 256, 1), "channel", 32, 0.13),
        (nn.Conv2d(256, 64, 1), "channel", 32, 0.13),
        (nn.Conv2d(64, 64, 3), "spatial", 48, 0.26),
        (nn.Conv2d(64, 64, 3), "tucker2", 32, 0.12),
        (nn.Conv2d(64, 64, 3), "cp", 120, 0.24),
    ],
)
def test_between_pulls_a_part_of_the_factors_is_kept(layer, scheme, rank, most):
    penalty = AdaptiveRankPenalty(nn.Sequential(layer), RankPlan({"0": LayerPlan(scheme, rank)}), total_steps=10)
    penalty.step()
    kept = sum(tensor.numel() for tensor in penalty.state_dict()["layers"]["0"].values() if tensor.dim() > 1)
    assert 0 < kept < most * layer.weight.numel()


def test_like_layers_resume_exactly():
    plan = RankPlan({str(number): LayerPlan("cp", 6) for number in range(6)})
    straight = alike("3x3")
    resumed = copy.deepcopy(straight)
    whole = AdaptiveRankPenalty(straight, plan, total_steps=12, ramp=0.5, every=1)
    for _ in range(12):
        whole.step()
    first = AdaptiveRankPenalty(resumed, plan, total_steps=12, ramp=0.5, every=1)
    for _ in range(5):
        first.step()
    second = AdaptiveRankPenalty(resumed, plan, total_steps=12, ramp=0.5, every=1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(7):
        second.step()
    assert all(torch.equal(one.weight, other.weight) for one, other in zip(straight, resumed, strict=True))


@pytest.mark.parametrize("scheme", ["cp", "channel"])
def test_little_is_kept_from_one_pull_to_the_next(scheme):
    model = timm.create_model("cifar_resnet20")
    plan = make_plan(model, keep_params=0.5, schemes=[scheme])
    penalty = AdaptiveRankPenalty(model, plan, total_steps=100, every=1)
    penalty.step()
    kept = sum(part.nbytes for layer in penalty.state_dict()["layers"].values() for part in layer.values())
    assert kept <= 0.15 * sum(model.get_submodule(name).weight.nbytes for name in plan.layers)


@pytest.mark.parametrize("cut", [10, 18, STEPS])
def test_resuming_in_the_hold_ends_with_the_same_factors(cut):
    """Also from the last checkpoint, where only the factors are still needed."""
    straight = network()
    whole = AdaptiveRankPenalty(straight, PLAN, total_steps=STEPS, ramp=0.25, every=3)
    train(straight, whole, STEPS, optimizer=torch.optim.SGD(straight.parameters(), lr=0.02))
    resumed = network()
    first = AdaptiveRankPenalty(resumed, PLAN, total_steps=STEPS, ramp=0.25, every=3)
    train(resumed, first, cut, optimizer=torch.optim.SGD(resumed.parameters(), lr=0.02))
    second = AdaptiveRankPenalty(resumed, PLAN, total_steps=STEPS, ramp=0.25, every=3)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(resumed, second, STEPS - cut, start=cut, optimizer=torch.optim.SGD(resumed.parameters(), lr=0.02))
    expected, found = whole.factors(), second.factors()
    assert all(torch.equal(a, b) for name in expected for a, b in zip(expected[name], found[name], strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_pull_never_waits_for_a_gpu():
    model = network().cuda()
    expected = network()
    penalties = [AdaptiveRankPenalty(one, PLAN, total_steps=20, ramp=0.5, every=1) for one in (model, expected)]
    for penalty in penalties:
        penalty.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(19):  # through the ramp and the hold
            penalties[0].step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(19):
        penalties[1].step()
    for name in PLAN.layers:
        found, wanted = model.get_submodule(name).weight.cpu(), expected.get_submodule(name).weight
        assert (found - wanted).norm() < 2e-2 * wanted.norm(), name
    x = torch.randn(4, 8, 8, 8, device="cuda")
    with torch.no_grad():
        before = model(x)
        decompose(model, PLAN, factors=penalties[0].factors())
        torch.testing.assert_close(model(x), before, rtol=1e-2, atol=1e-3)


class DeepSpeedEngine(nn.Module):
    """A stand-in for DeepSpeed's wrapper of a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("mark", ["ds_id", "_hp_mapping"])
def test_deepspeed_is_refused_by_name(mark):
    """The attributes are those that DeepSpeed 0.19 gives the parameters of ZeRO-3, and of the other stages."""
    with pytest.raises(ArpHubError, match=r"wrapped in DeepSpeedEngine: .*as model\.module"):
        AdaptiveRankPenalty(DeepSpeedEngine(network()), PLAN, total_steps=10)
    model = network()
    setattr(model[4].weight, mark, 1)
    with pytest.raises(ArpHubError, match=r"DeepSpeed trains a copy of parameter '4\.weight'.*DDP or FSDP2"):
        AdaptiveRankPenalty(model, PLAN, total_steps=10)


def test_errors_say_what_is_wrong():
    model = network()
    for arguments, message in [
        ({"every": 0}, "every must be"),
        ({"ramp": 1.0}, "below 1"),
        ({"ramp": 0.99, "total_steps": 10}, "no step for the hold"),
        ({"total_steps": 0}, "total_steps"),
        ({"factors": {}}, "no factors for it"),
        ({"factors": dict.fromkeys(PLAN.layers, (torch.zeros(1),))}, "shapes"),
    ]:
        with pytest.raises(ArpHubError, match=message):
            AdaptiveRankPenalty(model, PLAN, **({"total_steps": 10} | arguments))
    with pytest.raises(ArpHubError, match="no layer"):
        AdaptiveRankPenalty(model, RankPlan(), total_steps=10)
    penalty = AdaptiveRankPenalty(model, PLAN, total_steps=10, every=1)
    for early in (penalty.violations, penalty.factors):
        with pytest.raises(ArpHubError, match="never called"):
            early()
    penalty.step()
    with pytest.raises(ArpHubError, match="not low-rank yet"):
        penalty.factors()
    with torch.no_grad():
        model[4].weight[0, 0] = float("nan")
    with pytest.raises(ArpHubError, match="layer '4'.*NaN"):
        penalty.step()


@pytest.mark.parametrize("every", [1, 3, 50])
def test_rare_pulls_end_as_exactly_and_may_be_cut_short_in_the_hold(every):
    model = network()
    penalty = AdaptiveRankPenalty(model, PLAN, total_steps=STEPS, ramp=0.5, every=every)
    train(model, penalty, 17)  # in the hold, between two pulls
    factors = penalty.factors()
    x = torch.randn(4, 8, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            decompose(copy.deepcopy(model), PLAN, factors=factors)(x), model(x), rtol=1e-4, atol=1e-5
        )
    train(model, penalty, STEPS - 17, start=17)
    check_exact(model, PLAN, penalty)


def test_rare_pulls_fall_as_far():
    model = network()
    penalty = AdaptiveRankPenalty(model, PLAN, total_steps=60, ramp=0.8, every=4)
    history = train(model, penalty, 45)
    assert all(history[-1][name] < 0.05 * history[0][name] for name in PLAN.layers)


def test_state_of_another_schedule_or_plan_is_refused():
    state = AdaptiveRankPenalty(network(), PLAN, total_steps=10).state_dict()
    with pytest.raises(ArpHubError, match="total_steps=10"):
        AdaptiveRankPenalty(network(), PLAN, total_steps=11).load_state_dict(state)
    with pytest.raises(ArpHubError, match="another plan"):
        AdaptiveRankPenalty(network(), RankPlan({"12": LayerPlan("channel", 3)}), total_steps=10).load_state_dict(state)


def without(key):
    return lambda state: state.pop(key)


STATES = {
    "nothing": (dict.clear, "no step_count"),
    "no step": (without("step_count"), "no step_count"),
    "no schedule": (without("ramp_steps"), "no ramp_steps"),
    "no layers": (without("layers"), "no layers"),
    "layers are a list": (lambda state: state.update(layers=[]), "no layers"),
    "a step of text": (lambda state: state.update(step_count="4"), "no step_count"),
    "a layer without its start": (lambda state: state["layers"]["2"].pop("start"), "does not fit layer '2'"),
    "a layer without its basis": (lambda state: state["layers"]["2"].pop("basis0"), "does not fit layer '2'"),
    "a basis of another shape": (
        lambda state: state["layers"]["2"].update(basis0=torch.zeros(3, 3)),
        r"does not fit layer '2': it holds .*\(3, 3\)",
    ),
    "a number for a basis": (lambda state: state["layers"]["4"].update(basis0=1.0), "does not fit layer '4'"),
}


@pytest.mark.parametrize("case", STATES)
def test_a_state_that_lacks_something_is_refused_before_anything_changes(case):
    change, message = STATES[case]
    penalty = AdaptiveRankPenalty(network(), PLAN, total_steps=10)
    penalty.step()
    state = penalty.state_dict()
    change(state)
    fresh = AdaptiveRankPenalty(network(), PLAN, total_steps=10)
    with pytest.raises(ArpHubError, match=f"the saved penalty .*{message}|the saved penalty {message}"):
        fresh.load_state_dict(state)
    assert fresh.phase == "ramp" and fresh.step_count == 0


@pytest.mark.parametrize("ramp", ["half", None, float("nan"), True, -0.1, 1])
def test_a_ramp_that_is_no_share_is_refused(ramp):
    with pytest.raises(ArpHubError, match="ramp must be at least 0 and below 1, got"):
        AdaptiveRankPenalty(network(), PLAN, total_steps=10, ramp=ramp)


def test_standardised_weights_are_refused_by_name():
    model = timm.create_model("test_nfnet")
    plan = make_plan(model, keep_params=0.6)
    with pytest.raises(ArpHubError, match="standardised"):
        AdaptiveRankPenalty(model, plan, total_steps=10)


def test_given_factors_must_reproduce_the_weights():
    model, plan = network(), RankPlan({"0": LayerPlan("cp", 10)})
    factors = {"0": decompose(copy.deepcopy(model), plan)[0].factor_weights()}
    with pytest.raises(ArpHubError, match="exact only after the penalty's hold"):
        decompose(model, plan, factors=factors)
    with pytest.raises(ArpHubError, match="no factors for it"):
        decompose(model, plan, factors={})
    with pytest.raises(ArpHubError, match="not both"):
        decompose(model, plan, torch.randn(2, 8, 8, 8), factors=factors)
