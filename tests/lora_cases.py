"""LoRA adapters, and the dense experts that they would be merged into."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from expert_cases import dense_tensors, map_tensors, plain_experts
from torch import Tensor

from mixtura.config import ExpertsConfig, GateUp, WeightOn
from mixtura.lora import Adapters, LoraWeights, LowRank
from mixtura.types import ExpertBatch, ExpertWeights

PARTS = ("gate", "up", "down")


def random_adapter(
    config: ExpertsConfig,
    rank: int,
    *,
    parts: Sequence[str] = PARTS,
    shares_a: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> LoraWeights:
    """About as large as the weights that it adds to; expert 1 has no part in it."""
    generator = torch.Generator().manual_seed(1000 + seed)
    count, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size

    def normal(*shape: int, size: int) -> Tensor:
        value = torch.randn(shape, generator=generator) * size**-0.5
        value[1:2] = 0.0
        return value.to(dtype)

    found: dict[str, LowRank] = {}
    for name in parts:
        if name == "gate" and not config.is_gated:
            continue
        num_in, num_out = (inner, hidden) if name == "down" else (hidden, inner)
        a, b = normal(count, rank, num_in, size=num_in), normal(count, num_out, rank, size=rank)
        if name == "up" and shares_a and "gate" in found:
            a = found["gate"].a
        found[name] = LowRank(a, b)
    return LoraWeights(**found)


def mixed_adapters(config: ExpertsConfig) -> Adapters:
    """Ranks 5, 1 and 16, of every dtype, whole and not, and one that is nothing here."""
    return (
        random_adapter(config, 5, shares_a=True, seed=1),
        random_adapter(config, 1, parts=("down",), seed=2),
        None,
        random_adapter(config, 16, parts=("gate", "up"), dtype=torch.bfloat16, seed=3),
        random_adapter(config, 3, parts=("up", "down"), dtype=torch.float16, seed=4),
    )


def mixed_ids(num_rows: int, num_adapters: int, seed: int = 3) -> Tensor:
    """(M,) int32 in [-1, A), each of them where there are rows enough."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.arange(num_rows) % (num_adapters + 1) - 1
    return ids[torch.randperm(num_rows, generator=generator)].to(torch.int32)


def merged(weights: ExpertWeights, adapter: LoraWeights) -> ExpertWeights:
    """Dense experts in fp32 or fp64 with the adapter in them."""
    found = {role: tensor.clone() for role, tensor in dense_tensors(weights).items()}
    config, first = weights.config, found["gate_up_proj"]
    inner = config.intermediate_size
    gate, up = {
        GateUp.STACKED: lambda: (first[:, :inner], first[:, inner:]),
        GateUp.INTERLEAVED: lambda: (first[:, 0::2], first[:, 1::2]),
        GateUp.SEPARATE: lambda: (first, found["up_proj"]),
        GateUp.UNGATED: lambda: (None, first),
    }[config.gate_up]()
    targets = {"gate": gate, "up": up, "down": found["down_proj"]}
    for name, part in adapter.parts().items():
        targets[name] += (part.b.double() @ part.a.double()).to(first.dtype)
    return map_tensors(weights, found)


def merged_truth(
    weights: ExpertWeights,
    adapters: Adapters,
    batch: ExpertBatch,
    weight_on: WeightOn = WeightOn.OUTPUT,
) -> Tensor:
    """Each row by dense experts with its own adapter merged into them, in float64. -> (M,H)."""
    assert batch.adapter_ids is not None
    wide = map_tensors(weights, {role: t.double() for role, t in dense_tensors(weights).items()})
    rows = dataclasses.replace(batch, hidden_states=batch.hidden_states.double())
    out = plain_experts(wide, rows, weight_on)
    for number, adapter in enumerate(adapters):
        if adapter is not None:
            theirs = plain_experts(merged(wide, adapter), rows, weight_on)
            out = torch.where((batch.adapter_ids == number).unsqueeze(1), theirs, out)
    return out


def with_adapters(batch: ExpertBatch, ids: Tensor | None) -> ExpertBatch:
    """The same rows with these adapters."""
    return dataclasses.replace(batch, adapter_ids=ids)


def some_rows(batch: ExpertBatch, rows: slice) -> ExpertBatch:
    """A part of a batch, adapters too."""
    return ExpertBatch(
        batch.hidden_states[rows],
        batch.local_ids[rows],
        batch.topk_weights[rows],
        adapter_ids=None if batch.adapter_ids is None else batch.adapter_ids[rows],
    )
