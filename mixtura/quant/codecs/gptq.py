"""GPTQ, formats v1 and v2: codes of 2, 3, 4 or 8 bits, packed along the input features.

    W[n, k] = scales[g_idx[k], n] * (code[k, n] - zero[g_idx[k], n])

A column of `qweight (K * bits / 32, N)` is one little-endian stream of codes, which is a row of
`QuantizedMatrix.values`. `zero` is what `qzeros` holds plus 1 in v1, and what it holds in v2. With
`sym` it is `2 ** (bits - 1)` whatever `qzeros` holds: many files hold the other version's constant.

Source: AutoGPTQ 0.7 (v1) and GPTQModel 7.7 (v2), their torch kernels.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from mixtura.errors import CheckpointError, ConfigError
from mixtura.quant.activations import ActivationScheme
from mixtura.quant.codecs.checks import (
    SCALE_FLOATS,
    check_encodable,
    check_finite,
    header_of,
    is_dense,
    module_of,
    read_choice,
    read_group_size,
    read_setting,
)
from mixtura.quant.codecs.contract import Codec, Decoded, Header, MatrixFormat, Part
from mixtura.quant.codecs.module_names import compiled_pattern
from mixtura.quant.codecs.words import bytes_of, count_codes, count_words, words_of
from mixtura.quant.matrix import QuantizedMatrix
from mixtura.quant.packing import pack_codes, unpack_codes
from mixtura.quant.scheme import Code, QuantScheme, ZeroPoint

_BITS = (2, 3, 4, 8)
_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
"""Format -> what is added to a stored zero point."""


@dataclass(frozen=True)
class GptqFormat(MatrixFormat):
    """How one matrix lies in a GPTQ file.

    Attributes:
        bits: of a code. group_size: columns that share a scale; None is all.
        is_symmetric: zero points are `2 ** (bits - 1)` and `qzeros` means nothing.
        zero_offset: added to what `qzeros` holds.
        needs_groups: whether columns are said to be ordered, so that `g_idx` must be there.
    """

    bits: int
    group_size: int | None
    is_symmetric: bool
    zero_offset: int
    activations: ActivationScheme | None = None
    needs_groups: bool = False

    def shape_of(
        self, headers: Mapping[str, Header], shape: tuple[int, ...] | None
    ) -> tuple[int, ...]:
        num_words, num_rows = header_of(headers, "qweight", 2).shape
        return num_rows, count_codes("qweight", num_words, self.bits)

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        num_rows, num_columns = shape
        num_groups = -(-num_columns // (self.group_size or num_columns))
        row_words = count_words("input features", num_columns, self.bits)
        zero_words = count_words("output features", num_rows, self.bits)
        return {
            "qweight": Part((torch.int32,), (row_words, num_rows)),
            "qzeros": Part((torch.int32,), (num_groups, zero_words)),
            "scales": Part(SCALE_FLOATS, (num_groups, num_rows)),
            "g_idx": Part((torch.int32,), (num_columns,), is_optional=not self.needs_groups),
        }

    def decode(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Decoded:
        num_rows, num_columns = shape
        scales, groups = tensors["scales"], tensors.get("g_idx")
        check_finite("scales", scales)
        permutation = None if groups is None else self._permutation(groups, len(scales))
        values = bytes_of(tensors["qweight"].t())
        kept = {}
        if permutation is not None:
            codes = unpack_codes(values, num_columns, self.bits)
            values = pack_codes(codes[:, permutation], self.bits)
        elif groups is not None:
            kept["g_idx"] = groups
        zero_points = None
        if self.is_symmetric:
            kept["qzeros"] = tensors["qzeros"]
        else:
            zero_points = self._zero_points(tensors["qzeros"], num_rows)
        matrix = QuantizedMatrix(
            self._scheme(scales.dtype, has_permutation=permutation is not None),
            shape,
            values,
            scales.t().contiguous(),
            zero_points,
            permutation=permutation,
        )
        return Decoded(matrix, kept=kept)

    def contradiction(self, tensors: Mapping[str, Tensor]) -> str | None:
        words = tensors["qzeros"]
        stored = unpack_codes(bytes_of(words), tensors["qweight"].shape[1], self.bits)
        low, high = int(stored.min()), int(stored.max())
        if not self.is_symmetric or low == high:
            return None
        return (
            f"qzeros ({low}..{high}) must hold one number, as sym in the configuration says that "
            f"the codes are symmetric; got several. Fetch the configuration and the weights again, "
            f"both of one model."
        )

    def encode(self, decoded: Decoded) -> dict[str, Tensor]:
        matrix, kept = decoded.matrix, decoded.kept
        scheme = matrix.scheme
        wanted = self._scheme(scheme.scale_dtype or torch.float16, scheme.has_permutation)
        check_encodable(matrix, wanted, "GPTQ")
        assert matrix.scales is not None
        values, parts = matrix.values, {}
        if matrix.permutation is not None:
            num_columns = matrix.shape[1]
            inverse = matrix.permutation.argsort()
            codes = unpack_codes(values, num_columns, self.bits)
            values = pack_codes(codes[:, inverse], self.bits)
            parts["g_idx"] = (inverse // (self.group_size or num_columns)).to(torch.int32)
        elif "g_idx" in kept:
            parts["g_idx"] = kept["g_idx"]
        parts["qweight"] = words_of(values).t().contiguous()
        parts["scales"] = matrix.scales.t().contiguous()
        parts["qzeros"] = kept["qzeros"] if "qzeros" in kept else self._stored_zeros(matrix)
        return parts

    def _scheme(self, scale_dtype: torch.dtype, has_permutation: bool) -> QuantScheme:
        zero_point = ZeroPoint.MID if self.is_symmetric else ZeroPoint.INTEGER
        return QuantScheme(
            Code.INT,
            self.bits,
            (1, self.group_size),
            scale_dtype,
            zero_point,
            has_permutation=has_permutation,
        )

    def _permutation(self, groups: Tensor, num_groups: int) -> Tensor | None:
        """The columns in the order of their groups; None where they lie in it."""
        num_columns = len(groups)
        in_order = torch.arange(num_columns, device=groups.device)
        in_order = in_order // (self.group_size or num_columns)
        if torch.equal(groups, in_order.to(groups.dtype)):
            return None
        low, high = groups.min().item(), groups.max().item()
        if low < 0 or high >= num_groups:
            raise CheckpointError(
                f"g_idx ({low}..{high}) must name groups in 0..{num_groups - 1}; got another. "
                f"Fetch the weights again."
            )
        order = groups.argsort(stable=True)
        if not torch.equal(groups[order], in_order.to(groups.dtype)):
            raise CheckpointError(
                f"g_idx (groups of {groups.bincount(minlength=num_groups).tolist()[:8]} columns, "
                f"...) must give every group {self.group_size} columns; got another number. Fetch "
                f"the configuration and the weights again, both of one model."
            )
        return order.to(torch.int32)

    def _zero_points(self, words: Tensor, num_rows: int) -> Tensor:
        stored = unpack_codes(bytes_of(words), num_rows, self.bits)
        if self.zero_offset and (stored == 2**self.bits - 1).any():
            warnings.warn(
                f"qzeros (a stored {2**self.bits - 1}) of a GPTQ v1 file is read as zero point "
                f"{2**self.bits}, as AutoGPTQ's main kernel does. Its writers store it for zero "
                f"point 0 too, and damage the other zero points of the word: if the model is bad, "
                f"quantize it again in format gptq_v2.",
                stacklevel=2,
            )
        zero_points = stored.t().to(torch.int16 if self.bits == 8 else torch.uint8)
        return (zero_points + self.zero_offset).contiguous()

    def _stored_zeros(self, matrix: QuantizedMatrix) -> Tensor:
        zero_points = matrix.zero_points
        if zero_points is None:
            assert matrix.scales is not None
            middle = 2 ** (self.bits - 1)
            zero_points = torch.full_like(matrix.scales, middle, dtype=torch.int16)
        stored = zero_points.t().to(torch.int16) - self.zero_offset
        if stored.min() < 0 or stored.max() >= 2**self.bits:
            raise ConfigError(
                f"zero_points ({zero_points.min().item()}..{zero_points.max().item()}) must be in "
                f"{self.zero_offset}..{2**self.bits - 1 + self.zero_offset}; got one outside. "
                f"Write format {'gptq_v2' if self.zero_offset else 'gptq'}."
            )
        return words_of(pack_codes(stored.to(torch.uint8), self.bits))


@dataclass(frozen=True)
class Gptq(Codec):
    """GPTQ, configured.

    Attributes:
        format: of matrices that no rule is about.
        rules: patterns of module names and the format each asks for, None for unquantized modules;
            the first that fits counts.
        has_quantized_head: whether the language model's head is meant to be quantized.
    """

    name: ClassVar[str] = "GPTQ"
    methods: ClassVar[tuple[str, ...]] = ("gptq", "auto_gptq", "gptq_marlin")
    suffixes: ClassVar[Mapping[str, str]] = {
        ".qweight": "qweight",
        ".qzeros": "qzeros",
        ".scales": "scales",
        ".g_idx": "g_idx",
        ".weight": "weight",
    }

    format: GptqFormat
    rules: tuple[tuple[re.Pattern[str], GptqFormat | None], ...] = ()
    has_quantized_head: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        version = read_choice(
            config,
            "checkpoint_format",
            "format",
            choices=tuple(_ZERO_OFFSETS),
            default="gptq",
        )
        base = GptqFormat(
            bits=read_choice(config, "bits", choices=_BITS),
            group_size=read_group_size(config, "group_size"),
            is_symmetric=read_choice(config, "sym", choices=(True, False), default=False),
            zero_offset=_ZERO_OFFSETS[version],
            needs_groups=config.get("desc_act") is True,
        )
        rules = read_setting(config, "dynamic") or {}
        if not isinstance(rules, Mapping):
            raise CheckpointError(
                f"dynamic ({rules!r}) must map patterns of module names to settings; got "
                f"{type(rules).__name__}. Fetch the configuration again."
            )
        has_quantized_head = config.get("lm_head") is True
        return cls(base, tuple(_rule(*rule, base) for rule in rules.items()), has_quantized_head)

    def format_of(self, name: str, headers: Mapping[str, Header]) -> MatrixFormat | None:
        if is_dense(headers):
            return None
        found = self._rule_for(name)
        return self.format if found is None else found

    def expects(self, name: str) -> bool:
        if module_of(name).rpartition(".")[2] == "lm_head":
            return self.has_quantized_head
        return self._rule_for(name) is not None

    def _rule_for(self, name: str) -> GptqFormat | None:
        module = module_of(name)
        fitting = (format for pattern, format in self.rules if pattern.match(module))
        return next(fitting, self.format)


def _rule(
    key: str, settings: Mapping[str, Any], base: GptqFormat
) -> tuple[re.Pattern[str], GptqFormat | None]:
    """One entry of `dynamic`: `-:pattern` leaves modules unquantized, `+:pattern` or a bare one
    overrides settings."""
    is_excluded = key.startswith("-:")
    pattern = compiled_pattern("dynamic", key.removeprefix("-:").removeprefix("+:"))
    if is_excluded:
        return pattern, None
    if not isinstance(settings, Mapping):
        raise CheckpointError(
            f"dynamic ({key!r}) must map to settings; got {settings!r}. Fetch the configuration "
            f"again."
        )
    format = dataclasses.replace(
        base,
        bits=read_choice(settings, "bits", choices=_BITS, default=base.bits),
        is_symmetric=read_choice(settings, "sym", choices=(True, False), default=base.is_symmetric),
    )
    if settings.get("group_size") is not None:
        format = dataclasses.replace(format, group_size=read_group_size(settings, "group_size"))
    return pattern, format
