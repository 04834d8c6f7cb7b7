"""Rules of routing and logits that the tests of routers share."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from mixtura.config import (
    DroppedGroup,
    GroupLimit,
    GroupScore,
    NoComputeExperts,
    NoComputeKind,
    Renormalize,
    RoutingConfig,
    ScaleOn,
    ScoreFunction,
    ScoreOrder,
    SelectionBias,
)
from mixtura.routing import Router, create_router

V3_GROUPS = GroupLimit(num_expert_groups=4, topk_groups=2)
RULES: dict[str, RoutingConfig] = {
    "softmax": RoutingConfig(num_experts=13, top_k=3),
    "softmax-sum": RoutingConfig(num_experts=13, top_k=3, renormalize=Renormalize.SUM),
    "after": RoutingConfig(num_experts=13, top_k=3, score_order=ScoreOrder.AFTER_TOP_K),
    "sigmoid-bias": RoutingConfig(
        num_experts=13,
        top_k=4,
        score=ScoreFunction.SIGMOID,
        selection_bias=SelectionBias.ON_SCORE,
        renormalize=Renormalize.SUM,
        epsilon=1e-20,
        scale=2.5,
    ),
    "v3": RoutingConfig(
        num_experts=12,
        top_k=4,
        score=ScoreFunction.SIGMOID,
        selection_bias=SelectionBias.ON_SCORE,
        groups=V3_GROUPS,
        renormalize=Renormalize.SUM,
        scale=1.5,
    ),
    "unbiased-groups": RoutingConfig(
        num_experts=12,
        top_k=4,
        groups=dataclasses.replace(V3_GROUPS, dropped=DroppedGroup.ZERO),
        renormalize=Renormalize.SUM,
    ),
    "sqrtsoftplus": RoutingConfig(
        num_experts=13,
        top_k=3,
        score=ScoreFunction.SQRT_SOFTPLUS,
        selection_bias=SelectionBias.ON_SCORE,
        renormalize=Renormalize.SUM,
    ),
    "logit": RoutingConfig(
        num_experts=13, top_k=3, score=ScoreFunction.LOGIT, renormalize=Renormalize.P_NORM
    ),
    "capped": RoutingConfig(
        num_experts=13,
        top_k=3,
        score=ScoreFunction.SIGMOID,
        logit_multiplier=2.0,
        logit_softcap=3.0,
    ),
    "sparsemixer": RoutingConfig(
        num_experts=13, top_k=2, score=ScoreFunction.SPARSEMIXER, jitter=0.2
    ),
}


CHOICES: dict[str, RoutingConfig] = RULES | {
    "no-compute": RoutingConfig(
        num_experts=11,
        top_k=4,
        no_compute=NoComputeExperts(kind=NoComputeKind.IDENTITY, count=2),
        selection_bias=SelectionBias.ON_SCORE,
    ),
    "shared": RoutingConfig(num_experts=11, top_k=4, num_fused_shared_experts=2, scale=2.0),
    "gated-shared": RoutingConfig(
        num_experts=12,
        top_k=4,
        score=ScoreFunction.SIGMOID,
        groups=V3_GROUPS,
        num_fused_shared_experts=2,
        fused_shared_gate=True,
        scale=2.0,
        scale_on=ScaleOn.OUTPUT,
    ),
    "clamped": RoutingConfig(
        num_experts=7, top_k=3, renormalize=Renormalize.CLAMPED_SUM, epsilon=0.9
    ),
    "p-norm": RoutingConfig(num_experts=7, top_k=3, renormalize=Renormalize.P_NORM, p_norm=3.0),
}


def bias_for(rule: RoutingConfig) -> Tensor | None:
    if rule.selection_bias is SelectionBias.NONE:
        return None
    return torch.linspace(-0.4, 0.4, rule.num_choices)


def router_of(rule: RoutingConfig) -> Any:
    return create_router(rule, selection_bias=bias_for(rule))


def random_logits(num_tokens: int, rule: RoutingConfig, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, rule.num_logits, generator=generator) * 2


def whole_logits(num_tokens: int, rule: RoutingConfig, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, (num_tokens, rule.num_logits), generator=generator).float()


def steps_for(num_experts: int) -> list[RoutingConfig]:
    """One rule for every way to choose, of `num_experts`."""
    top_k = min(8, num_experts)
    sizes: dict[str, Any] = {"num_experts": num_experts, "top_k": top_k}
    biased = sizes | {"selection_bias": SelectionBias.ON_SCORE, "renormalize": Renormalize.SUM}
    rules = [
        RoutingConfig(**sizes, renormalize=Renormalize.SUM),
        RoutingConfig(**sizes, score_order=ScoreOrder.AFTER_TOP_K, per_expert_scale=True),
        RoutingConfig(**biased),
        RoutingConfig(**biased, score=ScoreFunction.SIGMOID, epsilon=1e-20, scale=2.5),
        RoutingConfig(**biased, score=ScoreFunction.SQRT_SOFTPLUS),
        RoutingConfig(**sizes, score=ScoreFunction.SIGMOID, selection_bias=SelectionBias.ON_LOGIT),
    ]
    if num_experts % 20 == 0 or num_experts % 32 == 0:
        for score in GroupScore:
            for dropped in DroppedGroup:
                groups = GroupLimit(
                    num_expert_groups=4, topk_groups=2, score=score, dropped=dropped
                )
                rules.append(RoutingConfig(**biased, score=ScoreFunction.SIGMOID, groups=groups))
    return rules


def router_with_bias(config: RoutingConfig, seed: int = 0) -> Router:
    generator = torch.Generator().manual_seed(seed)
    has_bias = config.selection_bias is not SelectionBias.NONE
    return create_router(
        config,
        # Sixteenths: scores of equal logits tie with equal biases, and there are some.
        selection_bias=torch.randint(-4, 5, (config.num_choices,), generator=generator) / 16.0
        if has_bias
        else None,
        per_expert_scale=torch.rand(config.num_experts, generator=generator) + 0.5
        if config.per_expert_scale
        else None,
    )


def equal_logits(num_tokens: int, rule: RoutingConfig) -> Tensor:
    return torch.full((num_tokens, rule.num_logits), 0.3)


def few_and_infinite(num_tokens: int, rule: RoutingConfig) -> Tensor:
    """Ties, both zeros and -inf."""
    values = torch.tensor([-math.inf, -1.0, -0.0, 0.0, 0.5, 2.0])
    return values[whole_indices(num_tokens, rule, len(values))]


def few_with_nan(num_tokens: int, rule: RoutingConfig) -> Tensor:
    values = torch.tensor([math.nan, -math.inf, 0.0, 1.0, 2.0, 3.0, -math.nan, math.inf])
    return values[whole_indices(num_tokens, rule, len(values))]


def whole_indices(num_tokens: int, rule: RoutingConfig, limit: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, limit, (num_tokens, rule.num_logits), generator=generator)
