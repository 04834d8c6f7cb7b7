"""Sarvam-MLA."""

from __future__ import annotations

from torch import Tensor, cat

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
    mscale,
    norm,
    rotate,
)


def is_sparse(config: Config, index: int) -> bool:
    after = index - config.get("first_k_dense_replace", 1)
    return after >= 0 and after % config.get("moe_layer_freq", 1) == 0


def shapes(config: Config, bias: str = CORRECTION) -> dict[str, tuple[int, ...]]:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    num_heads, rank = config["num_attention_heads"], config["kv_lora_rank"]
    plain, turned, value = (
        config["qk_nope_head_dim"],
        config["qk_rope_head_dim"],
        config["v_head_dim"],
    )
    queries = num_heads * (plain + turned)
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for index in range(config["num_hidden_layers"]):
        path = f"model.layers.{index}"
        found[f"{path}.input_layernorm.weight"] = (hidden,)
        query_rank = config.get("q_lora_rank")
        if query_rank is None:
            found[f"{path}.self_attn.q_proj.weight"] = (queries, hidden)
        else:
            found[f"{path}.self_attn.q_a_proj.weight"] = (query_rank, hidden)
            found[f"{path}.self_attn.q_a_layernorm.weight"] = (query_rank,)
            found[f"{path}.self_attn.q_b_proj.weight"] = (queries, query_rank)
        found[f"{path}.self_attn.kv_a_proj_with_mqa.weight"] = (rank + turned, hidden)
        found[f"{path}.self_attn.kv_a_layernorm.weight"] = (rank,)
        found[f"{path}.self_attn.kv_b_proj.weight"] = (num_heads * (plain + value), rank)
        found[f"{path}.self_attn.o_proj.weight"] = (hidden, num_heads * value)
        found[f"{path}.post_attention_layernorm.weight"] = (hidden,)
        if is_sparse(config, index):
            given = config.get("moe_shared_expert_intermediate_size")
            one = config["moe_intermediate_size"] if given is None else given
            width = one * config.get("num_shared_experts", 1)
            found |= moe_shapes(config, f"{path}.mlp", bias, width)
        else:
            found |= mlp_shapes(f"{path}.mlp", config["intermediate_size"], hidden)
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def attention(config: Config, tensors: Tensors, path: str, x: Tensor) -> Tensor:
    epsilon, rank = config["rms_norm_eps"], config["kv_lora_rank"]
    plain, value = config["qk_nope_head_dim"], config["v_head_dim"]
    width = plain + config["qk_rope_head_dim"]
    angles = frequencies(config, config["qk_rope_head_dim"])
    scale = width**-0.5
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type", scaling.get("type")) == "deepseek_yarn":
        scale *= mscale(scaling["factor"], scaling.get("mscale_all_dim", 0.0)) ** 2
    if config.get("q_lora_rank") is None:
        queries = x @ tensors[f"{path}.q_proj.weight"].T
    else:
        latent = x @ tensors[f"{path}.q_a_proj.weight"].T
        latent = norm(latent, tensors[f"{path}.q_a_layernorm.weight"], epsilon)
        queries = latent @ tensors[f"{path}.q_b_proj.weight"].T
    stored = x @ tensors[f"{path}.kv_a_proj_with_mqa.weight"].T
    latent = norm(stored[:, :rank], tensors[f"{path}.kv_a_layernorm.weight"], epsilon)
    turned = rotate(stored[:, rank:], angles, interleaved=True)
    expanded = latent @ tensors[f"{path}.kv_b_proj.weight"].T
    out = []
    for head in range(config["num_attention_heads"]):
        query = queries[:, head * width : (head + 1) * width]
        query = cat([query[:, :plain], rotate(query[:, plain:], angles, interleaved=True)], 1)
        both = expanded[:, head * (plain + value) : (head + 1) * (plain + value)]
        key = cat([both[:, :plain], turned], 1)
        out.append(attend(query, key, both[:, plain:], scale))
    return cat(out, 1) @ tensors[f"{path}.o_proj.weight"].T


def logits(config: Config, tensors: Tensors, ids: Tensor) -> Tensor:
    tensors, epsilon = double(tensors), config["rms_norm_eps"]
    x = tensors["model.embed_tokens.weight"][ids]
    for index in range(config["num_hidden_layers"]):
        path = f"model.layers.{index}"
        normed = norm(x, tensors[f"{path}.input_layernorm.weight"], epsilon)
        x = x + attention(config, tensors, f"{path}.self_attn", normed)
        normed = norm(x, tensors[f"{path}.post_attention_layernorm.weight"], epsilon)
        if is_sparse(config, index):
            x = x + moe(
                {"n_group": 1, "topk_group": 1, **config}, tensors, f"{path}.mlp", normed, 2.5
            )
        else:
            x = x + mlp(tensors, f"{path}.mlp", normed)
    return norm(x, tensors["model.norm.weight"], epsilon) @ tensors["lm_head.weight"].T
