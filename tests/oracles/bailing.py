"""Param2MoE and Sarvam-MoE."""

from __future__ import annotations

from torch import Tensor

from oracles.parts import (
    CORRECTION,
    Config,
    Tensors,
    attend,
    double,
    frequencies,
    mlp,
    mlp_shapes,
    moe,
    moe_shapes,
    norm,
    rotate,
)

DEFAULT_SCALE = {"param2moe": 1.0, "sarvam_moe": 2.5}
DEFAULT_NORM = {"param2moe": False, "sarvam_moe": True}


def head_dim(config: Config) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def shared_width(config: Config) -> int:
    number = config.get("num_shared_experts", 1)
    given = config.get("moe_shared_expert_intermediate_size")
    if config["model_type"] == "param2moe":
        return given if given and number else config["moe_intermediate_size"] * number
    return (given or config["moe_intermediate_size"]) * number


def uses_norm(config: Config) -> bool:
    return config.get("use_qk_norm", DEFAULT_NORM[config["model_type"]])


def shapes(config: Config, bias: str = "expert_bias") -> dict[str, tuple[int, ...]]:
    assert bias in ("expert_bias", CORRECTION)
    hidden, vocab, dim = config["hidden_size"], config["vocab_size"], head_dim(config)
    queries = config["num_attention_heads"] * dim
    width = queries + 2 * config["num_key_value_heads"] * dim
    found: dict[str, tuple[int, ...]] = {"model.word_embeddings.weight": (vocab, hidden)}
    for index in range(config["num_hidden_layers"]):
        path = f"model.layers.{index}"
        found[f"{path}.input_layernorm.weight"] = (hidden,)
        found[f"{path}.attention.query_key_value.weight"] = (width, hidden)
        if config.get("use_qkv_bias"):
            found[f"{path}.attention.query_key_value.bias"] = (width,)
        if uses_norm(config):
            found[f"{path}.attention.query_layernorm.weight"] = (dim,)
            found[f"{path}.attention.key_layernorm.weight"] = (dim,)
        found[f"{path}.attention.dense.weight"] = (hidden, queries)
        if config.get("use_bias"):
            found[f"{path}.attention.dense.bias"] = (hidden,)
        found[f"{path}.post_attention_layernorm.weight"] = (hidden,)
        if index < config.get("first_k_dense_replace", 1):
            found |= mlp_shapes(f"{path}.mlp", config["intermediate_size"], hidden)
        else:
            found |= moe_shapes(config, f"{path}.mlp", bias, shared_width(config))
    found["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings"):
        found["lm_head.weight"] = (vocab, hidden)
    return found


def attention(config: Config, tensors: Tensors, path: str, x: Tensor) -> Tensor:
    dim, epsilon = head_dim(config), config["rms_norm_eps"]
    num_heads, num_kv = config["num_attention_heads"], config["num_key_value_heads"]
    angles = frequencies(config, int(dim * config.get("partial_rotary_factor", 1.0)))
    fused = x @ tensors[f"{path}.query_key_value.weight"].T
    if config.get("use_qkv_bias"):
        fused = fused + tensors[f"{path}.query_key_value.bias"]
    heads = [fused[:, i * dim : (i + 1) * dim] for i in range(num_heads + 2 * num_kv)]
    queries, keys = heads[:num_heads], heads[num_heads : num_heads + num_kv]
    values = heads[num_heads + num_kv :]
    if uses_norm(config):
        queries = [norm(q, tensors[f"{path}.query_layernorm.weight"], epsilon) for q in queries]
        keys = [norm(k, tensors[f"{path}.key_layernorm.weight"], epsilon) for k in keys]
    out = tensors[f"{path}.dense.bias"].clone() if config.get("use_bias") else 0.0
    for head, query in enumerate(queries):
        shared = head * num_kv // num_heads
        key = rotate(keys[shared], angles)
        found = attend(rotate(query, angles), key, values[shared], dim**-0.5)
        out = out + found @ tensors[f"{path}.dense.weight"][:, head * dim : (head + 1) * dim].T
    return out


def logits(config: Config, tensors: Tensors, ids: Tensor) -> Tensor:
    tensors, epsilon = double(tensors), config["rms_norm_eps"]
    x = tensors["model.word_embeddings.weight"][ids]
    for index in range(config["num_hidden_layers"]):
        path = f"model.layers.{index}"
        normed = norm(x, tensors[f"{path}.input_layernorm.weight"], epsilon)
        x = x + attention(config, tensors, f"{path}.attention", normed)
        normed = norm(x, tensors[f"{path}.post_attention_layernorm.weight"], epsilon)
        if index < config.get("first_k_dense_replace", 1):
            x = x + mlp(tensors, f"{path}.mlp", normed)
        else:
            scale = DEFAULT_SCALE[config["model_type"]]
            x = x + moe(config, tensors, f"{path}.mlp", normed, scale)
    x = norm(x, tensors["model.norm.weight"], epsilon)
    is_tied = config.get("tie_word_embeddings")
    return x @ tensors["model.word_embeddings.weight" if is_tied else "lm_head.weight"].T
