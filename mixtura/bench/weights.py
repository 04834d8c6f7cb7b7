"""Random experts of a layer in any weight format, many of them from one that is drawn."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtura.bench.cases import Case, LayerShape
from mixtura.quant.formats import WeightFormat
from mixtura.quant.matrix import QuantizedMatrix, dense, dequantize
from mixtura.quant.quantize import quantize
from mixtura.types import ExpertBatch, ExpertWeights

BIAS_SCALE = 0.1
"""Standard deviation of random biases; small beside the products, so that those are what counts."""

ROLL = 7
"""Blocks of rows (or of single rows) by which each expert is turned further than the one before."""

COLD_BYTES = 128 * 2**20
"""Touch this much before a weight is read again: four times the last-level cache of common CPUs."""

COLD_CACHES = 2
"""And this many times the last-level cache, where that is larger than theirs."""

LAST_LEVEL_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")

MOST_SETS = 8
"""More layers than this are not needed: routings take turns, too."""


class LayerWeights:
    """Experts of one layer shape in one format: one is drawn and quantized, the others are copies.

    Expert e of layer j has the drawn expert's rows in another order (its blocks of rows, where
    rows share scales), at addresses of its own: as good for a measurement as experts that are
    drawn, and much faster to make, since quantizing is slow. So the truth is quick, too: an
    expert's fp32 weights are those of the drawn one, reordered. Weights are N(0, 1/sqrt(fan-in)),
    so that rows keep their size from product to product.
    """

    def __init__(
        self, shape: LayerShape, format: WeightFormat, seed: int = 0, device: str = "cpu"
    ) -> None:
        self.shape = shape
        self.format = format
        self.dtype = torch.bfloat16 if format.scheme.is_quantized else format.scheme.values_dtype
        generator = torch.Generator(device).manual_seed(seed)
        self._drawn: dict[str, QuantizedMatrix] = {}
        self._true: dict[str, Tensor] = {}
        for role, size in shape.matrices.items():
            weight = torch.randn(size, generator=generator, device=device).mul_(size[1] ** -0.5)
            self._drawn[role] = quantize(weight, format)
        self._biases: dict[str, Tensor] = {}
        if shape.experts.has_bias:
            for role, of in (("gate_up_bias", "gate_up_proj"), ("down_bias", "down_proj")):
                rows = shape.matrices[of][0]
                bias = torch.randn(rows, generator=generator, device=device).mul_(BIAS_SCALE)
                self._biases[role] = bias.to(self.dtype)

    def stacks(self, layer: int) -> ExpertWeights:
        """All experts of layer number `layer`, in memory of their own."""
        matrices: dict[str, Any] = {
            role: self._stack(drawn, layer)
            if drawn.is_quantized
            else self._stack_dense(drawn.values, 1, layer)
            for role, drawn in self._drawn.items()
        }
        return ExpertWeights(self.shape.experts, **matrices, **self._stack_biases(layer))

    def dense_stacks(self, layer: int, dtype: torch.dtype) -> ExpertWeights:
        """The same experts dequantized, for who cannot read the format."""
        matrices: dict[str, Any] = {
            role: self._stack_dense(dequantize(drawn).to(dtype), _block_rows(drawn), layer)
            for role, drawn in self._drawn.items()
        }
        biases: dict[str, Any] = {
            role: bias.to(dtype) for role, bias in self._stack_biases(layer).items()
        }
        return ExpertWeights(self.shape.experts, **matrices, **biases)

    def true_weight(self, role: str, layer: int, expert: int) -> Tensor:
        """The (N, K) fp32 weights that one expert's projection stands for."""
        drawn = self._drawn[role]
        if role not in self._true:
            self._true[role] = dequantize(drawn)
        values, block = self._true[role], _block_rows(drawn)
        out = torch.empty_like(values)
        _copy_rolled_(out, values, block, len(values) // block, self._turn(layer, expert))
        return out

    def true_bias(self, role: str, layer: int, expert: int) -> Tensor | None:
        """The fp32 bias of one expert; None where there is none."""
        if role not in self._biases:
            return None
        return self._biases[role].float().roll(self._turn(layer, expert))

    def _turn(self, layer: int, expert: int) -> int:
        return (layer * self.shape.experts.num_experts + expert) * ROLL

    def _stack(self, drawn: QuantizedMatrix, layer: int) -> QuantizedMatrix:
        num_experts, block = self.shape.experts.num_experts, _block_rows(drawn)
        num_blocks = drawn.shape[0] // block
        stacked: dict[str, Any] = {}
        for name, part in drawn.tensors.items():
            stack = stacked[name] = part.new_empty((num_experts, *part.shape))
            for expert in range(num_experts):
                if part.ndim == 0:  # the global scale of the matrix
                    stack[expert] = part
                    continue
                rows = block if name == "values" else 1  # a block has one row of scales
                _copy_rolled_(stack[expert], part, rows, num_blocks, self._turn(layer, expert))
        return replace(drawn, shape=(num_experts, *drawn.shape), **stacked)

    def _stack_dense(self, values: Tensor, block: int, layer: int) -> QuantizedMatrix:
        """A dense stack, stored as the configuration says, seen as (L, N, K)."""
        is_transposed = self.shape.experts.is_transposed
        values = values.T.contiguous() if is_transposed else values
        dim = 1 if is_transposed else 0
        num_blocks = values.shape[dim] // block
        stack = values.new_empty((self.shape.experts.num_experts, *values.shape))
        for expert in range(len(stack)):
            turn = self._turn(layer, expert)
            _copy_rolled_(stack[expert], values, block, num_blocks, turn, dim)
        return dense(stack.transpose(1, 2) if is_transposed else stack)

    def _stack_biases(self, layer: int) -> dict[str, Any]:
        experts = range(self.shape.experts.num_experts)
        return {
            role: torch.stack([bias.roll(self._turn(layer, expert)) for expert in experts])
            for role, bias in self._biases.items()
        }


def _block_rows(matrix: QuantizedMatrix) -> int:
    """Rows that must stay together, since they share scales."""
    rows = matrix.scheme.group_size(matrix.shape)[0] if matrix.is_quantized else 1
    return min(rows, matrix.shape[0])


def _copy_rolled_(
    out: Tensor, values: Tensor, block: int, num_blocks: int, turn: int, dim: int = 0
) -> None:
    """Copy with the first `num_blocks` blocks of rows turned round; a shorter last one stays."""
    end = num_blocks * block
    moved = turn % num_blocks * block
    out.narrow(dim, 0, moved).copy_(values.narrow(dim, end - moved, moved))
    out.narrow(dim, moved, end - moved).copy_(values.narrow(dim, 0, end - moved))
    rest = values.shape[dim] - end
    out.narrow(dim, end, rest).copy_(values.narrow(dim, end, rest))


def random_batches(case: Case, num_batches: int, seed: int) -> list[ExpertBatch]:
    """Batches with routings of their own: K different experts to a token, all equally likely.

    Routing weights are softmax weights rounded to the case's dtype, so that contenders which take
    them in that dtype compute the same thing. A choice without arithmetic is -1, of weight 0.
    """
    generator = torch.Generator().manual_seed(seed)
    num_experts, top_k = case.shape.experts.num_experts, case.shape.top_k
    num_choices = case.shape.routing.num_choices
    batches = []
    for _ in range(num_batches):
        hidden = torch.randn(
            case.num_tokens, case.shape.experts.hidden_size, generator=generator
        ).to(case.dtype)
        scores = torch.randn(case.num_tokens, num_choices, generator=generator)
        weights, ids = scores.softmax(-1).topk(top_k)
        weights = (weights / weights.sum(-1, keepdim=True)).to(case.dtype).float()
        is_none = ids >= num_experts
        ids, weights = ids.masked_fill(is_none, -1), weights.masked_fill(is_none, 0.0)
        batches.append(ExpertBatch(hidden, ids.int(), weights))
    return batches


def num_weight_sets(case: Case, expert_bytes: int) -> int:
    """Layers to rotate through so that weights come from memory; those of small layers do not."""
    return num_cold_sets(case, expert_bytes, max(COLD_BYTES, COLD_CACHES * last_level_bytes()))


def num_cold_sets(case: Case, expert_bytes: int, cold_bytes: int) -> int:
    """Layers that a case must rotate through until so many bytes of weights have been touched."""
    touched = min(case.num_slots, case.shape.experts.num_experts) * expert_bytes
    return min(MOST_SETS, math.ceil(cold_bytes / touched))


def last_level_bytes() -> int:
    """Bytes of the last-level cache as the system tells; 0 where it does not."""
    try:
        text = LAST_LEVEL_CACHE.read_text().strip()
        return int(text.removesuffix("K")) * (1024 if text.endswith("K") else 1)
    except (OSError, ValueError):
        return 0
