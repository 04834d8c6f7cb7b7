"""The steps of routing as pure functions: logits -> scores -> selection -> ids -> weights.

Everything is fp32 whatever the model's dtype, unless `native` asks for a family's own arithmetic.
T tokens, E choices (real experts, then those without arithmetic), K slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtura.config import (
    DroppedGroup,
    GroupLimit,
    GroupScore,
    Renormalize,
    RoutingConfig,
    ScaleOn,
    ScoreFunction,
    ScoreOrder,
    SelectionBias,
)


def transform_logits(logits: Tensor, config: RoutingConfig) -> Tensor:
    """`cap * tanh(m * logits / cap)` with multiplier m and an optional soft-cap. (T,E) -> (T,E)."""
    if config.logit_multiplier != 1.0:
        logits = logits * config.logit_multiplier
    if config.logit_softcap is not None:
        logits = torch.tanh(logits / config.logit_softcap) * config.logit_softcap
    return logits


def score(logits: Tensor, function: ScoreFunction) -> Tensor:
    """Scores from (transformed) logits, over the experts of the last dimension. (T,E) -> (T,E).

    On a CPU `torch.sigmoid` and `softplus` round differently in a vector loop and in its scalar
    remainder: equal logits would not tie, and a token's scores would depend on the batch.
    `logsigmoid` and `exp` round every element alike.
    """
    match function:
        case ScoreFunction.SOFTMAX:
            return logits.softmax(-1)
        case ScoreFunction.SIGMOID:
            wide = torch.promote_types(logits.dtype, torch.float32)
            return F.logsigmoid(logits.to(wide)).exp().to(logits.dtype)  # rounds once
        case ScoreFunction.SQRT_SOFTPLUS:
            return (-F.logsigmoid(-logits)).sqrt()
        case ScoreFunction.LOGIT | ScoreFunction.SPARSEMIXER:
            return logits


def limit_groups(selection_scores: Tensor, groups: GroupLimit) -> Tensor:
    """Give the experts outside the best groups the dropped value. (T,E) -> (T,E)."""
    count = groups.num_expert_groups
    num_tokens, num_choices = selection_scores.shape
    grouped = selection_scores.reshape(num_tokens, count, num_choices // count)  # (T, G, E/G)
    if groups.score is GroupScore.MAX:
        group_scores = grouped.amax(-1)
    else:
        group_scores = grouped.topk(2, dim=-1).values.sum(-1)
    kept = top_k_ids(group_scores, groups.topk_groups)
    is_kept = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, kept, True)
    dropped = float("-inf") if groups.dropped is DroppedGroup.NEGATIVE_INFINITY else 0.0
    return grouped.masked_fill(~is_kept.unsqueeze(-1), dropped).flatten(-2)


def top_k_ids(scores: Tensor, top_k: int) -> Tensor:
    """Ids of the `top_k` largest scores, falling; ties go to the lower id. (T,E) -> (T,K) int64."""
    if scores.device.type == "cpu" and scores.shape[0] > 4:
        ids = _top_k_then_mend(scores, top_k)
        if ids is not None:
            return ids
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def _top_k_then_mend(scores: Tensor, top_k: int) -> Tensor | None:
    """`torch.topk` where no tie makes its order arbitrary; None when one does or when traced.

    A stable sort of all columns costs about three times a partial one on a CPU.
    """
    if torch.compiler.is_compiling() or top_k >= scores.shape[1]:
        return None
    top = scores.topk(top_k + 1, dim=-1)
    has_tie = (top.values[:, 1:] >= top.values[:, :-1]).any() | top.values.isnan().any()
    return None if bool(has_tie) else top.indices[:, :top_k]


def sparsemixer(logits: Tensor, jitter: float, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Two picks, each weighted by a softmax over the logits near its maximum (PhiMoE).

    Expert i is kept for a pick with maximum m where `(m - x_i) / max(|x_i|, m) <= 2 * jitter`; the
    second pick leaves the first expert out. The two weights need not sum to 1.

    Args:
        logits: (T, E).
        jitter: half the relative width of the window.
        ids: (T, 2) picks to weigh; by default the largest logits. One outside its window weighs 0.

    Returns:
        weights (T,2), ids (T,2).

    Source: Liu et al., "GRIN: GRadient-INformed MoE", arXiv 2409.12136.
    """
    remaining = logits
    weights, picks = [], []
    for pick in range(2):
        largest = top_k_ids(remaining, 1)
        maximum = logits.gather(1, largest)
        distance = (maximum - logits) / torch.maximum(logits.abs(), maximum)
        near = remaining.masked_fill(distance > 2 * jitter, float("-inf"))
        chosen = largest if ids is None else ids[:, pick : pick + 1]
        weights.append(near.softmax(-1).gather(1, chosen))
        picks.append(chosen)
        remaining = remaining.scatter(1, chosen, float("-inf"))
    return torch.cat(weights, 1), torch.cat(picks, 1)


def choose(logits: Tensor, config: RoutingConfig, bias: Tensor | None) -> Tensor:
    """Expert ids from transformed logits and the selection bias. (T,E) -> (T,K) int64."""
    if config.score is ScoreFunction.SPARSEMIXER:
        return sparsemixer(logits.detach(), config.jitter)[1]
    # Every score rises with its logit: without bias or groups the largest logits are chosen.
    on_logit = (
        config.score_order is ScoreOrder.AFTER_TOP_K
        or config.selection_bias is SelectionBias.ON_LOGIT
        or (config.selection_bias is SelectionBias.NONE and config.groups is None)
    )
    selection = logits if on_logit else score(logits, config.score)
    if bias is not None:
        selection = selection + bias
    if config.groups is not None:
        selection = limit_groups(selection, config.groups)
    return top_k_ids(selection.detach(), config.top_k)


def weigh(logits: Tensor, ids: Tensor, config: RoutingConfig) -> Tensor:
    """Routing weights of the chosen ids, renormalized and scaled. (T,E), (T,K) -> (T,K)."""
    if config.score is ScoreFunction.SPARSEMIXER:
        weights = sparsemixer(logits, config.jitter, ids)[0]
    elif config.score is ScoreFunction.SOFTMAX and config.score_order is ScoreOrder.BEFORE_TOP_K:
        weights = score(logits, config.score).gather(1, ids)
    else:  # over the chosen experts, or of each expert by itself
        weights = score(logits.gather(1, ids), config.score)
    return scale_weights(renormalize(weights, config), config)


def renormalize(weights: Tensor, config: RoutingConfig) -> Tensor:
    """Apply `config.renormalize` along the slots. (T,K) -> (T,K)."""
    match config.renormalize:
        case Renormalize.NONE:
            return weights
        case Renormalize.SUM:
            return weights / (weights.sum(-1, keepdim=True) + config.epsilon)
        case Renormalize.CLAMPED_SUM:
            return weights / weights.sum(-1, keepdim=True).clamp(min=config.epsilon)
        case Renormalize.P_NORM:
            norm: Tensor = torch.linalg.vector_norm(weights, config.p_norm, dim=-1, keepdim=True)
            return weights / norm


def scale_weights(weights: Tensor, config: RoutingConfig) -> Tensor:
    """Multiply by the routed scaling factor where it belongs to the weights."""
    if config.scale_on is ScaleOn.WEIGHTS and config.scale != 1.0:
        weights = weights * config.scale
    return weights
