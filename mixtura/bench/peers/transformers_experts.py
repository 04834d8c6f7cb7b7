"""The experts implementations of Transformers, which read dense weights but for fp8 on a GPU.

Transformers is imported when a contender is first asked about a case: peers are optional.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mixtura.bench.cases import Case
from mixtura.bench.contenders import STACKS, Contender, Layer, RunBatch
from mixtura.bench.machine import free_bytes
from mixtura.bench.peers import transformers_fp8
from mixtura.config import SWIGLU_OAI, ActivationDtype, ExpertsConfig, GateUp
from mixtura.experts.storage import default_storage, tensor_of
from mixtura.quant.formats import WeightFormat
from mixtura.types import ExpertBatch

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
"""Those that run on any device."""

HUB_KERNELS = ("sonicmoe", "deepgemm")
"""Those that run a kernel which the package `kernels` fetches, on GPUs alone."""

COMPILED = "batched_mm-compiled"
"""batched_mm under `torch.compile`, which needs no copy; its first call takes a while."""

COMPILED_TOKENS = 16
"""Compiled, it is for few tokens: at 16 it was slower than the others (13 against 10 times)."""

MODULES = {
    "Qwen3MoeExperts": "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "GptOssExperts": "transformers.models.gpt_oss.modeling_gpt_oss",
}
"""Where the modules are."""

MEMORY_SHARE = 0.5
"""It may take this much of the free memory for copies of weights."""


@dataclass(frozen=True)
class TransformersContender(Contender):
    """An experts implementation of Transformers, on a module with the same arithmetic.

    Quantized experts are dequantized first on a CPU, for which Transformers has no kernel; on a GPU
    they are read as they are, or not at all.
    """

    name: str
    is_ours: bool = False

    def refusal(self, case: Case) -> str | None:
        if _reads_codes(case):
            return transformers_fp8.refusal(self.name, case)
        name = _module_name(case.shape.experts)
        if name is None:
            return "Transformers has no module for these experts here"
        try:
            importlib.import_module(MODULES[name])
        except ImportError as error:
            return f"Transformers cannot be imported: {error}"
        if self.name in HUB_KERNELS and (reason := _no_hub_kernel(case.device)):
            return reason
        if self.name == COMPILED:
            is_small = case.num_tokens <= COMPILED_TOKENS
            return None if is_small else f"is for at most {COMPILED_TOKENS} tokens"
        # It copies the first projection of every slot's expert: two thirds of a gated expert.
        copied = case.num_slots * self.expert_bytes(case) * 2 // 3
        if self.name == "batched_mm" and copied > MEMORY_SHARE * free_bytes(case.device):
            return f"copies {copied / 1e9:.0f} GB of weights"
        return None

    def weights(self, case: Case) -> str:
        if _reads_codes(case):
            return case.weights.value
        names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
        return names[case.dtype]

    def expert_bytes(self, case: Case) -> int:
        return case.shape.expert_bytes(WeightFormat.parse(self.weights(case)).scheme)

    def holds(self, case: Case) -> str:
        is_copy = case.weights.scheme.is_quantized and not _reads_codes(case)
        return "dense" if is_copy else STACKS

    def rounds_to(self, case: Case) -> ActivationDtype | None:
        return ActivationDtype.FP8 if _reads_codes(case) else None

    def bind(self, layer: Layer) -> RunBatch:
        name = self.name.removesuffix("-compiled")
        is_fp8 = _reads_codes(layer.case)
        experts: Any = transformers_fp8.bind(name, layer) if is_fp8 else _bind_dense(name, layer)
        if layer.case.shape.routing.no_compute is not None:
            experts._is_expert_parallel = True  # then ids may be those of no expert
        run: Any = experts
        if self.name == COMPILED:
            if layer.number == 0:
                torch.compiler.reset()  # after eight shapes it would run uncompiled without a word
            run = torch.compile(experts, dynamic=False)

        def run_batch(batch: ExpertBatch) -> Tensor:
            out = run(batch.hidden_states, batch.local_ids, batch.topk_weights)
            assert isinstance(out, Tensor)
            return out

        return run_batch

    def prepare(self, case: Case, batch: ExpertBatch) -> ExpertBatch:
        """The batch as a Transformers router gives it: int64 ids, weights in the rows' dtype.

        No expert is id E there.
        """
        ids = batch.local_ids.long()
        if case.shape.routing.no_compute is not None:
            ids = torch.where(ids < 0, case.shape.experts.num_experts, ids)
        weights = batch.topk_weights.to(batch.hidden_states.dtype)
        return ExpertBatch(batch.hidden_states, ids, weights)


def _reads_codes(case: Case) -> bool:
    """Whether quantized weights are to be read as they are."""
    return case.device != "cpu" and case.weights.scheme.is_quantized


def _bind_dense(implementation: str, layer: Layer) -> nn.Module:
    """The module on the dense weights of a layer, which it shares."""
    config = layer.case.shape.experts
    experts = _build(config, implementation)
    for role, stored in default_storage(config).items():
        tensor = tensor_of(layer.dense_stacks, role)
        is_turned = stored.is_transposed and tensor.ndim == 3
        tensor = tensor.transpose(1, 2) if is_turned else tensor
        setattr(experts, stored.path, nn.Parameter(tensor, requires_grad=False))
    return experts


def _build(config: ExpertsConfig, implementation: str) -> nn.Module:
    """The module without memory for its weights."""
    name = _module_name(config)
    assert name is not None
    build: Callable[[SimpleNamespace], nn.Module]
    build = getattr(importlib.import_module(MODULES[name]), name)
    hf_config = SimpleNamespace(
        _experts_implementation=implementation,
        num_experts=config.num_experts,
        num_local_experts=config.num_experts,
        hidden_size=config.hidden_size,
        moe_intermediate_size=config.intermediate_size,
        intermediate_size=config.intermediate_size,
        hidden_act="silu",
        swiglu_alpha=config.activation.alpha,
        swiglu_limit=config.activation.limit,
    )
    with torch.device("meta"):
        return build(hf_config)


def _no_hub_kernel(device: str) -> str | None:
    """Why a kernel of the hub cannot be fetched and run, or None."""
    if device != "cuda":
        return "is for GPUs"
    return None if importlib.util.find_spec("kernels") else "the package kernels is not installed"


def _module_name(config: ExpertsConfig) -> str | None:
    """The module with this arithmetic."""
    plain = ExpertsConfig(
        num_experts=config.num_experts,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
    )
    if config == plain:
        return "Qwen3MoeExperts"
    is_gpt_oss = (config.gate_up, config.is_transposed, config.has_bias, config.activation) == (
        GateUp.INTERLEAVED,
        True,
        True,
        SWIGLU_OAI,
    )
    return "GptOssExperts" if is_gpt_oss else None
