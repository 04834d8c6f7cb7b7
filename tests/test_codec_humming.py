"""Humming's own files, against a plain loop and against files that must not be read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from codec_files import code_at, random_words
from torch import Tensor

from mixtura.errors import CheckpointError
from mixtura.quant import decode
from mixtura.quant.codecs import ActivationGroup, ActivationScheme, Decoded, Header, codec_for
from mixtura.quant.codecs.humming import HummingFormat
from mixtura.quant.matrix import dequantize
from mixtura.quant.scheme import Code

INT32 = torch.int32
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]


def config(**changes: Any) -> dict[str, Any]:
    base = {"quant_method": "humming", "b_dtype": "uint4", "weight_scale_group_size": 16}
    return {**base, "has_zero_point": False, **changes}


def read(settings: dict[str, Any], parts: dict[str, Tensor]) -> tuple[HummingFormat, Decoded]:
    headers = {part: Header.of(tensor) for part, tensor in parts.items()}
    format = codec_for(settings).format_of("layer.weight", headers)
    assert isinstance(format, HummingFormat)
    return format, format.read("layer.weight", parts)


def check_round_trip(settings: dict[str, Any], parts: dict[str, Tensor]) -> Tensor:
    format, decoded = read(settings, parts)
    written = format.encode(decoded)
    assert written.keys() == parts.keys()
    for part, value in parts.items():
        assert Header.of(written[part]) == Header.of(value), part
        assert torch.equal(written[part].view(torch.uint8), value.view(torch.uint8)), part
    assert torch.equal(decode(settings, parts), dequantize(decoded.matrix))
    return dequantize(decoded.matrix)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("has_zero_point", [True, False])
def test_integers_against_a_plain_loop(bits: int, has_zero_point: bool) -> None:
    settings = config(b_dtype=f"uint{bits}", has_zero_point=has_zero_point)
    parts = {"weight": random_words(32, bits), "weight_scale": torch.randn(32, 2).bfloat16()}
    if has_zero_point:
        parts["zero_point"] = random_words(bits, 2)
    expected = torch.empty(32, 32)
    for n in range(32):
        for k in range(32):
            zero = 2 ** (bits - 1)
            if has_zero_point:
                zero = code_at(parts["zero_point"][:, k // 16].tolist(), n, bits)
            code = code_at(parts["weight"][n].tolist(), k, bits)
            expected[n, k] = (code - zero) * parts["weight_scale"][n, k // 16].float()
    assert torch.equal(check_round_trip(settings, parts), expected)
    if not has_zero_point:
        signed = decode({**settings, "b_dtype": f"int{bits}"}, parts)
        assert torch.equal(signed, expected)


@pytest.mark.parametrize("name", ["float4_e2m1", "float4e2m1"])
def test_small_floats_with_two_scales(name: str) -> None:
    settings = config(b_dtype=name, weight_scale_2_type="tensor")
    parts = {
        "weight": torch.tensor([[0x76543210, 0xFEDCBA98 - 2**32, 0, 0]], dtype=INT32),
        "weight_scale": torch.tensor([[2.0, 1.0]]).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor([0.25]),
    }
    expected = [0.5 * level for level in E2M1] + [0.0] * 16
    assert check_round_trip(settings, parts).flatten().tolist() == expected


@pytest.mark.parametrize(
    ("changes", "scale_shape", "index"),
    [
        ({"weight_scale_group_size": 0}, (4, 1), lambda n, k: (n, 0)),
        ({"weight_scale_group_size_n": 2}, (2, 2), lambda n, k: (n // 2, k // 16)),
        ({"weight_scale_type": "tensor"}, (1,), lambda n, k: (0,)),
        ({"weight_scale_type": "channel"}, (4, 1), lambda n, k: (n, 0)),
    ],
    ids=["channel", "block", "tensor", "channel by name"],
)
def test_what_shares_a_scale(changes: dict[str, Any], scale_shape: Any, index: Any) -> None:
    settings = config(b_dtype="uint8", weight_scale_2_type="channel", **changes)
    parts = {
        "weight": random_words(4, 8),
        "weight_scale": torch.rand(scale_shape) + 0.5,
        "weight_scale_2": torch.randn(4),
    }
    codes = parts["weight"].view(torch.uint8).float() - 128
    weight = check_round_trip(settings, parts)
    for n in range(4):
        for k in range(32):
            scale = parts["weight_scale"][index(n, k)]
            assert weight[n, k] == codes[n, k] * scale * parts["weight_scale_2"][n]


FAULTS: dict[str, tuple[dict[str, Any], dict[str, Tensor | None], str]] = {
    "missing scale": ({}, {"weight_scale": None}, "part weight_scale"),
    "dtype of codes": ({}, {"weight": torch.zeros(32, 4)}, "weight .*int32"),
    "groups": ({}, {"weight_scale": torch.ones(32, 4)}, r"weight_scale .*\(32, 2\)"),
    "bits": ({"b_dtype": "uint8"}, {}, r"weight_scale .*\(32, 1\)"),
    "zero point": ({}, {"zero_point": random_words(4, 2)}, "got zero_point besides"),
    "missing zero point": ({"has_zero_point": True}, {}, "part zero_point"),
    "second scale": ({}, {"weight_scale_2": torch.ones(1)}, "got weight_scale_2 besides"),
    "NaN scale": ({}, {"weight_scale": torch.full((32, 2), torch.nan)}, "weight_scale .*nan"),
    "e8m0 255": (
        {},
        {"weight_scale": torch.full((32, 2), 255, dtype=torch.uint8).view(torch.float8_e8m0fnu)},
        "weight_scale .*nan",
    ),
    "second scale of 0": (
        {"weight_scale_2_type": "tensor"},
        {"weight_scale_2": torch.zeros(1)},
        r"weight_scale_2 \(0.0\) must be above 0",
    ),
    "infinite second scale": (
        {"weight_scale_2_type": "channel"},
        {"weight_scale_2": torch.full((32,), torch.inf)},
        "weight_scale_2 .*inf",
    ),
    "NaN code": (
        {"b_dtype": "float8_e4m3"},
        {
            "weight": torch.full((32, 4), 0x38FF3838, dtype=INT32),
            "weight_scale": torch.ones(32, 1),
        },
        r"weight \(at \(0, 2\)\).*0xff of e4m3",
    ),
    "scale of the tensor": (
        {"weight_scale_type": "tensor"},
        {"weight_scale": -torch.ones(1)},
        r"weight_scale \(-1.0\)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_parts_are_refused(fault: str) -> None:
    settings, changes, message = FAULTS[fault]
    parts = {"weight": random_words(32, 4), "weight_scale": torch.ones(32, 2), **changes}
    with pytest.raises(CheckpointError, match=message) as caught:
        decode(config(**settings), {k: v for k, v in parts.items() if v is not None})
    assert "projection.weight" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b_dtype": "uint9"}, "b_dtype"),
        ({"b_dtype": None}, "b_dtype"),
        ({"b_dtype": "float4_e3m0"}, "b_dtype .*e2m1"),
        ({"b_dtype": "float8_e2m1"}, "b_dtype"),
        ({"is_fp_zero_point": True}, "is_fp_zero_point"),
        ({"hadamard_block_size": 32}, "hadamard_block_size"),
        ({"has_zero_point": True, "b_dtype": "float4_e2m1"}, "has_zero_point"),
        ({"weight_scale_group_size": -1}, "weight_scale_group_size"),
        ({"weight_scale_group_size": 0, "weight_scale_type": "group"}, "weight_scale_group_size"),
        ({"weight_scale_type": "row"}, "weight_scale_type"),
        ({"weight_scale_2_type": "row"}, "weight_scale_2_type"),
        ({"a_dtype": "float8e4m3", "quant_mode": "static_tensor"}, "quant_mode"),
    ],
    ids=str,
)
def test_configurations_that_are_not_read(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        codec_for(config(**changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"a_dtype": "bfloat16"}, None),
        (
            {"a_dtype": "float8e4m3", "input_scale_group_size": 128},
            ActivationScheme(Code.E4M3, 8, ActivationGroup.GROUP, 128),
        ),
        ({"a_dtype": "int8"}, ActivationScheme(Code.INT, 8, ActivationGroup.TOKEN)),
    ],
    ids=str,
)
def test_activations(changes: dict[str, Any], expected: ActivationScheme | None) -> None:
    parts = {"weight": random_words(32, 4), "weight_scale": torch.ones(32, 2)}
    format, _ = read(config(**changes), parts)
    assert format.activations == expected


def test_unquantized_modules_stay_as_they_are() -> None:
    codec = codec_for(config())
    assert codec.format_of("gate.weight", {"weight": Header(torch.bfloat16, (4, 8))}) is None
    assert codec.expects("layers.0.up_proj.weight")
