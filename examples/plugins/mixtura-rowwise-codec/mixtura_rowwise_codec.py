"""Checkpoints of int8 rows with a scale in fp16 for each: W[n, k] = qweight[n, k] * row_scale[n].

| part      | dtype | shape  |
| --------- | ----- | ------ |
| qweight   | int8  | (N, K) |
| row_scale | fp16  | (N, 1) |

A stack of experts has the same parts with the experts in front.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from mixtura.errors import CheckpointError, ConfigError
from mixtura.quant.codecs import Codec, Decoded, Header, MatrixFormat, Part, Sample
from mixtura.quant.matrix import QuantizedMatrix
from mixtura.quant.scheme import Code, QuantScheme, ZeroPoint

MIXTURA_API = 1
SCHEME = QuantScheme(Code.INT, 8, (1, None), torch.float16, ZeroPoint.MID)
OFFSET = 128
"""Schemes store a signed integer q of 8 bits as the byte q + 128."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class RowwiseMatrix(MatrixFormat):
    """How a matrix lies in the file."""

    activations = None  # rows come as they are

    def shape_of(self, headers: Mapping[str, Header], shape: Shape | None) -> Shape:
        header = headers.get("qweight")
        if header is None:
            raise CheckpointError(
                f"qweight (none) must be there; got only {', '.join(headers)}. Fetch the weights "
                f"again."
            )
        return header.shape

    def parts(self, shape: Shape) -> dict[str, Part]:
        return {
            "qweight": Part((torch.int8,), shape),
            "row_scale": Part((torch.float16,), (*shape[:-1], 1)),
        }

    def decode(self, tensors: Mapping[str, Tensor], shape: Shape) -> Decoded:
        scales = tensors["row_scale"]
        if not scales.isfinite().all():
            raise CheckpointError(
                "row_scale must be finite; got NaN or an infinity. Fetch the weights again."
            )
        codes = (tensors["qweight"].to(torch.int16) + OFFSET).to(torch.uint8)
        return Decoded(QuantizedMatrix(SCHEME, shape, codes, scales))

    def encode(self, decoded: Decoded) -> dict[str, Tensor]:
        matrix = decoded.matrix
        if matrix.scheme != SCHEME:
            raise ConfigError(
                f"scheme ({matrix.scheme}) must be {SCHEME} to be written as rowwise_int8; got "
                f"another. Quantize with that scheme."
            )
        assert matrix.scales is not None
        codes = (matrix.values.to(torch.int16) - OFFSET).to(torch.int8)
        return {"qweight": codes, "row_scale": matrix.scales}


@dataclass(frozen=True)
class RowwiseInt8(Codec):
    """The family, configured. Attributes: `dense`, modules that are not quantized."""

    name: ClassVar[str] = "row-wise int8"
    methods: ClassVar[tuple[str, ...]] = ("rowwise_int8",)
    suffixes: ClassVar[Mapping[str, str]] = {
        ".weight": "weight",
        ".qweight": "qweight",
        ".row_scale": "row_scale",
    }

    dense: tuple[str, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        dense = config.get("dense_modules") or ()
        if not isinstance(dense, (list, tuple)) or not all(isinstance(n, str) for n in dense):
            raise CheckpointError(
                f"dense_modules ({dense!r}) must be a list of names; got another. Fetch "
                f"config.json again."
            )
        return cls(tuple(dense))

    @classmethod
    def sample(cls) -> Sample:
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(-128, 128, (6, 10), generator=generator).to(torch.int8)
        scales = (torch.rand(6, 1, generator=generator) + 0.1).half()
        parts = {"qweight": codes, "row_scale": scales}
        config = {"quant_method": "rowwise_int8", "dense_modules": ["lm_head"]}
        return Sample(config, parts, codes.float() * scales.float())

    def format_of(self, name: str, headers: Mapping[str, Header]) -> MatrixFormat | None:
        if headers.keys() == {"weight"} and headers["weight"].dtype.is_floating_point:
            return None
        return RowwiseMatrix()

    def expects(self, name: str) -> bool:
        return name.removesuffix(".weight") not in self.dense
