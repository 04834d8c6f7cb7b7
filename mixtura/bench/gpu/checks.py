"""What a result is compared with, and how far from it a correct one may be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mixtura.bench.cases import Case
from mixtura.bench.contenders import Contender
from mixtura.bench.experts import DENSE_TOLERANCE
from mixtura.bench.gpu.arithmetic import rounding_of
from mixtura.bench.gpu.batches import LayerBatch, Truth
from mixtura.bench.gpu.rotation import Measure, error_of
from mixtura.bench.weights import LayerWeights
from mixtura.config import ActivationDtype

CLOSE_BF16 = 5e-3
"""Relative error in bf16 of who keeps fp32 between the products and in sums: rounding activated
rows and the output shows 2.4e-3 (Qwen3-30B-A3B's and gpt-oss's widths, K 8 and 4)."""

PLAIN_BF16 = 1e-2
"""Of who rounds gate, up, every expert's rows, routing weights and sums: it shows up to 5.9e-3."""

ROUNDED = {ActivationDtype.FP8: 7e-2, ActivationDtype.INT8: 9e-2}
"""Of who rounds rows, against rows that are not: a fence, since the rounding by itself, in fp32,
shows 3.9e-2 to 4.6e-2 with e4m3 codes (a scale for 128 columns or for a row), up to 5.8e-2 for a
single token; with int8 codes and a scale for a row 2.2e-2 (Qwen3-30B-A3B), 2.5e-2 (DeepSeek-V3) and
3.3e-2 (Mixtral, whose rows are widest), up to 7.6e-2 for a single token there."""

CLOSE_ROUNDED = 5e-3
"""Of who rounds rows and keeps fp32 up to there, against the same rounding in fp32: the output in
bf16 shows 1.7e-3, and 3.5e-3 where sums are off by 1e-4 of a row's size before they are rounded,
which moves some codes to a neighbour."""

PLAIN_ROUNDED = 2e-2
"""Of who rounds rows to 16 bits before: so many codes move that it shows up to 1.5e-2."""

FEW_TOKENS, FEW_FACTOR = 16, 3
"""Fewer tokens have no mean: of a single one a large code that moves shows up to 1.4e-2, and 3.2e-2
with rows of 16 bits."""


@dataclass(frozen=True)
class Truths:
    """What a batch's outputs must be.

    Attributes:
        exact: with rows as they come. rounded: with rows as the case's arithmetic rounds them, None
            where it does not.
    """

    exact: Truth
    rounded: Truth | None

    @staticmethod
    def of(case: Case, source: LayerWeights, batch: LayerBatch) -> Truths:
        """Those of layer 0."""
        round_rows = rounding_of(case)
        rounded = None if round_rows is None else Truth.of(source, batch, round_rows)
        return Truths(Truth.of(source, batch), rounded)

    def errors(self, found: Tensor, measure: Measure) -> Errors:
        """Of one output."""
        rounded = None if self.rounded is None else error_of(found, self.rounded, measure)
        return Errors(error_of(found, self.exact, measure), rounded)


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative Frobenius errors against both truths."""

    exact: float
    rounded: float | None

    @staticmethod
    def worst(of: Iterable[Errors]) -> Errors:
        """The largest of each kind, of at least one."""
        all_of = list(of)
        rounded = [errors.rounded for errors in all_of if errors.rounded is not None]
        return Errors(max(errors.exact for errors in all_of), max(rounded, default=None))

    def rounded_of(self, case: Case, contender: Contender) -> float | None:
        """The error against rows rounded alike, of a contender that rounds them."""
        return None if contender.rounds_to(case) is None else self.rounded

    def are_small(self, case: Case, contender: Contender) -> bool:
        """Whether a contender's result is correct."""
        rounded = self.rounded_of(case, contender)
        is_close = rounded is None or rounded <= rounded_tolerance(case, contender)
        return is_close and self.exact <= tolerance(case, contender)


def tolerance(case: Case, contender: Contender) -> float:
    """The largest error of a correct result against rows that are not rounded."""
    rounds_to = contender.rounds_to(case)
    if rounds_to is not None:
        return ROUNDED[rounds_to]
    if case.dtype is not torch.bfloat16:
        return DENSE_TOLERANCE[case.dtype]
    return CLOSE_BF16 if contender.rounds_once(case) else PLAIN_BF16


def rounded_tolerance(case: Case, contender: Contender) -> float:
    """The largest error of a correct result against rows that are rounded alike."""
    bound = CLOSE_ROUNDED if contender.rounds_once(case) else PLAIN_ROUNDED
    return bound * FEW_FACTOR if case.num_tokens < FEW_TOKENS else bound
