"""Quark: every dtype, both packings, two stages, and files that must not be read."""

from __future__ import annotations

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

from mixtura.errors import CheckpointError
from mixtura.quant.activations import ActivationExtra, ActivationGroup, ActivationScheme
from mixtura.quant.codecs.contract import Decoded, Header
from mixtura.quant.codecs.quark import Quark
from mixtura.quant.matrix import dequantize
from mixtura.quant.quantize import quantize
from mixtura.quant.scheme import Code, GlobalScale, ZeroPoint

INF, NAN = float("inf"), float("nan")
TOKEN, TENSOR, GROUP = ActivationGroup.TOKEN, ActivationGroup.TENSOR, ActivationGroup.GROUP
POWERS = ActivationExtra.POWER_SCALES
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def spec(dtype: str, qscheme: str, group_size: int | None = None, **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "qscheme": qscheme, "group_size": group_size, **more}


INT4 = spec("int4", "per_group", 32, symmetric=True, ch_axis=-1, is_dynamic=False)
UINT4 = spec("uint4", "per_group", 32, symmetric=False, ch_axis=-1, is_dynamic=False)
INT8 = spec("int8", "per_tensor", symmetric=True)
FP8 = spec("fp8_e4m3", "per_tensor")
MXFP4 = spec("fp4", "per_group", 32, scale_format="e8m0", symmetric=None)
TWO_STAGES = [FP8, spec("int4", "per_channel", ch_axis=0, symmetric=True)]
NVFP4 = [spec("fp4", "per_group", 16), spec("fp8_e4m3", "per_tensor", is_scale_quant=True)]


def layer(weight_spec: Any, inputs: Any = None) -> dict[str, Any]:
    return {"weight": weight_spec, "input_tensors": inputs, "output_tensors": None, "bias": None}


def codec(weight_spec: Any, inputs: Any = None, pack_method: str = "reorder", **more: Any) -> Quark:
    return Quark.from_config(
        {
            "quant_method": "quark",
            "global_quant_config": layer(weight_spec, inputs),
            "export": {"pack_method": pack_method, "kv_cache_group": []},
            **more,
        }
    )


def pack_by_loop(codes: Tensor, pack_method: str) -> Tensor:
    """Integers (rows, columns) as words of eight along columns."""
    order = AWQ_ORDER if pack_method == "reorder" else range(8)
    rows = []
    for row in codes.tolist():
        row = row + [0] * (-len(row) % 8)
        packed = []
        for first in range(0, len(row), 8):
            fields = [
                (row[first + element] & 15) << 4 * field for field, element in enumerate(order)
            ]
            packed.append(sum(fields))
        rows.append(packed)
    return torch.tensor(rows, dtype=I64).to(I32)


FAMILY = [
    "quark_int4_sym_order_g32",
    "quark_int4_sym_reorder_g32",
    "quark_mxfp4",
    "quark_mxfp6_e2m3",
]


@pytest.mark.parametrize("name", FAMILY)
def test_golden_files(name: str) -> None:
    config, parts, expected, _ = golden(name)
    decoded = assert_written_back(Quark.from_config(config), parts)
    assert torch.equal(dequantize(decoded.matrix), expected)


@pytest.mark.parametrize("pack_method", ["reorder", "order"])
@pytest.mark.parametrize("dtype", ["int4", "uint4"])
@pytest.mark.parametrize(("num_rows", "num_columns"), [(16, 64), (11, 70)])
def test_groups_against_a_plain_loop(
    dtype: str, pack_method: str, num_rows: int, num_columns: int
) -> None:
    low = -8 if dtype == "int4" else 0
    groups = -(-num_columns // 32)
    codes = torch.randint(low, low + 16, (num_rows, num_columns))
    zeros = torch.randint(low, low + 16, (num_rows, groups)) * (dtype == "uint4")
    scales = torch.randn(num_rows, groups)
    parts = {
        "weight": pack_by_loop(codes.T, pack_method),
        "weight_scale": scales.T.contiguous(),
        "weight_zero_point": pack_by_loop(zeros.T, pack_method),
    }
    found = codec(UINT4 if dtype == "uint4" else INT4, pack_method=pack_method)
    decoded = assert_written_back(found, parts, (num_rows, num_columns))
    spread = [grid.repeat_interleave(32, 1)[:, :num_columns] for grid in (zeros, scales)]
    assert torch.equal(dequantize(decoded.matrix), (codes - spread[0]).float() * spread[1])
    if dtype == "int4":  # whose zero points may be left out, and otherwise must be without effect
        assert decoded.matrix.scheme.zero_point is ZeroPoint.MID
        parts["weight_zero_point"] = with_value(parts["weight_zero_point"], 1)
        refuse(found, parts, "weight_zero_point must be 0", shape=(num_rows, num_columns))
        del parts["weight_zero_point"]
        assert_written_back(found, parts, (num_rows, num_columns))


@pytest.mark.parametrize("pack_method", ["reorder", "order"])
@pytest.mark.parametrize("dtype", ["int4", "uint4"])
def test_channels_against_a_plain_loop(dtype: str, pack_method: str) -> None:
    """Words along K, of a matrix that is not transposed."""
    low = -8 if dtype == "int4" else 0
    codes = torch.randint(low, low + 16, (16, 40))
    zeros = torch.randint(low, low + 16, (16,))
    scales = torch.randn(16)
    parts = {
        "weight": pack_by_loop(codes, pack_method),
        "weight_scale": scales,
        "weight_zero_point": pack_by_loop(zeros[None], pack_method)[0],
    }
    found = codec(spec(dtype, "per_channel", symmetric=False), pack_method=pack_method)
    decoded = assert_written_back(found, parts)
    assert torch.equal(dequantize(decoded.matrix), (codes - zeros[:, None]) * scales[:, None])


def test_signed_words_by_hand() -> None:
    parts = {"weight": word(0xFEDC7210), "weight_scale": torch.tensor([0.5])}
    found = codec(spec("int4", "per_channel"), pack_method="order")
    assert weight(found, parts).tolist() == [[0.0, 0.5, 1.0, 3.5, -2.0, -1.5, -1.0, -0.5]]
    found = codec(spec("int4", "per_channel"), pack_method="reorder")
    assert weight(found, parts).tolist() == [[0.0, -2.0, 0.5, -1.5, 1.0, -1.0, 3.5, -0.5]]


@pytest.mark.parametrize("pack_method", ["reorder", "order"])
def test_int4_in_fp8(pack_method: str) -> None:
    codes = torch.randint(-8, 8, (16, 40))
    parts = {
        "weight": pack_by_loop(codes, pack_method),
        "weight_scale": torch.tensor(0.5),
        "weight_scale_2": torch.rand(16) + 0.5,
        "input_scale": torch.tensor(0.25),
    }
    found = codec(TWO_STAGES, FP8, pack_method)
    decoded = assert_written_back(found, parts)
    expected = codes * parts["weight_scale_2"][:, None] * 0.5
    assert torch.equal(dequantize(decoded.matrix), expected)
    assert decoded.matrix.scheme.global_scale is GlobalScale.MATRIX
    assert decoded.input_scale is not None and decoded.input_scale.item() == 0.25
    idle = pack_by_loop(torch.zeros(1, 16, dtype=I64), pack_method)[0]
    assert_written_back(found, {**parts, "weight_zero_point_2": idle})
    for value in (0.0, -1.0, INF, NAN):
        refuse(found, {**parts, "weight_scale": torch.tensor(value)}, "weight_scale")


def test_nvfp4_in_two_stages() -> None:
    parts = {
        "weight": raw(*[0x72] * 8),
        "weight_scale": raw(0x38).view(E4M3),
        "weight_scale_2": torch.tensor(2.0**-10),
        "input_scale_2": torch.tensor(0.5),
    }
    found = codec(NVFP4, NVFP4)
    decoded = assert_written_back(found, parts)
    assert dequantize(decoded.matrix)[0, :2].tolist() == [2**-10, 6 * 2**-10]
    assert decoded.input_scale is not None and decoded.input_scale.item() == 0.5
    inputs = ActivationScheme(Code.E2M1, 4, GROUP, 16, is_static=True)
    assert format_of(found, parts).activations == inputs


@pytest.mark.parametrize(
    ("dtype", "code"),
    [("fp4", Code.E2M1), ("fp6_e2m3", Code.E2M3), ("fp6_e3m2", Code.E3M2), ("fp8_e4m3", Code.E4M3)],
)
def test_microscaled_floats(dtype: str, code: Code) -> None:
    bits = int(dtype[2])
    codes = floats8(5, 64) if bits == 8 else bytes_of(5, 8 * bits)
    parts = {"weight": codes, "weight_scale": e8m0_codes(5, 2)}
    found = codec(spec(dtype, "per_group", 32, scale_format="e8m0"))
    matrix = assert_written_back(found, parts).matrix
    assert (matrix.scheme.code, matrix.shape) == (code, (5, 64))


def test_microscaled_bytes_of_the_notes() -> None:
    parts = {"weight": raw(*[0x2B] * 16), "weight_scale": raw(0x7D)}
    assert weight(codec(MXFP4), parts)[0, :2].tolist() == [-0.375, 0.25]
    parts = {"weight": raw(*[0x41, 0x20, 0xFC] * 8), "weight_scale": raw(0x7F)}
    found = codec(spec("fp6_e2m3", "per_group", 32))
    assert weight(found, parts)[0, :4].tolist() == [0.125, 0.125, 0.25, -7.5]
    found = codec(spec("fp6_e3m2", "per_group", 32))
    assert weight(found, parts)[0, :4].tolist() == [0.0625, 0.0625, 0.125, -28.0]


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(
    ("weight_spec", "scale_shape"),
    [
        (FP8, ()),
        (FP8, (1,)),
        (spec("fp8_e4m3", "per_channel"), (140,)),
        (spec("fp8_e4m3", "per_block", block_size=[64, 128]), (3, 2)),
        (spec("fp8_e4m3", "per_block"), (2, 2)),
    ],
)
def test_float8(
    weight_spec: dict[str, Any], scale_shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    scale = (torch.rand(scale_shape) + 0.5).to(dtype)
    parts = {"weight": floats8(140, 160), "weight_scale": scale}
    matrix = assert_written_back(codec(weight_spec), parts).matrix
    rows, columns = matrix.scheme.group_size(matrix.shape)
    grid = scale.float().reshape(-(-140 // rows), -(-160 // columns))
    spread = grid.repeat_interleave(rows, 0)[:140].repeat_interleave(columns, 1)[:, :160]
    assert torch.equal(dequantize(matrix), parts["weight"].float() * spread)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (6,)])
def test_int8(shape: tuple[int, ...], symmetric: bool) -> None:
    codes = torch.randint(-128, 128, (6, 40))
    zeros = torch.randint(-128, 128, shape) * (not symmetric)
    scale = torch.rand(shape) + 0.5
    parts = {
        "weight": codes.to(I8),
        "weight_scale": scale,
        "weight_zero_point": zeros.to(I8),
    }
    qscheme = "per_channel" if shape == (6,) else "per_tensor"
    found = codec(spec("int8", qscheme, symmetric=symmetric))
    decoded = assert_written_back(found, parts)
    expected = (codes - zeros.reshape(-1, 1)).float() * scale.reshape(-1, 1)
    assert torch.equal(dequantize(decoded.matrix), expected)
    as_words = {**parts, "weight_zero_point": zeros.to(I32)}
    assert torch.equal(dequantize(assert_written_back(found, as_words).matrix), expected)
    del parts["weight_zero_point"]
    if symmetric:
        assert_written_back(found, parts)
    else:
        refuse(found, parts, "zero points")


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_random_words_are_written_back_bit_for_bit(data: st.DataObject) -> None:
    """Bits that belong to no code included."""
    num_rows, num_columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 80))
    dtype, pack_method = (
        data.draw(st.sampled_from(["int4", "uint4"])),
        data.draw(st.sampled_from(["reorder", "order"])),
    )
    groups, row_words = -(-num_columns // 32), -(-num_rows // 8)
    parts = {
        "weight": random_words(num_columns, row_words),
        "weight_scale": torch.randn(groups, num_rows),
        "weight_zero_point": random_words(groups, row_words),
    }
    found = codec(spec(dtype, "per_group", 32, symmetric=False), pack_method=pack_method)
    decoded = assert_written_back(found, parts, (num_rows, num_columns))
    assert decoded.matrix.shape == (num_rows, num_columns)
    assert_unused_bits_are_zero(decoded.matrix)


def test_uint4_has_zero_points_unless_the_configuration_says_otherwise() -> None:
    found = codec(spec("uint4", "per_group", 32))
    assert read(found, int4_groups()).matrix.scheme.zero_point is ZeroPoint.INTEGER


def test_activations() -> None:
    fp8 = {"weight": floats8(4, 32), "weight_scale": torch.tensor(1.0)}
    mx = {"weight": bytes_of(4, 16), "weight_scale": e8m0_codes(4, 1)}
    mxfp4_inputs = ActivationScheme(Code.E2M1, 4, GROUP, 32, extra=POWERS)
    expected = [
        (FP8, None, fp8, None),
        (FP8, FP8, fp8, ActivationScheme(Code.E4M3, 8, TENSOR, is_static=True)),
        (FP8, {**FP8, "is_dynamic": True}, fp8, ActivationScheme(Code.E4M3, 8, TENSOR)),
        (
            FP8,
            spec("fp8_e4m3", "per_channel", is_dynamic=True),
            fp8,
            ActivationScheme(Code.E4M3, 8, TOKEN),
        ),
        (MXFP4, {**MXFP4, "is_dynamic": True}, mx, mxfp4_inputs),
        (MXFP4, FP8, mx, ActivationScheme(Code.E4M3, 8, TENSOR, is_static=True)),
        (FP8, {**INT8, "symmetric": False}, fp8, None),
    ]
    for weight_spec, inputs, parts, activations in expected:
        assert format_of(codec(weight_spec, inputs), parts).activations == activations


def test_input_scales_that_are_missing_or_superfluous() -> None:
    parts = {"weight": floats8(4, 32), "weight_scale": torch.tensor(1.0)}
    assert assert_written_back(codec(FP8, FP8), parts).input_scale is None
    found = assert_written_back(codec(FP8, FP8), {**parts, "input_scale": torch.tensor(0.5)})
    assert found.input_scale is not None and found.input_scale.item() == 0.5
    idle = assert_written_back(codec(FP8), {**parts, "input_scale": torch.tensor(0.0)})
    assert idle.input_scale is None
    for value in (0.0, -1.0, INF, NAN):
        refuse(codec(FP8, FP8), {**parts, "input_scale": torch.tensor(value)}, "input_scale")


def int4_groups() -> Parts:
    return {
        "weight": random_words(64, 2),
        "weight_scale": torch.ones(2, 16),
        "weight_zero_point": random_words(2, 2),
    }


VALID: dict[str, tuple[Quark, Any]] = {
    "int4": (codec(UINT4), int4_groups),
    "channels": (
        codec(spec("int4", "per_channel")),
        lambda: {"weight": random_words(16, 5), "weight_scale": torch.ones(16)},
    ),
    "two stages": (
        codec(TWO_STAGES),
        lambda: {
            "weight": random_words(16, 5),
            "weight_scale": torch.tensor(1.0),
            "weight_scale_2": torch.ones(16),
        },
    ),
    "fp8": (
        codec(spec("fp8_e4m3", "per_channel")),
        lambda: {"weight": floats8(4, 32), "weight_scale": torch.ones(4)},
    ),
    "int8": (
        codec(spec("int8", "per_channel")),
        lambda: {"weight": bytes_of(4, 32).view(I8), "weight_scale": torch.ones(4)},
    ),
    "mxfp4": (
        codec(MXFP4),
        lambda: {"weight": bytes_of(4, 32), "weight_scale": e8m0_codes(4, 2)},
    ),
    "nvfp4": (
        codec(NVFP4),
        lambda: {
            "weight": bytes_of(4, 16),
            "weight_scale": floats8(4, 2),
            "weight_scale_2": torch.tensor(1.0),
        },
    ),
}


@pytest.mark.parametrize("kind", VALID)
def test_bad_headers_are_refused(kind: str) -> None:
    family, make = VALID[kind]
    assert_header_faults_are_refused(family, make())
    shape = read(family, make()).matrix.shape
    for other in [(shape[0] + 8, shape[1]), (shape[0], shape[1] + 32), (2, *shape)]:
        refuse(family, make(), "must", shape=other)


def test_a_wrong_group_size_is_refused() -> None:
    refuse(codec({**UINT4, "group_size": 64}), int4_groups(), "weight_scale")
    refuse(codec({**MXFP4, "group_size": 16}), VALID["mxfp4"][1](), "weight_scale")
    refuse(codec(spec("uint4", "per_channel")), int4_groups(), "weight_scale")
    refuse(codec(spec("fp6_e2m3", "per_group", 32)), VALID["mxfp4"][1](), "must")


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("kind", ["int4", "channels", "fp8", "int8"])
def test_scales_must_be_finite(kind: str, value: float) -> None:
    family, make = VALID[kind]
    parts = make()
    bad = {**parts, "weight_scale": with_value(parts["weight_scale"], value)}
    refuse(family, bad, "weight_scale.*must be finite")


@pytest.mark.parametrize("value", [0.0, -1.0, INF, NAN])
def test_scales_of_matrices_must_be_above_zero(value: float) -> None:
    scale = torch.tensor(value)
    refuse(codec(FP8), {"weight": floats8(4, 32), "weight_scale": scale}, "weight_scale")
    refuse(codec(NVFP4), {**VALID["nvfp4"][1](), "weight_scale_2": scale}, "weight_scale_2")


def test_codes_and_scales_that_are_no_numbers_are_refused() -> None:
    for code in (0x7F, 0xFF):
        for kind, part in [("fp8", "weight"), ("nvfp4", "weight_scale")]:
            family, make = VALID[kind]
            parts = make()
            parts[part] = with_value(parts[part].view(U8), code).view(E4M3)
            refuse(family, parts, f"{part} ")
    family, make = VALID["mxfp4"]
    parts = make()
    parts["weight_scale"] = with_value(parts["weight_scale"], 255)
    refuse(family, parts, "weight_scale")


def test_zero_points_that_are_floats_are_refused() -> None:
    parts = {**int4_groups(), "weight_zero_point": torch.zeros(2, 16)}
    refuse(codec(UINT4), parts, "weight_zero_point")


def test_our_own_matrices_can_be_written() -> None:
    family, make = VALID["int4"]
    ours = quantize(torch.randn(16, 64), read(family, make()).matrix.scheme)
    written = format_of(family, make()).encode(Decoded(ours))
    assert torch.equal(weight(family, written), dequantize(ours))


# The configuration


def test_layers_are_looked_up_by_pattern_then_class_then_globally() -> None:
    parts = {"weight": random_words(8, 5), "weight_scale": torch.ones(8)}
    fp8 = {"weight": floats8(4, 32), "weight_scale": torch.tensor(1.0)}
    found = codec(
        FP8,
        FP8,
        layer_quant_config={"*down_proj": layer(spec("int4", "per_channel"))},
        layer_type_quant_config={"Linear": layer(FP8)},
        exclude=["lm_head", "*.mlp.gate", "re:.*self_attn.*"],
    )
    assert read(found, parts).matrix.scheme.bits == 4
    assert format_of(found, fp8).activations is None  # of the class
    down = "model.layers.0.mlp.experts.0.down_proj.weight"
    assert format_of(found, parts, down).activations is None
    expected = {
        "lm_head.weight": False,
        "model.layers.0.mlp.gate.weight": False,
        "model.layers.0.mlp.gate_proj.weight": True,
        "model.layers.0.self_attn.q_proj.weight": False,
        down: True,
    }
    assert {name: found.expects(name) for name in expected} == expected


def test_parts_decide_where_lists_contradict_them() -> None:
    """A list in the names of another checkpoint fits no module."""
    found = codec(None, layer_quant_config={"language_model.x.*": layer(UINT4)}, exclude=["*"])
    assert read(found, int4_groups()).matrix.scheme.bits == 4
    assert not found.expects(NAME)
    assert found.format_of(NAME, {"weight": Header(BF16, (4, 4))}) is None
    refuse(codec(FP8), int4_groups(), "quantization_config")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"global_quant_config": layer(spec("mx", "per_group", 32))}, "dtype.*mx"),
        ({"global_quant_config": layer(spec("int4", "per_head"))}, "qscheme"),
        ({"global_quant_config": layer(spec("int4", "per_group"))}, "group_size"),
        ({"global_quant_config": layer(spec("int4", "per_group", 0))}, "group_size"),
        ({"global_quant_config": layer(3)}, "weight"),
        ({"global_quant_config": 3}, "global_quant_config"),
        ({"layer_quant_config": {"*": layer({})}}, "dtype"),
        ({"export": {"pack_method": "shuffle"}}, "pack_method"),
        ({"exclude": "lm_head"}, "exclude"),
        ({"global_quant_config": layer(spec("fp8_e4m3", "per_block", block_size=[1]))}, "block"),
    ],
    ids=str,
)
def test_configurations_that_are_not_read(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Quark.from_config({"quant_method": "quark", **config})


def test_int8_groups_are_refused() -> None:
    parts = {"weight": bytes_of(64, 8).view(I8), "weight_scale": torch.ones(2, 8)}
    refuse(codec(spec("int8", "per_group", 32)), parts, "qscheme")


def test_names_of_parts() -> None:
    found = codec(UINT4)
    assert found.split("a.up_proj.weight_zero_point") == ("a.up_proj.weight", "weight_zero_point")
    assert found.split("a.up_proj.weight_scale_2") == ("a.up_proj.weight", "weight_scale_2")
    for other in ("a.k_proj.output_scale", "a.attn.q_scale", "a.up_proj.bias"):
        assert found.split(other) is None
