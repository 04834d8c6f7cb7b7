"""Quantized experts that the tests of the Triton kernels for them share."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from expert_cases import CONFIGS, random_weights
from gpu_device import DEVICE
from torch import Tensor

from mixtura.config import ActivationDtype, ExpertsConfig
from mixtura.kernels import get_kernel
from mixtura.kernels.triton import TritonKernel
from mixtura.quant.activations import ActivationGroup, ActivationScheme, StaticInputs
from mixtura.quant.formats import WeightFormat
from mixtura.quant.matrix import QuantizedMatrix
from mixtura.quant.packing import pack_codes
from mixtura.quant.quantize import quantize
from mixtura.quant.scheme import Code, GlobalScale, QuantScheme, ZeroPoint
from mixtura.types import ExpertBatch, ExpertWeights

KERNEL = TritonKernel()

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
E8M0, E4M3_DTYPE = torch.float8_e8m0fnu, torch.float8_e4m3fn

INT8_TOKENS = ActivationScheme(Code.INT, 8, ActivationGroup.TOKEN)
E4M3_TOKENS = ActivationScheme(Code.E4M3, 8, ActivationGroup.TOKEN)
INT8_GROUPS = ActivationScheme(Code.INT, 8, ActivationGroup.GROUP, 128)
E4M3_GROUPS = ActivationScheme(Code.E4M3, 8, ActivationGroup.GROUP, 128)


def ints(
    bits: int,
    columns: int | None,
    scale: torch.dtype,
    zero: ZeroPoint = ZeroPoint.MID,
    rows: int | None = 1,
) -> QuantScheme:
    return QuantScheme(Code.INT, bits, (rows, columns), scale, zero)


def floats(
    code: Code, bits: int, group: tuple[int | None, int | None], scale: torch.dtype = FP32
) -> QuantScheme:
    return QuantScheme(code, bits, group, scale)


ZEROS = ZeroPoint.INTEGER

SCHEMES: dict[str, QuantScheme] = {
    "int4-g32": ints(4, 32, BF16),
    "int4-g64": ints(4, 64, BF16),
    "int4-g128": ints(4, 128, BF16),
    "int4-channel": ints(4, None, FP32),
    "int4-g32-fp16-zeros": ints(4, 32, FP16, ZEROS),
    "int4-g64-zeros": ints(4, 64, BF16, ZEROS),
    "int4-g128-fp32-zeros": ints(4, 128, FP32, ZEROS),
    "int4-channel-zeros": ints(4, None, FP32, ZEROS),
    "int4-g32-fp32": ints(4, 32, FP32),
    "int4-g48": ints(4, 48, BF16),
    "int4-g128-fp16": ints(4, 128, FP16),
    "int4-blocks": ints(4, 32, BF16, rows=16),
    "int4-tensor": ints(4, None, FP32, rows=None),
    "int8-channel": ints(8, None, FP32),
    "int8-g32": ints(8, 32, BF16),
    "int8-g64": ints(8, 64, BF16),
    "int8-g128": ints(8, 128, BF16),
    "int8-g128-zeros": ints(8, 128, BF16, ZEROS),
    "int8-channel-zeros": ints(8, None, FP16, ZEROS),
    "int2-g16": ints(2, 16, BF16),
    "int2-g64-zeros": ints(2, 64, FP16, ZEROS),
    "int3-g32": ints(3, 32, BF16),
    "int3-channel-zeros": ints(3, None, FP32, ZEROS),
    "int5-g64": ints(5, 64, FP16),
    "int5-g16-zeros": ints(5, 16, BF16, ZEROS),
    "mxfp4": WeightFormat.MXFP4.scheme,
    "nvfp4": WeightFormat.NVFP4.scheme,
    "nvfp4-rows": dataclasses.replace(WeightFormat.NVFP4.scheme, global_scale=GlobalScale.ROW),
    "e2m1-channel": floats(Code.E2M1, 4, (1, None)),
    "fp8": WeightFormat.FP8.scheme,
    "fp8-tensor": floats(Code.E4M3, 8, (None, None)),
    "fp8-rows": floats(Code.E4M3, 8, (32, None)),
    "fp8-block": WeightFormat.FP8_BLOCK.scheme,
    "fp8-block-bf16": floats(Code.E4M3, 8, (128, 128), BF16),
    "fp8-block-32": floats(Code.E4M3, 8, (32, 32)),
    "mxfp8": floats(Code.E4M3, 8, (1, 32), E8M0),
    "e5m2": floats(Code.E5M2, 8, (1, None)),
    "e5m2-g32": floats(Code.E5M2, 8, (1, 32), E8M0),
    "e2m3": floats(Code.E2M3, 6, (1, 32), E8M0),
    "e3m2": floats(Code.E3M2, 6, (1, 32), E8M0),
}
"""Every kind of code, group, scale and zero point that the kernels read."""

ROUNDED: list[tuple[str, ActivationScheme]] = [
    ("fp8-block", E4M3_GROUPS),
    ("fp8-block-bf16", E4M3_GROUPS),
    ("fp8", E4M3_GROUPS),
    ("int4-g128", E4M3_GROUPS),
    ("int8-g128", INT8_GROUPS),
    ("int4-channel", INT8_GROUPS),
    ("fp8", E4M3_TOKENS),
    ("fp8-tensor", E4M3_TOKENS),
    ("fp8-rows", E4M3_TOKENS),
    ("fp8-block-32", E4M3_TOKENS),
    ("mxfp8", E4M3_TOKENS),
    ("mxfp4", E4M3_TOKENS),
    ("e2m1-channel", E4M3_TOKENS),
    ("int8-channel", INT8_TOKENS),
    ("int8-g32", INT8_TOKENS),
    ("int8-g64", INT8_TOKENS),
    ("int8-g128", INT8_TOKENS),
    ("int5-g64", INT8_TOKENS),
    ("int4-g32", INT8_TOKENS),
    ("int4-g64", INT8_TOKENS),
    ("int4-g128", INT8_TOKENS),
    ("int4-channel", INT8_TOKENS),
    ("int4-blocks", INT8_TOKENS),
    ("int4-g64-zeros", INT8_TOKENS),
    ("int4-channel-zeros", INT8_TOKENS),
    ("int3-g32", INT8_TOKENS),
    ("int2-g64-zeros", INT8_TOKENS),
    ("int4-g32", E4M3_TOKENS),
    ("int4-g64-zeros", E4M3_TOKENS),
    ("int4-g128", E4M3_TOKENS),
    ("int4-channel", E4M3_TOKENS),
    ("int4-channel-zeros", E4M3_TOKENS),
]
"""Codes of weights and of rows that are multiplied with each other."""


def sized(name: str, num_experts: int, hidden_size: int, intermediate_size: int) -> ExpertsConfig:
    """One of `CONFIGS` with other sizes."""
    return dataclasses.replace(
        CONFIGS[name],
        num_experts=num_experts,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
    )


def quantized_as(value: Tensor, scheme: QuantScheme) -> QuantizedMatrix:
    """A stack in a scheme; rows with global scales of their own have unlike ones."""
    if scheme.global_scale is not GlobalScale.ROW:
        return quantize(value.contiguous(), scheme)
    matrix = quantize(
        value.contiguous(), dataclasses.replace(scheme, global_scale=GlobalScale.MATRIX)
    )
    assert matrix.global_scale is not None
    factors = 2.0 ** -(torch.arange(value.shape[1]) % 3).float()
    rows = matrix.global_scale[:, None] * factors
    return dataclasses.replace(matrix, scheme=scheme, global_scale=rows)


def experts_in(config: ExpertsConfig, *schemes: QuantScheme, seed: int = 0) -> ExpertWeights:
    """Random experts: gate and up in the first scheme, down in the last."""
    plain = random_weights(config, FP32, seed)
    first, last = schemes[0], schemes[-1]
    up = plain.up_proj
    return dataclasses.replace(
        plain,
        gate_up_proj=quantized_as(plain.gate_up_proj.values, first),
        up_proj=None if up is None else quantized_as(up.values, first),
        down_proj=quantized_as(plain.down_proj.values, last),
    )


def random_rows(
    config: ExpertsConfig,
    num_rows: int,
    top_k: int,
    dtype: torch.dtype,
    *,
    absent: float = 0.2,
) -> ExpertBatch:
    """Distinct experts for every row; some slots have none."""
    generator = torch.Generator().manual_seed(num_rows * 31 + top_k)
    chosen = torch.rand(num_rows, config.num_experts, generator=generator).argsort(1)[:, :top_k]
    is_absent = torch.rand(num_rows, top_k, generator=generator) < absent
    ids = torch.where(is_absent, -1, chosen).int()
    weights = torch.rand(num_rows, top_k, generator=generator) * (ids >= 0)
    rows = torch.randn(num_rows, config.hidden_size, generator=generator).to(dtype)
    return ExpertBatch(rows, ids, weights)


def on_device(batch: ExpertBatch) -> ExpertBatch:
    return ExpertBatch(
        batch.hidden_states.to(DEVICE), batch.local_ids.to(DEVICE), batch.topk_weights.to(DEVICE)
    )


def packed_as(weights: ExpertWeights, asked: ActivationDtype | None = None) -> Any:
    return KERNEL.pack(weights.mapped(lambda tensor: tensor.to(DEVICE)), asked)


def run_packed(packed: Any, batch: ExpertBatch, **options: Any) -> Tensor:
    """The kernel's result on the CPU."""
    return KERNEL.run(packed, on_device(batch), **options).cpu()


def same_rounding(weights: ExpertWeights, asked: ActivationDtype | None = None) -> ExpertWeights:
    """What the kernel says that it multiplies; an expert's missing scale is found for each row."""
    held = weights.rounded_for(asked)
    found = KERNEL.activations(asked, held.activations, held.schemes)
    if held.inputs:
        found = ActivationScheme(held.inputs[0].scheme.code, 8, ActivationGroup.TOKEN)
    return dataclasses.replace(held, activations=found)


def expected_of(
    weights: ExpertWeights, batch: ExpertBatch, asked: ActivationDtype | None = None, **options: Any
) -> Tensor:
    """In fp32 from the same rows, rounded alike; many rows by the torch kernel."""
    rows = dataclasses.replace(batch, hidden_states=batch.hidden_states.float())
    kernel = get_kernel("reference" if batch.local_ids.numel() < 100 else "torch")
    return kernel.run(same_rounding(weights, asked), rows, **options)


def assert_same_weights(left: ExpertWeights, right: ExpertWeights) -> None:
    """Bit for bit, with schemes, shapes and dtypes."""
    assert left.config == right.config and left.activations == right.activations
    for mine, other in zip(left.projections(), right.projections(), strict=True):
        assert (mine.scheme, mine.shape) == (other.scheme, other.shape)
    assert [i.scheme for i in left.inputs] == [i.scheme for i in right.inputs]
    for mine, other in zip(left.tensors(), right.tensors(), strict=True):
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
        assert torch.equal(bits_of(mine), bits_of(other))


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().flatten().view(torch.uint8)


def random_matrix(scheme: QuantScheme, shape: tuple[int, int, int], seed: int) -> QuantizedMatrix:
    """Any codes that are numbers, scales of either sign, zero points of the whole range."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(size: tuple[int, ...], low: int, high: int) -> Tensor:
        return torch.randint(low, high, size, generator=generator)

    levels = torch.tensor(scheme.levels if scheme.code is not Code.INT else [0.0] * 2**scheme.bits)
    numbers = levels.isfinite().nonzero().flatten().to(torch.uint8)
    codes = numbers[drawn(shape, 0, len(numbers))]
    tensors = {"values": pack_codes(codes, scheme.bits)}
    for name, spec in scheme.tensors_for(shape).items():
        if name == "zero_points":
            dtype = spec.dtypes[seed % 2]
            top = 2**scheme.bits + (1 if dtype is torch.int16 else 0)
            tensors[name] = drawn(spec.shape, 0, top).to(dtype)
        elif name != "values":
            size = 2.0 ** drawn(spec.shape, -9, 2).float()
            if spec.dtypes[0] is not E8M0:
                size *= 1 + torch.rand(spec.shape, generator=generator)
                size *= 1 - 2 * drawn(spec.shape, 0, 2)
            tensors[name] = size.to(spec.dtypes[0])
    return QuantizedMatrix(scheme, shape, **tensors)


def any_experts(config: ExpertsConfig, scheme: QuantScheme, seed: int = 0) -> ExpertWeights:
    """Experts of `random_matrix`, with the biases and norms of random ones."""
    count, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
    up = (count, config.up_size, hidden)
    plain = random_weights(config, FP32, seed)
    return dataclasses.replace(
        plain,
        gate_up_proj=random_matrix(scheme, up, seed),
        up_proj=None if plain.up_proj is None else random_matrix(scheme, up, seed + 2),
        down_proj=random_matrix(scheme, (count, hidden, inner), seed + 4),
    )


def with_stored_scales(
    weights: ExpertWeights, code: Code, gate_up: list[float], down: list[float] | None
) -> ExpertWeights:
    scheme = ActivationScheme(code, 8, ActivationGroup.TENSOR, is_static=True)

    def inputs(scales: list[float]) -> StaticInputs:
        half_range = 127.5 if code is Code.INT else 448.0
        return StaticInputs(scheme, torch.tensor(scales) / half_range)

    return dataclasses.replace(
        weights,
        gate_up_inputs=inputs(gate_up),
        down_inputs=None if down is None else inputs(down),
    )
