"""gpt-oss: stacks of experts in blocks, and files that must not be read."""

from __future__ import annotations

import pytest
import torch
from codec_files import (
    BF16,
    E8M0,
    NAME,
    U8,
    assert_header_faults_are_refused,
    assert_written_back,
    bytes_of,
    e8m0_codes,
    format_of,
    golden,
    read,
    refuse,
    weight,
    with_value,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtura.errors import CheckpointError
from mixtura.quant.codecs.contract import Header
from mixtura.quant.codecs.mxfp4 import GptOss
from mixtura.quant.matrix import dequantize

CODEC = GptOss.from_config({"quant_method": "mxfp4"})
LEVELS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def test_golden_file() -> None:
    config, parts, expected, _ = golden("gpt_oss_mxfp4")
    parts = {part.removeprefix("gate_up_proj_"): tensor for part, tensor in parts.items()}
    decoded = assert_written_back(GptOss.from_config(config), parts)
    assert torch.equal(dequantize(decoded.matrix), expected)


def test_bytes_of_the_notes() -> None:
    blocks = torch.full((1, 1, 1, 16), 0x2B, dtype=U8)
    parts = {"blocks": blocks, "scales": torch.full((1, 1, 1), 0x7D, dtype=U8)}
    assert weight(CODEC, parts)[0, 0, :2].tolist() == [-0.375, 0.25]


def test_against_a_plain_loop() -> None:
    parts = {"blocks": bytes_of(2, 3, 2, 16), "scales": torch.randint(120, 134, (2, 3, 2)).to(U8)}
    found = weight(CODEC, parts)
    for expert in range(2):
        for row in range(3):
            for column in range(64):
                block, inside = divmod(column, 32)
                byte = parts["blocks"][expert, row, block, inside // 2].item()
                code = byte >> 4 if inside % 2 else byte & 15
                level = LEVELS[code & 7] * (-1 if code & 8 else 1)
                scale = 2.0 ** (parts["scales"][expert, row, block].item() - 127)
                assert found[expert, row, column].item() == level * scale


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.sampled_from([U8, E8M0]))
def test_random_bytes_are_written_back(
    num_experts: int, num_rows: int, num_groups: int, dtype: torch.dtype
) -> None:
    parts = {
        "blocks": bytes_of(num_experts, num_rows, num_groups, 16),
        "scales": e8m0_codes(num_experts, num_rows, num_groups).view(dtype),
    }
    decoded = assert_written_back(CODEC, parts)
    assert decoded.matrix.shape == (num_experts, num_rows, 32 * num_groups)
    assert format_of(CODEC, parts).activations is None


def test_bad_headers_are_refused() -> None:
    parts = {"blocks": bytes_of(2, 3, 2, 16), "scales": e8m0_codes(2, 3, 2)}
    assert_header_faults_are_refused(CODEC, parts)
    refuse(CODEC, {**parts, "blocks": bytes_of(2, 3, 2, 8)}, "blocks")
    refuse(CODEC, {**parts, "blocks": bytes_of(2, 3, 32)}, "blocks")
    refuse(CODEC, {**parts, "weight": torch.zeros(2, 3, 64)}, "must be ones that are read")
    for shape in [(2, 3, 32), (2, 4, 64), (3, 64)]:
        refuse(CODEC, parts, "must", shape=shape)


def test_scales_that_are_no_numbers_are_refused() -> None:
    parts = {"blocks": bytes_of(2, 3, 2, 16), "scales": e8m0_codes(2, 3, 2)}
    refuse(CODEC, {**parts, "scales": with_value(parts["scales"], 255)}, r"scales \(at \(1, 2, 1\)")
    for code in (0, 254):
        decoded = read(CODEC, {**parts, "scales": with_value(parts["scales"], code)})
        assert dequantize(decoded.matrix).shape == (2, 3, 64)


def test_what_is_expected() -> None:
    ignored = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    found = GptOss.from_config({"modules_to_not_convert": ignored})
    assert found.expects("model.layers.0.mlp.experts.gate_up_proj")
    assert not found.expects("model.layers.0.self_attn.q_proj.weight")
    assert not found.expects("model.layers.0.mlp.router.weight")
    assert found.format_of(NAME, {"weight": Header(BF16, (4, 4))}) is None
    with pytest.raises(CheckpointError, match="modules_to_not_convert"):
        GptOss.from_config({"modules_to_not_convert": {"lm_head": 1}})


def test_names_of_parts() -> None:
    stem = "model.layers.0.mlp.experts.down_proj"
    assert CODEC.split(f"{stem}_blocks") == (stem, "blocks")
    assert CODEC.split(f"{stem}_scales") == (stem, "scales")
    assert CODEC.split(f"{stem}_bias") is None
