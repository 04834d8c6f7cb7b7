"""The portable kernel: rows sorted by expert, one torch product per expert that has rows."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from mixtura.config import ActivationDtype, WeightOn
from mixtura.kernels.contract import STATIC_CODES, StoredWeightsKernel
from mixtura.kernels.torch.eager import run_eager
from mixtura.kernels.torch.grouped_linear import grouped_linear
from mixtura.kernels.torch.sorted_slots import is_recorded, run_sorted, sort_slots
from mixtura.quant.scheme import Code
from mixtura.types import ExpertBatch, ExpertsProblem, ExpertWeights

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class TorchKernel(StoredWeightsKernel):
    """Any device torch has; weights stay as they are, quantized ones are read expert by expert."""

    name: ClassVar[str] = "torch"
    rounds_between: ClassVar[bool] = True
    has_backward: ClassVar[bool] = True
    activation_dtypes: ClassVar[tuple[ActivationDtype, ...]] = tuple(ActivationDtype)
    rounding_codes: ClassVar[tuple[Code, ...]] = STATIC_CODES
    has_lora: ClassVar[bool] = True

    def cannot_run(self, problem: ExpertsProblem) -> str | None:
        if problem.row_dtype not in FLOAT_DTYPES:
            return f"cannot compute in {problem.row_dtype}"
        if problem.needs_grad and not problem.is_dense:
            return f"has no gradient for weights in the scheme {problem.scheme}"
        return None

    def run(
        self,
        packed: Any,
        batch: ExpertBatch,
        *,
        weight_on: WeightOn = WeightOn.OUTPUT,
        reduce: bool = True,
    ) -> Tensor:
        assert isinstance(packed, ExpertWeights)
        if torch.compiler.is_compiling() or is_recorded(packed, batch):
            terms = _run_grouped(packed, batch, weight_on)
            return terms.sum(1).to(batch.hidden_states.dtype) if reduce else terms
        return run_eager(packed, batch, weight_on, reduce)


def _run_grouped(weights: ExpertWeights, batch: ExpertBatch, weight_on: WeightOn) -> Tensor:
    """All experts at once, as a few nodes of a graph. -> (M, K, H) fp32.

    The gradient of a stack of experts is made once, where slicing it would make one per expert.
    """
    slots = sort_slots(batch.local_ids, weights.config.num_experts)
    product = partial(grouped_linear, expert_offsets=slots.expert_offsets)
    return run_sorted(weights, batch, weight_on, slots, product)
