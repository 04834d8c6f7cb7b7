"""Parts of quantized matrices for tests of codecs: reading, writing back, and breaking them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mixtura.errors import CheckpointError
from mixtura.quant.codecs.contract import Codec, Decoded, Header, MatrixFormat
from mixtura.quant.matrix import QuantizedMatrix, dequantize
from mixtura.quant.packing import pack_codes, unpack_codes

GOLDEN = Path(__file__).parent / "golden" / "quant"
NAME = "model.layers.0.mlp.experts.3.up_proj.weight"
Parts = dict[str, Tensor]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
U8, I8, I32, I64 = torch.uint8, torch.int8, torch.int32, torch.int64


def golden(name: str) -> tuple[dict[str, Any], Parts, Tensor, float]:
    """Configuration, parts, weight and relative tolerance of a golden file."""
    entry = json.loads((GOLDEN / "index.json").read_text())["files"][name]
    tensors = load_file(GOLDEN / entry["file"])
    expected = tensors.pop("expected")
    return entry["quantization_config"], tensors, expected, entry["rtol"]


def format_of(codec: Codec, parts: Mapping[str, Tensor], name: str = NAME) -> MatrixFormat:
    headers = {part: Header.of(tensor) for part, tensor in parts.items()}
    format = codec.format_of(name, headers)
    assert format is not None
    return format


def read(
    codec: Codec, parts: Mapping[str, Tensor], shape: tuple[int, ...] | None = None
) -> Decoded:
    return format_of(codec, parts).read(NAME, parts, shape)


def weight(codec: Codec, parts: Mapping[str, Tensor]) -> Tensor:
    return dequantize(read(codec, parts).matrix)


def assert_written_back(
    codec: Codec, parts: Mapping[str, Tensor], shape: tuple[int, ...] | None = None
) -> Decoded:
    """Read parts, write them again, and compare every bit; gives what was read."""
    format = format_of(codec, parts)
    decoded = format.read(NAME, parts, shape)
    written = format.encode(decoded)
    assert written.keys() == parts.keys()
    for part, tensor in parts.items():
        assert Header.of(written[part]) == Header.of(tensor), part
        assert same_bits(written[part], tensor), part
    return decoded


def same_bits(left: Tensor, right: Tensor) -> bool:
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return torch.equal(*flat)


def assert_unused_bits_are_zero(matrix: QuantizedMatrix) -> None:
    codes = unpack_codes(matrix.values, matrix.shape[-1], matrix.scheme.bits)
    assert torch.equal(matrix.values, pack_codes(codes, matrix.scheme.bits))


def refuse(codec: Codec, parts: Mapping[str, Tensor], match: str, **shape: Any) -> None:
    """The parts must raise a `CheckpointError` that names the matrix and says `match`."""
    with pytest.raises(CheckpointError, match=match) as caught:
        read(codec, parts, **shape)
    assert NAME in str(caught.value)
    assert "; got " in str(caught.value)


def header_faults(parts: Parts, optional: tuple[str, ...] = ()) -> Iterator[tuple[str, Parts]]:
    """Every way to break one header: a part missing, of another dtype or shape, or one too many."""
    for part, tensor in parts.items():
        others = {name: other for name, other in parts.items() if name != part}
        if part not in optional:
            yield f"without {part}", others
        yield f"{part} as float64", {**others, part: tensor.double()}
        longer = torch.zeros((tensor.shape or (1,))[0] + 1, *tensor.shape[1:], dtype=tensor.dtype)
        yield f"longer {part}", {**others, part: longer}
        yield f"deeper {part}", {**others, part: tensor[None, None, None]}
    yield "one too many", {**parts, "qweight": torch.zeros(2, dtype=I32)}


def assert_header_faults_are_refused(
    codec: Codec, parts: Parts, optional: tuple[str, ...] = ()
) -> None:
    shape = tuple(read(codec, parts).matrix.shape)
    for fault, broken in header_faults(parts, optional):
        try:
            read(codec, broken, shape)
        except CheckpointError as error:
            assert NAME in str(error) and "; got " in str(error), fault
        else:
            raise AssertionError(f"{fault} was read")


def floats8(*shape: int) -> Tensor:
    """Random e4m3 codes without NaN."""
    codes = torch.randint(0, 256, shape, dtype=U8)
    return torch.where((codes & 0x7F) == 0x7F, 0, codes).to(U8).view(E4M3)


def bytes_of(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=U8)


def e8m0_codes(*shape: int) -> Tensor:
    """Random scales as uint8, code 255 left out."""
    return torch.randint(0, 255, shape, dtype=U8)


def random_words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=I64).to(I32)


def code_at(stream: list[int], index: int, bits: int) -> int:
    """Code `index` of a stream of 32-bit words, bit by bit."""
    code = 0
    for bit in range(bits):
        word, shift = divmod(index * bits + bit, 32)
        code |= (stream[word] >> shift & 1) << bit
    return code


def word(*values: int) -> Tensor:
    """Words given as unsigned numbers, in one row."""
    return torch.tensor([values], dtype=I64).to(I32)


def raw(*values: int) -> Tensor:
    """Bytes in one row."""
    return torch.tensor([values], dtype=U8)


def with_value(tensor: Tensor, value: float) -> Tensor:
    """A copy whose last element is another value."""
    copy = tensor.clone()
    copy.reshape(-1)[-1] = value
    return copy
