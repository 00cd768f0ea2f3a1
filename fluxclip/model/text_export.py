"""The text tower as ONNX: token ids in, unit vectors out, without torch.

Shape legend: B captions, L tokens, D shared width; of a weight: K inputs, N outputs,
P blocks of S inputs, R rows of a table.
"""

import math
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fluxclip.model.fluxclip import FluxCLIP

TOKENIZER = "tokenizer.json"
FP32 = "fp32.onnx"
INT8 = "int8.onnx"

_OPSET = 21  # the first with a scale per block of a weight
# A scale for each 64 inputs of an output: 6 % of the size, a third of the error of one per output.
_BLOCK = 64
_MIN_WEIGHTS = 4096  # smaller tables are not worth it
_MAX_BYTES = 2**31  # of one ONNX file
_WEIGHT_OF = {"MatMul": 1, "Gemm": 1, "Gather": 0}  # operator -> which input may be a weight


def write(model: FluxCLIP, folder: Path) -> None:
    """Write `fp32.onnx`, `int8.onnx` and `tokenizer.json` into an existing folder.

    Input `ids`, int64 (B, L) as the tokenizer pads them; output `vectors`, float32 (B, D), unit
    length. B and L are free. int8.onnx has the same arithmetic in fp32 on weights rounded to 8
    bits. Raises ValueError in one line for a text tower that has no such form.
    """
    tokenizer = model.text.tokenizer_json()
    num_bytes = sum(p.numel() * p.element_size() for p in model.text.parameters())
    if num_bytes > _MAX_BYTES:
        raise ValueError(
            f"a text tower of {num_bytes / 1e9:.1f} GB does not fit into an ONNX file, which ends "
            f"at {_MAX_BYTES / 1e9:.1f} GB"
        )
    graph = _traced(model)
    (folder / TOKENIZER).write_text(tokenizer, encoding="utf-8")
    (folder / FP32).write_bytes(graph.SerializeToString())
    _round_weights(graph.graph)
    (folder / INT8).write_bytes(graph.SerializeToString())


class _TextTower(nn.Module):
    def __init__(self, model: FluxCLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BL: Tensor) -> Tensor:
        return self.model.encode_text(ids_BL)


def _traced(model: FluxCLIP) -> Any:
    """The tower as an ONNX ModelProto."""
    # two captions of several tokens: sizes of 1 would be taken for constants
    ids_BL = model.tokenize(["a dog catches a frisbee", "a cat"]).to(model.log_scale.device)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter, about itself
            program = torch.onnx.export(
                _TextTower(model).eval(), (ids_BL,), dynamo=True, verbose=False,
                input_names=["ids"], output_names=["vectors"],
                dynamic_shapes=({0: "batch", 1: "length"},), opset_version=_OPSET,
            )  # fmt: skip
            assert program is not None
            return program.model_proto
    except Exception as error:  # code of others is traced, which can fail in any way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"the text tower cannot be written as ONNX: {reason}") from error


def _round_weights(graph: Any) -> None:
    """Turn the large weights of a GraphProto into 8-bit integers with scales.

    Only the weights, not what is multiplied with them: rounding that too, as onnxruntime's dynamic
    quantization does, costs MiniLM thirty times as much (lowest cosine 0.97 instead of 0.999).
    """
    from onnx import TensorProto

    uses = Counter(name for node in graph.node for name in node.input)
    large = {
        tensor.name: tensor
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.FLOAT
        and len(tensor.dims) == 2
        and math.prod(tensor.dims) >= _MIN_WEIGHTS
        and uses[tensor.name] == 1  # a table that is read in two ways would be stored twice
    }
    nodes, added = [], []
    for node in graph.node:
        place = _WEIGHT_OF.get(node.op_type)
        weight = None if place is None else large.get(node.input[place])
        if weight is None:
            nodes.append(node)
            continue
        rounded = _rounded_gather if node.op_type == "Gather" else _rounded_product
        new_nodes, new_tensors = rounded(node, weight)
        nodes += new_nodes
        added += new_tensors
        graph.initializer.remove(weight)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(added)


def _rounded_gather(node: Any, weight: Any) -> tuple[list[Any], list[Any]]:
    """Rows of a table (R, D) with one scale each, looked up and scaled."""
    from onnx import TensorProto, helper, numpy_helper

    table_RD = numpy_helper.to_array(weight)
    scale_R1 = _scale(table_RD, axis=1)
    tensors = [
        numpy_helper.from_array(_rounded(table_RD, scale_R1), f"{weight.name}.int8"),
        numpy_helper.from_array(scale_R1, f"{weight.name}.scale"),
    ]
    ids, found = node.input[1], node.output[0]
    nodes = [
        helper.make_node("Gather", [tensors[0].name, ids], [f"{found}.int8"], axis=0),
        helper.make_node("Gather", [tensors[1].name, ids], [f"{found}.scale"], axis=0),
        helper.make_node("Cast", [f"{found}.int8"], [f"{found}.float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{found}.float", f"{found}.scale"], [found]),
    ]
    return nodes, tensors


def _rounded_product(node: Any, weight: Any) -> tuple[list[Any], list[Any]]:
    """A matrix (K, N), or (N, K) where a Gemm transposes it, made fp32 again when it is used."""
    from onnx import helper, numpy_helper

    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    matrix_KN = numpy_helper.to_array(weight)
    if transposed:
        matrix_KN = matrix_KN.T
    k, n = matrix_KN.shape
    size = _BLOCK if k % _BLOCK == 0 else k
    blocks_PSN = matrix_KN.reshape(k // size, size, n)
    scale_P1N = _scale(blocks_PSN, axis=1)
    int8_KN, scale_PN = _rounded(blocks_PSN, scale_P1N).reshape(k, n), scale_P1N[:, 0]
    stored = (int8_KN.T, scale_PN.T) if transposed else (int8_KN, scale_PN)
    tensors = [
        numpy_helper.from_array(np.ascontiguousarray(array), f"{weight.name}.{kind}")
        for array, kind in zip(stored, ("int8", "scale"), strict=True)
    ]
    axis = 1 if transposed else 0
    restored = helper.make_node(
        "DequantizeLinear", [tensor.name for tensor in tensors], [f"{weight.name}.float"],
        axis=axis, block_size=size,
    )  # fmt: skip
    node.input[_WEIGHT_OF[node.op_type]] = restored.output[0]
    return [restored, node], tensors


def _scale(weights: np.ndarray, *, axis: int) -> np.ndarray:
    """What 127 stands for: the largest magnitude along an axis, which is kept with size 1."""
    largest: np.ndarray = np.abs(weights).max(axis=axis, keepdims=True)
    return np.where(largest > 0, largest / 127, 1).astype(np.float32)


def _rounded(weights: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.rint(weights / scale).clip(-127, 127).astype(np.int8)
