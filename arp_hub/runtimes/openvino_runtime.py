"""OpenVINO files and runtime."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from ..errors import ArpHubError
from .capture import Captured, quiet
from .runtime import INPUT, OUTPUT, Batches, Run, Runtime, int8_saturates
from .weight_names import nodes_of


class OpenVino(Runtime):
    """OpenVINO. Int8 is the post-training quantisation of NNCF."""

    name, title, file = "openvino", "OpenVINO", "model.xml"
    packages, int8_packages, extra = ("openvino",), ("nncf",), "openvino"

    def write(self, captured: Captured, path: Path, opset: int | None = None) -> None:
        """Write a model in float32: the graph, with its weights in ``model.bin`` beside it."""
        self._save(self._convert(captured), path)

    def write_int8(
        self, captured: Captured, path: Path, images: Batches, opset: int | None = None, in_float: Collection[str] = ()
    ) -> None:
        """Write a model that NNCF quantises. A model with attention is treated as NNCF treats transformers."""
        with quiet():
            import nncf

        converted = self._convert(captured)
        kind = nncf.ModelType.TRANSFORMER if captured.has_attention else None
        data = nncf.Dataset(images, lambda batch: {INPUT: batch.numpy()})
        with quiet(), redirect_stdout(StringIO()):
            scope = nncf.IgnoredScope(names=nodes_of(captured.model, in_float, _products(converted)))
            overflow = nncf.OverflowFix.ENABLE if int8_saturates() else None
            advanced = nncf.AdvancedQuantizationParameters(overflow_fix=overflow)
            quantised = nncf.quantize(
                converted,
                data,
                subset_size=len(images),
                model_type=kind,
                ignored_scope=scope,
                advanced_parameters=advanced,
            )
        self._save(quantised, path)

    def _convert(self, captured: Captured) -> Any:
        import openvino

        try:
            with quiet():
                model = openvino.convert_model(captured.program)
        except Exception as error:  # the converter raises many kinds of errors
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise ArpHubError(f"OpenVINO cannot convert the model: {reason:.300}") from error
        model.input(0).tensor.set_names({INPUT})
        model.output(0).tensor.set_names({OUTPUT})
        return model

    def _save(self, model: Any, path: Path) -> None:
        import openvino

        openvino.save_model(model, path, compress_to_fp16=False)

    def load(self, path: Path, output: int | None = None) -> Run:
        """The model compiled for the CPU, to compute in float32 where it is not quantised."""
        import openvino

        config = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",
            "NUM_STREAMS": 1,
        }
        core = openvino.Core()
        model = core.read_model(path)
        if output is not None:
            model = openvino.Model([model.get_results()[output]], model.get_parameters())
        compiled = core.compile_model(model, "CPU", config)
        request = compiled.create_infer_request()
        return lambda images: torch.from_numpy(request.infer({0: images.numpy()})[0].copy())


def _products(model: Any) -> dict[str, Any]:
    """The weights of convolutions and matrix products, by the names of their operations."""
    found = {}
    for operation in model.get_ops():
        if operation.get_type_name() in ("Convolution", "GroupConvolution", "MatMul"):
            source = operation.input_value(1).get_node()
            if source.get_type_name() == "Constant":
                found[operation.get_friendly_name()] = source.get_data()
    return found
