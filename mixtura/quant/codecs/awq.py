"""AWQ, packing "gemm": 4-bit codes, eight neighbouring output features in a word.

    W[n, k] = scales[k // g, n] * (code[k, n] - zero[k // g, n])

`qweight (K, N / 8)` and `qzeros (K / g, N / 8)` hold feature `8 * c + _FEATURES[i]` in bits `4 * i`
and up of word `c`. Without `qzeros` the zero point is 8.

Source: AutoAWQ 0.2, `WQLinear_GEMM`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from mixtura.errors import CheckpointError
from mixtura.quant.activations import ActivationScheme
from mixtura.quant.codecs.checks import (
    SCALE_FLOATS,
    check_encodable,
    check_finite,
    header_of,
    is_dense,
    matches_fragment,
    module_of,
    read_choice,
    read_group_size,
    read_setting,
)
from mixtura.quant.codecs.contract import Codec, Decoded, Header, MatrixFormat, Part
from mixtura.quant.codecs.words import bytes_of, count_codes, words_of
from mixtura.quant.matrix import QuantizedMatrix
from mixtura.quant.packing import pack_codes, unpack_codes
from mixtura.quant.scheme import Code, QuantScheme, ZeroPoint

_BITS = 4
_WORD_CODES = 32 // _BITS
_FEATURES = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble of a word -> which of the word's eight features it holds."""
_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""The inverse: feature -> nibble."""

_VERSIONS = ("gemm", "marlin", "exllama")
"""The last two choose a kernel for the same tensors; where they do not, the shapes differ."""


def _unpack_words(words: Tensor) -> Tensor:
    """Words (R, N / 8) to codes (R, N), one a byte."""
    num_codes = words.shape[1] * _WORD_CODES
    nibbles = unpack_codes(bytes_of(words), num_codes, _BITS)
    return nibbles.view(len(words), -1, _WORD_CODES)[..., list(_NIBBLES)].flatten(1)


def _pack_words(codes: Tensor) -> Tensor:
    """Undo `_unpack_words`."""
    nibbles = codes.reshape(len(codes), -1, _WORD_CODES)[..., list(_FEATURES)]
    return words_of(pack_codes(nibbles.flatten(1), _BITS))


@dataclass(frozen=True)
class AwqFormat(MatrixFormat):
    """How one matrix lies in an AWQ file.

    Attributes:
        group_size: columns that share a scale; None is all.
        has_zero_points: whether there are `qzeros`.
    """

    group_size: int | None
    has_zero_points: bool
    activations: ActivationScheme | None = None

    def shape_of(
        self, headers: Mapping[str, Header], shape: tuple[int, ...] | None
    ) -> tuple[int, ...]:
        num_columns, num_words = header_of(headers, "qweight", 2).shape
        return count_codes("qweight", num_words, _BITS), num_columns

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        num_rows, num_columns = shape
        num_groups = -(-num_columns // (self.group_size or num_columns))
        num_words = num_rows // _WORD_CODES
        parts = {
            "qweight": Part((torch.int32,), (num_columns, num_words)),
            "scales": Part(SCALE_FLOATS, (num_groups, num_rows)),
        }
        if self.has_zero_points:
            parts["qzeros"] = Part((torch.int32,), (num_groups, num_words))
        return parts

    def decode(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Decoded:
        scales = tensors["scales"]
        check_finite("scales", scales)
        codes = _unpack_words(tensors["qweight"]).t()
        zero_points = None
        if self.has_zero_points:
            zero_points = _unpack_words(tensors["qzeros"]).t().contiguous()
        return Decoded(
            QuantizedMatrix(
                self._scheme(scales.dtype),
                shape,
                pack_codes(codes, _BITS),
                scales.t().contiguous(),
                zero_points,
            )
        )

    def encode(self, decoded: Decoded) -> dict[str, Tensor]:
        matrix = decoded.matrix
        wanted = self._scheme(matrix.scheme.scale_dtype or torch.float16)
        check_encodable(matrix, wanted, "AWQ")
        assert matrix.scales is not None
        codes = unpack_codes(matrix.values, matrix.shape[1], _BITS)
        parts = {
            "qweight": _pack_words(codes.t()),
            "scales": matrix.scales.t().contiguous(),
        }
        if matrix.zero_points is not None:
            parts["qzeros"] = _pack_words(matrix.zero_points.t().to(torch.uint8))
        return parts

    def _scheme(self, scale_dtype: torch.dtype) -> QuantScheme:
        zero_point = ZeroPoint.INTEGER if self.has_zero_points else ZeroPoint.MID
        return QuantScheme(Code.INT, _BITS, (1, self.group_size), scale_dtype, zero_point)


@dataclass(frozen=True)
class Awq(Codec):
    """AWQ, configured.

    Attributes:
        group_size: columns that share a scale; None is all.
        needs_zero_points: whether `qzeros` must be there. Where they are, they count.
        unquantized: fragments of the names of modules that are left as they are.
    """

    name: ClassVar[str] = "AWQ"
    methods: ClassVar[tuple[str, ...]] = ("awq", "auto_awq", "awq_marlin")
    suffixes: ClassVar[Mapping[str, str]] = {
        ".qweight": "qweight",
        ".qzeros": "qzeros",
        ".scales": "scales",
        ".weight": "weight",
    }

    group_size: int | None
    needs_zero_points: bool
    unquantized: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        read_choice(config, "bits", "w_bit", choices=(_BITS,))
        read_choice(config, "version", "format", choices=_VERSIONS, default=_VERSIONS[0])
        if str(read_setting(config, "backend")).lower() == "llm-awq":
            raise CheckpointError(
                "backend ('llm-awq') must not be llm-awq; got that packing, which is not read. "
                "Use a checkpoint of AutoAWQ, version gemm."
            )
        return cls(
            read_group_size(config, "group_size", "q_group_size"),
            read_choice(config, "zero_point", choices=(True, False), default=True),
            tuple(map(str, read_setting(config, "modules_to_not_convert") or ())),
        )

    def format_of(self, name: str, headers: Mapping[str, Header]) -> MatrixFormat | None:
        if is_dense(headers):
            return None
        return AwqFormat(self.group_size, self.needs_zero_points or "qzeros" in headers)

    def expects(self, name: str) -> bool:
        return not matches_fragment(self.unquantized, module_of(name))
