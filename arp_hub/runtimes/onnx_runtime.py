"""ONNX files and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ArpHubError
from .capture import Captured, quiet
from .runtime import INPUT, OUTPUT, Batches, Run, Runtime, int8_saturates
from .weight_names import nodes_of

_LARGEST = 2**31 - 2**20
"""Bytes of weights that fit into one ONNX file: protobuf holds 2 GiB, of which 1 MiB is left for the graph."""
_MATRIX_PRODUCTS = ("Conv", "Gemm", "MatMul")


class OnnxRuntime(Runtime):
    """ONNX Runtime. Int8 is its static quantisation: QDQ nodes, weights per output channel, activations per tensor."""

    name, title, file = "onnx", "ONNX Runtime", "model.onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")

    def write(self, captured: Captured, path: Path, opset: int | None = None) -> None:
        """Write a model in float32 as one file."""
        size = sum(tensor.nbytes for tensor in captured.model.state_dict().values())
        if size > _LARGEST:
            raise ArpHubError(f"the weights take {size:,} bytes, an ONNX file holds {_LARGEST:,}: use another format")
        try:
            with quiet(), redirect_stdout(StringIO()):
                torch.onnx.export(
                    captured.program,
                    (captured.example(),),
                    path,
                    dynamo=True,
                    verbose=False,
                    external_data=False,
                    opset_version=opset,
                    input_names=[INPUT],
                    output_names=_outputs(captured.outputs),
                )
                written = _slim(path)
        except Exception as error:  # the exporter raises many kinds of errors
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ArpHubError(f"the model cannot be written as ONNX: {reason:.300}") from error
        if opset not in (None, written):  # the exporter writes its own version where it cannot convert
            raise ArpHubError(f"the model cannot be written with opset {opset}, only with {written}: leave opset out")

    def write_int8(
        self, captured: Captured, path: Path, images: Batches, opset: int | None = None, in_float: Collection[str] = ()
    ) -> None:
        """Write a model, fold its constants and BatchNorms, and quantise it."""
        import onnx
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self.batches: Iterator[Tensor] = iter(images)

            def get_next(self) -> dict[str, Any] | None:
                batch = next(self.batches, None)
                return None if batch is None else {INPUT: batch.numpy()}

        plain, folded = (path.with_name(f"{path.stem}-{kind}.onnx") for kind in ("float", "folded"))
        try:
            self.write(captured, plain, opset)
            with quiet():
                quant_pre_process(plain, folded, skip_symbolic_shape=True)
                quantize_static(
                    folded,
                    path,
                    Reader(),
                    quant_format=QuantFormat.QDQ,
                    per_channel=True,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    reduce_range=int8_saturates(),
                    op_types_to_quantize=list(_MATRIX_PRODUCTS) if captured.has_attention else None,
                    nodes_to_exclude=nodes_of(captured.model, in_float, _products(onnx.load(folded))),
                )
        finally:
            plain.unlink(missing_ok=True)
            folded.unlink(missing_ok=True)

    def load(self, path: Path, output: int | None = None) -> Run:
        """A session on the CPU."""
        import onnx
        import onnxruntime
        from onnx.utils import Extractor

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        source: Path | bytes = path
        if output is not None:
            graph = onnx.load(path)
            source = Extractor(graph).extract_model([INPUT], [graph.graph.output[output].name]).SerializeToString()
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])


def _outputs(count: int) -> list[str]:
    """Names of the outputs of a graph."""
    return [OUTPUT] if count == 1 else [f"{OUTPUT}.{index}" for index in range(count)]


def _products(model: Any) -> dict[str, Any]:
    """The weights of convolutions and matrix products, by the names of their nodes."""
    from onnx.numpy_helper import to_array

    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type in _MATRIX_PRODUCTS and node.input[1] in weights]
    return {node.name: to_array(weights[node.input[1]]) for node in nodes}


def _slim(path: Path) -> int:
    """Remove the exporter's notes on each node, which can be larger than the weights. Returns the file's opset."""
    import onnx

    model = onnx.load(path)
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.initializer, model.graph):
        part.ClearField("metadata_props")
    onnx.save(model, path)
    return next(one.version for one in model.opset_import if not one.domain)
