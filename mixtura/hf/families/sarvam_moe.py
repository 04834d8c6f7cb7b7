"""Sarvam-MoE: the decoder of Bailing-MoE (Ling), which is Param2MoE's with other shared experts.

Source: vLLM's `sarvam.py` and `bailing_moe.py`, as arithmetic.
"""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers.integrations import use_experts_implementation
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

from mixtura.hf.families.param2moe import (
    Param2MoEConfig,
    Param2MoEForCausalLM,
    Param2MoEModel,
)
from mixtura.hf.families.sigmoid_moe import SigmoidMoEConfig


@strict
class SarvamMoEConfig(Param2MoEConfig):
    """Configuration of a `sarvam_moe` checkpoint."""

    model_type = "sarvam_moe"

    vocab_size: int = 262144
    hidden_size: int = 4096
    intermediate_size: int = 8192
    moe_intermediate_size: int = 1024
    num_hidden_layers: int = 19
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    num_experts: int = 128
    routed_scaling_factor: float | int = 2.5
    use_qk_norm: bool = True

    shared_width = SigmoidMoEConfig.shared_width


@use_experts_implementation
class SarvamMoEExperts(DeepseekV3Experts):  # type: ignore[misc]
    """All experts of a layer, in stacks."""


class SarvamMoEModel(Param2MoEModel):
    """The decoder."""

    config_class = SarvamMoEConfig
    experts = SarvamMoEExperts


class SarvamMoEForCausalLM(Param2MoEForCausalLM):
    """The decoder and the output head."""

    config_class = SarvamMoEConfig
    decoder = SarvamMoEModel
