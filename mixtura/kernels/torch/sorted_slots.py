"""All experts at once over slots sorted where the ids are: shapes do not depend on the ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtura.config import WeightOn
from mixtura.kernels.contract import sum_dtype
from mixtura.kernels.torch.experts import run_experts
from mixtura.kernels.torch.lora import AdaptedRows, linear_in_graphs
from mixtura.quant.matrix import QuantizedMatrix
from mixtura.types import ExpertBatch, ExpertWeights

Product = Callable[[Tensor, QuantizedMatrix], Tensor]
"""`x[r] @ W[e].T` for the rows r of expert e: (R, in), stack (L, out, in) -> (R, out).

Rows without an expert may come back as anything, NaN included."""


@dataclass(frozen=True, slots=True)
class SortedSlots:
    """Slots as rows, those of an expert side by side; made with no host synchronisation.

    Attributes:
        slot_of_row: (R,) int64 flat slot; any one where the row has no expert.
        row_of_slot: (N,) int64; any one where the slot has no expert.
        expert_of_row: (R,) int64; any one where the row has no expert.
        has_expert: (R, 1) bool.
        expert_offsets: (L + 1,) int64 slots before each expert's, and of all.
    """

    slot_of_row: Tensor
    row_of_slot: Tensor
    expert_of_row: Tensor
    has_expert: Tensor
    expert_offsets: Tensor


def sort_slots(local_ids: Tensor, num_experts: int) -> SortedSlots:
    """Sort by expert, in rising order of slots; slots without an expert are the last rows. R = N.

    Example:
        >>> ids = torch.tensor([[1, -1], [0, 1]], dtype=torch.int32)
        >>> slots = sort_slots(ids, num_experts=2)
        >>> slots.slot_of_row.tolist(), slots.expert_offsets.tolist()
        ([2, 0, 3, 1], [0, 1, 3])
    """
    flat = local_ids.reshape(-1).long()
    flat = torch.where(flat < 0, num_experts, flat)
    slot_of_row = flat.argsort(stable=True)
    counts = flat.new_zeros(num_experts + 1).scatter_add(0, flat, torch.ones_like(flat))
    expert_of_row = flat[slot_of_row]
    return SortedSlots(
        slot_of_row=slot_of_row,
        row_of_slot=slot_of_row.argsort(),
        expert_of_row=expert_of_row.clamp(max=num_experts - 1),
        has_expert=(expert_of_row < num_experts).unsqueeze(1),
        expert_offsets=F.pad(counts[:-1].cumsum(0), (1, 0)),
    )


def run_sorted(
    weights: ExpertWeights,
    batch: ExpertBatch,
    weight_on: WeightOn,
    slots: SortedSlots,
    product: Product,
) -> Tensor:
    """The weighted terms of all slots. -> (M, K, H) in `sum_dtype` of the rows."""
    num_rows, top_k = batch.local_ids.shape
    dtype = sum_dtype(batch.hidden_states.dtype)
    slot_weights = batch.topk_weights.reshape(-1, 1).to(dtype)
    x = batch.hidden_states[slots.slot_of_row // top_k]
    if weight_on is WeightOn.INPUT:
        x = (x * slot_weights[slots.slot_of_row]).to(x.dtype)

    def linear(x: Tensor, weight: QuantizedMatrix, bias: Tensor | None) -> Tensor:
        out = product(x, weight)
        return out if bias is None else out + bias.to(x.dtype)[slots.expert_of_row]

    lora = None
    if weights.lora and batch.adapter_ids is not None:
        adapter_of_row = batch.adapter_ids[slots.slot_of_row // top_k]
        adapter_of_row = torch.where(slots.has_expert.squeeze(1), adapter_of_row, -1)
        lora = AdaptedRows.of(weights, adapter_of_row, slots.expert_of_row, linear_in_graphs)
    out = run_experts(weights, x, linear, lambda scales: scales[slots.expert_of_row], lora)
    out = out[slots.row_of_slot].to(dtype)
    if weight_on is WeightOn.OUTPUT:
        out = out * slot_weights
    out = torch.where(batch.local_ids.reshape(-1, 1) >= 0, out, 0.0)
    return out.view(num_rows, top_k, out.shape[1])


def is_recorded(weights: ExpertWeights, batch: ExpertBatch) -> bool:
    """Whether autograd records a call with these."""
    if not torch.is_grad_enabled():
        return False
    inputs = (batch.hidden_states, batch.topk_weights, *weights.tensors())
    return any(tensor.requires_grad for tensor in inputs)
