"""Matrices in the order in which the C++ kernels read them.

Sixteen outputs are a panel. A panel is stored a 32-bit word of codes at a time, the sixteen outputs
beside each other: 64 bytes, one load. Four panels share their words, one after the other, so that a
stack is read as one stream. The codes within a word stay as `quant/packing.py` has them,
so that packing is one transposition of words whatever the format; the kernels bring the activations
into the order of the codes instead. Gate and up alternate: a panel of gates, a panel of ups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtura.kernels.cpu.arithmetic import Arithmetic
from mixtura.kernels.cpu.checks import check_permutation
from mixtura.kernels.cpu.conversions import as_read, code_name, conversion_of
from mixtura.kernels.cpu.extension import extension
from mixtura.kernels.cpu.memory import allocate
from mixtura.quant.activations import StaticInputs
from mixtura.quant.finite import check_finite
from mixtura.quant.matrix import SUPER_BLOCKS, QuantizedMatrix
from mixtura.quant.scheme import Code, GlobalScale, QuantScheme, ZeroPoint

PANEL = 16
QUAD = 4
WORD_BYTES = 4
ACTIVATION_GROUP = 128
"""Columns that share a scale of int8 activations where the weights have no groups of their own."""
LARGEST_GROUP = 256
"""Columns of a group that always fit the kernels' buffer of unpacked codes."""


ROW_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""What rows of activations may be; the values are `Dtype` of csrc/types.h."""


_CODES = {
    (Code.DENSE, 32): 0,
    (Code.DENSE, 16): 1,  # float16; bfloat16 is below
    (Code.INT, 8): 3,
    (Code.INT, 4): 4,
    (Code.E2M1, 4): 5,
    (Code.E4M3, 8): 6,
    (Code.CODEBOOK, 4): 7,
}
_BF16_CODE = 2

_KINDS: dict[torch.dtype, int] = {
    torch.float32: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.float8_e8m0fnu: 4,
    torch.float8_e4m3fn: 5,
    torch.uint8: 6,
    torch.int16: 7,
    torch.int8: 8,
}


_ROUNDINGS = {Code.INT: 1, Code.E4M3: 2}
"""`Rounding` of csrc/types.h by the codes of activations."""


def code_number(scheme: QuantScheme) -> int:
    """`Code` of csrc/types.h."""
    if scheme.values_dtype is torch.bfloat16:
        return _BF16_CODE
    return _CODES[scheme.code, scheme.bits]


def unreadable(scheme: QuantScheme) -> str | None:
    """Why the C++ kernels cannot read a scheme, or None."""
    read = as_read(scheme)
    if (read.code, read.bits) not in _CODES:
        return (
            "reads fp32, fp16, bf16, integers, codebooks of 16 levels or of unlike whole numbers, "
            f"and e2m1, e2m3, e3m2 and e4m3 codes, not {code_name(scheme)}"
        )
    columns = scheme.group_shape[1]
    if columns is not None and (columns % PANEL or columns > LARGEST_GROUP):
        return f"reads groups of 16, 32, .. {LARGEST_GROUP} columns, and these have {columns}"
    num_groups = _groups_of_super_block(scheme)
    if num_groups.bit_count() != 1:
        return f"reads super-blocks of 1, 2, 4, .. groups, and these have {num_groups}"
    if not scheme.is_quantized or columns is not None:
        return None
    if scheme.global_scale is not GlobalScale.NONE:
        return "has one scale for an output, and these have two"
    if scheme.zero_point not in (ZeroPoint.NONE, ZeroPoint.MID):
        return "reads zero points of groups, and these belong to whole outputs"
    return None


def _groups_of_super_block(scheme: QuantScheme) -> int:
    """Groups that share a super-block's scale; 1 where there are no super-blocks."""
    columns = scheme.group_shape[1]
    if scheme.super_columns is None or columns is None:
        return 1
    return scheme.super_columns // columns


@dataclass(frozen=True)
class Part:
    """Some rows of a stack: all of it, or the gate or up half of one that holds both."""

    matrix: QuantizedMatrix
    first: int = 0
    last: int | None = None
    step: int = 1

    @property
    def rows(self) -> slice:
        return slice(self.first, self.last, self.step)

    @property
    def num_rows(self) -> int:
        return len(range(*self.rows.indices(self.matrix.shape[-2])))

    def by_group(self, grid: Tensor) -> Tensor:
        """A grid (L, GN, GK) with a row for each of these rows. -> (L, rows, GK)."""
        num_rows = self.matrix.shape[-2]
        size = self.matrix.scheme.group_shape[0] or num_rows
        if size != 1:
            grid = _bits(grid).repeat_interleave(size, 1)[:, :num_rows].view(grid.dtype)
        return grid[:, self.rows]

    def from_rows(self, grid: Tensor, into: Tensor) -> None:
        """The inverse: write rows of these back into a grid (L, GN, GK)."""
        num_rows = self.matrix.shape[-2]
        size = self.matrix.scheme.group_shape[0] or num_rows
        rows = torch.arange(num_rows)[self.rows]
        _bits(into)[:, rows // size] = _bits(grid)


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, which torch can index and copy whatever the dtype."""
    if tensor.dtype.is_floating_point and tensor.itemsize < 4:
        return tensor.view(torch.uint8 if tensor.itemsize == 1 else torch.int16)
    return tensor


def _as_bytes(tensor: Tensor) -> Tensor:
    """A tensor's elements as bytes, its last dimension as many times as long."""
    if tensor.stride(-1) != 1 or not tensor.is_contiguous():
        # A last dimension of 1 counts as contiguous whatever its stride, and yet has no bytes.
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor.view(torch.uint8)


@dataclass(frozen=True, eq=False)
class Panels:
    """A stack of matrices in panels, and the C++ description of it.

    Attributes:
        tensors: what the kernels read, experts first: `values`, and where there are any `scales`,
            `zeros` (per group), `super_scales`, `super_minima` (fp16, per super-block),
            `row_scale` and `bias` (fp32, per output), `input_scale` (fp32, per expert),
            `permutation`.
        num_parts: 2 where panels of gates and ups alternate.
        part_rows: outputs of each part.
        handle: the `Matrix` of csrc/types.h; it points into `tensors`.
        order: (L, part_rows), which outputs of each part come first; None: as they are.
    """

    tensors: dict[str, Tensor]
    num_parts: int
    part_rows: int
    handle: Any
    order: Tensor | None = None

    def part(self, name: str, index: int) -> Tensor:
        """Rows of one part of a tensor. -> (L, rows, words or groups)."""
        panels = _bits(_panels_of(self.tensors[name], self.num_parts, index))
        rows = panels.mT.reshape(panels.shape[0], -1, panels.shape[3])
        rows = rows[:, : self.part_rows]
        if self.order is not None:
            rows = _reordered(rows, self.order.argsort(1))
        return rows.view(self.tensors[name].dtype)


def _reordered(rows: Tensor, order: Tensor) -> Tensor:
    """Rows (L, n, columns), whatever the dtype, in another order (L, n) in each expert."""
    return _bits(rows).take_along_dim(order[..., None], 1).view(rows.dtype)


def _panels_of(tensor: Tensor, num_parts: int, index: int) -> Tensor:
    """A view of one part's panels: (L, quads, panels of the part in a quad, columns, PANEL)."""
    if tensor.dim() == 5:  # the panels of a quad share their words
        quads = tensor.transpose(2, 3)
    else:
        quads = tensor.view(tensor.shape[0], -1, QUAD, *tensor.shape[2:])
    count, num_quads, _, columns, _ = quads.shape
    split = quads.view(count, num_quads, QUAD // num_parts, num_parts, columns, PANEL)
    return split[:, :, :, index]


def pack_panels(
    parts: Sequence[Part],
    arithmetic: Arithmetic,
    bias: Tensor | None = None,
    inputs: StaticInputs | None = None,
    *,
    permutation: Tensor | None = None,
    order: Tensor | None = None,
) -> Panels:
    """Lay a projection out for the kernels.

    Args:
        parts: of one scheme, and equally many rows each; gate then up where there are two.
        arithmetic: of the products.
        bias: (L, parts * rows), the parts' rows one after the other.
        inputs: what rows are rounded to before the products; `arithmetic` must hold its codes.
        permutation: (L, K) int32, the activation that a column meets, of each expert; None: those
            are in the columns' order when they come.
        order: (L, rows) int64, which outputs of each part are to come first.

    Raises:
        InputError: a scale, zero point or e4m3 code is not finite, or a permutation is none.
    """
    first = parts[0].matrix
    conversion, num_columns = conversion_of(first.scheme), first.shape[-1]
    scheme = as_read(first.scheme)
    num_experts, part_rows = first.shape[0], parts[0].num_rows
    for part in parts:
        check_finite(part.matrix)
        check_permutation(part.matrix)
    num_quads = -(-part_rows * len(parts) // (PANEL * QUAD))
    layout = _Layout(num_experts, num_quads, len(parts), order)
    row_bytes = -(-num_columns * scheme.bits // 8)
    num_words = -(-row_bytes // WORD_BYTES)
    shape = (num_experts, layout.num_quads, num_words, QUAD, PANEL)
    tensors = {"values": allocate(shape, torch.int32)}
    for index, part in enumerate(parts):
        for expert in range(num_experts):
            codes = _as_bytes(part.matrix.values[expert][part.rows])
            if conversion is not None:
                codes = conversion.apply(codes, num_columns)
            if order is not None:
                codes = codes[order[expert]]
            codes = F.pad(codes, (0, num_words * WORD_BYTES - row_bytes))
            layout.put(tensors["values"][expert : expert + 1], index, codes.view(torch.int32)[None])

    columns = scheme.group_shape[1] if scheme.is_quantized else None
    if scheme.is_quantized:
        _pack_scales(tensors, layout, parts, has_groups=columns is not None)
    if bias is not None:
        halves = bias.float().view(num_experts, len(parts), part_rows, 1).unbind(1)
        tensors["bias"] = layout.gathered(halves)
    if permutation is not None:
        tensors["permutation"] = permutation.clone(memory_format=torch.contiguous_format)
    if columns is None and arithmetic is Arithmetic.INT8:
        columns = ACTIVATION_GROUP
    scales, zeros = tensors.get("scales"), tensors.get("zeros")
    rounding, has_many_scales = 0, False
    if inputs is not None and bool((inputs.scales > 0).any()):
        tensors["input_scale"] = inputs.scales.clone()
        rounding = _ROUNDINGS[inputs.scheme.code]
        has_many_scales = bool((inputs.scales != inputs.scales[0]).any())
    handle = extension().matrix(
        code_number(scheme),
        int(arithmetic),
        part_rows * len(parts),
        num_columns,
        layout.num_panels,
        columns or 0,
        tensors["values"].data_ptr(),
        0 if scales is None else _KINDS[scales.dtype],
        0 if scales is None else scales.data_ptr(),
        0 if zeros is None else _KINDS[zeros.dtype],
        scheme.zero_point is ZeroPoint.MINIMUM,
        0 if zeros is None else zeros.data_ptr(),
        _address(tensors.get("row_scale")),
        _address(tensors.get("bias")),
        rounding,
        has_many_scales,
        _address(tensors.get("input_scale")),
        _groups_of_super_block(scheme).bit_length() - 1,
        _address(tensors.get("super_scales")),
        _address(tensors.get("super_minima")),
        _address(tensors.get("permutation")),
        scheme.codebook or (),
    )
    return Panels(tensors, len(parts), part_rows, handle, order)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _pack_scales(
    tensors: dict[str, Tensor], layout: _Layout, parts: Sequence[Part], *, has_groups: bool
) -> None:
    scales = [part.by_group(_present(part.matrix.scales)) for part in parts]
    if has_groups:
        tensors["scales"] = layout.gathered(scales)
    else:
        tensors["row_scale"] = layout.gathered([grid.float() for grid in scales])
    if parts[0].matrix.zero_points is not None:
        zeros = [part.by_group(_present(part.matrix.zero_points)) for part in parts]
        tensors["zeros"] = layout.gathered(zeros)
    for name in SUPER_BLOCKS:
        if name in parts[0].matrix.tensors:
            grids = [part.by_group(part.matrix.tensors[name]) for part in parts]
            tensors[name] = layout.gathered(grids)
    if parts[0].matrix.global_scale is not None:
        rows = [
            _present(part.matrix.global_scale)
            .reshape(layout.num_experts, -1, 1)
            .expand(-1, part.matrix.shape[-2], -1)[:, part.rows]
            for part in parts
        ]
        tensors["row_scale"] = layout.gathered(rows)


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


@dataclass(frozen=True)
class _Layout:
    """Where rows of parts go."""

    num_experts: int
    num_quads: int
    num_parts: int
    order: Tensor | None

    @property
    def num_panels(self) -> int:
        return self.num_quads * QUAD

    def put(self, into: Tensor, part: int, rows: Tensor) -> None:
        """Write rows (L, n, columns) of a part into (L, panels, columns, PANEL), or into quads."""
        target, source = _bits(_panels_of(into, self.num_parts, part)), _bits(rows)
        count, quads, panels, columns, _ = target.shape
        missing = quads * panels * PANEL - rows.shape[1]
        if missing:
            source = F.pad(source, (0, 0, 0, missing))
        target.copy_(source.reshape(count, quads, panels, PANEL, columns).mT)

    def gathered(self, parts: Sequence[Tensor]) -> Tensor:
        """Rows (L, n, columns) of all parts -> (L, panels, columns, PANEL), zeros beyond them."""
        columns = parts[0].shape[-1]
        into = allocate((self.num_experts, self.num_panels, columns, PANEL), parts[0].dtype)
        for index, rows in enumerate(parts):
            self.put(into, index, rows if self.order is None else _reordered(rows, self.order))
        return into


def unpack_part(panels: Panels, part: Part, index: int, into: dict[str, Tensor]) -> None:
    """Write one part's tensors, by the fields of `QuantizedMatrix`, back into its stack."""
    matrix, scheme = part.matrix, part.matrix.scheme
    codes = _as_bytes(panels.part("values", index))
    values, num_columns = into["values"], matrix.shape[-1]
    row_bytes = -(-num_columns * as_read(scheme).bits // 8)
    conversion = conversion_of(scheme)
    for expert, rows in enumerate(codes):
        rows = _as_bytes(rows[..., :row_bytes])
        if conversion is not None:
            rows = conversion.undo(rows, num_columns)
        values[expert, part.rows] = rows.view(values.dtype)
    if not scheme.is_quantized:
        return
    if "scales" in panels.tensors:
        part.from_rows(panels.part("scales", index), into["scales"])
    else:
        rows = panels.part("row_scale", index).to(into["scales"].dtype)
        part.from_rows(rows, into["scales"])
    if matrix.zero_points is not None:
        part.from_rows(panels.part("zeros", index), into["zero_points"])
    if matrix.permutation is not None:
        into["permutation"].copy_(matrix.permutation)
    for name in SUPER_BLOCKS:
        if name in into:
            part.from_rows(panels.part(name, index), into[name])
    if matrix.global_scale is not None:
        rows = panels.part("row_scale", index)[..., 0]
        if scheme.global_scale is GlobalScale.ROW:
            into["global_scale"][:, part.rows] = rows
        else:
            into["global_scale"].copy_(rows[:, 0])
