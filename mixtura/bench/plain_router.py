"""Routing as a model's own code does it: a few operators of torch, for contenders without a router.

It is what peers are timed with, so it takes no care that a model does not take: ties go where
`torch.topk` puts them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixtura.config import RoutingConfig
from mixtura.config.routing import GroupLimit, Renormalize, ScoreFunction, ScoreOrder
from mixtura.routing import RouterTensors
from mixtura.types import Bypass, Routing


@dataclass(frozen=True)
class PlainRouter:
    """Softmax or sigmoid, a bias on the choice, groups by their two best, renormalized, scaled.

    Attributes:
        tensors: the bias, where the rule has one.
    """

    config: RoutingConfig
    tensors: RouterTensors

    def route(self, router_logits: Tensor) -> Routing:
        """(T, choices) fp32 -> ids (T,K) int64 and weights (T,K) fp32."""
        weights, ids = self._choose(router_logits)
        if self.config.renormalize is Renormalize.SUM:
            weights = weights / weights.sum(-1, keepdim=True)
        if self.config.scale != 1.0:
            weights = weights * self.config.scale
        if self.config.no_compute is None:
            return Routing(ids, weights)
        is_none = ids >= self.config.num_experts  # they return their input
        identity = torch.where(is_none, weights, 0.0).sum(-1)
        ids, weights = ids.masked_fill(is_none, -1), weights.masked_fill(is_none, 0.0)
        return Routing(ids, weights, Bypass(identity_weight=identity))

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        top_k = self.config.top_k
        if self.config.score_order is ScoreOrder.AFTER_TOP_K:
            chosen, ids = logits.topk(top_k)
            return chosen.softmax(-1), ids
        is_sigmoid = self.config.score is ScoreFunction.SIGMOID
        scores = logits.sigmoid() if is_sigmoid else logits.softmax(-1)
        bias = self.tensors.selection_bias
        if bias is None and self.config.groups is None:
            return scores.topk(top_k)
        selection = scores if bias is None else scores + bias
        if self.config.groups is not None:
            selection = _best_groups(selection, self.config.groups)
        ids = selection.topk(top_k).indices
        return scores.gather(1, ids), ids


def _best_groups(selection: Tensor, groups: GroupLimit) -> Tensor:
    """Scores (T,E), -inf outside the groups whose two best experts add up to most."""
    grouped = selection.view(len(selection), groups.num_expert_groups, -1)  # (T, G, E/G)
    totals = grouped.topk(2).values.sum(-1)
    kept = totals.topk(groups.topk_groups).indices
    is_kept = torch.zeros_like(totals, dtype=torch.bool).scatter_(1, kept, True)
    return grouped.masked_fill(~is_kept.unsqueeze(-1), float("-inf")).flatten(1)
