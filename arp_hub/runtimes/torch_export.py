"""Files of ``torch.export``, run by torch."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from ..errors import ArpHubError
from .capture import Captured, quiet, without_paths
from .runtime import Batches, Run, Runtime, int8_saturates

_QUANTISING = "quantized_decomposed"
"""Namespace of the operators that quantise."""


class TorchExport(Runtime):
    """torch.export. Int8 is the PT2E quantisation of torchao for x86."""

    name, title, file = "torch-export", "torch.export", "model.pt2"
    int8_packages, extra = ("torchao",), "torchao"

    def write(self, captured: Captured, path: Path, opset: int | None = None) -> None:
        """Write the graph with its weights as one file."""
        with quiet():
            torch.export.save(captured.program, path)

    def write_int8(
        self, captured: Captured, path: Path, images: Batches, opset: int | None = None, in_float: Collection[str] = ()
    ) -> None:
        """Insert observers, run the calibration images, and write the graph with quantised weights."""
        with quiet():
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
            from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

            quantizer = x86.X86InductorQuantizer()
            config = x86.get_default_x86_inductor_quantization_config(reduce_range=int8_saturates())
            quantizer.set_global(config)
            for name in in_float:
                quantizer.set_module_name_qconfig(name, None)
            try:
                prepared = prepare_pt2e(captured.program.module(), quantizer)
                with torch.no_grad():
                    for batch in images:
                        prepared(batch)
                converted = convert_pt2e(prepared)
                shapes = ({0: Dim("batch")},) if captured.dynamic_batch else None
                program = torch.export.export(converted, (captured.example(),), dynamic_shapes=shapes)
                torch.export.save(without_paths(program), path)
            except Exception as error:  # torchao raises many kinds of errors
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise ArpHubError(f"torchao cannot quantise the model: {reason:.300}") from error

    def load(self, path: Path, output: int | None = None) -> Run:
        """The graph as a module; an int8 one compiled with constant weights, because only then its kernels are int8."""
        with quiet():
            graph: nn.Module = torch.export.load(path).module()
            if any(_QUANTISING in str(node.target) for node in cast(fx.GraphModule, graph).graph.nodes):
                return _compiled(graph)
        return torch.no_grad()(graph.__call__)


def _compiled(graph: nn.Module) -> Run:
    """A quantised graph that is compiled with constant weights at its first call with a new shape."""
    from torch._inductor import config

    compiled, seen = torch.compile(graph), set[torch.Size]()

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        if images.shape in seen:
            return compiled(images)
        try:
            with quiet(), config.patch(freezing=True):
                found = compiled(images)
        except Exception as error:  # the compiler raises many kinds of errors
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ArpHubError(
                f"torch.compile cannot build the int8 kernels: {reason:.300} (it needs a C++ compiler: install one, or "
                "export to onnx or openvino)"
            ) from error
        seen.add(images.shape)
        return found

    return run
