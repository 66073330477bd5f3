"""Checks of a decomposed timm model: every entry point is compared with the dense model's.

Weights are random, because the checks compare structure. At full rank a decomposed model computes the same outputs as
the dense one, so every difference is a fault. Parameters near zero are perturbed and BatchNorm statistics are measured
on random images, because the logits of an untrained model hide errors.
"""

from __future__ import annotations

import copy
import itertools
import pickle
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import group_parameters, save_for_hf
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3, reparameterize_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

import arp_hub
from arp_hub.layers.dense import refusal
from arp_hub.layers.low_rank import layer_shape
from arp_hub.layers.model import count_params, low_rank_layers, weight_layers
from arp_hub.layers.trace import input_size_of, trace
from arp_hub.schemes import SCHEMES, make_scheme

TOLERANCE = 1e-3
"""Largest relative error of a feature map at full rank."""
ONNX_TOLERANCE = 1e-4
_SIDES = (64, 128, 160, 192, 224, 256)


class Failed(Exception):
    """A check fails, with the reason."""


class NotApplicable(Exception):
    """The dense backbone lacks or refuses the checked feature, with the reason."""


@dataclass
class Case:
    """One backbone: dense, decomposed at full rank, and decomposed to half of its parameters."""

    name: str
    size: tuple[int, int, int]
    dense: nn.Module
    exact: nn.Module
    half: nn.Module
    folder: Path
    plan: arp_hub.RankPlan
    planning_seconds: float

    @property
    def images(self) -> Tensor:
        """Two images."""
        return torch.randn(2, *self.size, generator=torch.Generator().manual_seed(1))

    def load(self, kind: str, **arguments: Any) -> nn.Module:
        """Create the saved ``dense``, ``exact`` or ``half`` model through timm."""
        torch.manual_seed(2)  # the same random weights where the arguments leave some random
        return timm.create_model(f"local-dir:{self.folder / kind}", pretrained=True, **arguments).eval()


def make_case(name: str, folder: Path, keep: float = 0.5, **arguments: Any) -> Case:
    """Decompose a backbone at full rank and to a share of its parameters, and save all three.

    Args:
        name: timm name.
        folder: Where to save them.
        keep: Share of the parameters to keep; raised to the lowest possible one if necessary.
        **arguments: Arguments of ``timm.create_model``.
    """
    size = smallest_size(name, **arguments)
    dense = random_model(name, size, **arguments)
    exact = arp_hub.decompose(copy.deepcopy(dense), full_rank_plan(dense, size))
    began = time.process_time()
    plan = feasible_plan(dense, keep)
    seconds = time.process_time() - began
    half = arp_hub.decompose(copy.deepcopy(dense), plan)
    try:
        save_for_hf(dense, folder / "dense", safe_serialization=True)
    except RuntimeError:  # timm does not save weights that layers share
        arp_hub.save_pretrained(dense, folder / "dense")
    arp_hub.save_pretrained(exact, folder / "exact")
    arp_hub.save_pretrained(half, folder / "half")
    return Case(name, size, dense.eval(), exact.eval(), half.eval(), folder, plan, seconds)


def feasible_plan(model: nn.Module, keep: float, images: Tensor | None = None) -> arp_hub.RankPlan:
    """A plan for a share of the parameters, or for the lowest possible share; calibrated if there are images."""
    try:
        return arp_hub.make_plan(model, keep_params=keep, calibration=images)
    except arp_hub.ArpHubError as error:
        found = re.search(r"lowest rank (0\.\d+)", str(error))
        if not found:
            raise
        return arp_hub.make_plan(model, keep_params=float(found[1]) + 0.02, calibration=images)


def smallest_size(name: str, **arguments: Any) -> tuple[int, int, int]:
    """The smallest square image that a backbone takes without other arguments, at most its default."""
    with torch.device("meta"):
        model = timm.create_model(name, **arguments)
    if "img_size" in arguments:
        return input_size_of(model)
    channels, *default = model.pretrained_cfg["input_size"]
    for side in (side for side in _SIDES if side < min(default)):
        try:
            with torch.no_grad():
                maps = model.eval()(torch.zeros(2, channels, side, side, device="meta"))
            if isinstance(maps, Tensor):
                return channels, side, side
        except Exception:  # the backbone refuses this size
            continue
    return channels, *default


def random_model(name: str, size: tuple[int, int, int], **arguments: Any) -> nn.Module:
    """A backbone with random weights, no parameter near zero, and BatchNorm statistics of random images."""
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() < 1e-2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(4, *size))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def full_rank_plan(model: nn.Module, size: tuple[int, int, int]) -> arp_hub.RankPlan:
    """A plan for every decomposable layer, stem and classifier too, at full rank, with the schemes in turn."""
    turns = itertools.count()
    called = trace(model, size).sizes
    plans = {}
    for name, module in weight_layers(model):
        if refusal(module) is not None or name not in called:
            continue
        shape = layer_shape(module)
        fitting = [
            (scheme, groups)
            for scheme, kind in SCHEMES.items()
            for groups in ((2,) if kind.grouped else (1,))
            if kind.refusal(shape, groups) is None
        ]
        scheme, groups = fitting[next(turns) % len(fitting)]
        plans[name] = arp_hub.LayerPlan(scheme, make_scheme(scheme, shape, groups).max_rank, groups)
    return arp_hub.RankPlan(plans)


def flat(value: Any) -> list[Any]:
    """The leaves of nested lists, tuples and dictionaries."""
    if isinstance(value, Mapping):
        return [leaf for one in value.values() for leaf in flat(one)]
    if isinstance(value, (list, tuple)):
        return [leaf for one in value for leaf in flat(one)]
    return [value]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of ``expected``."""
    if found.shape != expected.shape:
        raise Failed(f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    difference = (found.double() - expected.double()).norm()
    error = float(difference / expected.double().norm().clamp_min(1e-6))
    return error if error == error else float("inf")


def same(found: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    """Compare two results: tensors up to ``tolerance``, everything else exactly."""
    pairs = list(zip(flat(found), flat(expected), strict=True))
    for one, other in pairs:
        if isinstance(other, Tensor):
            if (error := relative_error(one, other)) > tolerance:
                raise Failed(f"differs by {error:.1e}")
        elif one != other:
            raise Failed(f"{str(one)[:60]} instead of {str(other)[:60]}")


def alike(case: Case, call: Callable[[nn.Module], Any], tolerance: float = TOLERANCE) -> None:
    """Compare the results of a call on copies of the decomposed and the dense model."""
    compare(lambda: call(copy.deepcopy(case.exact)), lambda: call(copy.deepcopy(case.dense)), tolerance)


def compare(ours: Callable[[], Any], theirs: Callable[[], Any], tolerance: float = TOLERANCE) -> None:
    """Compare the results of two calls; not applicable if the dense model raises."""
    try:
        with torch.no_grad():
            torch.manual_seed(3)
            expected = theirs()
    except Exception as error:  # the dense model is the reference
        try:
            with torch.no_grad():
                ours()
        except Exception as found:
            if not isinstance(found, (type(error), arp_hub.ArpHubError)):
                raise Failed(f"{type(found).__name__}: {found}, but the dense model raises {error!r}") from None
            raise NotApplicable(f"raises {type(error).__name__}, as the dense model does") from None
        raise NotApplicable(f"works, but the dense model raises {type(error).__name__}") from None
    with torch.no_grad():
        torch.manual_seed(3)
        same(ours(), expected, tolerance)


def needs(model: nn.Module, name: str) -> None:
    """End the check unless the dense model has a method of this name."""
    if not hasattr(model, name):
        raise NotApplicable(f"it has no {name}")


def feature_maps(case: Case) -> None:
    """The output of every module."""
    for dtype in (torch.float32, torch.float64):
        try:
            name, error = _largest_map_error(case, dtype)
        except RuntimeError:
            if dtype == torch.float32:
                raise
            break
        if error < TOLERANCE:
            return
    raise Failed(f"'{name}' differs by {error:.1e}")


def _largest_map_error(case: Case, dtype: torch.dtype) -> tuple[str, float]:
    """The module with the largest error; in double precision, the error excludes rounding."""
    dense, exact = case.dense, case.exact
    if dtype != torch.float32:
        dense = copy.deepcopy(dense).to(dtype)
        plan = full_rank_plan(dense, case.size)
        exact = arp_hub.decompose(copy.deepcopy(dense), plan)
    with _outputs(dense) as expected, torch.no_grad():
        dense(case.images.to(dtype))
    with _outputs(exact) as found, torch.no_grad():
        exact(case.images.to(dtype))
    missing = [name for name in expected if name not in found]
    if missing:
        raise Failed(f"'{missing[0]}' is never called")
    errors = {name: relative_error(found[name], value) for name, value in expected.items()}
    name = max(errors, key=errors.__getitem__)
    return name, errors[name]


@contextmanager
def _outputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The output of every module's last call, except inside factors."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                found[name] = output.detach()

        return keep

    handles = [m.register_forward_hook(hook(n)) for n, m in model.named_modules() if ".factors" not in n]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def half_finite(case: Case) -> None:
    """Outputs at half of the parameters, and their number as the plan promises it."""
    with torch.no_grad():
        outputs = flat(case.half(case.images))
    if not all(bool(torch.isfinite(y).all()) for y in outputs):
        raise Failed("outputs are not finite")
    check_params(case.dense, case.half, case.plan)


def check_params(dense: nn.Module, model: nn.Module, plan: arp_hub.RankPlan) -> None:
    """Check that a decomposed model has as many parameters as its plan promises."""
    promised = count_params(dense)
    for name, layer in plan.layers.items():
        module = dense.get_submodule(name)
        scheme = make_scheme(layer.scheme, layer_shape(module), layer.groups)
        own = sum(p.numel() for key, p in module.named_parameters(recurse=False) if key != "bias")
        promised += scheme.params(layer.rank) - own
    if promised != count_params(model):
        raise Failed(f"{count_params(model)} parameters, and the plan promised {promised}")


def forward_parts(case: Case) -> None:
    """``forward_features``, then ``forward_head``, with and without the classifier."""
    alike(case, lambda m: m.forward_head(m.forward_features(case.images)))
    alike(case, lambda m: m.forward_head(m.forward_features(case.images), pre_logits=True))


def forward_intermediates(case: Case) -> None:
    """All intermediate maps, and the final one."""
    needs(case.dense, "forward_intermediates")
    alike(case, lambda m: m.forward_intermediates(case.images))


def prune_intermediate_layers(case: Case) -> None:
    """The first map, from a model that is cut after it."""
    needs(case.dense, "prune_intermediate_layers")

    def call(model: Any) -> Any:
        indices = model.prune_intermediate_layers([0], prune_head=True)
        return indices, model.forward_intermediates(case.images, indices=[0], intermediates_only=True)

    alike(case, call)


def feature_info(case: Case) -> None:
    """``feature_info``: the same feature maps."""
    needs(case.dense, "feature_info")
    if [dict(i) for i in case.exact.feature_info] != [dict(i) for i in case.dense.feature_info]:
        raise Failed("differs")


def layer_decay(case: Case) -> None:
    """``group_matcher``: the same layers in the same groups, and a rate for every parameter."""
    needs(case.dense, "group_matcher")

    def owner(name: str) -> str:
        return name.rpartition(".")[0].split(".factors.")[0]

    def by_layer(model: Any) -> dict[Any, list[str]]:
        found = group_parameters(model, model.group_matcher(coarse=False))
        return {key: sorted({owner(name) for name in names}) for key, names in found.items()}

    if by_layer(case.exact) != by_layer(case.dense):
        raise Failed("parameters are in different groups")
    count = sum(len(group["params"]) for group in param_groups_layer_decay(case.exact, layer_decay=0.9))
    if count != sum(p.requires_grad for p in case.exact.parameters()):
        raise Failed(f"{count} parameters have a learning rate")


def no_weight_decay(case: Case) -> None:
    """Names of the parameters without weight decay."""
    needs(case.dense, "no_weight_decay")
    alike(case, lambda m: sorted({re.sub(r"\.factors\.\d+", "", name) for name in m.no_weight_decay()}))


def classifier(case: Case) -> None:
    """``get_classifier`` and ``reset_classifier``."""

    def call(model: Any) -> Any:
        model.get_classifier()
        model.reset_classifier(0)
        features = model(case.images)
        model.reset_classifier(7)
        return [*flat(features), [tuple(y.shape) for y in flat(model(case.images))]]

    alike(case, call)


def training(case: Case) -> None:
    """Gradient checkpointing, a backward pass and an optimiser step."""
    model = copy.deepcopy(case.half)
    if hasattr(model, "set_grad_checkpointing"):
        try:
            model.set_grad_checkpointing(True)
        except AssertionError:  # some backbones have none
            pass
    model.train()
    for norm in (m for m in model.modules() if isinstance(m, BatchNorm)):
        norm.eval()  # a one-pixel map has no batch statistics
    sum(y.float().mean() for y in flat(model(case.images))).backward()
    bad = [n for n, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    if bad:
        raise Failed(f"the gradient of '{bad[0]}' is not finite")
    silent = [n for n, p in model.named_parameters() if ".factors." in n and p.grad is None]
    if silent:
        raise Failed(f"'{silent[0]}' has no gradient")
    torch.optim.SGD(model.parameters(), lr=1e-4).step()


def set_input_size(case: Case) -> None:
    """Another image size on an existing model."""
    needs(case.dense, "set_input_size")
    side = max(case.size[1] // 64 * 32, 32)
    images = torch.randn(1, case.size[0], side, side)

    def call(model: Any) -> Any:
        model.set_input_size(img_size=side)
        return model(images)

    alike(case, call)


def init_weights(case: Case) -> None:
    """``init_weights`` gives the factors new random values, and outputs stay finite.

    A model that rescales merged weights is refused, because that would change nothing.
    """
    needs(case.dense, "init_weights")
    model: Any = copy.deepcopy(case.half)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".factors." in name}
    try:
        model.init_weights()
    except arp_hub.ArpHubError as refused:
        if "computed from its factors" not in str(refused):
            raise Failed(str(refused)) from None
        return
    changed = [name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])]
    with torch.no_grad():
        if not all(bool(torch.isfinite(y).all()) for y in flat(model(case.images))):
            raise Failed("outputs are not finite")
    if not changed:
        raise NotApplicable("leaves the factors unchanged")


def reparameterize(case: Case) -> None:
    """Decomposition after reparameterisation works; the other order is refused or changes no factor."""
    merged = reparameterize_model(case.dense)
    changes = merged.state_dict().keys() != case.dense.state_dict().keys()
    try:
        ours = reparameterize_model(case.exact)
        if low_rank_layers(ours).keys() != low_rank_layers(case.exact).keys():
            raise Failed("dense layers come back")
    except arp_hub.ArpHubError:
        if not changes:
            raise Failed("refused, but the dense model has nothing to merge") from None
    if not changes:
        raise NotApplicable("nothing to merge")
    exact = arp_hub.decompose(copy.deepcopy(merged), full_rank_plan(merged, case.size))
    with torch.no_grad():
        same(exact(case.images), merged(case.images))
    arp_hub.save_pretrained(exact, case.folder / "merged")
    loaded = case.load("merged")
    with torch.no_grad():
        if not torch.equal(loaded(case.images), exact(case.images)):
            raise Failed("the output differs after saving and loading")


def ema(case: Case) -> None:
    """An exponential moving average of the weights, with its copy of the model."""
    average = ModelEmaV3(case.exact, decay=0.5)
    average.update(case.exact)
    with torch.no_grad():
        same(average.module.eval()(case.images), case.exact(case.images))


def copies(case: Case) -> None:
    """A deep copy and a pickle, as DataLoader workers and EMA make them."""
    for other in (copy.deepcopy(case.exact), pickle.loads(pickle.dumps(case.exact))):
        with torch.no_grad():
            if not torch.equal(other(case.images), case.exact(case.images)):
                raise Failed("the output of a copy differs")


def channels_last(case: Case) -> None:
    """The channels-last memory layout."""
    layout: Any = torch.channels_last
    alike(case, lambda m: m.to(memory_format=layout)(case.images.contiguous(memory_format=layout)))


def half_precision(case: Case, dtype: torch.dtype) -> None:
    """Weights and images cast to a half-precision type."""

    def error(model: nn.Module) -> float:
        with torch.no_grad():
            exact = flat(model(case.images))[0]
            return relative_error(flat(copy.deepcopy(model).to(dtype)(case.images.to(dtype)))[0].float(), exact)

    try:
        dense = error(case.dense)
    except RuntimeError as reason:
        raise NotApplicable(f"the dense model fails: {reason}") from None
    if (ours := error(case.exact)) > max(10 * dense, 0.1):
        raise Failed(f"differs by {ours:.1e} from single precision, the dense model by {dense:.1e}")


def compiled(case: Case) -> None:
    """The tracer of torch.compile. Code generation is skipped, because it only sees plain small layers."""
    with torch.no_grad():
        same(torch.compile(case.half, backend="eager")(case.images), case.half(case.images))
    torch.compiler.reset()


def exported(case: Case) -> None:
    """torch.export: the same outputs, and the factors in the graph."""
    try:
        torch.export.export(case.dense, (case.images,), strict=False)
    except Exception as error:
        raise NotApplicable(f"the dense model fails: {type(error).__name__}") from None
    program = torch.export.export(case.half, (case.images,), strict=False)
    with torch.no_grad():
        same(program.module()(case.images), case.half(case.images))
    count = sum({p.data_ptr(): p.numel() for p in program.parameters()}.values())  # shared ones have several names
    if count != count_params(case.half):
        raise Failed(f"the graph holds {count} parameters, the model {count_params(case.half)}")


def onnx(case: Case) -> None:
    """ONNX: the same outputs in onnxruntime, and the factors in the file."""
    onnxruntime = __import__("onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        half, dense = Path(folder, "half"), Path(folder, "dense")
        try:
            size = onnx_bytes(case.half, case.images, half)
        except Exception as error:
            try:
                onnx_bytes(case.dense, case.images, dense)
            except Exception:
                raise NotApplicable(f"the dense model fails: {type(error).__name__}") from None
            raise Failed(str(error)) from None
        found = onnxruntime.InferenceSession(half / "model.onnx", providers=["CPUExecutionProvider"])
        outputs = found.run(None, {found.get_inputs()[0].name: case.images.numpy()})
        with torch.no_grad():
            for y, expected in zip(outputs, flat(case.half(case.images)), strict=True):
                same(torch.from_numpy(y), expected, ONNX_TOLERANCE)
        constants = size - weight_bytes(case.half)  # constants in the graph, such as tables of relative positions
        if constants > 0.1 * weight_bytes(case.half) + 2e6:
            with torch.no_grad():
                case.dense(case.images)  # fills timm's caches, as for the compressed model
            allowed = onnx_bytes(case.dense, case.images, dense) - weight_bytes(case.dense)
            if constants > 1.1 * allowed:
                raise Failed(f"beyond the weights the file has {constants} bytes, that of the dense model {allowed}")


def onnx_bytes(model: nn.Module, images: torch.Tensor, folder: Path) -> int:
    """Export a model as ``model.onnx`` into a new folder; returns the size of the folder."""
    folder.mkdir()
    torch.onnx.export(model, (images,), folder / "model.onnx", dynamo=True, verbose=False)
    return sum(file.stat().st_size for file in folder.iterdir())


def weight_bytes(model: nn.Module) -> int:
    """Size of a model's state in single precision."""
    return 4 * sum(tensor.numel() for tensor in model.state_dict().values())


def torchscript(case: Case) -> None:
    """TorchScript, where the dense backbone can be scripted."""
    try:
        torch.jit.script(timm.create_model(case.name, scriptable=True))
    except Exception as error:
        raise NotApplicable(f"the dense model fails: {type(error).__name__}") from None
    model = case.load("half", scriptable=True)
    script = torch.jit.script(model)
    with torch.no_grad():
        same(script(case.images), model(case.images))


def create_with(**arguments: Any) -> Callable[[Case], None]:
    """Load a saved model with arguments of ``timm.create_model``."""

    def check(case: Case) -> None:
        given = dict(arguments)
        if given.get("img_size") == "other":
            given["img_size"] = max(case.size[1] // 64 * 32, 32)
        size = (given.get("in_chans", case.size[0]), *[given.get("img_size", side) for side in case.size[1:]])
        images = torch.randn(1, *size, generator=torch.Generator().manual_seed(4))

        def call(kind: str) -> Any:
            model: Any = case.load(kind, **given)
            found = flat(model(images))
            if given.get("features_only"):
                info = model.feature_info
                return [*found, info.channels(), info.reduction(), info.module_name()]
            if given.get("num_classes"):  # a new classifier is random: compare its inputs
                shapes = [tuple(y.shape) for y in found]
                model.reset_classifier(0)
                return [*flat(model(images)), shapes]
            return found

        compare(lambda: call("exact"), lambda: call("dense"))

    return check


CHECKS: dict[str, Callable[[Case], None]] = {
    "feature maps": feature_maps,
    "half of the parameters": half_finite,
    "forward parts": forward_parts,
    "forward_intermediates": forward_intermediates,
    "prune_intermediate_layers": prune_intermediate_layers,
    "feature_info": feature_info,
    "layer decay": layer_decay,
    "no_weight_decay": no_weight_decay,
    "reset_classifier": classifier,
    "training": training,
    "set_input_size": set_input_size,
    "init_weights": init_weights,
    "reparameterize": reparameterize,
    "EMA": ema,
    "copies": copies,
    "channels_last": channels_last,
    "bfloat16": lambda case: half_precision(case, torch.bfloat16),
    "float16": lambda case: half_precision(case, torch.float16),
    "load": create_with(),
    "num_classes=0": create_with(num_classes=0),
    "in_chans=1": create_with(in_chans=1),
    "num_classes=7, in_chans=4": create_with(num_classes=7, in_chans=4),
    "global_pool=max": create_with(global_pool="max"),
    "global_pool=''": create_with(global_pool="", num_classes=0),
    "drop_rate, exportable": create_with(drop_rate=0.1, exportable=True),
    "drop_path_rate": create_with(drop_path_rate=0.1),
    "img_size": create_with(img_size="other"),
    "features_only": create_with(features_only=True),
    "scriptable": create_with(scriptable=True),
}
"""Checks by the name of the entry point. A check that does not hold raises `Failed` or `NotApplicable`."""

EXPORTS: dict[str, Callable[[Case], None]] = {
    "torch.compile": compiled,
    "torch.export": exported,
    "ONNX": onnx,
    "TorchScript": torchscript,
}
"""Checks of compilers and exports, each slower than all `CHECKS` together."""


EXCEPTIONS: dict[tuple[str, str], str] = {
    ("sequencer", "init_weights"): "timm expects a bias in every linear layer here, and a first factor has none",
    ("nest", "init_weights"): "timm expects a bias in every linear layer here, and a first factor has none",
    ("gmlp", "init_weights"): "timm expects a bias in every layer of the head here, and a first factor has none",
    ("resnetv2", "init_weights"): "timm expects a bias in the classifier here, and a first factor has none",
    **{
        (
            name,
            "TorchScript",
        ): "timm's forward asks for a layer's weight, which a scripted chain of factors does not have"
        for name in ("xcit", "convit", "swinv2", "vit_tiny_patch16_dinov3_qkvb")
    },
    ("halonet_h1", "num_classes=7, in_chans=4"): "with random weights it amplifies rounding: the dense model in "
    "float32 and in float64 differ by 2e-3",
}
"""Known failures, by the beginning of the model's name and the check, with the reason."""


def run_check(case: Any, name: str, checks: Mapping[str, Callable[[Any], None]] = CHECKS | EXPORTS) -> str:
    """Run one check; returns ``ok``, ``n/a: why``, ``exception: why`` or ``fails: why``."""
    try:
        checks[name](case)
    except NotApplicable as reason:
        return f"n/a: {reason}"
    except Exception as error:  # any error is a finding
        for (beginning, check), why in EXCEPTIONS.items():
            if check == name and case.name.startswith(beginning):
                return f"exception: {why}"
        kind = "" if isinstance(error, Failed) else f"{type(error).__name__}: "
        return f"fails: {kind}{str(error)[:300]}"
    return "ok"
