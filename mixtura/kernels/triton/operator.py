"""The experts as one node of a graph of torch.compile; outside of graphs, a plain call."""

from __future__ import annotations

import torch
from torch import Tensor

from mixtura.config import ExpertsConfig, GateUp, WeightOn
from mixtura.kernels.keys import constant_in_graphs
from mixtura.kernels.triton import experts
from mixtura.kernels.triton.packed.experts import (
    Form,
    PackedWeights,
    form_of,
    put_together,
    read_tensors,
)
from mixtura.quant.matrix import dense
from mixtura.types import ExpertBatch, ExpertOrder, ExpertWeights, Tiling

_CONFIGS: list[ExpertsConfig] = []
"""Configurations that graphs name by number."""


_FORMS: list[Form] = []
"""Forms of packed experts that graphs name by number."""


def run_experts(
    weights: ExpertWeights | PackedWeights, batch: ExpertBatch, weight_on: WeightOn, reduce: bool
) -> Tensor:
    """See `ExpertsKernel.run`."""
    if not torch.compiler.is_compiling():
        return experts.run_experts(weights, batch, weight_on, reduce)
    order = batch.order if batch.order is not None and batch.order.ids is batch.local_ids else None
    if isinstance(weights, PackedWeights):
        return _run_packed(weights, batch, order, weight_on is WeightOn.INPUT, reduce)
    up = weights.up_proj
    out: Tensor = torch.ops.mixtura.triton_experts(
        batch.hidden_states,
        batch.local_ids,
        batch.topk_weights,
        [] if order is None else _tensors_of(order),
        0 if order is None else order.tiling.rows,
        batch.expected_share,
        weights.gate_up_proj.values,
        None if up is None else up.values,
        weights.down_proj.values,
        weights.gate_up_bias,
        weights.down_bias,
        weights.post_norm,
        _number_of(weights.config),
        weight_on is WeightOn.INPUT,
        reduce,
    )
    return out


def _run_packed(
    weights: PackedWeights,
    batch: ExpertBatch,
    order: ExpertOrder | None,
    weighs_input: bool,
    reduce: bool,
) -> Tensor:
    out: Tensor = torch.ops.mixtura.triton_packed_experts(
        batch.hidden_states,
        batch.local_ids,
        batch.topk_weights,
        [] if order is None else _tensors_of(order),
        0 if order is None else order.tiling.rows,
        batch.expected_share,
        list(read_tensors(weights).values()),
        _number_of_form(weights),
        weighs_input,
        reduce,
    )
    return out


def _tensors_of(order: ExpertOrder) -> list[Tensor]:
    return [order.sort_order, order.expert_offsets, order.tiles, order.num_tiles]


@constant_in_graphs
def _number_of(config: ExpertsConfig) -> int:
    if config not in _CONFIGS:
        _CONFIGS.append(config)
    return _CONFIGS.index(config)


@constant_in_graphs
def _number_of_form(weights: PackedWeights) -> int:
    form = form_of(weights)
    if form not in _FORMS:
        _FORMS.append(form)
    return _FORMS.index(form)


def _batch(
    rows: Tensor,
    local_ids: Tensor,
    topk_weights: Tensor,
    order: list[Tensor],
    tile_rows: int,
    expected_share: float,
) -> ExpertBatch:
    found = None
    if order:
        sort_order, offsets, tiles, num_tiles = order
        found = ExpertOrder(local_ids, sort_order, offsets, tiles, num_tiles, Tiling(tile_rows))
    return ExpertBatch(rows, local_ids, topk_weights, found, expected_share)


def _empty_out(rows: Tensor, local_ids: Tensor, reduce: bool) -> Tensor:
    num_rows, top_k = local_ids.shape
    if reduce:
        return rows.new_empty(num_rows, rows.shape[1])
    return rows.new_empty((num_rows, top_k, rows.shape[1]), dtype=torch.float32)


@torch.library.custom_op("mixtura::triton_experts", mutates_args=())
def _run(
    rows: Tensor,
    local_ids: Tensor,
    topk_weights: Tensor,
    order: list[Tensor],
    tile_rows: int,
    expected_share: float,
    gate_up_proj: Tensor,
    up_proj: Tensor | None,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    post_norm: Tensor | None,
    config: int,
    weighs_input: bool,
    reduce: bool,
) -> Tensor:
    known = _CONFIGS[config]
    assert (up_proj is not None) == (known.gate_up is GateUp.SEPARATE)
    weights = ExpertWeights(
        known,
        gate_up_proj=dense(gate_up_proj),
        up_proj=None if up_proj is None else dense(up_proj),
        down_proj=dense(down_proj),
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        post_norm=post_norm,
    )
    batch = _batch(rows, local_ids, topk_weights, order, tile_rows, expected_share)
    return experts.run_experts(
        weights, batch, WeightOn.INPUT if weighs_input else WeightOn.OUTPUT, reduce
    )


@_run.register_fake
def _(
    rows: Tensor,
    local_ids: Tensor,
    topk_weights: Tensor,
    order: list[Tensor],
    tile_rows: int,
    expected_share: float,
    gate_up_proj: Tensor,
    up_proj: Tensor | None,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    post_norm: Tensor | None,
    config: int,
    weighs_input: bool,
    reduce: bool,
) -> Tensor:
    return _empty_out(rows, local_ids, reduce)


@torch.library.custom_op("mixtura::triton_packed_experts", mutates_args=())
def _run_form(
    rows: Tensor,
    local_ids: Tensor,
    topk_weights: Tensor,
    order: list[Tensor],
    tile_rows: int,
    expected_share: float,
    tensors: list[Tensor],
    form: int,
    weighs_input: bool,
    reduce: bool,
) -> Tensor:
    batch = _batch(rows, local_ids, topk_weights, order, tile_rows, expected_share)
    weights = put_together(_FORMS[form], tensors)
    return experts.run_experts(
        weights, batch, WeightOn.INPUT if weighs_input else WeightOn.OUTPUT, reduce
    )


@_run_form.register_fake
def _(
    rows: Tensor,
    local_ids: Tensor,
    topk_weights: Tensor,
    order: list[Tensor],
    tile_rows: int,
    expected_share: float,
    tensors: list[Tensor],
    form: int,
    weighs_input: bool,
    reduce: bool,
) -> Tensor:
    return _empty_out(rows, local_ids, reduce)
