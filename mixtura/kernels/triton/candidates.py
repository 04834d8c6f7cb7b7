"""What `mixtura tune` tries: the products of a model's experts, and blocks for each. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from mixtura.config import ExpertsConfig, GateUp
from mixtura.errors import InputError
from mixtura.kernels.triton.device import Device
from mixtura.kernels.triton.packed.quantization import Quantization
from mixtura.kernels.triton.regimes import SMALL_TILES, tiling_for
from mixtura.kernels.triton.table import (
    DIRECT_TILE,
    LARGE_TILE,
    MAX_STAGES,
    MIN_COLUMNS,
    MIN_DEPTH,
    PACKED_DIRECT_ROWS,
    Blocks,
    Key,
    Packing,
    Product,
    blocks_for,
    fitted,
    shared_bytes,
    suited,
)
from mixtura.types import Tiling

MAX_ROWS = 2**17
"""No batch has more."""

LARGE_SPAN = 4
"""Large tiles are measured at the first power of two of rows that makes them, and so many times
it: more rows are more of the same."""

MAX_CHANGES = 2
"""Fields of the table's blocks that a candidate changes at most."""

WARP_SIZE = 32
WIDE_ROWS, WIDE_WARPS = 64, 4
"""Rows of weights, or of a large tile, that a warp group of Hopper's takes at least."""

MAX_SUMS = 128
"""Sums of a product that a thread can hold in registers."""

MIN_SUMS = 4
"""Fewer leave a thread with more to read than to add."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """MoE layers of a model that run the same kernels.

    Attributes:
        config: sizes and layout of the experts. dtype: of rows, and of dense weights. top_k: K.
        quantization: of the weights; None where they are dense.
    """

    config: ExpertsConfig
    dtype: torch.dtype
    top_k: int
    quantization: Quantization | None = None

    def key(self, product: Product, tile_rows: int) -> Key:
        """What the entries for one of its products are found by."""
        config, quantization = self.config, self.quantization
        packing = None
        if quantization is not None:
            packing = quantization.packing(config, product, self.dtype)
        return Key(
            self.dtype,
            product,
            tile_rows,
            config.num_experts,
            config.hidden_size,
            config.intermediate_size,
            config.gate_up,
            config.is_transposed and packing is None,
            packing,
        )

    @property
    def weight_bits(self) -> int:
        """Of a weight of the down projection, but for scales."""
        packing = self.key(Product.DOWN, DIRECT_TILE).packing
        return 8 * self.dtype.itemsize if packing is None else packing.bits

    def tiling(self, num_rows: int) -> Tiling | None:
        """How slots of so many rows are cut; None where they are not sorted."""
        tiling = tiling_for(num_rows, self.top_k, self.config.num_experts)
        if tiling is None and self.config.post_norm is not None:
            return Tiling(SMALL_TILES[0])  # a norm has no kernel without tiles
        return tiling

    def tile_rows(self, num_rows: int) -> int:
        """The tiles that so many rows are cut in."""
        tiling = self.tiling(num_rows)
        return DIRECT_TILE if tiling is None else tiling.rows


@dataclass(frozen=True, slots=True)
class Case:
    """A product that is swept.

    Attributes:
        rows: numbers of rows M that it is measured at, all cut in tiles of `tile_rows`.
    """

    shape: LayerShape
    product: Product
    tile_rows: int
    rows: tuple[int, ...]

    @property
    def key(self) -> Key:
        """What its entry is found by."""
        return self.shape.key(self.product, self.tile_rows)


def cases_of(shapes: Iterable[LayerShape], rows: Sequence[int] = ()) -> tuple[Case, ...]:
    """The products of these layers by tile, each once: few rows first.

    Args:
        rows: numbers of rows to measure at; the fewest and the most of every tile unless given.

    Raises:
        InputError: a number of rows that is none.
    """
    for number in rows:
        if not 1 <= number <= MAX_ROWS:
            raise InputError(
                f"rows ({number}) must be from 1 to {MAX_ROWS}; got another number. Give numbers "
                f"of tokens in a batch."
            )
    cases: dict[tuple[Key, int], Case] = {}
    for shape in shapes:
        for tile_rows, numbers in _by_tile(shape, rows).items():
            for product in Product:
                case = Case(shape, product, tile_rows, numbers)
                cases.setdefault((case.key, shape.top_k), case)
    return tuple(cases.values())


def _by_tile(shape: LayerShape, rows: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Rows of a tile -> numbers of rows that are cut so."""
    found: dict[int, list[int]] = {}
    numbers = sorted(set(rows)) or [2**power for power in range(MAX_ROWS.bit_length())]
    for number in numbers:
        found.setdefault(shape.tile_rows(number), []).append(number)
    if not rows:
        for tile_rows, all_ in found.items():
            last = all_[-1] if tile_rows < LARGE_TILE else min(all_[-1], LARGE_SPAN * all_[0])
            found[tile_rows] = sorted({all_[0], last})
    return {tile_rows: tuple(kept) for tile_rows, kept in sorted(found.items())}


def candidates(key: Key, device: Device) -> tuple[Blocks, ...]:
    """Blocks worth measuring beside the table's: those most like them first.

    Each changes up to MAX_CHANGES fields; what does not fit the GPU, leaves threads idle or does
    not fit in registers is left out.
    """
    shipped = blocks_for(key, device)
    found: dict[Blocks, int] = {}
    for blocks in _grid(key, device) if key.packing is None else _packed_grid(key, key.packing):
        changes = _num_changes(blocks, shipped)
        is_as_it_runs = fitted(suited(blocks, key), key, device) == blocks
        if 0 < changes <= MAX_CHANGES and is_as_it_runs and _is_sensible(blocks, key, device):
            found[blocks] = changes
    return tuple(sorted(found, key=lambda blocks: found[blocks]))


def _grid(key: Key, device: Device) -> Iterator[Blocks]:
    """Every combination of what the fields may be."""
    is_direct = key.tile_rows == DIRECT_TILE
    descriptors = (True, False) if device.has_descriptors and not is_direct else (False,)
    tails = (0, 64) if key.tile_rows >= LARGE_TILE else (0,)
    for columns in (8, 16, 32, 64) if is_direct else (MIN_COLUMNS, 32, 64, 128, 256):
        for depth in (64, 128, 256, 512, 1024) if is_direct else (MIN_DEPTH, 64, 128, 256):
            for num_warps in (1, 2, 4, 8) if is_direct else (4, 8):
                for num_stages in range(1 if is_direct else 2, MAX_STAGES + 1):
                    plain = Blocks(columns, depth, num_warps, num_stages)
                    for by_descriptor, tail_rows in itertools.product(descriptors, tails):
                        blocks = replace(plain, uses_descriptors=by_descriptor, tail_rows=tail_rows)
                        yield blocks
                        if not is_direct:
                            yield replace(blocks, is_persistent=True)


def _packed_grid(key: Key, packing: Packing) -> Iterator[Blocks]:
    """The same for quantized weights, whose packing gives the depth and may give the columns."""
    tails = (0, 64) if key.tile_rows >= LARGE_TILE else (0,)
    columns = (packing.columns,) if packing.columns else (MIN_COLUMNS, 32, 64, 128, 256)
    stages = range(2, MAX_STAGES + 1)
    for cut in itertools.product(columns, (packing.depth,), (2, 4, 8, 16), stages):
        for tail_rows in tails:
            yield Blocks(*cut, tail_rows=tail_rows)


def _num_changes(blocks: Blocks, other: Blocks) -> int:
    pairs = (
        (blocks.columns, other.columns),
        (blocks.depth, other.depth),
        (blocks.num_warps, other.num_warps),
        (blocks.num_stages, other.num_stages),
        (blocks.uses_descriptors, other.uses_descriptors),
        (blocks.is_persistent, other.is_persistent),
        (blocks.tail_rows, other.tail_rows),
    )
    return sum(one != another for one, another in pairs)


def _is_sensible(blocks: Blocks, key: Key, device: Device) -> bool:
    """Whether the blocks are filled by the product, and every warp has its part of them."""
    if key.packing is not None:
        return _is_sensible_packed(blocks, key, key.packing, device)
    if blocks.columns >= 2 * max(key.num_columns, MIN_COLUMNS):
        return False
    if blocks.depth >= 2 * max(key.depth, MIN_DEPTH):
        return False
    sides = 2 if key.is_doubled else 1
    rows = blocks.depth if key.tile_rows == DIRECT_TILE else key.tile_rows
    sums = sides * rows * blocks.columns // (WARP_SIZE * blocks.num_warps)
    if not MIN_SUMS <= sums <= MAX_SUMS:
        return False
    if key.tile_rows == DIRECT_TILE or not device.has_wide_products:
        return True
    # Warp groups lie along the side of 64: the weights' under small tiles, the rows' under large.
    is_interleaved = key.product is Product.GATE_UP and key.gate_up is GateUp.INTERLEAVED
    wide = blocks.columns * (2 if is_interleaved else 1)
    if key.tile_rows >= LARGE_TILE:
        wide = key.tile_rows
    return wide >= WIDE_ROWS * (blocks.num_warps // WIDE_WARPS)


def _is_sensible_packed(blocks: Blocks, key: Key, packing: Packing, device: Device) -> bool:
    """The same for quantized weights, which are multiplied in every kernel."""
    if not packing.columns and blocks.columns >= 2 * max(key.num_columns, MIN_COLUMNS):
        return False
    if shared_bytes(blocks, key, device) > device.shared_bytes:
        return False
    sides = 2 if key.is_doubled else 1
    rows = max(key.tile_rows, PACKED_DIRECT_ROWS)
    sums = sides * rows * blocks.columns // (WARP_SIZE * blocks.num_warps)
    if not MIN_SUMS <= sums <= MAX_SUMS:
        return False
    if not device.has_wide_products:
        return True
    # Codes as wide as operands come from shared memory: gate and up are products of their own.
    is_decoded = packing.bits < 8 * packing.operand_bytes
    wide = blocks.columns * (sides if is_decoded else 1)
    if key.tile_rows >= LARGE_TILE and not is_decoded:
        wide = key.tile_rows * max(1, blocks.columns // WIDE_ROWS)
    return wide >= WIDE_ROWS * (blocks.num_warps // WIDE_WARPS)
