"""The weight formats that have a name at the edge: the command line and `weights=`."""

from __future__ import annotations

import difflib
from enum import Enum

import torch

from mixtura.errors import ConfigError
from mixtura.quant.activations import ActivationGroup, ActivationScheme
from mixtura.quant.scheme import Code, GlobalScale, QuantScheme, ZeroPoint


class WeightFormat(Enum):
    """The weight formats that can be asked for by name; `.scheme` says what each one stores.

    Integer formats are symmetric. Scales are fp32 where one covers a whole row or block, bf16 in
    groups of up to 128, where fp32 would cost up to a bit per weight.
    """

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8_CHANNEL = "int8-channel"  # per output channel
    INT8_G32 = "int8-g32"
    INT8_G64 = "int8-g64"
    INT8_G128 = "int8-g128"
    INT4_G32 = "int4-g32"
    INT4_G64 = "int4-g64"
    INT4_G128 = "int4-g128"
    FP8 = "fp8"  # e4m3, per output channel
    FP8_BLOCK = "fp8-block"  # e4m3, blocks of 128x128
    MXFP4 = "mxfp4"  # e2m1, groups of 32, e8m0 scales
    NVFP4 = "nvfp4"  # e2m1, groups of 16, e4m3 scales, fp32 global scale

    @property
    def scheme(self) -> QuantScheme:
        """How matrices of this format are stored."""
        return _FORMAT_SCHEMES[self]

    @property
    def activations(self) -> ActivationScheme | None:
        """What files of this format ask activations to be rounded to while running, or None."""
        return _FORMAT_ACTIVATIONS.get(self)

    @classmethod
    def parse(cls, name: str) -> WeightFormat:
        """The format called `name`, by its own name or a short one (see `SHORT_NAMES`).

        Raises:
            ConfigError: there is none; the message lists the names.

        >>> WeightFormat.parse("int4-g32").scheme.bits
        4
        >>> WeightFormat.parse("int4").value
        'int4-g128'
        """
        if name in SHORT_NAMES:
            return SHORT_NAMES[name]
        choices = [format.value for format in cls]
        if name in choices:
            return cls(name)
        choices += SHORT_NAMES
        close = difflib.get_close_matches(name, choices, n=1)
        remedy = f"Did you mean {close[0]}?" if close else "Use one of these names."
        raise ConfigError(
            f"weight format ({name}) must be one of {', '.join(choices)}; got an unknown name. "
            f"{remedy}"
        )


def _int_scheme(bits: int, group_columns: int | None) -> QuantScheme:
    scale_dtype = torch.float32 if group_columns is None else torch.bfloat16
    return QuantScheme(Code.INT, bits, (1, group_columns), scale_dtype, ZeroPoint.MID)


_FORMAT_SCHEMES = {
    WeightFormat.FP32: QuantScheme.dense(torch.float32),
    WeightFormat.FP16: QuantScheme.dense(torch.float16),
    WeightFormat.BF16: QuantScheme.dense(torch.bfloat16),
    WeightFormat.INT8_CHANNEL: _int_scheme(8, None),
    WeightFormat.INT8_G32: _int_scheme(8, 32),
    WeightFormat.INT8_G64: _int_scheme(8, 64),
    WeightFormat.INT8_G128: _int_scheme(8, 128),
    WeightFormat.INT4_G32: _int_scheme(4, 32),
    WeightFormat.INT4_G64: _int_scheme(4, 64),
    WeightFormat.INT4_G128: _int_scheme(4, 128),
    WeightFormat.FP8: QuantScheme(Code.E4M3, 8, (1, None), torch.float32),
    WeightFormat.FP8_BLOCK: QuantScheme(Code.E4M3, 8, (128, 128), torch.float32),
    WeightFormat.MXFP4: QuantScheme(Code.E2M1, 4, (1, 32), torch.float8_e8m0fnu),
    WeightFormat.NVFP4: QuantScheme(
        Code.E2M1, 4, (1, 16), torch.float8_e4m3fn, global_scale=GlobalScale.MATRIX
    ),
}

_FORMAT_ACTIVATIONS = {
    WeightFormat.FP8: ActivationScheme(Code.E4M3, 8, ActivationGroup.TOKEN),
    WeightFormat.FP8_BLOCK: ActivationScheme(Code.E4M3, 8, ActivationGroup.GROUP, 128),
}
"""Those of the presets that `mixtura quantize` writes; other formats are of weights alone."""

SHORT_NAMES: dict[str, WeightFormat] = {
    "int4": WeightFormat.INT4_G128,
    "int8": WeightFormat.INT8_G128,
}
"""What people say -> the format that is meant: groups of 128, the most accurate at that size."""
