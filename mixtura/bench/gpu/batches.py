"""What a layer is given: hidden states and router logits, even or skewed, and the truth about them.

Logits are Gumbel noise plus the logarithm of an expert's share, so that the K largest are K draws
without replacement: even ones hit experts as uniform routing does, skewed ones by Zipf's law.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property

import torch
from torch import Tensor

from mixtura.bench.cases import Case
from mixtura.bench.experts import true_output
from mixtura.bench.weights import LayerWeights
from mixtura.config.routing import RoutingConfig, SelectionBias
from mixtura.errors import ConfigError
from mixtura.routing import RouterTensors, router_for
from mixtura.types import ExpertBatch, Routing, TokenInputs

ZIPF_EXPONENT = 0.8
"""The expert of rank r gets a share that goes with r ** -0.8."""

BIAS_SCALE = 1e-6
"""Of a bias on the choice: it must be read and added, and must not skew what is drawn."""

NEVER = -1e4
"""A logit that no rule chooses."""

CHECKED_TOKENS = 64
"""Tokens of a batch that are compared with the truth, spread over the batch, ends included."""


class Spread(StrEnum):
    """How choices spread over experts."""

    UNIFORM = "uniform"
    ZIPF = "zipf"

    @classmethod
    def parse(cls, text: str) -> Spread:
        """The member of that name; the error lists the names."""
        if text not in list(cls):
            raise ConfigError(
                f"routing ({text}) must be one of {', '.join(cls)}; got an unknown name. "
                "Use one of these."
            )
        return cls(text)


@dataclass(frozen=True)
class LayerBatch:
    """One batch of a layer, and the choice of experts that its logits stand for.

    Attributes:
        hidden_states: (T,H). router_logits: (T, choices) fp32. routing: in fp32, by the pipeline.
    """

    hidden_states: Tensor
    router_logits: Tensor
    routing: Routing

    @property
    def experts(self) -> ExpertBatch:
        """What the experts are given."""
        return ExpertBatch(self.hidden_states, self.routing.topk_ids, self.routing.topk_weights)

    @cached_property
    def num_slots(self) -> int:
        """Choices that need an expert."""
        return int((self.routing.topk_ids >= 0).sum())

    @cached_property
    def num_experts(self) -> int:
        """Experts that some token visits."""
        ids = self.routing.topk_ids
        return int(torch.unique(ids[ids >= 0]).numel())


class BatchSource:
    """Draws the batches of a case on its device.

    Args:
        case: sizes, rule, dtype, device.
        spread: of choices over experts.
        seed: of everything that is drawn.
    """

    def __init__(self, case: Case, spread: Spread, seed: int = 1) -> None:
        self.case = case
        self._generator = torch.Generator(case.device).manual_seed(seed)
        rule = case.shape.routing
        self.tensors = self._tensors(rule)
        order = torch.randperm(rule.num_choices, generator=self._generator, device=case.device)
        exponent = ZIPF_EXPONENT if spread is Spread.ZIPF else 0.0
        self._log_shares = -exponent * torch.log1p(order.float())

    def draw(self) -> LayerBatch:
        """The next batch."""
        case = self.case
        size = (case.num_tokens, case.shape.routing.num_choices)
        uniform = torch.rand(size, generator=self._generator, device=case.device)
        noise = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        return self._batch(noise + self._log_shares)

    def draw_half(self) -> LayerBatch:
        """A batch in which every other choice is made by no token."""
        logits = self.draw().router_logits
        logits[:, 1::2] = NEVER
        return self._batch(logits)

    def _batch(self, logits: Tensor) -> LayerBatch:
        case = self.case
        size = (case.num_tokens, case.shape.experts.hidden_size)
        hidden = torch.randn(size, generator=self._generator, device=case.device).to(case.dtype)
        return LayerBatch(hidden, logits, self._route(logits))

    def _tensors(self, rule: RoutingConfig) -> RouterTensors:
        if rule.selection_bias is SelectionBias.NONE:
            return RouterTensors()
        draw = torch.randn(
            rule.num_choices, generator=self._generator, device=self.case.device
        ).mul_(BIAS_SCALE)
        return RouterTensors(selection_bias=draw)

    def _route(self, logits: Tensor) -> Routing:
        """Step by step in fp32, with no kernel that is under test."""
        router = router_for(self.case.shape.routing, self.tensors)
        weights, ids = router.select_by_steps(logits, None, self.tensors)
        return router.finish(weights, ids, TokenInputs(), self.tensors)


@dataclass(frozen=True)
class Truth:
    """What some rows of a batch's outputs must be.

    Attributes:
        batch: the whole batch. rows: (C,) those that are compared.
        experts: (C,H) fp32, of the experts alone. layer: (C,H) fp32, with what needs no expert.
    """

    batch: LayerBatch
    rows: Tensor
    experts: Tensor
    layer: Tensor

    @staticmethod
    def of(
        source: LayerWeights,
        batch: LayerBatch,
        round_rows: Callable[[Tensor], Tensor] = lambda rows: rows,
    ) -> Truth:
        """The truth about layer 0; `round_rows` is as in `true_output`."""
        num_tokens = batch.hidden_states.shape[0]
        count = min(CHECKED_TOKENS, num_tokens)
        rows = torch.linspace(0, num_tokens - 1, count, device=batch.hidden_states.device).long()
        given = batch.experts
        some = ExpertBatch(
            given.hidden_states[rows], given.local_ids[rows], given.topk_weights[rows]
        )
        experts = layer = true_output(source, some, round_rows=round_rows)
        bypass = batch.routing.bypass
        if bypass is not None:
            assert bypass.identity_weight is not None
            some_bypass = replace(bypass, identity_weight=bypass.identity_weight[rows])
            layer = some_bypass.apply(experts, some.hidden_states)
        return Truth(batch, rows, experts, layer)
