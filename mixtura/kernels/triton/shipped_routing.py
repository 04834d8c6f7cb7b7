"""The specialisations of routing and alignment that known rules launch; see shipped.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from mixtura.config import (
    GroupLimit,
    NoComputeExperts,
    NoComputeKind,
    Renormalize,
    RoutingConfig,
    ScoreFunction,
    ScoreOrder,
    SelectionBias,
)
from mixtura.kernels.triton.align import empty_order, order_launches
from mixtura.kernels.triton.launch import Launch
from mixtura.kernels.triton.regimes import tiling_for
from mixtura.kernels.triton.routing import TritonRouting
from mixtura.types import Tiling

_SOFTMAX = RoutingConfig(num_experts=128, top_k=8, renormalize=Renormalize.SUM)
_SIGMOID = RoutingConfig(
    num_experts=256,
    top_k=8,
    score=ScoreFunction.SIGMOID,
    selection_bias=SelectionBias.ON_SCORE,
    renormalize=Renormalize.SUM,
    epsilon=1e-20,
    scale=2.5,
)
_LIMITED = replace(_SIGMOID, groups=GroupLimit(num_expert_groups=8, topk_groups=4))

RULES: dict[str, RoutingConfig] = {
    "qwen3-30b-a3b": _SOFTMAX,
    "deepseek-v3": _LIMITED,
    "longcat-flash": RoutingConfig(
        num_experts=512,
        top_k=12,
        selection_bias=SelectionBias.ON_SCORE,
        no_compute=NoComputeExperts(kind=NoComputeKind.IDENTITY, count=256),
        scale=6.0,
    ),
}
"""Rules of known models."""

MORE_RULES: dict[str, RoutingConfig] = {
    "8 groups of 20": replace(_LIMITED, num_experts=160),
    "sigmoid of 384": replace(_SIGMOID, num_experts=384),
    "root of softplus of 896": replace(
        _SIGMOID, num_experts=896, top_k=16, score=ScoreFunction.SQRT_SOFTPLUS
    ),
    "softmax of 8": replace(_SOFTMAX, num_experts=8, top_k=2),
    "softmax of the chosen": replace(
        _SOFTMAX, top_k=4, score_order=ScoreOrder.AFTER_TOP_K, renormalize=Renormalize.NONE
    ),
    "capped": replace(_SOFTMAX, logit_softcap=30.0),
    "shared": replace(_SIGMOID, num_fused_shared_experts=1),
}
"""Others, of every kind and width."""

TOKENS = (1, 64, 2048)
"""Few in one launch, unsorted and sorted; many in three."""

MORE_TOKENS = (4, 16, 128, 170, 256, 8192, 65536)

ORDERS = ((2048, 128), (100_000, 128))
"""Slots that others chose, and experts."""

MORE_ORDERS = tuple(
    (slots, experts)
    for slots in (1, 256, 1024, 2048, 30_000, 200_000, 1_000_000)
    for experts in (8, 128, 1024)
)


def routing_launches(*, is_full: bool = False) -> Iterator[tuple[str, Launch]]:
    """(what it is for, launch), each kernel once; `is_full` adds rules and sizes."""
    found: set[str] = set()
    for name, launch in _all(is_full):
        key = f"{launch.kernel.__name__} {launch.constants} {[a is None for a in launch.arguments]}"
        if key not in found:
            found.add(key)
            yield name, launch


def _all(is_full: bool) -> Iterator[tuple[str, Launch]]:
    rules = {**RULES, **MORE_RULES} if is_full else RULES
    for name, rule in rules.items():
        for num_tokens in (*TOKENS, *(MORE_TOKENS if is_full else ())):
            for launch in _routed(rule, num_tokens):
                yield f"{name}, T={num_tokens}", launch
    for num_slots, num_experts in (*ORDERS, *(MORE_ORDERS if is_full else ())):
        for launch in _ordered(num_slots, num_experts):
            yield f"{num_slots} slots, {num_experts} experts", launch


def _routed(rule: RoutingConfig, num_tokens: int) -> list[Launch]:
    routing = TritonRouting.for_rule(rule)
    assert routing is not None
    logits = torch.empty(num_tokens, routing.rule.num_logits, device="meta")
    has_bias = rule.selection_bias is not SelectionBias.NONE
    bias = torch.empty(rule.num_choices, device="meta") if has_bias else None
    tiling = tiling_for(num_tokens, routing.rule.num_slots, routing.rule.num_placed)
    made = routing.empty(logits, False, tiling)
    return routing.launches(logits, bias, None, None, None, tiling, made)


def _ordered(num_slots: int, num_experts: int) -> list[Launch]:
    ids = torch.empty(num_slots, 1, dtype=torch.int32, device="meta")
    tiling = Tiling(16)
    return order_launches(
        ids, num_experts, tiling, empty_order(ids, num_slots, num_experts, tiling)
    )
