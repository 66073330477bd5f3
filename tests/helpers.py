"""Decomposed models, and the import path of child processes, for several tests."""

from __future__ import annotations

import os
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from watched import NONE_LEFT

import arp_hub
from arp_hub.layers.low_rank import layer_shape
from arp_hub.schemes import make_scheme


def search_path(root: Path) -> str:
    """``PYTHONPATH`` of a child process: the repository, then the entries of its parent."""
    return os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])


# localhost, because some machines cannot resolve their own name
ON_TWO = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost", "--nproc_per_node", "2",
          str(Path(__file__).with_name("watched.py"))]  # fmt: skip
"""Options of Python that run the following script on two processes, which report Gloo threads left at their end."""


def both_ended_clean(said: str) -> bool:
    """Whether both processes report that no thread of their process group outlives them."""
    return said.count(NONE_LEFT) == 2


def half_rank_plan(model: nn.Module, layers: dict[str, str]) -> arp_hub.RankPlan:
    """A plan with the given scheme for every named layer, at half its full rank."""
    modules = dict(model.named_modules())
    plans = {}
    for name, scheme in layers.items():
        groups = 2 if scheme.startswith("group_") else 1
        full = make_scheme(scheme, layer_shape(modules[name]), groups).max_rank
        plans[name] = arp_hub.LayerPlan(scheme, max(full // 2, 1), groups)
    return arp_hub.RankPlan(plans)


def low_rank_model(name: str, layers: dict[str, str], /, **kwargs: object) -> nn.Module:
    """A timm model with random weights and statistics, some of its layers decomposed at half rank."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return arp_hub.decompose(model, half_rank_plan(model, layers))


def load(folder: Path, **kwargs: object) -> nn.Module:
    """The model that ``timm.create_model`` loads from a saved folder."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """A model's output, or its feature maps, as a list."""
    y = model(x)
    return list(y) if isinstance(y, (list, tuple)) else [y]
