"""Param2MoE: grouped-query attention with one matrix for queries, keys and values.

Source: vLLM's `param2moe.py`, as arithmetic.
"""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.integrations import use_experts_implementation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Experts,
    DeepseekV3RMSNorm,
)
from transformers.models.glm4_moe.modeling_glm4_moe import (
    Glm4MoeRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from mixtura.hf.families.sigmoid_moe import (
    SigmoidMoEConfig,
    SigmoidMoEForCausalLM,
    SigmoidMoEModel,
    recorded,
)


@strict
class Param2MoEConfig(SigmoidMoEConfig):
    """Configuration of a `param2moe` checkpoint.

    Attributes:
        use_qk_norm: every head's queries and keys are normed before they are rotated.
        use_qkv_bias, use_bias: whether the projections into attention, and out of it, have a bias.
    """

    model_type = "param2moe"

    vocab_size: int = 128008
    hidden_size: int = 2048
    intermediate_size: int = 9216
    num_hidden_layers: int = 21
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int | None = None
    num_experts: int = 64
    num_experts_per_tok: int = 6
    use_qk_norm: bool = False
    use_qkv_bias: bool = False
    use_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)

    @property
    def shared_width(self) -> int:
        """Width of the shared MLP: unlike the other families' key, this one's is of all of it."""
        total = self.moe_shared_expert_intermediate_size
        if total is None or not self.num_shared_experts:
            return self.moe_intermediate_size * self.num_shared_experts
        return total


class FusedAttention(nn.Module):
    """Grouped-query attention; rows of its one projection are queries, then keys, then values."""

    def __init__(self, config: Param2MoEConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_kv_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        width = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, width, bias=config.use_qkv_bias)
        self.o_proj = nn.Linear(
            self.num_heads * self.head_dim, config.hidden_size, bias=config.use_bias
        )
        if config.use_qk_norm:
            self.query_layernorm = DeepseekV3RMSNorm(self.head_dim, config.rms_norm_eps)
            self.key_layernorm = DeepseekV3RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B,T,H) -> (B,T,H), and the attention weights where the implementation has them."""
        batch = hidden_states.shape[:-1]
        heads = self.query_key_value(hidden_states).view(*batch, -1, self.head_dim)
        query, key, value = heads.split([self.num_heads, *[self.num_kv_heads] * 2], dim=-2)
        if self.config.use_qk_norm:
            query, key = self.query_layernorm(query), self.key_layernorm(key)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **others,
        )
        return self.o_proj(out.reshape(*batch, -1)), weights


@use_experts_implementation
class Param2MoEExperts(DeepseekV3Experts):  # type: ignore[misc]
    """All experts of a layer, in stacks."""


class Param2MoEModel(SigmoidMoEModel):
    """The decoder."""

    config_class = Param2MoEConfig
    attention = FusedAttention
    experts = Param2MoEExperts
    rotary = Glm4MoeRotaryEmbedding
    _can_record_outputs: ClassVar[dict[str, Any]] = recorded(FusedAttention)


class Param2MoEForCausalLM(SigmoidMoEForCausalLM):
    """The decoder and the output head."""

    config_class = Param2MoEConfig
    decoder = Param2MoEModel
