"""An experts kernel that gathers the weights of every slot's expert: plain torch, for few rows."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from mixtura.config import GateUp, WeightOn
from mixtura.kernels import StoredWeightsKernel
from mixtura.kernels.contract import sum_dtype
from mixtura.kernels.reference.activation import activate, split_gate_up
from mixtura.types import ExpertBatch, ExpertsProblem, ExpertWeights

MIXTURA_API = 1
SLOTS_AT_ONCE = 64
"""Slots whose weights are gathered at a time: so many copies of an expert are in memory."""


class GatheredKernel(StoredWeightsKernel):
    """`terms[m, k] = weights[m, k] * expert(x[m])`, all slots' experts as one batch of products."""

    name: ClassVar[str] = "gathered"
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    has_backward: ClassVar[bool] = True
    rounds_between: ClassVar[bool] = True

    def cannot_run(self, problem: ExpertsProblem) -> str | None:
        if not problem.is_dense:
            return f"multiplies dense weights, and these are {problem.scheme}"
        if problem.experts.post_norm is not None:
            return "has no norm after the experts"
        return None

    def run(
        self,
        packed: Any,
        batch: ExpertBatch,
        *,
        weight_on: WeightOn = WeightOn.OUTPUT,
        reduce: bool = True,
    ) -> Tensor:
        rows, slots = (batch.local_ids >= 0).nonzero(as_tuple=True)  # (N,) each
        ids = batch.local_ids[rows, slots].long()
        weights = batch.topk_weights[rows, slots].unsqueeze(1)
        x = batch.hidden_states[rows]
        wide = sum_dtype(x.dtype)
        if weight_on is WeightOn.INPUT:
            x = (x * weights).to(x.dtype)
        chunks = zip(x.split(SLOTS_AT_ONCE), ids.split(SLOTS_AT_ONCE), strict=True)
        out = torch.cat([_experts(packed, *chunk) for chunk in chunks]).to(wide)
        if weight_on is WeightOn.OUTPUT:
            out = out * weights
        terms = out.new_zeros(*batch.local_ids.shape, x.shape[1])
        terms = terms.index_put((rows, slots), out)
        return terms.sum(1).to(batch.hidden_states.dtype) if reduce else terms


def _experts(weights: ExpertWeights, x: Tensor, ids: Tensor) -> Tensor:
    """Every row through the expert of its id. (N, H), (N,) -> (N, H)."""

    def product(stack: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        out = torch.bmm(stack[ids], x.unsqueeze(2)).squeeze(2)
        return out if bias is None else out + bias[ids]

    config = weights.config
    first = product(weights.gate_up_proj.values, weights.gate_up_bias, x)
    gate, up = split_gate_up(first, config.gate_up)
    if config.gate_up is GateUp.SEPARATE:
        assert weights.up_proj is not None
        up = product(weights.up_proj.values, None, x)
    hidden = activate(gate, up, config.activation)
    return product(weights.down_proj.values, weights.down_bias, hidden)
