"""A routing rule as a sentence."""

from __future__ import annotations

from mixtura.config import (
    GroupScore,
    Renormalize,
    RoutingConfig,
    ScaleOn,
    ScoreFunction,
    ScoreOrder,
    SelectionBias,
    WeightOn,
)

SCORES = {
    ScoreFunction.SOFTMAX: "softmax",
    ScoreFunction.SIGMOID: "sigmoid",
    ScoreFunction.SQRT_SOFTPLUS: "sqrt(softplus)",
    ScoreFunction.LOGIT: "plain logits",
    ScoreFunction.SPARSEMIXER: "sparsemixer",
}
NORMS = {
    Renormalize.SUM: "weights sum to 1",
    Renormalize.CLAMPED_SUM: "weights over their sum",
    Renormalize.P_NORM: "weights over their {p:g}-norm",
}


def in_words(config: RoutingConfig) -> str:
    """What a router does with its logits, in the order in which it does it.

    Example:
        >>> in_words(RoutingConfig(num_experts=128, top_k=8, renormalize=Renormalize.SUM))
        'softmax, top 8 of 128, weights sum to 1'
    """
    return ", ".join([*_choosing(config), *_weighing(config)])


def _choosing(config: RoutingConfig) -> list[str]:
    steps = []
    if config.logit_multiplier != 1.0:
        steps.append(f"logits times {config.logit_multiplier:g}")
    if config.logit_softcap is not None:
        steps.append(f"logits soft-capped at {config.logit_softcap:g}")
    score = SCORES[config.score]
    choice = f"top {config.top_k} of {config.num_choices}"
    if config.selection_bias is SelectionBias.ON_LOGIT:
        choice += " by logit plus a learned bias"
    elif config.selection_bias is SelectionBias.ON_SCORE:
        choice += " by score plus a learned bias"
    if config.groups is not None:
        by = "two best" if config.groups.score is GroupScore.TOP2_SUM else "best"
        groups = f"{config.groups.topk_groups} best of {config.groups.num_expert_groups} groups"
        choice += f", in the {groups} (by the {by} of each)"
    if config.hash_routing:
        return [*steps, f"{config.top_k} of {config.num_choices} by token id, from a table", score]
    if config.score_order is ScoreOrder.AFTER_TOP_K:
        return [*steps, choice, f"{score} of the chosen"]
    return [*steps, score, choice]


def _weighing(config: RoutingConfig) -> list[str]:
    steps = []
    if config.renormalize is not Renormalize.NONE:
        steps.append(NORMS[config.renormalize].format(p=config.p_norm))
    if config.scale != 1.0:
        of_output = " on the layer's output" if config.scale_on is ScaleOn.OUTPUT else ""
        steps.append(f"times {config.scale:g}{of_output}")
    if config.per_expert_scale:
        steps.append("times a learned factor for each expert")
    if config.weight_on is WeightOn.INPUT:
        steps.append("weights on the experts' input")
    if config.no_compute is not None:
        steps.append(f"{config.no_compute.count} of them {config.no_compute.kind.value} experts")
    if config.num_fused_shared_experts:
        steps.append(f"{config.num_fused_shared_experts} shared experts as further slots")
    if config.simulation is not None:
        steps.append(f"ids drawn by simulation ({config.simulation.kind.value})")
    return steps
