"""Enumerations that parse strings, and checks of single values."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Self

from mixtura.errors import ConfigError

MAX_ELEMENTS = 2**62
"""No dimension or product of dimensions of a real model comes near this; larger is a broken
file."""


class Choice(StrEnum):
    """An enumeration that can be parsed from the string a user wrote."""

    @classmethod
    def parse(cls, text: str | Self) -> Self:
        """Return the member whose value is `text`; the error lists the choices."""
        try:
            return cls(text)
        except ValueError:
            choices = ", ".join(member.value for member in cls)
            raise ConfigError(
                f"{cls.__name__} ({text!r}) must be one of {choices}. Use one of these."
            ) from None


def require_positive(name: str, value: int, *, minimum: int = 1) -> None:
    """Raise `ConfigError` unless `value` is an integer of at least `minimum`."""
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value < MAX_ELEMENTS:
        raise ConfigError(
            f"{name} ({value!r}) must be an integer >= {minimum}; got {type(value).__name__} "
            f"{value!r}. Correct it in the configuration."
        )


def require_finite(name: str, value: float) -> None:
    """Raise `ConfigError` unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(
            f"{name} ({value!r}) must be a finite number. Correct it in the configuration."
        )
