"""`deterministic=True` on a Transformers model: what cannot keep it, and modules that do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS

from mixtura.errors import UnsupportedModel
from mixtura.experts import RowActivation, RowLinear
from mixtura.hf.adopt import adopt_class
from mixtura.hf.blocks import BlockPlan
from mixtura.hf.linears import PackedLinear
from mixtura.kernels.cpu.extension import missing
from mixtura.kernels.cpu.linear import cannot_pack

ACTIVATIONS = {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()}
"""Classes of Transformers' activations."""


def check_deterministic(blocks: Mapping[str, BlockPlan], others: Mapping[str, str]) -> None:
    """Refuse a model with an MoE layer whose rows may depend on the batch around them.

    Args:
        blocks: layers that are taken over whole, by path.
        others: why other MoE layers are not, by path.

    Raises:
        UnsupportedModel: every such layer, and why.
    """
    reasons = dict(others)
    for name, block in blocks.items():
        for path, linear in _shared_maps(block):
            reason = _cannot_be_row_invariant(linear)
            if reason is not None:
                reasons[f"{name}.{path}"] = reason
    if reasons:
        lines = "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())
        raise UnsupportedModel(
            f"deterministic (True) must hold for every MoE layer; got layers whose rows may depend "
            f"on the batch around them:{lines}\nRun the model without it."
        )


def set_row_modules(model: PreTrainedModel, blocks: Mapping[str, BlockPlan], is_on: bool) -> None:
    """Let linear layers and activations round every row alike, or as torch does; cannot fail.

    Linear layers of shared experts anywhere; all plain ones, and the activations, on a CPU with the
    C++ extension: elsewhere they would be loops over rows.
    """
    inside = {id(linear) for block in blocks.values() for _, linear in _shared_maps(block)}
    is_whole = missing() is None and model.device.type == "cpu"
    for module in model.modules():
        if isinstance(module, (RowLinear, RowActivation)):
            module.is_row_invariant = is_on
        elif not is_on:
            continue
        elif type(module) is nn.Linear and (is_whole or id(module) in inside):
            adopt_class(module, RowLinear)
        elif type(module) in ACTIVATIONS and is_whole:
            adopt_class(module, RowActivation)


def _shared_maps(block: BlockPlan) -> Iterator[tuple[str, nn.Module]]:
    """The linear maps of a block's shared experts and of their sigmoid gate, by path."""
    if block.spec.shared is not None:
        for name, child in block.block.get_submodule(block.spec.shared).named_children():
            if name in ("gate_proj", "up_proj", "down_proj"):
                yield f"{block.spec.shared}.{name}", child
    if block.spec.shared_gate is not None:
        yield block.spec.shared_gate, block.block.get_submodule(block.spec.shared_gate)


def _cannot_be_row_invariant(linear: nn.Module) -> str | None:
    if isinstance(linear, PackedLinear):
        reason = cannot_pack(linear.scheme)
        if reason is None and linear.device.type != "cpu":
            reason = f"it runs packed on the CPU alone, and is on {linear.device}"
        return reason
    if isinstance(linear, RowLinear) or type(linear) is nn.Linear:
        return None
    return f"{type(linear).__name__} is no plain linear layer"
