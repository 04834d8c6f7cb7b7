"""The specialisations of quantized experts' kernels that known models launch; see shipped.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from mixtura.kernels.triton.device import MIN_E4M3_CAPABILITY, Device
from mixtura.kernels.triton.launch import Launch
from mixtura.kernels.triton.packed.call import PackedCall
from mixtura.kernels.triton.packed.made_up import empty_experts
from mixtura.kernels.triton.packed.quantization import Quantization
from mixtura.kernels.triton.sass import Step
from mixtura.kernels.triton.shipped import DEVICES, MODELS, TILINGS, Shipped, call_of, order_of
from mixtura.kernels.triton.table import DIRECT_TILE, Product
from mixtura.quant.activations import ActivationGroup, ActivationScheme
from mixtura.quant.formats import WeightFormat
from mixtura.quant.scheme import Code, QuantScheme, ZeroPoint
from mixtura.types import Tiling

_INT8_TOKENS = ActivationScheme(Code.INT, 8, ActivationGroup.TOKEN)
_E4M3_TOKENS = ActivationScheme(Code.E4M3, 8, ActivationGroup.TOKEN)
_E4M3_GROUPS = ActivationScheme(Code.E4M3, 8, ActivationGroup.GROUP, 128)
_INT4 = QuantScheme(Code.INT, 4, (1, 128), torch.bfloat16, ZeroPoint.MID)

FORMATS: dict[str, Quantization] = {
    "int4-g128": Quantization.of(_INT4),
    "int4-g32": Quantization.of(replace(_INT4, group_shape=(1, 32))),
    "int4-g128-zeros": Quantization.of(
        replace(_INT4, scale_dtype=torch.float16, zero_point=ZeroPoint.INTEGER)
    ),
    "int4-channel": Quantization.of(
        replace(_INT4, group_shape=(1, None), scale_dtype=torch.float32)
    ),
    "mxfp4": Quantization.of(WeightFormat.MXFP4.scheme),
    "nvfp4": Quantization.of(WeightFormat.NVFP4.scheme),
    "int8": Quantization.of(WeightFormat.INT8_CHANNEL.scheme),
    "fp8": Quantization.of(WeightFormat.FP8.scheme),
    "fp8-block": Quantization.of(WeightFormat.FP8_BLOCK.scheme),
    "int8 x int8": Quantization.of(WeightFormat.INT8_CHANNEL.scheme, _INT8_TOKENS),
    "fp8 x fp8": Quantization.of(WeightFormat.FP8.scheme, _E4M3_TOKENS),
    "fp8-block x fp8": Quantization.of(WeightFormat.FP8_BLOCK.scheme, _E4M3_GROUPS),
    "int4-g128 x int8": Quantization.of(_INT4, _INT8_TOKENS),
    "int4-g128 x fp8": Quantization.of(_INT4, _E4M3_TOKENS),
}
"""Weights, and what rows are rounded to by token, or, beside blocks, by 128 columns."""

_QWEN3, _GPT_OSS, _ODD = "qwen3-30b-a3b", "gpt-oss-120b", "odd"

SHIPPED = (
    *((_QWEN3, name) for name in FORMATS if name != "mxfp4"),
    (_GPT_OSS, "mxfp4"),
    *((_ODD, name) for name in ("int4-g32", "fp8-block x fp8")),
    ("ungated", "fp8 x fp8"),
)
"""(model, format): every format, biases with interleaved rows, sizes that no step divides, and
experts without a gate."""


def is_possible(name: str, capability: int) -> bool:
    """Whether a GPU has the products of a format."""
    rounding = FORMATS[name].gate_up_rounding
    is_e4m3 = rounding is not None and rounding.code is Code.E4M3
    return not is_e4m3 or divmod(capability, 10) >= MIN_E4M3_CAPABILITY


def shipped_packed(
    capability: int, model: str, name: str, dtype: torch.dtype = torch.bfloat16
) -> Iterator[Shipped]:
    """What a model launches in a format on a GPU of that compute capability, each kernel once."""
    call = _call(model, name, dtype, DEVICES[capability])
    for tiling in TILINGS:
        if tiling is None:  # one row, whose slots are not sorted
            alone = replace(
                call, rows=call.rows[:1], ids=call.ids[:1], topk_weights=call.topk_weights[:1]
            )
            yield from _launches(alone, None, model, name)
        else:
            yield from _launches(call, tiling, model, name)


def _launches(call: PackedCall, tiling: Tiling | None, model: str, name: str) -> Iterator[Shipped]:
    rows, rounding = call.rounded_rows()
    written = call.hidden_rows()
    hidden, rounding_hidden = call.rounded_hidden(written)
    slots = call.empty("", call.num_slots, call.config.hidden_size)
    order = None if tiling is None else order_of(call, tiling)
    tile_rows = DIRECT_TILE if tiling is None else tiling.rows
    if tiling is None:
        for launch in filter(None, (rounding, rounding_hidden)):
            yield Shipped(model, 0, None, launch, name)
    for product in Product:
        is_first = product is Product.GATE_UP
        launch = call.gate_up(order, rows, written) if is_first else call.down(order, hidden, slots)
        estimate = call.shared_bytes(product, tile_rows)
        yield Shipped(model, tile_rows, estimate, launch, name, _step(call, product, launch))


def _call(model: str, name: str, dtype: torch.dtype, device: Device) -> PackedCall:
    # Transposed weights are packed as all others.
    config = replace(MODELS[model], is_transposed=False)
    return call_of(PackedCall, empty_experts(config, FORMATS[name], dtype), dtype, device)


def _step(call: PackedCall, product: Product, launch: Launch) -> Step:
    constants = launch.constants
    sides = 2 if call.key(product, DIRECT_TILE).is_doubled else 1
    return Step(sides * constants["BLOCK_N"], constants["BLOCK_T"], call.layout(product).depth)
