"""gpt-oss: MXFP4 experts in one stack, `_blocks` and `_scales`.

    W[e, n, k] = e2m1[code] * 2 ** (scales[e, n, k // 32] - 127)

`blocks (E, N, K / 32, 16)` hold two codes a byte, the even column in the low nibble. Rows are as
the file has them: gate and up rows of `gate_up_proj` alternate.

Source: openai/gpt-oss; Transformers 5.23 `integrations/mxfp4.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from mixtura.quant.codecs.checks import is_dense, module_of
from mixtura.quant.codecs.code_layouts import ByteBlocks
from mixtura.quant.codecs.config_values import read_names
from mixtura.quant.codecs.contract import Codec, Header, MatrixFormat
from mixtura.quant.codecs.float_matrices import E8M0_DTYPES, MX_COLUMNS, unknown_parts
from mixtura.quant.codecs.grid_layouts import GridLayout
from mixtura.quant.codecs.module_names import is_listed, naming
from mixtura.quant.codecs.stored_matrix import StoredMatrix
from mixtura.quant.scheme import Code, QuantScheme


@dataclass(frozen=True)
class GptOss(Codec):
    """MXFP4 of gpt-oss, configured. Attributes: `ignored`, modules that are not quantized."""

    name: ClassVar[str] = "gpt-oss MXFP4"
    methods: ClassVar[tuple[str, ...]] = ("mxfp4", "gpt_oss_mxfp4")
    suffixes: ClassVar[Mapping[str, str]] = {
        "_blocks": "blocks",
        "_scales": "scales",
        ".weight": "weight",
    }

    ignored: tuple[str, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(read_names(config, "modules_to_not_convert", "ignored_layers"))

    def expects(self, name: str) -> bool:
        return ".experts." in f"{name}." and not is_listed(module_of(name), self.ignored)

    def format_of(self, name: str, headers: Mapping[str, Header]) -> MatrixFormat | None:
        with naming(name):
            return None if is_dense(headers) else self._format_of(headers)

    def _format_of(self, headers: Mapping[str, Header]) -> StoredMatrix:
        scales = headers.get("scales")
        if "weight" in headers or scales is None or scales.dtype not in E8M0_DTYPES:
            raise unknown_parts(self.name, headers)
        return StoredMatrix(
            QuantScheme(Code.E2M1, 4, (1, MX_COLUMNS), torch.float8_e8m0fnu),
            None,
            ByteBlocks("blocks"),
            GridLayout("scales", scales.dtype),
        )
