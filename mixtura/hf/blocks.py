"""Whole MoE blocks of Transformers families, adopted: the table, and what a block does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mixtura.config import (
    ExpertsConfig,
    GatePrecision,
    GateUp,
    MoEConfig,
    RoutingConfig,
    RunnerConfig,
    SharedExpertsOrder,
)
from mixtura.dispatch import create_dispatcher, dispatcher_for
from mixtura.errors import ConfigError, InputError, UnsupportedModel
from mixtura.experts import (
    ExpertsOptions,
    PackedExperts,
    SharedExperts,
    SharedTask,
    StoredTensor,
)
from mixtura.hf import gate as gates
from mixtura.hf.adopt import adopt_class, get_attribute
from mixtura.hf.experts import (
    AdoptedExperts,
    BlockExperts,
    ExpertsPlan,
    ReadExperts,
    check_in_memory,
    plan_experts,
)
from mixtura.hf.family_plug_ins import family_of
from mixtura.hf.read import read_activation, read_experts, read_shared_experts
from mixtura.layer import FusedMoE, LayerPlan
from mixtura.parallel.placement import Placement
from mixtura.parallel.ranks import ExpertParallel, Spread
from mixtura.routing import CustomRouting, router_for
from mixtura.routing.custom import without_choice
from mixtura.routing.families import TOP_K, read
from mixtura.routing.gate import GatePlan
from mixtura.runner import LayerOutput, create_runner
from mixtura.types import ExpertBatch, Routing, TokenInputs

FamilyReturn = Callable[[Tensor, LayerOutput], Any]
"""`(routed like the input, output) -> what the family's block returns`."""


def _tensor(out: Tensor, output: LayerOutput) -> Tensor:
    return out


def _with_weights(out: Tensor, output: LayerOutput) -> tuple[Tensor, Tensor]:
    return out, output.routing.topk_weights.to(out.dtype)


def _flat_with_logits(out: Tensor, output: LayerOutput) -> tuple[Tensor, Tensor]:
    assert output.routing.router_logits is not None
    return out.flatten(0, -2), output.routing.router_logits


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSpec:
    """How a family's block is put together; paths are attributes of the block.

    Attributes:
        gate: path of the router. gate_class: how it is adopted.
        gate_argument: a tensor of the block that its router is called with.
        experts: path of the experts; None where the block itself holds them.
        shared, shared_gate: paths of the shared MLP and of its sigmoid gate.
        returns: what the block gives back.
        output_bias: a bias of the block, added to its output.
        jitter: path of the relative noise on the input in training; None or 0 there is none.
        read_experts: what the experts compute, and from which tensors.
        routing: the rule, of the model's configuration and the layer; None: that of its
            `model_type` (`routing/families.py`).
    """

    gate: str = "gate"
    gate_class: type[gates.FamilyGate] = gates.PlainGate
    gate_argument: str | None = None
    experts: str | None = "experts"
    shared: str | None = None
    shared_gate: str | None = None
    returns: FamilyReturn = _tensor
    output_bias: str | None = None
    jitter: str | None = None
    read_experts: ReadExperts = read_experts
    routing: Callable[[Any, int], RoutingConfig] | None = None


def _read_dbrx(experts: nn.Module) -> tuple[ExpertsConfig, dict[str, StoredTensor]]:
    """DBRX keeps w1 (gate), v1 (up) and w2 (down, transposed) flat: (E * I, H) each."""
    parts: Any = experts
    count = parts.num_experts
    rows, hidden = parts.mlp.w1.shape
    config = ExpertsConfig(
        num_experts=count,
        hidden_size=hidden,
        intermediate_size=rows // count,
        activation=read_activation(parts.mlp, is_gated=True, layout=GateUp.SEPARATE),
        gate_up=GateUp.SEPARATE,
    )
    return config, {
        "gate_up_proj": StoredTensor("mlp.w1", num_experts=count),
        "up_proj": StoredTensor("mlp.v1", num_experts=count),
        "down_proj": StoredTensor("mlp.w2", num_experts=count, is_transposed=True),
    }


def _read_jetmoe(block: nn.Module) -> tuple[ExpertsConfig, dict[str, StoredTensor]]:
    """JetMoE's block holds two stacks of linear maps, gate and up stacked."""
    parts: Any = block
    count, hidden, intermediate = parts.output_linear.weight.shape
    config = ExpertsConfig(
        num_experts=count,
        hidden_size=hidden,
        intermediate_size=intermediate,
        activation=read_activation(block, is_gated=True, layout=GateUp.STACKED),
    )
    return config, {
        "gate_up_proj": StoredTensor("input_linear.weight"),
        "down_proj": StoredTensor("output_linear.weight"),
    }


def _read_llama4(experts: nn.Module) -> tuple[ExpertsConfig, dict[str, StoredTensor]]:
    """Llama 4 stores its experts (E, in, out)."""
    parts: Any = experts
    count, intermediate, hidden = parts.down_proj.shape
    config = ExpertsConfig(
        num_experts=count,
        hidden_size=hidden,
        intermediate_size=intermediate,
        activation=read_activation(experts, is_gated=True, layout=GateUp.STACKED),
        is_transposed=True,
    )
    return config, {
        "gate_up_proj": StoredTensor("gate_up_proj", is_transposed=True),
        "down_proj": StoredTensor("down_proj", is_transposed=True),
    }


_QWEN_SHARED = BlockSpec(shared="shared_expert", shared_gate="shared_expert_gate")
_DEEPSEEK_V3 = BlockSpec(gate_class=gates.BiasedGate, shared="shared_experts")

BLOCKS: dict[str, BlockSpec] = {
    "Qwen2MoeSparseMoeBlock": _QWEN_SHARED,
    "Qwen3NextSparseMoeBlock": _QWEN_SHARED,
    "Qwen3_5MoeSparseMoeBlock": _QWEN_SHARED,
    "Qwen3MoeSparseMoeBlock": BlockSpec(),
    "MixtralSparseMoeBlock": BlockSpec(jitter="jitter_noise"),
    "OlmoeSparseMoeBlock": BlockSpec(),
    "DeepseekV2Moe": BlockSpec(shared="shared_experts"),
    "DeepseekV3MoE": _DEEPSEEK_V3,
    "Glm4MoeMoE": _DEEPSEEK_V3,
    "GptOssMLP": BlockSpec(gate="router", gate_class=gates.LinearBiasGate, returns=_with_weights),
    "AfmoeSparseMoeBlock": BlockSpec(
        gate="router",
        gate_class=gates.NestedGate,
        gate_argument="expert_bias",
        shared="shared_experts",
    ),
    "LongcatFlashMoE": BlockSpec(gate="router", gate_class=gates.ClassifierGate),
    "MiniMaxM2SparseMoeBlock": BlockSpec(
        gate_argument="e_score_correction_bias", jitter="jitter_noise"
    ),
    "Step3p7SparseMoeBlock": _DEEPSEEK_V3,
    "RoutedMoE": BlockSpec(gate_class=gates.BiasedGate),
    "SharedMoE": _DEEPSEEK_V3,
    "Llama4TextMoe": BlockSpec(
        gate="router",
        gate_class=gates.ScoresGate,
        shared="shared_expert",
        returns=_flat_with_logits,
        read_experts=_read_llama4,
    ),
    "DbrxFFN": BlockSpec(
        gate="router",
        gate_class=gates.LogitsGate,
        jitter="router.moe_jitter_eps",
        read_experts=_read_dbrx,
    ),
    "JetMoeMoE": BlockSpec(
        gate="router",
        gate_class=gates.SortedGate,
        experts=None,
        output_bias="bias",
        read_experts=_read_jetmoe,
    ),
}
"""Blocks that are taken over whole, by the name of their class in Transformers or `families`."""

PACKAGES = ("transformers.", "mixtura.hf.families.")
"""Where those classes are."""


def block_spec(module: nn.Module) -> BlockSpec | None:
    """The table's entry for a module, looked up through its bases (FSDP makes subclasses).

    A class that is not Transformers' may be one of a plug-in's (`family_plug_ins`).
    """
    for cls in type(module).__mro__:
        if cls.__name__ in BLOCKS and cls.__module__.startswith(PACKAGES):
            return BLOCKS[cls.__name__]
        family = family_of(cls)
        if family is not None:
            return family.spec
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockOptions:
    """How converted blocks run; see `convert`. `ranks` are to share the experts, `router` chooses
    and weighs in place of the families' rules."""

    experts: ExpertsOptions
    runner: RunnerConfig
    gate: GatePrecision
    ranks: ExpertParallel | None = None
    router: CustomRouting | None = None


class FamilyMoE(FusedMoE):
    """A family's MoE block, adopted: our layer over the family's own submodules."""

    spec: BlockSpec

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the family's block takes and gives; arguments that it ignores are ignored."""
        noise = get_attribute(self, self.spec.jitter) if self.spec.jitter is not None else None
        if self.training and noise:
            if self.moe_config.deterministic:
                raise InputError(
                    f"{self.spec.jitter} ({noise}) must be 0 in training with deterministic=True; "
                    f"got noise that no two runs share. Call eval(), or set it to 0."
                )
            low, high = 1.0 - noise, 1.0 + noise
            hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(low, high)
        output = self.run(hidden_states.reshape(-1, hidden_states.shape[-1]))
        out = output.hidden_states.view(hidden_states.shape)
        if self.spec.output_bias is not None:
            out = out + getattr(self, self.spec.output_bias)
        return self.spec.returns(out, output)

    def route(self, hidden_states: Tensor, tokens: TokenInputs) -> Routing:
        gate: gates.FamilyGate = getattr(self, self.spec.gate)
        argument = self.spec.gate_argument
        bias = getattr(self, argument) if argument is not None else None
        returned = gate(hidden_states, bias, tokens=tokens)
        choice = gate.from_family(returned, tokens)
        return self.finish_routing(choice, tokens, gate.router_tensors(bias))

    def start_shared(self, hidden_states: Tensor, order: SharedExpertsOrder) -> SharedTask:
        path = self.spec.shared_gate
        gate = getattr(self, path) if path is not None else None
        return self.shared_module.start(hidden_states, gate, order, self.dispatcher.part)

    @property
    def shared_module(self) -> SharedExperts:
        """The family's shared MLP."""
        assert self.spec.shared is not None
        shared: SharedExperts = getattr(self, self.spec.shared)
        return shared

    def run_experts(self, batch: ExpertBatch, *, reduce: bool = True) -> Tensor:
        assert self.spec.experts is not None
        experts: nn.Module = getattr(self, self.spec.experts)
        rows: Tensor = experts(
            batch.hidden_states,
            batch.local_ids,
            batch.topk_weights,
            order=batch.order,
            adapter_ids=batch.adapter_ids,
            reduce=reduce,
        )
        return rows

    @property
    def packed_experts(self) -> PackedExperts:
        """The module that holds the experts' weights."""
        experts = self if self.spec.experts is None else getattr(self, self.spec.experts)
        assert isinstance(experts, PackedExperts)
        return experts


class FamilyMoEWithExperts(FamilyMoE, AdoptedExperts):
    """A block that holds the experts' weights itself (JetMoE)."""

    def run_experts(self, batch: ExpertBatch, *, reduce: bool = True) -> Tensor:
        return self.run_batch(batch, reduce=reduce)

    def slots(self) -> dict[str, Tensor]:
        return AdoptedExperts.slots(self)


class FamilySharedExperts(SharedExperts):
    """A family's shared MLP, adopted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPlan:
    """A block that has been read and found to be one that we can run; it is still as it was."""

    block: nn.Module
    spec: BlockSpec
    experts: ExpertsPlan
    layer: LayerPlan

    def adopt(self) -> None:
        """Make the block one of ours; parameters, names, hooks and observers stay. Cannot fail."""
        block: Any = self.block
        spec, config = self.spec, self.layer.config
        gate = getattr(block, spec.gate)
        adopt_class(gate, spec.gate_class)
        gate.gate_plan = GatePlan(
            self.layer.router, config.gate, config.deterministic, config.debug
        )
        if spec.shared is not None:
            shared = getattr(block, spec.shared)
            adopt_class(shared, FamilySharedExperts)
            shared.shared_config = config.shared
            shared.is_row_invariant = config.deterministic
        is_ours = isinstance(block, FusedMoE)
        observers, sources = (block.observers, block.sources) if is_ours else ((), ())
        if spec.experts is None:
            self.experts.adopt(FamilyMoEWithExperts)
        else:
            self.experts.adopt(BlockExperts)
            adopt_class(block, FamilyMoE)
        block.spec = spec
        block.plan = self.layer
        block.observers, block.sources = observers, sources


def plan_block(
    block: nn.Module, spec: BlockSpec, hf_config: Any, layer_index: int, options: BlockOptions
) -> BlockPlan:
    """Read a family's block; it is left as it is.

    Raises:
        UnsupportedModel: a part computes something that we do not.
        ConfigError: the model's configuration contradicts itself or the weights.
    """
    experts_module = block if spec.experts is None else getattr(block, spec.experts)
    if getattr(experts_module, "_is_expert_parallel", False):
        raise UnsupportedModel(
            "a block that is taken over whole must hold all its experts; got Transformers' expert "
            "parallelism. Only the experts of such a block are ours."
        )
    rule = spec.routing or _rule_of_type
    routing = rule(hf_config, layer_index)
    if options.router is not None:
        routing = without_choice(routing)
    experts_options = replace(options.experts, weight_on=routing.weight_on)
    experts = plan_experts(experts_module, experts_options, spec.read_experts)
    experts_config = whole_config(experts)
    gate = getattr(block, spec.gate)
    check_in_memory(gate, [spec.gate_class.weight_path])
    if spec.shared_gate is not None:
        check_in_memory(block, [f"{spec.shared_gate}.weight"])
    shared = getattr(block, spec.shared) if spec.shared is not None else None
    config = MoEConfig(
        hidden_size=experts_config.hidden_size,
        routing=routing,
        experts=experts_config,
        shared=read_shared_experts(shared, has_sigmoid_gate=spec.shared_gate is not None)
        if shared is not None
        else None,
        runner=options.runner,
        gate=options.gate,
        deterministic=options.experts.deterministic,
        debug=options.experts.debug,
        activation_dtype=options.experts.activation_dtype,
    )
    _check_gate(gate, spec, config, type(block).__name__)
    experts = spread_out(experts, options.ranks, partial(Spread.of, config))
    return BlockPlan(
        block=block,
        spec=spec,
        experts=experts,
        layer=LayerPlan(
            config,
            router_for(routing, custom=options.router),
            create_runner(config.runner),
            dispatcher_for(config, experts.spread),
            experts.spread,
        ),
    )


def _rule_of_type(hf_config: Any, layer_index: int) -> RoutingConfig:
    return RoutingConfig.from_hf(hf_config, layer_index=layer_index)


def plan_alone(module: nn.Module, hf_config: Any, options: BlockOptions) -> ExpertsPlan:
    """Read experts whose block stays the family's own; they are left as they are.

    Raises:
        UnsupportedModel, ConfigError: as `plan_block`.
    """
    plan = plan_experts(module, options.experts)
    plan = spread_out(plan, options.ranks, partial(Spread.of_experts, whole_config(plan)))
    if plan.spread is None:
        return plan
    top_k = read_top_k(hf_config)
    dispatcher = create_dispatcher(plan.spread, top_k or 1)
    return replace(plan, dispatcher=dispatcher)


def read_top_k(hf_config: Any) -> int | None:
    """K as the configuration names it, where one number holds for all layers."""
    try:
        found = read(hf_config, TOP_K)
    except ConfigError:
        return None
    return found if isinstance(found, int) else None


def whole_config(plan: ExpertsPlan) -> ExpertsConfig:
    """What the experts of all ranks are."""
    return plan.config if plan.spread is None else plan.spread.whole_experts(plan.config)


def spread_out(
    plan: ExpertsPlan,
    ranks: ExpertParallel | None,
    create: Callable[[ExpertParallel, Placement | None], Spread],
) -> ExpertsPlan:
    """Experts over ranks: as they were loaded, else a part of those that this rank has all of.

    Raises:
        ConfigError: they cannot be spread so.
        InputError: they have been spread over other ranks.
    """
    if plan.spread is not None:
        if ranks is not None and ranks.config != plan.spread.ranks.config:
            raise InputError(
                f"experts that have been spread ({plan.spread.ranks.config}) must stay so; got "
                f"{ranks.config}. Load the model anew."
            )
        create(plan.spread.ranks, plan.spread.placement)  # checks what this call asks for
        return replace(plan, spread=plan.spread.to(plan.weights().device))
    return plan if ranks is None else plan.sharded(create(ranks, None))


def _check_gate(gate: nn.Module, spec: BlockSpec, config: MoEConfig, name: str) -> None:
    shape = tuple(get_attribute(gate, spec.gate_class.weight_path).shape)
    expected = (config.routing.num_logits, config.hidden_size)
    if shape != expected:
        raise UnsupportedModel(
            f"the gate of {name} ({shape}) must have the shape that the model's configuration "
            f"gives; got {expected} from it. Check config.json against the weights."
        )
