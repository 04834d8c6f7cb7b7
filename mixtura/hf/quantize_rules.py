"""By which rule a tensor of a dense checkpoint is quantized, or stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mixtura.config import GatePrecision, RunnerConfig
from mixtura.errors import UnsupportedModel
from mixtura.experts import ExpertsOptions
from mixtura.hf.blocks import BlockOptions, BlockPlan
from mixtura.hf.convert import plan_layers, survey
from mixtura.hf.experts import ExpertsPlan
from mixtura.hf.linears import ATTENTION, PROJECTIONS, find_linears


class Rule(Enum):
    """Why a tensor is quantized or stays as it is."""

    ROUTED_EXPERTS = "routed-experts"
    ATTENTION = "attention-projections"
    ROUTER = "router"
    SHARED_EXPERTS = "shared-experts"
    EMBEDDING = "embedding"
    HEAD = "output-head"
    VECTORS = "norms-and-biases"
    OTHERS = "other-layers"
    UNUSED = "not-in-the-model"


@dataclass(frozen=True, slots=True)
class ModelLayers:
    """What of a model rules speak of.

    Attributes:
        empty: the model, on the meta device.
        blocks, alone: MoE layers that are ours as a whole, and experts modules, by path.
        linears: attention projections that are to be quantized, by path.
        head: path of the output head; None where there is none.
    """

    empty: PreTrainedModel
    blocks: Mapping[str, BlockPlan]
    alone: Mapping[str, ExpertsPlan]
    linears: Mapping[str, nn.Linear]
    head: str | None

    @property
    def experts(self) -> dict[str, ExpertsPlan]:
        """Plans of experts modules by path."""
        return {
            name if block.spec.experts is None else f"{name}.{block.spec.experts}": block.experts
            for name, block in self.blocks.items()
        } | dict(self.alone)


def find_layers(empty: PreTrainedModel, packs_linears: bool) -> ModelLayers:
    """The layers of a model on the meta device; linear layers only where they are to be quantized.

    Raises:
        UnsupportedModel: there are no experts that mixtura runs, or none of those linear layers.
    """
    options = BlockOptions(experts=ExpertsOptions(), runner=RunnerConfig(), gate=GatePrecision.FP32)
    blocks, alone, reasons = plan_layers(empty, options)
    if not blocks and not alone:
        first = next((f" {name}: {reason}" for name, reason in reasons.items()), "")
        raise UnsupportedModel(
            f"the model ({type(empty).__name__}) must have experts that mixtura runs to be "
            f"quantized; got none.{first} Use a model of a family that docs/families.md lists."
        )
    linears: dict[str, nn.Linear] = {}
    if packs_linears:
        kinds = dict.fromkeys(blocks, "block") | dict.fromkeys(alone, "experts")
        names = [layer.name for layer in survey(empty, kinds, reasons)]
        head = empty.get_output_embeddings()
        found = find_linears(empty, names)
        linears = {name: module for name, module in found.items() if module is not head}
    return ModelLayers(empty, blocks, alone, linears, _head_of(empty))


def rule_of(target: str | None, num_dims: int, layers: ModelLayers) -> Rule:
    """Why a tensor stays as it is.

    Args:
        target: the model's tensor that it goes into; None where it goes nowhere.
        num_dims: of the tensor.
    """
    if target is None:
        return Rule.UNUSED
    embeddings: Any = layers.empty.get_input_embeddings()
    module, _, _ = target.rpartition(".")
    if module and layers.empty.get_submodule(module) is embeddings:
        return Rule.EMBEDDING
    if module == layers.head:
        return Rule.HEAD
    inside = _rule_in_block(target, layers)
    if inside is not None:
        return inside
    if num_dims < 2:
        return Rule.VECTORS
    path, _, last = module.rpartition(".")
    return Rule.ATTENTION if last in PROJECTIONS and ATTENTION.search(path) else Rule.OTHERS


def _rule_in_block(target: str, layers: ModelLayers) -> Rule | None:
    """The rule for a tensor of an MoE layer; None for one that is in none, or is no part of it."""
    for name, block in layers.blocks.items():
        if not target.startswith(f"{name}."):
            continue
        rest = target.removeprefix(f"{name}.")
        spec = block.spec
        parts_of = {
            Rule.SHARED_EXPERTS: (spec.shared, spec.shared_gate),
            Rule.ROUTER: (spec.gate, spec.gate_argument),
        }
        for rule, paths in parts_of.items():
            if any(path and f"{rest}.".startswith(f"{path}.") for path in paths):
                return rule
    for name in layers.alone:
        owner, _, _ = name.rpartition(".")
        parts = target.removeprefix(f"{owner}.").split(".")
        if target.startswith(f"{owner}.") and not target.startswith(f"{name}."):
            if any("shared" in part for part in parts):
                return Rule.SHARED_EXPERTS
            if parts[0] in ("gate", "router"):
                return Rule.ROUTER
    return None


def _head_of(empty: PreTrainedModel) -> str | None:
    head = empty.get_output_embeddings()
    if head is None:
        return None
    return next((name for name, module in empty.named_modules() if module is head), None)
