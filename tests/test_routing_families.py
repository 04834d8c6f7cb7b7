"""The table of families against their own routers in the installed Transformers."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import inspect
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import EXCEPTIONS, OUTSIDE, TinyCase, all_families, tiny_model
from torch import Tensor, nn
from transformers import PretrainedConfig

from mixtura.config import RoutingConfig, ScaleOn, SelectionBias, WeightOn
from mixtura.errors import ConfigError, UnsupportedModel
from mixtura.routing import NOT_COVERED, create_router
from mixtura.types import Routing, TokenInputs

NUM_TOKENS = 64
SEEDS = (0, 1, 2)
TOLERANCE = 1e-5
BIAS_NAMES = ("e_score_correction_bias", "expert_bias")


@functools.cache
def family_types(family: str) -> frozenset[str]:
    """The model types of a family's configurations."""
    name = f"transformers.models.{family}.configuration_{family}"
    module = importlib.import_module(OUTSIDE[family].module if family in OUTSIDE else name)
    return frozenset(
        value.model_type
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, PretrainedConfig)
        and value.__module__ == module.__name__
        and value.model_type
    )


def is_covered(family: str) -> bool:
    return not family_types(family).isdisjoint(RoutingConfig.HF_RULES)


COVERED = sorted(family for family in all_families() if is_covered(family))


# ------------------------------------------------------------------------- a family's own routing


@dataclasses.dataclass
class Outcome:
    """What a family's router did: raw logits (T,E), and weights (T,K) of ids (T,K)."""

    logits: Tensor
    weights: Tensor
    ids: Tensor


def gate_module(block: nn.Module) -> nn.Module:
    return block.gate if hasattr(block, "gate") else block.router


def run_plain(block: nn.Module, hidden: Tensor, input_ids: Tensor) -> Outcome:
    """A router returns logits, weights and ids."""
    return Outcome(*gate_module(block)(hidden))


def run_with_bias(block: nn.Module, hidden: Tensor, input_ids: Tensor) -> Outcome:
    """The block hands its bias to the router."""
    return Outcome(*gate_module(block)(hidden, block.e_score_correction_bias))


def run_afmoe(block: nn.Module, hidden: Tensor, input_ids: Tensor) -> Outcome:
    return Outcome(*block.router(hidden.unsqueeze(0), block.expert_bias))


def run_lfm2_moe(block: nn.Module, hidden: Tensor, input_ids: Tensor) -> Outcome:
    return Outcome(*block.gate(hidden, block.expert_bias if block.use_expert_bias else None))


def run_transformed(block: nn.Module, hidden: Tensor, input_ids: Tensor) -> Outcome:
    """The logits that come back are multiplied or soft-capped already: take the product instead."""
    gate = gate_module(block)
    _, weights, ids = gate(hidden)
    return Outcome(F.linear(hidden.to(gate.weight.dtype), gate.weight), weights, ids)


def run_gemma(block: nn.Module, hidden: Tensor, input_ids: Tensor) -> Outcome:
    """Probabilities come back: listen to the gate's linear map inside."""
    seen: list[Tensor] = []
    with block.router.proj.register_forward_hook(lambda *call: seen.append(call[-1])):
        _, weights, ids = block.router(hidden)
    return Outcome(seen[0], weights, ids)


def run_deepseek_v4(block: nn.Module, hidden: Tensor, input_ids: Tensor) -> Outcome:
    return Outcome(*(block.gate(hidden, input_ids) if block.is_hash else block.gate(hidden)))


def run_dbrx(block: nn.Module, hidden: Tensor, input_ids: Tensor) -> Outcome:
    logits = block.router(hidden)
    return Outcome(logits, *block.route_tokens_to_experts(logits))


def run_llama4(block: nn.Module, hidden: Tensor, input_ids: Tensor) -> Outcome:
    """Scores come back dense, 0 for experts that are not chosen."""
    scores, logits = block.router(hidden)
    weights, ids = scores.topk(block.top_k, dim=-1)
    assert (weights > 0).all()
    return Outcome(logits, weights, ids)


def run_jetmoe(block: nn.Module, hidden: Tensor, input_ids: Tensor) -> Outcome:
    """Rows come back in the order of experts, each with its token and its weight."""
    _, tokens, row_weights, rows_per_expert, logits = block.router(hidden)
    row_ids = torch.arange(block.router.num_experts).repeat_interleave(
        torch.tensor(rows_per_expert)
    )
    order = tokens.argsort(stable=True)
    shape = (hidden.shape[0], block.router.top_k)
    return Outcome(logits, row_weights[order].view(shape), row_ids[order].view(shape))


RUN: dict[str, Callable[[nn.Module, Tensor, Tensor], Outcome]] = {
    "afmoe": run_afmoe,
    "dbrx": run_dbrx,
    "deepseek_v4": run_deepseek_v4,
    "diffusion_gemma": run_gemma,
    "gemma4": run_gemma,
    "hy_v3": run_with_bias,
    "jetmoe": run_jetmoe,
    "laguna": run_transformed,
    "lfm2_moe": run_lfm2_moe,
    "llama4": run_llama4,
    "minimax_m2": run_with_bias,
    "muse_spark": run_transformed,
}


def run_family(family: str, block: nn.Module, hidden: Tensor, input_ids: Tensor) -> Outcome:
    with torch.no_grad():
        return RUN.get(family, run_plain)(block, hidden, input_ids)


# ------------------------------------------------------------------------------------- comparison


def learned(block: nn.Module, rule: RoutingConfig) -> dict[str, Tensor]:
    """What the rule asks for besides logits, out of the family's block."""
    stored = {
        name.rpartition(".")[-1]: tensor
        for name, tensor in [*block.named_parameters(), *block.named_buffers()]
    }
    tensors: dict[str, Tensor] = {}
    if rule.selection_bias is not SelectionBias.NONE:
        (bias,) = (stored[name] for name in BIAS_NAMES if name in stored)
        tensors["selection_bias"] = bias.detach().flatten()
    if rule.per_expert_scale:
        tensors["per_expert_scale"] = stored["per_expert_scale"].detach()
    if rule.hash_routing:
        tensors["hash_table"] = stored["tid2eid"]
    return tensors


@torch.no_grad()
def spread_bias_(block: nn.Module, seed: int, mean: float = 0.0) -> None:
    """Make biases large enough to change choices."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        if name.endswith(BIAS_NAMES):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.6 + mean)


def draw(config: Any, seed: int) -> tuple[Tensor, Tensor]:
    """Hidden states (T,H) and token ids (T,)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(NUM_TOKENS, config.hidden_size, generator=generator)
    return hidden, torch.randint(config.vocab_size, (NUM_TOKENS,), generator=generator)


def dense(weights: Tensor, ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Weights by expert (T,E), and which experts are chosen (T,E); ids of -1 fall away."""
    spare = torch.where(ids < 0, num_experts, ids).long()
    by_expert = torch.zeros(ids.shape[0], num_experts + 1).scatter_add(1, spare, weights.float())
    is_chosen = torch.zeros_like(by_expert, dtype=torch.bool).scatter(1, spare, True)
    return by_expert[:, :-1], is_chosen[:, :-1]


def assert_agree(routing: Routing, expected: Outcome, rule: RoutingConfig) -> None:
    """The same experts for every token, and the same weight for each."""
    num_real = rule.num_experts
    weights, is_chosen = dense(routing.topk_weights, routing.topk_ids, num_real)
    all_weights, all_chosen = dense(expected.weights, expected.ids, rule.num_choices)
    assert is_chosen.equal(all_chosen[:, :num_real])
    torch.testing.assert_close(weights, all_weights[:, :num_real], rtol=TOLERANCE, atol=TOLERANCE)
    if rule.no_compute is not None:
        assert routing.bypass is not None
        torch.testing.assert_close(
            routing.bypass.identity_weight,
            all_weights[:, num_real:].sum(1),
            rtol=TOLERANCE,
            atol=TOLERANCE,
        )
        num_none = (routing.topk_ids < 0).sum(1)
        assert num_none.equal(all_chosen[:, num_real:].sum(1).int())


def layer_of(block_name: str) -> int:
    number = re.search(r"\.(\d+)(\.|$)", block_name)
    assert number is not None
    return int(number[1])


def check_block(family: str, block: nn.Module, config: Any, layer_index: int) -> RoutingConfig:
    """Run a block's router and the rule's on the same tokens; returns the rule."""
    rule = RoutingConfig.from_hf(config, layer_index=layer_index)
    # Many biased scores are negative, less than the zero that a dropped group may get. Where that
    # is the rule, experts of a dropped group tie and any is right: there, few are negative.
    mean = 0.0 if family == "axk2" else -0.6
    for seed in SEEDS:
        spread_bias_(block, seed, mean)
        router = create_router(rule, **learned(block, rule))
        hidden, input_ids = draw(config, seed)
        expected = run_family(family, block, hidden, input_ids)
        if family == "openai_privacy_filter":  # the layer multiplies by K what the router divided
            expected.weights = expected.weights * block.num_experts
        assert_agree(router.route(expected.logits, input_ids), expected, rule)
    return rule


@functools.cache
def case_of(family: str, dtype: torch.dtype = torch.float32) -> TinyCase:
    return tiny_model(family, dtype=dtype)


# ------------------------------------------------------------------------------------------ tests


def test_every_family_is_covered_or_stands_with_a_reason():
    """A family that a later Transformers brings fails here until it has a rule or a reason."""
    without_rule = {family for family in all_families() if not is_covered(family)}
    with_reason = {
        family for family in all_families() if not family_types(family).isdisjoint(NOT_COVERED)
    }
    assert without_rule == with_reason
    assert set(EXCEPTIONS) <= with_reason


def test_no_rule_is_for_a_model_type_that_does_not_exist():
    known = frozenset().union(*(family_types(family) for family in all_families()))
    known |= {model_type.removesuffix("_text") for model_type in known}
    assert set(RoutingConfig.HF_RULES) | set(NOT_COVERED) <= known


def test_no_model_type_has_both_a_rule_and_a_reason():
    assert not set(RoutingConfig.HF_RULES) & set(NOT_COVERED)


@pytest.mark.parametrize("family", COVERED)
def test_the_rule_routes_as_the_family_does(family: str):
    case = case_of(family)
    for name in case.block_modules:
        block = copy.deepcopy(case.model.get_submodule(name))
        check_block(family, block, case.model.config, layer_of(name))


# Attribute values that the tiny models do not show.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("axk2", {"n_group": None, "topk_group": None}),
    ("axk2", {"n_group": 4, "topk_group": 3, "routed_scaling_factor": 1.25}),
    ("beam", {"norm_topk_prob": False}),
    ("cohere2_moe", {"expert_selection_fn": "sigmoid", "norm_topk_prob": True}),
    ("cohere2_moe", {"expert_selection_fn": "sigmoid", "norm_topk_prob": False}),
    ("cohere2_moe", {"expert_selection_fn": "softmax", "norm_topk_prob": False}),
    ("deepseek_v2", {"topk_method": "greedy"}),
    ("deepseek_v2", {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0}),
    ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
    ("deepseek_v3", {"n_group": 4, "topk_group": 4}),
    ("deepseek_v3", {"norm_topk_prob": False, "routed_scaling_factor": 1.7}),
    ("deepseek_v4", {"scoring_func": "sigmoid", "routed_scaling_factor": 1.1}),
    ("ernie4_5_moe", {"moe_norm_min": 0.5}),
    ("flint", {"norm_topk_prob": False}),
    ("inkling2", {"scoring_func": "sqrtsoftplus", "route_scale": 2.0}),
    ("kolibri1", {"norm_topk_prob": True}),
    ("laguna", {"moe_router_logit_softcapping": 1.5}),
    ("lfm2_moe", {"norm_topk_prob": False, "routed_scaling_factor": 1.9}),
    ("longcat_flash", {"zero_expert_num": 0}),
    ("longcat_flash", {"routed_scaling_factor": 1.0}),
    ("mistral4", {"norm_topk_prob": False}),
    ("muse_spark", {"output_multiplier": 3.0, "routed_scaling_factor": 2.0}),
    ("olmoe", {"norm_topk_prob": True}),
    ("olmoe", {"norm_topk_prob": False}),
    ("phimoe", {"router_jitter_noise": 0.3}),
    ("qwen3_moe", {"num_experts_per_tok": 8}),
    ("hunyuan_v1_moe", {"num_experts": 6, "moe_topk": 1}),
]


def build(module: type[nn.Module], config: Any, name: str) -> nn.Module:
    """A module of the family's, of the layer that `name` speaks of."""
    takes_layer = "layer_idx" in inspect.signature(module).parameters
    return module(config, layer_of(name)) if takes_layer else module(config)


@torch.no_grad()
def rebuilt(case: TinyCase, config: Any, name: str) -> nn.Module:
    """A copy of a block whose router is built from another configuration, with random weights."""
    block = copy.deepcopy(case.model.get_submodule(name))
    gate = gate_module(block)
    new = build(type(gate), config, name)
    generator = torch.Generator().manual_seed(5)
    for parameter in new.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    setattr(block, "gate" if hasattr(block, "gate") else "router", new.eval())
    return block


@pytest.mark.parametrize(
    ("family", "values"),
    VARIANTS,
    ids=[f"{family}-{'-'.join(map(str, v.values()))}" for family, v in VARIANTS],
)
def test_every_attribute_is_read(family: str, values: dict[str, Any]):
    case = case_of(family)
    config = copy.deepcopy(case.model.config)
    for name, value in values.items():
        setattr(config, name, value)
    for name in case.block_modules:
        check_block(family, rebuilt(case, config, name), config, layer_of(name))


def test_axk2_prefers_an_expert_of_a_dropped_group_to_one_with_a_negative_score():
    """A dropped group's experts tie at zero, so only those of the kept group are compared."""
    case = case_of("axk2")
    config = copy.deepcopy(case.model.config)
    config.n_group, config.topk_group = 2, 1
    block = rebuilt(case, config, case.block_modules[0])
    spread_bias_(block, 0)
    rule = RoutingConfig.from_hf(config, layer_index=1)
    hidden, input_ids = draw(config, 0)
    expected = run_family("axk2", block, hidden, input_ids)
    routing = create_router(rule, **learned(block, rule)).route(expected.logits)
    _, ours = dense(routing.topk_weights, routing.topk_ids, 8)
    _, theirs = dense(expected.weights, expected.ids, 8)
    first = theirs[:, :4].sum(1) >= 2  # the group that two of three came from was kept
    kept = torch.where(first.unsqueeze(1), theirs[:, :4], theirs[:, 4:])
    assert torch.where(first.unsqueeze(1), ours[:, :4], ours[:, 4:]).equal(kept)
    assert (kept.sum(1) == 2).any()


@pytest.mark.parametrize("p_norm", [1.0, 2.0, None])
def test_dbrx_divides_by_the_norm_that_its_configuration_names(p_norm: float | None):
    case = case_of("dbrx")
    config = copy.deepcopy(case.model.config)
    block = copy.deepcopy(case.model.get_submodule(case.block_modules[0]))
    config.ffn_config.moe_normalize_expert_weights = p_norm
    block.moe_normalize_expert_weights = p_norm
    check_block("dbrx", block, config, 0)


def test_lfm2_has_no_bias_where_its_configuration_says_so():
    case = case_of("lfm2_moe")
    config = copy.deepcopy(case.model.config)
    config.use_expert_bias = False
    block = rebuilt(case, config, case.block_modules[0])
    block.use_expert_bias = False
    rule = check_block("lfm2_moe", block, config, 1)
    assert rule.selection_bias is SelectionBias.NONE


def test_deepseek_v4_chooses_by_token_id_in_its_hash_layers_only():
    config = case_of("deepseek_v4").model.config
    rules = [RoutingConfig.from_hf(config, layer_index=layer) for layer in range(3)]
    assert [rule.hash_routing for rule in rules] == [
        kind == "hash_moe" for kind in config.mlp_layer_types
    ]
    assert [rule.hash_routing for rule in rules] == [True, False, False]


@pytest.mark.parametrize("is_talker", [False, True])
def test_qwen3_omni_has_one_rule_for_thinker_and_talker(is_talker: bool):
    from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as omni
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import (
        Qwen3OmniMoeTalkerTextConfig,
        Qwen3OmniMoeTextConfig,
    )

    sizes = {"hidden_size": 64, "num_experts": 8, "num_experts_per_tok": 3, "vocab_size": 96}
    if is_talker:
        config = Qwen3OmniMoeTalkerTextConfig(**sizes)
        gate = omni.Qwen3OmniMoeTalkerTextTopKRouter(config)
    else:
        config = Qwen3OmniMoeTextConfig(**sizes)
        gate = omni.Qwen3OmniMoeThinkerTextTopKRouter(config)
    nn.init.normal_(gate.weight, std=0.15, generator=torch.Generator().manual_seed(0))
    block = nn.Module()
    block.gate = gate
    check_block("qwen3_omni_moe", block, config, 0)


def test_dots3_note_reads_the_vision_tower_layer_by_layer():
    from transformers.models.dots3_note.configuration_dots3_note import Dots3NoteVisionConfig
    from transformers.models.dots3_note.modeling_dots3_note import Dots3NoteVisionTopKRouter

    config = Dots3NoteVisionConfig(
        num_hidden_layers=3, num_experts_per_tok=2, pyramid_num_routed=[0, 4, 6]
    )
    config.router_scaling_factor = 1.5
    for layer_index, num_experts in ((1, 4), (2, 6)):
        layer_config = config.per_layer_config[layer_index]
        gate = Dots3NoteVisionTopKRouter(layer_config)
        nn.init.normal_(gate.weight, std=0.05, generator=torch.Generator().manual_seed(0))
        block = nn.Module()
        block.gate = gate
        block.register_buffer("e_score_correction_bias", torch.zeros(num_experts))
        rule = RoutingConfig.from_hf(config, layer_index=layer_index)
        assert (rule.num_experts, rule.top_k, rule.scale) == (num_experts, 2, 1.5)
        spread_bias_(block, 0)
        hidden = torch.randn(
            NUM_TOKENS, config.hidden_size, generator=torch.Generator().manual_seed(1)
        )
        with torch.no_grad():
            expected = run_with_bias(block, hidden, hidden)
        router = create_router(rule, **learned(block, rule))
        assert_agree(router.route(expected.logits), expected, rule)


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("beam", {"routed_scaling_factor": 2.5}),
        ("laguna", {"moe_routed_scaling_factor": 1.5}),
        ("minimax_m3_vl", {"routed_scaling_factor": 2.0}),
        ("step3p7", {"moe_router_scaling_factor": 3.0}),
    ],
)
def test_a_scale_that_the_layer_applies_is_on_the_output(family: str, values: dict[str, float]):
    """The layer's output rises by the factor where its experts' output rises by one."""
    case = case_of(family)
    config = copy.deepcopy(case.model.config)
    for name, value in values.items():
        setattr(config, name, value)
    name = case.block_modules[0]
    old = case.model.get_submodule(name)
    block = build(type(old), config, name)
    block.load_state_dict(old.state_dict())
    hidden, _ = draw(config, 0)
    outputs = []
    for constant in (0.0, 1.0):
        block.experts.forward = lambda x, *rest, fill=constant: torch.full_like(x, fill)
        with torch.no_grad():
            outputs.append(block(hidden.unsqueeze(0)))
    rule = RoutingConfig.from_hf(config, layer_index=layer_of(name))
    assert rule.scale_on is ScaleOn.OUTPUT
    torch.testing.assert_close(
        outputs[1] - outputs[0], torch.full_like(outputs[0], rule.output_scale)
    )


def test_only_those_families_have_a_scale_on_the_output():
    on_output = set()
    for family in COVERED:
        rule = RoutingConfig.from_hf(case_of(family).model.config, layer_index=1)
        if rule.scale_on is ScaleOn.OUTPUT:
            on_output.add(family)
        else:
            block = case_of(family).model.get_submodule(case_of(family).block_modules[0])
            assert not hasattr(block, "routed_scaling_factor")
    assert on_output == {"beam", "laguna", "minimax_m3_vl", "step3p5", "step3p7"}


def test_llama4_weighs_the_input_of_its_experts():
    case = case_of("llama4")
    block = copy.deepcopy(case.model.get_submodule(case.block_modules[0]))
    rule = RoutingConfig.from_hf(case.model.config, layer_index=1)
    hidden, _ = draw(case.model.config, 0)
    seen: list[Tensor] = []

    def listen(rows: Tensor) -> Tensor:
        seen.append(rows.view(rule.num_experts, NUM_TOKENS, -1))
        return torch.zeros_like(rows)

    block.experts.forward = listen
    with torch.no_grad():
        _, logits = block(hidden)
    routing = create_router(rule).route(logits)
    weights, _ = dense(routing.topk_weights, routing.topk_ids, rule.num_experts)
    torch.testing.assert_close(seen[0], weights.T.unsqueeze(-1) * hidden)
    assert rule.weight_on is WeightOn.INPUT


def test_only_llama4_weighs_the_input():
    on_input = {
        family
        for family in COVERED
        if RoutingConfig.from_hf(case_of(family).model.config, layer_index=1).weight_on
        is WeightOn.INPUT
    }
    assert on_input == {"llama4"}


@pytest.mark.parametrize("family", COVERED)
def test_native_arithmetic_is_the_familys_own_in_bfloat16(family: str):
    """Logits, scores and weights in the declared precisions give the family's weights.

    Tokens whose choice hangs on a tie after rounding are left out: they must be few.
    """
    case = case_of(family, torch.bfloat16)
    name = case.block_modules[-1]
    block = case.model.get_submodule(name)
    rule = RoutingConfig.from_hf(case.model.config, layer_index=layer_of(name))
    native = rule.native
    hidden, input_ids = draw(case.model.config, 0)
    expected = run_family(family, block, hidden.bfloat16(), input_ids)
    assert (expected.weights.dtype == torch.float32) == native.fp32_weights
    router = create_router(rule, **learned(block, rule))
    logits = expected.logits
    is_rounded = logits.bfloat16().float().equal(logits.float())
    assert is_rounded == (not native.fp32_logits)
    logits = logits.float() if native.fp32_scores else logits.bfloat16()
    weights, ids = router.select(logits, TokenInputs(input_ids=input_ids), router.tensors)
    if not native.fp32_weights:
        weights = weights.bfloat16()
    if family == "openai_privacy_filter":
        expected.weights = expected.weights * block.num_experts
    ours, ours_chosen = dense(weights, ids, rule.num_choices)
    theirs, theirs_chosen = dense(expected.weights, expected.ids, rule.num_choices)
    alike = (ours_chosen == theirs_chosen).all(1)
    assert alike.float().mean() > 0.85
    tolerance = 1e-6 if native.fp32_weights else 0.0
    differs = (ours - theirs).abs()[alike] > tolerance * theirs.abs()[alike].clamp(min=1e-3)
    assert differs.float().mean() < 0.01


# ---------------------------------------------------------------------- configurations of any kind


def test_a_plain_object_will_do():
    rule = RoutingConfig.from_hf(
        SimpleNamespace(model_type="mixtral", num_local_experts=8, num_experts_per_tok=2)
    )
    assert rule == RoutingConfig.from_hf(config_of("mixtral", "MixtralConfig"))


def test_a_plain_object_may_use_the_names_of_a_checkpoint():
    plain = SimpleNamespace(
        model_type="kimi_linear",
        num_experts=256,
        num_experts_per_token=8,
        num_expert_group=1,
        topk_group=1,
        moe_renormalize=True,
        routed_scaling_factor=2.446,
    )
    assert RoutingConfig.from_hf(plain) == RoutingConfig.from_hf(
        config_of("kimi_linear", "KimiLinearConfig")
    )


def test_hunyuan_may_have_a_list_with_one_entry_per_layer():
    plain = SimpleNamespace(model_type="hunyuan_v1_moe", num_experts=[2, 6, 8], moe_topk=[1, 5, 3])
    rules = [RoutingConfig.from_hf(plain, layer_index=layer) for layer in range(3)]
    assert [(rule.num_experts, rule.top_k) for rule in rules] == [(2, 1), (6, 5), (8, 3)]


def config_of(family: str, name: str) -> PretrainedConfig:
    module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    config: PretrainedConfig = getattr(module, name)()
    return config


@pytest.mark.parametrize(
    ("family", "name", "text_family"),
    [
        ("kimi_k25", "Kimi_K25Config", "deepseek_v3"),
        ("nemotron_h_omni", "NemotronH_Omni_Reasoning_V3_Config", "nemotron_h"),
        ("qwen3_vl_moe", "Qwen3VLMoeConfig", "qwen3_vl_moe_text"),
        ("step3p7", "Step3p7Config", "step3p5"),
    ],
)
def test_a_composite_configuration_has_the_rule_of_its_text(
    family: str, name: str, text_family: str
):
    config = config_of(family, name)
    text = config.get_text_config()
    assert text.model_type == text_family
    assert RoutingConfig.from_hf(config) == RoutingConfig.HF_RULES[text_family](text, 0)


def test_a_configuration_that_differs_by_layer_is_read_at_the_layer():
    config = config_of("qwen3_moe", "Qwen3MoeConfig")
    config.per_layer_config = {3: {"num_experts_per_tok": 2}}
    assert RoutingConfig.from_hf(config, layer_index=2).top_k == 8
    assert RoutingConfig.from_hf(config, layer_index=3).top_k == 2


def test_an_unknown_model_type_is_refused():
    with pytest.raises(
        UnsupportedModel,
        match=r"model_type \('gpt2'\) must be a family with a known routing rule; got one that is "
        r"not: none of the \d+ known\. Replace its experts only",
    ):
        RoutingConfig.from_hf(SimpleNamespace(model_type="gpt2"))


@pytest.mark.parametrize("model_type", sorted(NOT_COVERED))
def test_a_family_that_is_not_covered_is_refused_with_its_reason(model_type: str):
    with pytest.raises(UnsupportedModel, match=re.escape(NOT_COVERED[model_type])):
        RoutingConfig.from_hf(SimpleNamespace(model_type=model_type))


def test_a_missing_attribute_is_named():
    with pytest.raises(
        ConfigError,
        match=r"configuration of 'mixtral' must have num_experts_per_tok or .*; got none\. Add it",
    ):
        RoutingConfig.from_hf(SimpleNamespace(model_type="mixtral", num_local_experts=8))


@pytest.mark.parametrize(
    ("model_type", "values", "choices"),
    [
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "greedy, group_limited_greedy"),
        ("deepseek_v4", {"scoring_func": "softmax"}, "sigmoid, sqrtsoftplus"),
        ("cohere2_moe", {"expert_selection_fn": "relu"}, "softmax, sigmoid"),
    ],
)
def test_a_name_that_a_family_does_not_know_is_refused_with_the_choices(
    model_type: str, values: dict[str, str], choices: str
):
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "routed_scaling_factor": 1.0}
    config = SimpleNamespace(model_type=model_type, **sizes, **values)
    with pytest.raises(ConfigError, match=f"must be one of {choices}"):
        RoutingConfig.from_hf(config)
