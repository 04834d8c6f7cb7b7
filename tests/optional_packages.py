"""Stand-ins for packages that optional kernels call: what they document, on a CPU, and no more.

What a package leaves unwritten is NaN here, and what it checks is an assertion.
"""

from __future__ import annotations

import sys
from enum import IntEnum
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor


def module_of(name: str, **contents: Any) -> ModuleType:
    """A module that looks installed."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    vars(module).update(contents)
    return module


def install_deep_gemm(monkeypatch: pytest.MonkeyPatch, alignment: int = 4) -> list[int]:
    """DeepGEMM in its contiguous layout; -> the number of rows of every product."""
    calls: list[int] = []

    def m_grouped_bf16_gemm_nt_contiguous(a: Tensor, b: Tensor, d: Tensor, layout: Tensor) -> None:
        assert {t.dtype for t in (a, b, d)} == {torch.bfloat16}
        assert layout.dtype is torch.int32 and layout.is_contiguous()
        rows, width = a.shape
        assert d.shape == (rows, b.shape[1]) and layout.shape == (rows,) and b.shape[2] == width
        assert a.is_contiguous() and b.is_contiguous() and d.is_contiguous()
        assert width % 64 == 0 and rows % alignment == 0
        calls.append(rows)
        d.fill_(torch.nan)
        for start in range(0, rows, alignment):
            block = slice(start, start + alignment)
            experts = layout[block].tolist()
            if experts[0] >= 0:  # the first row of a block says whose it is
                is_there = [expert >= 0 for expert in experts]
                assert is_there == sorted(is_there, reverse=True)
                assert {e for e in experts if e >= 0} == {experts[0]}
                d[block][is_there] = (a[block].float() @ b[experts[0]].float().T).bfloat16()[
                    is_there
                ]
            else:
                assert set(experts) == {-1}

    package = module_of(
        "deep_gemm",
        m_grouped_bf16_gemm_nt_contiguous=m_grouped_bf16_gemm_nt_contiguous,
        get_mk_alignment_for_contiguous_layout=lambda: alignment,
    )
    monkeypatch.setitem(sys.modules, "deep_gemm", package)
    return calls


class ActivationType(IntEnum):
    """FlashInfer's numbers."""

    Swiglu = 3
    Relu2 = 6


def cutlass_fused_moe(
    input: Tensor,
    token_selected_experts: Tensor,
    token_final_scales: Tensor,
    fc1_expert_weights: Tensor,
    fc2_expert_weights: Tensor,
    output_dtype: torch.dtype,
    quant_scales: list[Tensor],
    swiglu_alpha: Tensor | None = None,
    swiglu_beta: Tensor | None = None,
    swiglu_limit: Tensor | None = None,
    output: Tensor | None = None,
    activation_type: ActivationType = ActivationType.Swiglu,
    use_fused_finalize: bool = True,
) -> list[Tensor]:
    """FlashInfer's: up rows first, ids elsewhere skipped, an expert found once in a row."""
    tensors = (input, token_selected_experts, token_final_scales)
    weights = (fc1_expert_weights, fc2_expert_weights)
    assert all(t.is_contiguous() for t in (*tensors, *weights))
    assert token_selected_experts.dtype is torch.int32
    assert token_final_scales.dtype is torch.float32
    assert {t.dtype for t in (input, *weights)} == {output_dtype}
    assert output_dtype in (torch.bfloat16, torch.float16) and output is not None
    count, hidden, inner = fc2_expert_weights.shape
    is_gated = activation_type is ActivationType.Swiglu
    assert fc1_expert_weights.shape == (count, inner * (2 if is_gated else 1), hidden)
    assert hidden % 8 == inner % 8 == 0 and not quant_scales and not use_fused_finalize
    for value in (swiglu_alpha, swiglu_beta, swiglu_limit):
        assert value is None or (value.dtype is torch.float32 and value.shape == (count,))
    for row, ids in enumerate(token_selected_experts.tolist()):
        total = torch.zeros(hidden)
        for slot, expert in enumerate(ids):
            if not 0 <= expert < count:
                continue
            if expert in ids[:slot]:
                total += torch.nan  # its place among the sorted rows was never written
                continue
            first = (input[row].float() @ fc1_expert_weights[expert].float().T).to(output_dtype)
            hidden_row = first.float().relu().square()
            if is_gated:
                up, gate = first.float().chunk(2)
                if swiglu_limit is not None:
                    limit = swiglu_limit[expert]
                    up, gate = up.clamp(-limit, limit), gate.clamp(max=limit)
                alpha = 1.0 if swiglu_alpha is None else swiglu_alpha[expert]
                beta = 0.0 if swiglu_beta is None else swiglu_beta[expert]
                hidden_row = gate * torch.sigmoid(alpha * gate) * (up + beta)
            down = fc2_expert_weights[expert].float()
            out = F.linear(hidden_row.to(output_dtype).float(), down).to(output_dtype)
            total += token_final_scales[row, slot] * out.float()
        output[row] = total.to(output_dtype)
    return [output]


def install_flashinfer(monkeypatch: pytest.MonkeyPatch, **contents: Any) -> None:
    """FlashInfer; `contents` replace what the module has."""
    found = {"cutlass_fused_moe": cutlass_fused_moe, "ActivationType": ActivationType} | contents
    kept = {name: value for name, value in found.items() if value is not None}
    part = module_of("flashinfer.fused_moe", **kept)
    package = module_of("flashinfer", fused_moe=part, __path__=[])
    modules = sys.modules
    monkeypatch.setitem(modules, "flashinfer", package)
    monkeypatch.setitem(modules, "flashinfer.fused_moe", part)
