"""Tiny checkpoints of families that Transformers does not ship, in their own names and keys."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from oracles import bailing, sarvam_mla, step3p5
from oracles.parts import CORRECTION
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "rms_norm_eps": 1e-2,  # so large that another one shows
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": None,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
LATENT: dict[str, Any] = {
    **SIZES,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "head_dim": 20,  # the width of the cache, as files have it
}
SLIDING = ["full_attention", "sliding_attention", "sliding_attention"]
BASES: dict[str, dict[str, Any]] = {
    "param2moe": {"model_type": "param2moe", "architectures": ["Param2MoEForCausalLM"], **GROUPED},
    "sarvam_moe": {
        "model_type": "sarvam_moe",
        "architectures": ["SarvamMoEForCausalLM"],
        **GROUPED,
    },
    "sarvam_mla": {
        "model_type": "sarvam_mla",
        "architectures": ["SarvamMLAForCausalLM"],
        **LATENT,
    },
    "step3p5": {
        "model_type": "step3p5",
        "architectures": ["Step3p5ForCausalLM"],
        **{key: value for key, value in SIZES.items() if not key.startswith("num_experts")},
        "head_dim": 8,
        "num_attention_groups": 2,
        "layer_types": SLIDING,
        "sliding_window": 4,
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "num_attention_heads": 6,
        },
        "rope_theta": [5000.0, 100.0, 100.0],
        "partial_rotary_factors": [0.5, 1.0, 1.0],
        "moe_layers_enum": "1,2",
        "moe_num_experts": 8,
        "moe_top_k": 3,
        "share_expert_dim": 24,
        "moe_router_scaling_factor": 1.5,
        "swiglu_limits": [0.0, 0.0, 0.3],
        "swiglu_limits_shared": [0.0, 0.4, 0.0],
    },
}
"""What a config.json of each family must have: nothing that has a default."""

ORACLES: dict[str, ModuleType] = {
    "param2moe": bailing,
    "sarvam_moe": bailing,
    "sarvam_mla": sarvam_mla,
    "step3p5": step3p5,
}
YARN = {
    "type": "deepseek_yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 1.5,
}
GATE = {"n_group": 4, "topk_group": 2}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in BASES},
    "norms and biases": (
        "param2moe",
        {"use_qk_norm": True, "use_qkv_bias": True, "use_bias": True},
    ),
    "half of a head turns": ("param2moe", {"head_dim": 12, "partial_rotary_factor": 0.5}),
    "positions are stretched": ("param2moe", {"rope_scaling": {"type": "linear", "factor": 3.0}}),
    "yarn": (
        "param2moe",
        {
            "rope_theta": 500.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "groups": ("param2moe", GATE),
    "groups, half said": ("param2moe", {"n_group": 4}),
    "groups, the other half": ("param2moe", {"topk_group": 2}),
    "groups without a bias": ("param2moe", {**GATE, "moe_router_enable_expert_bias": False}),
    "no bias": ("param2moe", {"moe_router_enable_expert_bias": False}),
    "weights as they are": (
        "param2moe",
        {"norm_topk_prob": False, "routed_scaling_factor": 1.7},
    ),
    "softmax": ("param2moe", {"score_function": "softmax"}),
    "all layers sparse": ("param2moe", {"first_k_dense_replace": 0}),
    "two layers dense": ("param2moe", {"first_k_dense_replace": 2}),
    "two shared experts": ("param2moe", {"num_shared_experts": 2}),
    "a total width": (
        "param2moe",
        {"num_shared_experts": 2, "moe_shared_expert_intermediate_size": 28},
    ),
    "no shared experts": ("param2moe", {"num_shared_experts": 0}),
    "tied": ("param2moe", {"tie_word_embeddings": True}),
    "a width of each": (
        "sarvam_moe",
        {"num_shared_experts": 2, "moe_shared_expert_intermediate_size": 28},
    ),
    "the usual name of the bias": ("sarvam_moe", {"use_qk_norm": False}),
    "grouped latent": ("sarvam_mla", GATE),
    "queries of low rank": ("sarvam_mla", {"q_lora_rank": 12}),
    "deepseek_yarn": ("sarvam_mla", {"rope_theta": 500.0, "rope_scaling": YARN}),
    "deepseek_yarn that stretches nothing": (
        "sarvam_mla",
        {"rope_scaling": {**YARN, "factor": 1.0}},
    ),
    "every other layer": ("sarvam_mla", {"num_hidden_layers": 4, "moe_layer_freq": 2}),
    "latent, a width of each": (
        "sarvam_mla",
        {"num_shared_experts": 2, "moe_shared_expert_intermediate_size": 28},
    ),
}
"""A family and what its config.json has besides."""

NUM_TOKENS = 8
IDS = torch.randint(3, 96, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Stored:
    """What the files of a checkpoint hold."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def write(self, directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config), encoding="utf-8")
        save_file(dict(self.tensors), directory / "model.safetensors", metadata={"format": "pt"})
        return directory


@functools.cache
def stored(variant: str) -> Stored:
    """A checkpoint of random weights, in which a wrong expert, scale or bias shows."""
    family, values = VARIANTS[variant]
    config = {**BASES[family], **values}
    renamed = {"bias": CORRECTION} if variant == "the usual name of the bias" else {}
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in ORACLES[family].shapes(config, **renamed).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            noise = (0.0 if family == "step3p5" else 1.0) + 0.1 * noise
        elif name.endswith("bias"):
            noise = 0.2 * noise + (0.0 if family == "step3p5" else 0.5)
        else:
            noise = noise * (2.0 if ".gate.weight" in name else 1.2) / shape[-1] ** 0.5
        tensors[name] = noise
    return Stored(config, tensors)


@functools.cache
def oracle_logits(variant: str) -> Tensor:
    """(B,T,V) in float64, of a second implementation."""
    family, _ = VARIANTS[variant]
    checkpoint = stored(variant)
    found = [ORACLES[family].logits(checkpoint.config, checkpoint.tensors, ids) for ids in IDS]
    return torch.stack(found)


NUM_ROUTED, NUM_ZERO = 8, 4
"""Experts of a LongCat-Flash layer: those that compute, and those that return their input."""


@torch.no_grad()
def write_longcat(directory: Path) -> Tensor:
    """Write a LongCat-Flash checkpoint without weights for zero experts.

    Returns:
        The logits of the model that was written, (B,T,V).
    """
    config = LongcatFlashConfig(
        vocab_size=96,
        hidden_size=32,
        num_layers=2,
        ffn_hidden_size=40,
        expert_ffn_hidden_size=24,
        n_routed_experts=NUM_ROUTED,
        zero_expert_num=NUM_ZERO,
        moe_topk=3,
        num_attention_heads=4,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        head_dim=8,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = LongcatFlashForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0, 0.3, generator=generator)
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    zero = [f".experts.{NUM_ROUTED + expert}." for expert in range(NUM_ZERO)]
    kept = {n: t for n, t in tensors.items() if not any(part in n for part in zero)}
    assert len(tensors) - len(kept) == 2 * 2 * NUM_ZERO  # gates and ups of two layers
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    logits: Tensor = model(IDS).logits
    return logits
