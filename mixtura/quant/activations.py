"""How a checkpoint means activations to be rounded, and `round_activations`: what that means.

Scales are stored beside the weights (static), or found while running from the activations (dynamic,
`quantize_activations`); which of the latter an arithmetic has is said by `activations_for`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtura.config import ActivationDtype
from mixtura.errors import ConfigError
from mixtura.quant.scheme import Code, QuantScheme

__all__ = [
    "ActivationExtra",
    "ActivationGroup",
    "ActivationScheme",
    "StaticInputs",
    "activations_for",
    "quantize_activations",
    "round_activations",
]

BLOCK = (128, 128)
"""Weights in blocks of this size multiply activations with a scale for each 128 columns."""

_INT8_HALF_RANGE = 127.5
"""Half of -128 .. 127: the scale of a row that reaches from -1 to 1 is its reciprocal."""

# The cast of what is beyond the largest number is NaN in some versions of torch.
_E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max

_CODES = {ActivationDtype.INT8: Code.INT, ActivationDtype.FP8: Code.E4M3}
"""What an arithmetic multiplies; others take activations as they come."""


class ActivationGroup(Enum):
    """Activations that share a scale."""

    TENSOR = "tensor"
    TOKEN = "token"
    GROUP = "group"  # columns of a token


class ActivationExtra(Enum):
    """What a checkpoint means besides codes and what shares a scale."""

    POWER_SCALES = "scales of powers of two"  # e8m0: MX formats, DeepSeek-V4
    OUTLIERS = "outlier columns as they come"  # LLM.int8()


@dataclass(frozen=True, slots=True)
class ActivationScheme:
    """How a checkpoint means activations to be quantized.

    Attributes:
        code: INT, or a float. bits: of a code; integers are signed and symmetric.
        per: what shares a scale. group_columns: for GROUP.
        is_static: the scale is stored beside the weight, else it is found while running.
        extra: what else is meant, that `quantize_activations` does not do.

    >>> print(ActivationScheme(Code.E4M3, 8, ActivationGroup.GROUP, 128))
    e4m3 in groups of 128
    >>> print(ActivationScheme(Code.INT, 8, ActivationGroup.TENSOR, is_static=True))
    int8 per tensor, static
    """

    code: Code
    bits: int
    per: ActivationGroup
    group_columns: int | None = None
    is_static: bool = False
    extra: ActivationExtra | None = None

    @property
    def has_one_scale(self) -> bool:
        """Whether it is int8 or e4m3 with one stored scale."""
        return self.is_static and self.per is ActivationGroup.TENSOR and self._has_known_codes

    @property
    def is_found_running(self) -> bool:
        """Whether it is int8 or e4m3 with scales that `quantize_activations` finds.

        One scale of all tokens is not among them: a row would depend on the rows around it.
        """
        is_of_rows = self.per is not ActivationGroup.TENSOR
        is_whole = self.extra is None and self._has_known_codes
        return not self.is_static and is_of_rows and is_whole

    @property
    def _has_known_codes(self) -> bool:
        return (self.code, self.bits) in ((Code.INT, 8), (Code.E4M3, 8))

    def columns(self, num_columns: int) -> int:
        """How many columns of a token of so many share a scale that is found while running."""
        in_groups = self.group_columns if self.per is ActivationGroup.GROUP else None
        return in_groups or num_columns

    def holds_with(self, asked: ActivationDtype | None) -> bool:
        """Whether stored scales are used with the arithmetic asked for.

        They are unless something else was asked for: int8 is what int8 codes are, fp8 what those of
        e4m3 are, and bf16 means activations as they come.
        """
        return asked is None or _CODES.get(asked) is self.code

    @property
    def code_words(self) -> str:
        """The codes alone: "int8", "e4m3"."""
        return f"int{self.bits}" if self.code is Code.INT else self.code.value

    def __str__(self) -> str:
        place = {
            ActivationGroup.TENSOR: " per tensor",
            ActivationGroup.TOKEN: " per token",
            ActivationGroup.GROUP: f" in groups of {self.group_columns}",
        }[self.per]
        extra = "" if self.extra is None else f", {self.extra.value}"
        return f"{self.code_words}{place}{', static' if self.is_static else ''}{extra}"


@dataclass(frozen=True, eq=False)
class StaticInputs:
    """The stored scales of what a stack of experts, or one matrix, multiplies.

    Args:
        scheme: what the inputs are rounded to; `scheme.has_one_scale`.
        scales: fp32, (L,) for a stack of L experts, () for one matrix; above 0, or 0 where an
            expert has none: no token reached it when the scales were measured, and no number that
            is not its own is a better guess than its inputs as they are, in the kernel's own
            arithmetic.

    Raises:
        ConfigError: the scheme has another meaning, or the scales another dtype.
    """

    scheme: ActivationScheme
    scales: Tensor

    def __post_init__(self) -> None:
        if not self.scheme.has_one_scale or self.scales.dtype is not torch.float32:
            raise ConfigError(
                f"static inputs ({self.scheme}) must be int8 or e4m3 codes with fp32 scales, one "
                f"for an expert; got {self.scales.dtype}. Leave them out, or convert them."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the scales."""
        return tuple(self.scales.shape)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> StaticInputs:
        """The same with the scales changed; shape and dtype must stay."""
        return replace(self, scales=change(self.scales))


def quantize_activations(x: Tensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor]:
    """Codes of activations with scales found from them: the meaning of a dynamic scheme.

    int8: `scale = max(amax / 127.5, eps)`, `code = clamp(round(x / scale), -128, 127)`, ties to
    even. e4m3: `scale = max(amax / 448, eps)`, `code = e4m3(clamp(x / scale, -448, 448))`. `amax`
    is the largest magnitude of the token, or of its group of columns; eps that of fp32, 2^-23. All
    in fp32, divisions as IEEE 754 has them.

    A NaN makes the scale of its token or group NaN, where int8 codes are 0, so that codes times
    scale are NaN there and nowhere else. An infinity makes the scale infinite, and codes times
    scale NaN or infinite.

    Args:
        x: (..., K), K above 0. scheme: `scheme.is_found_running`.

    Returns:
        Codes (..., K), int8 or float8_e4m3fn, and scales (..., G) fp32: G is 1 for a scale per
        token, else the number of groups; the last one may have fewer columns.

    Source: compressed-tensors 0.20 `quantization/utils/helpers.py`, `calculate_qparams`.

    >>> int8 = ActivationScheme(Code.INT, 8, ActivationGroup.GROUP, 2)
    >>> codes, scales = quantize_activations(torch.tensor([63.75, -25.0, 255.0]), int8)
    >>> codes.tolist(), scales.tolist()
    ([127, -50, 127], [0.5, 2.0])
    """
    assert scheme.is_found_running, str(scheme)
    num_columns = x.shape[-1]
    width = scheme.columns(num_columns)
    num_groups = -(-num_columns // width)
    padded = F.pad(x.float(), (0, num_groups * width - num_columns))
    groups = padded.view(*x.shape[:-1], num_groups, width)
    is_int = scheme.code is Code.INT
    half_range = _INT8_HALF_RANGE if is_int else _E4M3_MAX
    scales = (groups.abs().amax(-1) / half_range).clamp(min=torch.finfo(torch.float32).eps)
    quotient = (groups / scales.unsqueeze(-1)).flatten(-2)[..., :num_columns]
    if is_int:
        return _int_codes(quotient, scheme.bits).nan_to_num(0.0).to(torch.int8), scales
    return _e4m3_codes(quotient), scales


def _int_codes(quotient: Tensor, bits: int) -> Tensor:
    return quotient.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _e4m3_codes(quotient: Tensor) -> Tensor:
    return quotient.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)


def round_activations(
    x: Tensor, scheme: ActivationScheme, stored_scale: Tensor | None = None
) -> Tensor:
    """What a product with rounded activations multiplies: the meaning of an `ActivationScheme`.

    With a stored scale `clamp(round(x / scale)) * scale` in fp32. int8: ties to even, -128 to 127.
    e4m3: to the nearest of its numbers, ties to even, -448 to 448. NaN stays; where the scale is 0,
    so does `x`. With scales found while running, the codes of `quantize_activations` times their
    scales, rounded once to the dtype of `x`.

    Args:
        x: (..., K). scheme: with one stored scale, or with scales found while running.
        stored_scale: fp32, of a shape that fits `x`; None where they are found.

    Returns:
        (..., K) in the dtype of `x`.

    Source: compressed-tensors 0.20 `quantization/lifecycle/forward.py`.

    >>> int8 = ActivationScheme(Code.INT, 8, ActivationGroup.TENSOR, is_static=True)
    >>> round_activations(torch.tensor([0.25, 0.75, -90.0]), int8, torch.tensor(0.5)).tolist()
    [0.0, 1.0, -64.0]
    """
    if stored_scale is None:
        codes, scales = quantize_activations(x, scheme)
        columns = scales.repeat_interleave(scheme.columns(x.shape[-1]), -1)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return (codes.to(dtype) * columns[..., : x.shape[-1]].to(dtype)).to(x.dtype)
    assert scheme.has_one_scale, str(scheme)
    has_scale = stored_scale > 0
    divisor = torch.where(has_scale, stored_scale, 1.0)
    quotient = x.float() / divisor
    is_int = scheme.code is Code.INT
    codes = _int_codes(quotient, scheme.bits) if is_int else _e4m3_codes(quotient).float()
    return torch.where(has_scale, (codes * divisor).to(x.dtype), x)


def activations_for(
    asked: ActivationDtype | None, meant: ActivationScheme | None, schemes: Sequence[QuantScheme]
) -> ActivationScheme | None:
    """What an arithmetic rounds activations to with scales found while running.

    Args:
        asked: the arithmetic; None is what the checkpoint means.
        meant: what the checkpoint means, or None.
        schemes: of the weights that are multiplied; dense ones among them are of no account.

    Returns:
        With int8 or fp8 asked for, what is meant if that is of such codes, else a scale for each
        128 columns of a token where all weights are in blocks of 128x128, else one for each token.
        None is activations as they come: bf16, dense weights, or nothing that is meant.

    >>> blocks = QuantScheme(Code.E4M3, 8, (128, 128), torch.float32)
    >>> print(activations_for(ActivationDtype.FP8, None, [blocks]))
    e4m3 in groups of 128
    """
    quantized = [scheme for scheme in schemes if scheme.is_quantized]
    if not quantized or asked is ActivationDtype.BF16:
        return None
    is_found = meant is not None and meant.is_found_running
    if asked is None:
        return meant if is_found else None
    code = _CODES[asked]
    if meant is not None and is_found and meant.code is code:
        return meant
    if all(scheme.group_shape == BLOCK for scheme in quantized):
        return ActivationScheme(code, 8, ActivationGroup.GROUP, BLOCK[1])
    return ActivationScheme(code, 8, ActivationGroup.TOKEN)
