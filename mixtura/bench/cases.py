"""What is measured: layer shapes by name, weight formats, numbers of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mixtura.bench.machine import Arithmetic
from mixtura.config import (
    SWIGLU_OAI,
    ActivationDtype,
    ExpertsConfig,
    GateUp,
    RoutingConfig,
    require_positive,
)
from mixtura.config.routing import (
    GroupLimit,
    NoComputeExperts,
    NoComputeKind,
    Renormalize,
    ScoreFunction,
    ScoreOrder,
    SelectionBias,
)
from mixtura.errors import ConfigError
from mixtura.quant.formats import WeightFormat
from mixtura.quant.scheme import Code, QuantScheme
from mixtura.types import ExpertBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """The routed experts of one layer of a known model, and the rule by which tokens visit them."""

    name: str
    experts: ExpertsConfig
    routing: RoutingConfig

    @property
    def top_k(self) -> int:
        """K, choices of a token; some may need no arithmetic."""
        return self.routing.top_k

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(N, K) of one expert's projections, by their role in `ExpertWeights`."""
        c = self.experts
        up = (c.up_size, c.hidden_size)
        found = {"gate_up_proj": up, "down_proj": (c.hidden_size, c.intermediate_size)}
        return found | ({"up_proj": up} if c.gate_up is GateUp.SEPARATE else {})

    @property
    def weights_per_expert(self) -> int:
        """Elements of one expert's projections."""
        return sum(rows * columns for rows, columns in self.matrices.values())

    def expert_bytes(self, scheme: QuantScheme) -> int:
        """Bytes that one expert's projections take in a scheme: values, scales and the like."""
        return sum(
            spec.dtypes[0].itemsize * torch.Size(spec.shape).numel()
            for shape in self.matrices.values()
            for spec in scheme.tensors_for(shape).values()
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One point of a benchmark: a layer's shape, a number of tokens, a weight format, a device.

    Attributes:
        activation_dtype: the arithmetic with quantized weights; None leaves it to the kernel.

    Raises:
        ConfigError: there is no token.
    """

    shape: LayerShape
    num_tokens: int
    weights: WeightFormat
    device: str = "cpu"
    activation_dtype: ActivationDtype | None = None

    def __post_init__(self) -> None:
        require_positive("tokens", self.num_tokens)

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states: that of dense weights, bf16 with quantized ones."""
        scheme = self.weights.scheme
        return torch.bfloat16 if scheme.is_quantized else scheme.values_dtype

    @property
    def rounds_to(self) -> ActivationDtype | None:
        """What rows of products are rounded to by what was asked; None where they are not."""
        is_rounded = self.activation_dtype in (ActivationDtype.INT8, ActivationDtype.FP8)
        return self.activation_dtype if is_rounded and self.weights.scheme.is_quantized else None

    @property
    def arithmetic(self) -> Arithmetic:
        """The fastest that the format allows: its peak is part of the floor.

        Integers and e2m1 codes become int8 beside int8 activations; bf16 and the codes that only
        bf16 holds stay bf16; fp16 and fp32 are multiplied in fp32.
        """
        if self.weights.scheme.code in (Code.INT, Code.E2M1):
            return Arithmetic.INT8
        is_dense_bf16 = self.weights is WeightFormat.BF16
        is_bf16 = is_dense_bf16 or self.weights.scheme.is_quantized
        return Arithmetic.BF16 if is_bf16 else Arithmetic.FP32

    @property
    def num_slots(self) -> int:
        """T * K choices."""
        return self.num_tokens * self.shape.top_k

    @property
    def flops(self) -> int:
        """Of all products: two per weight and slot that an expert computes, as many as expected."""
        rule = self.shape.routing
        num_rows = self.num_slots * rule.num_experts // rule.num_choices
        return 2 * num_rows * self.shape.weights_per_expert

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's projections as stored, scales included."""
        return self.shape.expert_bytes(self.weights.scheme)

    def bytes_touched(self, batch: ExpertBatch) -> int:
        """Bytes of the projections of the experts that a batch visits."""
        ids = batch.local_ids
        return int(torch.unique(ids[ids >= 0]).numel()) * self.expert_bytes

    def __str__(self) -> str:
        return f"{self.shape.name}, {self.weights.value}, T={self.num_tokens}"


def _shape(
    name: str, num_experts: int, top_k: int, hidden: int, intermediate: int, **rule: Any
) -> LayerShape:
    """Plain experts; softmax and renormalized where the rule says nothing else."""
    experts = ExpertsConfig(
        num_experts=num_experts, hidden_size=hidden, intermediate_size=intermediate
    )
    rule = rule or {"renormalize": Renormalize.SUM}
    routing = RoutingConfig(num_experts=num_experts, top_k=top_k, **rule)
    return LayerShape(name=name, experts=experts, routing=routing)


def _gpt_oss(name: str, num_experts: int) -> LayerShape:
    """The softmax over the chosen experts; gate and up in turn, biases."""
    experts = ExpertsConfig(
        num_experts=num_experts,
        hidden_size=2880,
        intermediate_size=2880,
        activation=SWIGLU_OAI,
        gate_up=GateUp.INTERLEAVED,
        is_transposed=True,
        has_bias=True,
    )
    routing = RoutingConfig(num_experts=num_experts, top_k=4, score_order=ScoreOrder.AFTER_TOP_K)
    return LayerShape(name=name, experts=experts, routing=routing)


def _deepseek_v3(name: str, num_experts: int, num_expert_groups: int) -> LayerShape:
    """Sigmoid, a bias on the choice, and half of the groups; a slice keeps groups of 32."""
    groups = GroupLimit(num_expert_groups=num_expert_groups, topk_groups=num_expert_groups // 2)
    rule: dict[str, Any] = {"groups": groups, "score": ScoreFunction.SIGMOID, "scale": 2.5}
    rule |= {"selection_bias": SelectionBias.ON_SCORE, "renormalize": Renormalize.SUM}
    return _shape(name, num_experts, 8, 7168, 2048, **rule)


_LONGCAT: dict[str, Any] = {
    "selection_bias": SelectionBias.ON_SCORE,
    "scale": 6.0,
    "no_compute": NoComputeExperts(kind=NoComputeKind.IDENTITY, count=256),
}
"""12 of 768 choices, of which 256 return their input."""

SHAPES: dict[str, LayerShape] = {
    shape.name: shape
    for shape in (
        _shape("tiny", 32, 4, 64, 32),  # nothing but the cost of a call
        _shape("olmoe", 64, 8, 2048, 1024, renormalize=Renormalize.NONE),
        _shape("qwen3-30b-a3b", 128, 8, 2048, 768),
        _shape("qwen1.5-moe-a2.7b", 60, 4, 2048, 1408, renormalize=Renormalize.NONE),
        _shape("qwen3-next-80b-a3b", 512, 10, 2048, 512),
        _gpt_oss("gpt-oss-20b", 32),
        _gpt_oss("gpt-oss-120b", 128),
        _shape("mixtral", 8, 2, 4096, 14336),
        _deepseek_v3("deepseek-v3", 256, 8),
        _deepseek_v3("deepseek-v3-slice", 64, 2),  # one of four ranks
        _shape("longcat-flash", 512, 12, 6144, 2048, **_LONGCAT),
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


def parse_tokens(text: str) -> list[int]:
    """The numbers of tokens in "1,4,16", each once.

    Raises:
        ConfigError: something in it is no whole number above 0.
    """
    counts = []
    for part in text.split(","):
        is_count = part.strip().isdecimal() and int(part) > 0
        if not is_count:
            raise ConfigError(
                f"tokens ({text}) must be whole numbers above 0 with commas between; got "
                f"{part.strip()!r}. Write, for example, 1,16,256."
            )
        counts.append(int(part))
    return list(dict.fromkeys(counts))


def parse_weights(text: str) -> list[WeightFormat]:
    """The weight formats in "bf16,int8,mxfp4", each once; an unknown name lists the choices."""
    return list(dict.fromkeys(WeightFormat.parse(part.strip()) for part in text.split(",")))


def find_cases(shapes: list[str], weights: str, tokens: str) -> list[Case]:
    """Every combination, on a CPU, tokens fastest, so that the weights of a layer are made once.

    Raises:
        ConfigError: a name is unknown, or a number of tokens is not above 0.
    """
    layers = [find_shape(name) for name in dict.fromkeys(shapes)]
    formats, counts = parse_weights(weights), parse_tokens(tokens)
    return [
        Case(shape=layer, num_tokens=count, weights=format)
        for layer in layers
        for format in formats
        for count in counts
    ]
