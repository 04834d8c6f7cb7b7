"""What is measured: layer shapes by name, weight formats, numbers of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mixtura.bench.machine import Arithmetic
from mixtura.config import SWIGLU_OAI, ExpertsConfig, GateUp, require_positive
from mixtura.errors import ConfigError
from mixtura.quant.formats import WeightFormat
from mixtura.quant.scheme import Code, QuantScheme
from mixtura.types import ExpertBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """The routed experts of one layer of a known model, and how many of them a token visits."""

    name: str
    top_k: int
    experts: ExpertsConfig

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
    """One point of a benchmark: a layer's shape, a number of tokens, a weight format.

    Raises:
        ConfigError: there is no token.
    """

    shape: LayerShape
    num_tokens: int
    weights: WeightFormat

    def __post_init__(self) -> None:
        require_positive("tokens", self.num_tokens)

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states: that of dense weights, bf16 with quantized ones."""
        scheme = self.weights.scheme
        return torch.bfloat16 if scheme.is_quantized else scheme.values_dtype

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
        """T * K rows that go through an expert."""
        return self.num_tokens * self.shape.top_k

    @property
    def flops(self) -> int:
        """Of all products: two per weight and slot."""
        return 2 * self.num_slots * self.shape.weights_per_expert

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's projections as stored, scales included."""
        return self.shape.expert_bytes(self.weights.scheme)

    def bytes_touched(self, batch: ExpertBatch) -> int:
        """Bytes of the projections of the experts that a batch visits."""
        return int(torch.unique(batch.local_ids).numel()) * self.expert_bytes

    def __str__(self) -> str:
        return f"{self.shape.name}, {self.weights.value}, T={self.num_tokens}"


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
    """Every combination, tokens fastest, so that the weights of a layer are made once.

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
