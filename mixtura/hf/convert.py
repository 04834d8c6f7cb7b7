"""`convert`: every MoE layer of a Transformers model becomes ours, or is named with the reason."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Unpack

from torch import nn
from transformers import PreTrainedModel

from mixtura.config import ActivationDtype, GatePrecision
from mixtura.errors import UnsupportedModel
from mixtura.experts import ExpertsOptions
from mixtura.hf.adopt import layer_index
from mixtura.hf.attention import use_attention
from mixtura.hf.balance import balance_experts
from mixtura.hf.blocks import (
    BlockOptions,
    BlockPlan,
    FamilyMoE,
    block_spec,
    plan_alone,
    plan_block,
)
from mixtura.hf.determinism import check_deterministic, set_row_modules
from mixtura.hf.experts import ExpertsPlan, FamilyExperts
from mixtura.hf.linears import set_activation_dtype
from mixtura.hf.lora.selection import check_no_adapters
from mixtura.hf.parallel import (
    Running,
    RunOptions,
    create_ranks,
    find_ranks,
    layer_values,
    transport_of,
    watch_steps,
)
from mixtura.kernels import get_kernel
from mixtura.layer import FusedMoE
from mixtura.parallel import agree
from mixtura.plugin import NAME
from mixtura.routing import CustomRouting
from mixtura.routing.custom import find_custom

NOT_TAKEN_OVER: dict[str, str] = {
    "JetMoeMoA": "its experts are attention projections, not feed-forward networks",
    "DogeCDMoE": "an expert is one neuron chosen by product keys",
    "NllbMoeSparseMLP": "experts have a capacity and drop tokens (encoder-decoder)",
    "SwitchTransformersSparseMLP": "experts have a capacity and drop tokens (encoder-decoder)",
    "VitPoseNaiveMoe": "the expert is chosen by data set, not routed",
}
"""Classes of Transformers that are mixtures of something, and why they stay as they are."""

Plans = tuple[dict[str, BlockPlan], dict[str, ExpertsPlan], dict[str, str], str | None]
"""Blocks, experts and reasons by module path, as of `plan_layers`; and what stays, in words."""

EXPERTS_ONLY = "only its experts are ours"


@dataclass(frozen=True, slots=True)
class TakenOver:
    """One MoE layer of a model.

    Attributes:
        name: the module's path.
        kind: "block" (gate, router, experts and shared experts are ours), "experts" (only the
            experts are), or "none".
        reason: why it is not ours, or not wholly.
    """

    name: str
    kind: str
    reason: str | None = None


def convert(
    model: PreTrainedModel,
    *,
    kernel: str | None = None,
    strict: bool = False,
    gate: GatePrecision | str = GatePrecision.FP32,
    deterministic: bool = False,
    activation_dtype: ActivationDtype | str | None = None,
    debug: bool = False,
    router: CustomRouting | str | None = None,
    **running: Unpack[Running],
) -> PreTrainedModel:
    """Take over the MoE layers of a model, in place and without moving a weight.

    Known blocks are taken over whole; of other families with Transformers' experts interface, the
    experts. Every layer is read before the first is changed: an error leaves the model as it was.

    Args:
        model: any Transformers model.
        kernel: insist on an experts kernel by name.
        strict: an error where a layer stays as it was, where a known block cannot be taken over
            whole, or where the preferred kernel cannot run.
        gate: of blocks taken over whole, "fp32", or "native" for each family's own arithmetic.
        deterministic: bitwise the same row whatever else is in the batch, from every MoE layer
            on; see docs/determinism.md.
        activation_dtype: "int8", "fp8" or "bf16", the arithmetic with quantized experts and packed
            linear layers; None leaves it to the checkpoint's activation scales, and else to the
            kernel.
        debug: check logits and ids on every call.
        router: a function of (router_logits, top_k), or the name of a plug-in that is one, chooses
            and weighs in place of every family's rule; the rule's scale, and what its weights
            multiply, stay. Every MoE layer must then be one that is taken over whole.
        running: see `Running`. With `parallel` every rank keeps its part of the experts and lets
            go of the rest, which it had in memory until then: `from_pretrained` reads only the
            part. A model that was loaded so needs no `parallel` here.

    Returns:
        The same model.

    Raises:
        ConfigError: an argument is none of its choices, or config.json asks for the impossible.
        UnsupportedModel: there is no MoE layer; with `strict`, one that is not ours; with
            `deterministic`, one whose rows may depend on the batch.
        InputError: adapters are loaded.
        NoKernelFits: none can run the experts, or not the one insisted on.
        ParallelError: ranks differ in what they would run; the message names the value.
    """
    check_no_adapters(model)
    if kernel is not None:
        get_kernel(kernel)
    run = RunOptions(**running)
    loaded = find_ranks(model)
    ranks = loaded if run.parallel is None else create_ranks(run.parallel, run.overlap_min_tokens)
    options = BlockOptions(
        experts=ExpertsOptions(
            kernel=kernel,
            strict=strict,
            deterministic=deterministic,
            activation_dtype=None
            if activation_dtype is None
            else ActivationDtype.parse(activation_dtype),
            debug=debug,
        ),
        runner=run.runner(ranks),
        gate=GatePrecision.parse(gate),
        ranks=ranks,
        router=None if router is None else find_custom(router),
    )

    def read() -> tuple[Mapping[str, Any], Plans]:
        blocks, experts, reasons = plan_layers(model, options)
        kinds = dict.fromkeys(blocks, "block") | dict.fromkeys(experts, "experts")
        layers = survey(model, kinds, reasons)
        left = check_left(model, layers, strict=strict)
        if options.router is not None:
            check_routed(layers)
        if deterministic:
            check_deterministic(blocks, not_whole(layers))
        found = {name: block.experts for name, block in blocks.items()} | experts
        decisions = {name: plan.decide() for name, plan in found.items()}
        values = layer_values(model, options, found, decisions) if ranks is not None else {}
        return values, (blocks, experts, reasons, left)

    blocks, experts, reasons, left = agree(transport_of(ranks), read)
    for block in blocks.values():
        block.adopt()
    set_row_modules(model, blocks, deterministic)
    for plan in experts.values():
        plan.adopt(FamilyExperts)
    if experts:
        _pin(model.get_submodule(name) for name in reasons)
        model.set_experts_implementation(NAME)
    set_activation_dtype(model, options.experts.activation_dtype)
    use_attention(model, deterministic=deterministic)
    if ranks is not None:
        watch_steps(model, ranks, [*blocks, *experts])
        balance_experts(model, [*blocks, *experts])
    if left is not None:
        warnings.warn(left, UnconvertedLayerWarning, stacklevel=2)
    return model


def plan_layers(
    model: nn.Module, options: BlockOptions
) -> tuple[dict[str, BlockPlan], dict[str, ExpertsPlan], dict[str, str]]:
    """What can be taken over by module path, blocks and experts; and why the rest cannot."""
    owner = config_owners(model)
    blocks: dict[str, BlockPlan] = {}
    experts: dict[str, ExpertsPlan] = {}
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        if _is_inside(name, blocks):
            continue
        spec = block_spec(module)
        try:
            if spec is not None:
                layer = layer_index(name)
                blocks[name] = plan_block(module, spec, owner[name], layer, options)
            elif is_decorated(module):
                experts[name] = plan_alone(module, owner[name], options)
        except UnsupportedModel as error:
            reasons[name] = str(error)
    return blocks, experts, reasons


def _pin(modules: Iterable[Any]) -> None:
    """Let experts that cannot be ours keep the implementation that they have now."""
    for module in modules:
        if is_decorated(module):
            module.config = copy.copy(module.config)


def _is_inside(name: str, outer: Iterable[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in outer)


def moe_layers(model: nn.Module) -> list[TakenOver]:
    """Every MoE layer of a model, ours or not, in the order of the model's modules."""
    kinds: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, FusedMoE):
            kinds[name] = "block"
        elif is_decorated(module):
            if module.config._experts_implementation == NAME:
                kinds[name] = "experts"
            elif isinstance(module, FamilyExperts):
                reasons[name] = "another experts implementation has been set"
    return survey(model, kinds, reasons)


def survey(
    model: nn.Module, kinds: Mapping[str, str], reasons: Mapping[str, str]
) -> list[TakenOver]:
    """The MoE layers, given which modules are taken over how, and why others are not."""
    found: list[TakenOver] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        if _is_inside(name, inside):
            continue
        kind = kinds.get(name)
        if kind is None and any(_is_inside(other, (name,)) for other in kinds):
            continue  # only its experts are ours, and they come next
        if kind == "block":
            found.append(TakenOver(name, kind))
        elif kind is not None:
            found.append(TakenOver(name, kind, reasons.get(_parent(name), EXPERTS_ONLY)))
        elif is_decorated(module) or block_spec(module) is not None or _not_taken(module):
            reason = reasons.get(name) or _not_taken(module) or "it has not been converted"
            found.append(TakenOver(name, "none", reason))
        else:
            continue
        inside.append(name)
    return found


def not_whole(layers: list[TakenOver]) -> dict[str, str]:
    """The MoE layers that are not ours as a whole, by path, and why."""
    return {layer.name: str(layer.reason) for layer in layers if layer.kind != "block"}


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _not_taken(module: nn.Module) -> str | None:
    names = [cls.__name__ for cls in type(module).__mro__]
    return next((NOT_TAKEN_OVER[name] for name in names if name in NOT_TAKEN_OVER), None)


def is_decorated(module: nn.Module) -> bool:
    """Whether a module carries Transformers' experts interface."""
    return hasattr(type(module), "_apply_gate") and hasattr(module, "is_concatenated")


def config_owners(model: nn.Module) -> dict[str, Any]:
    """For every module, the configuration of the innermost Transformers model around it."""
    owners: dict[str, Any] = {}
    for name, module in model.named_modules():
        config = module.config if isinstance(module, PreTrainedModel) else None
        owners[name] = config if config is not None else owners.get(_parent(name))
    return owners


def check_routed(layers: list[TakenOver]) -> None:
    """Raise `UnsupportedModel` where a router of the caller's cannot choose for every layer."""
    others = [layer for layer in layers if layer.kind != "block"]
    if others:
        raise UnsupportedModel(
            f"every MoE layer must be taken over whole for router=; got {others[0].name}: "
            f"{others[0].reason}. Drop router, or take another model."
        )


def check_left(model: nn.Module, layers: list[TakenOver], *, strict: bool) -> str | None:
    """Which layers stay as they are, wholly or against the table, and why; None where none does.

    Raises:
        UnsupportedModel: all stay wholly; with `strict`, any stays.
    """
    left = [layer for layer in layers if layer.reason not in (None, EXPERTS_ONLY)]
    if all(layer.kind == "none" for layer in layers):
        detail = f" {left[0].name}: {left[0].reason}." if left else ""
        raise UnsupportedModel(
            f"the model ({type(model).__name__}) must have an MoE layer that mixtura can take "
            f"over; got none.{detail} Load it with Transformers alone."
        )
    if not left:
        return None
    lines = "".join(f"\n  {layer.name}: {layer.reason}" for layer in left)
    message = f"these MoE layers stay with Transformers, or all but their experts do:{lines}"
    if strict:
        raise UnsupportedModel(
            f"every MoE layer must be taken over under strict=True; got others: {message}\n"
            f"Drop strict to run them as they are."
        )
    return message


class UnconvertedLayerWarning(UserWarning):
    """Some MoE layers of a model were not taken over."""


def is_converted(model: nn.Module) -> bool:
    """Whether a model has MoE layers and all of them are ours."""
    layers = moe_layers(model)
    return bool(layers) and all(layer.kind != "none" for layer in layers)


__all__ = [
    "NOT_TAKEN_OVER",
    "FamilyMoE",
    "TakenOver",
    "UnconvertedLayerWarning",
    "convert",
    "is_converted",
    "moe_layers",
]
