"""One linear map per expert over rows sorted by expert: the torch kernel's matrix product.

The same two loops serve `torch.compile`, as operators that are one node of a graph, and plain
autograd, as a function: calling an operator that has a backward imports the whole compiler.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtura.quant.matrix import QuantizedMatrix, dequantize


def grouped_linear(rows: Tensor, weight: QuantizedMatrix, expert_offsets: Tensor) -> Tensor:
    """`rows[r] @ W[e].T` for the rows r of expert e; rows of no expert are 0.

    Args:
        rows: (N, in) sorted by expert. weight: (L, out, in). expert_offsets: (L+1,).

    Returns:
        (N, out) in the rows' dtype.
    """
    dense = dequantize(weight, rows.dtype)
    if torch.compiler.is_compiling():
        return torch.ops.mixtura.grouped_linear(rows, dense, expert_offsets)  # type: ignore[no-any-return]
    return _GroupedLinear.apply(rows, dense, expert_offsets)  # type: ignore[no-any-return, no-untyped-call]


def _slices(expert_offsets: Tensor) -> list[tuple[int, int, int]]:
    """(expert, start, stop) of every expert with rows. One host synchronisation."""
    bounds = pairwise(expert_offsets.tolist())
    return [(e, start, stop) for e, (start, stop) in enumerate(bounds) if stop > start]


def linear_in_slices(rows: Tensor, weight: Tensor, expert_offsets: Tensor) -> Tensor:
    """`grouped_linear` of a dense stack where nothing is recorded: no other expert is converted."""
    out = rows.new_zeros(rows.shape[0], weight.shape[1])
    for expert, start, stop in _slices(expert_offsets):
        out[start:stop] = F.linear(rows[start:stop], weight[expert].to(rows.dtype))
    return out


def _outer(grad: Tensor, rows: Tensor, expert_offsets: Tensor) -> Tensor:
    """The gradient of every expert's matrix. (N, out), (N, in), (L+1,) -> (L, out, in)."""
    out = rows.new_zeros(expert_offsets.shape[0] - 1, grad.shape[1], rows.shape[1])
    for expert, start, stop in _slices(expert_offsets):
        torch.mm(grad[start:stop].T, rows[start:stop], out=out[expert])
    return out


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, expert_offsets: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, expert_offsets)
        return linear_in_slices(rows, weight, expert_offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight, offsets = ctx.saved_tensors
        needs_rows, needs_weight, _ = ctx.needs_input_grad
        grad_rows = linear_in_slices(grad, weight.transpose(1, 2), offsets) if needs_rows else None
        grad_weight = _outer(grad, rows, offsets) if needs_weight else None
        return grad_rows, grad_weight, None


_IN_NO_CUDA_GRAPH = (torch.Tag.cudagraph_unsafe,)
"""What tells the compiler's CUDA graphs to leave an operator out: ours wait for the host."""

_linear_operator = torch.library.custom_op(
    "mixtura::grouped_linear", linear_in_slices, mutates_args=(), tags=_IN_NO_CUDA_GRAPH
)
_outer_operator = torch.library.custom_op(
    "mixtura::grouped_outer", _outer, mutates_args=(), tags=_IN_NO_CUDA_GRAPH
)


@_linear_operator.register_fake
def _(rows: Tensor, weight: Tensor, expert_offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@_outer_operator.register_fake
def _(grad: Tensor, rows: Tensor, expert_offsets: Tensor) -> Tensor:
    return rows.new_empty(expert_offsets.shape[0] - 1, grad.shape[1], rows.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows, weight, offsets = ctx.saved_tensors
    needs_rows, needs_weight, _ = ctx.needs_input_grad
    grad_rows = _linear_operator(grad, weight.transpose(1, 2), offsets) if needs_rows else None
    grad_weight = _outer_operator(grad, rows, offsets) if needs_weight else None
    return grad_rows, grad_weight, None


_linear_operator.register_autograd(_backward, setup_context=_save)
