"""The experts implementations of Transformers, which read dense weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from mixtura.bench.cases import Case
from mixtura.bench.contenders import STACKS, Contender, Layer, RunBatch
from mixtura.bench.machine import available_memory
from mixtura.config import SWIGLU_OAI, ExpertsConfig, GateUp
from mixtura.experts.storage import default_storage, tensor_of
from mixtura.quant.formats import WeightFormat
from mixtura.types import ExpertBatch

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
"""Those that run on any device."""

COMPILED = "batched_mm-compiled"
"""batched_mm under `torch.compile`, which needs no copy; its first call takes a while."""

COMPILED_TOKENS = 16
"""Compiled, it is for few tokens: at 16 it was slower than the others (13 against 10 times)."""

MEMORY_SHARE = 0.5
"""It may take this much of the free memory for copies of weights."""


@dataclass(frozen=True)
class TransformersContender(Contender):
    """An experts implementation of Transformers, on a module with the same arithmetic.

    Quantized experts are dequantized first: Transformers has no kernel for them on CPUs.
    """

    name: str
    is_ours: bool = False

    def refusal(self, case: Case) -> str | None:
        if _module_class(case.shape.experts) is None:
            return "Transformers has no module for these experts here"
        if self.name == COMPILED:
            is_small = case.num_tokens <= COMPILED_TOKENS
            return None if is_small else f"is for at most {COMPILED_TOKENS} tokens"
        # It copies the first projection of every slot's expert: two thirds of a gated expert.
        copied = case.num_slots * self.expert_bytes(case) * 2 // 3
        if self.name == "batched_mm" and copied > MEMORY_SHARE * available_memory():
            return f"copies {copied / 1e9:.0f} GB of weights"
        return None

    def weights(self, case: Case) -> str:
        names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
        return names[case.dtype]

    def expert_bytes(self, case: Case) -> int:
        return case.shape.expert_bytes(WeightFormat.parse(self.weights(case)).scheme)

    def holds(self, case: Case) -> str:
        return "dense" if case.weights.scheme.is_quantized else STACKS

    def bind(self, layer: Layer) -> RunBatch:
        config = layer.case.shape.experts
        experts = _build(config, self.name.removesuffix("-compiled"))
        for role, stored in default_storage(config).items():
            tensor = tensor_of(layer.dense_stacks, role)
            is_turned = stored.is_transposed and tensor.ndim == 3
            tensor = tensor.transpose(1, 2) if is_turned else tensor
            setattr(experts, stored.path, nn.Parameter(tensor, requires_grad=False))
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
        """The batch as a Transformers router gives it: int64 ids, weights in the rows' dtype."""
        return ExpertBatch(
            batch.hidden_states,
            batch.local_ids.long(),
            batch.topk_weights.to(batch.hidden_states.dtype),
        )


def _build(config: ExpertsConfig, implementation: str) -> nn.Module:
    """The module without memory for its weights."""
    build = _module_class(config)
    assert build is not None
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


def _module_class(config: ExpertsConfig) -> Callable[[SimpleNamespace], nn.Module] | None:
    plain = ExpertsConfig(
        num_experts=config.num_experts,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
    )
    if config == plain:
        return Qwen3MoeExperts  # type: ignore[no-any-return]
    is_gpt_oss = (config.gate_up, config.is_transposed, config.has_bias, config.activation) == (
        GateUp.INTERLEAVED,
        True,
        True,
        SWIGLU_OAI,
    )
    return GptOssExperts if is_gpt_oss else None
