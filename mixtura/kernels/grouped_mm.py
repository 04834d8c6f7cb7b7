"""Every expert in one product of torch's: `torch.nn.functional.grouped_mm` with device offsets.

Slots are sorted where the ids are and the host waits for nothing, so that a CUDA graph can hold a
call. On a GPU that is so for bf16 on Hopper and Blackwell: with other dtypes and on other GPUs the
operator copies the offsets to the host and loops, as it does on a CPU (source: `_grouped_mm_cuda`
in aten/src/ATen/native/cuda/GroupedBlas.cpp, torch 2.11 to 2.13). Not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtura.config import WeightOn
from mixtura.kernels.contract import StoredWeightsKernel
from mixtura.kernels.optional import wrong_capability, wrong_dtypes, wrong_sizes
from mixtura.kernels.torch.by_expert import STRIDE_BYTES
from mixtura.kernels.torch.grouped_linear import grouped_linear
from mixtura.kernels.torch.sorted_slots import is_recorded, run_sorted, sort_slots
from mixtura.quant.matrix import QuantizedMatrix
from mixtura.types import ExpertBatch, ExpertsProblem

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Those that the operator takes."""

MAJORS = (9, 10)
"""Compute capabilities on which it is one launch."""


class GroupedMmKernel(StoredWeightsKernel):
    """Dense experts on CUDA, weights as they are stored; on a CPU where it is asked for."""

    name: ClassVar[str] = "grouped_mm"
    is_capturable: ClassVar[bool] = True
    rounds_between: ClassVar[bool] = True
    devices: ClassVar[tuple[str, ...] | None] = ("cuda", "cpu")
    automatic_on: ClassVar[tuple[str, ...] | None] = ("cuda",)
    has_backward: ClassVar[bool] = True

    def cannot_run(self, problem: ExpertsProblem) -> str | None:
        dtype, is_on_gpu = problem.row_dtype, problem.device == "cuda"
        reason = wrong_dtypes(problem, DTYPES)
        if reason is None and is_on_gpu and dtype is not torch.bfloat16:
            return f"is one launch for bf16 alone; with {dtype} it would wait for the host"
        reason = reason or wrong_sizes(problem.experts, STRIDE_BYTES // dtype.itemsize)
        return reason or (wrong_capability(MAJORS) if is_on_gpu else None)

    def run(
        self,
        packed: Any,
        batch: ExpertBatch,
        *,
        weight_on: WeightOn = WeightOn.OUTPUT,
        reduce: bool = True,
    ) -> Tensor:
        slots = sort_slots(batch.local_ids, packed.config.num_experts)
        ends = slots.expert_offsets[1:].to(torch.int32)
        has_gradients = is_recorded(packed, batch)

        def product(x: Tensor, weight: QuantizedMatrix) -> Tensor:
            is_untraceable = torch.compiler.is_compiling() and x.dtype is not torch.bfloat16
            if x.shape[0] == 0 or is_untraceable:
                return grouped_linear(x, weight, slots.expert_offsets)
            matrices = weight.values.transpose(1, 2)
            if not has_gradients:
                return F.grouped_mm(x, matrices, offs=ends)
            # Neither rows behind the last expert's nor their gradients are written.
            x = torch.where(slots.has_expert, x, 0.0)
            return torch.where(slots.has_expert, F.grouped_mm(x, matrices, offs=ends), 0.0)

        terms = run_sorted(packed, batch, weight_on, slots, product)
        return terms.sum(1).to(batch.hidden_states.dtype) if reduce else terms
