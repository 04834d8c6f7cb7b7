"""DeepGEMM's grouped bf16 product, where the package is installed; activation and sum are torch's.

Its contiguous layout wants every expert's rows to begin at a multiple of an alignment, and an int32
for each row: the expert, or -1 for a row that only fills up. Rows are laid out where the ids are,
in as many rows as any choice of experts could need, so that the host waits for nothing. Source:
csrc/apis/gemm.hpp (`m_grouped_bf16_gemm_nt_contiguous`) and deep_gemm/include/deep_gemm/scheduler
of github.com/deepseek-ai/DeepGEMM, version 2.8. Not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from mixtura.config import WeightOn
from mixtura.kernels.contract import StoredWeightsKernel
from mixtura.kernels.keys import constant_in_graphs
from mixtura.kernels.optional import DEEP_GEMM, wrong_capability, wrong_dtypes, wrong_sizes
from mixtura.kernels.torch.sorted_slots import SortedSlots, run_sorted, sort_slots
from mixtura.quant.matrix import QuantizedMatrix
from mixtura.types import ExpertBatch, ExpertsProblem

MAJORS = (9, 10)
"""Compute capabilities that it has kernels for."""

SIZE_MULTIPLE = 64
"""Of the summed dimension, which both sizes are."""

PRODUCT, ALIGNMENT = "m_grouped_bf16_gemm_nt_contiguous", "get_mk_alignment_for_contiguous_layout"


class DeepGemmKernel(StoredWeightsKernel):
    """Dense bf16 experts on Hopper and Blackwell, weights as they are stored."""

    name: ClassVar[str] = "deep_gemm"
    is_capturable: ClassVar[bool] = True
    rounds_between: ClassVar[bool] = True
    devices: ClassVar[tuple[str, ...] | None] = ("cuda",)
    automatic_on: ClassVar[tuple[str, ...] | None] = ()

    def cannot_run(self, problem: ExpertsProblem) -> str | None:
        reason = DEEP_GEMM.missing() or wrong_dtypes(problem, (torch.bfloat16,))
        if reason is None and problem.experts.is_transposed:
            return "reads weights stored (experts, out, in), and these are (experts, in, out)"
        return reason or wrong_sizes(problem.experts, SIZE_MULTIPLE) or wrong_capability(MAJORS)

    def cannot_load(self) -> str | None:
        return DEEP_GEMM.unusable(PRODUCT, ALIGNMENT)

    def how(self, problem: ExpertsProblem) -> str:
        return DEEP_GEMM.label

    def run(
        self,
        packed: Any,
        batch: ExpertBatch,
        *,
        weight_on: WeightOn = WeightOn.OUTPUT,
        reduce: bool = True,
    ) -> Tensor:
        slots = aligned(sort_slots(batch.local_ids, packed.config.num_experts), _alignment())
        experts = torch.where(slots.has_expert[:, 0], slots.expert_of_row, -1).to(torch.int32)

        def product(x: Tensor, weight: QuantizedMatrix) -> Tensor:
            if torch.compiler.is_compiling():
                out: Tensor = torch.ops.mixtura.deep_gemm(x, weight.values, experts)
                return out
            return _multiply(x, weight.values, experts)

        terms = run_sorted(packed, batch, weight_on, slots, product)
        return terms.sum(1).to(batch.hidden_states.dtype) if reduce else terms


def aligned(slots: SortedSlots, alignment: int) -> SortedSlots:
    """The same slots, every expert's rows beginning at a multiple of `alignment`.

    R is the most that any choice needs: `N + min(N, L) * (alignment - 1)`, rounded down.

    Example:
        >>> ids = torch.tensor([[1, -1], [0, 1]], dtype=torch.int32)
        >>> rows = aligned(sort_slots(ids, num_experts=2), alignment=2)
        >>> torch.where(rows.has_expert[:, 0], rows.expert_of_row, -1).tolist()
        [0, -1, 1, 1, -1, -1]
        >>> rows.row_of_slot.tolist()  # that of slot 1 says nothing
        [2, 0, 0, 3]
    """
    offsets = slots.expert_offsets
    num_slots, num_experts = slots.slot_of_row.shape[0], offsets.shape[0] - 1
    most = num_slots + min(num_slots, num_experts) * (alignment - 1)
    num_rows = most // alignment * alignment
    blocks = (offsets.diff() + alignment - 1) // alignment
    starts = (blocks.cumsum(0) - blocks) * alignment
    expert = slots.expert_of_row
    rank = torch.arange(num_slots, device=expert.device) - offsets[expert]
    # Slots without an expert go to a row behind all others, which is cut off.
    row = torch.where(slots.has_expert[:, 0], starts[expert] + rank, num_rows)

    def laid_out(values: Tensor) -> Tensor:
        return values.new_zeros(num_rows + 1).scatter(0, row, values)[:num_rows]

    return SortedSlots(
        slot_of_row=laid_out(slots.slot_of_row),
        row_of_slot=torch.where(slots.has_expert[:, 0], row, 0)[slots.row_of_slot],
        expert_of_row=laid_out(expert),
        has_expert=laid_out(slots.has_expert[:, 0]).unsqueeze(1),
        expert_offsets=offsets,
    )


@constant_in_graphs
def _alignment() -> int:
    return int(getattr(DEEP_GEMM.load(), ALIGNMENT)())


def _multiply(rows: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    """(R, in), (L, out, in), (R,) int32 -> (R, out); rows of expert -1 are anything."""
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    getattr(DEEP_GEMM.load(), PRODUCT)(rows.contiguous(), weight, out, experts)
    return out


_operator = torch.library.custom_op("mixtura::deep_gemm", _multiply, mutates_args=())
"""One node of a graph of torch.compile."""


@_operator.register_fake
def _(rows: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])
