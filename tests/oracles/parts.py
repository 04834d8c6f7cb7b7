"""Norms, rotations, attention, MLPs and routing in float64, a token at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Config = Mapping[str, Any]
Tensors = Mapping[str, Tensor]


def double(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / ((x * x).mean(-1, keepdim=True) + epsilon).sqrt() * weight


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def mlp(tensors: Tensors, path: str, x: Tensor) -> Tensor:
    gate = x @ tensors[f"{path}.gate_proj.weight"].T
    up = x @ tensors[f"{path}.up_proj.weight"].T
    return (silu(gate) * up) @ tensors[f"{path}.down_proj.weight"].T


def mlp_shapes(path: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{path}.gate_proj.weight": (width, hidden),
        f"{path}.up_proj.weight": (width, hidden),
        f"{path}.down_proj.weight": (hidden, width),
    }


def mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def frequencies(config: Config, width: int) -> tuple[list[float], float]:
    """The angle of one position for each pair of a rotated width, and a factor on sine and cosine.

    A `type` is a `rope_type`; the types are default, linear, yarn and deepseek_yarn.
    """
    base = config.get("rope_theta", 10000.0)
    plain = [base ** (-2 * pair / width) for pair in range(width // 2)]
    scaling = config.get("rope_scaling")
    if scaling is None:
        return plain, 1.0
    factor = scaling["factor"]
    if scaling.get("rope_type", scaling.get("type")) == "linear":
        return [angle / factor for angle in plain], 1.0
    length = scaling["original_max_position_embeddings"]

    def pair_that_turns(rotations: float) -> float:
        return width * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(scaling.get("beta_fast", 32))), 0)
    high = min(math.ceil(pair_that_turns(scaling.get("beta_slow", 1))), width - 1)
    high = high + 0.001 if low == high else high
    found = []
    for pair, angle in enumerate(plain):
        stretched = min(max((pair - low) / (high - low), 0.0), 1.0)
        found.append(angle * (1 - stretched) + angle / factor * stretched)
    over, under = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if over and under:
        return found, mscale(factor, over) / mscale(factor, under)
    return found, mscale(factor, 1.0)


def rotate(x: Tensor, angles: tuple[list[float], float], *, interleaved: bool = False) -> Tensor:
    """(T,D): position t turns pair i of the first columns by t * angle; the others stay."""
    per_position, factor = angles
    count, out = len(per_position), x.clone()
    positions = torch.arange(len(x), dtype=x.dtype)
    for pair, angle in enumerate(per_position):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + count)
        cosine = factor * (positions * angle).cos()
        sine = factor * (positions * angle).sin()
        out[:, first] = x[:, first] * cosine - x[:, second] * sine
        out[:, second] = x[:, second] * cosine + x[:, first] * sine
    return out


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int = 0) -> Tensor:
    """One head: (T,D), (T,D), (T,V) -> (T,V); with a window each position sees its last few."""
    rows = []
    for position in range(len(query)):
        start = max(position + 1 - window, 0) if window else 0
        scores = scale * (key[start : position + 1] @ query[position])
        weights = (scores - scores.max()).exp()
        rows.append((weights / weights.sum()) @ value[start : position + 1])
    return torch.stack(rows)


def choose(config: Config, logits: Tensor, bias: Tensor | None) -> dict[int, float]:
    """One token's experts with their weights."""
    scores = [1 / (1 + math.exp(-x)) for x in logits.tolist()]
    if config.get("score_function", "sigmoid") == "softmax":
        scores = logits.softmax(-1).tolist()
    centred = [0.0] * len(scores) if bias is None else (bias - bias.mean()).tolist()
    choice = [score + b for score, b in zip(scores, centred, strict=True)]
    allowed = set(range(len(scores)))
    num_groups, kept = config.get("n_group"), config.get("topk_group")
    if num_groups is not None and kept is not None:
        size = len(scores) // num_groups
        groups = [range(g * size, (g + 1) * size) for g in range(num_groups)]
        num_best = 1 if bias is None else 2
        values = [sum(sorted((choice[e] for e in g), reverse=True)[:num_best]) for g in groups]
        best = sorted(range(num_groups), key=lambda g: -values[g])[:kept]
        allowed = {expert for g in best for expert in groups[g]}
    chosen = sorted(allowed, key=lambda e: -choice[e])[: config["num_experts_per_tok"]]
    total = sum(scores[e] for e in chosen) if config.get("norm_topk_prob", True) else 1.0
    return {e: scores[e] / total for e in chosen}


def routed(x: Tensor, weights: Callable[[int], dict[int, float]], expert: Any) -> Tensor:
    """Each token's weighted sum over its experts; `expert(e, row)` is one expert's output."""
    rows = []
    for token, row in enumerate(x):
        parts = [weight * expert(e, row) for e, weight in weights(token).items()]
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows)


def moe(config: Config, tensors: Tensors, path: str, x: Tensor, default_scale: float) -> Tensor:
    """The MoE layer of Param2MoE and Sarvam."""
    bias = tensors.get(f"{path}.gate.expert_bias", tensors.get(f"{path}.gate.{CORRECTION}"))
    logits = x @ tensors[f"{path}.gate.weight"].T
    out = routed(
        x,
        lambda token: choose(config, logits[token], bias),
        lambda e, row: mlp(tensors, f"{path}.experts.{e}", row),
    )
    out = out * config.get("routed_scaling_factor", default_scale)
    if config.get("num_shared_experts", 1):
        out = out + mlp(tensors, f"{path}.shared_experts", x)
    return out


CORRECTION = "e_score_correction_bias"


def moe_shapes(
    config: Config, path: str, bias: str, shared_width: int
) -> dict[str, tuple[int, ...]]:
    hidden, count = config["hidden_size"], config["num_experts"]
    found: dict[str, tuple[int, ...]] = {f"{path}.gate.weight": (count, hidden)}
    if config.get("moe_router_enable_expert_bias", True):
        found[f"{path}.gate.{bias}"] = (count,)
    for expert in range(count):
        width = config["moe_intermediate_size"]
        found |= mlp_shapes(f"{path}.experts.{expert}", width, hidden)
    if shared_width:
        found |= mlp_shapes(f"{path}.shared_experts", shared_width, hidden)
    return found
