"""Each Transformers family's routing rule, read from its configuration.

Importing this module fills `RoutingConfig.HF_RULES` and `RoutingConfig.HF_NOT_COVERED`. A rule is a
function of the text configuration and the layer; families of one rule that differ in a detail hand
the detail to the decorator:

    @family("mixtral", renormalize=Renormalize.SUM)
    def softmax_top_k(config, layer_index, *, renormalize): ...

Where a family's router leaves the scale to the layer, the rule puts it on the output. Only
attributes of the configuration object are read; Transformers is not imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mixtura.config import (
    Choice,
    DroppedGroup,
    GroupLimit,
    GroupScore,
    NativeGate,
    NoComputeExperts,
    NoComputeKind,
    Renormalize,
    RoutingConfig,
    ScaleOn,
    ScoreFunction,
    ScoreOrder,
    SelectionBias,
    WeightOn,
)
from mixtura.errors import ConfigError

__all__ = ["NOT_COVERED", "family"]

Rule = Callable[..., RoutingConfig]
"""`rule(text_config, layer_index, **details) -> RoutingConfig`."""

# The names that configurations give to one thing; the first that is there counts.
NUM_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
)
NUM_GROUPS = ("n_group", "num_expert_group")
RENORMALIZES = ("norm_topk_prob", "moe_renormalize")
SCALE = ("routed_scaling_factor", "route_scale", "router_scaling_factor")

# What a family's own gate computes in fp32 in a model of another dtype.
FP32 = NativeGate(fp32_logits=True)
FP32_SCORES = NativeGate()
FP32_UNTIL_WEIGHTS = NativeGate(fp32_logits=True, fp32_weights=False)
FP32_SCORES_ONLY = NativeGate(fp32_weights=False)
MODEL_DTYPE = NativeGate(fp32_scores=False, fp32_weights=False)

NOT_COVERED: dict[str, str] = {
    "doge": "product keys choose among thousands of experts of one neuron each",
    "inkling": "weights are renormalized jointly with those of the shared experts",
    "inkling_text": "weights are renormalized jointly with those of the shared experts",
    "nllb-moe": "experts have a capacity, and tokens beyond it are dropped",
    "switch_transformers": "experts have a capacity, and tokens beyond it are dropped",
    "vitpose_backbone": "the data set of an image chooses the expert, there is no router",
    "zaya": "the router carries a state from layer to layer",
}
"""Families that the pipeline does not cover, by model_type, with the reason."""


def family(*model_types: str, **details: Any) -> Callable[[Rule], Rule]:
    """Register a rule for families, with details that set them apart.

    A type that ends in `_text` is registered without the ending as well. A configuration that
    differs by layer is resolved to the layer's own before the rule sees it.
    """

    def register(rule: Rule) -> Rule:
        def for_layer(config: Any, layer_index: int) -> RoutingConfig:
            if getattr(config, "is_heterogeneous", False):
                config = config.per_layer_config[layer_index]
            return rule(config, layer_index, **details)

        for model_type in model_types:
            for name in {model_type, model_type.removesuffix("_text")}:
                assert name not in RoutingConfig.HF_RULES, name
                RoutingConfig.HF_RULES[name] = for_layer
        return rule

    return register


# ------------------------------------------------------------------------- reading configurations


def read(config: Any, names: str | tuple[str, ...]) -> Any:
    """The first of `names` that the configuration has and that is not None.

    Raises:
        ConfigError: it has none of them.
    """
    names = (names,) if isinstance(names, str) else names
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    raise ConfigError(
        f"the configuration of {getattr(config, 'model_type', type(config).__name__)!r} must have "
        f"{' or '.join(names)}; got none. Add it to the configuration."
    )


def base(config: Any, **steps: Any) -> RoutingConfig:
    """A rule's `RoutingConfig` with the sizes that nearly every configuration names."""
    sizes = {"num_experts": read(config, NUM_EXPERTS), "top_k": read(config, TOP_K)}
    return RoutingConfig(**(sizes | steps))


def renormalization(config: Any) -> Renormalize:
    """What the configuration's flag says."""
    return Renormalize.SUM if read(config, RENORMALIZES) else Renormalize.NONE


def group_limit(
    config: Any, score: GroupScore, dropped: DroppedGroup = DroppedGroup.NEGATIVE_INFINITY
) -> GroupLimit | None:
    """The restriction to groups; None where all groups are kept anyway."""
    num_groups = next((n for name in NUM_GROUPS if (n := getattr(config, name, None))), None)
    if num_groups is None:
        return None
    topk_groups = read(config, "topk_group")
    if topk_groups == num_groups:
        return None
    return GroupLimit(
        num_expert_groups=num_groups, topk_groups=topk_groups, score=score, dropped=dropped
    )


# ---------------------------------------------------------------- sigmoid with a bias on the choice


@family(
    "axk1",
    "bailing_hybrid",
    "deepseek_v3",
    "deepseek_v32",
    "dots1",
    "dots3_note_text",
    "exaone_moe",
    "glm4_moe",
    "glm4_moe_lite",
    "glm4v_moe_text",
    "glm5_next_text",
    "glm_moe_dsa",
    "hy_v4",
    "kimi_linear",
    "mimo_v2_flash",
    "nemotron_h",
    "solar_open",
)
@family("axk2", dropped=DroppedGroup.ZERO)
@family("beam", scale_on=ScaleOn.OUTPUT)
def sigmoid_in_groups(
    config: Any,
    layer_index: int,
    *,
    dropped: DroppedGroup = DroppedGroup.NEGATIVE_INFINITY,
    scale_on: ScaleOn = ScaleOn.WEIGHTS,
) -> RoutingConfig:
    """DeepSeek-V3: the experts of the best groups, each group scored by its two best."""
    return base(
        config,
        score=ScoreFunction.SIGMOID,
        selection_bias=SelectionBias.ON_SCORE,
        groups=group_limit(config, GroupScore.TOP2_SUM, dropped),
        renormalize=renormalization(config),
        epsilon=1e-20,
        scale=read(config, SCALE),
        scale_on=scale_on,
        native=FP32,
    )


@family("afmoe", native=FP32_SCORES)
@family("dots3_note_vision_encoder", "hy_v3")
@family("minimax_m2", scale_from=(), epsilon=0.0, native=FP32_SCORES)
@family("minimax_m3_vl_text", scale_on=ScaleOn.OUTPUT, epsilon=0.0, native=FP32_SCORES)
@family(
    "step3p5",
    "step3p7",
    scale_from="moe_router_scaling_factor",
    scale_on=ScaleOn.OUTPUT,
    epsilon=0.0,
    native=FP32_SCORES,
)
def sigmoid_renormalized(
    config: Any,
    layer_index: int,
    *,
    scale_from: str | tuple[str, ...] = SCALE,
    scale_on: ScaleOn = ScaleOn.WEIGHTS,
    epsilon: float = 1e-20,
    native: NativeGate = FP32,
) -> RoutingConfig:
    """A bias on the choice, no groups, weights that always sum to one."""
    return base(
        config,
        score=ScoreFunction.SIGMOID,
        selection_bias=SelectionBias.ON_SCORE,
        renormalize=Renormalize.SUM,
        epsilon=epsilon,
        scale=read(config, scale_from) if scale_from else 1.0,
        scale_on=scale_on,
        native=native,
    )


@family("laguna")
def laguna(config: Any, layer_index: int) -> RoutingConfig:
    """Soft-capped logits; a cap of 0 is none."""
    rule = sigmoid_renormalized(
        config,
        layer_index,
        scale_from="moe_routed_scaling_factor",
        scale_on=ScaleOn.OUTPUT,
        epsilon=0.0,
        native=FP32_SCORES_ONLY,
    )
    softcap = read(config, "moe_router_logit_softcapping")
    return replace(rule, logit_softcap=softcap if softcap > 0 else None)


@family("muse_spark_text")
def muse_spark(config: Any, layer_index: int) -> RoutingConfig:
    """Logits are multiplied by a constant."""
    rule = sigmoid_renormalized(config, layer_index, epsilon=1e-15)
    return replace(rule, logit_multiplier=read(config, "output_multiplier"))


@family("lfm2_moe")
def lfm2_moe(config: Any, layer_index: int) -> RoutingConfig:
    """The bias is optional."""
    has_bias = read(config, "use_expert_bias")
    return base(
        config,
        score=ScoreFunction.SIGMOID,
        selection_bias=SelectionBias.ON_SCORE if has_bias else SelectionBias.NONE,
        renormalize=renormalization(config),
        epsilon=1e-6,
        scale=read(config, SCALE),
        native=MODEL_DTYPE,
    )


class RouterScore(Choice):
    """The scores that Param2MoE and Sarvam name."""

    SIGMOID = "sigmoid"
    SOFTMAX = "softmax"


class RouterDtype(Choice):
    """What a Sarvam gate computes in: fp32, or the dtype of a model that is in bf16."""

    FP32 = "fp32"
    BF16 = "bf16"

    @classmethod
    def of(cls, config: Any) -> RouterDtype:
        """What a configuration says; fp32 where it says nothing."""
        named = getattr(config, "router_dtype", None)
        return cls.FP32 if named is None else cls.parse(named)


@family("param2moe", "sarvam_mla", "sarvam_moe")
def optional_parts(config: Any, layer_index: int) -> RoutingConfig:
    """A bias where there is one, and groups where both of their keys are there."""
    has_bias = read(config, "moe_router_enable_expert_bias")
    has_groups = None not in (getattr(config, name, None) for name in ("n_group", "topk_group"))
    score = GroupScore.TOP2_SUM if has_bias else GroupScore.MAX
    return base(
        config,
        score=ScoreFunction.parse(RouterScore.parse(read(config, "score_function")).value),
        selection_bias=SelectionBias.ON_SCORE if has_bias else SelectionBias.NONE,
        groups=group_limit(config, score) if has_groups else None,
        renormalize=renormalization(config),
        epsilon=1e-20,
        scale=read(config, SCALE),
        native=FP32 if RouterDtype.of(config) is RouterDtype.FP32 else FP32_SCORES,
    )


class NamedScore(Choice):
    """The scores that a configuration may name."""

    SIGMOID = "sigmoid"
    SQRT_SOFTPLUS = "sqrtsoftplus"


@family("deepseek_v4", native=MODEL_DTYPE)
@family("inkling2_text", native=FP32)
def named_score(config: Any, layer_index: int, *, native: NativeGate) -> RoutingConfig:
    """The configuration names the score; DeepSeek-V4's first layers choose by token id."""
    layer_types = getattr(config, "mlp_layer_types", None) or ()
    is_hash = layer_index < len(layer_types) and layer_types[layer_index] == "hash_moe"
    return base(
        config,
        score=ScoreFunction.parse(NamedScore.parse(read(config, "scoring_func")).value),
        selection_bias=SelectionBias.NONE if is_hash else SelectionBias.ON_SCORE,
        hash_routing=is_hash,
        renormalize=Renormalize.SUM,
        epsilon=1e-20,
        scale=read(config, SCALE),
        native=native,
    )


@family("kolibri1", selection_bias=SelectionBias.ON_LOGIT)
@family("flint", selection_bias=SelectionBias.NONE)
def sigmoid_flagged(
    config: Any, layer_index: int, *, selection_bias: SelectionBias
) -> RoutingConfig:
    """No scale, and a flag for renormalization."""
    return base(
        config,
        score=ScoreFunction.SIGMOID,
        selection_bias=selection_bias,
        renormalize=renormalization(config),
        native=FP32,
    )


# --------------------------------------------------------------------------- softmax, then top-k


@family(
    "flex_olmo",
    "mellum",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_omni_moe_talker_text",
    "qwen3_omni_moe_text",
    "qwen4_exp_text",
)
@family("qwen3_5_moe_text", "qwen3_vl_moe_text", renormalize=Renormalize.SUM)
@family("jamba", renormalize=Renormalize.NONE)
@family("minimax", "mixtral", renormalize=Renormalize.SUM, native=FP32_SCORES)
def softmax_top_k(
    config: Any,
    layer_index: int,
    *,
    renormalize: Renormalize | None = None,
    native: NativeGate = FP32_SCORES_ONLY,
) -> RoutingConfig:
    """The softmax over all experts; without `renormalize` the configuration's flag counts."""
    if renormalize is None:
        renormalize = renormalization(config)
    return base(config, renormalize=renormalize, native=native)


@family("diffusion_gemma_text", "gemma4_text")
def scaled_by_expert(config: Any, layer_index: int) -> RoutingConfig:
    """Renormalized weights, then a learned factor for each expert."""
    return base(config, renormalize=Renormalize.SUM, per_expert_scale=True, native=FP32_SCORES)


@family("hunyuan_v1_moe")
def hunyuan_v1_moe(config: Any, layer_index: int) -> RoutingConfig:
    """Either size may be a list with one entry per layer."""
    sizes = {"num_experts": read(config, NUM_EXPERTS), "top_k": read(config, TOP_K)}
    for name, size in sizes.items():
        if not isinstance(size, int):
            sizes[name] = size[layer_index]
    return base(config, renormalize=Renormalize.SUM, native=FP32, **sizes)


@family("ernie4_5_moe", "ernie4_5_vl_moe_text")
def ernie4_5_moe(config: Any, layer_index: int) -> RoutingConfig:
    """A bias on the choice; of the vision variant this is the rule of either set of experts."""
    return base(
        config,
        selection_bias=SelectionBias.ON_SCORE,
        renormalize=Renormalize.CLAMPED_SUM,
        epsilon=read(config, "moe_norm_min"),
        native=FP32_UNTIL_WEIGHTS,
    )


class TopKMethod(Choice):
    """DeepSeek-V2's two ways to choose."""

    GREEDY = "greedy"
    GROUP_LIMITED_GREEDY = "group_limited_greedy"


@family("deepseek_ocr2_text", "deepseek_v2", "unlimited_ocr_text")
def deepseek_v2(config: Any, layer_index: int) -> RoutingConfig:
    """The experts of the best groups, each group scored by its best; no renormalization."""
    method = TopKMethod.parse(read(config, "topk_method"))
    in_groups = method is TopKMethod.GROUP_LIMITED_GREEDY
    return base(
        config,
        groups=group_limit(config, GroupScore.MAX, DroppedGroup.ZERO) if in_groups else None,
        scale=read(config, SCALE),
        native=FP32,
    )


@family("mistral4", native=MODEL_DTYPE)
@family("mistral_large4_text", renormalize=Renormalize.SUM, native=FP32)
def softmax_in_groups(
    config: Any, layer_index: int, *, renormalize: Renormalize | None = None, native: NativeGate
) -> RoutingConfig:
    """DeepSeek-V3's groups over a softmax, without a bias."""
    return base(
        config,
        groups=group_limit(config, GroupScore.TOP2_SUM, DroppedGroup.ZERO),
        renormalize=renormalization(config) if renormalize is None else renormalize,
        epsilon=1e-20,
        scale=read(config, SCALE),
        native=native,
    )


@family("longcat_flash")
def longcat_flash(config: Any, layer_index: int) -> RoutingConfig:
    """A bias on the choice; the experts after the routed ones return their input."""
    count = getattr(config, "zero_expert_num", None) or 0
    return base(
        config,
        selection_bias=SelectionBias.ON_SCORE,
        scale=read(config, SCALE),
        no_compute=NoComputeExperts(kind=NoComputeKind.IDENTITY, count=count) if count else None,
        native=FP32,
    )


@family("dbrx")
def dbrx(config: Any, layer_index: int) -> RoutingConfig:
    """Weights are divided by their p-norm; the sizes stand in a configuration of their own."""
    experts = read(config, "ffn_config")
    p_norm = getattr(experts, "moe_normalize_expert_weights", None)
    norm = {} if p_norm is None else {"renormalize": Renormalize.P_NORM, "p_norm": p_norm}
    return base(experts, native=MODEL_DTYPE, **norm)


# --------------------------------------------------------------------------- top-k, then scores


@family("aria_text", "gpt_oss", native=MODEL_DTYPE)
@family(
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "jetmoe",
    native=FP32_SCORES_ONLY,
)
@family("openai_privacy_filter", native=FP32)
def top_k_softmax(config: Any, layer_index: int, *, native: NativeGate) -> RoutingConfig:
    """The softmax over the chosen experts.

    The privacy filter's router divides by K and its layer multiplies by K: that is this rule.
    """
    return base(config, score_order=ScoreOrder.AFTER_TOP_K, native=native)


class SelectionFunction(Choice):
    """Cohere's two scores."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


@family("cohere2_moe")
def cohere2_moe(config: Any, layer_index: int) -> RoutingConfig:
    """The flag for renormalization counts for sigmoids only."""
    function = SelectionFunction.parse(read(config, "expert_selection_fn"))
    if function is SelectionFunction.SOFTMAX:
        return top_k_softmax(config, layer_index, native=FP32_SCORES_ONLY)
    return base(
        config,
        score=ScoreFunction.SIGMOID,
        score_order=ScoreOrder.AFTER_TOP_K,
        renormalize=renormalization(config),
        native=MODEL_DTYPE,
    )


@family("llama4_text")
def llama4(config: Any, layer_index: int) -> RoutingConfig:
    """The weight multiplies the expert's input."""
    return base(
        config,
        score=ScoreFunction.SIGMOID,
        score_order=ScoreOrder.AFTER_TOP_K,
        weight_on=WeightOn.INPUT,
        native=FP32_SCORES_ONLY,
    )


@family("phimoe")
def phimoe(config: Any, layer_index: int) -> RoutingConfig:
    """Sparsemixer; the window's width is called jitter."""
    return base(
        config,
        score=ScoreFunction.SPARSEMIXER,
        jitter=read(config, "router_jitter_noise"),
        native=MODEL_DTYPE,
    )


RoutingConfig.HF_NOT_COVERED.update(NOT_COVERED)
