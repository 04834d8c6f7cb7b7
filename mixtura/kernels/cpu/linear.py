"""One matrix of the C++ kernel: a linear layer as the experts' down projection, without experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixtura.config import ActivationDtype
from mixtura.errors import InputError
from mixtura.kernels.cpu.arithmetic import current_arithmetic
from mixtura.kernels.cpu.extension import extension, missing
from mixtura.kernels.cpu.panels import (
    ROW_DTYPES,
    Panels,
    Part,
    pack_panels,
    unpack_part,
    unreadable,
)
from mixtura.kernels.keys import Keys
from mixtura.quant.activations import StaticInputs
from mixtura.quant.matrix import QuantizedMatrix
from mixtura.quant.scheme import QuantScheme

_KEYS: Keys[CpuLinear] = Keys("the packed linear layer")


@dataclass(frozen=True, eq=False)
class CpuLinear:
    """A matrix (N, K) in panels.

    Attributes:
        panels: values, scales and bias as the kernels read them.
        handle: the `Layer` of csrc/types.h; it points into the panels.
        matrix: the stack (1, N, K) that was packed, each tensor an expanded single element, but
            for the permutation.
        key: what graphs of torch.compile call it.
    """

    panels: Panels
    handle: Any
    matrix: QuantizedMatrix
    key: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """`rows @ W.T + bias`: (..., K) of fp32, fp16 or bf16 -> (..., N) in the rows' dtype.

        Raises:
            InputError: the rows have another width, dtype or device.
        """
        if torch.compiler.is_compiling():
            out: Tensor = torch.ops.mixtura.cpu_linear(rows, self.key, self.matrix.shape[1])
            return out
        return run_linear(self, rows)

    def unpacked(self) -> QuantizedMatrix:
        """The matrix (N, K) as it came, bit for bit."""
        into = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype)
            for name, tensor in self.matrix.tensors.items()
        }
        unpack_part(self.panels, Part(self.matrix), 0, into)
        return QuantizedMatrix(self.matrix.scheme, self.matrix.shape, **into).expert(0)


def cannot_pack(scheme: QuantScheme) -> str | None:
    """Why a matrix of that scheme cannot run here, or None."""
    return missing() or unreadable(scheme)


def pack_linear(
    matrix: QuantizedMatrix,
    bias: Tensor | None = None,
    *,
    inputs: StaticInputs | None = None,
    activation_dtype: ActivationDtype | None = None,
) -> CpuLinear:
    """Lay a matrix out in panels; `cannot_pack` must be None.

    Args:
        matrix: (N, K) on the CPU.
        bias: (N,) or None.
        inputs: what rows are rounded to, with a scale (), where `activation_dtype` lets it hold.
        activation_dtype: the arithmetic, where the weight is quantized.

    Raises:
        InputError: a scale, zero point or code is not finite.
    """
    tensors = {name: tensor.unsqueeze(0) for name, tensor in matrix.tensors.items()}
    stack = QuantizedMatrix(matrix.scheme, (1, *matrix.shape), **tensors)
    if inputs is not None and not inputs.scheme.holds_with(activation_dtype):
        inputs = None
    rounding = None if inputs is None else inputs.scheme
    panels = pack_panels(
        [Part(stack)],
        current_arithmetic(matrix.scheme, activation_dtype, rounding),
        None if bias is None else bias.unsqueeze(0),
        None if inputs is None else inputs.mapped(lambda scale: scale.reshape(1)),
        permutation=stack.permutation,
    )
    handle = extension().linear(panels.handle)
    shapes = {
        name: tensor.new_empty(()).expand(tensor.shape) for name, tensor in stack.tensors.items()
    }
    if stack.permutation is not None:
        shapes["permutation"] = panels.tensors["permutation"]
    kept = QuantizedMatrix(stack.scheme, stack.shape, **shapes)
    linear = CpuLinear(panels, handle, kept, _KEYS.new())
    _KEYS.name(linear.key, linear)
    return linear


def run_linear(linear: CpuLinear, rows: Tensor) -> Tensor:
    """One call of the extension; see `CpuLinear.__call__`."""
    num_rows, num_columns = linear.matrix.shape[1:]
    if rows.dtype not in ROW_DTYPES or not rows.is_cpu or rows.shape[-1] != num_columns:
        raise InputError(
            f"rows ({tuple(rows.shape)} {rows.dtype} on {rows.device}) must be (..., "
            f"{num_columns}) of fp32, fp16 or bf16 on the CPU; got others. Convert them."
        )
    rows = rows.contiguous()
    out = rows.new_empty((*rows.shape[:-1], num_rows))
    extension().run_linear(
        linear.handle,
        rows.data_ptr(),
        ROW_DTYPES[rows.dtype],
        out.data_ptr(),
        rows.numel() // num_columns,
        torch.get_num_threads(),
    )
    return out


@torch.library.custom_op("mixtura::cpu_linear", mutates_args=())
def _cpu_linear(rows: Tensor, key: Tensor, num_rows: int) -> Tensor:
    return run_linear(_KEYS.find(key), rows)


@_cpu_linear.register_fake
def _(rows: Tensor, key: Tensor, num_rows: int) -> Tensor:
    return rows.new_empty((*rows.shape[:-1], num_rows))
