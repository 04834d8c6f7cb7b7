"""A Transformers configuration from the keys of a GGUF file.

The keys say most of it. Where a size is that of a tensor, the tensor is asked. What llama.cpp knows
by the architecture's name alone (whether the weights of chosen experts are normalized) is a
constant here. Transformers has such a reader for some of these; it knows neither OLMoE nor
DeepSeek, makes Mixtral a dense Llama, and leaves out the sizes of experts.

Source: `set_gguf_parameters` of llama.cpp's converters and the loaders of its models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from mixtura.errors import CheckpointError, UnsupportedModel
from mixtura.quant.gguf_file import GgufFile

_SIGMOID = 2
"""`expert_gating_func` of models whose router scores are sigmoids; 1 is softmax."""

_YARN_LOG_FACTOR = 0.1
"""DeepSeek's `mscale_all_dim` is stored times this."""

_TOKENS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


@dataclass(frozen=True)
class Keys:
    """The keys of a file's architecture, checked as they are read.

    Attributes:
        file: what they are read from. architecture: what they begin with.
    """

    file: GgufFile
    architecture: str

    def get(self, name: str) -> Any:
        """A value, or None; one that is stored for every layer must be the same for all."""
        value = self.file.metadata.get(f"{self.architecture}.{name}")
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise self._error(name, value, "be the same for all layers")
            value = value[0]
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.get(name)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 2**31:
            raise self._error(name, value, "be a positive integer below 2 ** 31")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < inf:
            raise self._error(name, value, "be a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A boolean."""
        value = self.get(name)
        value = default if value is None else value
        if type(value) is not bool:
            raise self._error(name, value, "be true or false")
        return value

    def has(self, tensor: str) -> bool:
        """Whether any layer has a tensor of this name."""
        return any(name.endswith(f".{tensor}") for name in self.file.tensors)

    def columns(self, tensor: str, default: int | None = None) -> int:
        """K of a tensor of any layer.

        Raises:
            CheckpointError: no layer has it, and there is no default.
        """
        for name, found in self.file.tensors.items():
            if name.endswith(f".{tensor}"):
                return found.shape[-1]
        if default is None:
            raise CheckpointError(
                f"{self.file.paths[0]} must hold blk.N.{tensor} for an MoE model; got none. Fetch "
                f"the file again, or run the model with Transformers alone."
            )
        return default

    def _error(self, name: str, value: object, rule: str) -> CheckpointError:
        got = "none" if value is None else repr(value)[:80]
        return CheckpointError(
            f"{self.architecture}.{name} ({got}) in {self.file.paths[0]} must {rule}; got {got}. "
            f"Fetch the file again."
        )


def config_arguments(file: GgufFile) -> dict[str, Any]:
    """What makes the model's Transformers configuration, with its `model_type`.

    Raises:
        UnsupportedModel: the architecture is not known, or the file asks for what it does not have.
        CheckpointError: a key is missing, or has an impossible value.
    """
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _FAMILIES:
        raise UnsupportedModel(
            f"general.architecture ({architecture!r}) in {file.paths[0]} must be one of "
            f"{', '.join(_FAMILIES)}; got another. Use the model's safetensors checkpoint."
        )
    keys = Keys(file, architecture)
    if not keys.get("expert_count"):
        raise UnsupportedModel(
            f"the model ({architecture}) in {file.paths[0]} must have an MoE layer; got no "
            f"{architecture}.expert_count. Run it with Transformers alone."
        )
    return _common(keys) | _FAMILIES[architecture](keys)


def _common(keys: Keys) -> dict[str, Any]:
    embedding = keys.file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(
            f"{keys.file.paths[0]} must hold token_embd.weight, a matrix; got none. Fetch the file "
            f"again: a vocabulary alone is no model."
        )
    heads = keys.integer("attention.head_count")
    tokens = {name: keys.file.metadata.get(key) for name, key in _TOKENS.items()}
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": keys.integer("embedding_length"),
        "num_hidden_layers": _num_layers(keys),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(keys),
        "num_experts_per_tok": keys.integer("expert_used_count"),
        "tie_word_embeddings": "output.weight" not in keys.file.tensors,
        **{name: token if type(token) is int else None for name, token in tokens.items()},
    }


def _num_layers(keys: Keys) -> int:
    """Decoder layers, without those of multi-token prediction that follow them."""
    blocks, predicting = keys.integer("block_count"), keys.get("nextn_predict_layers")
    predicting = predicting if type(predicting) is int else 0
    if not 0 <= predicting < blocks or blocks - predicting > len(keys.file.tensors):
        raise CheckpointError(
            f"{keys.architecture}.block_count ({blocks}, {predicting} of them for multi-token "
            f"prediction) in {keys.file.paths[0]} must count layers that are there; got "
            f"{len(keys.file.tensors)} tensors. Fetch the file again."
        )
    return blocks - predicting


def _rope(keys: Keys) -> dict[str, Any]:
    kind = keys.get("rope.scaling.type") or "none"
    found: dict[str, Any] = {"rope_theta": keys.number("rope.freq_base", 10000.0)}
    if kind == "none":
        return {**found, "rope_type": "default"}
    if kind not in ("linear", "yarn"):
        raise UnsupportedModel(
            f"{keys.architecture}.rope.scaling.type ({kind!r}) in {keys.file.paths[0]} must be "
            f"none, linear or yarn; got another. Use the model's safetensors checkpoint."
        )
    found |= {"rope_type": kind, "factor": keys.number("rope.scaling.factor")}
    if kind == "yarn":
        length = keys.get("rope.scaling.original_context_length")
        if length is not None:
            found["original_max_position_embeddings"] = keys.integer(
                "rope.scaling.original_context_length"
            )
        found["beta_fast"] = keys.number("rope.scaling.yarn_beta_fast", 32.0)
        found["beta_slow"] = keys.number("rope.scaling.yarn_beta_slow", 1.0)
    return found


def _head_dim(keys: Keys) -> int:
    width = keys.integer("embedding_length") // keys.integer("attention.head_count")
    return keys.integer("attention.key_length", max(width, 1))


def _qwen2(keys: Keys) -> dict[str, Any]:
    return {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "num_experts": keys.integer("expert_count"),
        "intermediate_size": keys.integer("feed_forward_length"),
        "moe_intermediate_size": keys.columns("ffn_down_exps.weight"),
        "shared_expert_intermediate_size": keys.columns("ffn_down_shexp.weight"),
        "norm_topk_prob": keys.flag("expert_weights_norm", False),
        "qkv_bias": keys.has("attn_q.bias"),
    }


def _qwen3(keys: Keys) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": keys.integer("expert_count"),
        "head_dim": _head_dim(keys),
        "intermediate_size": keys.integer("feed_forward_length"),
        "moe_intermediate_size": keys.columns("ffn_down_exps.weight"),
        "norm_topk_prob": keys.flag("expert_weights_norm", True),
        "attention_bias": keys.has("attn_q.bias"),
    }


def _olmoe(keys: Keys) -> dict[str, Any]:
    clamp = keys.get("attention.clamp_kqv")
    return {
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        "num_experts": keys.integer("expert_count"),
        "intermediate_size": keys.columns("ffn_down_exps.weight"),
        "norm_topk_prob": keys.flag("expert_weights_norm", False),
        "attention_bias": keys.has("attn_q.bias"),
        "clip_qkv": keys.number("attention.clamp_kqv") if clamp else None,
    }


def _mixtral(keys: Keys) -> dict[str, Any]:
    if "rope_freqs.weight" in keys.file.tensors:
        raise UnsupportedModel(
            f"rope_freqs.weight (in {keys.file.paths[0]}) must not be there; got factors of "
            f"frequencies, which Mixtral does not have. Use the model's safetensors checkpoint."
        )
    return {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": keys.integer("expert_count"),
        "intermediate_size": keys.columns("ffn_down_exps.weight"),
        "head_dim": _head_dim(keys),
        "sliding_window": None,
    }


def _gpt_oss(keys: Keys) -> dict[str, Any]:
    rope = _rope(keys)
    if rope["rope_type"] == "yarn":
        rope |= {"truncate": False}
        rope.setdefault("original_max_position_embeddings", 4096)
    return {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "num_local_experts": keys.integer("expert_count"),
        "intermediate_size": keys.columns("ffn_down_exps.weight"),
        "head_dim": _head_dim(keys),
        "sliding_window": keys.integer("attention.sliding_window"),
        "attention_bias": keys.has("attn_q.bias"),
        "rope_parameters": rope,
    }


def _deepseek(keys: Keys) -> dict[str, Any]:
    is_v3 = keys.get("expert_gating_func") == _SIGMOID
    rope_dim = keys.integer("rope.dimension_count")
    # Files of before mid-2025 have the decompressed heads' lengths under the plain names.
    key_length = keys.integer("attention.key_length_mla", keys.get("attention.key_length"))
    value_length = keys.integer("attention.value_length_mla", keys.get("attention.value_length"))
    groups, chosen = (
        keys.integer("expert_group_count", 1),
        keys.integer("expert_group_used_count", 1),
    )
    if rope_dim >= key_length:
        raise CheckpointError(
            f"deepseek2.rope.dimension_count ({rope_dim}) in {keys.file.paths[0]} must be below "
            f"attention.key_length_mla; got {key_length} there. Fetch the file again."
        )
    rank = keys.get("attention.q_lora_rank")
    rope = _rope(keys)
    if rope["rope_type"] == "yarn" and keys.get("rope.scaling.yarn_log_multiplier") is not None:
        factor = keys.number("rope.scaling.yarn_log_multiplier") / _YARN_LOG_FACTOR
        rope |= {"mscale": round(factor, 6), "mscale_all_dim": round(factor, 6)}
    experts = keys.columns("ffn_down_exps.weight")
    found = {
        "model_type": "deepseek_v3" if is_v3 else "deepseek_v2",
        "architectures": ["DeepseekV3ForCausalLM" if is_v3 else "DeepseekV2ForCausalLM"],
        # The file counts one key head for all, of the compressed form.
        "num_key_value_heads": keys.integer("attention.head_count"),
        "n_routed_experts": keys.integer("expert_count"),
        "n_shared_experts": keys.columns("ffn_down_shexp.weight") // experts,
        "moe_intermediate_size": experts,
        "intermediate_size": keys.columns("ffn_down.weight", keys.integer("feed_forward_length")),
        "first_k_dense_replace": keys.get("leading_dense_block_count") or 0,
        "q_lora_rank": None if rank is None else keys.integer("attention.q_lora_rank"),
        "kv_lora_rank": keys.integer("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": key_length - rope_dim,
        "v_head_dim": value_length,
        "n_group": groups,
        "topk_group": chosen,
        "norm_topk_prob": keys.flag("expert_weights_norm", False),
        "routed_scaling_factor": keys.number("expert_weights_scale", 1.0),
        "attention_bias": False,
        "rope_parameters": rope,
    }
    if not is_v3:
        found["topk_method"] = "group_limited_greedy" if groups > 1 else "greedy"
    return found


_FAMILIES: Mapping[str, Callable[[Keys], dict[str, Any]]] = {
    "llama": _mixtral,
    "qwen2moe": _qwen2,
    "qwen3moe": _qwen3,
    "olmoe": _olmoe,
    "deepseek2": _deepseek,
    "gpt-oss": _gpt_oss,
}
