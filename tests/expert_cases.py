"""Random experts and batches that the tests of kernels, experts, runners and layers share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tolerances import products_bound
from torch import Tensor

from mixtura.config import (
    SWIGLU_OAI,
    Activation,
    ActivationDtype,
    ActivationFunction,
    ExpertsConfig,
    GateUp,
    LimitOn,
    MoEConfig,
    PostNorm,
    RoutingConfig,
    WeightOn,
)
from mixtura.kernels import ExpertsKernel
from mixtura.kernels.cpu.arithmetic import Arithmetic, arithmetic_for
from mixtura.kernels.cpu.panels import ACTIVATION_GROUP
from mixtura.layer import FusedMoE
from mixtura.quant.formats import WeightFormat
from mixtura.quant.matrix import dense, dequantize
from mixtura.quant.quantize import quantize
from mixtura.quant.scheme import QuantScheme
from mixtura.types import ExpertBatch, ExpertsProblem, ExpertWeights

ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(),
    "silu-alpha": Activation(alpha=1.702),
    "gelu": Activation(function=ActivationFunction.GELU),
    "gelu_tanh": Activation(function=ActivationFunction.GELU_TANH),
    "relu": Activation(function=ActivationFunction.RELU),
    "relu2": Activation(function=ActivationFunction.RELU_SQUARED),
    "sigmoid": Activation(function=ActivationFunction.SIGMOID),
    "tanh": Activation(function=ActivationFunction.TANH),
    "identity": Activation(function=ActivationFunction.IDENTITY),
    "swiglu-oai": SWIGLU_OAI,
    "limit-gate": Activation(limit=1.5),
    "limit-activated": Activation(limit=1.5, limit_on=LimitOn.ACTIVATED),
    "gate-softcap": Activation(gate_softcap=2.0),
    "up-softcap": Activation(up_softcap=2.0),
    "both-softcaps": Activation(gate_softcap=1.5, up_softcap=2.5, alpha=0.5),
    "limit-softcap-offset": Activation(limit=3.0, up_softcap=2.0, up_offset=-0.5),
}


def sizes(num_experts: int = 5, hidden_size: int = 8, intermediate_size: int = 6) -> ExpertsConfig:
    """Plain gated experts of small, unlike sizes."""
    return ExpertsConfig(
        num_experts=num_experts, hidden_size=hidden_size, intermediate_size=intermediate_size
    )


CONFIGS: dict[str, ExpertsConfig] = {
    "stacked": sizes(),
    "interleaved": dataclasses.replace(sizes(), gate_up=GateUp.INTERLEAVED),
    "separate": dataclasses.replace(sizes(), gate_up=GateUp.SEPARATE),
    "ungated": dataclasses.replace(
        sizes(),
        gate_up=GateUp.UNGATED,
        activation=Activation(function=ActivationFunction.RELU_SQUARED),
    ),
    "transposed": dataclasses.replace(sizes(), is_transposed=True),
    "gpt-oss": dataclasses.replace(
        sizes(),
        gate_up=GateUp.INTERLEAVED,
        is_transposed=True,
        has_bias=True,
        activation=SWIGLU_OAI,
    ),
    "bias": dataclasses.replace(sizes(), has_bias=True),
    "ungated-bias": dataclasses.replace(sizes(), has_bias=True, gate_up=GateUp.UNGATED),
    "rms": dataclasses.replace(sizes(), post_norm=PostNorm.RMS, post_norm_epsilon=1e-3),
    "rms-scale-first": dataclasses.replace(
        sizes(), post_norm=PostNorm.RMS_SCALE_FIRST, post_norm_epsilon=1e-3, has_bias=True
    ),
}
"""One configuration for every way in which experts are stored, and every term they may have."""


def random_weights(
    config: ExpertsConfig, dtype: torch.dtype = torch.float32, seed: int = 0
) -> ExpertWeights:
    """Dense weights; a transposed storage is a transposed view, as experts modules make them."""
    generator = torch.Generator().manual_seed(seed)
    count, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        value = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return value.to(dtype)

    def stack(rows: int, columns: int) -> Tensor:
        value = normal(count, rows, columns, scale=columns**-0.5)
        return value.transpose(1, 2).contiguous().transpose(1, 2) if config.is_transposed else value

    is_separate = config.gate_up is GateUp.SEPARATE
    return ExpertWeights(
        config,
        gate_up_proj=dense(stack(config.up_size, hidden)),
        up_proj=dense(stack(config.up_size, hidden)) if is_separate else None,
        down_proj=dense(stack(hidden, inner)),
        gate_up_bias=normal(count, config.up_size) if config.has_bias else None,
        down_bias=normal(count, hidden) if config.has_bias else None,
        post_norm=normal(hidden) if config.post_norm is not None else None,
    )


def map_tensors(weights: ExpertWeights, change: dict[str, Tensor]) -> ExpertWeights:
    """The same weights with some dense tensors replaced, by role."""
    wrapped = {
        role: dense(value) if role.endswith("_proj") else value for role, value in change.items()
    }
    return dataclasses.replace(weights, **wrapped)


def dense_tensors(weights: ExpertWeights) -> dict[str, Tensor]:
    """The tensors of dense weights by role."""
    found = {
        "gate_up_proj": weights.gate_up_proj.values,
        "up_proj": weights.up_proj.values if weights.up_proj is not None else None,
        "down_proj": weights.down_proj.values,
        "gate_up_bias": weights.gate_up_bias,
        "down_bias": weights.down_bias,
        "post_norm": weights.post_norm,
    }
    return {role: tensor for role, tensor in found.items() if tensor is not None}


def converted(weights: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
    """Dense weights in another dtype."""
    changed = {role: tensor.to(dtype) for role, tensor in dense_tensors(weights).items()}
    return map_tensors(weights, changed)


def quantized(weights: ExpertWeights, weight_format: WeightFormat) -> ExpertWeights:
    """The same weights in a packed format; biases and norms stay as they are."""
    up = weights.up_proj
    return dataclasses.replace(
        weights,
        gate_up_proj=quantize(weights.gate_up_proj.values, weight_format),
        up_proj=quantize(up.values, weight_format) if up is not None else None,
        down_proj=quantize(weights.down_proj.values, weight_format),
    )


def dequantized(weights: ExpertWeights, dtype: torch.dtype = torch.float32) -> ExpertWeights:
    """Dense weights that packed ones stand for."""
    up = weights.up_proj
    return dataclasses.replace(
        weights,
        gate_up_proj=dense(dequantize(weights.gate_up_proj, dtype)),
        up_proj=dense(dequantize(up, dtype)) if up is not None else None,
        down_proj=dense(dequantize(weights.down_proj, dtype)),
    )


def cpu_products_bound(
    scheme: QuantScheme, rows: torch.dtype, activation_dtype: ActivationDtype | None = None
) -> float:
    """The `frobenius_error` that the cpu kernel may have with packed weights, on any path."""
    match arithmetic_for(scheme, activation_dtype, has_bf16=True):
        case Arithmetic.F32:
            return products_bound(torch.float32, None, rows)
        case Arithmetic.BF16:
            return products_bound(torch.bfloat16, None, rows)
        case Arithmetic.INT8:
            return products_bound(torch.int8, scheme.group_shape[1] or ACTIVATION_GROUP, rows)


def random_batch(
    config: ExpertsConfig,
    num_rows: int,
    top_k: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> ExpertBatch:
    """Rows with distinct experts per row and positive weights."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, config.hidden_size, generator=generator, dtype=torch.float64)
    order = torch.rand(num_rows, config.num_experts, generator=generator).argsort(1)
    weights = torch.rand(num_rows, top_k, generator=generator) + 0.1
    return ExpertBatch(rows.to(dtype), order[:, :top_k].to(torch.int32), weights)


def batch_of(batch: ExpertBatch, ids: Sequence[Sequence[int]]) -> ExpertBatch:
    """The same rows with these expert ids."""
    local_ids = torch.tensor(ids, dtype=torch.int32).reshape(len(batch.hidden_states), -1)
    weights = torch.linspace(0.2, 1.3, local_ids.numel()).reshape(local_ids.shape)
    return ExpertBatch(batch.hidden_states, local_ids, weights)


def problem_of(
    config: ExpertsConfig,
    dtype: torch.dtype = torch.float32,
    *,
    weight_on: WeightOn = WeightOn.OUTPUT,
    needs_grad: bool = False,
    is_deterministic: bool = False,
) -> ExpertsProblem:
    """What a kernel would be asked, with dense weights of the activations' dtype."""
    return ExpertsProblem(
        experts=config,
        schemes=(QuantScheme.dense(dtype),),
        row_dtype=dtype,
        device="cpu",
        weight_on=weight_on,
        needs_grad=needs_grad,
        is_deterministic=is_deterministic,
    )


def plain_function(x: Tensor, activation: Activation) -> Tensor:
    """The scalar function with its caps, in torch and in the dtype of `x`."""
    cap = activation.gate_softcap
    linear = x if cap is None else cap * torch.tanh(x / cap)
    table = {
        ActivationFunction.SILU: lambda: linear * torch.sigmoid(activation.alpha * x),
        ActivationFunction.GELU: lambda: F.gelu(x),
        ActivationFunction.GELU_TANH: lambda: F.gelu(x, approximate="tanh"),
        ActivationFunction.RELU: lambda: x.relu(),
        ActivationFunction.RELU_SQUARED: lambda: x.relu() ** 2,
        ActivationFunction.SIGMOID: lambda: torch.sigmoid(x),
        ActivationFunction.TANH: lambda: torch.tanh(x),
        ActivationFunction.IDENTITY: lambda: x,
    }
    return table[activation.function]()


def plain_activation(gate: Tensor, up: Tensor | None, activation: Activation) -> Tensor:
    """The activation in torch, written apart from the package."""
    limit, on_gate = activation.limit, activation.limit_on is LimitOn.GATE
    if limit is not None and on_gate:
        gate = torch.minimum(gate, torch.full_like(gate, limit))
    hidden = plain_function(gate, activation)
    if limit is not None and not on_gate:
        hidden = torch.minimum(hidden, torch.full_like(hidden, limit))
    if up is None:
        return hidden
    if limit is not None:
        up = torch.minimum(
            torch.maximum(up, torch.full_like(up, -limit)), torch.full_like(up, limit)
        )
    if activation.up_softcap is not None:
        up = activation.up_softcap * torch.tanh(up / activation.up_softcap)
    return hidden * (up + activation.up_offset)


def plain_expert(weights: ExpertWeights, expert: int, rows: Tensor) -> Tensor:
    """One expert on all rows, as a model's own code would do it, in the dtype of `rows`."""
    config, part = weights.config, dense_tensors(weights)
    inner = config.intermediate_size
    first = rows @ part["gate_up_proj"][expert].T.to(rows.dtype)
    if config.has_bias:
        first = first + part["gate_up_bias"][expert].to(rows.dtype)
    gate, up = first, None
    if config.gate_up is GateUp.STACKED:
        gate, up = first[:, :inner], first[:, inner:]
    elif config.gate_up is GateUp.INTERLEAVED:
        gate, up = first.reshape(-1, inner, 2).unbind(-1)
    elif config.gate_up is GateUp.SEPARATE:
        up = rows @ part["up_proj"][expert].T.to(rows.dtype)
    hidden = plain_activation(gate, up, config.activation)
    out = hidden @ part["down_proj"][expert].T.to(rows.dtype)
    if config.has_bias:
        out = out + part["down_bias"][expert].to(rows.dtype)
    if config.post_norm is None:
        return out
    weight = part["post_norm"].to(rows.dtype)
    if config.post_norm is PostNorm.RMS_SCALE_FIRST:
        out, weight = out * (1 + weight), torch.ones_like(weight)
    mean_square = (out.float() ** 2).mean(-1, keepdim=True)
    return out / (mean_square + config.post_norm_epsilon).sqrt().to(out.dtype) * weight


def plain_experts(
    weights: ExpertWeights, batch: ExpertBatch, weight_on: WeightOn = WeightOn.OUTPUT
) -> Tensor:
    """The dense formula: every expert on every row, weighed and added over the slots. -> (M,H)."""
    rows = batch.hidden_states
    total = torch.zeros(rows.shape, dtype=torch.promote_types(rows.dtype, torch.float32))
    for slot in range(batch.local_ids.shape[1]):
        ids = batch.local_ids[:, slot : slot + 1]
        weight = batch.topk_weights[:, slot : slot + 1]
        for expert in range(weights.config.num_experts):
            if weight_on is WeightOn.INPUT:
                out = plain_expert(weights, expert, (rows * weight).to(rows.dtype))
            else:
                out = plain_expert(weights, expert, rows) * weight
            total = total + torch.where(ids == expert, out, 0.0)
    return total.to(rows.dtype)


def gradients(
    kernel: ExpertsKernel,
    weights: ExpertWeights,
    batch: ExpertBatch,
    weight_on: WeightOn,
    runner: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of rows, routing weights and every weight tensor."""
    leaves = {
        role: t.detach().clone().requires_grad_() for role, t in dense_tensors(weights).items()
    }
    leaves["rows"] = batch.hidden_states.clone().requires_grad_()
    leaves["topk_weights"] = batch.topk_weights.clone().requires_grad_()
    roles = dense_tensors(weights).keys()
    packed = map_tensors(weights, {role: leaves[role] for role in roles})
    leafy = ExpertBatch(leaves["rows"], batch.local_ids, leaves["topk_weights"])
    out = (runner or kernel.run)(kernel.pack(packed), leafy, weight_on=weight_on)
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    found = torch.autograd.grad((out * cotangent).sum(), leaves.values(), allow_unused=True)
    assert all(grad is not None for grad in found), dict(zip(leaves, found, strict=True))
    return out.detach(), dict(zip(leaves, found, strict=True))


def moe_config(
    num_experts: int = 6,
    top_k: int = 2,
    hidden_size: int = 8,
    *,
    routing: dict[str, Any] | None = None,
    experts: dict[str, Any] | None = None,
    **layer: Any,
) -> MoEConfig:
    """A layer's configuration; `routing`, `experts` and `layer` override its parts."""
    rule = RoutingConfig(num_experts=num_experts, top_k=top_k, **(routing or {}))
    sizes_of_experts: dict[str, Any] = {
        "num_experts": num_experts + rule.num_fused_shared_experts,
        "hidden_size": hidden_size,
        "intermediate_size": 6,
    }
    return MoEConfig(
        hidden_size=hidden_size,
        routing=rule,
        experts=ExpertsConfig(**(sizes_of_experts | (experts or {}))),
        **layer,
    )


def build_layer(config: MoEConfig, seed: int = 0, **options: Any) -> FusedMoE:
    """A layer with random parameters, and random buffers where they are floats."""
    layer = FusedMoE(config, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
    return layer


def rows_of(num_rows: int, hidden_size: int = 8, seed: int = 1) -> Tensor:
    """Random hidden states (T,H)."""
    return torch.randn(num_rows, hidden_size, generator=torch.Generator().manual_seed(seed))
