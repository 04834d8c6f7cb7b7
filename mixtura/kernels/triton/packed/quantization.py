"""How a layer's experts are quantized, as far as the choice of kernels depends on it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from mixtura.config import ExpertsConfig
from mixtura.kernels.triton.launch import cdiv
from mixtura.kernels.triton.packed.layout import (
    ROW_GROUP,
    WORD_BITS,
    Layout,
    has_whole_groups,
    layout_for,
)
from mixtura.kernels.triton.table import Packing, Product
from mixtura.quant.activations import ActivationScheme
from mixtura.quant.scheme import QuantScheme


@dataclass(frozen=True, slots=True)
class Quantization:
    """What the two projections of experts are stored in, and what they multiply.

    Attributes:
        gate_up, down: schemes; `unreadable_experts` is None.
        gate_up_rounding, down_rounding: what rows are rounded to, with scales that are stored or
            found while running; None: as they come.
    """

    gate_up: QuantScheme
    down: QuantScheme
    gate_up_rounding: ActivationScheme | None = None
    down_rounding: ActivationScheme | None = None

    @classmethod
    def of(cls, scheme: QuantScheme, rounding: ActivationScheme | None = None) -> Quantization:
        """Both projections alike."""
        return cls(scheme, scheme, rounding, rounding)

    def layouts(self, config: ExpertsConfig) -> tuple[Layout, Layout]:
        """Of gate and up, and of down, for rows of bf16 where they are not rounded."""
        is_whole = has_whole_groups(config, self.gate_up)
        return (
            layout_for(self.gate_up, self.gate_up_rounding, is_whole),
            layout_for(self.down, self.down_rounding),
        )

    def packing(self, config: ExpertsConfig, product: Product, dtype: torch.dtype) -> Packing:
        """What blocks of a product are found by, for rows of a dtype."""
        return packing_of(config, self.layouts(config), product, dtype)

    def __str__(self) -> str:
        schemes = dict.fromkeys(map(str, (self.gate_up, self.down)))
        roundings = [one for one in (self.gate_up_rounding, self.down_rounding) if one is not None]
        words = " / ".join(schemes)
        return f"{words}; {' / '.join(dict.fromkeys(map(str, roundings)))}" if roundings else words


def rounds_blocks(config: ExpertsConfig, down: Layout) -> bool:
    """Whether gate and up round what they write: groups of columns that are whole blocks of it."""
    return down.has_row_groups and config.intermediate_size % ROW_GROUP == 0


@lru_cache
def packing_of(
    config: ExpertsConfig, layouts: tuple[Layout, Layout], product: Product, dtype: torch.dtype
) -> Packing:
    """What blocks of a product are found by, of the layouts of both."""
    gate_up, down = layouts
    is_first = product is Product.GATE_UP
    layout = (gate_up if is_first else down).for_rows(dtype)
    columns = ROW_GROUP if is_first and rounds_blocks(config, down) else 0
    words = 0
    if layout.is_grouped:
        words = cdiv(layout.scales_per_step * 8 * layout.scale_field.itemsize, WORD_BITS)
    if layout.zero is None:
        words += cdiv(layout.scales_per_step * layout.zero_bits, WORD_BITS)
    name = str(layout) + (f"/rounds {columns}" if columns else "")
    return Packing(name, layout.depth, layout.bits, layout.operand.itemsize, words, columns)
