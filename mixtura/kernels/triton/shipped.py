"""Every specialisation of the experts' kernels that known models launch, to be compiled and read.

What is compiled is what would be launched: the launches are made from tensors without storage, for
a GPU that need not be there, and not run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from mixtura.config import (
    SWIGLU_OAI,
    Activation,
    ActivationFunction,
    ExpertsConfig,
    GateUp,
    PostNorm,
)
from mixtura.kernels.triton.call import Call
from mixtura.kernels.triton.dense import DenseCall
from mixtura.kernels.triton.device import HOPPER, Device
from mixtura.kernels.triton.launch import Launch
from mixtura.kernels.triton.regimes import LARGE_TILING, SMALL_TILES
from mixtura.kernels.triton.sass import Step
from mixtura.kernels.triton.table import DIRECT_TILE, Product
from mixtura.quant.matrix import dense
from mixtura.types import ExpertOrder, ExpertWeights, Tiling

DEVICES = {
    90: HOPPER,
    80: Device("A100", (8, 0), 108, 166912),
    89: Device("L40S, RTX 4090", (8, 9), 142, 101376),
    100: Device("B200", (10, 0), 148, 232448),
}
"""GPUs by compute capability, with their limits (source: NVIDIA's tuning guides)."""

TILINGS = (None, *(Tiling(rows) for rows in SMALL_TILES), LARGE_TILING)
"""Every way in which slots are cut; None: they are not sorted."""

NUM_ROWS, TOP_K = 16, 8
"""Of the batch that calls are made for."""

AnyCall = TypeVar("AnyCall", bound=Call)


def _experts(hidden: int, intermediate: int, **options: Any) -> ExpertsConfig:
    return ExpertsConfig(
        num_experts=8, hidden_size=hidden, intermediate_size=intermediate, **options
    )


MODELS: dict[str, ExpertsConfig] = {
    "qwen3-30b-a3b": _experts(2048, 768),
    "gpt-oss-120b": _experts(
        2880,
        2880,
        activation=SWIGLU_OAI,
        gate_up=GateUp.INTERLEAVED,
        is_transposed=True,
        has_bias=True,
    ),
    "slim": _experts(4096, 192),
    "ungated": _experts(
        2048,
        1024,
        gate_up=GateUp.UNGATED,
        activation=Activation(function=ActivationFunction.RELU_SQUARED),
    ),
    "odd": _experts(2056, 1000, gate_up=GateUp.SEPARATE),
    "normed": _experts(8192, 1024, post_norm=PostNorm.RMS_SCALE_FIRST),
}
"""Layouts and sizes that make other kernels: the number of experts does not."""


@dataclass(frozen=True, slots=True)
class Shipped:
    """A kernel that a model launches on a GPU.

    Attributes:
        tile_rows: rows of a tile, 1 where slots are not sorted.
        estimated_bytes: shared memory that the choice of blocks expects it to take.
        launch: to be compiled.
        weights: what quantized weights are stored in, and rows rounded to.
        step: what a step of a product of these multiplies.
    """

    model: str
    tile_rows: int
    estimated_bytes: int | None
    launch: Launch
    weights: str | None = None
    step: Step | None = None

    @property
    def kernel(self) -> str:
        """Its name."""
        name: str = self.launch.kernel.__name__
        return name.removesuffix("_kernel")

    @property
    def block(self) -> str:
        """Outputs x inputs of a step, where there are steps."""
        constants = self.launch.constants
        if "BLOCK_N" not in constants:
            return ""
        depth = constants["BLOCK_K"] if self.step is None else self.step.depth
        return f"{constants['BLOCK_N']} x {depth}"


def shipped(
    capability: int, models: tuple[str, ...] = tuple(MODELS), dtype: torch.dtype = torch.bfloat16
) -> Iterator[Shipped]:
    """What these models launch on a GPU of that compute capability, each kernel once."""
    for model in models:
        call = _call(MODELS[model], dtype, DEVICES[capability])
        for tiling in TILINGS:
            for rows, product, launch in _launches(call, tiling):
                estimate = None if product is None else call.shared_bytes(product, rows)
                yield Shipped(model, rows, estimate, launch)


def _call(config: ExpertsConfig, dtype: torch.dtype, device: Device) -> DenseCall:
    def stack(rows: int, columns: int) -> Tensor:
        shape = (config.num_experts, rows, columns)
        if config.is_transposed:
            return meta(*shape[::2], shape[1], dtype=dtype).transpose(1, 2)
        return meta(*shape, dtype=dtype)

    count, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
    is_separate = config.gate_up is GateUp.SEPARATE
    weights = ExpertWeights(
        config,
        gate_up_proj=dense(stack(config.up_size, hidden)),
        up_proj=dense(stack(config.up_size, hidden)) if is_separate else None,
        down_proj=dense(stack(hidden, inner)),
        gate_up_bias=meta(count, config.up_size, dtype=dtype) if config.has_bias else None,
        down_bias=meta(count, hidden, dtype=dtype) if config.has_bias else None,
        post_norm=meta(hidden, dtype=dtype) if config.post_norm is not None else None,
    )
    return call_of(DenseCall, weights, dtype, device)


def call_of(kind: type[AnyCall], weights: Any, dtype: torch.dtype, device: Device) -> AnyCall:
    """A call of some rows without storage."""
    return kind(
        weights,
        meta(NUM_ROWS, weights.config.hidden_size, dtype=dtype),
        meta(NUM_ROWS, TOP_K, dtype=torch.int32),
        meta(NUM_ROWS, TOP_K, dtype=torch.float32),
        weighs_input=False,
        device=device,
    )


def _launches(
    call: DenseCall, tiling: Tiling | None
) -> Iterator[tuple[int, Product | None, Launch]]:
    """(rows of a tile, product, launch)."""
    config = call.config
    hidden = call.empty("", call.num_slots, config.intermediate_size)
    slots = call.empty("", call.num_slots, config.hidden_size)
    out = call.empty("", *call.rows.shape)
    if tiling is None:
        yield DIRECT_TILE, Product.GATE_UP, call.direct_gate_up(hidden)
        yield DIRECT_TILE, Product.DOWN, call.direct_down(hidden, out)
        yield DIRECT_TILE, None, call.combine(slots, out)
        return
    order = order_of(call, tiling)
    yield tiling.rows, Product.GATE_UP, call.gate_up(order, hidden)
    yield tiling.rows, Product.DOWN, call.down(order, hidden, slots)


def order_of(call: Call, tiling: Tiling) -> ExpertOrder:
    """The order of a call's slots, without storage."""
    num_tiles = tiling.max_tiles(call.num_slots, call.config.num_experts)
    return ExpertOrder(
        call.ids,
        meta(call.num_slots),
        meta(call.config.num_experts + 1),
        meta(num_tiles, 4),
        meta(1),
        tiling,
    )


def meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """A tensor without storage."""
    return torch.empty(shape, dtype=dtype, device="meta")
