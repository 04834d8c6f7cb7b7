"""GGUF: tensors of ggml's types, one type a tensor.

A matrix is the part `blocks`: the bytes of its rows, (N, bytes) or (E, N, bytes) uint8. Codes and
scales of most types become a scheme of ours, exactly:

    type                        code                groups   scales
    Q4_0, Q5_0, Q8_0            int, zero mid       32       fp16
    Q4_1, Q5_1                  int, minimum        32       fp16
    Q2_K / Q4_K, Q5_K           int, minimum        16 / 32  uint8, and fp16 for 256 columns
    Q3_K, Q6_K                  int, zero mid       16       int8, and fp16 for 256 columns
    IQ4_NL / IQ4_XS             codebook            32       fp16 / int8, and fp16 for 256 columns
    MXFP4 / NVFP4               e2m1                32 / 16  e8m0 / e4m3, with a scale of the matrix
    TQ1_0, TQ2_0, Q1_0, Q2_0    codebook            a block  fp16
    IQ1_*, IQ2_*, IQ3_*         blocks, unchanged
    F32, F16, BF16, F64         dense

What of a block its codes and scales do not determine (spare bits, bytes with a twin) is kept as
`block_headers`, and only needed to write the file again.

Source: ggml; for the companions `.scale` and `.input_scale` of NVFP4 the converter of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from mixtura.errors import CheckpointError, ConfigError
from mixtura.quant.activations import ActivationGroup, ActivationScheme
from mixtura.quant.block_codes import BLOCK_CODES
from mixtura.quant.codecs.checks import check_positive
from mixtura.quant.codecs.contract import Codec, Decoded, Header, MatrixFormat, Part
from mixtura.quant.codecs.gguf_blocks import LAYOUTS, Grids, Values, as_bytes, check_finite
from mixtura.quant.ggml_types import GgmlType
from mixtura.quant.matrix import QuantizedMatrix, dequantize, stack_experts
from mixtura.quant.packing import pack_codes, unpack_codes
from mixtura.quant.scheme import Code, GlobalScale, QuantScheme

DENSE_TYPES = {
    GgmlType.F32: torch.float32,
    GgmlType.F16: torch.float16,
    GgmlType.BF16: torch.bfloat16,
    GgmlType.F64: torch.float64,
}
"""Types that hold the numbers themselves."""

HEADERS = "block_headers"
"""The name of what `Decoded.kept` keeps of blocks."""


@dataclass(frozen=True)
class GgufBlocks(MatrixFormat):
    """A matrix of one ggml type.

    Attributes:
        type: of its blocks. has_scale: whether a scale of the whole matrix lies beside it.
    """

    type: GgmlType
    has_scale: bool = False
    activations: ActivationScheme | None = None

    @property
    def scheme(self) -> QuantScheme:
        """What the matrix will be."""
        if self.type in DENSE_TYPES:
            return QuantScheme.dense(DENSE_TYPES[self.type])
        if self.type.name.lower() in BLOCK_CODES:
            return QuantScheme.of_blocks(self.type.name.lower())
        scheme = LAYOUTS[self.type].scheme
        return replace(scheme, global_scale=GlobalScale.MATRIX) if self.has_scale else scheme

    def shape_of(
        self, headers: Mapping[str, Header], shape: tuple[int, ...] | None
    ) -> tuple[int, ...]:
        header = headers.get("blocks")
        if header is None:
            raise CheckpointError(
                f"a matrix of {self.type.name} must have a part blocks; got only "
                f"{', '.join(sorted(headers))}. Fetch the weights again."
            )
        if len(header.shape) not in (2, 3) or header.shape[-1] % self.type.block_bytes:
            raise CheckpointError(
                f"blocks ({header.shape}) must be (N, bytes) or (E, N, bytes) with rows of whole "
                f"blocks of {self.type.block_bytes} bytes ({self.type.name}); got other sizes. "
                f"Fetch the weights again."
            )
        num_blocks = header.shape[-1] // self.type.block_bytes
        return (*header.shape[:-1], num_blocks * self.type.block_columns)

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        row_bytes = self.type.row_bytes(shape[-1])
        found = {"blocks": Part((torch.uint8,), (*shape[:-1], row_bytes))}
        if self.type is GgmlType.NVFP4:
            size = shape[:-2] or (1,)
            found["scale"] = Part((torch.float32,), size, is_optional=True)
            found["input_scale"] = Part((torch.float32,), size, is_optional=True)
        return found

    def decode(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Decoded:
        blocks = tensors["blocks"]
        if len(shape) == 2:
            matrix, header = self._decode_matrix(blocks, shape)
        else:
            headers = []

            def experts() -> Any:
                for expert in blocks:
                    one, kept = self._decode_matrix(expert, shape[1:])
                    headers.append(kept)
                    yield one

            matrix = self._stack(blocks, shape) or stack_experts(experts(), shape[0])
            header = self._stack_headers(headers, blocks)
        if self.has_scale:
            check_positive("scale", tensors["scale"])
            scale = tensors["scale"].reshape(shape[:-2])
            matrix = replace(matrix, scheme=self.scheme, global_scale=scale)
        input_scale = tensors.get("input_scale")
        if input_scale is not None:
            check_positive("input_scale", input_scale)
            input_scale = input_scale.reshape(shape[:-2])
        return Decoded(matrix, input_scale, {} if header is None else {HEADERS: header})

    def _stack(self, blocks: Tensor, shape: tuple[int, ...]) -> QuantizedMatrix | None:
        """A stack of a type whose bytes are not changed; it shares memory with the file."""
        if self.type in LAYOUTS:
            return None
        self._check_blocks(blocks)
        return QuantizedMatrix(self.scheme, shape, self._values(blocks, shape))

    def _stack_headers(self, headers: list[Tensor | None], blocks: Tensor) -> Tensor | None:
        """Headers of all experts as soon as one has one."""
        if all(header is None for header in headers):
            return None
        spans = LAYOUTS[self.type].header
        raw = blocks.reshape(*blocks.shape[:-1], -1, self.type.block_bytes)
        return torch.cat([raw[..., start:stop] for start, stop in spans], -1)

    def _decode_matrix(
        self, blocks: Tensor, shape: tuple[int, ...]
    ) -> tuple[QuantizedMatrix, Tensor | None]:
        """One matrix (N, K) without its global scale, and the headers of its blocks."""
        if self.type not in LAYOUTS:
            self._check_blocks(blocks)
            return QuantizedMatrix(self.scheme, shape, self._values(blocks, shape)), None
        layout = LAYOUTS[self.type]
        raw = blocks.reshape(-1, self.type.block_bytes)
        found = layout.read(raw)
        rows = shape[0]
        grids = found.grids.reshaped(rows)
        matrix = QuantizedMatrix(
            layout.scheme,
            shape,
            pack_codes(found.codes.reshape(shape), layout.scheme.bits),
            grids.scales,
            grids.minima,
            super_scales=grids.super_scales,
            super_minima=grids.super_minima,
        )
        header = layout.header_of(raw)
        return matrix, None if header is None else header.reshape(rows, -1, header.shape[1])

    def _values(self, blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Dense numbers, or blocks that stay as they are."""
        dtype = DENSE_TYPES.get(self.type)
        if dtype is None:
            return blocks
        if blocks.data_ptr() % dtype.itemsize or blocks.storage_offset() % dtype.itemsize:
            blocks = blocks.clone()
        return blocks.view(dtype).reshape(shape)

    def _check_blocks(self, blocks: Tensor) -> None:
        code = BLOCK_CODES.get(self.type.name.lower())
        if code is not None:
            check_finite(code.scale(blocks.reshape(-1, code.num_bytes)), "scale")

    def encode(self, decoded: Decoded) -> dict[str, Tensor]:
        matrix = decoded.matrix
        if matrix.scheme != self.scheme:
            raise ConfigError(
                f"the matrix ('{matrix.scheme}') must have the scheme of {self.type.name}: "
                f"'{self.scheme}'; got another. Quantize it with the tools of llama.cpp."
            )
        if self.type not in LAYOUTS:
            blocks = as_bytes(matrix.values)
        else:
            header = decoded.kept.get(HEADERS)
            experts = range(matrix.shape[0]) if matrix.is_stack else ()
            parts = [
                self._encode_matrix(matrix.expert(e), None if header is None else header[e])
                for e in experts
            ]
            blocks = torch.stack(parts) if parts else self._encode_matrix(matrix, header)
        found = {"blocks": blocks}
        for name, scale in (("scale", matrix.global_scale), ("input_scale", decoded.input_scale)):
            if scale is not None:
                found[name] = scale.reshape(matrix.shape[:-2] or (1,))
        return found

    def _encode_matrix(self, matrix: QuantizedMatrix, header: Tensor | None) -> Tensor:
        layout = LAYOUTS[self.type]
        rows, columns = matrix.shape
        num_blocks = rows * columns // self.type.block_columns
        assert matrix.scales is not None
        grids = Grids(matrix.scales, matrix.zero_points, matrix.super_scales, matrix.super_minima)
        codes = unpack_codes(matrix.values, columns, layout.scheme.bits)
        values = Values(codes.reshape(num_blocks, -1), grids.reshaped(num_blocks))
        flat = None if header is None else header.reshape(num_blocks, -1)
        raw = layout.write(values, self.type.block_bytes, flat)
        if not _same(layout.read(raw), values):
            raise ConfigError(
                f"a matrix ({self.type.name}) must hold what its blocks can, and the {HEADERS} "
                f"that were read with it; got other codes, scales or headers. Keep Decoded.kept "
                f"beside the matrix."
            )
        return raw.reshape(rows, -1)


def _same(left: Values, right: Values) -> bool:
    """Whether blocks hold the same, to the bit."""
    mine, theirs = (left.codes, *left.grids), (right.codes, *right.grids)
    pairs = [(a, b) for a, b in zip(mine, theirs, strict=True) if a is not None and b is not None]
    return all(torch.equal(as_bytes(a), as_bytes(b)) for a, b in pairs)


@dataclass(frozen=True)
class Gguf(Codec):
    """Tensors of a GGUF file.

    Attributes:
        type: of tensors that `types` does not name; None: all are named.
        types: ggml types by dense name.
    """

    type: GgmlType | None = None
    types: Mapping[str, GgmlType] = field(default_factory=dict)

    name: ClassVar[str] = "GGUF"
    methods: ClassVar[tuple[str, ...]] = ("gguf",)
    suffixes: ClassVar[Mapping[str, str]] = {
        ".weight": "blocks",
        ".blocks": "blocks",
        ".scale": "scale",
        ".input_scale": "input_scale",
    }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read `ggml_type`, of all tensors, or `ggml_types`, by dense name.

        Raises:
            CheckpointError: neither is there, or a type is not one of ggml's for weights.
        """
        one, many = config.get("ggml_type"), config.get("ggml_types", {})
        if not isinstance(many, Mapping) or (one is None and not many):
            raise CheckpointError(
                f"a GGUF configuration ({config}) must have ggml_type or ggml_types; got neither. "
                f"Open the file with open_gguf."
            )
        types = {name: _weight_type(str(type)) for name, type in many.items()}
        return cls(None if one is None else _weight_type(str(one)), types)

    def format_of(self, name: str, headers: Mapping[str, Header]) -> MatrixFormat | None:
        type = self.types.get(name, self.type)
        if type is None or "weight" in headers:
            return None
        has_input_scale = "input_scale" in headers
        activations = ActivationScheme(Code.E2M1, 4, ActivationGroup.GROUP, 16, is_static=True)
        return GgufBlocks(
            type, has_scale="scale" in headers, activations=activations if has_input_scale else None
        )

    def expects(self, name: str) -> bool:
        return self.types.get(name, self.type) not in (None, *DENSE_TYPES)


def _weight_type(name: str) -> GgmlType:
    type = GgmlType.parse(name)
    if not is_weight_type(type):
        raise CheckpointError(
            f"ggml_type ({name}) must be a type of weights; got one of whole numbers. Use another "
            f"file."
        )
    return type


def is_weight_type(type: GgmlType) -> bool:
    """Whether matrices of a type are read."""
    return type in DENSE_TYPES or type in LAYOUTS or type.name.lower() in BLOCK_CODES


def read_weight(type: GgmlType, blocks: Tensor) -> Tensor:
    """A tensor of any number of dims as plain numbers: its own dtype where dense, else fp32.

    Args:
        type: of its blocks.
        blocks: (..., bytes of a row) uint8.

    Raises:
        CheckpointError: a scale is not finite, or the type is none of weights.
    """
    _weight_type(type.name)
    rows = blocks.reshape(-1, blocks.shape[-1])
    columns = blocks.shape[-1] // type.block_bytes * type.block_columns
    matrix = GgufBlocks(type).decode({"blocks": rows}, (rows.shape[0], columns)).matrix
    weight = dequantize(matrix, DENSE_TYPES.get(type, torch.float32))
    return weight.reshape(*blocks.shape[:-1], columns)
