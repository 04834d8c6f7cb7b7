"""The portable kernel: rows sorted by expert, one torch product per expert that has rows."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtura.config import ActivationDtype, ExpertsConfig, WeightOn
from mixtura.kernels.contract import STATIC_CODES, ExpertsKernel, in_words, sum_dtype
from mixtura.kernels.torch.eager import run_eager
from mixtura.kernels.torch.experts import run_experts
from mixtura.kernels.torch.grouped_linear import grouped_linear
from mixtura.quant.matrix import QuantizedMatrix
from mixtura.quant.scheme import Code
from mixtura.types import ExpertBatch, ExpertsProblem, ExpertWeights

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class TorchKernel(ExpertsKernel):
    """Any device torch has; weights stay as they are, quantized ones are read expert by expert."""

    name: ClassVar[str] = "torch"
    has_backward: ClassVar[bool] = True
    shares_memory: ClassVar[bool] = True
    activation_dtypes: ClassVar[tuple[ActivationDtype, ...]] = (ActivationDtype.BF16,)
    rounding_codes: ClassVar[tuple[Code, ...]] = STATIC_CODES

    def cannot_run(self, problem: ExpertsProblem) -> str | None:
        if problem.row_dtype not in FLOAT_DTYPES:
            return f"cannot compute in {problem.row_dtype}"
        if problem.needs_grad and not problem.is_dense:
            return f"has no gradient for weights in the scheme {problem.scheme}"
        return None

    def how(self, problem: ExpertsProblem) -> str | None:
        return in_words(problem.roundings)

    def pack(
        self, weights: ExpertWeights, activation_dtype: ActivationDtype | None = None
    ) -> ExpertWeights:
        return weights.rounded_for(activation_dtype)

    def unpack(self, packed: Any, config: ExpertsConfig) -> ExpertWeights:
        assert isinstance(packed, ExpertWeights)
        return packed

    def slots(self, packed: Any) -> dict[str, Tensor]:
        assert isinstance(packed, ExpertWeights)
        return packed.slots()

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
        return run_eager(packed, batch, weight_on, reduce)


def _needs_graph(weights: ExpertWeights, batch: ExpertBatch) -> bool:
    """Whether autograd records this call."""
    if not torch.is_grad_enabled():
        return False
    inputs = (batch.hidden_states, batch.topk_weights, *weights.tensors())
    return any(tensor.requires_grad for tensor in inputs)


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

    out = run_experts(weights, x, linear, lambda scales: scales[expert_of_row]).to(dtype)
    if weight_on is WeightOn.OUTPUT:
        out = out * slot_weights
    has_expert = (flat[sort_order] < config.num_experts).unsqueeze(1)
    out = torch.where(has_expert, out, 0.0)
    return out[sort_order.argsort()].view(num_rows, top_k, out.shape[1])
