"""How factors of LoRA adapters lie for every kernel, and which adapter a row may ask for."""

from __future__ import annotations

import torch
from torch import Tensor

from mixtura.errors import InputError
from mixtura.lora import Adapters

LORA_LANES = 16
"""Factors of adapters, A and B transposed, lie (L, r, n) with rows of more than n elements, zeros
behind them, at multiples of so many: kernels read whole vectors, and no stride is a power of two.
"""


def check_adapter_ids(ids: Tensor, rows: Tensor, adapters: Adapters) -> None:
    """Raise `InputError` unless each row's adapter is one of these, or none.

    Which number it is, is looked at on the CPU alone, and not while a graph is compiled.
    """
    if ids.dtype is not torch.int32 or ids.shape != rows.shape[:1]:
        raise InputError(
            f"adapter_ids ({tuple(ids.shape)} of {ids.dtype}) must be (rows,) int32; got "
            f"{rows.shape[0]} rows. Give every row its adapter's number, or -1."
        )
    if ids.device != rows.device:
        raise InputError(
            f"adapter_ids ({ids.device}) must be where the rows are; got {rows.device} there. Move "
            f"them."
        )
    if not ids.is_cpu or torch.compiler.is_compiling() or not ids.numel():
        return
    least, most = (int(bound) for bound in ids.aminmax())
    if least < -1 or most >= len(adapters):
        raise InputError(
            f"adapter_ids must be in [-1, {len(adapters)}), the numbers of loaded adapters; got "
            f"{least} to {most}. Load the adapter, or give -1."
        )
