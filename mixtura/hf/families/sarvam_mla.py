"""Sarvam-MLA: multi-head latent attention as in DeepSeek-V3.

Source: vLLM's `sarvam.py`, as arithmetic.
"""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.integrations import use_experts_implementation
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3Experts,
    DeepseekV3RotaryEmbedding,
)

from mixtura.hf.families.sigmoid_moe import (
    SigmoidMoEConfig,
    SigmoidMoEForCausalLM,
    SigmoidMoEModel,
    recorded,
)


@strict
class SarvamMLAConfig(SigmoidMoEConfig):
    """Configuration of a `sarvam_mla` checkpoint.

    Attributes:
        moe_layer_freq: of the layers from `first_k_dense_replace` on, one in so many has experts.
        q_lora_rank: rank of the queries' projection; None for a plain one.
    """

    model_type = "sarvam_mla"

    num_key_value_heads: int | None = None
    q_lora_rank: int | None = None
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    attention_bias: bool = False
    rope_interleave: bool = True
    n_group: int | None = 1
    topk_group: int | None = 1
    moe_layer_freq: int = 1
    routed_scaling_factor: float | int = 2.5

    def __post_init__(self, **kwargs: Any) -> None:
        # Latent attention has a key head for every query head, whatever a file says; what is
        # rotated is as wide as `qk_rope_head_dim`, where files give the width of the cache.
        self.num_key_value_heads = self.num_attention_heads
        kwargs["head_dim"] = self.qk_rope_head_dim
        super().__post_init__(**kwargs)

    def is_sparse(self, layer_idx: int) -> bool:
        """Whether a layer has experts."""
        after = layer_idx - self.first_k_dense_replace
        return after >= 0 and after % self.moe_layer_freq == 0

    def _validate_deepseek_yarn_rope_parameters(
        self, rope_parameters: dict[str, Any], ignore_keys: set[str] | None = None
    ) -> None:
        self._validate_yarn_rope_parameters(rope_parameters, ignore_keys)


ROPE_INIT_FUNCTIONS["deepseek_yarn"] = ROPE_INIT_FUNCTIONS["yarn"]


class SarvamMLAAttention(DeepseekV3Attention):  # type: ignore[misc]
    """DeepSeek-V3's attention; norms of latents have the epsilon that config.json gives."""

    def __init__(self, config: SarvamMLAConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        for norm in (self.q_a_layernorm, self.kv_a_layernorm):
            if norm is not None:
                norm.variance_epsilon = config.rms_norm_eps


@use_experts_implementation
class SarvamMLAExperts(DeepseekV3Experts):  # type: ignore[misc]
    """All experts of a layer, in stacks."""


class SarvamMLAModel(SigmoidMoEModel):
    """The decoder."""

    config_class = SarvamMLAConfig
    attention = SarvamMLAAttention
    experts = SarvamMLAExperts
    rotary = DeepseekV3RotaryEmbedding
    _can_record_outputs: ClassVar[dict[str, Any]] = recorded(SarvamMLAAttention)


class SarvamMLAForCausalLM(SigmoidMoEForCausalLM):
    """The decoder and the output head."""

    config_class = SarvamMLAConfig
    decoder = SarvamMLAModel
