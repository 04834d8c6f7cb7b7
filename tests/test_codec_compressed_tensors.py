"""compressed-tensors: every format, its configuration, and files that must not be read."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from codec_files import (
    BF16,
    E4M3,
    FP32,
    I8,
    I32,
    I64,
    NAME,
    U8,
    Parts,
    assert_header_faults_are_refused,
    assert_unused_bits_are_zero,
    assert_written_back,
    bytes_of,
    e8m0_codes,
    floats8,
    format_of,
    golden,
    random_words,
    raw,
    read,
    refuse,
    weight,
    with_value,
    word,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixtura.errors import CheckpointError, ConfigError
from mixtura.quant.activations import ActivationExtra, ActivationGroup, ActivationScheme
from mixtura.quant.codecs.compressed_tensors import CompressedTensors
from mixtura.quant.codecs.contract import Decoded, Header
from mixtura.quant.matrix import dequantize
from mixtura.quant.quantize import quantize
from mixtura.quant.scheme import Code, GlobalScale, ZeroPoint

INF, NAN = float("inf"), float("nan")
TOKEN, TENSOR, GROUP = ActivationGroup.TOKEN, ActivationGroup.TENSOR, ActivationGroup.GROUP
POWERS = ActivationExtra.POWER_SCALES
FP8_TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
FP8_STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
MX4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}


def group(weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"targets": ["Linear"], "weights": weights, "input_activations": inputs}


def codec(weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> CompressedTensors:
    config = {"quant_method": "compressed-tensors", "config_groups": {"a": group(weights, inputs)}}
    return CompressedTensors.from_config(config)


def ints(bits: int, strategy: str = "group", *, symmetric: bool = True, size: int = 32) -> dict:
    sizes = {"group": {"group_size": size}, "block": {"block_structure": [4, size]}}
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        **sizes.get(strategy, {}),
    }


def floats(strategy: str, bits: int = 8, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "float", "symmetric": True, "strategy": strategy, **more}


def pack_by_loop(codes: Tensor, bits: int, is_dense: bool) -> Tensor:
    """Signed codes (N, K) as words, bit by bit."""
    rows = []
    for row in codes.tolist():
        words_of_row: dict[int, int] = {}
        per_word = 32 // bits
        for index, value in enumerate(row):
            first = index * bits if is_dense else index // per_word * 32 + index % per_word * bits
            for bit in range(bits):
                at, shift = divmod(first + bit, 32)
                one = (value + 2 ** (bits - 1)) >> bit & 1
                words_of_row[at] = words_of_row.get(at, 0) | one << shift
        rows.append([words_of_row.get(at, 0) for at in range(max(words_of_row) + 1)])
    return torch.tensor(rows, dtype=I64).to(I32)


def random_codes(bits: int, *shape: int) -> Tensor:
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape)


FAMILY = [
    "ct_fp8_channel",
    "ct_fp8_tensor",
    "ct_int8_channel_w8a8",
    "ct_mxfp4",
    "ct_mxfp8",
    "ct_nvfp4",
    "ct_pack_int2_g32_asym",
    "ct_pack_int3_g32_sym",
    "ct_pack_int4_channel_sym",
    "ct_pack_int4_g128_w4a8_fp8",
    "ct_pack_int4_g32_sym",
    "ct_pack_int8_channel_sym",
]


@pytest.mark.parametrize("name", FAMILY)
def test_golden_files(name: str) -> None:
    config, parts, expected, rtol = golden(name)
    decoded = assert_written_back(CompressedTensors.from_config(config), parts)
    torch.testing.assert_close(dequantize(decoded.matrix), expected, rtol=rtol, atol=0)


def test_int4_words_of_the_notes() -> None:
    parts = {
        "weight_packed": word(0x76543210),
        "weight_scale": torch.ones(1, 1, dtype=BF16),
        "weight_shape": torch.tensor([1, 8]),
    }
    expected = [[-8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0]]
    assert weight(codec(ints(4, "channel")), parts).tolist() == expected


def test_int3_words_of_the_notes() -> None:
    parts = {
        "weight_packed": word(0x88FAC688, 0xC688FAC6, 0xFAC688FA),
        "weight_scale": torch.ones(1, 1, dtype=BF16),
    }
    expected = [float(value) for value in range(-4, 4)] * 4
    assert weight(codec(ints(3)), parts).tolist() == [expected]


def test_nvfp4_bytes_of_the_notes() -> None:
    parts = {
        "weight_packed": raw(*[0x72] * 8),
        "weight_scale": raw(0x38).view(E4M3),
        "weight_global_scale": torch.tensor([1024.0]),
    }
    decoded = assert_written_back(codec(NVFP4), parts)
    assert dequantize(decoded.matrix)[0, :2].tolist() == [2**-10, 6 * 2**-10]
    assert decoded.matrix.global_scale is not None
    assert decoded.matrix.global_scale.item() == 2**-10  # a multiplier here, a divisor there


def test_mxfp4_and_mxfp6_bytes_of_the_notes() -> None:
    parts = {"weight_packed": raw(*[0x2B] * 16), "weight_scale": raw(0x7D)}
    assert weight(codec(MX4), parts)[0, :2].tolist() == [-0.375, 0.25]
    parts = {"weight_packed": raw(*[0x41, 0x20, 0xFC] * 8), "weight_scale": raw(0x7F)}
    values = weight(codec(floats("group", 6, group_size=32)), parts)
    assert values[0, :4].tolist() == [0.125, 0.125, 0.25, -7.5]


@pytest.mark.parametrize("is_dense", [True, False], ids=["dense", "loose"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_words_against_a_plain_loop(bits: int, is_dense: bool) -> None:
    columns = 100 if is_dense else 96  # of which both packings have different widths
    codes, zeros = random_codes(bits, 32, columns), random_codes(bits, 32, -(-columns // 32))
    scales = torch.randn(zeros.shape).to(BF16)
    parts = {
        "weight_packed": pack_by_loop(codes, bits, is_dense),
        "weight_zero_point": pack_by_loop(zeros.T, bits, is_dense).T.contiguous(),
        "weight_scale": scales,
        "weight_shape": torch.tensor([32, columns]),
    }
    spread = [grid.repeat_interleave(32, 1)[:, :columns] for grid in (zeros, scales.float())]
    expected = (codes - spread[0]).float() * spread[1]
    decoded = assert_written_back(codec(ints(bits, symmetric=False)), parts)
    assert torch.equal(dequantize(decoded.matrix), expected)
    del parts["weight_shape"]  # then the model says what it is
    decoded = assert_written_back(codec(ints(bits, symmetric=False)), parts, (32, columns))
    assert torch.equal(dequantize(decoded.matrix), expected)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_random_words_are_written_back_bit_for_bit(data: st.DataObject) -> None:
    """Bits that belong to no code included."""
    bits = data.draw(st.integers(1, 8))
    num_rows, num_columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 90))
    is_symmetric, is_dense = data.draw(st.booleans()), data.draw(st.booleans())
    is_channel = data.draw(st.booleans())
    groups = 1 if is_channel else -(-num_columns // 32)

    def count(num_codes: int) -> int:
        per_word = 32 // bits
        return -(-num_codes * bits // 32) if is_dense else -(-num_codes // per_word)

    parts = {
        "weight_packed": random_words(num_rows, count(num_columns)),
        "weight_scale": torch.randn(num_rows, groups).to(BF16),
        "weight_shape": torch.tensor([num_rows, num_columns]),
    }
    if not is_symmetric:
        parts["weight_zero_point"] = random_words(count(num_rows), groups)
    settings = ints(bits, "channel" if is_channel else "group", symmetric=is_symmetric)
    decoded = assert_written_back(codec(settings), parts)
    assert decoded.matrix.shape == (num_rows, num_columns)
    assert_unused_bits_are_zero(decoded.matrix)


def test_groups_tell_the_shape_of_an_old_file() -> None:
    codes = random_codes(3, 8, 160)  # 16 words
    parts = {
        "weight_packed": pack_by_loop(codes, 3, is_dense=False),
        "weight_scale": torch.ones(8, 5),
    }
    assert torch.equal(weight(codec(ints(3)), parts), codes.float())


def test_an_old_file_of_whole_rows_needs_a_shape_to_be_told_from_a_new_one() -> None:
    codes = random_codes(3, 8, 160)  # 16 old words, which are 170 codes of new ones
    parts = {
        "weight_packed": pack_by_loop(codes, 3, is_dense=False),
        "weight_scale": torch.ones(8, 1),
    }
    decoded = read(codec(ints(3, "channel")), parts, (8, 160))
    assert torch.equal(dequantize(decoded.matrix), codes.float())


def test_a_group_of_columns_in_another_order() -> None:
    """`weight_g_idx` of files with actorder group."""
    codes, scales = random_codes(4, 8, 64), torch.randn(8, 2).to(BF16)
    order = torch.randperm(64)
    groups = torch.empty(64, dtype=I32)
    groups[order] = (torch.arange(64) // 32).to(I32)
    parts = {
        "weight_packed": pack_by_loop(codes, 4, is_dense=True),
        "weight_scale": scales,
        "weight_g_idx": groups,
    }
    decoded = assert_written_back(codec(ints(4)), parts)
    assert decoded.matrix.permutation is not None
    expected = codes.float() * scales.float()[:, groups.long()]
    assert torch.equal(dequantize(decoded.matrix), expected)

    for idle in (torch.arange(64) // 32, torch.full((64,), -1)):
        decoded = assert_written_back(codec(ints(4)), {**parts, "weight_g_idx": idle.to(I32)})
        assert decoded.matrix.permutation is None
    uneven = {**parts, "weight_g_idx": (torch.arange(64) // 40).to(I32)}
    refuse(codec(ints(4)), uneven, "weight_g_idx must give every group 32 columns")


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
@pytest.mark.parametrize(
    ("strategy", "scale_shape"),
    [
        ("tensor", ()),
        ("tensor", (1,)),
        ("tensor", (1, 1)),
        ("channel", (6, 1)),
        ("channel", (6,)),
        ("group", (6, 3)),
        ("block", (2, 3)),
    ],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_plain_integers(
    bits: int, strategy: str, scale_shape: tuple[int, ...], symmetric: bool
) -> None:
    codes = random_codes(bits, 6, 80)
    scale = torch.rand(scale_shape) + 0.5
    zeros = random_codes(bits, *scale_shape) * (not symmetric)
    parts = {"weight": codes.to(I8), "weight_scale": scale}
    if not symmetric:
        parts["weight_zero_point"] = zeros.to(I8)
    decoded = assert_written_back(codec(ints(bits, strategy, symmetric=symmetric)), parts)
    rows = {"tensor": 6, "block": 4}.get(strategy, 1)
    grid = [
        value.reshape(-(-6 // rows), -1).repeat_interleave(rows, 0)[:6].repeat_interleave(32, 1)
        for value in (zeros, scale)
    ]
    spread = [value[:, :80] if value.shape[1] > 32 else value[:, :1] for value in grid]
    assert torch.equal(dequantize(decoded.matrix), (codes - spread[0]).float() * spread[1])
    assert decoded.matrix.scheme.bits == bits


def test_plain_integers_beyond_their_width_are_refused() -> None:
    parts = {"weight": torch.full((2, 32), 7).to(I8), "weight_scale": torch.ones(2, 1)}
    assert weight(codec(ints(4, "channel")), parts).max() == 7
    for value in (8, -9, 127, -128):
        bad = {**parts, "weight": with_value(parts["weight"], value)}
        refuse(codec(ints(4, "channel")), bad, rf"weight \(1, 31\) must be in -8..7.*got {value}")


def test_zero_points_that_symmetric_codes_ignore() -> None:
    parts = {"weight": random_codes(8, 4, 32).to(I8), "weight_scale": torch.ones(4, 1)}
    idle = {**parts, "weight_zero_point": torch.zeros(4, 1, dtype=I8)}
    decoded = assert_written_back(codec(ints(8, "channel")), idle)
    assert decoded.matrix.scheme.zero_point is ZeroPoint.MID
    idle["weight_zero_point"] = with_value(idle["weight_zero_point"], 1)
    refuse(codec(ints(8, "channel")), idle, "weight_zero_point must be 0")

    packed = {"weight_packed": random_words(8, 4), "weight_scale": torch.ones(8, 1)}
    packed["weight_zero_point"] = torch.full((1, 1), 0x88888888 - 2**32).to(I32)
    assert_written_back(codec(ints(4)), packed)
    floating = {"weight": floats8(4, 32), "weight_scale": torch.ones(1)}
    floating["weight_zero_point"] = torch.zeros(1).to(E4M3)
    assert_written_back(codec(floats("tensor")), floating)


def test_zero_points_of_older_packed_files_are_bytes() -> None:
    codes, zeros = random_codes(4, 8, 64), random_codes(4, 8, 2)
    parts = {
        "weight_packed": pack_by_loop(codes, 4, is_dense=True),
        "weight_scale": torch.ones(8, 2),
        "weight_zero_point": zeros.to(I8),
    }
    decoded = assert_written_back(codec(ints(4, symmetric=False)), parts)
    expected = (codes - zeros.repeat_interleave(32, 1)).float()
    assert torch.equal(dequantize(decoded.matrix), expected)
    parts["weight_zero_point"] = with_value(parts["weight_zero_point"], 8)
    refuse(codec(ints(4, symmetric=False)), parts, r"weight_zero_point \(7, 1\).*got 8")


@pytest.mark.parametrize(
    ("settings", "scale_shape"),
    [
        (floats("tensor"), ()),
        (floats("tensor"), (1,)),
        (floats("channel"), (140, 1)),
        (floats("channel"), (140,)),
        (floats("block", block_structure=[128, 128]), (2, 2)),
        (floats("block", block_structure="128x128"), (2, 2)),
        (floats("group", group_size=64), (140, 3)),
    ],
)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_float8(settings: dict[str, Any], scale_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    parts = {"weight": floats8(140, 160), "weight_scale": torch.rand(scale_shape).to(dtype) + 1}
    decoded = assert_written_back(codec(settings, FP8_TOKEN), parts)
    matrix = decoded.matrix
    assert matrix.scheme.scale_dtype is dtype
    rows, columns = matrix.scheme.group_size(matrix.shape)
    scale = parts["weight_scale"].float().reshape(-(-140 // rows), -1)
    spread = scale.repeat_interleave(rows, 0)[:140].repeat_interleave(columns, 1)[:, :160]
    assert torch.equal(dequantize(matrix), parts["weight"].float() * spread)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_microscaled_floats_are_written_back(bits: int) -> None:
    part = "weight" if bits == 8 else "weight_packed"
    codes = floats8(5, 64) if bits == 8 else bytes_of(5, 64 * bits // 8)
    parts = {part: codes, "weight_scale": e8m0_codes(5, 2)}
    matrix = assert_written_back(codec(floats("group", bits, group_size=32)), parts).matrix
    assert matrix.scheme.code is {4: Code.E2M1, 6: Code.E2M3, 8: Code.E4M3}[bits]
    assert matrix.shape == (5, 64)


@settings(max_examples=30, deadline=None)
@given(st.floats(2**-120, 2**120, width=32), st.floats(2**-120, 2**120, width=32))
def test_nvfp4_divisors_are_written_back_bit_for_bit(scale: float, inputs: float) -> None:
    parts = {
        "weight_packed": bytes_of(3, 16),
        "weight_scale": floats8(3, 2),
        "weight_global_scale": torch.tensor([scale]),
        "input_global_scale": torch.tensor([inputs]),
    }
    decoded = assert_written_back(codec(NVFP4, {**NVFP4, "dynamic": "local"}), parts)
    assert decoded.matrix.scheme.global_scale is GlobalScale.MATRIX
    assert decoded.input_scale is not None
    torch.testing.assert_close(decoded.input_scale.item(), 1 / inputs, rtol=1e-6, atol=0)


def test_a_divisor_is_written_back_for_its_own_matrix_only() -> None:
    parts = VALID["nvfp4"][1]()
    decoded = read(codec(NVFP4), parts)
    halved = dataclasses.replace(decoded.matrix, global_scale=torch.tensor(0.5))
    written = format_of(codec(NVFP4), parts).encode(dataclasses.replace(decoded, matrix=halved))
    assert written["weight_global_scale"].tolist() == [2.0]


def test_a_matrix_that_was_not_read_from_a_file_can_be_written() -> None:
    parts = {
        "weight_packed": bytes_of(3, 16),
        "weight_scale": floats8(3, 2),
        "weight_global_scale": torch.tensor([1000.0]),
    }
    format = format_of(codec(NVFP4), parts)
    ours = quantize(torch.randn(3, 32), read(codec(NVFP4), parts).matrix.scheme)
    written = format.encode(Decoded(ours))
    torch.testing.assert_close(weight(codec(NVFP4), written), dequantize(ours), rtol=3e-7, atol=0)
    with pytest.raises(ConfigError, match="must be of scheme 'e2m1"):
        format.encode(
            read(codec(MX4), {"weight_packed": bytes_of(3, 16), "weight_scale": e8m0_codes(3, 1)})
        )

    settings = ints(4, symmetric=False)
    parts = {
        "weight_packed": random_words(8, 8),
        "weight_scale": torch.ones(8, 2),
        "weight_zero_point": random_words(1, 2),
        "weight_shape": torch.tensor([8, 64]),
    }
    format = format_of(codec(settings), parts)
    ours = quantize(torch.randn(8, 64), read(codec(settings), parts).matrix.scheme)
    written = format.encode(Decoded(ours))
    assert {part: Header.of(tensor) for part, tensor in written.items()} == {
        part: Header.of(tensor) for part, tensor in parts.items()
    }
    assert torch.equal(weight(codec(settings), written), dequantize(ours))


def test_a_stack_of_experts() -> None:
    parts = {
        "weight_packed": random_words(3, 8, 8),
        "weight_scale": torch.rand(3, 8, 2),
        "weight_zero_point": random_words(3, 1, 2),
        "weight_shape": torch.tensor([3, 8, 64]),
    }
    decoded = assert_written_back(codec(ints(4, symmetric=False)), parts)
    assert decoded.matrix.shape == (3, 8, 64)
    one = {part: tensor[1] for part, tensor in parts.items() if part != "weight_shape"}
    alone = read(codec(ints(4, symmetric=False)), one).matrix
    assert torch.equal(dequantize(decoded.matrix.expert(1)), dequantize(alone))


def scheme_of(weights: dict[str, Any], inputs: dict[str, Any], parts: Parts) -> ActivationScheme:
    activations = format_of(codec(weights, inputs), parts).activations
    assert activations is not None
    return activations


def test_activations() -> None:
    fp8 = {"weight": floats8(4, 32), "weight_scale": torch.ones(1)}
    found = scheme_of(floats("tensor"), FP8_STATIC, fp8)
    assert found == ActivationScheme(Code.E4M3, 8, TENSOR, is_static=True)
    found = scheme_of(floats("tensor"), FP8_TOKEN, fp8)
    assert found == ActivationScheme(Code.E4M3, 8, TOKEN)
    int8 = {"weight": random_codes(8, 4, 32).to(I8), "weight_scale": torch.ones(4, 1)}
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    assert scheme_of(ints(8, "channel"), inputs, int8) == ActivationScheme(Code.INT, 8, TOKEN)
    asymmetric = codec(ints(8, "channel"), {**inputs, "symmetric": False})
    assert format_of(asymmetric, int8).activations is None
    nvfp4 = {
        "weight_packed": bytes_of(3, 16),
        "weight_scale": floats8(3, 2),
        "weight_global_scale": torch.tensor([1.0]),  # legal
    }
    found = scheme_of(NVFP4, {**NVFP4, "dynamic": "local"}, nvfp4)
    assert found == ActivationScheme(Code.E2M1, 4, GROUP, 16, is_static=True)
    mx = {"weight_packed": bytes_of(3, 16), "weight_scale": e8m0_codes(3, 1)}
    found = scheme_of(MX4, {**MX4, "dynamic": True}, mx)
    assert found == ActivationScheme(Code.E2M1, 4, GROUP, 32)
    found = scheme_of(MX4, {**MX4, "dynamic": True, "scale_dtype": "torch.uint8"}, mx)
    assert found == ActivationScheme(Code.E2M1, 4, GROUP, 32, extra=POWERS)


def test_input_scales_that_are_missing_or_superfluous() -> None:
    parts = {"weight": floats8(4, 32), "weight_scale": torch.ones(1)}
    static, dynamic = codec(floats("tensor"), FP8_STATIC), codec(floats("tensor"), FP8_TOKEN)
    assert assert_written_back(static, parts).input_scale is None  # an expert without tokens
    with_scale = {**parts, "input_scale": torch.tensor([0.25], dtype=BF16)}
    read_scale = assert_written_back(static, with_scale).input_scale
    assert read_scale is not None and read_scale.item() == 0.25 and read_scale.dtype is FP32
    for codec_of in (dynamic, codec(floats("tensor"))):
        decoded = assert_written_back(codec_of, {**with_scale, "input_scale": torch.zeros(1)})
        assert decoded.input_scale is None
    for value in (0.0, -1.0, INF, NAN):
        refuse(static, {**parts, "input_scale": torch.tensor([value])}, "input_scale")
    nvfp4 = {
        "weight_packed": bytes_of(3, 16),
        "weight_scale": floats8(3, 2),
        "weight_global_scale": torch.ones(1),
        "input_global_scale": torch.zeros(1),  # what was never set
    }
    assert assert_written_back(codec(NVFP4), nvfp4).input_scale is None
    refuse(codec(NVFP4, {**NVFP4, "dynamic": "local"}), nvfp4, "input_global_scale")


VALID: dict[str, tuple[dict[str, Any], Any]] = {
    "int4": (
        ints(4, symmetric=False),
        lambda: {
            "weight_packed": random_words(8, 8),
            "weight_scale": torch.ones(8, 2).to(BF16),
            "weight_zero_point": random_words(1, 2),
            "weight_shape": torch.tensor([8, 64]),
        },
    ),
    "int8": (
        ints(8, "channel"),
        lambda: {"weight": random_codes(8, 4, 32).to(I8), "weight_scale": torch.ones(4, 1)},
    ),
    "fp8": (
        floats("channel"),
        lambda: {"weight": floats8(4, 32), "weight_scale": torch.ones(4, 1)},
    ),
    "nvfp4": (
        NVFP4,
        lambda: {
            "weight_packed": bytes_of(3, 16),
            "weight_scale": floats8(3, 2),
            "weight_global_scale": torch.ones(1),
        },
    ),
    "mxfp4": (
        MX4,
        lambda: {"weight_packed": bytes_of(3, 16), "weight_scale": e8m0_codes(3, 1)},
    ),
    "mxfp8": (
        floats("group", group_size=32),
        lambda: {"weight": floats8(3, 64), "weight_scale": e8m0_codes(3, 2)},
    ),
}


@pytest.mark.parametrize("kind", VALID)
def test_bad_headers_are_refused(kind: str) -> None:
    settings, parts = VALID[kind]
    assert_header_faults_are_refused(codec(settings), parts(), optional=("weight_shape",))


@pytest.mark.parametrize("kind", VALID)
def test_the_model_and_the_file_must_agree(kind: str) -> None:
    settings, parts = VALID[kind]
    found = read(codec(settings), parts()).matrix.shape
    for shape in [(found[0] + 1, found[1]), (found[0], found[1] + 32), (2, *found)]:
        refuse(codec(settings), parts(), "must", shape=shape)


def test_a_wrong_group_size_or_width_is_refused() -> None:
    parts = VALID["int4"][1]()
    refuse(codec(ints(4, symmetric=False, size=64)), parts, "weight_scale")
    refuse(codec(ints(8, symmetric=False)), parts, "must")
    refuse(codec(ints(4, symmetric=True, size=32)), parts, "weight_zero_point must be 0")
    refuse(codec(floats("group", group_size=64)), VALID["mxfp8"][1](), "weight_scale")
    refuse(codec(floats("group", 6, group_size=32)), VALID["mxfp4"][1](), "weight_packed")
    block = {"weight": floats8(256, 256), "weight_scale": torch.ones(2, 2)}
    refuse(codec(floats("block", block_structure=[64, 64])), block, "weight_scale")
    refuse(codec(floats("tensor")), block, "weight_scale")


def test_a_stated_shape_that_contradicts_the_words_is_refused() -> None:
    parts = {**VALID["int4"][1](), "weight_shape": torch.tensor([8, 72])}
    refuse(codec(ints(4, symmetric=False)), parts, "must")
    refuse(codec(ints(4, symmetric=False)), parts, "weight_shape", shape=(8, 64))
    for shape in ([-8, 64], [0, 0], [2**62, 2**62], [8]):
        bad = {**parts, "weight_shape": torch.tensor(shape)}
        refuse(codec(ints(4, symmetric=False)), bad, "must")


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_scales_must_be_finite(kind: str, value: float) -> None:
    settings, make = VALID[kind]
    parts = make()
    bad = {**parts, "weight_scale": with_value(parts["weight_scale"], value)}
    refuse(codec(settings), bad, "weight_scale.*must be finite")


def test_scales_of_rows_and_groups_may_be_zero_or_negative() -> None:
    for kind in ("int4", "int8", "fp8"):
        settings, make = VALID[kind]
        for value in (0.0, -1.0):
            parts = make()
            parts["weight_scale"] = with_value(parts["weight_scale"], value)
            assert_written_back(codec(settings), parts)


@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, INF, NAN])
def test_scales_of_tensors_must_be_above_zero(value: float) -> None:
    fp8 = {"weight": floats8(4, 32), "weight_scale": torch.tensor([value])}
    refuse(codec(floats("tensor")), fp8, "weight_scale")
    nvfp4 = {**VALID["nvfp4"][1](), "weight_global_scale": torch.tensor([value])}
    refuse(codec(NVFP4), nvfp4, "weight_global_scale")


def test_a_divisor_without_a_reciprocal_is_refused() -> None:
    parts = {**VALID["nvfp4"][1](), "weight_global_scale": torch.tensor([1e-45])}
    refuse(codec(NVFP4), parts, "weight_global_scale.*got inf")
    parts["weight_global_scale"] = torch.zeros(1)
    refuse(codec(NVFP4), parts, r"weight_global_scale \(0.0\) must be above 0")


def test_codes_and_scales_that_are_no_numbers_are_refused() -> None:
    for code in (0x7F, 0xFF):
        for kind, part in [("fp8", "weight"), ("mxfp8", "weight"), ("nvfp4", "weight_scale")]:
            settings, make = VALID[kind]
            parts = make()
            parts[part] = with_value(parts[part].view(U8), code).view(E4M3)
            refuse(codec(settings), parts, f"{part} ")
    for kind in ("mxfp4", "mxfp8"):
        settings, make = VALID[kind]
        parts = make()
        parts["weight_scale"] = with_value(parts["weight_scale"], 255)
        refuse(codec(settings), parts, "weight_scale")
        parts["weight_scale"] = with_value(parts["weight_scale"], 254)
        assert_written_back(codec(settings), parts)


# The configuration


def codec_of(**config: Any) -> CompressedTensors:
    return CompressedTensors.from_config({"quant_method": "compressed-tensors", **config})


def scheme_bits(codec: CompressedTensors, module: str) -> int:
    parts = {"weight": random_codes(2, 4, 32).to(I8), "weight_scale": torch.ones(4, 1)}
    headers = {part: Header.of(tensor) for part, tensor in parts.items()}
    format = codec.format_of(f"{module}.weight", headers)
    assert format is not None
    return format.read(f"{module}.weight", parts).matrix.scheme.bits


def test_targets_are_matched_by_name_then_pattern_then_class() -> None:
    groups = {
        "classes": {"targets": ["Linear"], "weights": ints(8, "channel")},
        "others": {"targets": ["MoE"], "weights": ints(5, "channel")},
        "patterns": {"targets": ["re:.*down_proj$"], "weights": ints(4, "channel")},
        "names": {"targets": ["layers.0.down_proj"], "weights": ints(2, "channel")},
    }
    mixed = codec_of(config_groups=groups, format="mixed-precision")
    assert scheme_bits(mixed, "layers.0.down_proj") == 2
    assert scheme_bits(mixed, "layers.1.down_proj") == 4
    assert scheme_bits(mixed, "layers.1.up_proj") == 8


def test_ignored_modules_are_not_expected() -> None:
    groups = {"a": {"targets": ["Linear"], "weights": ints(4)}}
    ignore = ["lm_head", "re:.*mlp.gate$", "layers.0.mlp.up_proj"]
    found = codec_of(config_groups=groups, ignore=ignore)
    expected = {
        "lm_head.weight": False,
        "layers.0.mlp.gate.weight": False,
        "layers.0.mlp.gate_proj.weight": True,
        "layers.0.mlp.up_proj.weight": False,
        "layers.1.mlp.up_proj.weight": True,
    }
    assert {name: found.expects(name) for name in expected} == expected
    only_patterns = {"a": {"targets": ["re:.*experts"], "weights": ints(4)}}
    found = codec_of(config_groups=only_patterns)
    assert found.expects("layers.0.experts.1.up_proj.weight")
    assert not found.expects("layers.0.self_attn.q_proj.weight")


def test_parts_decide_where_lists_contradict_them() -> None:
    config = {"config_groups": {"a": group(ints(4))}, "ignore": ["re:.*"]}
    assert codec_of(**config).format_of(NAME, {"weight": Header(BF16, (4, 4))}) is None
    parts = VALID["int4"][1]() | {
        "weight_zero_point": torch.full((1, 2), 0x88888888 - 2**32).to(I32)
    }
    assert read(codec_of(**config), parts).matrix.scheme.bits == 4
    elsewhere = {"a": {"targets": ["re:nothing"], "weights": ints(4)}}
    assert read(codec_of(config_groups=elsewhere), parts).matrix.scheme.bits == 4
    two = {"a": group(floats("channel")), "b": {**group(ints(4)), "targets": []}}
    assert read(codec_of(config_groups=two), parts).matrix.scheme.bits == 4
    refuse(codec_of(config_groups={"a": group(floats("channel"))}), parts, "config_groups")


PRESETS = {
    "W4A16": (4, (1, 128), None),
    "W4A16_ASYM": (4, (1, 128), None),
    "w8a8": (8, (1, None), ActivationScheme(Code.INT, 8, TOKEN)),
    "INT8": (8, (1, None), ActivationScheme(Code.INT, 8, TOKEN)),
    "W4A8": (4, (1, 128), ActivationScheme(Code.INT, 8, TOKEN)),
    "W4AFP8": (4, (1, 128), ActivationScheme(Code.E4M3, 8, TOKEN)),
    "W8A16": (8, (1, 128), None),
    "FP8": (8, (None, None), ActivationScheme(Code.E4M3, 8, TENSOR, is_static=True)),
    "FP8_DYNAMIC": (8, (1, None), ActivationScheme(Code.E4M3, 8, TOKEN)),
    "FP8_BLOCK": (8, (128, 128), ActivationScheme(Code.E4M3, 8, GROUP, 128)),
    "NVFP4": (4, (1, 16), ActivationScheme(Code.E2M1, 4, GROUP, 16, is_static=True)),
    "NVFP4A16": (4, (1, 16), None),
    "MXFP4": (4, (1, 32), ActivationScheme(Code.E2M1, 4, GROUP, 32, extra=POWERS)),
    "MXFP4A16": (4, (1, 32), None),
    "MXFP4XFP8": (4, (1, 32), ActivationScheme(Code.E4M3, 8, GROUP, 128)),
    "MXFP6A16": (6, (1, 32), None),
    "MXFP6A8": (6, (1, 32), ActivationScheme(Code.E4M3, 8, GROUP, 32, extra=POWERS)),
    "MXFP8": (8, (1, 32), ActivationScheme(Code.E4M3, 8, GROUP, 32, extra=POWERS)),
    "MXFP8A16": (8, (1, 32), None),
}


def parts_of_preset(name: str) -> Parts:
    bits, (rows, columns), _ = PRESETS[name]
    scale = torch.ones(-(-8 // (rows or 8)), -(-256 // (columns or 256)))
    if name.startswith("NVFP4"):
        return {
            "weight_packed": bytes_of(8, 128),
            "weight_scale": floats8(8, 16),
            "weight_global_scale": torch.ones(1),
        }
    if name.startswith("MX"):
        codes = floats8(8, 256) if bits == 8 else bytes_of(8, 32 * bits)
        part = "weight" if bits == 8 else "weight_packed"
        return {part: codes, "weight_scale": e8m0_codes(8, 8)}
    if name.startswith("FP8"):
        return {"weight": floats8(8, 256), "weight_scale": scale}
    parts = {"weight_packed": random_words(8, 8 * bits), "weight_scale": scale}
    return parts | ({"weight_zero_point": random_words(1, 2)} if name.endswith("ASYM") else {})


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    bits, group_shape, activations = PRESETS[name]
    format = format_of(codec_of(config_groups={name: ["Linear"]}), parts_of_preset(name))
    scheme = format.read(NAME, parts_of_preset(name)).matrix.scheme
    assert (scheme.bits, scheme.group_shape, format.activations) == (bits, group_shape, activations)


def test_a_preset_that_has_meant_rows_too() -> None:
    parts = {"weight_packed": random_words(8, 64), "weight_scale": torch.ones(8, 1)}
    matrix = read(codec_of(config_groups={"W8A16": ["Linear"]}), parts).matrix
    assert matrix.scheme.group_shape == (1, None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"format": "marlin-24"}, "format.*marlin-24"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "format.*sparse-24-bitmask"),
        ({"config_groups": {"W5A3": ["Linear"]}}, "W5A3"),
        ({"config_groups": {"A8": ["Linear"]}}, "A8"),
        ({"config_groups": ["W4A16"]}, "config_groups"),
        ({"config_groups": {"a": 4}}, "config_groups, a"),
        ({"config_groups": {"a": group({**ints(4), "num_bits": 9})}}, "num_bits"),
        ({"config_groups": {"a": group({**ints(4), "group_size": 0})}}, "group_size"),
        ({"config_groups": {"a": group({**ints(4), "group_size": None})}}, "group_size"),
        ({"config_groups": {"a": group({**ints(4), "strategy": "row"})}}, "strategy"),
        ({"config_groups": {"a": group({**ints(4), "type": "complex"})}}, "type"),
        ({"config_groups": {"a": group(floats("block"))}}, "block_structure"),
        ({"config_groups": {"a": group(floats("block", block_structure=[0, 1]))}}, "block"),
        ({"config_groups": {"a": {**group(ints(4)), "targets": "Linear"}}}, "targets"),
        ({"config_groups": {"a": {**group(ints(4)), "format": "zip"}}}, "format"),
        ({"ignore": [3]}, "ignore"),
    ],
    ids=str,
)
def test_configurations_that_are_not_read(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        codec_of(**config)


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"pattern '\('"):
        codec_of(config_groups={"a": group(ints(4))}, ignore=["re:("]).expects(NAME)


def test_names_of_parts() -> None:
    found = codec(ints(4))
    assert found.split("a.up_proj.weight_packed") == ("a.up_proj.weight", "weight_packed")
    assert found.split("a.up_proj.weight") == ("a.up_proj.weight", "weight")
    assert found.split("a.k_proj.k_scale") is None
    assert found.split("a.up_proj.bias") is None
    assert found.split("a.k_proj.output_scale") is None


def test_formats_are_values() -> None:
    parts = VALID["int4"][1]()
    first, second = (format_of(codec(ints(4, symmetric=False)), parts) for _ in range(2))
    assert first == second and hash(first) == hash(second)
