"""A matrix as parts that each have a layout: the `MatrixFormat` of most families of checkpoints.

    W = (level[code] - zero) * scale * global

Codes, zeros, scales and the global scale are parts; their layouts say how they lie in the file. A
family looks at the headers and its configuration once, and puts the layouts together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mixtura.errors import CheckpointError, ConfigError
from mixtura.quant.activations import ActivationScheme
from mixtura.quant.codecs.checks import check_finite, check_numbers, check_positive
from mixtura.quant.codecs.code_layouts import CodeLayout, Shape
from mixtura.quant.codecs.contract import Decoded, Header, MatrixFormat, Part
from mixtura.quant.codecs.grid_layouts import (
    Arrangement,
    GridLayout,
    ScalarLayout,
    ZeroLayout,
)
from mixtura.quant.matrix import QuantizedMatrix
from mixtura.quant.packing import pack_codes, unpack_codes
from mixtura.quant.scheme import QuantScheme, ZeroPoint

SHAPE_PART = "weight_shape"
_FETCH_BOTH = "Fetch config.json and the weights again, both of one model."


@dataclass(frozen=True)
class StoredMatrix(MatrixFormat):
    """How a matrix lies in a file, part by part.

    Attributes:
        scheme: of the matrix; `has_permutation` is found out from the column groups.
        activations: how activations are to be quantized.
        codes, scales, zero_points, global_scale: layouts. With a scheme whose zero points are MID
            or NONE the stored ones must be without effect, and are kept.
        input_scale: layout of the scale of static activations; the part may be missing.
        column_groups: a part that holds the group of every column, int32 (K,).
        shape_dtype: dtype of a part `weight_shape` that holds the logical shape.
        unread: headers of parts that add nothing to the weight; they are kept.
    """

    scheme: QuantScheme
    activations: ActivationScheme | None
    codes: CodeLayout
    scales: GridLayout
    zero_points: ZeroLayout | None = None
    global_scale: ScalarLayout | None = None
    input_scale: ScalarLayout | None = None
    column_groups: str | None = None
    shape_dtype: torch.dtype | None = None
    unread: tuple[tuple[str, Header], ...] = ()

    @property
    def label(self) -> str:
        return str(self.scheme)

    def shape_of(self, headers: Mapping[str, Header], shape: Shape | None) -> Shape:
        header = headers.get(self.codes.part)
        if header is None:
            raise CheckpointError(
                f"{self.codes.part} (none) must be there, as it holds the codes; got only "
                f"{', '.join(sorted(headers))}. Fetch the weights again."
            )
        num_dims = len(self.codes.stored_shapes((1, 1))[0])
        if len(header.shape) not in (num_dims, num_dims + 1):
            raise CheckpointError(
                f"{self.codes.part} (shape {header.shape}) must have {num_dims} dims, or one more "
                f"for a stack of experts; got {len(header.shape)}. Fetch the weights again."
            )
        if shape is not None and header.shape in self.codes.stored_shapes(shape):
            return shape
        widest = self.codes.logical_shape(header.shape)
        whole_groups = (*widest[:-1], self._columns_of_groups(headers, widest))
        return whole_groups if header.shape in self.codes.stored_shapes(whole_groups) else widest

    def parts(self, shape: Shape) -> dict[str, Part]:
        stack, grid = shape[:-2], self._grid(shape)
        usual, *others = self.codes.stored_shapes(shape)
        parts = {
            self.codes.part: Part((self.codes.dtype,), usual, other_shapes=tuple(others)),
            self.scales.part: Part(
                (self.scales.dtype,), self.scales.arrangement.stored_shape(grid)
            ),
        }
        if self.zero_points is not None:
            usual, *others = self.zero_points.stored_shapes(grid)
            part = Part((self.zero_points.dtype,), usual, other_shapes=tuple(others))
            parts[self.zero_points.part] = part
        if self.global_scale is not None:
            tail = (*stack, *self.global_scale.tail)
            parts[self.global_scale.part] = Part((self.global_scale.dtype,), tail)
        if self.input_scale is not None:
            tail = (*stack, *self.input_scale.tail)
            part = Part((self.input_scale.dtype,), tail, is_optional=True)
            parts[self.input_scale.part] = part
        if self.column_groups is not None:
            parts[self.column_groups] = Part((torch.int32,), (*stack, shape[-1]))
        if self.shape_dtype is not None:
            parts[SHAPE_PART] = Part((self.shape_dtype,), (len(shape),))
        for name, header in self.unread:
            parts[name] = Part((header.dtype,), header.shape, is_optional=True)
        return parts

    def stored_shape(self, tensors: Mapping[str, Tensor]) -> Shape | None:
        stated = tensors.get(SHAPE_PART)
        if self.shape_dtype is None or stated is None or stated.numel() not in (2, 3):
            return None
        return tuple(stated.flatten().tolist())

    def decode(self, tensors: Mapping[str, Tensor], shape: Shape) -> Decoded:
        grid = self._grid(shape)
        kept = {name: tensors[name] for name, _ in self.unread if name in tensors}
        self._check_stated_shape(tensors, shape)
        values = self._read_codes(tensors[self.codes.part], shape, kept)
        scheme, permutation = self.scheme, self._permutation(tensors, shape)
        if permutation is not None:
            scheme = dataclasses.replace(scheme, has_permutation=True)
            values = _take_columns(values, permutation, shape[-1], scheme.bits)
        elif self.column_groups is not None:
            kept[self.column_groups] = tensors[self.column_groups]
        assert scheme.scale_dtype is not None
        scales = self.scales.read(tensors[self.scales.part], grid, scheme.scale_dtype)
        if scheme.group_shape == (None, None):
            check_positive(self.scales.part, scales.float())
        else:
            check_finite(self.scales.part, scales)
        matrix = QuantizedMatrix(
            scheme,
            shape,
            values,
            scales,
            self._read_zeros(tensors, grid, kept),
            _read_scalar(self.global_scale, tensors, shape[:-2], kept),
            permutation,
        )
        return Decoded(matrix, _read_scalar(self.input_scale, tensors, shape[:-2], kept), kept)

    @property
    def input_part(self) -> str | None:
        layout = self.input_scale
        return layout.part if layout is not None and layout.is_meant else None

    def read_input_scale(self, stored: Tensor, shape: Shape) -> Tensor:
        assert self.input_scale is not None
        scale = _read_scalar(self.input_scale, {self.input_scale.part: stored}, shape[:-2], {})
        assert scale is not None
        return scale

    def encode(self, decoded: Decoded) -> dict[str, Tensor]:
        matrix, kept = decoded.matrix, decoded.kept
        self._check_writable(matrix)
        assert matrix.scales is not None
        parts = {name: kept[name] for name, _ in self.unread if name in kept}
        values, groups = self._in_file_order(matrix)
        if self.column_groups is not None:
            parts[self.column_groups] = kept.get(self.column_groups, groups)
        stored_shape = self.codes.stored_shapes(matrix.shape)[0]
        whole, stored_shape = _spelling(kept, self.codes.part, stored_shape)
        if whole is None:
            whole = self.codes.write(values, matrix.shape, stored_shape)
        parts[self.codes.part] = whole
        parts[self.scales.part] = self.scales.write(matrix.scales)
        parts |= self._write_zeros(matrix, kept)
        parts |= _write_scalar(self.global_scale, matrix.global_scale, kept)
        parts |= _write_scalar(self.input_scale, decoded.input_scale, kept)
        if self.shape_dtype is not None:
            parts[SHAPE_PART] = torch.tensor(matrix.shape, dtype=self.shape_dtype)
        return parts

    def _grid(self, shape: Shape) -> Shape:
        rows, columns = self.scheme.group_size(shape)
        return (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns))

    def _columns_of_groups(self, headers: Mapping[str, Header], widest: Shape) -> int:
        """K if all groups are whole; that of `widest` where groups do not tell."""
        scales, columns = headers.get(self.scales.part), self.scheme.group_shape[1]
        if scales is None or columns is None or len(scales.shape) < 2:
            return widest[-1]
        is_transposed = self.scales.arrangement is Arrangement.TRANSPOSED
        return scales.shape[-2 if is_transposed else -1] * columns

    def _check_stated_shape(self, tensors: Mapping[str, Tensor], shape: Shape) -> None:
        stated = self.stored_shape(tensors)
        if stated is not None and stated != shape:
            raise CheckpointError(
                f"{SHAPE_PART} ({stated}) must be the shape that config.json and the other parts "
                f"have; got {shape} from them. {_FETCH_BOTH}"
            )

    def _read_codes(self, stored: Tensor, shape: Shape, kept: dict[str, Tensor]) -> Tensor:
        values = self.codes.read(stored, shape)
        if self.scheme.code.is_float and self.scheme.bits == 8:
            check_numbers(self.codes.part, values, self.scheme.code)
        usual, found = self.codes.stored_shapes(shape)[0], tuple(stored.shape)
        is_exact = not self.codes.has_unused_bits(shape, found) or torch.equal(
            self.codes.write(values, shape, found), stored
        )
        _keep_spelling(kept, self.codes.part, stored, usual, is_exact)
        return values

    def _read_zeros(
        self, tensors: Mapping[str, Tensor], grid: Shape, kept: dict[str, Tensor]
    ) -> Tensor | None:
        layout = self.zero_points
        if layout is None:
            return None
        stored = tensors[layout.part]
        zeros = layout.read(stored, grid)
        if self.scheme.zero_point is not ZeroPoint.INTEGER:
            if (zeros != self._no_zero).any():
                raise CheckpointError(
                    f"{layout.part} must be 0, as config.json says that the codes are symmetric; "
                    f"got another value. {_FETCH_BOTH}"
                )
            kept[layout.part] = stored
            return None
        usual, found = layout.stored_shapes(grid)[0], tuple(stored.shape)
        is_exact = torch.equal(layout.write(zeros, found), stored)
        _keep_spelling(kept, layout.part, stored, usual, is_exact)
        return zeros

    def _write_zeros(
        self, matrix: QuantizedMatrix, kept: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        layout = self.zero_points
        if layout is None:
            return {}
        grid = self._grid(matrix.shape)
        whole, stored_shape = _spelling(kept, layout.part, layout.stored_shapes(grid)[0])
        if whole is None:
            zeros = matrix.zero_points
            if zeros is None:
                zeros = torch.full(grid, self._no_zero, dtype=torch.uint8, device=matrix.device)
            whole = layout.write(zeros, stored_shape)
        return {layout.part: whole}

    @property
    def _no_zero(self) -> int:
        """The zero point that symmetric codes have."""
        return 2 ** (self.scheme.bits - 1) if self.scheme.zero_point is ZeroPoint.MID else 0

    def _permutation(self, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor | None:
        """The columns in the order of their groups; None where they lie in it, or -1 says so."""
        if self.column_groups is None:
            return None
        groups = tensors[self.column_groups]
        in_order = self._groups_in_order(shape).to(groups)
        if torch.equal(groups, in_order) or (groups == -1).all():
            return None
        order = groups.argsort(dim=-1, stable=True)
        if not torch.equal(groups.gather(-1, order), in_order):
            raise CheckpointError(
                f"{self.column_groups} must give every group {self.scheme.group_shape[1]} columns; "
                f"got {groups.min().item()}..{groups.max().item()} in other numbers. {_FETCH_BOTH}"
            )
        return order.to(torch.int32)

    def _groups_in_order(self, shape: Shape) -> Tensor:
        groups = torch.arange(shape[-1]) // self.scheme.group_size(shape)[1]
        return groups.to(torch.int32).expand(*shape[:-2], -1).contiguous()

    def _in_file_order(self, matrix: QuantizedMatrix) -> tuple[Tensor, Tensor]:
        """Values in the file's order of columns, and the groups of these."""
        in_order = self._groups_in_order(matrix.shape).to(matrix.device)
        if matrix.permutation is None:
            return matrix.values, in_order
        order = matrix.permutation.argsort(dim=-1)
        values = _take_columns(matrix.values, order, matrix.shape[-1], matrix.scheme.bits)
        return values, in_order.gather(-1, order)

    def _check_writable(self, matrix: QuantizedMatrix) -> None:
        scheme = self.scheme
        if self.column_groups is not None:
            has_permutation = matrix.scheme.has_permutation
            scheme = dataclasses.replace(scheme, has_permutation=has_permutation)
        if matrix.scheme != scheme:
            raise ConfigError(
                f"matrix (shape {matrix.shape}, {matrix.scheme}) must be of scheme '{scheme}' to "
                f"be written in this format; got another. Quantize it with that scheme."
            )


def _keep_spelling(
    kept: dict[str, Tensor], part: str, stored: Tensor, usual: Shape, is_exact: bool
) -> None:
    """Keep what values do not tell of a part: all of it, or an empty tensor (0, *its shape)."""
    if not is_exact:
        kept[part] = stored
    elif tuple(stored.shape) != usual:
        kept[part] = stored.new_empty((0, *stored.shape))


def _spelling(kept: Mapping[str, Tensor], part: str, usual: Shape) -> tuple[Tensor | None, Shape]:
    """The whole part if it was kept, and the shape to write it in."""
    found = kept.get(part)
    if found is None:
        return None, usual
    return (found, usual) if found.numel() else (None, tuple(found.shape[1:]))


def _read_scalar(
    layout: ScalarLayout | None,
    tensors: Mapping[str, Tensor],
    stack: Shape,
    kept: dict[str, Tensor],
) -> Tensor | None:
    if layout is None or layout.part not in tensors:
        return None
    stored = tensors[layout.part]
    if layout.is_reciprocal or not layout.is_meant:
        kept[layout.part] = stored
    if not layout.is_meant:
        return None
    check_positive(layout.part, stored)
    multiplier = layout.read(stored, stack)
    check_positive(layout.part, multiplier)
    return multiplier


def _write_scalar(
    layout: ScalarLayout | None, multiplier: Tensor | None, kept: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    if layout is None:
        return {}
    stored = kept.get(layout.part)
    if multiplier is None:
        return {} if stored is None else {layout.part: stored}
    stack = tuple(multiplier.shape)
    if stored is None or not torch.equal(layout.read(stored, stack), multiplier):
        stored = layout.write(multiplier)
    return {layout.part: stored}


def _take_columns(values: Tensor, order: Tensor, num_columns: int, bits: int) -> Tensor:
    codes = unpack_codes(values, num_columns, bits)
    index = order.long().unsqueeze(-2).expand(codes.shape)
    return pack_codes(codes.gather(-1, index), bits)
