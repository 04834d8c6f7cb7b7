"""Which arithmetic the products of a matrix have."""

from __future__ import annotations

from enum import IntEnum

import torch

from mixtura.config import ActivationDtype
from mixtura.kernels.cpu.conversions import as_read, code_name
from mixtura.kernels.cpu.extension import extension
from mixtura.quant.activations import ActivationScheme
from mixtura.quant.scheme import Code, QuantScheme


class Arithmetic(IntEnum):
    """What is multiplied; the values are those of csrc/types.h."""

    F32 = 0
    BF16 = 1
    INT8 = 2

    @property
    def words(self) -> str:
        """What people call it."""
        return ("fp32", "bf16", "int8")[self]


def no_arithmetic(scheme: QuantScheme, asked: ActivationDtype | None) -> str | None:
    """Why products with a scheme cannot have the arithmetic asked for, or None."""
    if asked is ActivationDtype.INT8 and as_read(scheme).code in (Code.E4M3, Code.CODEBOOK):
        name = code_name(scheme)
        return f"multiplies int8 activations with integers and e2m1 codes, not with {name}"
    return None


def arithmetic_for(
    scheme: QuantScheme,
    activation_dtype: ActivationDtype | None,
    rounding: ActivationScheme | None = None,
    *,
    has_bf16: bool,
    takes_int8_min: bool = True,
) -> Arithmetic:
    """The products' arithmetic.

    Dense weights as they are; integers and e2m1 with int8 activations unless others are asked for;
    e4m3 with bf16, and fp32 wherever the processor has no products of bf16. The levels of codebooks
    have more bits than bf16: they are multiplied in fp32. Activations that are rounded to e4m3
    codes need bf16, which holds them all; those of int8 reach -128, and the products of 8-bit codes
    of AVX2 alone do not.
    """
    if not scheme.is_quantized:
        is_bf16 = scheme.values_dtype is torch.bfloat16
        return Arithmetic.BF16 if has_bf16 and is_bf16 else Arithmetic.F32
    read = as_read(scheme)
    if read.code is Code.CODEBOOK:
        return Arithmetic.F32
    wide = Arithmetic.BF16 if has_bf16 else Arithmetic.F32
    if rounding is not None:
        is_too_low = read.bits == 8 and not takes_int8_min
        if rounding.code is not Code.INT or is_too_low:
            return wide
    has_int8 = activation_dtype in (None, ActivationDtype.INT8)
    return Arithmetic.INT8 if has_int8 and read.code is not Code.E4M3 else wide


def current_arithmetic(
    scheme: QuantScheme,
    activation_dtype: ActivationDtype | None,
    rounding: ActivationScheme | None = None,
) -> Arithmetic:
    """The products' arithmetic on the path that runs now."""
    return arithmetic_for(
        scheme,
        activation_dtype,
        rounding,
        has_bf16=extension().has_bf16(),
        takes_int8_min=extension().takes_int8_min(),
    )
