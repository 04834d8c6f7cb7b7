"""The decoder of Param2MoE, Sarvam-MoE and Sarvam-MLA, all but attention: what they share.

    hidden = hidden + attention(norm(hidden)); hidden = hidden + mlp(norm(hidden))

The parts whose arithmetic is DeepSeek-V3's are Transformers' own.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3ForCausalLM,
    DeepseekV3MLP,
    DeepseekV3Model,
    DeepseekV3PreTrainedModel,
    DeepseekV3RMSNorm,
)
from transformers.utils.output_capturing import OutputRecorder

from mixtura.routing.families import RouterDtype, RouterScore


@strict
class SigmoidMoEConfig(PreTrainedConfig):  # type: ignore[misc]
    """Keys that the three families share; what config.json lacks is as here.

    Attributes:
        first_k_dense_replace: layers before this one are dense, of width `intermediate_size`.
        n_group, topk_group: experts are chosen in groups where both are there.
        moe_router_enable_expert_bias: whether a learned bias takes part in the choice.
        router_dtype: "fp32" for logits in fp32 in a model of any dtype, "bf16" for its own dtype.
        moe_shared_expert_intermediate_size: see `shared_width`.
    """

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    base_model_tp_plan: ClassVar[dict[str, str]] = DeepseekV3Config.base_model_tp_plan
    base_model_ep_plan: ClassVar[dict[str, str]] = DeepseekV3Config.base_model_ep_plan
    base_model_pp_plan: ClassVar[dict[str, Any]] = DeepseekV3Config.base_model_pp_plan
    attribute_map: ClassVar[dict[str, str]] = {"num_local_experts": "num_experts"}

    vocab_size: int = 262144
    hidden_size: int = 4096
    intermediate_size: int = 16384
    moe_intermediate_size: int = 2048
    moe_shared_expert_intermediate_size: int | None = None
    num_hidden_layers: int = 32
    num_attention_heads: int = 64
    num_experts: int = 128
    num_experts_per_tok: int = 8
    num_shared_experts: int = 1
    first_k_dense_replace: int = 1
    n_group: int | None = None
    topk_group: int | None = None
    norm_topk_prob: bool = True
    score_function: str = "sigmoid"
    moe_router_enable_expert_bias: bool = True
    router_dtype: str | None = None
    routed_scaling_factor: float | int = 1.0
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    attention_dropout: float | int = 0.0
    use_cache: bool = True
    output_router_logits: bool = False
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    rope_parameters: dict[str, Any] | None = None

    def is_sparse(self, layer_idx: int) -> bool:
        """Whether a layer has experts."""
        return layer_idx >= self.first_k_dense_replace

    @property
    def groups(self) -> tuple[int, int] | None:
        """How many groups of experts there are, and how many of them a token chooses from."""
        if self.n_group is None or self.topk_group is None:
            return None
        return self.n_group, self.topk_group

    @property
    def shared_width(self) -> int:
        """Width of the MLP that stands for all shared experts: that of one times their number."""
        one = self.moe_shared_expert_intermediate_size
        return (self.moe_intermediate_size if one is None else one) * self.num_shared_experts


class SigmoidRouter(nn.Module):
    """Chooses experts by their score and a learned bias, in groups where there are any.

        scores = f(x W^T); ids = top_k(scores + bias, in the best groups)
        weights = scale * scores[ids] / sum(scores[ids])

    A group is scored by its two best experts with a bias, and by its best without. Returns logits
    (T,E), weights (T,K) and ids (T,K).
    """

    def __init__(self, config: SigmoidMoEConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_experts
        self.num_groups, self.topk_groups = config.groups or (1, 1)
        self.score = RouterScore.parse(config.score_function)
        self.is_fp32 = RouterDtype.of(config) is RouterDtype.FP32
        self.renormalizes = config.norm_topk_prob
        self.scale = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        has_bias = config.moe_router_enable_expert_bias
        self.e_score_correction_bias = (
            nn.Buffer(torch.zeros(config.num_experts)) if has_bias else None
        )

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route (..., H) rows."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.is_fp32:
            logits = F.linear(rows.float(), self.weight.float())
        else:
            logits = F.linear(rows, self.weight.to(rows.dtype))
        is_sigmoid = self.score is RouterScore.SIGMOID
        scores = logits.float().sigmoid() if is_sigmoid else logits.float().softmax(-1)
        bias = self.e_score_correction_bias
        choice = self._in_groups(scores if bias is None else scores + bias)
        ids = choice.topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, ids)
        if self.renormalizes:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return logits, weights * self.scale, ids

    def _in_groups(self, choice: Tensor) -> Tensor:
        """-inf for the experts of all but the best groups. (T,E) -> (T,E)."""
        if self.topk_groups == self.num_groups:
            return choice
        groups = choice.view(len(choice), self.num_groups, -1)
        num_best = 1 if self.e_score_correction_bias is None else 2
        kept = groups.topk(num_best, dim=-1).values.sum(-1).topk(self.topk_groups, dim=-1).indices
        dropped = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(1, kept, False)
        return groups.masked_fill(dropped.unsqueeze(-1), float("-inf")).view(choice.shape)


class RoutedMoE(nn.Module):
    """Routed experts alone: (B,T,H) -> (B,T,H)."""

    def __init__(self, config: SigmoidMoEConfig, experts: nn.Module) -> None:
        super().__init__()
        self.gate = SigmoidRouter(config)
        self.experts = experts

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The weighted sum of each token's experts."""
        _, weights, ids = self.gate(hidden_states)
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        routed: Tensor = self.experts(rows, ids, weights)
        return routed.view(hidden_states.shape)


class SharedMoE(RoutedMoE):
    """Routed experts and, as one MLP, shared ones: (B,T,H) -> (B,T,H)."""

    def __init__(self, config: SigmoidMoEConfig, experts: nn.Module) -> None:
        super().__init__(config, experts)
        self.shared_experts = DeepseekV3MLP(config, config.shared_width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The weighted sum of each token's experts, and the shared ones' output."""
        shared: Tensor = self.shared_experts(hidden_states)
        return super().forward(hidden_states) + shared


class SigmoidMoEDecoderLayer(DeepseekV3DecoderLayer):  # type: ignore[misc]
    """A pre-norm layer around an attention, and around experts or, without any, a dense MLP."""

    def __init__(
        self, config: SigmoidMoEConfig, attention: nn.Module, experts: nn.Module | None
    ) -> None:
        GradientCheckpointingLayer.__init__(self)  # DeepSeek's would build its own parts
        self.hidden_size = config.hidden_size
        self.self_attn = attention
        if experts is None:
            self.mlp = DeepseekV3MLP(config)
        else:
            self.mlp = (SharedMoE if config.shared_width else RoutedMoE)(config, experts)
        self.input_layernorm = DeepseekV3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekV3RMSNorm(config.hidden_size, config.rms_norm_eps)


class SigmoidMoEPreTrainedModel(DeepseekV3PreTrainedModel):  # type: ignore[misc]
    """What the families' models have in common with DeepSeek-V3's, but for the router."""

    config_class = SigmoidMoEConfig
    _no_split_modules: ClassVar[list[str]] = ["SigmoidMoEDecoderLayer"]
    _keys_to_ignore_on_load_unexpected = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SigmoidRouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)


class SigmoidMoEModel(SigmoidMoEPreTrainedModel, DeepseekV3Model):  # type: ignore[misc]
    """The decoder of a family, which names its parts.

    Attributes:
        attention, experts, rotary: classes; of an attention `(config, layer_idx)`, of the others
            `(config)`.
    """

    attention: ClassVar[type[nn.Module]]
    experts: ClassVar[type[nn.Module]]
    rotary: ClassVar[type[nn.Module]]

    def __init__(self, config: SigmoidMoEConfig) -> None:
        PreTrainedModel.__init__(self, config)  # DeepSeek's would build its own layers
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            SigmoidMoEDecoderLayer(
                config,
                self.attention(config, index),
                self.experts(config) if config.is_sparse(index) else None,
            )
            for index in range(config.num_hidden_layers)
        )
        self.norm = DeepseekV3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = self.rotary(config)
        self.gradient_checkpointing = False
        self.post_init()


class SigmoidMoEForCausalLM(SigmoidMoEPreTrainedModel, DeepseekV3ForCausalLM):  # type: ignore[misc]
    """A family's decoder, and the output head."""

    decoder: ClassVar[type[SigmoidMoEModel]]

    def __init__(self, config: SigmoidMoEConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = self.decoder(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def recorded(attention: type[nn.Module]) -> dict[str, Any]:
    """What a family's model can give out beside its result."""
    return {
        "hidden_states": SigmoidMoEDecoderLayer,
        "attentions": attention,
        "router_logits": OutputRecorder(SigmoidRouter, index=0),
    }
