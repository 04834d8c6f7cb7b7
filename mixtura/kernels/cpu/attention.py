"""Attention of one query for each sequence: what a decode step asks for, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from mixtura.errors import InputError
from mixtura.kernels.cpu.extension import extension, missing
from mixtura.kernels.cpu.panels import PANEL, ROW_DTYPES

_HAS_EXTENSION = missing() is None


def takes_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether `attention` computes this: one query, on the CPU, no gradients, heads of panels.

    Args:
        query: (B, heads, queries, D). key: (B, key heads, S, D). value: (B, key heads, S, V).
        mask: (B or 1, heads or 1, queries, S) or None; bool, True for keys that count, or added to
            the scores.
    """
    return (
        _HAS_EXTENSION
        and query.dim() == 4
        and query.shape[2] == 1
        and key.shape[2] > 0
        and query.is_cpu
        and key.is_cpu
        and value.is_cpu
        and query.dtype in ROW_DTYPES
        and query.dtype == key.dtype == value.dtype
        and query.shape[1] % key.shape[1] == 0
        and query.shape[3] == key.shape[3]
        and query.shape[3] % PANEL == 0
        and value.shape[3] % PANEL == 0
        and key.shape[:3] == value.shape[:3]
        and key.stride(3) == 1
        and value.stride(3) == 1
        and (mask is None or (mask.dim() == 4 and mask.shape[2:] == (1, key.shape[2])))
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)))
    )


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """`softmax(scale * query key^T + mask) value`, in fp32, for what `takes_attention` accepts.

    A sequence whose keys are all masked gets zeros.

    Returns:
        (B, 1, heads, V) in the dtype of the query.

    Raises:
        InputError: the mask does not fit the heads or sequences.
    """
    if torch.compiler.is_compiling():
        found: Tensor = torch.ops.mixtura.cpu_attention(query, key, value, mask, scale)
        return found
    num_sequences, num_heads = query.shape[:2]
    out = _empty(query, value)
    query = query.contiguous()
    mask_strides = [0, 0]
    if mask is not None:
        if mask.shape[0] not in (1, num_sequences) or mask.shape[1] not in (1, num_heads):
            raise InputError(
                f"attention mask ({tuple(mask.shape)}) must be for {num_sequences} sequences and "
                f"{num_heads} heads, or for 1; got another. Correct the mask."
            )
        if mask.dtype is torch.bool:
            mask = torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))
        mask = mask.float().contiguous()
        # Of a single sequence or head the same mask is for all.
        mask_strides = [0 if mask.shape[dim] == 1 else mask.stride(dim) for dim in (0, 1)]
    extension().attention(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        out.data_ptr(),
        ROW_DTYPES[query.dtype],
        0 if mask is None else mask.data_ptr(),
        (num_sequences, num_heads, key.shape[1], key.shape[2], key.shape[3], value.shape[3]),
        (*key.stride()[:3], *value.stride()[:3], *mask_strides),
        scale,
        torch.get_num_threads(),
    )
    return out


def _empty(query: Tensor, value: Tensor) -> Tensor:
    return query.new_empty((query.shape[0], 1, query.shape[1], value.shape[3]))


@torch.library.custom_op("mixtura::cpu_attention", mutates_args=())
def _cpu_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    return attention(query, key, value, mask, scale)


@_cpu_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return _empty(query, value)
