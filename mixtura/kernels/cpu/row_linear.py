"""A linear map of the C++ kernels that reads the weight where the model keeps it.

Nothing is packed or copied, so that weights may change between calls. Every sum is made in one
order (csrc/routing_gate.h).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixtura.kernels.cpu.extension import extension, missing
from mixtura.kernels.cpu.panels import ROW_DTYPES

_PLAIN = (Tensor, torch.nn.Parameter)
_HAS_EXTENSION = missing() is None


def takes_row_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `row_linear` computes this: plain tensors on the CPU.

    Args:
        rows: (..., in). weight: (out, in). bias: (out,) or None.
    """
    return (
        _HAS_EXTENSION
        and all(_is_plain(tensor) for tensor in (rows, weight))
        and (bias is None or (_is_plain(bias) and bias.shape == weight.shape[:1]))
        and weight.dim() == 2
        and weight.is_contiguous()
        and rows.shape[-1] == weight.shape[1] > 0
    )


def row_linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rows @ weight.T + bias` in fp32, rounded once, for what `takes_row_linear` accepts.

    Returns:
        (..., out) in the rows' dtype, bitwise the same whatever rows are beside them and however
        many threads there are. Gradients are torch's products, and are not.
    """
    has_gradients = torch.is_grad_enabled() and _needs_grad(rows, weight, bias)
    if torch.compiler.is_compiling() or has_gradients:
        found: Tensor = torch.ops.mixtura.cpu_row_linear(rows, weight, bias)
        return found
    rows = rows.contiguous()
    num_rows, num_columns = weight.shape
    out = rows.new_empty((*rows.shape[:-1], num_rows), dtype=torch.float32)
    bias = None if bias is None else bias.float().contiguous()
    extension().run_row_linear(
        rows.data_ptr(),
        ROW_DTYPES[rows.dtype],
        weight.data_ptr(),
        ROW_DTYPES[weight.dtype],
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        out.numel() // num_rows if num_rows else 0,
        num_rows,
        num_columns,
        torch.get_num_threads(),
    )
    return out.to(rows.dtype)


def _is_plain(tensor: Tensor) -> bool:
    """In this process's memory, what it seems to be, and of a dtype that the kernels read."""
    return tensor.is_cpu and type(tensor) in _PLAIN and tensor.dtype in ROW_DTYPES


def _needs_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


@torch.library.custom_op("mixtura::cpu_row_linear", mutates_args=())
def _cpu_row_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return row_linear(rows, weight, bias)


@_cpu_row_linear.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty((*rows.shape[:-1], weight.shape[0]))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    rows, weight, bias = inputs
    ctx.save_for_backward(rows, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    rows, weight = ctx.saved_tensors
    flat = grad.reshape(-1, grad.shape[-1])
    of_weight = flat.T @ rows.reshape(-1, rows.shape[-1])
    of_bias = None if ctx.bias_dtype is None else flat.sum(0).to(ctx.bias_dtype)
    return grad @ weight.to(grad.dtype), of_weight.to(weight.dtype), of_bias


_cpu_row_linear.register_autograd(_gradients, setup_context=_keep)
