"""bitsandbytes files, against a plain loop and against files that must not be read."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixtura.errors import CheckpointError, ConfigError
from mixtura.quant import decode
from mixtura.quant.codecs import ActivationGroup, Decoded, Header, codec_for
from mixtura.quant.codecs.bitsandbytes import Int8Format
from mixtura.quant.matrix import dequantize
from mixtura.quant.quantize import quantize
from mixtura.quant.scheme import Code, QuantScheme, ZeroPoint

CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
CONFIG_8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
STATE = "quant_state.bitsandbytes__nf4"


def state_blob(shape: Any, **changes: Any) -> Tensor:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": shape, **changes}
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def random_parts(*shape: int, block_size: int = 64) -> dict[str, Tensor]:
    num_codes = math.prod(shape)
    return {
        "weight": torch.randint(0, 256, (num_codes // 2, 1), dtype=torch.uint8),
        "absmax": torch.rand(-(-num_codes // block_size)) + 0.1,
        "quant_map": torch.randn(16),
    }


def nested_parts(*shape: int, offset: float = 0.25) -> dict[str, Tensor]:
    parts = random_parts(*shape)
    num_blocks = len(parts["absmax"])
    return {
        **parts,
        "absmax": torch.randint(0, 256, (num_blocks,), dtype=torch.uint8),
        "nested_absmax": torch.rand(-(-num_blocks // 256)),
        "nested_quant_map": torch.randn(256),
        STATE: state_blob(list(shape), nested_blocksize=256, nested_offset=offset),
    }


def plain_loop(parts: dict[str, Tensor], shape: tuple[int, ...], block_size: int = 64) -> Tensor:
    flat = torch.empty(math.prod(shape))
    for i in range(len(flat)):
        byte = int(parts["weight"][i // 2])
        code = byte & 15 if i % 2 else byte >> 4
        block = i // block_size
        absmax = parts["absmax"][block]
        if "nested_absmax" in parts:
            scale = parts["nested_absmax"][block // 256]
            absmax = parts["nested_quant_map"][int(absmax)] * scale + 0.25
        flat[i] = parts["quant_map"][code] * absmax
    return flat.view(shape)


def check_round_trip(parts: dict[str, Tensor], shape: tuple[int, ...] | None) -> Decoded:
    headers = {part: Header.of(tensor) for part, tensor in parts.items()}
    format = codec_for(CONFIG).format_of("layer.weight", headers)
    assert format is not None
    decoded = format.read("layer.weight", parts, shape)
    written = format.encode(decoded)
    assert written.keys() == parts.keys()
    for part, value in parts.items():
        assert Header.of(written[part]) == Header.of(value), part
        assert torch.equal(written[part], value), part
    return decoded


@pytest.mark.parametrize("shape", [(4, 64), (2, 128), (3, 96), (5, 10), (2, 3, 64), (6, 1), (3, 2)])
@pytest.mark.parametrize("is_nested", [True, False])
def test_random_bits_against_a_plain_loop(shape: tuple[int, ...], is_nested: bool) -> None:
    parts = nested_parts(*shape) if is_nested else random_parts(*shape)
    weight = decode(CONFIG, parts, shape=shape)
    assert torch.equal(weight, plain_loop(parts, shape))
    assert torch.equal(dequantize(check_round_trip(parts, shape).matrix), weight)


@pytest.mark.parametrize("block_size", [32, 128, 1024])
def test_other_block_sizes_are_seen_in_the_headers(block_size: int) -> None:
    parts = random_parts(24, 96, block_size=block_size)
    weight = decode(CONFIG, parts, shape=(24, 96))
    assert torch.equal(weight, plain_loop(parts, (24, 96), block_size))


def test_more_than_one_nested_block() -> None:
    parts = nested_parts(300, 64)
    assert len(parts["nested_absmax"]) == 2
    assert torch.equal(decode(CONFIG, parts), plain_loop(parts, (300, 64)))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    half=st.integers(1, 40),
    num_columns=st.integers(1, 130),
    is_nested=st.booleans(),
)
def test_files_are_written_back_bit_for_bit(
    seed: int, half: int, num_columns: int, is_nested: bool
) -> None:
    torch.manual_seed(seed)
    make = nested_parts if is_nested else random_parts
    check_round_trip(make(2 * half, num_columns), (2 * half, num_columns))


def test_whole_rows_of_blocks_have_groups_of_a_block() -> None:
    decoded = check_round_trip(random_parts(4, 128), (4, 128))
    assert decoded.matrix.scheme.group_shape == (1, 64)
    assert decoded.matrix.scheme.code is Code.CODEBOOK
    assert not decoded.kept


def test_names_with_and_without_the_prefix() -> None:
    parts = nested_parts(4, 64)
    weight = decode(CONFIG, parts)
    named = {part if part == "weight" else f"weight.{part}": t for part, t in parts.items()}
    assert torch.equal(decode(CONFIG, named), weight)
    codec = codec_for(CONFIG)
    assert codec.split(f"l.up.weight.{STATE}") == ("l.up.weight", STATE)
    assert codec.split("l.up.weight.nested_absmax") == ("l.up.weight", "nested_absmax")
    assert codec.split("l.up.weight") == ("l.up.weight", "weight")
    with pytest.raises(CheckpointError, match="one part"):
        decode(CONFIG, {**parts, "weight.absmax": parts["absmax"]})


def test_names_of_stacks_of_experts() -> None:
    codec = codec_for(CONFIG)
    stack = "layers.0.mlp.experts.down_proj"
    assert codec.split(stack) == (stack, "weight")
    for part in ("absmax", "nested_absmax", STATE):
        assert codec.split(f"{stack}.{part}") == (stack, part)
        assert codec.split(f"{stack}.weight.{part}") == (f"{stack}.weight", part)
    assert codec.split(f"{stack}.weight") == (f"{stack}.weight", "weight")
    assert codec.split(f"{stack}.SCB") == (f"{stack}.weight", "SCB")


def test_the_offset_may_be_a_tensor_of_its_own() -> None:
    parts = nested_parts(4, 64)
    weight = decode(CONFIG, parts)
    del parts[STATE]
    for offset in (torch.tensor(0.25), torch.tensor([0.25])):
        changed = {**parts, "nested_offset": offset}
        assert torch.equal(decode(CONFIG, changed, shape=(4, 64)), weight)
        check_round_trip(changed, (4, 64))


def test_without_a_state_the_shape_must_be_given() -> None:
    with pytest.raises(CheckpointError, match=r"projection.weight: shape \(none\)"):
        decode(CONFIG, random_parts(4, 64))
    with pytest.raises(CheckpointError, match=r"weight of projection.weight"):
        decode(CONFIG, random_parts(4, 64), shape=(4, 128))
    with pytest.raises(CheckpointError, match="quant_state"):
        decode(CONFIG, nested_parts(4, 64), shape=(2, 128))


FAULTS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "missing absmax": ({"absmax": None}, r"absmax \(none\)"),
    "missing quant_map": ({"quant_map": None}, "part quant_map"),
    "missing nested map": ({"nested_quant_map": None}, "part nested_quant_map"),
    "missing offset": ({STATE: None}, "nested_offset"),
    "plain absmax": ({"absmax": torch.rand(4)}, "absmax of .*uint8"),
    "quantized absmax alone": ({"nested_absmax": None}, "absmax of .*float32"),
    "length of absmax": ({"absmax": torch.zeros(3, dtype=torch.uint8)}, "absmax of .*block size"),
    "length of the map": ({"quant_map": torch.zeros(8)}, r"quant_map .*\(16,\)"),
    "dtype of codes": ({"weight": torch.zeros(128, 1)}, "weight .*uint8"),
    "flat codes": ({"weight": torch.zeros(128, dtype=torch.uint8)}, r"weight \(shape \(128,\)\)"),
    "two states": ({"quant_state.bitsandbytes__fp4": state_blob([4, 64])}, "one quant_state"),
    "dtype of the state": ({STATE: torch.zeros(9)}, "quant_state.*uint8|must be JSON"),
    "NaN in the map": ({"quant_map": torch.full((16,), torch.nan)}, r"quant_map \(at \(0,\)\)"),
    "infinite nested absmax": ({"nested_absmax": torch.tensor([torch.inf])}, "absmax .*finite"),
    "two offsets": ({"nested_offset": torch.zeros(1)}, "got nested_offset besides"),
    "no single offset": ({STATE: None, "nested_offset": torch.zeros(2)}, "nested_offset of"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_parts_are_refused(fault: str) -> None:
    changes, message = FAULTS[fault]
    parts = {**nested_parts(4, 64), **changes}
    with pytest.raises(CheckpointError, match=message) as caught:
        decode(CONFIG, {part: t for part, t in parts.items() if t is not None}, shape=(4, 64))
    assert "projection.weight" in str(caught.value)


NESTED: dict[str, Any] = {"nested_blocksize": 256, "nested_offset": 0.25}


@pytest.mark.parametrize(
    "blob",
    [
        torch.tensor(list(b"not JSON"), dtype=torch.uint8),
        torch.tensor(list(b"[" * 4000), dtype=torch.uint8),
        torch.tensor([255, 254], dtype=torch.uint8),
        torch.tensor(list(b"[1, 2]"), dtype=torch.uint8),
        torch.zeros(5000, dtype=torch.uint8),
        torch.zeros(0, dtype=torch.uint8),
        state_blob([4, 64], **NESTED, blocksize=63),
        state_blob([4, 64], **NESTED, blocksize=128),
        state_blob([4, 64], **NESTED, blocksize=[64]),
        state_blob([4, 64], **NESTED, quant_type="fp4"),
        state_blob([4, 64], **{**NESTED, "nested_blocksize": 128}),
        state_blob([4, 64], **{**NESTED, "nested_offset": math.nan}),
        state_blob([4, 64], **{**NESTED, "nested_offset": "0"}),
        state_blob([4, 64], **{**NESTED, "nested_offset": []}),
        state_blob([4, 64], **{**NESTED, "nested_offset": 10**40}),
        state_blob([4, 64], **{**NESTED, "nested_offset": 10**400}),
        state_blob([4, 64]),
        torch.cat([state_blob([4, 64], **NESTED), torch.full((4096,), 32, dtype=torch.uint8)]),
        state_blob([], **NESTED),
        state_blob([4, -64], **NESTED),
        state_blob([4.0, 64], **NESTED),
        state_blob([256], **NESTED),
        state_blob([2, 2, 2, 32], **NESTED),
        state_blob("64", **NESTED),
        state_blob(256, **NESTED),
        state_blob([4, 128], **NESTED),
        state_blob([2**40, 2**40], **NESTED),
    ],
    ids=lambda blob: bytes(blob[:120].tolist()).decode(errors="replace"),
)
def test_states_that_are_not_believed(blob: Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"projection\.weight"):
        decode(CONFIG, {**nested_parts(4, 64), STATE: blob})


def test_an_odd_number_of_elements_is_refused() -> None:
    parts = {**random_parts(4, 4), "weight": torch.zeros(8, 1, dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match="even number"):
        decode(CONFIG, parts, shape=(3, 5))


def test_nested_scales_cannot_be_made_up() -> None:
    parts = nested_parts(4, 64)
    headers = {part: Header.of(tensor) for part, tensor in parts.items()}
    format = codec_for(CONFIG).format_of("layer.weight", headers)
    assert format is not None
    matrix = format.read("layer.weight", parts).matrix
    with pytest.raises(ConfigError, match="Encode what decode returned"):
        format.encode(Decoded(matrix))
    scheme = QuantScheme(Code.INT, 4, (1, 64), torch.float32, ZeroPoint.MID)
    with pytest.raises(ConfigError, match="codes of a codebook"):
        format.encode(Decoded(quantize(torch.randn(4, 64), scheme)))


def test_int8_rows() -> None:
    codes = torch.randint(-128, 128, (6, 10), dtype=torch.int8)
    codes[0, :3] = torch.tensor([-128, 127, 0])
    parts = {"weight": codes, "SCB": torch.rand(6), "weight_format": torch.tensor(0).byte()}
    expected = codes.float() * (parts["SCB"] / 127)[:, None]
    assert torch.equal(decode(CONFIG_8, parts), expected)
    decoded = check_round_trip(parts, None)
    assert decoded.matrix.scheme == QuantScheme(
        Code.INT, 8, (1, None), torch.float32, ZeroPoint.MID
    )
    del parts["weight_format"]
    check_round_trip(parts, (6, 10))
    many = {"weight": codes.repeat(50, 1), "SCB": torch.rand(300)}
    assert not torch.equal(many["SCB"] / 127 * 127, many["SCB"])
    check_round_trip(many, None)
    activations = Int8Format().activations
    assert activations is not None and activations.per is ActivationGroup.TOKEN
    assert not activations.is_found_running  # not the outliers


def test_our_own_int8_can_be_written() -> None:
    scheme = QuantScheme(Code.INT, 8, (1, None), torch.float32, ZeroPoint.MID)
    matrix = quantize(torch.randn(4, 32), scheme)
    written = Int8Format().encode(Decoded(matrix))
    torch.testing.assert_close(decode(CONFIG_8, written), dequantize(matrix), atol=0, rtol=3e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SCB": torch.ones(5)}, r"SCB .*\(6,\)"),
        ({"SCB": torch.ones(6).half()}, "SCB .*float32"),
        ({"SCB": torch.full((6,), torch.nan)}, "SCB .*nan"),
        ({"weight": torch.zeros(6, 10)}, "weight .*int8"),
        ({"weight": torch.zeros(60, dtype=torch.int8)}, "weight"),
        ({"weight_format": torch.tensor(2).byte()}, r"weight_format \(2\)"),
        ({"absmax": torch.ones(1)}, "got absmax besides"),
    ],
    ids=str,
)
def test_bad_int8_parts_are_refused(changes: dict[str, Tensor], message: str) -> None:
    parts = {"weight": torch.zeros(6, 10, dtype=torch.int8), "SCB": torch.rand(6), **changes}
    with pytest.raises(CheckpointError, match=message):
        decode(CONFIG_8, parts)


def test_the_configuration() -> None:
    with pytest.raises(CheckpointError, match="bnb_4bit_quant_type"):
        codec_for({**CONFIG, "bnb_4bit_quant_type": "int4"})
    codec = codec_for({**CONFIG, "llm_int8_skip_modules": ["lm_head", "gate"]})
    assert not codec.expects("lm_head.weight")
    assert not codec.expects("layers.0.mlp.gate.weight")
    assert codec.expects("layers.0.mlp.gate_proj.weight")
    assert codec.format_of("gate.weight", {"weight": Header(torch.bfloat16, (4, 8))}) is None
    assert not codec.split("layers.0.mlp.gate_proj.bias")
