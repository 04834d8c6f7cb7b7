"""The modules of a model that adapters add to, and how each is told of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mixtura.errors import UnsupportedModel
from mixtura.experts import PackedExperts
from mixtura.hf.adopt import get_attribute, offloads
from mixtura.hf.blocks import FamilyMoE
from mixtura.hf.experts import FamilyExperts
from mixtura.hf.gate import FamilyGate
from mixtura.hf.linears import PackedLinear
from mixtura.hf.lora.rows import CHILD, LowRankMap, with_lora
from mixtura.hf.lora.selection import Selection
from mixtura.layer import FusedMoE
from mixtura.lora import Adapters

LinearTable = Mapping[int, tuple[Tensor, Tensor]]
"""A (r, in) and B (out, r) of each adapter that adds something to a linear map, by number."""


@dataclass(frozen=True, slots=True)
class Installed:
    """What a model's modules have been told.

    Attributes:
        experts: of each experts module of ours by path, by number. linears: by path.
    """

    experts: Mapping[str, Adapters]
    linears: Mapping[str, LinearTable] = field(default_factory=dict)


def experts_modules(model: nn.Module) -> dict[str, PackedExperts]:
    """The experts of a model that are ours, by path."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PackedExperts) and "observers" in module.__dict__
    }


def experts_device(module: PackedExperts) -> torch.device:
    """Where the weights of experts are, also where a kernel holds the only copy."""
    if module.given is not None:
        return module.given.device
    return module.storage["gate_up_proj"].read(module).device


def layers(model: nn.Module) -> dict[str, Any]:
    """The modules that tokens' adapters are brought to, by path: blocks, and experts alone."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (FusedMoE, FamilyExperts)) and "sources" in module.__dict__
    }


def new_selection(model: nn.Module) -> Selection:
    """A selection of none, for a model without adapters."""
    blocks = (module for module in model.modules() if isinstance(module, FusedMoE))
    is_row_invariant = any(block.moe_config.deterministic for block in blocks)
    return Selection(next(model.parameters()).device, is_row_invariant)


def layer_of(model: nn.Module, experts: str) -> str:
    """The path of the layer that an experts module is in."""
    paths = layers(model)
    return experts if experts in paths else experts.rpartition(".")[0]


def linear_module(model: nn.Module, path: str, name: str) -> nn.Module:
    """The module that an adapter of a linear map is told to: the map, or the gate that has it.

    Args:
        path: of the module that holds the weight. name: of a tensor of the adapter.

    Raises:
        UnsupportedModel: what the map gives cannot be added to, with the reason.
    """
    module: Any = model.get_submodule(path)
    block = _block_of(model, path)
    if block is not None:
        gate: FamilyGate = getattr(block, block.spec.gate)
        owner = gate.weight_path.rpartition(".")[0]
        if module is (get_attribute(gate, owner) if owner else gate):
            return gate
    around, _, leaf = path.rpartition(".")
    reason = _refusal(module, block)
    if leaf == "out_proj" and _is_state_space(model.get_submodule(around)):
        reason = "kernels of state-space mixers read its weight and do not call it"
    if reason is not None:
        raise UnsupportedModel(
            f"{name} must be of a map that adapters can add to; got {path}: {reason}. Train "
            f"without it, or merge the adapter into the model with PEFT."
        )
    found: nn.Module = module
    return found


def _is_state_space(mixer: nn.Module) -> bool:
    """Whether a module is Mamba's, by its parameters."""
    return hasattr(mixer, "A_log") and hasattr(mixer, "D")


def _block_of(model: nn.Module, path: str) -> FamilyMoE | None:
    """The block of ours that a module is in."""
    parts = path.split(".")
    around = (model.get_submodule(".".join(parts[:count])) for count in range(1, len(parts)))
    return next((module for module in around if isinstance(module, FamilyMoE)), None)


def _refusal(module: nn.Module, block: FamilyMoE | None) -> str | None:
    """Why what a module gives cannot be added to, or None."""
    if not isinstance(module, nn.Linear):
        return f"its weight is of a {type(module).__name__}, which is no linear layer of ours"
    if offloads(module):
        return "its weights are offloaded"
    if block is None:
        return None
    spec = block.spec
    paths = [path for path in (spec.shared, spec.shared_gate) if path is not None]
    if not any(module in block.get_submodule(path).modules() for path in paths):
        return f"{type(block).__name__} does not call it"
    return None


def check_copy(module: nn.Module, path: str, copy: Tensor) -> None:
    """See that a weight which an adapter brings along is the one that the model has.

    Raises:
        UnsupportedModel: it is another, or the model's is packed and cannot be compared.
    """
    own = None if isinstance(module, PackedLinear) else getattr(module, "weight", None)
    if own is None or own.shape != copy.shape or not torch.equal(own.cpu(), copy.to(own.dtype)):
        got = "a packed one there" if isinstance(module, PackedLinear) else "another one there"
        raise UnsupportedModel(
            f"{path}.base_layer.weight of an adapter must be the model's own weight, as that "
            f"stays; got {got}. Save the adapter with save_embedding_layers=False."
        )


def install(model: nn.Module, told: Installed, selection: Selection) -> None:
    """Tell every module what adapters add to it, in place of what it was told before."""
    with torch.inference_mode(False):  # tensors of inference mode could not be trained past
        for path, module in experts_modules(model).items():
            module.set_lora(told.experts.get(path, ()))
        before = {name.rpartition(".")[0] for name, _ in adapted(model)}
        for path in sorted(before | told.linears.keys()):
            _put(model.get_submodule(path), told.linears.get(path, {}), selection)
    for layer in layers(model).values():
        others = tuple(source for source in layer.sources if source != selection.source)
        is_adapted = any(told.experts.values())
        layer.sources = (*others, selection.source) if is_adapted else others


def adapted(model: nn.Module) -> list[tuple[str, LowRankMap]]:
    """What adapters add to linear maps, by the path of the child that holds it."""
    return [(name, one) for name, one in model.named_modules() if isinstance(one, LowRankMap)]


def linear_tables(model: nn.Module) -> dict[str, LinearTable]:
    """What the linear maps have been told, by path."""
    return {name.rpartition(".")[0]: one.factors() for name, one in adapted(model)}


def _put(module: Any, factors: LinearTable, selection: Selection) -> None:
    old = getattr(module, CHILD, None)
    if old is not None:
        delattr(module, CHILD)
        if old.handle is not None:
            old.handle.remove()
    new = LowRankMap(factors, selection, _device_of(module)) if factors else None
    if new is not None:
        module.add_module(CHILD, new)
    if isinstance(module, FamilyGate):
        module.gate_plan = with_lora(module.gate_plan, new)
    elif new is not None:
        new.handle = module.register_forward_hook(new.add, with_kwargs=True)


def _device_of(module: Any) -> torch.device:
    if isinstance(module, PackedLinear):
        return module.device
    weight: Tensor = get_attribute(module, getattr(module, "weight_path", "weight"))
    return weight.device
