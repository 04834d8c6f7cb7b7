"""Measurements without a GPU, for the tests of tuning, in this process or another."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from mixtura.config import ExpertsConfig
from mixtura.kernels.triton.candidates import Case, LayerShape
from mixtura.kernels.triton.device import Device
from mixtura.kernels.triton.packed.quantization import Quantization
from mixtura.kernels.triton.table import Blocks, Product
from mixtura.kernels.triton.trials import Failed, Timed, Trial
from mixtura.quant.activations import ActivationGroup, ActivationScheme
from mixtura.quant.formats import WeightFormat
from mixtura.quant.scheme import Code, QuantScheme, ZeroPoint

GPU = Device("NVIDIA Test GPU", (9, 0), 132, 232448)
SHAPE = LayerShape(
    ExpertsConfig(num_experts=8, hidden_size=256, intermediate_size=128), torch.bfloat16, 2
)
CASE = Case(SHAPE, Product.DOWN, 16, (4, 32))

_TOKENS = ActivationScheme(Code.INT, 8, ActivationGroup.TOKEN)
_STATIC = ActivationScheme(Code.E4M3, 8, ActivationGroup.TENSOR, is_static=True)
_ZEROS = QuantScheme(Code.INT, 4, (1, 32), torch.float16, ZeroPoint.INTEGER)
QUANTIZATIONS = {
    "int4": Quantization.of(WeightFormat.INT4_G32.scheme),
    "int4 with zero points": Quantization.of(_ZEROS),
    "mxfp4": Quantization.of(WeightFormat.MXFP4.scheme),
    "nvfp4": Quantization.of(WeightFormat.NVFP4.scheme),
    "fp8-block": Quantization.of(WeightFormat.FP8_BLOCK.scheme, WeightFormat.FP8_BLOCK.activations),
    "int8": Quantization.of(WeightFormat.INT8_CHANNEL.scheme, _TOKENS),
    "static fp8": Quantization.of(WeightFormat.FP8.scheme, _STATIC),
}
"""Weights alone, and rows rounded in groups, by token and with stored scales."""


def timed(*ratios: float) -> Timed:
    """Times of a candidate at two numbers of rows, as parts of the table's."""
    ratios = ratios if len(ratios) == 2 else ratios * 2
    return Timed((2e-5, 4e-5), tuple(a * b for a, b in zip((2e-5, 4e-5), ratios, strict=True)))


@dataclass
class FakeMeasure:
    """Answers from functions of blocks, and keeps what it was asked.

    Attributes:
        sweep, final: answers of the sweep and of the last look.
        asked: (case, blocks, is_final) of every question.
    """

    sweep: Callable[[Blocks], Trial]
    final: Callable[[Blocks], Trial] | None = None
    asked: list[tuple[Case, Blocks, bool]] = field(default_factory=list)

    def __call__(self, case: Case, blocks: Blocks, is_final: bool) -> Trial:
        self.asked.append((case, blocks, is_final))
        return (self.final or self.sweep)(blocks) if is_final else self.sweep(blocks)

    def close(self) -> None:
        """As of a process."""


def fragile() -> Callable[[Case, Blocks, bool], Trial]:
    """Dies at candidates of 1 stage, hangs at 2, breaks the device at 3, and measures others."""

    def measure(case: Case, blocks: Blocks, is_final: bool) -> Trial:
        if blocks.num_stages == 1:
            os._exit(7)
        if blocks.num_stages == 2:
            time.sleep(60)
        if blocks.num_stages == 3:
            return Failed("illegal address", has_broken_device=True)
        print("a compiler's remark", flush=True)
        return timed(0.5)

    return measure


def unusable() -> Callable[[Case, Blocks, bool], Trial]:
    """Cannot be made."""
    raise RuntimeError("no driver\nand more")
