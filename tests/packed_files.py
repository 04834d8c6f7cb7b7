"""Small quantized checkpoints: a tiny model's weights in the formats of the golden files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from mixtura.quant.codecs.contract import Codec, Decoded, Header, MatrixFormat
from mixtura.quant.codecs.decoding import parts_of
from mixtura.quant.codecs.registry import codec_for
from mixtura.quant.matrix import QuantizedMatrix, dequantize
from mixtura.quant.quantize import quantize
from mixtura.quant.scheme import Code, QuantScheme

GOLDEN = Path(__file__).parent / "golden" / "quant"


@cache
def golden_index() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / "index.json").read_text())["files"]
    return found


def formats() -> list[str]:
    """Golden files whose format a matrix of any size can be written in by rounding."""
    return [
        name
        for name, entry in golden_index().items()
        if "quantization_config" in entry
        and "quant_method" in entry["quantization_config"]
        and name not in ("gpt_oss_mxfp4", "gptq_v1_zero0_ambiguity")
        and format_like(name)[2].code is not Code.CODEBOOK
    ]


@cache
def format_like(name: str) -> tuple[Codec, MatrixFormat, QuantScheme, Tensor | None]:
    """Codec, format, scheme and input scale of a golden file."""
    entry = golden_index()[name]
    codec = codec_for(entry["quantization_config"])
    tensors = load_file(GOLDEN / entry["file"])
    shape = tuple(tensors["expected"].shape)
    given = {part: value for part, value in tensors.items() if not part.startswith("expected")}
    module, parts = parts_of(codec, given)
    headers = {part: Header.of(value) for part, value in parts.items()}
    format = codec.format_of(module, headers)
    assert format is not None
    decoded = format.read(module, parts, shape)
    return codec, format, decoded.matrix.scheme, decoded.input_scale


def write_packed(
    dense: Path, out: Path, name: str, is_packed: Callable[[str], bool]
) -> dict[str, Tensor]:
    """Write a checkpoint with some matrices in the format of a golden file.

    Returns:
        The weights of the checkpoint that it stands for, dense.
    """
    codec, format, scheme, input_scale = format_like(name)

    def packed(tensor: str, value: Tensor) -> tuple[QuantizedMatrix, dict[str, Tensor]]:
        matrix = quantize(value, scheme)
        return matrix, format.encode(Decoded(matrix, input_scale))

    config = golden_index()[name]["quantization_config"]
    return write_with(dense, out, codec, config, packed, is_packed)


def write_with(
    dense: Path,
    out: Path,
    codec: Codec,
    config: dict[str, Any],
    packed: Callable[[str, Tensor], tuple[QuantizedMatrix, dict[str, Tensor]]],
    is_packed: Callable[[str], bool],
) -> dict[str, Tensor]:
    """Write a checkpoint with some matrices as `packed` makes them: the matrix, and its parts."""
    suffix: dict[str, str] = {}
    for end, part in codec.suffixes.items():
        suffix.setdefault(part, end)
    means, stored = {}, {}
    for tensor, value in load_file(dense / "model.safetensors").items():
        if not is_packed(tensor):
            means[tensor] = stored[tensor] = value
            continue
        matrix, parts = packed(tensor, value)
        means[tensor] = dequantize(matrix).to(value.dtype)
        for part, content in parts.items():
            stored[tensor.removesuffix(".weight") + suffix[part]] = content.clone()
    out.mkdir()
    for file in dense.glob("*.json"):
        shutil.copy(file, out)
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    whole = json.loads((dense / "config.json").read_text())
    whole["quantization_config"] = config
    (out / "config.json").write_text(json.dumps(whole))
    return means
