"""fp8: per matrix, row and block, DeepSeek-V4, int8 kin, and files that must not be read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from codec_files import (
    BF16,
    E4M3,
    E8M0,
    FP16,
    FP32,
    I8,
    NAME,
    U8,
    Parts,
    assert_header_faults_are_refused,
    assert_written_back,
    bytes_of,
    e8m0_codes,
    floats8,
    format_of,
    golden,
    raw,
    read,
    refuse,
    weight,
    with_value,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtura.errors import CheckpointError
from mixtura.quant.activations import ActivationExtra, ActivationGroup, ActivationScheme
from mixtura.quant.codecs.contract import Decoded, Header
from mixtura.quant.codecs.fp8 import Fp8
from mixtura.quant.matrix import dequantize
from mixtura.quant.quantize import quantize
from mixtura.quant.scheme import Code

INF, NAN = float("inf"), float("nan")
TOKEN, TENSOR, GROUP = ActivationGroup.TOKEN, ActivationGroup.TENSOR, ActivationGroup.GROUP
POWERS = ActivationExtra.POWER_SCALES


def codec(method: str = "fp8", **config: Any) -> Fp8:
    return Fp8.from_config({"quant_method": method, **config})


PLAIN = codec()
STATIC = codec(activation_scheme="static")
BLOCK = codec(weight_block_size=[128, 128])
SMALL_BLOCK = codec(weight_block_size=[32, 32])


@pytest.mark.parametrize(
    "name", ["fp8_block128_exact", "mxfp8_block32x32_e8m0", "deepseek_v4_fp4_expert"]
)
def test_golden_files(name: str) -> None:
    config, parts, expected, _ = golden(name)
    decoded = assert_written_back(Fp8.from_config(config), parts)
    assert torch.equal(dequantize(decoded.matrix), expected)


def test_bytes_of_the_notes() -> None:
    codes = raw(0x00, 0x01, 0x07, 0x08, 0x30, 0x38, 0x3C, 0x40, 0x70, 0x7E, 0xB8).view(E4M3)
    values = [0, 2**-9, 0.013671875, 2**-6, 0.5, 1, 1.5, 2, 128, 448, -1]
    parts = {"weight": codes, "weight_scale": torch.tensor(2.0)}
    assert weight(PLAIN, parts).tolist() == [[2 * value for value in values]]


def test_experts_of_deepseek_v4() -> None:
    parts = {"weight": raw(*[0x2B] * 16).view(I8), "scale": raw(0x7D).view(E8M0)}
    decoded = assert_written_back(BLOCK, parts)
    assert dequantize(decoded.matrix)[0, :2].tolist() == [-0.375, 0.25]
    activations = format_of(BLOCK, parts).activations
    assert activations == ActivationScheme(Code.E4M3, 8, GROUP, 128, extra=POWERS)


def test_w4afp8_bytes_of_the_notes() -> None:
    parts = {
        "weight": raw(*[0x9F] * 64).view(I8),
        "weight_scale_inv": torch.tensor([[0.5]]),
        "input_scale": torch.tensor(0.25),
    }
    decoded = assert_written_back(codec("w4afp8"), parts)
    assert dequantize(decoded.matrix)[0, :2].tolist() == [-0.5, -3.5]
    assert decoded.input_scale is not None and decoded.input_scale.item() == 0.25
    linear = {"weight": floats8(4, 130), "weight_scale_inv": torch.ones(1, 2)}
    matrix = assert_written_back(codec("w4afp8"), linear).matrix
    assert matrix.scheme.group_shape == (128, 128)


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(1, 200),
    num_columns=st.integers(1, 200),
    block=st.sampled_from([(128, 128), (32, 32), (64, 16), (1, 128)]),
    dtype=st.sampled_from([FP32, BF16, E8M0]),
    name=st.sampled_from(["weight_scale_inv", "scale"]),
)
def test_blocks_with_partial_edges(
    num_rows: int, num_columns: int, block: tuple[int, int], dtype: torch.dtype, name: str
) -> None:
    grid = -(-num_rows // block[0]), -(-num_columns // block[1])
    exponents = torch.randint(100, 150, grid, dtype=U8)
    scale = exponents.view(E8M0) if dtype is E8M0 else (torch.rand(grid) + 0.1).to(dtype)
    parts = {"weight": floats8(num_rows, num_columns), name: scale}
    decoded = assert_written_back(codec(weight_block_size=list(block)), parts)
    spread = scale.float().repeat_interleave(block[0], 0)[:num_rows]
    spread = spread.repeat_interleave(block[1], 1)[:, :num_columns]
    assert torch.equal(dequantize(decoded.matrix), parts["weight"].float() * spread)


@pytest.mark.parametrize("part", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (6,), (6, 1)])
def test_scales_of_matrices_and_rows(shape: tuple[int, ...], dtype: torch.dtype, part: str) -> None:
    parts = {"weight": floats8(6, 40), part: (torch.rand(shape) + 0.5).to(dtype)}
    decoded = assert_written_back(PLAIN, parts)
    expected = parts["weight"].float() * parts[part].float().reshape(-1, 1)
    assert torch.equal(dequantize(decoded.matrix), expected)
    is_tensor = shape in ((), (1,), (1, 1))
    assert decoded.matrix.scheme.group_shape == ((None, None) if is_tensor else (1, None))


def test_scales_beside_blocks() -> None:
    """A file of blocks may hold matrices with one scale, or with one a row."""
    for shape, group in [((), (None, None)), ((300, 1), (1, None)), ((3, 2), (128, 128))]:
        parts = {"weight": floats8(300, 200), "weight_scale": torch.ones(shape)}
        assert assert_written_back(BLOCK, parts).matrix.scheme.group_shape == group


def test_blocks_of_deepseek_v4_without_a_setting() -> None:
    for grid, block in [((1, 1), (128, 128)), ((2, 4), (32, 32))]:
        parts = {"weight": floats8(64, 128), "scale": torch.ones(grid)}
        assert assert_written_back(PLAIN, parts).matrix.scheme.group_shape == block
    refuse(PLAIN, {"weight": floats8(64, 128), "scale": torch.ones(4, 8)}, "scale")
    refuse(PLAIN, {"weight": floats8(64, 128), "weight_scale_inv": torch.ones(2, 4)}, "block")


def test_int8_per_block_and_per_row() -> None:
    codes = torch.randint(-128, 128, (130, 140), dtype=I8)
    parts = {"weight": codes, "weight_scale_inv": torch.rand(2, 2)}
    decoded = assert_written_back(codec("blockwise_int8"), parts)
    spread = parts["weight_scale_inv"].repeat_interleave(128, 0)[:130]
    spread = spread.repeat_interleave(128, 1)[:, :140]
    assert torch.equal(dequantize(decoded.matrix), codes.float() * spread)
    parts = {"weight": codes, "weight_scale": torch.rand(130, 1)}
    decoded = assert_written_back(codec("w8a8_int8"), parts)
    assert torch.equal(dequantize(decoded.matrix), codes.float() * parts["weight_scale"])
    assert format_of(codec("w8a8_int8"), parts).activations == ActivationScheme(Code.INT, 8, TOKEN)
    refuse(PLAIN, parts, "must be ones that are read")


def test_a_stack_of_experts() -> None:
    parts = {
        "weight": floats8(3, 140, 160),
        "weight_scale_inv": torch.rand(3, 2, 2),
    }
    matrix = assert_written_back(BLOCK, parts).matrix
    assert matrix.shape == (3, 140, 160)
    one = read(BLOCK, {part: tensor[2] for part, tensor in parts.items()}).matrix
    assert torch.equal(dequantize(matrix.expert(2)), dequantize(one))
    parts = {
        "weight": floats8(3, 4, 8),
        "weight_scale_inv": torch.rand(3, 1, 1) + 1,
        "activation_scale": torch.rand(3) + 1,
    }
    decoded = assert_written_back(STATIC, parts)
    assert decoded.matrix.scheme.group_shape == (None, None)
    assert decoded.input_scale is not None and decoded.input_scale.shape == (3,)


def test_activations() -> None:
    tensor = {"weight": floats8(4, 32), "weight_scale": torch.ones(1)}
    rows = {"weight": floats8(4, 32), "weight_scale": torch.ones(4, 1)}
    blocks = {"weight": floats8(4, 32), "weight_scale_inv": torch.ones(1, 1)}
    static = ActivationScheme(Code.E4M3, 8, TENSOR, is_static=True)
    assert format_of(STATIC, tensor).activations == static
    assert format_of(PLAIN, tensor).activations == ActivationScheme(Code.E4M3, 8, TOKEN)
    assert format_of(STATIC, rows).activations == ActivationScheme(Code.E4M3, 8, TOKEN)
    assert format_of(BLOCK, blocks).activations == ActivationScheme(Code.E4M3, 8, GROUP, 128)
    assert format_of(SMALL_BLOCK, blocks).activations == ActivationScheme(Code.E4M3, 8, GROUP, 32)


@pytest.mark.parametrize("part", ["input_scale", "activation_scale"])
def test_input_scales_that_are_missing_or_superfluous(part: str) -> None:
    parts = {"weight": floats8(4, 32), "weight_scale": torch.ones(1)}
    assert assert_written_back(STATIC, parts).input_scale is None
    for shape in [(), (1,)]:
        found = assert_written_back(STATIC, {**parts, part: torch.full(shape, 0.5)}).input_scale
        assert found is not None and found.shape == () and found.item() == 0.5
        idle = assert_written_back(PLAIN, {**parts, part: torch.zeros(shape)})
        assert idle.input_scale is None
    for value in (0.0, -1.0, INF, NAN):
        refuse(STATIC, {**parts, part: torch.tensor([value])}, part)
    refuse(STATIC, {**parts, part: torch.ones(2)}, part)
    refuse(STATIC, {**parts, part: torch.ones(1, dtype=torch.int32)}, part)


def fp4() -> Parts:
    return {"weight": bytes_of(4, 32).view(I8), "scale": e8m0_codes(4, 2).view(E8M0)}


VALID: dict[str, tuple[Fp8, Any]] = {
    "tensor": (
        STATIC,
        lambda: {
            "weight": floats8(4, 32),
            "weight_scale": torch.ones(1),
            "input_scale": torch.ones(1),
        },
    ),
    "rows": (PLAIN, lambda: {"weight": floats8(4, 32), "weight_scale": torch.ones(4, 1)}),
    "block": (BLOCK, lambda: {"weight": floats8(140, 32), "weight_scale_inv": torch.ones(2, 1)}),
    "fp4": (BLOCK, fp4),
    "int4": (
        codec("w4afp8"),
        lambda: {"weight": bytes_of(4, 128).view(I8), "weight_scale_inv": torch.ones(4, 2)},
    ),
    "int8": (
        codec("blockwise_int8"),
        lambda: {"weight": bytes_of(4, 130).view(I8), "weight_scale_inv": torch.ones(1, 2)},
    ),
}


@pytest.mark.parametrize("kind", VALID)
def test_bad_headers_are_refused(kind: str) -> None:
    family, make = VALID[kind]
    assert_header_faults_are_refused(family, make(), optional=("input_scale",))


@pytest.mark.parametrize("kind", VALID)
def test_the_model_and_the_file_must_agree(kind: str) -> None:
    family, make = VALID[kind]
    shape = read(family, make()).matrix.shape
    for other in [(shape[0] + 1, shape[1]), (shape[0], shape[1] + 32), (2, *shape)]:
        refuse(family, make(), "must", shape=other)


def test_a_wrong_block_size_is_refused() -> None:
    parts = {"weight": floats8(256, 256), "weight_scale_inv": torch.ones(2, 2)}
    assert_written_back(BLOCK, parts)
    refuse(SMALL_BLOCK, parts, r"weight_scale_inv.*\(8, 8\)")
    refuse(SMALL_BLOCK, {"weight": parts["weight"], "scale": torch.ones(2, 2)}, "scale")
    refuse(
        codec("w4afp8"),
        {"weight": bytes_of(4, 64).view(I8), "weight_scale_inv": torch.ones(4, 4)},
        "weight_scale_inv",
    )


def test_two_scales_are_refused() -> None:
    parts = {**VALID["block"][1](), "weight_scale": torch.ones(1)}
    refuse(BLOCK, parts, "weight_scale besides")


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("kind", ["tensor", "rows", "block", "int4", "int8"])
def test_scales_must_be_finite(kind: str, value: float) -> None:
    family, make = VALID[kind]
    parts = make()
    part = next(part for part in parts if "weight_scale" in part)
    refuse(family, {**parts, part: with_value(parts[part], value)}, f"{part}.*must be finite")


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_scales_of_matrices_must_be_above_zero(value: float) -> None:
    refuse(PLAIN, {"weight": floats8(4, 8), "weight_scale": torch.tensor(value)}, "weight_scale")
    rows = {"weight": floats8(4, 8), "weight_scale": torch.full((4,), value)}
    assert_written_back(PLAIN, rows)


def test_codes_and_scales_that_are_no_numbers_are_refused() -> None:
    for code in (0x7F, 0xFF):
        parts = VALID["rows"][1]()
        parts["weight"] = with_value(parts["weight"].view(U8), code).view(E4M3)
        refuse(PLAIN, parts, r"weight \(at \(3, 31\)\).*code 0x")
    parts = fp4()
    parts["scale"] = with_value(parts["scale"].view(U8), 255).view(E8M0)
    refuse(BLOCK, parts, "scale")
    parts["scale"] = with_value(parts["scale"].view(U8), 0).view(E8M0)
    assert_written_back(BLOCK, parts)
    block = {"weight": floats8(4, 8), "scale": raw(255).view(E8M0)}
    refuse(BLOCK, block, "scale")


def test_e5m2_has_infinities() -> None:
    codes = raw(0x3C, 0xC0, 0x7B).view(torch.float8_e5m2)
    parts = {"weight": codes, "weight_scale": torch.ones(1)}
    assert dequantize(assert_written_back(PLAIN, parts).matrix).tolist() == [[1, -2, 57344]]
    for code in (0x7C, 0x7F, 0xFC):
        bad = with_value(codes.view(U8), code).view(torch.float8_e5m2)
        refuse(PLAIN, {**parts, "weight": bad}, "weight")


def test_other_float8_dtypes_are_refused() -> None:
    codes = bytes_of(4, 8).view(torch.float8_e4m3fnuz)
    refuse(PLAIN, {"weight": codes, "weight_scale": torch.ones(1)}, "e4m3fnuz")


def test_weights_without_scales_are_refused() -> None:
    refuse(PLAIN, {"weight": floats8(4, 8)}, "weight float8_e4m3fn")
    refuse(PLAIN, {"weight_scale_inv": torch.ones(1, 1)}, "weight_scale_inv float32")


def test_our_own_matrices_can_be_written() -> None:
    parts = VALID["block"][1]()
    scheme = read(BLOCK, parts).matrix.scheme
    ours = quantize(torch.randn(140, 32), scheme)
    written = format_of(BLOCK, parts).encode(Decoded(ours))
    assert torch.equal(weight(BLOCK, written), dequantize(ours))


# The configuration


def test_dense_matrices_stay_as_they_are() -> None:
    assert PLAIN.format_of(NAME, {"weight": Header(BF16, (4, 4))}) is None


def test_ignored_modules_are_not_expected() -> None:
    for key in ("modules_to_not_convert", "ignored_layers"):
        found = codec(**{key: ["lm_head", "model.layers.0.mlp.gate", "layers.1.self_attn"]})
        expected = {
            "lm_head.weight": False,
            "model.layers.0.mlp.gate.weight": False,
            "model.layers.0.mlp.gate_proj.weight": True,
            "model.layers.1.self_attn.q_proj.weight": False,
            "model.layers.11.self_attn.q_proj.weight": True,
        }
        assert {name: found.expects(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"activation_scheme": "sometimes"}, "activation_scheme"),
        ({"weight_block_size": [128]}, "weight_block_size"),
        ({"weight_block_size": [128, 0]}, "weight_block_size"),
        ({"weight_block_size": [128, 128.0]}, "weight_block_size"),
        ({"weight_block_size": 128}, "weight_block_size"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
        ({"quant_method": "fp9"}, "quant_method"),
    ],
    ids=str,
)
def test_configurations_that_are_not_read(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Fp8.from_config(config)


def test_names_of_parts() -> None:
    stem = "model.layers.0.mlp.experts"
    assert PLAIN.split("layers.0.ffn.experts.1.w1.scale") == (
        "layers.0.ffn.experts.1.w1.weight",
        "scale",
    )
    assert PLAIN.split(f"{stem}.gate_up_proj") == (f"{stem}.gate_up_proj", "weight")
    assert PLAIN.split(f"{stem}.gate_up_proj_scale_inv") == (
        f"{stem}.gate_up_proj",
        "weight_scale_inv",
    )
    assert PLAIN.split("a.up_proj.weight_scale_inv") == ("a.up_proj.weight", "weight_scale_inv")
    for other in ("a.k_proj.k_scale", "a.attn.kv_scale", "a.up_proj.input_scale_ub", "a.bias"):
        assert PLAIN.split(other) is None
