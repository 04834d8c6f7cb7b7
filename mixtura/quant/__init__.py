"""Quantized weights: what stored matrices mean, and how checkpoints store them.

Importing the package is quick: what needs torch is imported when its name is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixtura.quant.codecs import codec_for, decode

__all__ = ["codec_for", "decode"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mixtura.quant' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module("mixtura.quant.codecs"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
