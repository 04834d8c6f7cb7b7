"""Codes that have a meaning only as a whole block: ggml's IQ types.

A block is a few scales and, for every 4 or 8 weights, the number of a point in a table of vectors
(a grid) and their signs. The grids are in `ggml_grids.safetensors` beside this file.

    weight = d * f(sub-block scale) * grid[index] * sign        IQ2, IQ3
    weight = d * (2 * sub-block scale + 1) * (grid[index] +- 1/8)      IQ1

All of it is exact in fp32. In shape comments B is the number of blocks.

Source: `dequantize_row_iq*` and the tables of ggml (MIT).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

GRIDS = Path(__file__).with_name("ggml_grids.safetensors")
IQ1_DELTA = 0.125


class BlockCode(NamedTuple):
    """A kind of block.

    Attributes:
        num_columns: weights of a block. num_bytes: bytes of a block.
        decode: (B, num_bytes) uint8 to (B, num_columns) fp32.
        scale: (B, num_bytes) uint8 to the blocks' scale d, (B, 1) fp16.
    """

    num_columns: int
    num_bytes: int
    decode: Callable[[Tensor], Tensor]
    scale: Callable[[Tensor], Tensor]


def decode_rows(code: BlockCode, values: Tensor) -> Tensor:
    """Rows of whole blocks (N, bytes) uint8 to weights (N, K) fp32."""
    blocks = values.reshape(-1, code.num_bytes)
    return code.decode(blocks).reshape(values.shape[0], -1)


@functools.lru_cache(maxsize=32)
def _grid(name: str, device: torch.device) -> Tensor:
    """Points of a grid, (points, 4 or 8) fp32."""
    from safetensors.torch import load_file  # noqa: PLC0415 - layers need only torch

    return load_file(GRIDS)[name].to(device=device, dtype=torch.float32)


def _half(blocks: Tensor, start: int = 0) -> Tensor:
    """The fp16 number at a byte of every block, (B, 1)."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16)


def _words(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as little-endian unsigned words of int16 or int32, (B, words) int64."""
    words = blocks.contiguous().view(dtype).long()
    unsigned: Tensor = words & (2 ** (8 * dtype.itemsize) - 1)
    return unsigned


def _fields(words: Tensor, bits: int, count: int) -> Tensor:
    """The `count` lowest fields of `bits` of every word, lowest first: (..., n) to (..., n, count).

    Fields of uint8 are uint8, others int64.
    """
    shifts = torch.arange(0, bits * count, bits, dtype=words.dtype, device=words.device)
    fields: Tensor = (words[..., None] >> shifts) & (2**bits - 1)
    return fields


def _signs(bits: Tensor) -> Tensor:
    """Sign bytes (...,) to factors (..., 8): bit i set is -1 at i."""
    return 1.0 - 2.0 * _fields(bits, 1, 8)


def _parity_signs(index: Tensor) -> Tensor:
    """The factors of 7 sign bits (...,) and an eighth that makes their number even, (..., 8)."""
    seven = _fields(index, 1, 7)
    eighth = seven.sum(-1, keepdim=True) & 1
    return 1.0 - 2.0 * torch.cat([seven, eighth], -1)


def _nibble_scales(blocks: Tensor) -> Tensor:
    """Nibbles of bytes, the lower one first: (B, n) to (B, 2n) fp32."""
    return _fields(blocks, 4, 2).flatten(1).float()


def _product(scales: Tensor, points: Tensor, signs: Tensor) -> Tensor:
    """Scales (B, S) times points and signs (B, anything of the same number of weights each)."""
    weights = points.reshape(points.shape[0], scales.shape[1], -1)
    signed = weights * signs.reshape(weights.shape)
    return (signed * scales[..., None]).flatten(1)


def _iq2_xxs(blocks: Tensor) -> Tensor:
    words = _words(blocks[:, 2:66], torch.int32).reshape(-1, 8, 2)
    indices, meta = words.unbind(-1)
    points = _grid("iq2_xxs", blocks.device)[_fields(indices, 8, 4)]  # (B, 8, 4, 8)
    scales = _half(blocks).float() * (0.5 + (meta >> 28).float()) * 0.25
    return _product(scales, points, _parity_signs(_fields(meta, 7, 4)))


def _iq2_xs(blocks: Tensor) -> Tensor:
    words = _words(blocks[:, 2:66], torch.int16)  # (B, 32)
    points = _grid("iq2_xs", blocks.device)[words & 511]
    scales = _half(blocks).float() * (0.5 + _nibble_scales(blocks[:, 66:74])) * 0.25
    return _product(scales, points, _parity_signs(words >> 9))


def _iq2_s(blocks: Tensor) -> Tensor:
    high = _fields(blocks[:, 66:74].long(), 2, 4).flatten(1)  # (B, 32)
    points = _grid("iq2_s", blocks.device)[blocks[:, 2:34].long() | (high << 8)]
    scales = _half(blocks).float() * (0.5 + _nibble_scales(blocks[:, 74:82])) * 0.25
    return _product(scales, points, _signs(blocks[:, 34:66]))


def _iq3_xxs(blocks: Tensor) -> Tensor:
    points = _grid("iq3_xxs", blocks.device)[blocks[:, 2:66].long()]  # (B, 64, 4)
    meta = _words(blocks[:, 66:98], torch.int32)  # (B, 8)
    scales = _half(blocks).float() * (0.5 + (meta >> 28).float()) * 0.5
    return _product(scales, points, _parity_signs(_fields(meta, 7, 4)))


def _iq3_s(blocks: Tensor) -> Tensor:
    high = _fields(blocks[:, 66:74].long(), 1, 8).flatten(1)  # (B, 64)
    points = _grid("iq3_s", blocks.device)[blocks[:, 2:66].long() | (high << 8)]
    scales = _half(blocks).float() * (1 + 2 * _nibble_scales(blocks[:, 106:110]))
    return _product(scales, points, _signs(blocks[:, 74:106]))


def _iq1(indices: Tensor, is_negative: Tensor, scales: Tensor) -> Tensor:
    """Grid points (B, 32), their deltas' signs (B, D) and scales (B, S) to weights."""
    points = _grid("iq1_s", indices.device)[indices]  # (B, 32, 8)
    delta = torch.where(is_negative, -IQ1_DELTA, IQ1_DELTA)
    shifted = points.reshape(len(points), delta.shape[1], -1) + delta[..., None]
    return (shifted.reshape(len(points), scales.shape[1], -1) * scales[..., None]).flatten(1)


def _iq1_s(blocks: Tensor) -> Tensor:
    words = _words(blocks[:, 34:50], torch.int16)  # (B, 8)
    indices = blocks[:, 2:34].long() | (_fields(words, 3, 4).flatten(1) << 8)
    scales = _half(blocks).float() * (2 * ((words >> 12) & 7) + 1).float()
    return _iq1(indices, words >> 15 == 1, scales)


def _iq1_m(blocks: Tensor) -> Tensor:
    nibbles = _fields(blocks[:, 32:48].long(), 4, 2).flatten(1)  # (B, 32)
    indices = blocks[:, 0:32].long() | ((nibbles & 7) << 8)
    levels = _fields(_words(blocks[:, 48:56], torch.int16), 3, 4).flatten(1)  # (B, 16)
    scales = _iq1_m_scale(blocks).float() * (2 * levels + 1).float()
    return _iq1(indices, nibbles >> 3 == 1, scales)


def _iq1_m_scale(blocks: Tensor) -> Tensor:
    """The block's scale, whose four nibbles are the high ones of four words."""
    nibbles = _words(blocks[:, 48:56], torch.int16) >> 12  # (B, 4)
    shifts = torch.tensor([0, 4, 8, 12], device=blocks.device)
    bits = (nibbles << shifts).sum(1, keepdim=True)
    return bits.to(torch.int16).view(torch.float16)


BLOCK_CODES: dict[str, BlockCode] = {
    "iq1_s": BlockCode(256, 50, _iq1_s, _half),
    "iq1_m": BlockCode(256, 56, _iq1_m, _iq1_m_scale),
    "iq2_xxs": BlockCode(256, 66, _iq2_xxs, _half),
    "iq2_xs": BlockCode(256, 74, _iq2_xs, _half),
    "iq2_s": BlockCode(256, 82, _iq2_s, _half),
    "iq3_xxs": BlockCode(256, 98, _iq3_xxs, _half),
    "iq3_s": BlockCode(256, 110, _iq3_s, _half),
}
"""What `QuantScheme.blocks` may name."""
