"""FlashInfer's `cutlass_fused_moe`, where the package is installed: a whole layer in one call.

It wants the up rows of the first projection before the gate rows, so `pack` copies the weights. An
id outside 0 .. L-1 is a slot without an expert. An expert that a row names twice is found once, so
slots of one expert are joined before the call. Its unfused sum is used, which adds in fp32 in slot
order; the fused one adds with atomics in the rows' dtype. Source: flashinfer/fused_moe/core.py and
csrc/fused_moe/cutlass_backend of github.com/flashinfer-ai/flashinfer, version 0.7. Not yet run on a
GPU.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mixtura.config import (
    Activation,
    ActivationDtype,
    ActivationFunction,
    ExpertsConfig,
    GateUp,
    LimitOn,
    WeightOn,
)
from mixtura.kernels.contract import ExpertsKernel
from mixtura.kernels.optional import FLASHINFER, wrong_capability, wrong_dtypes, wrong_sizes
from mixtura.quant.matrix import dense
from mixtura.types import ExpertBatch, ExpertsProblem, ExpertWeights

DTYPES = (torch.bfloat16, torch.float16)
MAJORS = (9, 10)

SIZE_MULTIPLE = 8
"""16 bytes of a 16-bit dtype, as its loads ask."""

UNFUSED = "use_fused_finalize"
"""The argument that chooses the sum; FlashInfer has it since June 2026."""


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """The experts of a layer as FlashInfer reads them.

    Attributes:
        config: as they were stored.
        first: (L, 2I, H) up rows before gate rows, or (L, I, H) of ungated experts.
        down: (L, H, I).
        alpha, beta, limit: (L,) fp32 of the activation `gate * sigmoid(alpha * gate) * (up + beta)`
            with its limit; None where there is nothing to it.
    """

    config: ExpertsConfig
    first: Tensor
    down: Tensor
    alpha: Tensor | None
    beta: Tensor | None
    limit: Tensor | None


class FlashInferKernel(ExpertsKernel):
    """Dense bf16 and fp16 experts on Hopper and Blackwell, in a copy of the weights."""

    name: ClassVar[str] = "flashinfer"
    is_capturable: ClassVar[bool] = True
    rounds_between: ClassVar[bool] = True
    devices: ClassVar[tuple[str, ...] | None] = ("cuda",)
    automatic_on: ClassVar[tuple[str, ...] | None] = ()

    def cannot_run(self, problem: ExpertsProblem) -> str | None:
        return (
            FLASHINFER.missing()
            or wrong_dtypes(problem, DTYPES)
            or unlike(problem.experts)
            or wrong_sizes(problem.experts, SIZE_MULTIPLE)
            or wrong_capability(MAJORS)
        )

    def cannot_load(self) -> str | None:
        return FLASHINFER.unusable("cutlass_fused_moe", "ActivationType") or _is_too_old()

    def how(self, problem: ExpertsProblem) -> str:
        return FLASHINFER.label

    def pack(
        self, weights: ExpertWeights, activation_dtype: ActivationDtype | None = None
    ) -> PackedExperts:
        config, activation = weights.config, weights.config.activation
        first, down = weights.gate_up_proj.values.detach(), weights.down_proj.values.detach()
        if weights.up_proj is not None:
            first = torch.cat([weights.up_proj.values.detach(), first], 1)
        elif config.gate_up is GateUp.STACKED:
            first = first.roll(config.intermediate_size, 1)
        elif config.gate_up is GateUp.INTERLEAVED:
            first = torch.cat([first[:, 1::2], first[:, 0::2]], 1)

        def for_each(value: float) -> Tensor:
            return torch.full((config.num_experts,), value, device=first.device)

        return PackedExperts(
            config=config,
            first=first.contiguous(),
            down=down.contiguous(),
            alpha=for_each(activation.alpha) if activation.alpha != 1.0 else None,
            beta=for_each(activation.up_offset) if activation.up_offset != 0.0 else None,
            limit=for_each(activation.limit) if activation.limit is not None else None,
        )

    def unpack(self, packed: Any, config: ExpertsConfig) -> ExpertWeights:
        first, size = packed.first, packed.config.intermediate_size
        up_proj = None
        match packed.config.gate_up:
            case GateUp.SEPARATE:
                up_proj, first = dense(first[:, :size]), first[:, size:]
            case GateUp.STACKED:
                first = first.roll(size, 1)
            case GateUp.INTERLEAVED:
                first = torch.stack([first[:, size:], first[:, :size]], 2).flatten(1, 2)
        return ExpertWeights(packed.config, dense(first), dense(packed.down), up_proj)

    def slots(self, packed: Any) -> dict[str, Tensor]:
        return {"first": packed.first, "down": packed.down}

    def run(
        self,
        packed: Any,
        batch: ExpertBatch,
        *,
        weight_on: WeightOn = WeightOn.OUTPUT,
        reduce: bool = True,
    ) -> Tensor:
        rows, ids = batch.hidden_states, batch.local_ids
        if ids.numel() == 0:
            shape = rows.shape if reduce else (*ids.shape, rows.shape[1])
            return rows.new_zeros(shape, dtype=rows.dtype if reduce else torch.float32)
        if reduce and weight_on is WeightOn.OUTPUT:
            return _call(packed, joined(batch))
        slot_weights = batch.topk_weights.reshape(-1, 1)
        each = rows.repeat_interleave(ids.shape[1], 0)  # (N, H): every slot a row of its own
        if weight_on is WeightOn.INPUT:
            each = (each * slot_weights).to(rows.dtype)
            slot_weights = torch.ones_like(slot_weights)
        found = _call(packed, ExpertBatch(each, ids.reshape(-1, 1), slot_weights))
        terms = found.view(*ids.shape, rows.shape[1]).float()
        return terms.sum(1).to(rows.dtype) if reduce else terms


def unlike(experts: ExpertsConfig) -> str | None:
    """What these experts have that the kernel has not, or None."""
    activation, function = experts.activation, experts.activation.function
    if experts.has_bias:
        return "its biases are not used here, and these experts have some"
    if experts.post_norm is not None:
        return "has no norm over an expert's output"
    if not experts.is_gated:
        is_plain = activation == Activation(function=ActivationFunction.RELU_SQUARED)
        return None if is_plain else f"runs ungated experts with relu2 alone, not {function.value}"
    if function is not ActivationFunction.SILU:
        return f"runs gated experts with silu alone, not {function.value}"
    if activation.gate_softcap is not None or activation.up_softcap is not None:
        return "has no soft caps"
    if activation.limit is not None and activation.limit_on is not LimitOn.GATE:
        return "limits the gate before the function, not after it"
    return None


def _is_too_old() -> str | None:
    """Why its sum cannot be chosen, or None."""
    if UNFUSED in inspect.signature(FLASHINFER.load().cutlass_fused_moe).parameters:
        return None
    return f"{FLASHINFER.label} adds slots in the rows' dtype: it has no {UNFUSED}"


def joined(batch: ExpertBatch) -> ExpertBatch:
    """The same sums with no expert twice in a row: weights are added up at its first slot.

    Example:
        >>> ids = torch.tensor([[3, 1, 3]], dtype=torch.int32)
        >>> found = joined(ExpertBatch(torch.ones(1, 8), ids, torch.tensor([[1.0, 2.0, 4.0]])))
        >>> found.local_ids.tolist(), found.topk_weights.tolist()
        ([[3, 1, -1]], [[5.0, 2.0, 0.0]])
    """
    ids, weights = batch.local_ids, batch.topk_weights
    is_same = ids.unsqueeze(2) == ids.unsqueeze(1)  # (M, K, K)
    totals = torch.where(is_same, weights.unsqueeze(1), 0.0).sum(2)
    is_kept = ~is_same.tril(-1).any(2)
    return replace(
        batch,
        local_ids=torch.where(is_kept, ids, -1),
        topk_weights=torch.where(is_kept, totals, 0.0),
    )


def _call(packed: PackedExperts, batch: ExpertBatch) -> Tensor:
    """(M, H) in the rows' dtype, of ids that name an expert once in a row."""
    compute: Any = torch.ops.mixtura.flashinfer if torch.compiler.is_compiling() else _compute
    out: Tensor = compute(
        batch.hidden_states.contiguous(),
        batch.local_ids.contiguous(),
        batch.topk_weights.float().contiguous(),
        packed.first,
        packed.down,
        [packed.alpha, packed.beta, packed.limit],
        packed.config.is_gated,
    )
    return out


def _compute(
    rows: Tensor,
    ids: Tensor,
    weights: Tensor,
    first: Tensor,
    down: Tensor,
    terms: list[Tensor | None],
    is_gated: bool,
) -> Tensor:
    library, out = FLASHINFER.load(), torch.empty_like(rows)
    alpha, beta, limit = terms
    library.cutlass_fused_moe(
        rows,
        ids,
        weights,
        first,
        down,
        rows.dtype,
        quant_scales=[],
        swiglu_alpha=alpha,
        swiglu_beta=beta,
        swiglu_limit=limit,
        output=out,
        activation_type=getattr(library.ActivationType, "Swiglu" if is_gated else "Relu2"),
        **{UNFUSED: False},
    )
    return out


_operator = torch.library.custom_op(
    "mixtura::flashinfer",
    _compute,
    mutates_args=(),
    schema="(Tensor rows, Tensor ids, Tensor weights, Tensor first, Tensor down, Tensor?[] terms, "
    "bool is_gated) -> Tensor",
)
"""One node of a graph of torch.compile."""


@_operator.register_fake
def _(rows: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(rows)
