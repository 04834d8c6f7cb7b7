"""The reference kernel: plain loops in fp32, the meaning of `RoutedExperts`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from mixtura.config import ActivationDtype, GateUp, WeightOn
from mixtura.kernels.contract import STATIC_CODES, StoredWeightsKernel, sum_dtype
from mixtura.kernels.reference.activation import activate, split_gate_up
from mixtura.kernels.reference.inputs import round_inputs
from mixtura.kernels.reference.linear import matrix_vector
from mixtura.kernels.reference.norm import post_norm
from mixtura.lora import LoraWeights, LowRank
from mixtura.quant.activations import StaticInputs
from mixtura.quant.matrix import QuantizedMatrix, dequantize
from mixtura.quant.scheme import Code
from mixtura.types import ExpertBatch, ExpertsProblem, ExpertWeights


def run_expert(
    weights: ExpertWeights, expert: int, row: Tensor, lora: LoraWeights | None = None
) -> Tensor:
    """One expert with an adapter, on one row in its dtype: fp32 or float64. (H,) -> (H,)."""
    config = weights.config
    adapter = lora or LoraWeights()

    def project(stack: QuantizedMatrix, bias: Tensor | None, x: Tensor) -> Tensor:
        y = matrix_vector(dequantize(stack.expert(expert), row.dtype), x)
        return y if bias is None else y + bias[expert].to(row.dtype)

    def rounded(x: Tensor, inputs: StaticInputs | None, *stacks: QuantizedMatrix | None) -> Tensor:
        scales = None if inputs is None else inputs.scales[expert]
        return round_inputs(x, inputs, scales, weights.activations, stacks)

    def add(y: Tensor, part: LowRank | None, x: Tensor) -> Tensor:
        if part is None:
            return y
        shrunk = matrix_vector(part.a[expert].to(x.dtype), x)
        return y + matrix_vector(part.b[expert].to(x.dtype), shrunk)

    x = rounded(row, weights.gate_up_inputs, weights.gate_up_proj, weights.up_proj)
    first = project(weights.gate_up_proj, weights.gate_up_bias, x)
    gate, up = split_gate_up(first, config.gate_up)
    if config.gate_up is GateUp.SEPARATE:
        assert weights.up_proj is not None
        up = project(weights.up_proj, None, x)
    if up is None:
        gate = add(gate, adapter.up, row)
    else:
        gate, up = add(gate, adapter.gate, row), add(up, adapter.up, row)
    hidden = activate(gate, up, config.activation)
    x = rounded(hidden, weights.down_inputs, weights.down_proj)
    out = add(project(weights.down_proj, weights.down_bias, x), adapter.down, hidden)
    if config.post_norm is not None:
        assert weights.post_norm is not None
        out = post_norm(out, weights.post_norm, config.post_norm, config.post_norm_epsilon)
    return out


class ReferenceKernel(StoredWeightsKernel):
    """A loop over rows and slots: slow, differentiable, bitwise independent of batch and threads.

    Rows of float64 are computed in float64, all others in fp32.
    """

    name: ClassVar[str] = "reference"
    has_backward: ClassVar[bool] = True
    is_row_invariant: ClassVar[bool] = True
    activation_dtypes: ClassVar[tuple[ActivationDtype, ...]] = tuple(ActivationDtype)
    rounding_codes: ClassVar[tuple[Code, ...]] = STATIC_CODES
    has_lora: ClassVar[bool] = True

    def cannot_run(self, problem: ExpertsProblem) -> str | None:
        if problem.needs_grad and not problem.is_dense:
            return f"has no gradient for weights in the scheme {problem.scheme}"
        return None

    def run(
        self,
        packed: Any,
        batch: ExpertBatch,
        *,
        weight_on: WeightOn = WeightOn.OUTPUT,
        reduce: bool = True,
    ) -> Tensor:
        assert isinstance(packed, ExpertWeights)
        num_rows, top_k = batch.local_ids.shape
        rows = batch.hidden_states.to(sum_dtype(batch.hidden_states.dtype))
        zero = rows.new_zeros(rows.shape[1])
        adapter_ids = [-1] * num_rows if batch.adapter_ids is None else batch.adapter_ids.tolist()
        terms = []  # M * K rows of (H,)
        for row, expert_ids in enumerate(batch.local_ids.tolist()):
            number = adapter_ids[row]
            lora = packed.lora[number] if number >= 0 else None
            for slot, expert in enumerate(expert_ids):
                if expert < 0:
                    terms.append(zero)
                    continue
                weight = batch.topk_weights[row, slot].to(rows.dtype)
                if weight_on is WeightOn.INPUT:
                    terms.append(run_expert(packed, expert, rows[row] * weight, lora))
                else:
                    terms.append(run_expert(packed, expert, rows[row], lora) * weight)
        if terms:
            stacked = torch.stack(terms).view(num_rows, top_k, -1)
        else:
            stacked = rows.new_zeros(num_rows, top_k, rows.shape[1])
        return sum_slots(stacked).to(batch.hidden_states.dtype) if reduce else stacked


def sum_slots(terms: Tensor) -> Tensor:
    """Add the slots one after the other. (M,K,H) -> (M,H)."""
    total = torch.zeros_like(terms[:, 0])
    for slot in range(terms.shape[1]):
        total = total + terms[:, slot]
    return total
