"""Checks of a timm model that is planned, fitted and refined on images.

Weights are random and images are smooth noise, so accuracies say nothing. What holds for every model is checked: the
fit to images is nearer to the dense model than a fit to the weights at the same ranks, and a refinement changes what it
may change and never goes further away.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils._pytree import tree_map_only

import arp_hub
from arp_hub.calibration.resumption import block_chain
from arp_hub.layers.model import low_rank_layers
from arp_hub.refinement.losses import divergence
from benchmarks.layers.timm_checks import (
    Failed,
    NotApplicable,
    check_params,
    feasible_plan,
    flat,
    random_model,
    smallest_size,
)

STEPS = 10
"""Steps of a refinement: two of them by blocks."""


@dataclass
class Fitted:
    """A dense backbone, and its form that is fitted to images."""

    name: str
    dense: nn.Module
    images: Tensor
    plan: arp_hub.RankPlan
    model: nn.Module


def make_fitted(name: str, keep: float = 0.5, **arguments: Any) -> Fitted:
    """Plan and fit a backbone on images.

    Args:
        name: timm name.
        keep: Share of the parameters to keep; raised to the lowest possible one if necessary.
        **arguments: Arguments of ``timm.create_model``.
    """
    size = smallest_size(name, **arguments)
    dense = random_model(name, size, **arguments).eval()
    images = normalised(smooth_images(24, size), dense)
    plan = feasible_plan(dense, keep, images)
    return Fitted(name, dense, images, plan, arp_hub.decompose(copy.deepcopy(dense), plan, images).eval())


def smooth_images(count: int, size: tuple[int, int, int]) -> Tensor:
    """Random images from 0 to 1 with more energy in low frequencies, as photographs have it."""
    generator = torch.Generator().manual_seed(3)
    coarse = interpolate(torch.randn(count, size[0], 8, 8, generator=generator), size[1:], mode="bicubic")
    return torch.sigmoid(coarse + 0.3 * torch.randn(count, *size, generator=generator))


def normalised(images: Tensor, model: Any) -> Tensor:
    """Images from 0 to 1 as a model expects them."""
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (images - mean) / std


def distance(fitted: Fitted, model: nn.Module) -> float:
    """Divergence of a model's output from the dense one's, on the images.

    Logits beyond a standard deviation of one are divided by it: a dense model with random weights that is sure of its
    classes is nearer, by a plain divergence, to a model that answers nothing than to one with small errors.
    """
    with torch.no_grad():
        exact, found = fitted.dense(fitted.images), model(fitted.images)
        scale = max(1.0, float(flat(exact)[0].std()))
        return float(divergence(fitted.dense, _scaled(exact, scale), _scaled(found, scale), len(fitted.images)))


def _scaled(output: Any, scale: float) -> Any:
    return tree_map_only(Tensor, lambda value: value / scale, output)


def parameters(fitted: Fitted) -> None:
    """As many parameters as the plan promises."""
    check_params(fitted.dense, fitted.model, fitted.plan)


def fit(fitted: Fitted) -> None:
    """Nearer to the dense model than a fit to the weights at the same ranks."""
    by_images = distance(fitted, fitted.model)
    by_weights = distance(fitted, arp_hub.decompose(copy.deepcopy(fitted.dense), fitted.plan).eval())
    if not by_images <= by_weights:
        raise Failed(f"a divergence of {by_images:.3g}, and {by_weights:.3g} by the weights alone")


def refinement(fitted: Fitted) -> None:
    """No further from the dense model; what may not learn, and the dense model, stay."""
    model = copy.deepcopy(fitted.model)
    before, dense = state(model), state(fitted.dense)
    done = arp_hub.refine(model, fitted.dense, fitted.images, steps=STEPS)
    if not done.after <= done.before:
        raise Failed(f"the divergence rises from {done.before:.3g} to {done.after:.3g}")
    after, factors = state(model), tuple(f"{name}.factors." for name in low_rank_layers(model))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    may_learn = {name for name, p in model.named_parameters() if p.dim() <= 1 or name.startswith(factors)}
    if changed - may_learn:
        raise Failed(f"'{min(changed - may_learn)}' has changed")
    if any(not torch.equal(value, fitted.dense.state_dict()[name]) for name, value in dense.items()):
        raise Failed("the dense model has changed")
    if not all(bool(torch.isfinite(value).all()) for value in after.values() if value.is_floating_point()):
        raise Failed("values are not finite")


def blocks(fitted: Fitted) -> None:
    """Consecutive blocks that a refinement trains one by one."""
    if not block_chain(fitted.dense, fitted.images[:1]):
        raise NotApplicable("no chain of blocks: all steps are on the whole model")


def loading(fitted: Fitted) -> None:
    """Saved and created by timm, the same outputs bit for bit."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        arp_hub.save_pretrained(fitted.model, Path(folder) / "model")
        loaded = timm.create_model(f"local-dir:{Path(folder) / 'model'}", pretrained=True).eval()
        pairs = zip(flat(loaded(fitted.images)), flat(fitted.model(fitted.images)), strict=True)
        if not all(torch.equal(found, expected) for found, expected in pairs):
            raise Failed("another output")


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: value.clone() for name, value in model.state_dict().items()}


FITS: dict[str, Callable[[Fitted], None]] = {
    "parameters": parameters,
    "fit": fit,
    "blocks": blocks,
    "refinement": refinement,
    "loading": loading,
}
"""Checks by name. One that does not hold raises `Failed` or `NotApplicable`."""
