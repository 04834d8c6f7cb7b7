"""Rows of 32-bit words, which files are packed in, as rows of bytes and back.

Words are little-endian, as the hosts are: a row of words that is one stream of codes is the packing
of `quant/packing.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixtura.errors import CheckpointError


def bytes_of(words: Tensor) -> Tensor:
    """Words (R, C) int32 to bytes (R, 4 * C) uint8.

    >>> bytes_of(torch.tensor([[0x04030201]], dtype=torch.int32)).tolist()
    [[1, 2, 3, 4]]
    """
    # Flat, as a row of a single word may have any stride and yet be contiguous.
    return words.contiguous().flatten().view(torch.uint8).view(len(words), -1)


def words_of(rows: Tensor) -> Tensor:
    """Undo `bytes_of`."""
    return rows.contiguous().flatten().view(torch.int32).view(len(rows), -1)


def count_codes(part: str, num_words: int, bits: int) -> int:
    """How many codes lie in so many 32-bit words.

    Raises:
        CheckpointError: they do not fill the words.
    """
    num_codes, rest = divmod(32 * num_words, bits)
    if rest:
        raise CheckpointError(
            f"{part} ({num_words} words) must hold whole codes of {bits} bits; got {32 * num_words}"
            f" bits. Fetch the configuration and the weights again, both of one model."
        )
    return num_codes


def count_words(what: str, num_codes: int, bits: int) -> int:
    """How many 32-bit words so many codes fill.

    Raises:
        CheckpointError: they leave a word unfilled.
    """
    num_words, rest = divmod(num_codes * bits, 32)
    if rest:
        raise CheckpointError(
            f"{what} ({num_codes}) must fill words of 32 bits with codes of {bits} bits; got "
            f"{num_codes * bits} bits. Use a checkpoint whose sizes are multiples of 32."
        )
    return num_words
