"""A family's router module, adopted: its parameters and return values, our arithmetic."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from mixtura.config import GatePrecision
from mixtura.cuda import cannot_capture, is_capturing
from mixtura.hf.adopt import get_attribute
from mixtura.routing import RouterTensors
from mixtura.routing.gate import Choice, GatePlan, open_to_hooks
from mixtura.types import TokenInputs


class FamilyGate(nn.Module):
    """Base of adopted routers; subclasses say where tensors are and what the family returns.

    The module is called as the family's own was, so that output recorders and hooks see what they
    expect.
    """

    gate_plan: GatePlan
    weight_path = "weight"
    bias_path: str | None = None
    selection_bias_path: str | None = None

    def forward(
        self,
        hidden_states: Tensor,
        selection_bias: Tensor | None = None,
        *,
        tokens: TokenInputs | None = None,
    ) -> Any:
        """Choose experts for (..., H) rows and return what the family's router returns."""
        choice = self.gate_plan.choose(
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            get_attribute(self, self.weight_path),
            get_attribute(self, self.bias_path) if self.bias_path else None,
            self.router_tensors(selection_bias),
            tokens or TokenInputs(),
        )
        return self.to_family(open_to_hooks(self, choice))

    def router_tensors(self, selection_bias: Tensor | None = None) -> RouterTensors:
        """What the router has learned; a family's block may hand in the selection bias."""
        if selection_bias is None and self.selection_bias_path:
            selection_bias = get_attribute(self, self.selection_bias_path)
        return RouterTensors(selection_bias=selection_bias)

    @abstractmethod
    def to_family(self, choice: Choice) -> Any:
        """The family's return value."""

    @abstractmethod
    def from_family(self, returned: Any, tokens: TokenInputs) -> Choice:
        """The choice in a family's return value; `tokens` are those that it was made for."""


class PlainGate(FamilyGate):
    """Returns (logits, weights, ids); no bias."""

    def to_family(self, choice: Choice) -> tuple[Any, ...]:
        # A routing that is there already goes along, behind what the family returns.
        return tuple(choice if choice.routing is not None else choice[:3])

    def from_family(self, returned: Any, tokens: TokenInputs) -> Choice:
        return Choice(*returned)


class BiasedGate(PlainGate):
    """A selection bias in the router (DeepSeek-V3, GLM-4, Step-3)."""

    selection_bias_path = "e_score_correction_bias"


class LinearBiasGate(PlainGate):
    """The gate is a linear map with bias (GPT-OSS)."""

    bias_path = "bias"


class NestedGate(PlainGate):
    """The linear map is a child `gate`; the block hands in the selection bias (AFMoE)."""

    weight_path = "gate.weight"


class ClassifierGate(BiasedGate):
    """The linear map is a child `classifier` (LongCat-Flash)."""

    weight_path = "classifier.weight"


class LogitsGate(FamilyGate):
    """Returns logits alone; the block chooses, from the same logits (DBRX)."""

    weight_path = "layer.weight"

    def to_family(self, choice: Choice) -> Any:
        return choice.logits

    def from_family(self, returned: Any, tokens: TokenInputs) -> Choice:
        plan = self.gate_plan
        is_native = plan.precision is GatePrecision.NATIVE
        native = plan.router.config.native
        scored = returned if is_native and not native.fp32_scores else returned.float()
        choice = Choice(returned, *plan.router.choose(scored, tokens, self.router_tensors()))
        if is_native and not native.fp32_weights:
            choice = choice._replace(weights=choice.weights.to(returned.dtype), routing=None)
        return choice


class ScoresGate(FamilyGate):
    """Returns scores (T,E), zero where not chosen, and logits (Llama 4)."""

    def to_family(self, choice: Choice) -> tuple[Tensor, Tensor]:
        scores = choice.logits.new_zeros(choice.logits.shape)
        return scores.scatter(1, choice.ids.long(), choice.weights.to(scores.dtype)), choice.logits

    def from_family(self, returned: Any, tokens: TokenInputs) -> Choice:
        scores, logits = returned
        weights, ids = scores.topk(self.gate_plan.router.config.top_k, dim=-1)
        return Choice(logits, weights, ids)


class SortedGate(LogitsGate):
    """Returns slots sorted by expert, with their tokens, weights, counts, and logits (JetMoE)."""

    def to_family(self, choice: Choice) -> Any:
        if is_capturing(choice.ids.device):
            raise cannot_capture(
                "the gate of JetMoE", "counts that it returns as a list", "Capture other parts"
            )
        ids, top_k = choice.ids.long().flatten(), choice.ids.shape[1]
        order = ids.argsort(stable=True)
        counts = ids.new_zeros(self.gate_plan.router.config.num_experts)
        counts = counts.scatter_add(0, ids, torch.ones_like(ids))
        weights = choice.weights.flatten()[order]
        return (order, order // top_k, weights, counts.tolist(), choice.logits)

    def from_family(self, returned: Any, tokens: TokenInputs) -> Choice:
        return super().from_family(returned[-1], tokens)
