"""ggml's block types against golden files, hand-made blocks, and the gguf package."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from expert_cases import dequantized, problem_of, random_batch, sizes
from gguf import GGMLQuantizationType
from gguf_files import random_blocks
from safetensors.torch import load_file
from torch import Tensor

from mixtura.errors import CheckpointError, ConfigError, InputError
from mixtura.kernels.contract import ExpertsKernel
from mixtura.kernels.cpu.panels import unreadable
from mixtura.kernels.reference import ReferenceKernel
from mixtura.kernels.torch import TorchKernel
from mixtura.quant.block_codes import BLOCK_CODES, GRIDS
from mixtura.quant.codecs.contract import Header
from mixtura.quant.codecs.gguf import HEADERS, Gguf, GgufBlocks, is_weight_type, read_weight
from mixtura.quant.codecs.gguf_blocks import LAYOUTS, gather, spread
from mixtura.quant.ggml_types import GgmlType
from mixtura.quant.matrix import QuantizedMatrix, dequantize, group_scales, stack_experts
from mixtura.quant.quantize import quantize
from mixtura.quant.rows import concat_rows, take_rows
from mixtura.quant.scheme import Code, GlobalScale, QuantScheme
from mixtura.types import ExpertWeights

GOLDEN = Path(__file__).parent / "golden" / "quant"
FILES = sorted(p for p in GOLDEN.glob("gguf_*.safetensors") if "grids" not in p.name)
BLOCK_TYPES = [type for type in GgmlType if is_weight_type(type) and type.block_columns > 1]
IQ_TYPES = [type for type in BLOCK_TYPES if type not in LAYOUTS]
NOT_IN_GGUF = (GgmlType.Q1_0, GgmlType.Q2_0)
"""Types that the gguf package cannot decode."""

HALVES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    "MXFP4": (),
    "NVFP4": (),
    "IQ1_M": (54,),
}
"""Where a block's fp16 numbers are, if not at its beginning alone. IQ1_M has its one elsewhere, and
the high nibble of this word is the number's."""


def blocks_of(type: GgmlType, rows: int = 6, columns: int = 768, seed: int = 0) -> Tensor:
    """Random blocks with finite scales: the exponent's highest bit is cleared."""
    raw = torch.from_numpy(random_blocks(type, rows, columns, seed))
    blocks = raw.view(-1, type.block_bytes)
    for start in HALVES.get(type.name, (0,)):
        blocks[:, start + 1] &= 0xBF
    if type is GgmlType.MXFP4:
        blocks[:, 0] &= 0x7F
    if type is GgmlType.NVFP4:
        blocks[:, :4] &= 0xFE
    return raw


def read(type: GgmlType, blocks: Tensor) -> QuantizedMatrix:
    return GgufBlocks(type).read("w", {"blocks": blocks}).matrix


def value_bits(weight: Tensor) -> Tensor:
    """The bits of numbers, but for the sign of zero, which ggml's tables of e2m1 do not have."""
    return (weight + 0.0).view(torch.int32)


# --- golden and gguf -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden_files(path: Path) -> None:
    golden = load_file(path)
    name = path.stem.removeprefix("gguf_").upper()
    codec = Gguf.from_config({"container": "gguf", "ggml_type": name})
    parts = {"blocks": golden["blocks"]}
    format = codec.format_of("w", {"blocks": Header.of(golden["blocks"])})
    assert format is not None
    decoded = format.read("w", parts, tuple(golden["expected"].shape))
    assert torch.equal(value_bits(dequantize(decoded.matrix)), value_bits(golden["expected"]))
    assert torch.equal(format.encode(decoded)["blocks"], golden["blocks"])


def test_there_are_golden_files() -> None:
    assert len(FILES) == 21


def test_grids_are_the_golden_ones_and_those_of_the_gguf_package() -> None:
    ours, golden = load_file(GRIDS), load_file(GOLDEN / "gguf_iq_grids.safetensors")
    assert ours.keys() == golden.keys() - {"ksigns"}
    for name, grid in ours.items():
        assert torch.equal(grid, golden[name])
        package: Any = getattr(gguf.quants, name.upper())
        package.init_grid()
        assert torch.equal(grid, torch.from_numpy(package.grid).reshape(grid.shape).to(grid.dtype))


@pytest.mark.parametrize("type", BLOCK_TYPES, ids=lambda type: type.name)
def test_random_blocks(type: GgmlType) -> None:
    blocks = blocks_of(type)
    format = GgufBlocks(type)
    decoded = format.read("w", {"blocks": blocks})
    assert torch.equal(format.encode(decoded)["blocks"], blocks)
    weight = dequantize(decoded.matrix)
    assert torch.equal(weight, read_weight(type, blocks))
    if type not in NOT_IN_GGUF:
        expected = gguf.dequantize(blocks.numpy(), GGMLQuantizationType[type.name])
        assert torch.equal(value_bits(weight), value_bits(torch.from_numpy(expected)))


@pytest.mark.parametrize("type", BLOCK_TYPES, ids=lambda type: type.name)
def test_a_stack_is_its_experts(type: GgmlType) -> None:
    blocks = torch.stack([blocks_of(type, 3, 256, seed) for seed in range(3)])
    format = GgufBlocks(type)
    decoded = format.read("w", {"blocks": blocks})
    assert decoded.matrix.shape == (3, 3, 256)
    assert torch.equal(format.encode(decoded)["blocks"], blocks)
    weight = dequantize(decoded.matrix)
    for expert in range(3):
        assert torch.equal(weight[expert], dequantize(read(type, blocks[expert])))
    assert torch.equal(read_weight(type, blocks), weight)


@pytest.mark.parametrize("type", ["F32", "F16", "BF16", "F64"])
def test_plain_numbers(type: str) -> None:
    ggml_type = GgmlType[type]
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(
        type, torch.float64
    )
    numbers = torch.randn(2, 3, 5, dtype=torch.float64).to(dtype)
    blocks = numbers.view(torch.uint8)
    format = GgufBlocks(ggml_type)
    decoded = format.read("w", {"blocks": blocks})
    assert decoded.matrix.scheme == QuantScheme.dense(dtype)
    assert torch.equal(decoded.matrix.values, numbers)
    assert decoded.matrix.values.data_ptr() == blocks.data_ptr()
    assert torch.equal(format.encode(decoded)["blocks"], blocks)
    assert torch.equal(read_weight(ggml_type, blocks[0, 0]), numbers[0, 0])
    shifted = torch.zeros(blocks.numel() + 1, dtype=torch.uint8)[1:].view(blocks.shape)
    shifted.copy_(blocks)
    assert torch.equal(read(ggml_type, shifted).values, numbers)


# --- blocks by hand ------------------------------------------------------------------------------

QS = [0x98, *[0x10] * 15]
HALF, MINUS_ONE, QUARTER = [0x00, 0x38], [0x00, 0xBC], [0x00, 0x34]
BY_HAND: dict[str, tuple[list[int], dict[int, float]]] = {
    "Q4_0": (HALF + QS, {0: 0, 1: -4, 16: 0.5, 17: -3.5}),
    "Q4_1": (HALF + MINUS_ONE + QS, {0: 3, 1: -1, 16: 3.5, 17: -0.5}),
    "Q5_0": ([*HALF, 1, 0, 1, 0, *QS], {0: 4, 1: -8, 16: 4.5, 17: -7.5}),
    "Q5_1": (HALF + MINUS_ONE + [1, 0, 1, 0] + QS, {0: 11, 1: -1, 16: 11.5, 17: -0.5}),
    "Q8_0": (HALF + [0x80, 0x7F, 0x01] + [0] * 29, {0: -64, 1: 63.5, 2: 0.5, 3: 0}),
    "IQ4_NL": (HALF + QS, {0: 0.5, 1: -63.5, 16: 6.5, 17: -52}),
    "MXFP4": ([0x80, *QS], {0: 0, 1: 0, 16: -1, 17: 1}),
    "NVFP4": (
        [0x38, 0x40, 0x00, 0x7F, 0x98, *[0x10] * 31],
        {0: 0, 1: 0, 8: -0.5, 9: 0.5, 24: 1, 40: 0, 56: 0},
    ),
    "Q4_K": (
        HALF + QUARTER + [1] * 4 + [2] * 4 + [0x31] * 4 + [0x98, *[0x10] * 127],
        {0: 3.5, 1: -0.5, 32: 4, 33: 0, 128: -0.75, 160: -0.25},
    ),
    "Q6_K": (
        [0x98, *[0x10] * 127, *[0xE4] * 64, *[2] * 16, *HALF],
        {0: -24, 32: -16, 64: 9, 96: 17},
    ),
    "Q2_0": ([0x00, 0x3C, 0xE4, *[0] * 15], {0: -1, 1: 0, 2: 1, 3: 2, 4: -1}),
    "Q1_0": ([0x00, 0x3C, 0x05, *[0] * 15], {0: 1, 1: -1, 2: 1, 3: -1, 4: -1}),
    # Bytes 0 and 1 of the first run: digits 2 1 0 2 1 = 196 -> 207; all zeros -> 0.
    "TQ1_0": (
        [207, *[0] * 51, 0x00, 0x3C],
        {0: 1, 32: 0, 64: -1, 96: 1, 128: 0, 1: -1, 255: -1},
    ),
    "TQ2_0": ([0xE4, *[0] * 63, 0x00, 0x3C], {0: -1, 32: 0, 64: 1, 96: 2, 1: -1, 128: -1}),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_blocks_by_hand(name: str) -> None:
    raw, expected = BY_HAND[name]
    blocks = torch.tensor([raw], dtype=torch.uint8)
    weight = dequantize(read(GgmlType[name], blocks))[0]
    assert {index: weight[index].item() for index in expected} == expected


def test_planes_are_runs_of_fields() -> None:
    fields = torch.tensor([[0b11100100, 0b00011011]], dtype=torch.uint8)
    assert spread(fields, 2, 1).tolist() == [[0, 1, 2, 3, 3, 2, 1, 0]]
    assert spread(fields, 2, 2).tolist() == [[0, 3, 1, 2, 2, 1, 3, 0]]
    for bits, width in ((1, 1), (1, 2), (2, 1), (2, 2), (4, 2)):
        assert torch.equal(gather(spread(fields, bits, width), bits, width), fields)


# --- what is kept, and what it costs -------------------------------------------------------------


def test_only_what_values_do_not_tell_is_kept() -> None:
    for type in BLOCK_TYPES:
        kept = GgufBlocks(type).read("w", {"blocks": blocks_of(type, 2, 256)}).kept
        assert bool(kept) is (type in (GgmlType.TQ1_0, GgmlType.NVFP4)), type


def test_scales_of_k_quants_are_those_of_the_file() -> None:
    raw, _ = BY_HAND["Q4_K"]
    matrix = read(GgmlType.Q4_K, torch.tensor([raw], dtype=torch.uint8))
    assert matrix.scales is not None and matrix.zero_points is not None
    assert (matrix.scales.dtype, matrix.zero_points.dtype) == (torch.uint8, torch.uint8)
    assert matrix.scales.tolist() == [[1, 1, 1, 1, 1, 1, 1, 1]]
    assert matrix.zero_points.tolist() == [[2, 2, 2, 2, 3, 3, 3, 3]]
    assert matrix.super_scales is not None and matrix.super_minima is not None
    assert (matrix.super_scales.item(), matrix.super_minima.item()) == (0.5, 0.25)
    assert group_scales(matrix).tolist() == [[0.5] * 8]
    raw, _ = BY_HAND["Q6_K"]
    raw = [*raw[:192], *range(0xF8, 0x100), *range(8), *raw[208:]]
    matrix = read(GgmlType.Q6_K, torch.tensor([raw], dtype=torch.uint8))
    assert matrix.scales is not None and matrix.scales.dtype is torch.int8
    assert matrix.scales.tolist() == [list(range(-8, 8))]


def test_rows_of_super_blocks_can_be_moved() -> None:
    matrix = read(GgmlType.Q5_K, blocks_of(GgmlType.Q5_K, 4, 512))
    order = torch.tensor([2, 0, 3])
    weight = dequantize(matrix)
    assert torch.equal(dequantize(take_rows(matrix, order)), weight[order])
    assert torch.equal(dequantize(concat_rows([matrix, matrix])), torch.cat([weight, weight]))


def test_canonical_blocks_keep_nothing() -> None:
    weight = torch.randn(4, 256)
    raw = gguf.quants.quantize(weight.numpy(), GGMLQuantizationType.TQ1_0)
    decoded = GgufBlocks(GgmlType.TQ1_0).read("w", {"blocks": torch.from_numpy(raw)})
    assert decoded.kept == {}
    nvfp4 = torch.zeros(1, 36, dtype=torch.uint8)
    nvfp4[:, :4] = torch.tensor([0x38, 0x00, 0x7E, 0x01])
    assert GgufBlocks(GgmlType.NVFP4).read("w", {"blocks": nvfp4}).kept == {}


def test_headers_of_all_experts_where_one_needs_them() -> None:
    blocks = torch.zeros(2, 1, 36, dtype=torch.uint8)
    blocks[1, 0, 2] = 0x80
    format = GgufBlocks(GgmlType.NVFP4)
    decoded = format.read("w", {"blocks": blocks})
    assert decoded.kept[HEADERS].tolist() == [[[[0, 0, 0, 0]]], [[[0, 0, 0x80, 0]]]]
    assert torch.equal(format.encode(decoded)["blocks"], blocks)


BITS = {
    **{"Q4_0": 4.5, "Q8_0": 8.5, "IQ2_XXS": 2.0625, "TQ1_0": 2.0625},
    **{"Q2_K": 3.125, "Q3_K": 3.5625, "Q4_K": 4.625, "Q5_K": 5.625, "Q6_K": 6.5625},
    "IQ4_XS": 4.3125,
}


@pytest.mark.parametrize(("name", "bits"), BITS.items())
def test_bits_per_weight_in_memory(name: str, bits: float) -> None:
    assert read(GgmlType[name], blocks_of(GgmlType[name])).num_bytes * 8 / (6 * 768) == bits


# --- schemes of raw blocks -----------------------------------------------------------------------


@pytest.mark.parametrize("type", IQ_TYPES, ids=lambda type: type.name)
def test_schemes_of_blocks(type: GgmlType) -> None:
    name = type.name.lower()
    scheme = QuantScheme.of_blocks(name)
    assert BLOCK_CODES[name][:2] == (type.block_columns, type.block_bytes)
    assert (scheme.code, scheme.is_quantized, scheme.blocks) == (Code.BLOCKS, True, name)
    assert scheme.group_size((4, 512)) == (1, 256)
    assert str(scheme) == f"{name}, blocks of 256"
    specs = scheme.tensors_for((3, 4, 512))
    assert specs == {"values": ((3, 4, type.row_bytes(512)), (torch.uint8,))}
    with pytest.raises(ConfigError, match=r"K \(300\) must be divisible by the 256 columns"):
        scheme.tensors_for((4, 300))
    assert "blocks" in (unreadable(scheme) or "")
    with pytest.raises(ConfigError, match="round-to-nearest can write; got raw blocks"):
        quantize(torch.ones(4, 256), scheme)


def test_impossible_schemes_of_blocks() -> None:
    scheme = QuantScheme.of_blocks("iq3_s")
    for change in ({"bits": 3}, {"group_shape": (1, 32)}, {"scale_dtype": torch.float32}):
        with pytest.raises(ConfigError, match=r"Use QuantScheme.of_blocks\(name\)"):
            dataclasses.replace(scheme, **change)
    with pytest.raises(ConfigError, match=r"blocks \(q9\) must be one of iq1_s"):
        QuantScheme.of_blocks("q9")
    with pytest.raises(ConfigError, match=r"blocks \(iq3_s\) must be None; got code int"):
        dataclasses.replace(LAYOUTS[GgmlType.Q4_0].scheme, blocks="iq3_s")
    with pytest.raises(ConfigError, match=r"Use QuantScheme.dense"):
        dataclasses.replace(QuantScheme.dense(torch.float32), blocks="iq3_s")


@pytest.mark.parametrize("kernel", [ReferenceKernel(), TorchKernel()], ids=lambda k: k.name)
def test_kernels_read_raw_blocks(kernel: ExpertsKernel) -> None:
    """Experts of raw blocks compute what their dense weights compute."""
    config = sizes(num_experts=2, hidden_size=256, intermediate_size=256)
    small = torch.tensor([0.01], dtype=torch.float16).view(torch.uint8)

    def stack(rows: int, seed: int) -> QuantizedMatrix:
        experts = [blocks_of(GgmlType.IQ2_XS, rows, 256, seed + expert) for expert in range(2)]
        for blocks in experts:
            blocks[:, :2] = small
        return read(GgmlType.IQ2_XS, torch.stack(experts))

    weights = ExpertWeights(config, gate_up_proj=stack(512, 0), down_proj=stack(256, 2))
    schemes = tuple(part.scheme for part in weights.projections())
    problem = dataclasses.replace(problem_of(config), schemes=schemes)
    assert kernel.cannot_run(problem) is None
    assert kernel.cannot_run(dataclasses.replace(problem, needs_grad=True)) is not None
    batch = random_batch(config, num_rows=3)
    found = kernel.run(kernel.pack(weights), batch)
    expected = ReferenceKernel().run(dequantized(weights), batch)
    scale = expected.abs().max().item()
    assert scale > 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * scale)


def test_raw_blocks_are_stacked_and_share_memory() -> None:
    blocks = torch.stack([blocks_of(GgmlType.IQ3_S, 3, 256, seed) for seed in range(2)])
    stack = read(GgmlType.IQ3_S, blocks)
    assert stack.values.data_ptr() == blocks.data_ptr()
    again = stack_experts([stack.expert(0), stack.expert(1)], 2)
    assert again.scheme == stack.scheme and torch.equal(again.values, blocks)
    assert torch.equal(dequantize(stack, torch.bfloat16), dequantize(again).bfloat16())


# --- NVFP4's scale -------------------------------------------------------------------------------


def test_scales_of_whole_matrices() -> None:
    codec = Gguf.from_config({"ggml_types": {"a.weight": "NVFP4"}})
    assert codec.split("a.weight") == ("a.weight", "blocks")
    assert codec.split("a.scale") == ("a.weight", "scale")
    assert codec.split("a.input_scale") == ("a.weight", "input_scale")
    assert codec.split("a.bias") is None
    blocks = blocks_of(GgmlType.NVFP4, 4, 128).view(2, 2, 72)
    parts = {"blocks": blocks, "scale": torch.tensor([0.5, 3.0])}
    parts["input_scale"] = torch.tensor([0.25, 0.125])
    format = codec.format_of("a.weight", {name: Header.of(part) for name, part in parts.items()})
    assert format is not None and format.activations is not None
    assert (format.activations.code, format.activations.group_columns) == (Code.E2M1, 16)
    decoded = format.read("a.weight", parts)
    assert decoded.matrix.scheme.global_scale is GlobalScale.MATRIX
    assert decoded.input_scale is not None and decoded.input_scale.tolist() == [0.25, 0.125]
    plain = dequantize(read(GgmlType.NVFP4, blocks))
    assert torch.equal(dequantize(decoded.matrix), plain * torch.tensor([0.5, 3.0])[:, None, None])
    written = format.encode(decoded)
    assert written.keys() == parts.keys()
    assert all(torch.equal(written[name], part) for name, part in parts.items())


def test_the_scale_of_one_matrix() -> None:
    parts = {"blocks": blocks_of(GgmlType.NVFP4, 2, 64), "scale": torch.tensor([2.0])}
    format = GgufBlocks(GgmlType.NVFP4, has_scale=True)
    decoded = format.read("w", parts)
    assert decoded.matrix.global_scale is not None and decoded.matrix.global_scale.shape == ()
    assert format.encode(decoded)["scale"].tolist() == [2.0]


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("type", "at", "values", "match"),
    [
        ("Q4_0", 18, [0x00, 0x7C], r"w: the scale of a block must be finite; got inf in block 1"),
        ("Q4_1", 2, [0x00, 0xFC], "the offset of a block must be finite; got -inf in block 0"),
        ("Q4_K", 2, [0x01, 0x7C], "the minimum of a block must be finite; got nan"),
        ("Q6_K", 208, [0x00, 0x7C], "the scale of a block must be finite"),
        ("MXFP4", 17, [0xFF], "the scale of a block must be finite; got nan in block 1"),
        ("NVFP4", 3, [0xFF], r"the scale of a block \(0xFF\) must be an unsigned e4m3 number"),
        ("IQ2_XXS", 0, [0x00, 0x7C], "the scale of a block must be finite"),
        ("IQ1_M", 48, [0, 0x00, 0, 0x00, 0, 0xC0, 0, 0x70], "the scale of a block must be finite"),
    ],
)
def test_impossible_contents(type: str, at: int, values: list[int], match: str) -> None:
    ggml_type = GgmlType[type]
    blocks = torch.zeros(2, ggml_type.row_bytes(256), dtype=torch.uint8)
    blocks[0, at : at + len(values)] = torch.tensor(values, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=match):
        read(ggml_type, blocks)
    with pytest.raises(CheckpointError, match=match):
        GgufBlocks(ggml_type).read("w", {"blocks": blocks[None]})


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_scales_of_matrices(scale: float) -> None:
    parts = {"blocks": blocks_of(GgmlType.NVFP4, 2, 64), "scale": torch.tensor([scale])}
    with pytest.raises(CheckpointError, match="w: scale"):
        GgufBlocks(GgmlType.NVFP4, has_scale=True).read("w", parts)


@pytest.mark.parametrize(
    ("blocks", "match"),
    [
        (torch.zeros(2, 19, dtype=torch.uint8), "rows of whole blocks of 18 bytes"),
        (torch.zeros(18, dtype=torch.uint8), r"blocks \(\(18,\)\) must be \(N, bytes\)"),
        (torch.zeros(1, 1, 1, 18, dtype=torch.uint8), r"must be \(N, bytes\) or \(E, N, bytes\)"),
        (torch.zeros(0, 18, dtype=torch.uint8), "with positive sizes"),
        (torch.zeros(2, 0, dtype=torch.uint8), "with positive sizes"),
        (torch.zeros(2, 18, dtype=torch.int8), "of uint8"),
    ],
)
def test_impossible_headers(blocks: Tensor, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        GgufBlocks(GgmlType.Q4_0).read("w", {"blocks": blocks})


def test_parts_that_are_missing_or_too_many() -> None:
    blocks = blocks_of(GgmlType.Q4_0, 2, 64)
    with pytest.raises(CheckpointError, match="must have a part blocks; got only scale"):
        GgufBlocks(GgmlType.Q4_0).read("w", {"scale": blocks})
    with pytest.raises(CheckpointError, match="must consist of blocks; got scale besides"):
        GgufBlocks(GgmlType.Q4_0).read("w", {"blocks": blocks, "scale": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"config\.json"):
        GgufBlocks(GgmlType.Q4_0).read("w", {"blocks": blocks}, (2, 32))
    wrong = {"blocks": blocks_of(GgmlType.NVFP4, 2, 64), "scale": torch.ones(2)}
    with pytest.raises(CheckpointError, match=r"scale of w \(\(2,\) torch.float32\)"):
        GgufBlocks(GgmlType.NVFP4, has_scale=True).read("w", wrong)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({}, "must have ggml_type or ggml_types; got neither"),
        ({"ggml_type": "Q4_9"}, r"ggml_type \('Q4_9'\) must be one of F32, F16"),
        ({"ggml_type": 12}, r"ggml_type \('12'\) must be one of F32, F16"),
        ({"ggml_type": "I32"}, r"ggml_type \(I32\) must be a type of weights"),
        ({"ggml_types": ["Q4_0"]}, "must have ggml_type or ggml_types"),
    ],
)
def test_impossible_configurations(config: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        Gguf.from_config(config)


def test_types_by_name() -> None:
    codec = Gguf.from_config({"ggml_types": {"a.weight": "Q4_K", "b.weight": "F16"}})
    header = {"blocks": Header(torch.uint8, (2, 144))}
    assert codec.format_of("a.weight", header) == GgufBlocks(GgmlType.Q4_K)
    assert codec.format_of("c.weight", header) is None
    assert codec.format_of("a.weight", {"weight": Header(torch.float32, (2, 2))}) is None
    expected = {"a.weight": True, "b.weight": False, "c.weight": False}
    assert {name: codec.expects(name) for name in expected} == expected


def test_what_cannot_be_written() -> None:
    format = GgufBlocks(GgmlType.TQ1_0)
    decoded = format.read("w", {"blocks": blocks_of(GgmlType.TQ1_0, 2, 256)})
    other = format.read("w", {"blocks": blocks_of(GgmlType.TQ1_0, 2, 256, seed=1)})
    refused = pytest.raises(ConfigError, match=r"what its blocks can, and the block_headers")
    with refused:
        format.encode(dataclasses.replace(decoded, kept=other.kept))
    two_bits = dataclasses.replace(decoded.matrix, values=decoded.matrix.values | 0xFF)
    with refused:  # a byte holds five digits, and none is 3
        format.encode(dataclasses.replace(decoded, matrix=two_bits, kept={}))
    format = GgufBlocks(GgmlType.Q4_K)
    decoded = format.read("w", {"blocks": blocks_of(GgmlType.Q4_K, 2, 256)})
    assert decoded.matrix.scales is not None
    wide = dataclasses.replace(decoded.matrix, scales=decoded.matrix.scales | 64)
    with refused:  # six bits
        format.encode(dataclasses.replace(decoded, matrix=wide))
    with pytest.raises(ConfigError, match=r"must have the scheme of Q5_K"):
        GgufBlocks(GgmlType.Q5_K).encode(decoded)


def test_a_codec_does_not_write_into_what_it_reads() -> None:
    for type in BLOCK_TYPES:
        blocks = blocks_of(type, 2, 256)
        before = blocks.clone()
        decoded = GgufBlocks(type).read("w", {"blocks": blocks})
        GgufBlocks(type).encode(decoded)
        assert torch.equal(blocks, before), type


def test_experts_of_raw_blocks_have_no_gradients() -> None:
    matrix = read(GgmlType.IQ1_S, blocks_of(GgmlType.IQ1_S, 2, 256))
    assert not dequantize(matrix).requires_grad
    with pytest.raises(InputError, match="must index a stack"):
        matrix.expert(0)
