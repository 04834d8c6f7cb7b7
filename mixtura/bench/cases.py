"""What is measured: layer shapes by name, and random weights and batches of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mixtura.config import SWIGLU_OAI, ExpertsConfig, GateUp
from mixtura.errors import ConfigError
from mixtura.experts.storage import default_storage, stored_shapes
from mixtura.types import ExpertBatch

WEIGHT_SCALE = 0.02
"""Standard deviation of random weights: that of most models' initialisation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """The routed experts of one layer of a known model, and how many of them a token visits."""

    name: str
    top_k: int
    experts: ExpertsConfig

    @property
    def weights_per_expert(self) -> int:
        """Elements of one expert's projections."""
        c = self.experts
        num_up = 2 if c.is_gated else 1
        return (num_up + 1) * c.hidden_size * c.intermediate_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One point of a benchmark: a layer's shape, a number of tokens, a dtype."""

    shape: LayerShape
    num_tokens: int
    dtype: torch.dtype

    @property
    def num_slots(self) -> int:
        """T * K rows that go through an expert."""
        return self.num_tokens * self.shape.top_k

    @property
    def flops(self) -> int:
        """Of all products: two per weight and slot."""
        return 2 * self.num_slots * self.shape.weights_per_expert

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's projections."""
        return self.shape.weights_per_expert * self.dtype.itemsize

    def bytes_touched(self, batch: ExpertBatch) -> int:
        """Bytes of the projections of the experts that a batch visits."""
        return int(torch.unique(batch.local_ids).numel()) * self.expert_bytes


def _shape(name: str, num_experts: int, top_k: int, hidden: int, intermediate: int) -> LayerShape:
    experts = ExpertsConfig(
        num_experts=num_experts, hidden_size=hidden, intermediate_size=intermediate
    )
    return LayerShape(name=name, top_k=top_k, experts=experts)


_GPT_OSS = ExpertsConfig(
    num_experts=32,
    hidden_size=2880,
    intermediate_size=2880,
    activation=SWIGLU_OAI,
    gate_up=GateUp.INTERLEAVED,
    is_transposed=True,
    has_bias=True,
)

SHAPES: dict[str, LayerShape] = {
    shape.name: shape
    for shape in (
        _shape("tiny", 32, 4, 64, 32),  # nothing but the cost of a call
        _shape("olmoe", 64, 8, 2048, 1024),
        _shape("qwen3-30b-a3b", 128, 8, 2048, 768),
        _shape("qwen1.5-moe-a2.7b", 60, 4, 2048, 1408),
        _shape("qwen3-next-80b-a3b", 512, 10, 2048, 512),
        LayerShape(name="gpt-oss-20b", top_k=4, experts=_GPT_OSS),
        _shape("mixtral", 8, 2, 4096, 14336),
        _shape("deepseek-v3-slice", 64, 8, 7168, 2048),  # one of four ranks
    )
}
"""Layer shapes by name (source: the models' configurations)."""


def find_shape(name: str) -> LayerShape:
    """The shape of that name; the error lists the names."""
    if name not in SHAPES:
        raise ConfigError(
            f"shape ({name!r}) must be one of {', '.join(SHAPES)}; got an unknown name. "
            "Use one of these."
        )
    return SHAPES[name]


WeightSet = dict[str, Tensor]
"""Tensors of one layer's experts by attribute name, stored as Transformers stores them."""


def random_weights(config: ExpertsConfig, dtype: torch.dtype, seed: int) -> WeightSet:
    """Weights of the experts; each expert has other values at other addresses.

    Only one expert is drawn: the others are its rows in another order, which is as good for a
    measurement and much faster to make.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = stored_shapes(config)
    weights: WeightSet = {}
    for role, stored in default_storage(config).items():
        num_experts, *one = shapes[role]
        drawn = torch.randn(one, generator=generator).mul_(WEIGHT_SCALE).to(dtype)
        stack = torch.empty(num_experts, *one, dtype=dtype)
        for expert in range(num_experts):
            stack[expert] = drawn.roll(expert * (one[0] // num_experts + 1), 0)
        weights[stored.path] = stack
    return weights


def random_batches(case: Case, num_batches: int, seed: int) -> list[ExpertBatch]:
    """Batches with routings of their own: K different experts to a token, all equally likely.

    Routing weights are softmax weights rounded to the case's dtype, so that contenders which take
    them in that dtype compute the same thing.
    """
    generator = torch.Generator().manual_seed(seed)
    num_experts, top_k = case.shape.experts.num_experts, case.shape.top_k
    batches = []
    for _ in range(num_batches):
        hidden = torch.randn(
            case.num_tokens, case.shape.experts.hidden_size, generator=generator
        ).to(case.dtype)
        scores = torch.randn(case.num_tokens, num_experts, generator=generator)
        weights, ids = scores.softmax(-1).topk(top_k)
        weights = (weights / weights.sum(-1, keepdim=True)).to(case.dtype).float()
        batches.append(ExpertBatch(hidden, ids.int(), weights))
    return batches


COLD_BYTES = 128 * 2**20
"""Touch this much before a weight is read again: four times the last-level cache of common CPUs."""


def num_weight_sets(case: Case, *, most: int = 8) -> int:
    """Layers to rotate through so that weights come from memory; those of small layers do not."""
    touched = min(case.num_slots, case.shape.experts.num_experts) * case.expert_bytes
    return min(most, math.ceil(COLD_BYTES / touched))
