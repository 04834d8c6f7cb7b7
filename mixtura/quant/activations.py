"""How a checkpoint means activations to be rounded, and `round_activations`: what that means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from mixtura.config import ActivationDtype
from mixtura.errors import ConfigError
from mixtura.quant.scheme import Code

__all__ = ["ActivationGroup", "ActivationScheme", "StaticInputs", "round_activations"]


class ActivationGroup(Enum):
    """Activations that share a scale."""

    TENSOR = "tensor"
    TOKEN = "token"
    GROUP = "group"  # columns of a token


@dataclass(frozen=True, slots=True)
class ActivationScheme:
    """How a checkpoint means activations to be quantized.

    Attributes:
        code: INT, or a float. bits: of a code; integers are signed and symmetric.
        per: what shares a scale. group_columns: for GROUP.
        is_static: the scale is stored beside the weight, else it is found while running.

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

    @property
    def has_one_scale(self) -> bool:
        """Whether `round_activations` gives its meaning: int8 or e4m3 with one stored scale."""
        is_known = (self.code, self.bits) in ((Code.INT, 8), (Code.E4M3, 8))
        return self.is_static and self.per is ActivationGroup.TENSOR and is_known

    def holds_with(self, asked: ActivationDtype | None) -> bool:
        """Whether stored scales are used with the arithmetic asked for.

        They are unless something else was asked for: int8 is what int8 codes are, and bf16 means
        activations as they come.
        """
        return asked is None or (asked is ActivationDtype.INT8 and self.code is Code.INT)

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
        return f"{self.code_words}{place}{', static' if self.is_static else ''}"


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


def round_activations(x: Tensor, scheme: ActivationScheme, scale: Tensor) -> Tensor:
    """What a product with static activations multiplies: the meaning of an `ActivationScheme`.

    `clamp(round(x / scale)) * scale` in fp32. int8: ties to even, -128 to 127. e4m3: to the nearest
    of its numbers, ties to even, -448 to 448. NaN stays; where the scale is 0, so does `x`.

    Args:
        x: (..., K). scheme: with one stored scale. scale: fp32, of a shape that fits `x`.

    Returns:
        (..., K) in the dtype of `x`.

    Source: compressed-tensors 0.20 `quantization/lifecycle/forward.py`.

    >>> int8 = ActivationScheme(Code.INT, 8, ActivationGroup.TENSOR, is_static=True)
    >>> round_activations(torch.tensor([0.25, 0.75, -90.0]), int8, torch.tensor(0.5)).tolist()
    [0.0, 1.0, -64.0]
    """
    assert scheme.has_one_scale, str(scheme)
    has_scale = scale > 0
    divisor = torch.where(has_scale, scale, 1.0)
    quotient = x.float() / divisor
    if scheme.code is Code.INT:
        codes = quotient.round().clamp(-(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1)
    else:
        # The cast of what is beyond the largest number is NaN in some versions of torch.
        limit = torch.finfo(torch.float8_e4m3fn).max
        codes = quotient.clamp(-limit, limit).to(torch.float8_e4m3fn).float()
    return torch.where(has_scale, (codes * divisor).to(x.dtype), x)
