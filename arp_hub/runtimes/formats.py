"""The formats that a model is exported to."""

from __future__ import annotations

from ..errors import ArpHubError
from .onnx_runtime import OnnxRuntime
from .openvino_runtime import OpenVino
from .runtime import Runtime
from .torch_export import TorchExport

RUNTIMES: dict[str, Runtime] = {one.name: one for one in (OnnxRuntime(), OpenVino(), TorchExport())}
"""The runtimes by the names of their formats."""
TIMED = {"onnxruntime": RUNTIMES["onnx"], "openvino": RUNTIMES["openvino"]}
"""The runtimes of a `arp_hub.Workload` other than PyTorch, by the names that it takes."""


def runtime_of(name: str) -> Runtime:
    """The runtime of a format.

    Raises:
        ArpHubError: If there is no such format.
    """
    if not isinstance(name, str) or name not in RUNTIMES:
        raise ArpHubError(f"unknown format {name!r:.50}: choose one of {', '.join(RUNTIMES)}")
    return RUNTIMES[name]
