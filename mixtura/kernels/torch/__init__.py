"""The portable kernel: rows sorted by expert, one torch product per expert that has rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtura.config import ExpertsConfig, WeightOn
from mixtura.kernels.contract import ExpertsKernel, sum_dtype
from mixtura.kernels.reference.activation import activate, split_gate_up
from mixtura.kernels.reference.norm import post_norm
from mixtura.kernels.torch.grouped_linear import grouped_linear
from mixtura.kernels.torch.linear_by_expert import is_lone_row_slow, linear_by_expert
from mixtura.quant.scheme import QuantizedMatrix
from mixtura.types import DENSE, ExpertBatch, ExpertsProblem, ExpertWeights

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class TorchKernel(ExpertsKernel):
    """Any device torch has; weights stay as they are, quantized ones are read expert by expert."""

    name: ClassVar[str] = "torch"
    has_backward: ClassVar[bool] = True
    shares_memory: ClassVar[bool] = True

    def cannot_run(self, problem: ExpertsProblem) -> str | None:
        if problem.activation_dtype not in FLOAT_DTYPES:
            return f"cannot compute in {problem.activation_dtype}"
        if problem.scheme == DENSE and problem.weight_dtype not in FLOAT_DTYPES:
            return f"cannot read dense weights of {problem.weight_dtype}"
        if problem.needs_grad and problem.scheme != DENSE:
            return f"has no gradient for weights in the scheme {problem.scheme}"
        return None

    def pack(self, weights: ExpertWeights) -> ExpertWeights:
        return weights

    def unpack(self, packed: Any, config: ExpertsConfig) -> ExpertWeights:
        assert isinstance(packed, ExpertWeights)
        return packed

    def run(
        self,
        packed: Any,
        batch: ExpertBatch,
        *,
        weight_on: WeightOn = WeightOn.OUTPUT,
        reduce: bool = True,
    ) -> Tensor:
        assert isinstance(packed, ExpertWeights)
        if torch.compiler.is_compiling() or _needs_graph(packed, batch):
            terms = _run_grouped(packed, batch, weight_on)
            return terms.sum(1).to(batch.hidden_states.dtype) if reduce else terms
        return _run_eager(packed, batch, weight_on, reduce)


def _needs_graph(weights: ExpertWeights, batch: ExpertBatch) -> bool:
    """Whether autograd records this call."""
    if not torch.is_grad_enabled():
        return False
    inputs = (batch.hidden_states, batch.topk_weights, *weights.tensors())
    return any(tensor.requires_grad for tensor in inputs)


Linear = Callable[[Tensor, QuantizedMatrix, Tensor | None], Tensor]
"""Every expert's linear map, with its bias (L, out), on rows sorted by expert. -> (N, out)."""


def _run_experts(weights: ExpertWeights, x: Tensor, linear: Linear) -> Tensor:
    """The experts on rows sorted by expert. (N, H) -> (N, H)."""
    config = weights.config
    first = linear(x, weights.gate_up_proj, weights.gate_up_bias)
    gate, up = split_gate_up(first, config.gate_up)
    if weights.up_proj is not None:
        up = linear(x, weights.up_proj, None)
    hidden = activate(gate, up, config.activation)
    out = linear(hidden, weights.down_proj, weights.down_bias)
    if config.post_norm is not None:
        assert weights.post_norm is not None
        out = post_norm(out, weights.post_norm, config.post_norm, config.post_norm_epsilon)
    return out


def _run_eager(
    weights: ExpertWeights, batch: ExpertBatch, weight_on: WeightOn, reduce: bool
) -> Tensor:
    """Without a graph, touching only experts that have rows. -> (M, H), or (M, K, H) fp32."""
    rows, ids = batch.hidden_states, batch.local_ids
    flat, slot_weights = ids.reshape(-1), batch.topk_weights.to(sum_dtype(rows.dtype))
    counts = torch.bincount(flat + 1, minlength=weights.config.num_experts + 1)
    num_absent, *tokens_per_expert = counts.tolist()
    sort_order = flat.argsort(stable=True)[num_absent:]  # slots with id -1 come first
    if 1 in tokens_per_expert and is_lone_row_slow(rows, weights.gate_up_proj):
        is_lone = counts[flat[sort_order] + 1] == 1
        sort_order = sort_order.repeat_interleave(is_lone + 1)
        tokens_per_expert = [2 if count == 1 else count for count in tokens_per_expert]
    x = rows[sort_order // ids.shape[1]]
    if weight_on is WeightOn.INPUT:
        x = (x * slot_weights.view(-1, 1)[sort_order]).to(rows.dtype)

    def linear(x: Tensor, weight: QuantizedMatrix, bias: Tensor | None) -> Tensor:
        out = linear_by_expert(x, weight, tokens_per_expert)
        return out if bias is None else out + bias.to(x.dtype)[flat[sort_order]]

    out = _run_experts(weights, x, linear).to(slot_weights.dtype)
    scale = slot_weights if weight_on is WeightOn.OUTPUT else None
    row_of_slot = sort_order.new_full((flat.numel(),), sort_order.numel())
    found = torch.arange(sort_order.numel(), device=rows.device)
    row_of_slot = row_of_slot.scatter_(0, sort_order, found).view(ids.shape)
    if num_absent:
        out = F.pad(out, (0, 0, 0, 1))  # a last row of zeros, where row_of_slot points for id -1
        scale = None if scale is None else scale.masked_fill(ids < 0, 0.0)
    if reduce and rows.device.type == "cpu":
        # Gathers, weighs and adds in slot order in one pass: (M, K, H) is never in memory.
        total = F.embedding_bag(row_of_slot, out, mode="sum", per_sample_weights=scale)
        return total.to(rows.dtype)
    terms = out[row_of_slot] if scale is None else out[row_of_slot] * scale.unsqueeze(-1)
    return terms.sum(1).to(rows.dtype) if reduce else terms


def _run_grouped(weights: ExpertWeights, batch: ExpertBatch, weight_on: WeightOn) -> Tensor:
    """All experts at once, as a few nodes of a graph. -> (M, K, H) fp32.

    Shapes do not depend on the ids and the host does not wait, as `torch.compile` needs it; and the
    gradient of a stack of experts is made once, where slicing it would make one per expert.
    """
    config = weights.config
    num_rows, top_k = batch.local_ids.shape
    dtype = sum_dtype(batch.hidden_states.dtype)
    flat = batch.local_ids.reshape(-1).long()
    flat = torch.where(flat < 0, config.num_experts, flat)  # slots without an expert sort last
    sort_order = flat.argsort(stable=True)
    slot_weights = batch.topk_weights.reshape(-1, 1).to(dtype)[sort_order]
    expert_of_row = flat[sort_order].clamp(max=config.num_experts - 1)
    counts = flat.new_zeros(config.num_experts + 1).scatter_add(0, flat, torch.ones_like(flat))
    expert_offsets = F.pad(counts[:-1].cumsum(0), (1, 0))

    x = batch.hidden_states[sort_order // top_k]
    if weight_on is WeightOn.INPUT:
        x = (x * slot_weights).to(x.dtype)

    def linear(x: Tensor, weight: QuantizedMatrix, bias: Tensor | None) -> Tensor:
        out = grouped_linear(x, weight, expert_offsets)
        return out if bias is None else out + bias.to(x.dtype)[expert_of_row]

    out = _run_experts(weights, x, linear).to(dtype)
    if weight_on is WeightOn.OUTPUT:
        out = out * slot_weights
    has_expert = (flat[sort_order] < config.num_experts).unsqueeze(1)
    out = torch.where(has_expert, out, 0.0)
    return out[sort_order.argsort()].view(num_rows, top_k, out.shape[1])
