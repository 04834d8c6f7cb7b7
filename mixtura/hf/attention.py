"""The attention function named "mixtura": Transformers' own, but for a decode step on a CPU.

There torch's `scaled_dot_product_attention` in bf16 takes several times as long as reading the keys
and values; the C++ kernel reads them at the memory's rate (docs/benchmarks/cpu.md). Whatever else
is asked for, and every prompt, goes to the function that Transformers calls "sdpa".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mixtura.kernels.cpu.attention import attention, takes_attention
from mixtura.kernels.cpu.extension import missing
from mixtura.plugin import NAME

STOCK = "sdpa"
"""The attention function that ours takes the place of."""


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as Transformers' interface has it: (B, heads, T, D) -> (B, T, heads, V)."""
    is_plain = not dropout and all(
        others.get(name) is None for name in ("softcap", "position_bias", "cache", "s_aux")
    )
    if is_plain and takes_attention(query, key, value, attention_mask):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attention(query, key, value, attention_mask, scale), None
    out: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
    )
    return out


def use_attention(model: PreTrainedModel) -> None:
    """Let a model that uses Transformers' "sdpa" use ours; others stay as they are."""
    if (
        missing() is None
        and model.config._attn_implementation == STOCK
        and model._can_set_attn_implementation()
    ):
        model.set_attn_implementation(NAME)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
