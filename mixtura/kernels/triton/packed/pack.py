"""Canonical matrices as kernels read them, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtura.errors import InputError
from mixtura.kernels.triton.packed.layout import WORD_BITS, Layout, has_factors
from mixtura.quant.finite import check_finite
from mixtura.quant.matrix import QuantizedMatrix
from mixtura.quant.packing import expand_groups, pack_codes, unpack_codes
from mixtura.quant.scheme import Code, QuantScheme

_INTS = {8: torch.uint8, 16: torch.int16, 32: torch.int32}


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A projection of all experts: one stack of rows, gate's before up's.

    Attributes:
        layout: what the tensors mean.
        shape: (L, N, K), logical.
        codes: (L, steps, N, run) words; int8 or e4m3 where a code fills an operand of 8 bits.
        scales: (L, steps, words, groups of rows) int32, or None.
        zeros: the same of zero points, or (L, N) int32 of whole rows, or None.
        factors: (L, N) fp32 that finished sums are multiplied by, or None.
        sources: scheme, shape and dtype of zero points of the matrices that it was packed from, in
            the order of rows.
        kept: for each of those the tensors that the others do not hold bit for bit: scales that
            rows share, scales and zero points of whole rows, global scales; (L, ...) each.
        interleaves: rows of gate and of up took turns.
    """

    layout: Layout
    shape: tuple[int, int, int]
    codes: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    factors: Tensor | None
    sources: tuple[tuple[QuantScheme, tuple[int, ...], torch.dtype | None], ...] = ()
    kept: tuple[dict[str, Tensor], ...] = ()
    interleaves: bool = False

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of them, by name."""
        named = {name: getattr(self, name) for name in ("codes", "scales", "zeros", "factors")}
        found = {name: tensor for name, tensor in named.items() if tensor is not None}
        for index, kept in enumerate(self.kept):
            found |= {f"kept.{index}.{name}": tensor for name, tensor in kept.items()}
        return found


def pack_matrix(
    matrices: Sequence[QuantizedMatrix], layout: Layout, *, interleaves: bool = False
) -> PackedMatrix:
    """Lay a projection out; of one expert at a time codes are in bytes.

    Args:
        matrices: the stack (L, N, K), or those of gate and of up, which have one layout.
        interleaves: rows of gate and of up take turns in it.

    Raises:
        InputError: a scale or a code is no finite number, or a scale is out of the kernels' range.
    """
    num_experts, _, num_columns = matrices[0].shape
    shape = (num_experts, sum(matrix.shape[1] for matrix in matrices), num_columns)
    order = _order(shape[1], interleaves, matrices[0].device)
    for matrix in matrices:
        check_finite(matrix)
        _check_range(matrix, layout)
        _check_zero_points(matrix)

    def rows(parts: list[Tensor]) -> Tensor:
        """Parts (L, N_i) below each other, gate's rows first."""
        whole = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        return whole if order is None else whole[:, order]

    first = matrices[0]
    scales = zeros = None
    if layout.is_grouped:
        scales = _pack_grid(matrices, "scales", layout.scale_field, layout, order)
    if first.zero_points is not None and layout.is_grouped:
        zeros = _pack_grid(matrices, "zero_points", _INTS[layout.zero_bits], layout, order)
    elif first.zero_points is not None:
        zeros = rows([_by_row(matrix.zero_points, matrix)[..., 0] for matrix in matrices]).int()
    return PackedMatrix(
        layout,
        shape,
        _pack_codes(matrices, layout, order),
        scales,
        zeros,
        rows([_factors(matrix) for matrix in matrices]) if has_factors(first.scheme) else None,
        tuple(_source(matrix) for matrix in matrices),
        tuple(_kept(matrix, layout) for matrix in matrices),
        interleaves,
    )


def unpack_matrix(packed: PackedMatrix) -> list[QuantizedMatrix]:
    """The matrices that `pack_matrix` was given."""
    layout = packed.layout
    order = _order(packed.shape[1], packed.interleaves, packed.codes.device)
    inverse = None if order is None else order.argsort()
    sizes = [shape[1] for _, shape, _ in packed.sources]
    grids = {}
    if packed.scales is not None and "scales" not in packed.kept[0]:
        whole = _unpack_grid(packed.scales, layout.scale_field, packed, inverse)
        grids["scales"] = torch.split(whole, sizes, 1)
    if packed.zeros is not None and "zero_points" not in packed.kept[0]:
        whole = _unpack_grid(packed.zeros, _INTS[layout.zero_bits], packed, inverse)
        grids["zero_points"] = torch.split(whole, sizes, 1)
    values = _unpack_codes(packed, sizes, inverse)
    found = []
    for index, (scheme, shape, zero_dtype) in enumerate(packed.sources):
        tensors: dict[str, Any] = {"values": values[index]} | packed.kept[index]
        for name, parts in grids.items():
            dtype = scheme.scale_dtype if name == "scales" else zero_dtype
            assert dtype is not None
            tensors[name] = _restored(parts[index], dtype)
        found.append(QuantizedMatrix(scheme, shape, **tensors))
    return found


def _order(num_rows: int, interleaves: bool, device: torch.device) -> Tensor | None:
    """The row of the stack that each of the packed ones was; None for the same."""
    if not interleaves:
        return None
    return torch.arange(num_rows, device=device).view(-1, 2).T.flatten()


# ------------------------------------------------------------------------------------------- codes


def _pack_codes(
    matrices: Sequence[QuantizedMatrix], layout: Layout, order: Tensor | None
) -> Tensor:
    num_experts, _, num_columns = matrices[0].shape
    num_rows = sum(matrix.shape[1] for matrix in matrices)
    steps = -(-num_columns // layout.depth)
    packed = matrices[0].values.new_empty(
        (num_experts, steps, num_rows, layout.run), dtype=_word_dtype(layout)
    )
    for expert in range(num_experts):
        parts = [unpack_codes(m.values[expert], num_columns, m.scheme.bits) for m in matrices]
        codes = torch.cat(parts) if len(parts) > 1 else parts[0]
        packed[expert] = _words(codes if order is None else codes[order], layout, steps)
    return packed


def _unpack_codes(packed: PackedMatrix, sizes: list[int], inverse: Tensor | None) -> list[Tensor]:
    num_experts, _, num_columns = packed.shape
    bits = packed.sources[0][0].bits
    row_bytes = -(-num_columns * bits // 8)
    found = [
        packed.codes.new_empty((num_experts, size, row_bytes), dtype=torch.uint8) for size in sizes
    ]
    for expert in range(num_experts):
        codes = _codes(packed.codes[expert], packed.layout)[:, :num_columns]
        codes = codes if inverse is None else codes[inverse]
        for values, part in zip(found, torch.split(codes, sizes), strict=True):
            values[expert] = pack_codes(part, bits)
    return found


def _word_dtype(layout: Layout) -> torch.dtype:
    if layout.fields == 1:
        return layout.operand
    return _INTS[8 * layout.operand.itemsize]


def _words(codes: Tensor, layout: Layout, steps: int) -> Tensor:
    """Codes (N, K) uint8 of an expert -> words (steps, N, run)."""
    padded = F.pad(codes, (0, steps * layout.depth - codes.shape[1]))
    runs = padded.view(codes.shape[0], steps, layout.fields, layout.run)
    if layout.fields == 1:
        whole = runs.view(layout.operand)
        if layout.code is Code.INT:
            assert layout.zero is not None
            whole = (runs.to(torch.int16) - layout.zero).to(torch.int8)
        return whole.squeeze(2).transpose(0, 1)
    words = torch.zeros_like(runs[:, :, 0], dtype=torch.int32)
    for index, run in enumerate(runs.unbind(2)):
        if layout.places:
            sign, high, low = layout.places[index]
            code = run.int()
            words |= (code >> 3) << sign | ((code >> 2) & 1) << high | (code & 3) << low
        else:
            words |= run.int() << (layout.bits * index)
    return words.to(_word_dtype(layout)).transpose(0, 1)


def _codes(words: Tensor, layout: Layout) -> Tensor:
    """The inverse of `_words`, with the columns that fill the last step."""
    rows = words.transpose(0, 1).contiguous()
    if layout.fields == 1:
        if layout.code is not Code.INT:
            return rows.view(torch.uint8).flatten(1)
        assert layout.zero is not None
        return (rows.to(torch.int16) + layout.zero).to(torch.uint8).flatten(1)
    wide, mask = rows.int(), 2**layout.bits - 1
    runs = [(wide >> (layout.bits * index)) & mask for index in range(layout.fields)]
    if layout.places:
        runs = [
            ((wide >> sign) & 1) << 3 | ((wide >> high) & 1) << 2 | (wide >> low) & 3
            for sign, high, low in layout.places
        ]
    return torch.stack(runs, 2).to(torch.uint8).flatten(1)


# ------------------------------------------------------------------------- scales and zero points


def _fields(grid: Tensor, field: torch.dtype) -> Tensor:
    """A grid as whole numbers: the bits of its numbers as a field's, or zero points themselves."""
    if field.is_floating_point:
        grid = grid if grid.dtype == field else grid.float().to(field)
        field = _INTS[8 * field.itemsize]
        grid = grid.contiguous().view(field)
    bits: Tensor = grid.long() & (2 ** (8 * field.itemsize) - 1)
    return bits


def _restored(fields: Tensor, dtype: torch.dtype) -> Tensor:
    """What `_fields` was given, from numbers of the field's dtype."""
    if not dtype.is_floating_point:
        return fields.to(dtype)
    return fields if fields.dtype == dtype else fields.float().to(dtype)


def _source(matrix: QuantizedMatrix) -> tuple[QuantScheme, tuple[int, ...], torch.dtype | None]:
    zeros = matrix.zero_points
    return matrix.scheme, matrix.shape, None if zeros is None else zeros.dtype


def _by_row(grid: Tensor | None, matrix: QuantizedMatrix) -> Tensor:
    """A grid (L, GN, GK) with a row for each output: (L, N, GK)."""
    assert grid is not None
    rows = matrix.scheme.group_shape[0] or matrix.shape[1]
    spread = expand_groups(grid, (rows, 1), (*matrix.shape[:2], grid.shape[2]))
    return spread.expand(matrix.shape[0], matrix.shape[1], grid.shape[2])


def _columns_of(layout: Layout, scheme: QuantScheme, num_columns: int) -> Tensor:
    """The group of columns of each scale of a row, step after step; -1 behind the last column."""
    columns = scheme.group_shape[1]
    assert columns is not None
    steps = -(-num_columns // layout.depth)
    first = torch.arange(0, steps * layout.depth, layout.run * layout.runs_per_scale)
    return torch.where(first < num_columns, first // columns, -1)


def _pack_grid(
    matrices: Sequence[QuantizedMatrix],
    name: str,
    field: torch.dtype,
    layout: Layout,
    order: Tensor | None,
) -> Tensor:
    """Grids (L, GN, GK) -> words (L, steps, words, G) int32; an expert at a time is spread."""
    width, per_step = 8 * field.itemsize, layout.scales_per_step
    per_word = WORD_BITS // width
    num_columns = matrices[0].shape[2]
    groups = _columns_of(layout, matrices[0].scheme, num_columns).to(matrices[0].device)
    packed = []
    for expert in range(matrices[0].shape[0]):
        parts = []
        for matrix in matrices:
            grid = _fields(getattr(matrix, name)[expert], field)
            if layout.group_rows == 1:
                shape = (matrix.shape[1], grid.shape[1])
                grid = expand_groups(grid, (matrix.scheme.group_shape[0] or 1, 1), shape).expand(
                    shape
                )
            parts.append(grid)
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        whole = whole if order is None else whole[order]
        fields = torch.where(groups >= 0, whole[:, groups.clamp(min=0)], 0)
        by_word = torch.unflatten(fields, 1, (-1, per_step // per_word, per_word))
        words = torch.zeros_like(by_word[..., 0])
        for index, part in enumerate(by_word.unbind(-1)):
            words |= part << (width * index)
        signed = torch.where(words >= 2**31, words - 2**32, words).int()
        packed.append(signed.permute(1, 2, 0))
    return torch.stack(packed)


def _unpack_grid(
    words: Tensor, field: torch.dtype, packed: PackedMatrix, inverse: Tensor | None
) -> Tensor:
    """The inverse of `_pack_grid`, for grids with a row for each output: (L, N, GK) of `field`."""
    width = 8 * field.itemsize
    groups = _columns_of(packed.layout, packed.sources[0][0], packed.shape[2])
    first = [int((groups == group).nonzero()[0]) for group in range(int(groups.max()) + 1)]
    found, whole = [], _INTS[width]
    for one in words:
        wide = one.permute(2, 0, 1).long()
        shifts = range(0, WORD_BITS, width)
        fields = torch.stack([(wide >> shift) & (2**width - 1) for shift in shifts], -1).flatten(1)
        fields = fields[:, first]
        fields = fields if inverse is None else fields[inverse]
        if whole is not torch.uint8:
            fields = torch.where(fields >= 2 ** (width - 1), fields - 2**width, fields)
        found.append(fields.to(whole))
    return torch.stack(found).view(field)


def _kept(matrix: QuantizedMatrix, layout: Layout) -> dict[str, Tensor]:
    """The tensors of a matrix that words do not hold: few numbers."""
    shares_rows = matrix.scheme.group_shape[0] != 1
    names = ["global_scale"]
    if not layout.is_grouped or shares_rows:
        names += ["scales", "zero_points"]
    return {name: tensor.clone() for name, tensor in matrix.tensors.items() if name in names}


def _factors(matrix: QuantizedMatrix) -> Tensor:
    """What finished sums are multiplied by: (L, N) fp32."""
    factors = matrix.values.new_ones(matrix.shape[:2], dtype=torch.float32)
    if matrix.scheme.group_shape[1] is None:
        assert matrix.scales is not None
        factors *= _by_row(matrix.scales.float(), matrix)[..., 0]
    if matrix.global_scale is not None:
        is_by_row = matrix.global_scale.ndim == 2
        factors *= matrix.global_scale if is_by_row else matrix.global_scale.unsqueeze(1)
    return factors


def _check_range(matrix: QuantizedMatrix, layout: Layout) -> None:
    """Raise `InputError` where a group's scale is beyond what operands of 16 bits can have."""
    if layout.is_rounded or not layout.is_grouped:
        return
    assert matrix.scales is not None
    narrow = layout.for_rows(torch.float16)
    limit = torch.finfo(torch.float16).max * 2.0**-narrow.level_exponent
    found = float(matrix.scales.float().abs().max())
    if found > limit:
        raise InputError(
            f"scales ({matrix.scheme}) must be at most {limit:.4g} for the Triton kernels; got "
            f"{found:.4g}. Use kernel='torch'."
        )


def _check_zero_points(matrix: QuantizedMatrix) -> None:
    """Raise `InputError` where a zero point is farther from every code than GPTQ has them."""
    if matrix.zero_points is None:
        return
    low, high = int(matrix.zero_points.min()), int(matrix.zero_points.max())
    limit = 2**matrix.scheme.bits
    if low < 0 or high > limit:
        raise InputError(
            f"zero points ({matrix.scheme}) must be in 0..{limit} for the Triton kernels; got "
            f"{low if low < 0 else high}. Use kernel='torch'."
        )
