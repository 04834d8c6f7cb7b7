"""Step3.5: windows, heads that differ by layer, gated heads, limits on what experts compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oracles.parts import (
    Config,
    Tensors,
    attend,
    double,
    mlp_shapes,
    norm,
    rotate,
    routed,
    silu,
)


def sparse_layers(config: Config) -> set[int]:
    return {int(index) for index in config["moe_layers_enum"].split(",")}


def num_heads(config: Config, index: int) -> int:
    if config["layer_types"][index] == "sliding_attention":
        return config["attention_other_setting"]["num_attention_heads"]
    return config["num_attention_heads"]


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    hidden, vocab, dim = config["hidden_size"], config["vocab_size"], config["head_dim"]
    count, width = config["moe_num_experts"], config["moe_intermediate_size"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for index in range(config["num_hidden_layers"]):
        path, heads = f"model.layers.{index}", num_heads(config, index)
        found[f"{path}.input_layernorm.weight"] = (hidden,)
        for name, number in (
            ("q_proj", heads * dim),
            ("k_proj", config["num_attention_groups"] * dim),
            ("v_proj", config["num_attention_groups"] * dim),
            ("g_proj", heads),
        ):
            found[f"{path}.self_attn.{name}.weight"] = (number, hidden)
        found[f"{path}.self_attn.o_proj.weight"] = (hidden, heads * dim)
        found[f"{path}.self_attn.q_norm.weight"] = (dim,)
        found[f"{path}.self_attn.k_norm.weight"] = (dim,)
        found[f"{path}.post_attention_layernorm.weight"] = (hidden,)
        if index in sparse_layers(config):
            found[f"{path}.moe.gate.weight"] = (count, hidden)
            found[f"{path}.moe.router_bias"] = (count,)
            found[f"{path}.moe.gate_proj.weight"] = (count, width, hidden)
            found[f"{path}.moe.up_proj.weight"] = (count, width, hidden)
            found[f"{path}.moe.down_proj.weight"] = (count, hidden, width)
            found |= mlp_shapes(f"{path}.share_expert", config["share_expert_dim"], hidden)
        else:
            found |= mlp_shapes(f"{path}.mlp", config["intermediate_size"], hidden)
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def centred_norm(config: Config, tensors: Tensors, path: str, x: Tensor) -> Tensor:
    return norm(x, 1 + tensors[f"{path}.weight"], config["rms_norm_eps"])


def limited(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """The activation, clamped after it has been taken; a limit of 0 is none."""
    gate = silu(gate)
    return gate * up if not limit else gate.clamp(max=limit) * up.clamp(-limit, limit)


def mlp(tensors: Tensors, path: str, x: Tensor, limit: float) -> Tensor:
    gate = x @ tensors[f"{path}.gate_proj.weight"].T
    up = x @ tensors[f"{path}.up_proj.weight"].T
    return limited(gate, up, limit) @ tensors[f"{path}.down_proj.weight"].T


def moe(config: Config, tensors: Tensors, path: str, index: int, x: Tensor) -> Tensor:
    scores = torch.sigmoid(x @ tensors[f"{path}.moe.gate.weight"].T)
    choice = scores + tensors[f"{path}.moe.router_bias"]
    limit = config["swiglu_limits"][index]

    def weights(token: int) -> dict[int, float]:
        best = sorted(range(choice.shape[1]), key=lambda e: -float(choice[token, e]))
        chosen = {e: float(scores[token, e]) for e in best[: config["moe_top_k"]]}
        return {e: weight / sum(chosen.values()) for e, weight in chosen.items()}

    def expert(e: int, row: Tensor) -> Tensor:
        gate = tensors[f"{path}.moe.gate_proj.weight"][e] @ row
        up = tensors[f"{path}.moe.up_proj.weight"][e] @ row
        return tensors[f"{path}.moe.down_proj.weight"][e] @ limited(gate, up, limit)

    out = routed(x, weights, expert) * config["moe_router_scaling_factor"]
    return out + mlp(tensors, f"{path}.share_expert", x, config["swiglu_limits_shared"][index])


def attention(config: Config, tensors: Tensors, path: str, index: int, x: Tensor) -> Tensor:
    dim, heads = config["head_dim"], num_heads(config, index)
    width = int(dim * config["partial_rotary_factors"][index])
    base: Any = config["rope_theta"][index]
    angles = [base ** (-2 * pair / width) for pair in range(width // 2)], 1.0
    is_local = config["layer_types"][index] == "sliding_attention"
    window = config["sliding_window"] if is_local else 0
    queries, keys, values, gates = (
        x @ tensors[f"{path}.{name}.weight"].T for name in ("q_proj", "k_proj", "v_proj", "g_proj")
    )
    out = []
    for head in range(heads):
        group = head * config["num_attention_groups"] // heads
        query = centred_norm(
            config, tensors, f"{path}.q_norm", queries[:, head * dim : (head + 1) * dim]
        )
        key = centred_norm(
            config, tensors, f"{path}.k_norm", keys[:, group * dim : (group + 1) * dim]
        )
        value = values[:, group * dim : (group + 1) * dim]
        found = attend(rotate(query, angles), rotate(key, angles), value, dim**-0.5, window)
        out.append(found * torch.sigmoid(gates[:, head : head + 1]))
    return torch.cat(out, 1) @ tensors[f"{path}.o_proj.weight"].T


def logits(config: Config, tensors: Tensors, ids: Tensor) -> Tensor:
    tensors = double(tensors)
    x = tensors["model.embed_tokens.weight"][ids]
    for index in range(config["num_hidden_layers"]):
        path = f"model.layers.{index}"
        normed = centred_norm(config, tensors, f"{path}.input_layernorm", x)
        x = x + attention(config, tensors, f"{path}.self_attn", index, normed)
        normed = centred_norm(config, tensors, f"{path}.post_attention_layernorm", x)
        if index in sparse_layers(config):
            x = x + moe(config, tensors, path, index, normed)
        else:
            x = x + mlp(tensors, f"{path}.mlp", normed, config["swiglu_limits_shared"][index])
    return centred_norm(config, tensors, "model.norm", x) @ tensors["lm_head.weight"].T
