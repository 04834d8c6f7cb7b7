"""AWQ files, against a plain loop over nibbles and against files that must not be read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from codec_files import random_words
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixtura.errors import CheckpointError, ConfigError
from mixtura.quant import decode
from mixtura.quant.codecs import Decoded, Header
from mixtura.quant.codecs.awq import Awq, AwqFormat
from mixtura.quant.matrix import dequantize
from mixtura.quant.quantize import quantize
from mixtura.quant.scheme import Code, QuantScheme, ZeroPoint

INT32 = torch.int32
NIBBLE_OF_FEATURE = [0, 4, 1, 5, 2, 6, 3, 7]


def config(**changes: Any) -> dict[str, Any]:
    base = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True}
    return {**base, "version": "gemm", **changes}


def random_parts(num_rows: int, num_columns: int, size: int = 16) -> dict[str, Tensor]:
    num_groups = 1 if size == -1 else -(-num_columns // size)
    return {
        "qweight": random_words(num_columns, num_rows // 8),
        "qzeros": random_words(num_groups, num_rows // 8),
        "scales": torch.randn(num_groups, num_rows).half(),
    }


def nibble(words: Tensor, feature: int) -> int:
    return int(words[feature // 8]) >> 4 * NIBBLE_OF_FEATURE[feature % 8] & 15


def plain_loop(parts: dict[str, Tensor], size: int) -> Tensor:
    num_columns, num_rows = parts["qweight"].shape[0], parts["scales"].shape[1]
    weight = torch.empty(num_rows, num_columns)
    for n in range(num_rows):
        for k in range(num_columns):
            group = 0 if size == -1 else k // size
            zero = nibble(parts["qzeros"][group], n) if "qzeros" in parts else 8
            code = nibble(parts["qweight"][k], n)
            weight[n, k] = (code - zero) * parts["scales"][group, n].float()
    return weight


def read(settings: dict[str, Any], parts: dict[str, Tensor]) -> tuple[AwqFormat, Decoded]:
    headers = {part: Header.of(tensor) for part, tensor in parts.items()}
    format = Awq.from_config(settings).format_of("layer.weight", headers)
    assert isinstance(format, AwqFormat)
    return format, format.read("layer.weight", parts)


def test_the_word_of_the_format_notes() -> None:
    parts = {
        "qweight": torch.tensor([[0x76543210]], dtype=INT32),
        "qzeros": torch.tensor([[0x88888888 - 2**32]], dtype=INT32),
        "scales": torch.full((1, 8), 0.5, dtype=torch.float16),
    }
    expected = [-4, -2, -3.5, -1.5, -3, -1, -2.5, -0.5]
    assert decode(config(), parts).flatten().tolist() == expected
    del parts["qzeros"]
    assert decode(config(zero_point=False), parts).flatten().tolist() == expected


@pytest.mark.parametrize("has_zero_points", [True, False])
@pytest.mark.parametrize("size", [16, 20, -1])
def test_random_bits_against_a_plain_loop(size: int, has_zero_points: bool) -> None:
    parts = random_parts(24, 50, size)
    if not has_zero_points:
        del parts["qzeros"]
    weight = decode(config(group_size=size, zero_point=has_zero_points), parts)
    assert torch.equal(weight, plain_loop(parts, size))


def test_zero_points_count_where_they_are() -> None:
    parts = random_parts(8, 16)
    assert torch.equal(decode(config(zero_point=False), parts), plain_loop(parts, 16))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    num_words=st.integers(1, 5),
    num_columns=st.integers(1, 40),
    size=st.sampled_from([8, 16, 100, -1]),
    has_zero_points=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_files_are_written_back_bit_for_bit(
    seed: int,
    num_words: int,
    num_columns: int,
    size: int,
    has_zero_points: bool,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(seed)
    parts = random_parts(8 * num_words, num_columns, size)
    parts["scales"] = parts["scales"].to(dtype)
    if not has_zero_points:
        del parts["qzeros"]
    format, decoded = read(config(group_size=size, zero_point=has_zero_points), parts)
    written = format.encode(decoded)
    assert written.keys() == parts.keys()
    assert all(torch.equal(written[part], parts[part]) for part in parts)
    assert written["scales"].dtype is dtype


def test_our_own_matrices_can_be_written() -> None:
    scheme = QuantScheme(Code.INT, 4, (1, 16), torch.float16, ZeroPoint.INTEGER)
    matrix = quantize(torch.randn(16, 32), scheme)
    parts = AwqFormat(16, has_zero_points=True).encode(Decoded(matrix))
    assert torch.equal(decode(config(), parts), dequantize(matrix))
    with pytest.raises(ConfigError, match="to be written as AWQ"):
        AwqFormat(16, has_zero_points=False).encode(Decoded(matrix))


FAULTS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "missing qzeros": ({"qzeros": None}, "must have a part qzeros"),
    "missing scales": ({"scales": None}, "must have a part scales"),
    "missing qweight": ({"qweight": None}, r"qweight \(none\)"),
    "GPTQ's packing": ({"qweight": random_words(4, 32)}, "qzeros .*must be|scales .*must be"),
    "dtype of codes": ({"qweight": torch.zeros(32, 4)}, "qweight .*int32"),
    "dtype of zero points": ({"qzeros": torch.zeros(2, 4)}, "qzeros .*int32"),
    "dtype of scales": ({"scales": torch.zeros(2, 32, dtype=torch.int8)}, "scales .*must be"),
    "groups of scales": ({"scales": torch.zeros(4, 32).half()}, r"scales .*\(2, 32\)"),
    "width of scales": ({"scales": torch.zeros(2, 4).half()}, r"scales .*\(2, 32\)"),
    "no columns": ({"qweight": random_words(0, 4)}, "positive sizes"),
    "dense beside": ({"weight": torch.zeros(32, 32)}, "got weight besides"),
    "NaN scale": ({"scales": torch.full((2, 32), torch.nan).half()}, r"scales \(at \(0, 0\)\)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_parts_are_refused(fault: str) -> None:
    changes, message = FAULTS[fault]
    parts = {**random_parts(32, 32), **changes}
    with pytest.raises(CheckpointError, match=message) as caught:
        decode(config(), {part: tensor for part, tensor in parts.items() if tensor is not None})
    assert "projection.weight" in str(caught.value)


def test_parts_of_other_families_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"tensor \(g_idx\)"):
        decode(config(), {**random_parts(8, 16), "g_idx": torch.zeros(16, dtype=INT32)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, r"bits \(8\)"),
        ({"bits": None}, "bits"),
        ({"version": "gemv"}, "version .*gemm, marlin, exllama"),
        ({"version": "gemv_fast"}, "version"),
        ({"backend": "llm-awq"}, "backend"),
        ({"group_size": 0}, "group_size"),
        ({"zero_point": "yes"}, "zero_point"),
    ],
    ids=str,
)
def test_configurations_that_are_not_read(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Awq.from_config(config(**changes))


def test_old_names_of_settings() -> None:
    old = {"w_bit": 4, "q_group_size": 16, "zero_point": True, "version": "GEMM"}
    parts = random_parts(8, 32)
    assert torch.equal(decode(old, parts), decode(config(), parts))


def test_modules_are_excluded_by_whole_components() -> None:
    codec = Awq.from_config(config(modules_to_not_convert=["gate", "mlp.shared_expert_gate"]))
    assert not codec.expects("model.layers.0.mlp.gate.weight")
    assert codec.expects("model.layers.0.mlp.gate_proj.weight")
    assert not codec.expects("model.layers.0.mlp.shared_expert_gate.weight")
    assert codec.format_of("gate.weight", {"weight": Header(torch.bfloat16, (4, 8))}) is None
