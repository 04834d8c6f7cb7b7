"""Matrices of small floats that several families store alike: fp8, MXFP4 to MXFP8, NVFP4."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mixtura.errors import CheckpointError
from mixtura.quant.activations import ActivationExtra, ActivationGroup, ActivationScheme
from mixtura.quant.codecs.checks import SCALE_FLOATS
from mixtura.quant.codecs.code_layouts import RowBytes
from mixtura.quant.codecs.contract import Header
from mixtura.quant.codecs.grid_layouts import Arrangement, GridLayout, ScalarLayout
from mixtura.quant.codecs.stored_matrix import StoredMatrix
from mixtura.quant.scheme import Code, GlobalScale, QuantScheme

FLOAT8_CODES = {torch.float8_e4m3fn: Code.E4M3, torch.float8_e5m2: Code.E5M2}
E8M0_DTYPES = (torch.uint8, torch.float8_e8m0fnu)
MX_COLUMNS = 32
NVFP4_COLUMNS = 16
FP8_TOKEN = ActivationScheme(Code.E4M3, 8, ActivationGroup.TOKEN)
FP8_STATIC = ActivationScheme(Code.E4M3, 8, ActivationGroup.TENSOR, is_static=True)
MXFP8_ACTIVATIONS = ActivationScheme(
    Code.E4M3, 8, ActivationGroup.GROUP, MX_COLUMNS, extra=ActivationExtra.POWER_SCALES
)
NVFP4_ACTIVATIONS = ActivationScheme(
    Code.E2M1, 4, ActivationGroup.GROUP, NVFP4_COLUMNS, is_static=True
)

GroupShape = tuple[int | None, int | None]


def needed_header(headers: Mapping[str, Header], part: str) -> Header:
    """The header of a part.

    Raises:
        CheckpointError: it is missing.
    """
    if part not in headers:
        raise CheckpointError(
            f"{part} (none) must be there; got only {', '.join(sorted(headers))}. Fetch the "
            f"weights again."
        )
    return headers[part]


def unknown_parts(family: str, headers: Mapping[str, Header]) -> CheckpointError:
    """The error that the parts of a matrix are none that a family writes."""
    found = ", ".join(
        f"{part} {str(header.dtype).removeprefix('torch.')} {header.shape}"
        for part, header in sorted(headers.items())
    )
    return CheckpointError(
        f"parts ({family}) must be ones that are read together; got {found}. Fetch config.json "
        f"and the weights again, both of one model, or use another checkpoint of the model."
    )


def input_scale_of(
    headers: Mapping[str, Header],
    activations: ActivationScheme | None,
    part: str = "input_scale",
    is_reciprocal: bool = False,
) -> ScalarLayout | None:
    """The layout of the scale of activations; one of dynamic activations is kept, not read.

    Where activations are static the part may be missing: an expert that no calibration token
    reached has none. None where there is nothing to read or keep.
    """
    is_static = activations is not None and activations.is_static
    header = headers.get(part)
    if header is None:
        return ScalarLayout(part, is_reciprocal=is_reciprocal) if is_static else None
    if header.dtype not in SCALE_FLOATS:
        raise CheckpointError(
            f"{part} ({header.dtype}) must be float32, bfloat16 or float16; got {header.dtype}. "
            f"Fetch the weights again."
        )
    codes = next(headers[name] for name in ("weight", "weight_packed") if name in headers)
    tail = _tail_of_ones(header, len(codes.shape) - 2)
    return ScalarLayout(part, header.dtype, tail, is_reciprocal, is_meant=is_static)


def scalar_of(
    headers: Mapping[str, Header], part: str, num_stack_dims: int, is_reciprocal: bool = False
) -> ScalarLayout:
    """The layout of a global scale, (), (1,) or (1, 1) for each matrix of the stack."""
    tail = _tail_of_ones(needed_header(headers, part), num_stack_dims)
    return ScalarLayout(part, torch.float32, tail, is_reciprocal)


def _tail_of_ones(header: Header, num_stack_dims: int) -> tuple[int, ...]:
    """Dims behind those of the stack; () if they cannot be those of one value."""
    tail = header.shape[max(num_stack_dims, 0) :]
    return tail if tail in ((1,), (1, 1)) else ()


def granularity(
    headers: Mapping[str, Header], scale_part: str, block: GroupShape | None
) -> tuple[GroupShape, Arrangement]:
    """What shares a scale, by the shapes of `weight` and of its scales.

    Args:
        headers: by part. scale_part: the scales.
        block: rows and columns of the blocks, if the configuration has them: a grid of one or two
            dims more than (), (1,), (N,) or (N, 1) is one of blocks, never deduced from its size.
    """
    weight, scale = needed_header(headers, "weight"), needed_header(headers, scale_part)
    tail = scale.shape[max(len(weight.shape) - 2, 0) :]
    num_dims = len(tail)
    if block is not None and num_dims in (2, 4):
        return block, Arrangement.SPACED if num_dims == 4 else Arrangement.GRID
    if all(size == 1 for size in tail):
        return (None, None), Arrangement.of_tensor(num_dims)
    if num_dims == 1 or (num_dims == 2 and tail[1] == 1):
        return (1, None), Arrangement.of_channels(num_dims)
    raise CheckpointError(
        f"{scale_part} (shape {scale.shape}) must hold one value, or one a row; got a grid, and "
        f"config.json gives no block size. Fetch config.json and the weights again, both of one "
        f"model."
    )


def float8_matrix(
    headers: Mapping[str, Header],
    scale_part: str,
    group: tuple[GroupShape, Arrangement],
    activations: ActivationScheme | None,
    input_scale: ScalarLayout | None = None,
) -> StoredMatrix:
    """8-bit floats in `weight`, scaled per matrix, row or block by floats or e8m0 codes.

    Raises:
        CheckpointError: a part has a dtype that cannot be meant.
    """
    weight, scale = needed_header(headers, "weight"), needed_header(headers, scale_part)
    code = FLOAT8_CODES.get(weight.dtype)
    if code is None or scale.dtype not in (*SCALE_FLOATS, *E8M0_DTYPES):
        raise CheckpointError(
            f"{scale_part} ({scale.dtype} beside weight {weight.dtype}) must be scales of floats "
            f"of 8 bits in float32, bfloat16, float16 or e8m0; got another dtype. Fetch the "
            f"weights again."
        )
    scale_dtype = torch.float8_e8m0fnu if scale.dtype in E8M0_DTYPES else scale.dtype
    return StoredMatrix(
        QuantScheme(code, 8, group[0], scale_dtype),
        activations,
        RowBytes("weight", 8, weight.dtype),
        GridLayout(scale_part, scale.dtype, group[1]),
        input_scale=input_scale,
    )


def microscaled_matrix(
    headers: Mapping[str, Header],
    code: Code,
    activations: ActivationScheme | None,
    *,
    codes_part: str = "weight",
    scale_part: str = "weight_scale",
    group_columns: int = MX_COLUMNS,
    input_scale: ScalarLayout | None = None,
) -> StoredMatrix:
    """MXFP4, MXFP6 or MXFP8: codes of `code` in bytes, an e8m0 scale for 32 columns of a row.

    Raises:
        CheckpointError: a part is missing, or the scales are no e8m0 codes.
    """
    codes, scale = needed_header(headers, codes_part), needed_header(headers, scale_part)
    if scale.dtype not in E8M0_DTYPES:
        raise CheckpointError(
            f"{scale_part} ({scale.dtype}) must be e8m0 codes in uint8 or float8_e8m0fnu; got "
            f"{scale.dtype}. Fetch the weights again."
        )
    bits = 1 + code.exponent_bits + code.mantissa_bits
    return StoredMatrix(
        QuantScheme(code, bits, (1, group_columns), torch.float8_e8m0fnu),
        activations,
        RowBytes(codes_part, bits, codes.dtype),
        GridLayout(scale_part, scale.dtype),
        input_scale=input_scale,
    )


def nvfp4_matrix(
    headers: Mapping[str, Header],
    activations: ActivationScheme | None,
    *,
    codes_part: str,
    global_part: str,
    is_reciprocal: bool,
    input_scale: ScalarLayout | None,
    group_columns: int = NVFP4_COLUMNS,
) -> StoredMatrix:
    """NVFP4: e2m1 in bytes, an e4m3 scale for 16 columns of a row, one fp32 for the matrix.

    Args:
        headers: by part; the e4m3 scales are `weight_scale`.
        activations: how activations are to be quantized.
        codes_part, global_part: parts of the codes and of the global scale.
        is_reciprocal: whether the stored global scale divides.
        input_scale: of the activations' global scale.
        group_columns: columns that share a scale.
    """
    codes = needed_header(headers, codes_part)
    num_stack_dims = max(len(codes.shape) - 2, 0)
    return StoredMatrix(
        QuantScheme(
            Code.E2M1,
            4,
            (1, group_columns),
            torch.float8_e4m3fn,
            global_scale=GlobalScale.MATRIX,
        ),
        activations,
        RowBytes(codes_part, 4, torch.uint8),
        GridLayout("weight_scale", torch.float8_e4m3fn),
        global_scale=scalar_of(headers, global_part, num_stack_dims, is_reciprocal),
        input_scale=input_scale,
    )
