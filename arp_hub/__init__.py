"""Shrink vision models: adaptive rank penalty, low-rank decomposition, one-line loading through timm."""

__version__ = "0.1.0"

from . import models  # registers the architectures with timm
from .bench import benchmark
from .budget import make_plan
from .decompose import decompose, to_dense
from .errors import ArpHubError
from .hub import save_pretrained
from .penalty import AdaptiveRankPenalty
from .plan import LayerPlan, RankPlan
from .publish import download, push_to_hub
from .timing import Workload

__all__ = [
    "AdaptiveRankPenalty",
    "ArpHubError",
    "LayerPlan",
    "RankPlan",
    "Workload",
    "benchmark",
    "decompose",
    "download",
    "make_plan",
    "models",
    "push_to_hub",
    "save_pretrained",
    "to_dense",
]
