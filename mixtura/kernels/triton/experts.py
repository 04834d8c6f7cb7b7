"""Experts on a GPU: which kernels run, in which order of rows. Nothing waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from mixtura.config import WeightOn
from mixtura.cuda import on_device
from mixtura.errors import InputError
from mixtura.kernels.triton.align import order_slots
from mixtura.kernels.triton.call import Call
from mixtura.kernels.triton.dense import DenseCall
from mixtura.kernels.triton.device import device_of
from mixtura.kernels.triton.packed.call import PackedCall
from mixtura.kernels.triton.packed.experts import PackedWeights
from mixtura.kernels.triton.regimes import SMALL_TILES, Regime, regime_for, tiling_for
from mixtura.kernels.triton.tuned import tuned_for
from mixtura.types import ExpertBatch, ExpertWeights, Tiling


def run_experts(
    weights: ExpertWeights | PackedWeights, batch: ExpertBatch, weight_on: WeightOn, reduce: bool
) -> Tensor:
    """See `ExpertsKernel.run`; the rows' order is made where the batch does not bring it."""
    config = weights.config
    rows, ids = batch.hidden_states, batch.local_ids
    num_rows, top_k = ids.shape
    there = weights.device
    if not rows.device == ids.device == batch.topk_weights.device == there:
        raise InputError(
            f"rows, ids and routing weights ({rows.device}, {ids.device}, "
            f"{batch.topk_weights.device}) must be on the device of the experts; got {there} "
            f"there. Move them together."
        )
    if num_rows == 0 or top_k == 0:
        shape = (num_rows, config.hidden_size) if reduce else (num_rows, top_k, config.hidden_size)
        return rows.new_zeros(shape, dtype=rows.dtype if reduce else torch.float32)
    device = device_of(rows.device)
    kind = PackedCall if isinstance(weights, PackedWeights) else DenseCall
    call: Call = kind(
        weights,
        rows.contiguous(),
        ids.to(torch.int32).contiguous(),
        batch.topk_weights.to(torch.float32).contiguous(),
        weighs_input=weight_on is WeightOn.INPUT,
        device=device,
        tuned=tuned_for(device),
    )
    with on_device(rows.device):
        sizes = (num_rows, top_k, config.num_experts, batch.expected_share)
        regime = regime_for(*sizes)
        if regime is Regime.DIRECT and reduce and config.post_norm is None:
            return call.run_direct()
        tiling = tiling_for(*sizes) or Tiling(SMALL_TILES[0])
        order = batch.order
        if order is None or order.ids is not ids or order.tiling != tiling:
            order = order_slots(call.ids, config.num_experts, tiling)
        return call.run_sorted(order, reduce)
