"""What the tests of stored activation scales share."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from expert_cases import random_batch

from mixtura.config import ExpertsConfig
from mixtura.kernels import ExpertsKernel
from mixtura.quant.activations import ActivationGroup, ActivationScheme
from mixtura.quant.scheme import Code
from mixtura.types import ExpertBatch, ExpertsProblem, ExpertWeights

INT8 = ActivationScheme(Code.INT, 8, ActivationGroup.TENSOR, is_static=True)
E4M3 = ActivationScheme(Code.E4M3, 8, ActivationGroup.TENSOR, is_static=True)
FLIPS = 2e-3
"""Sums that differ in the last bit may round to neighbours, here and there."""


def batch(config: ExpertsConfig, num_rows: int) -> ExpertBatch:
    """Every expert, slots without one, and rows that saturate."""
    made = random_batch(config, num_rows, 3)
    ids = made.local_ids.clone()
    ids[1::3, 0] = -1
    rows = made.hidden_states.clone()
    rows[::4] *= 3
    return dataclasses.replace(made, local_ids=ids, hidden_states=rows)


class Deaf(ExpertsKernel):
    """A kernel that knows nothing of stored scales."""

    name: ClassVar[str] = "deaf"

    def cannot_run(self, problem: ExpertsProblem) -> str | None:
        return None

    def pack(self, weights: ExpertWeights, activation_dtype: Any = None) -> Any:
        raise AssertionError("not asked")

    unpack = run = pack  # type: ignore[assignment]
