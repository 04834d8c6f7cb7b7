"""What is compared: our kernels and the experts implementations of Transformers, same weights."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from mixtura.bench.cases import Case, WeightSet
from mixtura.config import SWIGLU_OAI, ExpertsConfig, GateUp
from mixtura.errors import ConfigError
from mixtura.experts import ExpertsOptions, RoutedExperts
from mixtura.kernels import get_kernel, kernel_names
from mixtura.types import ExpertBatch

RunBatch = Callable[[ExpertBatch], Tensor]
"""(M,H) rows with ids and weights -> (M,H)."""

MEMORY_SHARE = 0.5
"""A contender may take this much of the free memory for copies of its own."""


class Contender(ABC):
    """A way to run the experts of a layer.

    Attributes:
        name: what the results call it.
        is_ours: it is one of our kernels, not what they are measured against.
    """

    name: str
    is_ours: bool

    @abstractmethod
    def refusal(self, case: Case) -> str | None:
        """Why it is not run on a case, or None."""

    @abstractmethod
    def bind(self, config: ExpertsConfig, weights: WeightSet) -> RunBatch:
        """The function that runs one layer with these weights."""

    def prepare(self, batch: ExpertBatch) -> ExpertBatch:
        """The batch with the dtypes in which this contender is given it in practice."""
        return batch


@dataclass(frozen=True)
class KernelContender(Contender):
    """`RoutedExperts` with one of our kernels, by name."""

    name: str
    is_ours: bool = True

    def refusal(self, case: Case) -> str | None:
        if self.name == "reference" and case.flops > 2**30:
            return "a loop over rows, too slow for this size"
        return None

    def bind(self, config: ExpertsConfig, weights: WeightSet) -> RunBatch:
        experts = RoutedExperts(config, options=ExpertsOptions(kernel=self.name), device="meta")
        own = not get_kernel(self.name).shares_memory  # it frees what it packs
        for name, tensor in weights.items():
            setattr(experts, name, nn.Parameter(tensor.clone() if own else tensor))
        return experts.run_batch


@dataclass(frozen=True)
class TransformersContender(Contender):
    """An experts implementation of Transformers, on a module with the same arithmetic."""

    name: str
    is_ours: bool = False

    def refusal(self, case: Case) -> str | None:
        if _module_class(case.shape.experts) is None:
            return "Transformers has no module for these experts here"
        # It copies the first projection of every slot's expert: two thirds of a gated expert.
        copied = case.num_slots * case.expert_bytes * 2 // 3
        if self.name == "batched_mm" and copied > MEMORY_SHARE * free_memory():
            return f"copies {copied / 1e9:.0f} GB of weights"
        return None

    def bind(self, config: ExpertsConfig, weights: WeightSet) -> RunBatch:
        build = _module_class(config)
        assert build is not None
        hf_config = SimpleNamespace(
            _experts_implementation=self.name,
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
            experts = build(hf_config)
        for name, tensor in weights.items():
            setattr(experts, name, nn.Parameter(tensor))

        def run_batch(batch: ExpertBatch) -> Tensor:
            out = experts(batch.hidden_states, batch.local_ids, batch.topk_weights)
            assert isinstance(out, Tensor)
            return out

        return run_batch

    def prepare(self, batch: ExpertBatch) -> ExpertBatch:
        """The batch as a Transformers router gives it: int64 ids, weights in the rows' dtype."""
        return ExpertBatch(
            batch.hidden_states,
            batch.local_ids.long(),
            batch.topk_weights.to(batch.hidden_states.dtype),
        )


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


def free_memory() -> int:
    """Bytes of memory free now, without what the system could take back from its caches."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


TRANSFORMERS = ("eager", "batched_mm", "grouped_mm")
"""The experts implementations of Transformers that run on any device."""


def find_contenders(names: list[str]) -> list[Contender]:
    """Contenders by name, in the order given; the error lists the names."""
    found: list[Contender] = []
    for name in names:
        if name in TRANSFORMERS:
            found.append(TransformersContender(name))
        elif name in kernel_names():
            found.append(KernelContender(name))
        else:
            choices = ", ".join((*kernel_names(), *TRANSFORMERS))
            raise ConfigError(
                f"contender ({name!r}) must be one of {choices}; got an unknown name. "
                "Use one of these."
            )
    return found
