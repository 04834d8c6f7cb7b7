"""The attention function named "mixtura": Transformers' own, but for a decode step on a CPU.

There torch's `scaled_dot_product_attention` in bf16 takes several times as long as reading the keys
and values; the C++ kernel reads them at the memory's rate (docs/benchmarks/cpu.md). Whatever else
is asked for, and every prompt, goes to the function that Transformers calls "sdpa".

"mixtura_by_sequence", of deterministic models, is the same a sequence at a time where some are
padded: how keys are cut, and so how sums round, would depend on where a sequence begins.
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

BY_SEQUENCE = f"{NAME}_by_sequence"
"""The attention function of deterministic models."""


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
    is_plain = not dropout and _is_plain(others)
    if is_plain and takes_attention(query, key, value, attention_mask):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attention(query, key, value, attention_mask, scale), None
    out: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
    )
    return out


def attention_by_sequence(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As `attention_forward`, each sequence by itself where some are padded.

    Keys that no query sees, and queries that see none, are left out, so that a sequence padded on
    the left is the call that it is alone. What is left out comes out as zeros.
    """
    is_padded = attention_mask is not None and attention_mask.dtype is torch.bool
    if attention_mask is None or not is_padded or not _is_plain(others):
        return attention_forward(module, query, key, value, attention_mask, **others)
    out = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    others["is_causal"] = True  # where there is no mask: whatever the module is without one
    for index, mask in enumerate(attention_mask.expand(query.shape[0], -1, -1, -1)):
        sees = mask.any(0)  # (queries, keys)
        queries, keys = sees.any(1).nonzero().flatten(), sees.any(0).nonzero().flatten()
        seen = mask[None, :, queries][..., keys]
        found, _ = attention_forward(
            module,
            query[index, None][:, :, queries],
            key[index, None][:, :, keys],
            value[index, None][:, :, keys],
            None if _is_causal(seen) else seen,
            **others,
        )
        out[index, queries] = found[0]
    return out, None


def _is_plain(others: dict[str, Any]) -> bool:
    return all(others.get(name) is None for name in ("softcap", "position_bias", "cache", "s_aux"))


def _is_causal(seen: Tensor) -> bool:
    """Whether a mask (1, heads, T, S) is what no mask means: T = S and earlier keys, or T = 1."""
    num_queries, num_keys = seen.shape[-2:]
    if num_queries not in (1, num_keys):
        return False
    causal = torch.ones(num_keys, num_keys, dtype=torch.bool, device=seen.device).tril()
    return bool((seen == causal[-num_queries:]).all())


def use_attention(model: PreTrainedModel, *, deterministic: bool = False) -> None:
    """Let a model that uses Transformers' "sdpa" use ours; others stay as they are."""
    if (
        missing() is None
        and model.config._attn_implementation in (STOCK, NAME, BY_SEQUENCE)
        and model._can_set_attn_implementation()
    ):
        is_on_cpu = model.device.type == "cpu"
        model.set_attn_implementation(BY_SEQUENCE if deterministic and is_on_cpu else NAME)


for _name, _forward in ((NAME, attention_forward), (BY_SEQUENCE, attention_by_sequence)):
    AttentionInterface.register(_name, _forward)
    AttentionMaskInterface.register(_name, sdpa_mask)
