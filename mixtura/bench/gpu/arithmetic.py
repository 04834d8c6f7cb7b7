"""What the products of a case multiply: what was asked for, or what the weight format means."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from mixtura.bench.cases import Case
from mixtura.config import ActivationDtype
from mixtura.errors import ConfigError
from mixtura.quant.activations import activations_for, round_activations
from mixtura.quant.formats import WeightFormat
from mixtura.quant.scheme import Code

FP8_CAPABILITY = (8, 9)
"""NVIDIA GPUs multiply e4m3 codes from this compute capability on."""

PRODUCTS = {ActivationDtype.INT8: torch.int8, ActivationDtype.FP8: torch.float8_e4m3fn}
"""Elements of the products with rounded rows."""

NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "int8",
    torch.float8_e4m3fn: "fp8",
}
"""What people call elements."""

ROUNDED_TO = tuple(NAMES[dtype] for dtype in PRODUCTS.values())
"""What rows may be rounded to."""


def parse_activation_dtype(text: str | None, formats: list[WeightFormat]) -> ActivationDtype | None:
    """The arithmetic of that name, None without one.

    Raises:
        ConfigError: the name is unknown, or no weights are quantized.
    """
    if text is None:
        return None
    choices = ", ".join(ActivationDtype)
    if text not in list(ActivationDtype):
        raise ConfigError(
            f"activation dtype ({text}) must be one of {choices}; got an unknown name. "
            "Use one of these."
        )
    if not any(format.scheme.is_quantized for format in formats):
        raise ConfigError(
            f"activation dtype ({text}) must go with quantized weights; got "
            f"{', '.join(format.value for format in formats)}. Leave it out, or name others."
        )
    return ActivationDtype(text)


def activation_dtype_of(
    format: WeightFormat, asked: ActivationDtype | None, capability: str
) -> ActivationDtype | None:
    """The arithmetic of a case; None of dense weights.

    Where nobody asks it is fp8 if files of the format mean that and the device multiplies such
    codes, else the rows' own 16 bits.

    Args:
        capability: of the device, such as "9.0"; empty where there is no such thing.
    """
    if not format.scheme.is_quantized:
        return None
    if asked is not None:
        return asked
    has_fp8 = bool(capability) and tuple(map(int, capability.split("."))) >= FP8_CAPABILITY
    meant = format.activations
    is_fp8 = meant is not None and meant.code is Code.E4M3 and has_fp8
    return ActivationDtype.FP8 if is_fp8 else ActivationDtype.BF16


def product_dtype(case: Case) -> torch.dtype:
    """Of what is multiplied: that of rounded rows, else of rows."""
    return case.dtype if case.rounds_to is None else PRODUCTS[case.rounds_to]


def rounding_of(case: Case) -> Callable[[Tensor], Tensor] | None:
    """What the case's arithmetic makes of rows before a product, fp32 to fp32; None: nothing."""
    if case.rounds_to is None:
        return None
    format = case.weights
    scheme = activations_for(case.rounds_to, format.activations, [format.scheme])
    assert scheme is not None
    return functools.partial(round_activations, scheme=scheme)
