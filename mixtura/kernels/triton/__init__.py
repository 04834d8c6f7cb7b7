"""Our kernels for GPUs: a small set for any number of rows, without configuration files.

See docs/gpu.md. Nothing here imports Triton until experts run on a GPU.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from mixtura.config import WeightOn
from mixtura.kernels.contract import StoredWeightsKernel
from mixtura.kernels.triton.device import missing
from mixtura.types import ExpertBatch, ExpertsProblem, ExpertWeights

ROW_DTYPES = (torch.bfloat16, torch.float16)

MAX_EXPERTS = 2048
"""Experts whose counts one program holds."""

MAX_POST_NORM_SIZE = 16384
"""Columns that one program can hold at once."""


class TritonKernel(StoredWeightsKernel):
    """Dense bf16 and fp16 experts on a GPU; the weights stay as they are stored."""

    name: ClassVar[str] = "triton"
    is_capturable: ClassVar[bool] = True
    devices: ClassVar[tuple[str, ...] | None] = ("cuda",)

    def cannot_run(self, problem: ExpertsProblem) -> str | None:
        reason = missing()
        if reason is not None:
            return reason
        if not problem.is_dense:
            return f"reads dense weights, not the scheme {problem.scheme}"
        if problem.row_dtype not in ROW_DTYPES:
            return f"computes rows of bf16 and fp16, not {problem.row_dtype}"
        others = [s.values_dtype for s in problem.schemes if s.values_dtype != problem.row_dtype]
        if others:
            return f"reads weights of the rows' dtype, and some are {others[0]}"
        config = problem.experts
        if config.num_experts > MAX_EXPERTS:
            return f"sorts by up to {MAX_EXPERTS} experts, not {config.num_experts}"
        if config.post_norm is not None and config.hidden_size > MAX_POST_NORM_SIZE:
            return f"norms rows of up to {MAX_POST_NORM_SIZE} columns, not {config.hidden_size}"
        return None

    def run(
        self,
        packed: Any,
        batch: ExpertBatch,
        *,
        weight_on: WeightOn = WeightOn.OUTPUT,
        reduce: bool = True,
    ) -> Tensor:
        from mixtura.kernels.triton.operator import run_experts

        assert isinstance(packed, ExpertWeights)
        return run_experts(packed, batch, weight_on, reduce)
