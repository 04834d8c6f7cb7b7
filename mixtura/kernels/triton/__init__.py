"""Our kernels for GPUs: a small set for any number of rows, without configuration files.

See docs/gpu.md. Nothing here imports Triton until experts run on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from mixtura.config import ActivationDtype, ExpertsConfig, WeightOn
from mixtura.kernels.contract import STATIC_CODES, ExpertsKernel, in_words
from mixtura.kernels.triton.device import has_e4m3_products, missing
from mixtura.kernels.triton.packed.layout import not_rounded, unreadable_experts
from mixtura.quant.activations import ActivationScheme, activations_for
from mixtura.quant.scheme import Code, QuantScheme
from mixtura.types import ExpertBatch, ExpertsProblem, ExpertWeights

if TYPE_CHECKING:
    from mixtura.kernels.triton.packed.experts import PackedWeights

ROW_DTYPES = (torch.bfloat16, torch.float16)

MAX_EXPERTS = 2048
"""Experts whose counts one program holds."""

MAX_POST_NORM_SIZE = 16384
"""Columns that one program can hold at once."""


class TritonKernel(ExpertsKernel):
    """Experts on a GPU: dense ones of bf16 and fp16 as they are stored, quantized ones packed."""

    name: ClassVar[str] = "triton"
    is_capturable: ClassVar[bool] = True
    devices: ClassVar[tuple[str, ...] | None] = ("cuda",)
    activation_dtypes: ClassVar[tuple[ActivationDtype, ...]] = tuple(ActivationDtype)
    rounding_codes: ClassVar[tuple[Code, ...]] = STATIC_CODES

    def shares_memory(self, is_quantized: bool) -> bool:
        return not is_quantized

    def packs_in_graphs(self, is_quantized: bool) -> bool:
        return not is_quantized

    def activations(
        self,
        asked: ActivationDtype | None,
        meant: ActivationScheme | None,
        schemes: Sequence[QuantScheme],
    ) -> ActivationScheme | None:
        """What is asked for; what a checkpoint means only where there are products for it."""
        found = activations_for(asked, meant, schemes)
        if found is None or asked is not None:
            return found
        return None if _no_products(found, schemes) is not None else found

    def cannot_run(self, problem: ExpertsProblem) -> str | None:
        reason = missing()
        if reason is not None:
            return reason
        if problem.row_dtype not in ROW_DTYPES:
            return f"computes rows of bf16 and fp16, not {problem.row_dtype}"
        config = problem.experts
        if config.num_experts > MAX_EXPERTS:
            return f"sorts by up to {MAX_EXPERTS} experts, not {config.num_experts}"
        if config.post_norm is not None and config.hidden_size > MAX_POST_NORM_SIZE:
            return f"norms rows of up to {MAX_POST_NORM_SIZE} columns, not {config.hidden_size}"
        if not problem.is_dense:
            return self._cannot_run_packed(problem)
        others = [s.values_dtype for s in problem.schemes if s.values_dtype != problem.row_dtype]
        return f"reads weights of the rows' dtype, and some are {others[0]}" if others else None

    def _cannot_run_packed(self, problem: ExpertsProblem) -> str | None:
        reason = unreadable_experts(problem.schemes, problem.has_unlike_gate_up)
        if reason is not None:
            return reason
        found = self.activations(problem.activation_dtype, problem.activations, problem.schemes)
        for rounding in (*problem.roundings, *([] if found is None else [found])):
            reason = _no_products(rounding, problem.schemes)
            if reason is not None:
                return reason
        return None

    def shortfall(self, problem: ExpertsProblem) -> str | None:
        meant = problem.activations
        if problem.is_dense or meant is None or problem.activation_dtype is not None:
            return None
        return _no_products(meant, problem.schemes)

    def how(self, problem: ExpertsProblem) -> str | None:
        """What rows are rounded to, or why they are not as the checkpoint means it."""
        if problem.is_dense:
            return None
        found = self.activations(problem.activation_dtype, problem.activations, problem.schemes)
        rounded = in_words(problem.roundings, found)
        if rounded is not None:
            return rounded
        words = "packed weights, 16-bit activations"
        shortfall = self.shortfall(problem)
        return words if shortfall is None else f"{words}, as the kernel {shortfall}"

    def pack(self, weights: ExpertWeights, activation_dtype: ActivationDtype | None = None) -> Any:
        """Dense weights themselves; quantized ones in the order in which products read them.

        Raises:
            InputError: a scale or a code is no finite number, or a scale is out of range.
        """
        held = weights.rounded_for(activation_dtype)
        if not any(scheme.is_quantized for scheme in held.schemes):
            return held
        from mixtura.kernels.triton.packed.experts import pack_experts

        found = self.activations(activation_dtype, held.activations, held.schemes)
        return pack_experts(weights, held, found)

    def unpack(self, packed: Any, config: ExpertsConfig) -> ExpertWeights:
        if isinstance(packed, ExpertWeights):
            return packed
        from mixtura.kernels.triton.packed.experts import unpack_experts

        return unpack_experts(packed)

    def slots(self, packed: Any) -> dict[str, Tensor]:
        experts: ExpertWeights | PackedWeights = packed
        return experts.slots()

    def run(
        self,
        packed: Any,
        batch: ExpertBatch,
        *,
        weight_on: WeightOn = WeightOn.OUTPUT,
        reduce: bool = True,
    ) -> Tensor:
        from mixtura.kernels.triton.operator import run_experts

        return run_experts(packed, batch, weight_on, reduce)


def _no_products(rounding: ActivationScheme, schemes: Sequence[QuantScheme]) -> str | None:
    """Why rows rounded so are not multiplied with all of these weights on this GPU, or None."""
    if not (rounding.is_found_running or rounding.has_one_scale):
        return f"rounds no rows to {rounding}"
    if rounding.code is Code.E4M3 and not has_e4m3_products():
        return "multiplies e4m3 activations from compute capability 8.9 on"
    reasons = (not_rounded(scheme, rounding) for scheme in schemes)
    return next((reason for reason in reasons if reason is not None), None)
