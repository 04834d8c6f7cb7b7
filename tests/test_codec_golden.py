"""Every golden file through `mixtura.quant.decode`: tensors and weights that other software wrote.

`golden/quant/index.json` says who wrote what. Files without a weight hold the tables that codes are
looked up in.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mixtura.quant
from mixtura.quant import block_codes
from mixtura.quant.codecs import Header, codec_for
from mixtura.quant.codecs.decoding import parts_of
from mixtura.quant.scheme import Code, QuantScheme

GOLDEN = Path(__file__).parent / "golden" / "quant"
INDEX: dict[str, dict[str, Any]] = json.loads((GOLDEN / "index.json").read_text())["files"]
WEIGHTS = sorted(name for name, entry in INDEX.items() if "expected" in entry["tensors"])

WHICH_EXPECTED = {"gptq_v1_zero0_ambiguity": "expected_nowrap"}
"""Where two readers of the same bytes disagree: the reading that ours is."""

WARNINGS = {"gptq_v1_zero0_ambiguity": "a stored 15"}

SHAPELESS = {"bnb_nf4", "bnb_fp4"}
"""Files that do not hold the shape."""


@cache
def load(name: str) -> tuple[dict[str, Tensor], Tensor | None]:
    """The stored parts of a golden file, and the weight that they stand for."""
    tensors = load_file(GOLDEN / INDEX[name]["file"])
    expected = tensors.get(WHICH_EXPECTED.get(name, "expected"))
    return {part: t for part, t in tensors.items() if not part.startswith("expected")}, expected


def test_the_index_and_the_folder_agree() -> None:
    files = {entry["file"] for entry in INDEX.values()}
    assert {path.name for path in GOLDEN.iterdir()} == files | {"index.json"}
    assert len(WEIGHTS) > 50


@pytest.mark.filterwarnings("ignore:qzeros")
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_weight_is_what_its_producer_reads(name: str) -> None:
    tensors, expected = load(name)
    assert expected is not None
    entry = INDEX[name]
    shape = tuple(expected.shape) if name in SHAPELESS else None
    weight = mixtura.quant.decode(entry["quantization_config"], tensors, shape=shape)
    assert weight.dtype is torch.float32
    assert weight.shape == expected.shape
    torch.testing.assert_close(weight, expected, atol=entry["atol"], rtol=entry["rtol"])
    if entry["atol"] == entry["rtol"] == 0:
        assert torch.equal(weight, expected)


@pytest.mark.filterwarnings("ignore:qzeros")
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_file_is_written_back_bit_for_bit(name: str) -> None:
    tensors, expected = load(name)
    assert expected is not None
    codec = codec_for(INDEX[name]["quantization_config"])
    matrix, parts = parts_of(codec, tensors)
    assert len(parts) == len(tensors)
    format = codec.format_of(matrix, {part: Header.of(value) for part, value in parts.items()})
    assert format is not None
    written = format.encode(format.read(matrix, parts, tuple(expected.shape)))
    assert written.keys() == parts.keys()
    for part, value in parts.items():
        assert Header.of(written[part]) == Header.of(value), part
        assert same_bits(written[part], value), part


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors hold the same bytes, NaN and the sign of zero included."""
    flat = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (left, right)]
    return torch.equal(*flat)


def test_files_that_a_reading_is_a_guess_of_warn() -> None:
    for name, message in WARNINGS.items():
        tensors, _ = load(name)
        with pytest.warns(UserWarning, match=re.escape(message)):
            mixtura.quant.decode(INDEX[name]["quantization_config"], tensors)


@pytest.mark.parametrize(
    ("table", "code"),
    [
        ("torch_float8_e4m3fn", Code.E4M3),
        ("torch_float8_e5m2", Code.E5M2),
        ("ml_dtypes_float4_e2m1fn", Code.E2M1),
        ("ml_dtypes_float6_e2m3fn", Code.E2M3),
        ("ml_dtypes_float6_e3m2fn", Code.E3M2),
    ],
)
def test_the_levels_of_small_floats(table: str, code: Code) -> None:
    golden = load_file(GOLDEN / INDEX["code_tables"]["file"])[table]
    bits = 1 + code.exponent_bits + code.mantissa_bits
    levels = torch.tensor(QuantScheme(code, bits, (1, 32), torch.float32).levels)
    assert torch.equal(levels.isnan(), golden.isnan())
    assert same_bits(levels.nan_to_num(nan=0.0, posinf=1.0), golden.nan_to_num(nan=0.0, posinf=1.0))
    assert torch.equal(levels.isinf(), golden.isinf())


def test_the_scales_of_mx_formats() -> None:
    golden = load_file(GOLDEN / INDEX["code_tables"]["file"])["torch_float8_e8m0fnu"]
    codes = torch.arange(256, dtype=torch.uint8)
    scales = codes.view(torch.float8_e8m0fnu).float()
    assert torch.equal(scales[:255], golden[:255])
    assert scales[255].isnan() and golden[255].isnan()
    assert scales[0].item() == 2.0**-127


def test_the_grids_of_ggml() -> None:
    golden = load_file(GOLDEN / INDEX["gguf_iq_grids"]["file"])
    signs = golden.pop("ksigns")
    ours = load_file(block_codes.GRIDS)
    assert ours.keys() == golden.keys()
    for name, grid in golden.items():
        assert torch.equal(ours[name], grid), name
    bits = (signs.long()[:, None] >> torch.arange(8)) & 1
    assert torch.equal(block_codes._parity_signs(torch.arange(128)), 1.0 - 2 * bits)
