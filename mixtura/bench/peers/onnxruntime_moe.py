"""ONNX Runtime's MoE and QMoE operators (domain com.microsoft), where both packages are installed.

The operators route by themselves, so that they are given logits from which their softmax over the
chosen experts makes the weights of the batch. Weights go in as initializers outside the file: a
model of more than 2 GB cannot be one protobuf.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mixtura.bench.cases import Case
from mixtura.bench.contenders import Contender, Layer, RunBatch
from mixtura.config import SWIGLU_OAI, ExpertsConfig, GateUp
from mixtura.quant.formats import WeightFormat
from mixtura.quant.matrix import QuantizedMatrix
from mixtura.quant.scheme import Code, ZeroPoint
from mixtura.types import ExpertBatch, ExpertWeights

NAME = "onnxruntime"

FAR_BELOW = -1e4
"""The logit of an expert that is not chosen."""

INT8_ACTIVATIONS = 4
"""`accuracy_level`: 4-bit experts may use int8 activations, as ours do."""

OPSET, IR_VERSION = 21, 10


@dataclass(frozen=True)
class OnnxContender(Contender):
    """MoE in fp32 for dense weights, QMoE for symmetric integers of 4 and 8 bits."""

    name: str = NAME
    is_ours: bool = False

    def refusal(self, case: Case) -> str | None:
        missing = [name for name in ("onnxruntime", "onnx") if _optional(name) is None]
        if missing:
            return f"{' and '.join(missing)} not installed"
        scheme, experts = case.weights.scheme, case.shape.experts
        if case.shape.routing.no_compute is not None:
            return "its operators have no experts without arithmetic"
        if scheme.is_quantized and (scheme.code, scheme.zero_point) != (Code.INT, ZeroPoint.MID):
            return f"its operators read no {case.weights.value} on CPUs"
        columns = scheme.group_shape[1]
        sizes = (experts.hidden_size, experts.intermediate_size)
        if scheme.is_quantized and columns is not None and any(size % columns for size in sizes):
            return f"asks for sizes that groups of {columns} divide"
        activation = experts.activation
        plain = replace(SWIGLU_OAI, alpha=activation.alpha, up_offset=activation.up_offset)
        if replace(activation, limit=plain.limit) != plain or experts.post_norm is not None:
            return "its operators have no such activation or norm"
        if experts.gate_up not in (GateUp.STACKED, GateUp.INTERLEAVED):
            return "its operators are given gate and up in one matrix here"
        return None

    def weights(self, case: Case) -> str:
        return case.weights.value if case.weights.scheme.is_quantized else "fp32"

    def expert_bytes(self, case: Case) -> int:
        if not case.weights.scheme.is_quantized:
            return case.shape.expert_bytes(WeightFormat.FP32.scheme)
        return 2 * case.expert_bytes  # fp32 scales, and a second copy where it packs the codes

    def bind(self, layer: Layer) -> RunBatch:
        scheme = layer.case.weights.scheme
        stacks = layer.stacks if scheme.is_quantized else layer.dense_stacks
        session = _session(layer.case, _arrays(stacks))

        def run_batch(inputs: dict[str, Any]) -> Tensor:
            out: Tensor = torch.from_numpy(session.run(None, inputs)[0])
            return out

        return run_batch

    def prepare(self, case: Case, batch: ExpertBatch) -> dict[str, Any]:
        """fp32 rows, and logits whose softmax over the chosen experts gives their weights."""
        logits = torch.full((batch.local_ids.shape[0], case.shape.experts.num_experts), FAR_BELOW)
        logits.scatter_(1, batch.local_ids.long(), batch.topk_weights.log())
        return {"x": batch.hidden_states.float().numpy(), "logits": logits.numpy()}


def _optional(name: str) -> Any:
    """The module, or None."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _interleaved(config: ExpertsConfig, rows: Tensor) -> Tensor:
    """Rows (L, 2I, ...) with gate and up in turn, as the operators want them."""
    if config.gate_up is GateUp.INTERLEAVED:
        return rows
    halves = rows.view(rows.shape[0], 2, config.intermediate_size, *rows.shape[2:])
    return halves.transpose(1, 2).flatten(1, 2)


def _arrays(stacks: ExpertWeights) -> dict[str, Any]:
    """The operators' initializers by name; scales in fp32, those of a whole row without groups."""

    def scales(matrix: QuantizedMatrix) -> Tensor | None:
        if matrix.scales is None:
            return None
        is_per_row = matrix.scheme.group_shape[1] is None
        return matrix.scales.float().squeeze(-1) if is_per_row else matrix.scales.float()

    first = (stacks.gate_up_proj.values, scales(stacks.gate_up_proj), stacks.gate_up_bias)
    second = (stacks.down_proj.values, scales(stacks.down_proj), stacks.down_bias)
    found: dict[str, Any] = {}
    for kind, up, down in zip(("weights", "scales", "bias"), first, second, strict=True):
        for name, tensor in ((f"fc1_{kind}", up), (f"fc2_{kind}", down)):
            if tensor is not None:
                tensor = tensor if tensor.dtype == torch.uint8 else tensor.float()
                tensor = _interleaved(stacks.config, tensor) if name.startswith("fc1") else tensor
                found[name] = tensor.contiguous().numpy()
    return found


def _attributes(case: Case) -> dict[str, Any]:
    experts, scheme = case.shape.experts, case.weights.scheme
    found: dict[str, Any] = {
        "k": case.shape.top_k,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,  # gate and up in turn
        "activation_alpha": experts.activation.alpha,
        "activation_beta": experts.activation.up_offset,
        "normalize_routing_weights": 1,
    }
    if experts.activation.limit is not None:
        found["swiglu_limit"] = experts.activation.limit
    if scheme.is_quantized:
        found["expert_weight_bits"] = scheme.bits
        found["accuracy_level"] = INT8_ACTIVATIONS
        if scheme.group_shape[1] is not None:
            found["block_size"] = scheme.group_shape[1]
    return found


def _session(case: Case, arrays: dict[str, Any]) -> Any:
    """A session of one operator on these weights, with torch's number of threads."""
    onnx, runtime = _optional("onnx"), _optional("onnxruntime")
    helper, proto = onnx.helper, onnx.TensorProto
    order = (
        ("weights", "scales", "bias") if case.weights.scheme.is_quantized else ("weights", "bias")
    )
    inputs = [f"{layer}_{kind}" for layer in ("fc1", "fc2") for kind in order]
    node = helper.make_node(
        "QMoE" if case.weights.scheme.is_quantized else "MoE",
        ["x", "logits", *(name if name in arrays else "" for name in inputs)],
        ["out"],
        domain="com.microsoft",
        **_attributes(case),
    )
    experts = case.shape.experts
    rows = helper.make_tensor_value_info("x", proto.FLOAT, ["T", experts.hidden_size])
    logits = helper.make_tensor_value_info("logits", proto.FLOAT, ["T", experts.num_experts])
    out = helper.make_tensor_value_info("out", proto.FLOAT, ["T", experts.hidden_size])
    outside = [_initializer(onnx, name, array) for name, array in arrays.items()]
    graph = helper.make_graph([node], "experts", [rows, logits], [out], outside)
    sets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=sets, ir_version=IR_VERSION)

    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads spin for a while after a run, and would do so during the next contender's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    values = [runtime.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
    options.add_external_initializers(list(arrays), values)
    return runtime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def _initializer(onnx: Any, name: str, array: Any) -> Any:
    """The declaration of a tensor whose data come with the session's options."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = onnx.TensorProto(name=name, data_type=kind, dims=array.shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="given with the session")
    return tensor
