"""Slots sorted by expert and cut in tiles, on the device: ids (M,K) -> `ExpertOrder`.

N slots, K of each row; L experts. A block is a run of consecutive slots that one program sorts.

    few slots    one launch: one program counts, scans, sorts and writes
    more         three: `_count` per block | `_scan` over blocks and experts | `_scatter` per block

Nothing here depends on the ids but what is written: sizes and launches follow from (N, L, tiling),
so that a captured graph holds for any ids. An expert's slots stay in rising order, since a block is
sorted by (expert, slot): there are no atomics, and a result is the same every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixtura.cuda import on_device
from mixtura.kernels.triton.buffers import empty
from mixtura.kernels.triton.launch import Launch, cdiv, next_power_of_2
from mixtura.types import ExpertOrder, Tiling

ONE_LAUNCH_SLOTS = 2048
"""Slots that one program places: what it sorts at once in registers."""

BLOCK_SLOTS = ((1 << 15, 256), (1 << 18, 1024))
"""Slots up to which a block has so many; the scan reads a row of counts per block."""

MAX_BLOCK_SLOTS = 2048

SCANNED_COUNTS = 8192
"""Counts (blocks x experts) that the scan holds at once: 16 for each of 512 threads."""

MIN_EXPERTS = 32
"""Experts that a count has room for at least: a warp's."""


# ------------------------------------------------------------------------------- parts of kernels


@triton.jit
def _bit(BIT: tl.constexpr, BITS: tl.constexpr):
    """Bit BIT of an index, along its own dimension of a cube of BITS dimensions of 2."""
    return tl.reshape(tl.arange(0, 2), [1] * (BITS - BIT - 1) + [2] + [1] * BIT)


@triton.jit
def _exchanged(cube, BIT: tl.constexpr, RUN: tl.constexpr, BITS: tl.constexpr):
    """One step of the network: keys whose indices differ in BIT change places or stay."""
    other = tl.sum(cube, BITS - 1 - BIT, keep_dims=True) - cube
    # Runs of 2^RUN rise and fall in turn, by the bit above them; the last one rises.
    falls = _bit(RUN, BITS) if RUN < BITS else 0
    takes_larger = _bit(BIT, BITS) != falls
    return tl.where(takes_larger, tl.maximum(cube, other), tl.minimum(cube, other))


@triton.jit
def ascending(keys, SIZE: tl.constexpr):
    """Sort int32 keys (SIZE,), a power of two: a bitonic network over the bits of the index.

    `tl.sort` is the same network, but takes the interpreter minutes: here a pair meets in a sum.
    """
    BITS: tl.constexpr = SIZE.bit_length() - 1
    cube = tl.reshape(keys, [2] * BITS)
    for run in tl.static_range(1, BITS + 1):
        for below in tl.static_range(run):
            cube = _exchanged(cube, run - 1 - below, run, BITS)
    return tl.reshape(cube, [SIZE])


@triton.jit
def sorted_by_expert(experts, L: tl.constexpr, SIZE: tl.constexpr):
    """Sort a block's slots (SIZE,) by expert; those of none (< 0 or >= L) come last, as expert L.

    Returns (experts, slots), slots counted within the block. Experts 1 0 -1 1 of two -> experts
    0 1 1 2, slots 1 0 3 2.
    """
    has_expert = (experts >= 0) & (experts < L)
    keys = tl.where(has_expert, experts.to(tl.int32), L) * SIZE + tl.arange(0, SIZE)
    keys = ascending(keys, SIZE)
    return keys // SIZE, keys % SIZE


@triton.jit
def counted(experts, L: tl.constexpr, BLOCK_L: tl.constexpr):
    """Slots of every expert (BLOCK_L,) among `experts`; of none are not counted."""
    has_expert = (experts >= 0) & (experts < L)
    return tl.histogram(tl.where(has_expert, experts.to(tl.int32), 0), BLOCK_L, mask=has_expert)


@triton.jit
def scanned(
    counts,
    expert_offsets,
    num_tiles,
    L: tl.constexpr,
    BLOCK_L: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write first rows and the number of tiles; -> first row and tile of every expert (BLOCK_L,).

    Counts 5 0 9 with tiles of 4: offsets 0 5 5 14, first tiles 0 2 2 (2 0 3 tiles).
    """
    expert = tl.arange(0, BLOCK_L)
    ends = tl.cumsum(counts, 0)
    tiles = (counts + ROWS - 1) // ROWS
    tl.store(expert_offsets, 0)
    tl.store(expert_offsets + 1 + expert, ends, mask=expert < L)
    tl.store(num_tiles, tl.sum(tiles, 0))
    return ends - counts, tl.cumsum(tiles, 0) - tiles


@triton.jit
def write_places(
    experts,
    slots,
    ranks,
    first_rows,
    counts,
    first_tiles,
    sort_order,
    tiles,
    L: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write each slot at its row, and a tile for every slot that begins one. All are (SIZE,).

    The slot of rank r begins a tile where ROWS divides r. Rank 4 of an expert with 5 slots from row
    7 on, tiles of 4: row 11, and the tile (expert, 11, 1, 0).
    """
    has_expert = experts < L
    row = first_rows + ranks
    tl.store(sort_order + row, slots, mask=has_expert)
    begins = has_expert & (ranks % ROWS == 0)
    tile = tiles + (first_tiles + ranks // ROWS) * 4
    tl.store(tile, experts, mask=begins)
    tl.store(tile + 1, row, mask=begins)
    tl.store(tile + 2, tl.minimum(counts - ranks, ROWS), mask=begins)
    tl.store(tile + 3, tl.zeros_like(row), mask=begins)


@triton.jit
def place_all(
    ids,
    sort_order,
    expert_offsets,
    tiles,
    num_tiles,
    N,
    L: tl.constexpr,
    BLOCK_L: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sort and place all N <= SIZE slots in one program."""
    slot = tl.arange(0, SIZE)
    experts = tl.load(ids + slot, mask=slot < N, other=-1)
    counts = counted(experts, L, BLOCK_L)
    first_rows, first_tiles = scanned(counts, expert_offsets, num_tiles, L, BLOCK_L, ROWS)
    experts, slots = sorted_by_expert(experts, L, SIZE)
    real = tl.minimum(experts, L - 1)
    first_row = tl.gather(first_rows, real, 0)
    write_places(
        experts,
        slots,
        tl.arange(0, SIZE) - first_row,
        first_row,
        tl.gather(counts, real, 0),
        tl.gather(first_tiles, real, 0),
        sort_order,
        tiles,
        L,
        ROWS,
    )


@triton.jit
def count_block(
    ids,
    counts,
    N,
    L: tl.constexpr,
    BLOCK_L: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write how many of this block's slots each expert has: a row of `counts` (blocks, L)."""
    block = tl.program_id(0)
    within = tl.arange(0, SIZE)
    slot = block.to(tl.int64) * BLOCK + within
    experts = tl.load(ids + slot, mask=(within < BLOCK) & (slot < N), other=-1)
    expert = tl.arange(0, BLOCK_L)
    row = counts + block.to(tl.int64) * L
    tl.store(row + expert, counted(experts, L, BLOCK_L), mask=expert < L)


# ------------------------------------------------------------------------------------------ kernels


@triton.jit(do_not_specialize=["N"])
def _place(
    ids,
    sort_order,
    expert_offsets,
    tiles,
    num_tiles,
    N,
    L: tl.constexpr,
    BLOCK_L: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """All slots, by one program."""
    place_all(
        ids,
        sort_order,
        expert_offsets,
        tiles,
        num_tiles,
        N,
        L,
        BLOCK_L,
        SIZE,
        ROWS,
    )


@triton.jit(do_not_specialize=["N"])
def _count(
    ids,
    counts,
    N,
    L: tl.constexpr,
    BLOCK_L: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The slots of every expert, a block to a program."""
    count_block(ids, counts, N, L, BLOCK_L, SIZE, BLOCK)


@triton.jit(do_not_specialize=["num_blocks"])
def _scan(
    counts,
    first_tiles,
    expert_offsets,
    num_tiles,
    num_blocks,
    L: tl.constexpr,
    BLOCK_L: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Turn counts (blocks, L) into what a slot's rank is short of its place in its sorted block.

    In place: `counts[b, e]` becomes the slots of expert e in blocks before b, less the slots of
    experts before e in block b. `first_tiles` (L,) gets every expert's. Two experts, counts (2 1)
    (0 3): (0 -2) (2 1); the first slot of expert 1 in the second block is the first in it, place 0,
    and of rank 1.
    """
    expert = tl.arange(0, BLOCK_L)
    step = tl.arange(0, STEP)
    total = tl.zeros((BLOCK_L,), tl.int32)
    for first in range(0, num_blocks, STEP):
        block = first + step
        at = counts + block.to(tl.int64)[:, None] * L + expert[None, :]
        mask = (block < num_blocks)[:, None] & (expert < L)[None, :]
        found = tl.load(at, mask=mask, other=0)
        before = total[None, :] + tl.cumsum(found, 0) - tl.cumsum(found, 1)
        tl.store(at, before, mask=mask)
        total += tl.sum(found, 0)
    _, found_tiles = scanned(total, expert_offsets, num_tiles, L, BLOCK_L, ROWS)
    tl.store(first_tiles + expert, found_tiles, mask=expert < L)


@triton.jit(do_not_specialize=["N"])
def _scatter(
    ids,
    before,
    first_tiles,
    expert_offsets,
    sort_order,
    tiles,
    N,
    L: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sort a block's slots and write each at its row; `before` and `first_tiles` are `_scan`'s."""
    block = tl.program_id(0)
    within = tl.arange(0, SIZE)
    slot = block.to(tl.int64) * BLOCK + within
    experts = tl.load(ids + slot, mask=(within < BLOCK) & (slot < N), other=-1)
    experts, slots = sorted_by_expert(experts, L, SIZE)
    mask = experts < L
    first_row = tl.load(expert_offsets + experts, mask=mask, other=0)
    short = tl.load(before + block.to(tl.int64) * L + experts, mask=mask, other=0)
    write_places(
        experts,
        block * BLOCK + slots,
        short + within,
        first_row,
        tl.load(expert_offsets + 1 + experts, mask=mask, other=0) - first_row,
        tl.load(first_tiles + experts, mask=mask, other=0),
        sort_order,
        tiles,
        L,
        ROWS,
    )


# ----------------------------------------------------------------------------------------- launches


def order_slots(local_ids: Tensor, num_experts: int, tiling: Tiling) -> ExpertOrder:
    """Sort the slots of ids that somebody else chose, and cut them in tiles.

    No tensor is waited for, and launches depend on sizes alone.

    Args:
        local_ids: (M, K) int32 or int64; what is outside [0, num_experts) is no expert.
        num_experts: L.
        tiling: how sorted slots are cut.

    Returns:
        the order, with `local_ids` itself as its ids.
    """
    if torch.compiler.is_compiling():
        parts: list[Tensor] = torch.ops.mixtura.triton_order(local_ids, num_experts, tiling.rows)
    else:
        parts = _order(local_ids, num_experts, tiling)
    return named_order(local_ids, parts, tiling)


def named_order(ids: Tensor, parts: list[Tensor], tiling: Tiling) -> ExpertOrder:
    """What `empty_order` made room for, filled."""
    sort_order, expert_offsets, tiles, num_tiles = parts
    return ExpertOrder(ids, sort_order, expert_offsets, tiles, num_tiles, tiling)


def empty_order(like: Tensor, num_slots: int, num_experts: int, tiling: Tiling) -> list[Tensor]:
    """Room for `sort_order`, `expert_offsets`, `tiles` and `num_tiles` of an `ExpertOrder`."""
    num_tiles = tiling.max_tiles(num_slots, num_experts)
    shapes = ((num_slots,), (num_experts + 1,), (num_tiles, 4), (1,))
    return [empty(like, "sorted slots", shape, torch.int32) for shape in shapes]


def _order(ids: Tensor, num_experts: int, tiling: Tiling) -> list[Tensor]:
    parts = empty_order(ids, ids.numel(), num_experts, tiling)
    with on_device(ids.device):
        for launch in order_launches(ids.contiguous(), num_experts, tiling, parts):
            launch.run()
    return parts


def order_launches(
    ids: Tensor, num_experts: int, tiling: Tiling, parts: list[Tensor]
) -> list[Launch]:
    """What fills the parts of an order: one launch, or three."""
    num_slots = ids.numel()
    if num_slots <= ONE_LAUNCH_SLOTS:
        sizes = place_sizes(num_slots, num_experts, tiling)
        return [Launch(_place, (1,), (ids, *parts, num_slots), sizes)]
    block = block_slots(num_slots)
    num_blocks = cdiv(num_slots, block)
    counts = empty(ids, "slots per block and expert", (num_blocks, num_experts), torch.int32)
    count = Launch(_count, (num_blocks,), (ids, counts, num_slots), count_sizes(block, num_experts))
    return [count, *scan_and_scatter(ids, counts, block, num_experts, tiling, parts)]


def scan_and_scatter(
    ids: Tensor, counts: Tensor, block: int, num_experts: int, tiling: Tiling, parts: list[Tensor]
) -> list[Launch]:
    """The two launches behind the one that wrote `counts` (blocks, L) of blocks of `block` slots.

    They overwrite `counts`.
    """
    sort_order, expert_offsets, tiles, num_tiles = parts
    num_blocks = counts.shape[0]
    first_tiles = counts.new_empty((num_experts,))
    written = (counts, first_tiles, expert_offsets, num_tiles, num_blocks)
    read = (ids, counts, first_tiles, expert_offsets, sort_order, tiles, ids.numel())
    return [
        Launch(_scan, (1,), written, scan_sizes(num_experts, tiling)),
        Launch(_scatter, (num_blocks,), read, scatter_sizes(block, num_experts, tiling)),
    ]


# --------------------------------------------------------------------------- sizes of the programs


def block_slots(num_slots: int) -> int:
    """Slots of a block, where there are `num_slots` in all."""
    return next((size for limit, size in BLOCK_SLOTS if num_slots <= limit), MAX_BLOCK_SLOTS)


def sort_size(num_slots: int) -> int:
    """Slots that are sorted at once, for so many: one of few, as each is a kernel of its own."""
    return next(size for size in (64, 256, 1024, 2048) if num_slots <= size)


def experts_room(num_experts: int) -> int:
    """Experts that a row of counts has room for."""
    room: int = next_power_of_2(num_experts)
    return max(MIN_EXPERTS, room)


def place_sizes(num_slots: int, num_experts: int, tiling: Tiling) -> dict[str, int]:
    """Constants of a program that places all slots."""
    size, room = sort_size(num_slots), experts_room(num_experts)
    return {
        "L": num_experts,
        "BLOCK_L": room,
        "SIZE": size,
        "ROWS": tiling.rows,
        "num_warps": warps_for(max(size, room)),
    }


def count_sizes(block: int, num_experts: int) -> dict[str, int]:
    """Constants of a program that counts a block."""
    size, room = sort_size(block), experts_room(num_experts)
    return {
        "L": num_experts,
        "BLOCK_L": room,
        "SIZE": size,
        "BLOCK": block,
        "num_warps": warps_for(max(size, room)),
    }


def scan_sizes(num_experts: int, tiling: Tiling) -> dict[str, int]:
    """Constants of the program that scans counts."""
    room = experts_room(num_experts)
    return {
        "L": num_experts,
        "BLOCK_L": room,
        "STEP": min(128, SCANNED_COUNTS // room),
        "ROWS": tiling.rows,
        "num_warps": 16,
    }


def scatter_sizes(block: int, num_experts: int, tiling: Tiling) -> dict[str, int]:
    """Constants of a program that scatters a block."""
    size = sort_size(block)
    return {
        "L": num_experts,
        "SIZE": size,
        "BLOCK": block,
        "ROWS": tiling.rows,
        "num_warps": warps_for(size),
    }


def warps_for(elements: int) -> int:
    """Four elements to a thread, of 4 to 16 warps."""
    return min(16, max(4, elements // 128))


# --------------------------------------------------------------------------------------- operators


@torch.library.custom_op("mixtura::triton_order", mutates_args=())
def _triton_order(ids: Tensor, num_experts: int, rows: int) -> list[Tensor]:
    return _order(ids, num_experts, Tiling(rows))


@_triton_order.register_fake
def _(ids: Tensor, num_experts: int, rows: int) -> list[Tensor]:
    return empty_order(ids, ids.numel(), num_experts, Tiling(rows))
