"""The torch kernel where no graph is recorded: few passes over memory, no expert without rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtura.config import WeightOn
from mixtura.kernels.contract import sum_dtype
from mixtura.kernels.torch.by_expert import is_lone_row_slow, linear_by_expert
from mixtura.kernels.torch.experts import run_experts
from mixtura.kernels.torch.lora import eager_rows, is_adapted
from mixtura.types import ExpertBatch, ExpertWeights

ROWS_PER_PASS = 2048
"""Experts go together while they have no more rows than this. With the rows of 1024 tokens in one
pass, the memory between the products took 9 % of the time (OLMoE, EPYC 9004, torch 2.13)."""


def run_eager(
    weights: ExpertWeights, batch: ExpertBatch, weight_on: WeightOn, reduce: bool
) -> Tensor:
    """See `ExpertsKernel.run`. -> (M, H), or the terms (M, K, H) in fp32."""
    rows, ids = batch.hidden_states, batch.local_ids
    flat, slot_weights = ids.reshape(-1), batch.topk_weights.to(sum_dtype(rows.dtype))
    counts = torch.bincount(flat + 1, minlength=weights.config.num_experts + 1)
    num_absent, *tokens_per_expert = counts.tolist()
    sort_order = flat.argsort(stable=True)[num_absent:]  # slots with id -1 come first
    if 1 in tokens_per_expert and is_lone_row_slow(rows, weights.gate_up_proj):
        is_lone = counts[flat[sort_order] + 1] == 1
        sort_order = sort_order.repeat_interleave(is_lone + 1)
        tokens_per_expert = [2 if count == 1 else count for count in tokens_per_expert]

    adapted = is_adapted(weights, batch)
    token_of_row, num_sorted = sort_order // ids.shape[1], sort_order.numel()
    out = rows.new_empty(num_sorted + 1, rows.shape[1], dtype=slot_weights.dtype)
    for first_expert, tokens, start, stop in _passes(tokens_per_expert):
        x = rows[token_of_row[start:stop]]
        if weight_on is WeightOn.INPUT:
            x = (x * slot_weights.view(-1, 1)[sort_order[start:stop]]).to(rows.dtype)
        linear = partial(linear_by_expert, first_expert=first_expert, tokens_per_expert=tokens)
        per_row = partial(_per_row, first_expert=first_expert, tokens_per_expert=tokens)
        lora = None
        if adapted:
            expert_of_row = flat[sort_order[start:stop]]
            lora = eager_rows(weights, batch, token_of_row[start:stop], expert_of_row)
        out[start:stop] = run_experts(weights, x, linear, per_row, lora)

    row_of_slot = sort_order.new_full((flat.numel(),), num_sorted)
    row_of_slot.scatter_(0, sort_order, torch.arange(num_sorted, device=rows.device))
    scale = slot_weights if weight_on is WeightOn.OUTPUT else None
    if num_absent:
        out[num_sorted] = 0.0  # what slots without an expert find
        scale = None if scale is None else scale.masked_fill(ids < 0, 0.0)
    found = _gather(out, row_of_slot.view(ids.shape), scale, reduce)
    return found.to(rows.dtype) if reduce else found


def _per_row(values: Tensor, *, first_expert: int, tokens_per_expert: Sequence[int]) -> Tensor:
    """The value of each row's expert: (L,) -> (N,)."""
    counts = torch.tensor(tokens_per_expert, device=values.device)
    span = values[first_expert : first_expert + len(tokens_per_expert)]
    return span.repeat_interleave(counts, output_size=sum(tokens_per_expert))


def _passes(tokens_per_expert: Sequence[int]) -> Iterator[tuple[int, Sequence[int], int, int]]:
    """Split the experts: (first expert, rows of each, first row, row after the last)."""
    first = start = stop = 0
    for expert, count in enumerate(tokens_per_expert):
        if stop - start + count > ROWS_PER_PASS and stop > start:
            yield first, tokens_per_expert[first:expert], start, stop
            first, start = expert, stop
        stop += count
    if stop > start:
        yield first, tokens_per_expert[first:], start, stop


def _gather(out: Tensor, row_of_slot: Tensor, scale: Tensor | None, reduce: bool) -> Tensor:
    """`out[row_of_slot[m, k]] * scale[m, k]`, with `reduce` added up over k. -> (M, [K,] H)."""
    if reduce and out.device.type == "cpu":
        # One pass over memory, where (M, K, H) would be written and read again; in slot order.
        return F.embedding_bag(row_of_slot, out, mode="sum", per_sample_weights=scale)
    terms = out[row_of_slot]
    if scale is not None:
        terms = terms * scale.unsqueeze(-1)
    return terms.sum(1) if reduce else terms
