"""Which blocks a problem runs with: a small table instead of a file for every shape and GPU.

An entry is found by the rows of a tile (which regimes.py derives from the rows of an expert) and
how wide the experts are; what a GPU cannot hold is made smaller, so that there is no shape and no
GPU without an entry. `mixtura tune` measures others, which come first where they won (tuned.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache

import torch

from mixtura.config import GateUp
from mixtura.kernels.triton.device import Device

DIRECT_TILE = 1
"""Stands for the rows of a tile where slots are not sorted."""

PACKED_DIRECT_ROWS = 16
"""Columns of sums of a program that reads quantized weights of unsorted slots: one or more live."""

LARGE_TILE = 128
"""Rows from which on the rows are on the wide side of the product."""

MIN_DEPTH = 32
MIN_COLUMNS = 16
MAX_STAGES = 6


class Product(StrEnum):
    """The two products of an expert."""

    GATE_UP = "gate_up"
    DOWN = "down"


TRANSPOSED_COLUMNS = {Product.GATE_UP: 32, Product.DOWN: 16}
"""Outputs of a program that reads transposed weights of unsorted slots: neighbours in memory, so
that whole sectors of 32 bytes are used, and so few that one row keeps all processors busy."""


class Width(StrEnum):
    """How many columns of the hidden layer an expert has: SLIM ones make few programs."""

    SLIM = "slim"
    WIDE = "wide"


SLIM_MAX = 512
"""Columns of a slim expert's hidden layer."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a product is cut.

    Attributes:
        columns: outputs of a program. depth: inputs of a step.
        num_warps, num_stages: as Triton has them; stages are steps in flight.
        uses_descriptors: weights are read by descriptor, where their layout allows it.
        is_persistent: as many programs as processors, each walking over tiles.
        tail_rows: tiles of at most so many rows are computed as such; 0: all are alike.
    """

    columns: int
    depth: int
    num_warps: int
    num_stages: int
    uses_descriptors: bool = False
    is_persistent: bool = False
    tail_rows: int = 0


@dataclass(frozen=True, slots=True)
class Packing:
    """A quantized matrix, as far as the choice of blocks depends on it.

    Attributes:
        name: tells layouts apart. depth: inputs of a step, which the packing gives.
        bits: of a code. operand_bytes: of what is multiplied.
        scale_words: words of 32 bits that a row has in a step.
        columns: outputs of a program, where those of one are rounded together; 0: any.
    """

    name: str
    depth: int
    bits: int
    operand_bytes: int
    scale_words: int = 0
    columns: int = 0


@dataclass(frozen=True, slots=True)
class Key:
    """A product of experts, as far as the choice of blocks depends on it.

    The table looks at some of it; a tuned entry is for all of it, so that none of one model's is
    another's.

    Attributes:
        tile_rows: DIRECT_TILE, or the rows of a tile.
        num_experts, hidden_size, intermediate_size, gate_up: of `ExpertsConfig`.
        is_transposed: the matrix's columns are not next to each other in memory, its rows are.
        packing: of a quantized matrix; None for a dense one.
    """

    dtype: torch.dtype
    product: Product
    tile_rows: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    gate_up: GateUp = GateUp.STACKED
    is_transposed: bool = False
    packing: Packing | None = None

    @property
    def width(self) -> Width:
        """The size class of the experts."""
        return Width.SLIM if self.intermediate_size <= SLIM_MAX else Width.WIDE

    @property
    def num_columns(self) -> int:
        """Outputs of the product."""
        is_first = self.product is Product.GATE_UP
        return self.intermediate_size if is_first else self.hidden_size

    @property
    def depth(self) -> int:
        """Inputs of the product: columns of the matrix."""
        is_first = self.product is Product.GATE_UP
        return self.hidden_size if is_first else self.intermediate_size

    @property
    def is_doubled(self) -> bool:
        """Weights of gate and of up are read in every step."""
        return self.product is Product.GATE_UP and self.gate_up is not GateUp.UNGATED

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        packing = "" if self.packing is None else f"/{self.packing.name}"
        return f"{dtype}/{self.product}/{self.tile_rows}/{self.width}{packing}"


_WIDE_PRODUCTS: dict[tuple[Product, int], Blocks] = {
    (Product.GATE_UP, 1): Blocks(16, 256, 4, 3),
    (Product.DOWN, 1): Blocks(8, 256, 4, 6),
    (Product.GATE_UP, 16): Blocks(64, 128, 4, 3, uses_descriptors=True),
    (Product.DOWN, 16): Blocks(64, 128, 4, 4, uses_descriptors=True),
    (Product.GATE_UP, 32): Blocks(64, 64, 4, 5, uses_descriptors=True),
    (Product.DOWN, 32): Blocks(64, 128, 4, 4, uses_descriptors=True),
    (Product.GATE_UP, 64): Blocks(64, 64, 4, 4, uses_descriptors=True),
    (Product.DOWN, 64): Blocks(128, 64, 4, 4, uses_descriptors=True),
    (Product.GATE_UP, 128): Blocks(128, 64, 8, 4, True, True, tail_rows=64),
    (Product.DOWN, 128): Blocks(256, 64, 8, 3, True, True),
}
"""Where products read shared memory. Two programs of a small tile share a processor, each with 64
KB on their way; a large one fills it."""

_NARROW_PRODUCTS: dict[tuple[Product, int], Blocks] = {
    (Product.GATE_UP, 1): Blocks(16, 256, 4, 3),
    (Product.DOWN, 1): Blocks(8, 256, 4, 6),
    (Product.GATE_UP, 16): Blocks(64, 64, 4, 4),
    (Product.DOWN, 16): Blocks(64, 64, 4, 4),
    (Product.GATE_UP, 32): Blocks(64, 64, 4, 3),
    (Product.DOWN, 32): Blocks(64, 64, 4, 4),
    (Product.GATE_UP, 64): Blocks(64, 64, 4, 3),
    (Product.DOWN, 64): Blocks(64, 64, 4, 3),
    (Product.GATE_UP, 128): Blocks(64, 32, 8, 4, tail_rows=64),
    (Product.DOWN, 128): Blocks(128, 64, 8, 3),
}
"""Where products read registers (Ampere, Ada, consumer Blackwell, other makers)."""

_BLACKWELL: dict[tuple[Product, int], Blocks] = {
    (Product.GATE_UP, 128): Blocks(64, 64, 8, 5, True, tail_rows=64),
}
"""Where sums are kept in a memory of their own: more of them do not fit in registers on their way
out, beside what the next tile's first steps need."""

_PACKED_PRODUCTS: dict[tuple[int, int], dict[tuple[Product, int], Blocks]] = {
    (2, 4): {
        (Product.GATE_UP, 1): Blocks(16, 128, 2, 6),
        (Product.DOWN, 1): Blocks(32, 128, 2, 6),
        (Product.GATE_UP, 16): Blocks(64, 128, 2, 3),
        (Product.DOWN, 16): Blocks(128, 128, 2, 3),
        (Product.GATE_UP, 32): Blocks(64, 128, 4, 5),
        (Product.DOWN, 32): Blocks(128, 128, 4, 5),
        (Product.GATE_UP, 64): Blocks(64, 128, 4, 4),
        (Product.DOWN, 64): Blocks(128, 128, 4, 4),
        (Product.GATE_UP, 128): Blocks(64, 128, 8, 2, tail_rows=64),
        (Product.DOWN, 128): Blocks(128, 128, 8, 2, tail_rows=64),
    },
    (2, 8): {
        (Product.GATE_UP, 1): Blocks(16, 128, 2, 6),
        (Product.DOWN, 1): Blocks(32, 128, 2, 6),
        (Product.GATE_UP, 16): Blocks(64, 128, 4, 4),
        (Product.DOWN, 16): Blocks(128, 128, 4, 4),
        (Product.GATE_UP, 32): Blocks(64, 128, 4, 4),
        (Product.DOWN, 32): Blocks(128, 128, 4, 4),
        (Product.GATE_UP, 64): Blocks(64, 128, 4, 3),
        (Product.DOWN, 64): Blocks(128, 128, 4, 3),
        (Product.GATE_UP, 128): Blocks(64, 128, 8, 2, tail_rows=64),
        (Product.DOWN, 128): Blocks(128, 128, 8, 2, tail_rows=64),
    },
    (1, 8): {
        (Product.GATE_UP, 1): Blocks(64, 128, 4, 4),
        (Product.DOWN, 1): Blocks(64, 128, 4, 4),
        (Product.GATE_UP, 16): Blocks(128, 128, 4, 3),
        (Product.DOWN, 16): Blocks(128, 128, 4, 4),
        (Product.GATE_UP, 32): Blocks(128, 128, 8, 3),
        (Product.DOWN, 32): Blocks(128, 128, 4, 4),
        (Product.GATE_UP, 64): Blocks(128, 128, 8, 3),
        (Product.DOWN, 64): Blocks(128, 128, 8, 4),
        (Product.GATE_UP, 128): Blocks(64, 128, 8, 4, tail_rows=64),
        (Product.DOWN, 128): Blocks(128, 128, 8, 4, tail_rows=64),
    },
    (1, 4): {
        (Product.GATE_UP, 1): Blocks(32, 128, 4, 5),
        (Product.DOWN, 1): Blocks(64, 128, 4, 5),
        (Product.GATE_UP, 16): Blocks(64, 128, 4, 5),
        (Product.DOWN, 16): Blocks(64, 128, 4, 5),
        (Product.GATE_UP, 32): Blocks(64, 128, 4, 5),
        (Product.DOWN, 32): Blocks(64, 128, 4, 5),
        (Product.GATE_UP, 64): Blocks(64, 128, 8, 4),
        (Product.DOWN, 64): Blocks(128, 128, 8, 4),
        (Product.GATE_UP, 128): Blocks(32, 128, 4, 4, tail_rows=64),
        (Product.DOWN, 128): Blocks(64, 128, 4, 4, tail_rows=64),
    },
}
"""Of quantized weights: bytes of an operand and bits of a code, up to so many -> blocks.

Where turning codes into operands takes more time than anything else, and rows are few, two warps
multiply with the narrow products that need no waiting."""

SLIM_COLUMNS = {Product.GATE_UP: 64, Product.DOWN: 64}
"""Columns of a block at most where experts are slim and rows are few."""


def shipped_blocks(key: Key, device: Device) -> Blocks:
    """The table's own entry for a GPU, before it is made to fit."""
    if key.packing is not None:
        kind = (key.packing.operand_bytes, max(4, key.packing.bits))
        return _PACKED_PRODUCTS[kind][key.product, key.tile_rows]
    tables = [_WIDE_PRODUCTS if device.has_wide_products else _NARROW_PRODUCTS]
    if device.is_blackwell:
        tables = [_BLACKWELL, *tables]
    cut = (key.product, key.tile_rows)
    blocks = next(table[cut] for table in tables if cut in table)
    if key.width is Width.SLIM and key.tile_rows < LARGE_TILE:
        blocks = replace(blocks, columns=min(blocks.columns, SLIM_COLUMNS[key.product]))
    return blocks


@lru_cache(maxsize=4096)
def blocks_for(key: Key, device: Device, tuned: Blocks | None = None) -> Blocks:
    """What a product runs with: tuned blocks, or the table's, made to suit and to fit."""
    return fitted(suited(tuned or shipped_blocks(key, device), key), key, device)


def suited(blocks: Blocks, key: Key) -> Blocks:
    """The same blocks for the product's columns, next to each other or, transposed, not.

    Descriptors want steps that divide the columns: narrower ones, and as many bytes on their way.
    Unsorted slots read weights by rows, and transposed ones by columns. Quantized ones have steps
    of their own, and what a program rounds together is its block.
    """
    if key.packing is not None:
        columns = key.packing.columns or blocks.columns
        more_warps = blocks.num_warps * max(1, columns // blocks.columns)
        num_warps = blocks.num_warps if key.tile_rows < LARGE_TILE else more_warps
        cut = replace(blocks, columns=columns, depth=key.packing.depth, num_warps=num_warps)
        return replace(cut, uses_descriptors=False, is_persistent=False)
    can_divide = blocks.uses_descriptors and key.depth % MIN_DEPTH == 0
    while can_divide and key.depth % blocks.depth:
        blocks = replace(blocks, depth=blocks.depth // 2, num_stages=blocks.num_stages * 2)
    if key.tile_rows == DIRECT_TILE and key.is_transposed:
        columns = TRANSPOSED_COLUMNS[key.product]
        elements = blocks.columns * blocks.depth
        blocks = replace(blocks, columns=columns, depth=max(elements // columns, MIN_DEPTH))
    return blocks


MAX_BLACKWELL_WARPS = 8
"""With more, 8-bit products are narrow ones there."""


def fitted(blocks: Blocks, key: Key, device: Device) -> Blocks:
    """The same blocks, smaller until their memory is there: stages go first, then depth."""
    blocks = replace(
        blocks,
        num_stages=min(blocks.num_stages, MAX_STAGES),
        uses_descriptors=blocks.uses_descriptors and device.has_descriptors,
    )
    if device.is_blackwell and key.packing is not None:
        blocks = replace(blocks, num_warps=min(blocks.num_warps, MAX_BLACKWELL_WARPS))
    while device.is_blackwell and _tensor_columns(blocks, key) > TENSOR_COLUMNS:
        blocks = replace(blocks, columns=blocks.columns // 2)
    while shared_bytes(blocks, key, device) > device.shared_bytes:
        if blocks.num_stages > 2:
            blocks = replace(blocks, num_stages=blocks.num_stages - 1)
        elif blocks.depth > MIN_DEPTH and key.packing is None:
            blocks = replace(blocks, depth=blocks.depth // 2)
        elif blocks.columns > MIN_COLUMNS and not (key.packing and key.packing.columns):
            blocks = replace(blocks, columns=blocks.columns // 2)
        elif blocks.num_stages > 1 and key.packing is not None:
            blocks = replace(blocks, num_stages=1)
        else:
            break
    return blocks


def shared_bytes(blocks: Blocks, key: Key, device: Device) -> int:
    """Shared memory that a program takes: tiles in flight, and the result on its way out.

    A persistent program has both at once; another's result may be in fp32. An estimate from above,
    compared with what the compiler says by the tests of shipped configurations.
    """
    size = key.dtype.itemsize
    width = blocks.columns * (2 if key.is_doubled else 1)
    if key.packing is not None:
        return BARRIER_BYTES + _packed_bytes(blocks, key, key.packing, device)
    rows = key.tile_rows
    step = (rows + width) * blocks.depth * size
    result = rows * blocks.columns * size
    if key.tile_rows == DIRECT_TILE:
        step += rows * blocks.depth * size
    in_flight = blocks.num_stages * step
    if blocks.is_persistent:
        return BARRIER_BYTES + in_flight + result
    return BARRIER_BYTES + max(in_flight, result * 4 // size)


def _tensor_columns(blocks: Blocks, key: Key) -> int:
    """Columns that a program takes of the memory that Blackwell's products have of their own.

    Triton keeps the sums of each run of 16-bit operands apart there, and operands of two runs. 0
    where columns are given.
    """
    packing = key.packing
    if packing is None or packing.operand_bytes == 1 or packing.columns:
        return 0
    num_runs = 8 * packing.operand_bytes // packing.bits
    width = blocks.columns * (2 if key.is_doubled else 1)
    num_rows = max(key.tile_rows, PACKED_DIRECT_ROWS)
    return (num_runs * num_rows + OPERAND_COLUMNS) * width // TENSOR_ROWS


def _packed_bytes(blocks: Blocks, key: Key, packing: Packing, device: Device) -> int:
    """The same for quantized weights: their codes and scales, and rows as operands.

    What is read from shared memory into registers is there for the steps behind the one that is
    computed: codes that become operands, and all that products of warps read.
    """
    width = blocks.columns * (2 if key.is_doubled else 1)
    num_rows = max(key.tile_rows, PACKED_DIRECT_ROWS)
    weights = width * (blocks.depth * packing.bits // 8 + 4 * packing.scale_words)
    rows = num_rows * (blocks.depth * packing.operand_bytes + 4)
    read = whole = max(1, blocks.num_stages - 1)
    if device.has_wide_products:
        whole = blocks.num_stages
    is_decoded = packing.bits < 8 * packing.operand_bytes
    in_flight = (read if is_decoded else whole) * weights + whole * rows
    if is_decoded and device.is_blackwell:
        in_flight += weights  # a run of 8-bit operands
    result = num_rows * (width if is_decoded else blocks.columns) * 4
    return max(in_flight, result)


TENSOR_COLUMNS, TENSOR_ROWS = 512, 128
"""Of a processor's memory for products (source: PTX ISA, tensor memory)."""

OPERAND_COLUMNS = 32
"""Of operands beside sums of all rows."""

BARRIER_BYTES = 1024
"""For the barriers of copies in flight, and alignment."""
