"""Kernels for tests that a CUDA graph can hold, on any device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mixtura.config import WeightOn
from mixtura.kernels import register_kernel, unregister_kernel
from mixtura.kernels.contract import sum_dtype
from mixtura.kernels.torch import TorchKernel
from mixtura.kernels.torch.experts import run_experts
from mixtura.quant.matrix import QuantizedMatrix
from mixtura.types import ExpertBatch, ExpertWeights


@dataclass(frozen=True)
class _Gathered:
    """A linear map of each row's own expert."""

    expert: Tensor

    def __call__(self, x: Tensor, weight: QuantizedMatrix, bias: Tensor | None) -> Tensor:
        out = (weight.values[self.expert] @ x.unsqueeze(2)).squeeze(2)
        return out if bias is None else out + bias[self.expert]


class GatheringKernel(TorchKernel):
    """Every slot with a copy of its expert's matrices: wasteful, and never waits for the host."""

    name: ClassVar[str] = "gathering"
    is_capturable: ClassVar[bool] = True

    def run(
        self,
        packed: Any,
        batch: ExpertBatch,
        *,
        weight_on: WeightOn = WeightOn.OUTPUT,
        reduce: bool = True,
    ) -> Tensor:
        num_rows, top_k = batch.local_ids.shape
        dtype = sum_dtype(batch.hidden_states.dtype)
        expert = batch.local_ids.reshape(-1).clamp(min=0).long()
        weights = batch.topk_weights.reshape(-1, 1).to(dtype)
        x = batch.hidden_states.repeat_interleave(top_k, 0)
        if weight_on is WeightOn.INPUT:
            x = (x * weights).to(x.dtype)
        out = run_experts(packed, x, _Gathered(expert), lambda scales: scales[expert]).to(dtype)
        if weight_on is WeightOn.OUTPUT:
            out = out * weights
        out = torch.where((batch.local_ids >= 0).reshape(-1, 1), out, 0.0)
        terms = out.view(num_rows, top_k, out.shape[1])
        return terms.sum(1).to(batch.hidden_states.dtype) if reduce else terms


class PackingKernel(GatheringKernel):
    """The same with a layout of its own."""

    name: ClassVar[str] = "packing"

    def shares_memory(self, is_quantized: bool) -> bool:
        return False

    def pack(self, weights: ExpertWeights, activation_dtype: Any = None) -> ExpertWeights:
        return weights.mapped(torch.clone)


@contextmanager
def graph_kernels() -> Iterator[None]:
    """A context in which `kernel="gathering"` and `kernel="packing"` are known."""
    for kernel in (GatheringKernel, PackingKernel):
        register_kernel(kernel.name, kernel)
    try:
        yield
    finally:
        for kernel in (GatheringKernel, PackingKernel):
            unregister_kernel(kernel.name)
