"""The one packing of codes into bytes, and groups spread over their elements.

A row is a little-endian stream of unsigned codes along K: code `k` in bits `k * bits` and up (bit 0
of byte 0 first; so a 4-bit code with even k is the low nibble), and every row starts on a byte.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes `(..., K)` uint8, each below `2 ** bits`, into rows `(..., ceil(K * bits / 8))`.

    Unused high bits of a row's last byte are 0.

    >>> import torch
    >>> pack_codes(torch.tensor([1, 2, 3], dtype=torch.uint8), bits=4).tolist()
    [33, 3]
    """
    num_codes = codes.shape[-1]
    period, num_bytes = 8 // math.gcd(8, bits), bits // math.gcd(8, bits)
    padded = F.pad(codes, (0, -num_codes % period))
    padded = padded.reshape(*codes.shape[:-1], -1, period)
    packed = codes.new_zeros((*padded.shape[:-1], num_bytes))
    for i in range(period):
        byte, shift = divmod(i * bits, 8)
        packed[..., byte] |= padded[..., i] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= padded[..., i] >> (8 - shift)
    return packed.flatten(-2)[..., : -(-num_codes * bits // 8)].contiguous()


def unpack_codes(packed: Tensor, num_codes: int, bits: int) -> Tensor:
    """Undo `pack_codes`: rows `(..., ceil(K * bits / 8))` uint8 to codes `(..., K)` uint8."""
    period, num_bytes = 8 // math.gcd(8, bits), bits // math.gcd(8, bits)
    padded = F.pad(packed, (0, -packed.shape[-1] % num_bytes))
    padded = padded.reshape(*packed.shape[:-1], -1, num_bytes)
    codes = packed.new_empty((*padded.shape[:-1], period))
    for i in range(period):
        byte, shift = divmod(i * bits, 8)
        code = padded[..., byte] >> shift
        if shift + bits > 8:
            code = code | (padded[..., byte + 1] << (8 - shift))
        codes[..., i] = code & (2**bits - 1)
    return codes.flatten(-2)[..., :num_codes]


def expand_groups(grid: Tensor, group_size: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """Spread one value per group over its elements: `out[n, k] = grid[n // gn, k // gk]`.

    Args:
        grid: `(..., GN, GK)`, any dtype that repeats.
        group_size: `(gn, gk)`, as from `QuantScheme.group_size`.
        shape: `(..., N, K)` of the elements.

    Returns:
        A tensor that broadcasts to `shape`: an axis with a single group stays 1 long.
    """
    for dim in (-2, -1):
        if grid.shape[dim] > 1:
            grid = grid.repeat_interleave(group_size[dim], dim).narrow(dim, 0, shape[dim])
    return grid
