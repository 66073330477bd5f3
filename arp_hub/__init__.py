"""Shrink vision models: adaptive rank penalty, low-rank decomposition, one-line loading through timm."""

from . import models  # registers the architectures with timm
from ._version import __version__  # noqa: F401 - a name of the package, which `import *` leaves out
from .compression import compress
from .decomposition import decompose, to_dense
from .deployment.export import export
from .errors import ArpHubError
from .hub.push import download, push_to_hub
from .hub.save import save_pretrained
from .layers.factor_names import factor_names
from .penalty import AdaptiveRankPenalty
from .plan import LayerPlan, RankPlan
from .planning.make_plan import make_plan
from .refinement.refine import Refinement, refine
from .reports.benchmark import benchmark
from .timing import Workload

__all__ = [
    "AdaptiveRankPenalty",
    "ArpHubError",
    "LayerPlan",
    "RankPlan",
    "Refinement",
    "Workload",
    "benchmark",
    "compress",
    "decompose",
    "download",
    "export",
    "factor_names",
    "make_plan",
    "models",
    "push_to_hub",
    "refine",
    "save_pretrained",
    "to_dense",
]
