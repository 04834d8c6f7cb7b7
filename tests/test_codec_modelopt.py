"""ModelOpt: every algorithm, its configuration, and files that must not be read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from codec_files import (
    BF16,
    E4M3,
    E8M0,
    FP32,
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

from mixtura.errors import CheckpointError, ConfigError
from mixtura.quant.activations import ActivationExtra, ActivationGroup, ActivationScheme
from mixtura.quant.codecs.contract import Decoded, Header
from mixtura.quant.codecs.modelopt import ModelOpt
from mixtura.quant.matrix import dequantize
from mixtura.quant.quantize import quantize
from mixtura.quant.scheme import Code, GlobalScale

INF, NAN = float("inf"), float("nan")
TOKEN, TENSOR, GROUP = ActivationGroup.TOKEN, ActivationGroup.TENSOR, ActivationGroup.GROUP
POWERS = ActivationExtra.POWER_SCALES
NVFP4_INPUTS = ActivationScheme(Code.E2M1, 4, GROUP, 16, is_static=True)
FP8_INPUTS = ActivationScheme(Code.E4M3, 8, TENSOR, is_static=True)
MXFP8_INPUTS = ActivationScheme(Code.E4M3, 8, GROUP, 32, extra=POWERS)


def codec(algorithm: str, **config: Any) -> ModelOpt:
    return ModelOpt.from_config({"quant_method": "modelopt", "quant_algo": algorithm, **config})


def nvfp4(num_rows: int = 3, num_columns: int = 32, **more: Any) -> Parts:
    return {
        "weight": bytes_of(num_rows, num_columns // 2),
        "weight_scale": floats8(num_rows, num_columns // 16),
        "weight_scale_2": torch.tensor(2.0**-10),
        **more,
    }


def fp8(scale: Any = 0.5, **more: Any) -> Parts:
    return {"weight": floats8(4, 32), "weight_scale": torch.tensor(scale), **more}


@pytest.mark.parametrize("name", ["modelopt_fp8", "modelopt_fp8_pb_wo", "modelopt_mxfp4"])
def test_golden_files(name: str) -> None:
    config, parts, expected, _ = golden(name)
    decoded = assert_written_back(ModelOpt.from_config(config), parts)
    assert torch.equal(dequantize(decoded.matrix), expected)


def test_nvfp4_bytes_of_the_notes() -> None:
    parts = {
        "weight": raw(*[0x72] * 8),
        "weight_scale": raw(0x38).view(E4M3),
        "weight_scale_2": torch.tensor(2.0**-10),
        "input_scale": torch.tensor(0.25),
    }
    decoded = assert_written_back(codec("NVFP4"), parts)
    assert dequantize(decoded.matrix)[0, :2].tolist() == [2**-10, 6 * 2**-10]
    assert decoded.input_scale is not None and decoded.input_scale.item() == 0.25
    assert decoded.matrix.scheme.global_scale is GlobalScale.MATRIX


def test_mxfp4_bytes_of_the_notes() -> None:
    parts = {"weight": raw(*[0x2B] * 16), "weight_scale": raw(0x7D)}
    assert weight(codec("MXFP4"), parts)[0, :2].tolist() == [-0.375, 0.25]


def test_nvfp4_with_unlike_global_scales() -> None:
    """gate and up keep their own: nothing is merged."""
    gate, up = nvfp4(), nvfp4(weight_scale_2=torch.tensor(2.0**-10 * 1.2547))
    for parts in (gate, up):
        matrix = assert_written_back(codec("NVFP4"), parts).matrix
        assert matrix.global_scale is not None
        assert torch.equal(matrix.global_scale, parts["weight_scale_2"])
    one = assert_written_back(codec("NVFP4"), nvfp4(weight_scale_2=torch.tensor(1.0)))
    assert one.matrix.global_scale is not None and one.matrix.global_scale.item() == 1  # legal


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_scalars_may_have_dims(shape: tuple[int, ...]) -> None:
    scalars = {"weight_scale_2": torch.full(shape, 0.5), "input_scale": torch.full(shape, 2.0)}
    decoded = assert_written_back(codec("NVFP4"), nvfp4(**scalars))
    assert decoded.input_scale is not None and decoded.input_scale.shape == ()


@pytest.mark.parametrize(
    ("algorithm", "scale_shape", "group"),
    [
        ("FP8", (), (None, None)),
        ("FP8", (1,), (None, None)),
        ("FP8_PER_CHANNEL_PER_TOKEN", (140,), (1, None)),
        ("FP8_PER_CHANNEL_PER_TOKEN", (140, 1), (1, None)),
        ("FP8_PB_WO", (2, 1, 2, 1), (128, 128)),
        ("FP8_PB_WO", (2, 2), (128, 128)),
    ],
)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_float8(
    algorithm: str,
    scale_shape: tuple[int, ...],
    group: tuple[int | None, int | None],
    dtype: torch.dtype,
) -> None:
    scale = (torch.rand(scale_shape) + 0.5).to(dtype)
    parts = {"weight": floats8(140, 160), "weight_scale": scale}
    matrix = assert_written_back(codec(algorithm), parts).matrix
    assert matrix.scheme.group_shape == group
    rows, columns = matrix.scheme.group_size(matrix.shape)
    grid = scale.float().reshape(-(-140 // rows), -(-160 // columns))
    spread = grid.repeat_interleave(rows, 0)[:140].repeat_interleave(columns, 1)[:, :160]
    assert torch.equal(dequantize(matrix), parts["weight"].float() * spread)


@pytest.mark.parametrize("dtype", [U8, E8M0])
@pytest.mark.parametrize("algorithm", ["MXFP8", "MXFP4", "W4A8_MXFP4_FP8"])
def test_microscaled_floats(algorithm: str, dtype: torch.dtype) -> None:
    codes = floats8(5, 64) if algorithm == "MXFP8" else bytes_of(5, 32)
    parts = {"weight": codes, "weight_scale": e8m0_codes(5, 2).view(dtype)}
    matrix = assert_written_back(codec(algorithm), parts).matrix
    assert matrix.scheme.code is (Code.E4M3 if algorithm == "MXFP8" else Code.E2M1)
    assert matrix.shape == (5, 64)


@pytest.mark.parametrize("tail", [(), (1,), (1, 1)])
def test_a_stack_of_experts(tail: tuple[int, ...]) -> None:
    parts = {
        "weight": bytes_of(3, 5, 16),
        "weight_scale": floats8(3, 5, 2),
        "weight_scale_2": torch.rand(3, *tail) + 0.5,
        "input_scale": torch.rand(3, *tail) + 0.5,
    }
    decoded = assert_written_back(codec("NVFP4"), parts)
    assert decoded.matrix.shape == (3, 5, 32)
    assert decoded.input_scale is not None and decoded.input_scale.shape == (3,)
    one = read(codec("NVFP4"), {part: tensor[2] for part, tensor in parts.items()}).matrix
    assert torch.equal(dequantize(decoded.matrix.expert(2)), dequantize(one))
    refuse(codec("NVFP4"), {**parts, "weight_scale_2": torch.tensor(1.0)}, "weight_scale_2")
    refuse(codec("NVFP4"), {**parts, "weight_scale_2": torch.ones(2)}, "weight_scale_2")


def test_activations() -> None:
    mx = {"weight": bytes_of(5, 32), "weight_scale": e8m0_codes(5, 2)}
    mx8 = {"weight": floats8(5, 64), "weight_scale": e8m0_codes(5, 2)}
    rows = {"weight": floats8(4, 32), "weight_scale": torch.ones(4)}
    blocks = {"weight": floats8(4, 32), "weight_scale": torch.ones(1, 1, 1, 1)}
    expected = [
        ("NVFP4", nvfp4(), NVFP4_INPUTS),
        ("nvfp4", nvfp4(), NVFP4_INPUTS),
        ("W4A16_NVFP4", nvfp4(), None),
        ("FP8", fp8(), FP8_INPUTS),
        ("FP8_PER_CHANNEL_PER_TOKEN", rows, ActivationScheme(Code.E4M3, 8, TOKEN)),
        ("FP8_PB_WO", blocks, None),
        ("MXFP8", mx8, MXFP8_INPUTS),
        ("MXFP4", mx, None),
        ("W4A8_MXFP4_FP8", mx, FP8_INPUTS),
    ]
    for algorithm, parts, activations in expected:
        assert format_of(codec(algorithm), parts).activations == activations, algorithm


def test_config_groups_say_how_inputs_are_quantized() -> None:
    weights = {"num_bits": 4, "type": "float", "group_size": 16}
    inputs = {**weights, "dynamic": False}

    def found(inputs: dict[str, Any] | None) -> ActivationScheme | None:
        groups = {"group_0": {"weights": weights, "input_activations": inputs}}
        return format_of(codec("NVFP4", config_groups=groups), nvfp4()).activations

    assert found(inputs) == NVFP4_INPUTS
    assert found(None) is None
    dynamic = found({**inputs, "dynamic": True})
    assert dynamic is not None and not dynamic.is_static


def test_input_scales_that_are_missing_or_superfluous() -> None:
    for algorithm, parts in [("NVFP4", nvfp4()), ("FP8", fp8())]:
        assert assert_written_back(codec(algorithm), parts).input_scale is None
        found = assert_written_back(codec(algorithm), {**parts, "input_scale": torch.tensor(0.5)})
        assert found.input_scale is not None and found.input_scale.item() == 0.5
        for value in (0.0, -1.0, INF, NAN):
            bad = {**parts, "input_scale": torch.tensor(value)}
            refuse(codec(algorithm), bad, "input_scale")
    # Weight-only, with what was never set.
    idle = assert_written_back(codec("W4A16_NVFP4"), nvfp4(input_scale=torch.tensor(0.0)))
    assert idle.input_scale is None


VALID: dict[str, Any] = {
    "NVFP4": lambda: nvfp4(input_scale=torch.tensor(1.0)),
    "FP8": lambda: fp8(input_scale=torch.tensor(1.0)),
    "FP8_PER_CHANNEL_PER_TOKEN": lambda: fp8([0.5] * 4),
    "FP8_PB_WO": lambda: {
        "weight": floats8(130, 32),
        "weight_scale": torch.ones(2, 1, 1, 1),
    },
    "MXFP8": lambda: {"weight": floats8(5, 64), "weight_scale": e8m0_codes(5, 2)},
    "MXFP4": lambda: {"weight": bytes_of(5, 32), "weight_scale": e8m0_codes(5, 2)},
}


@pytest.mark.parametrize("algorithm", VALID)
def test_bad_headers_are_refused(algorithm: str) -> None:
    make = VALID[algorithm]
    assert_header_faults_are_refused(codec(algorithm), make(), optional=("input_scale",))
    shape = read(codec(algorithm), make()).matrix.shape
    for other in [(shape[0] + 1, shape[1]), (shape[0], shape[1] + 32), (2, *shape)]:
        refuse(codec(algorithm), make(), "must", shape=other)


def test_a_wrong_group_size_is_refused() -> None:
    refuse(codec("NVFP4", group_size=32), nvfp4(), "weight_scale")
    assert_written_back(codec("NVFP4", group_size=16), nvfp4())
    wide = {**nvfp4(3, 64), "weight_scale": floats8(3, 2)}
    assert_written_back(codec("NVFP4", group_size=32), wide)


def test_a_factor_for_inputs_is_refused() -> None:
    refuse(codec("NVFP4"), nvfp4(pre_quant_scale=torch.ones(32)), "a factor for inputs")


@pytest.mark.parametrize("value", [0.0, -1.0, INF, NAN])
def test_scales_of_matrices_must_be_above_zero(value: float) -> None:
    refuse(codec("FP8"), fp8(value), "weight_scale")
    refuse(codec("NVFP4"), nvfp4(weight_scale_2=torch.tensor(value)), "weight_scale_2")


def test_codes_and_scales_that_are_no_numbers_are_refused() -> None:
    for algorithm in ("FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO"):
        parts = VALID[algorithm]()
        for value in (INF, -INF, NAN):
            bad = {**parts, "weight_scale": with_value(parts["weight_scale"], value)}
            refuse(codec(algorithm), bad, "weight_scale.*must be finite")
        assert_written_back(
            codec(algorithm), {**parts, "weight_scale": with_value(parts["weight_scale"], 0)}
        )
    for algorithm in ("MXFP8", "MXFP4"):
        parts = VALID[algorithm]()
        bad = {**parts, "weight_scale": with_value(parts["weight_scale"], 255)}
        refuse(codec(algorithm), bad, "weight_scale")
    for code in (0x7F, 0xFF):
        for algorithm, part in [("FP8", "weight"), ("MXFP8", "weight"), ("NVFP4", "weight_scale")]:
            parts = VALID[algorithm]()
            parts[part] = with_value(parts[part].view(U8), code).view(E4M3)
            refuse(codec(algorithm), parts, f"{part} ")


def test_our_own_matrices_can_be_written() -> None:
    format = format_of(codec("NVFP4"), nvfp4())
    scheme = read(codec("NVFP4"), nvfp4()).matrix.scheme
    ours = quantize(torch.randn(3, 32), scheme)
    written = format.encode(Decoded(ours))
    assert torch.equal(weight(codec("NVFP4"), written), dequantize(ours))
    with pytest.raises(ConfigError, match="must be of scheme"):
        format.encode(read(codec("MXFP4"), VALID["MXFP4"]()))


# The configuration


def test_mixed_precision() -> None:
    layers = {
        "model.layers.0.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16},
        "model.layers.0.self_attn.q_proj": {"quant_algo": "FP8"},
    }
    found = codec("MIXED_PRECISION", quantized_layers=layers)
    assert format_of(found, nvfp4()).activations == NVFP4_INPUTS
    name = "model.layers.0.self_attn.q_proj.weight"
    assert format_of(found, fp8(), name).activations == FP8_INPUTS
    assert found.expects(name) and found.expects(NAME)
    other = "model.layers.1.self_attn.q_proj.weight"
    assert not found.expects(other)
    # Parts decide where the list forgot a layer.
    assert format_of(found, fp8(), other).activations is None
    assert found.format_of(other, {"weight": Header(BF16, (4, 4))}) is None


def test_files_of_their_own() -> None:
    """`hf_quant_config.json`."""
    document = {
        "producer": {"name": "modelopt", "version": "0.29"},
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": "FP8",
            "group_size": 16,
            "exclude_modules": ["*gate", "lm_head"],
        },
    }
    found = ModelOpt.from_config(document)
    assert format_of(found, nvfp4()).activations == NVFP4_INPUTS
    assert not found.expects("model.layers.0.mlp.gate.weight")
    assert found.expects("model.layers.0.mlp.gate_proj.weight")


def test_wildcards() -> None:
    ignore = ["lm_head", "model.layers.*.mlp.gate", "model.layers.*.self_attn*"]
    found = codec("NVFP4", ignore=[*ignore, "model.layers.*.shared_experts"])
    expected = {
        "lm_head.weight": False,
        "model.layers.3.mlp.gate.weight": False,
        "model.layers.3.mlp.gate_proj.weight": True,
        "model.layers.3.self_attn.q_proj.weight": False,
        "model.layers.3.shared_experts.up_proj.weight": False,  # in what is listed
        NAME: True,
    }
    assert {name: found.expects(name) for name in expected} == expected
    assert not ModelOpt.from_config(
        {"quant_method": "mxfp8", "ignored_layers": ["lm_head"]}
    ).expects("lm_head.weight")


def test_algorithms_that_are_not_named() -> None:
    def groups(**weights: Any) -> dict[str, Any]:
        return {
            "group_0": {
                "weights": {"type": "float", **weights},
                "input_activations": {"dynamic": False},
            }
        }

    for config, parts, activations in [
        ({"quant_method": "mxfp8"}, VALID["MXFP8"](), MXFP8_INPUTS),
        ({"quant_method": "modelopt_fp4"}, nvfp4(), NVFP4_INPUTS),
        ({"config_groups": groups(num_bits=4, group_size=16)}, nvfp4(), NVFP4_INPUTS),
        ({"config_groups": groups(num_bits=8)}, fp8(), FP8_INPUTS),
    ]:
        assert format_of(ModelOpt.from_config(config), parts).activations == activations
    only_cache = ModelOpt.from_config({"quant_algo": None, "kv_cache_quant_algo": "FP8"})
    assert only_cache.format_of(NAME, {"weight": Header(BF16, (4, 4))}) is None
    assert not only_cache.expects(NAME)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_algo": "INT8_SQ"}, "INT8_SQ"),
        ({"quant_algo": "W4A16_AWQ"}, "W4A16_AWQ"),
        ({"quant_algo": "W4A8_NVFP4_FP8"}, "W4A8_NVFP4_FP8"),
        ({}, "quant_algo"),
        ({"quant_algo": "NVFP4", "group_size": "16"}, "group_size"),
        ({"quant_algo": "NVFP4", "ignore": "lm_head"}, "ignore"),
        ({"quant_algo": "NVFP4", "config_groups": [1]}, "config_groups"),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": "FP8"}}, "a "),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {}}}, "quant_algo"),
    ],
    ids=str,
)
def test_configurations_that_are_not_read(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelOpt.from_config(config)


def test_names_of_parts() -> None:
    found = codec("NVFP4")
    stem = "model.layers.0.mlp.experts"
    assert found.split(f"{stem}.3.up_proj.weight_scale_2") == (
        f"{stem}.3.up_proj.weight",
        "weight_scale_2",
    )
    assert found.split(f"{stem}.gate_up_proj") == (f"{stem}.gate_up_proj", "weight")
    for part in ("weight_scale", "weight_scale_2", "input_scale"):
        assert found.split(f"{stem}.down_proj_{part}") == (f"{stem}.down_proj", part)
    for other in ("a.k_proj.k_scale", "a.v_proj.v_scale", "a.bias", "a.output_scale"):
        assert found.split(other) is None
