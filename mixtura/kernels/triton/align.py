"""Slots sorted by expert and cut in tiles, on the device: ids (M,K) -> `ExpertOrder`.

N slots, K of each row; L experts. A block is a run of consecutive slots that one program sorts.

    few slots    one launch: one program counts, scans, sorts and writes
    more         three: `_count` per block | `_scan` over blocks and experts | `_scatter` per block

Nothing here depends on the ids but what is written: sizes and launches follow from (N, L, tiling),
so that a captured graph holds for any ids. An expert's slots stay in rising order, since a block is
sorted by (expert, slot): there are no atomics, and a result is the same every time.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixtura.kernels.triton.offline import CompileCase
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
    TAIL_ROWS: tl.constexpr,
):
    """Write first rows and numbers of tiles; -> first row, tile and tail of every expert (BLOCK_L,)

    Counts 5 0 9 with tiles of 4 and tails of 1: offsets 0 5 5 14, first tiles 0 1 1 (1 0 2 tiles),
    first tails 0 1 1 (1 0 1 tails).
    """
    expert = tl.arange(0, BLOCK_L)
    ends = tl.cumsum(counts, 0)
    left = counts % ROWS
    has_tail = ((left > 0) & (left <= TAIL_ROWS)).to(tl.int32)
    tiles = counts // ROWS + (left > TAIL_ROWS).to(tl.int32)
    tl.store(expert_offsets, 0)
    tl.store(expert_offsets + 1 + expert, ends, mask=expert < L)
    tl.store(num_tiles, tl.sum(tiles, 0))
    tl.store(num_tiles + 1, tl.sum(has_tail, 0))
    return ends - counts, tl.cumsum(tiles, 0) - tiles, tl.cumsum(has_tail, 0) - has_tail


@triton.jit
def write_places(
    experts,
    slots,
    ranks,
    first_rows,
    counts,
    first_tiles,
    first_tails,
    sort_order,
    tiles,
    max_tiles,
    L: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL_ROWS: tl.constexpr,
):
    """Write each slot at its row, and a tile for every slot that begins one. All are (SIZE,).

    The slot of rank r begins a tile where r divides by ROWS; a tail has fewer rows than a tile, and
    at most TAIL_ROWS. Rank 4 of an expert with 5 slots from row 7 on, tiles of 4 and tails of 1:
    row 11, and the tail (expert, 11, 1, 0).
    """
    has_expert = experts < L
    row = first_rows + ranks
    tl.store(sort_order + row, slots, mask=has_expert)
    left = counts - ranks
    is_tail = (left < ROWS) & (left <= TAIL_ROWS)
    entry = tl.where(is_tail, max_tiles + first_tails, first_tiles + ranks // ROWS)
    begins = has_expert & (ranks % ROWS == 0)
    tile = tiles + entry * 4
    tl.store(tile, experts, mask=begins)
    tl.store(tile + 1, row, mask=begins)
    tl.store(tile + 2, tl.minimum(left, ROWS), mask=begins)
    tl.store(tile + 3, tl.zeros_like(row), mask=begins)


@triton.jit
def place_all(
    ids,
    sort_order,
    expert_offsets,
    tiles,
    num_tiles,
    N,
    max_tiles,
    L: tl.constexpr,
    BLOCK_L: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL_ROWS: tl.constexpr,
):
    """Sort and place all N <= SIZE slots in one program."""
    slot = tl.arange(0, SIZE)
    experts = tl.load(ids + slot, mask=slot < N, other=-1)
    counts = counted(experts, L, BLOCK_L)
    first_rows, first_tiles, first_tails = scanned(
        counts, expert_offsets, num_tiles, L, BLOCK_L, ROWS, TAIL_ROWS
    )
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
        tl.gather(first_tails, real, 0),
        sort_order,
        tiles,
        max_tiles,
        L,
        ROWS,
        TAIL_ROWS,
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


@triton.jit(do_not_specialize=["N", "max_tiles"])
def _place(
    ids,
    sort_order,
    expert_offsets,
    tiles,
    num_tiles,
    N,
    max_tiles,
    L: tl.constexpr,
    BLOCK_L: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL_ROWS: tl.constexpr,
):
    """All slots, by one program."""
    place_all(
        ids,
        sort_order,
        expert_offsets,
        tiles,
        num_tiles,
        N,
        max_tiles,
        L,
        BLOCK_L,
        SIZE,
        ROWS,
        TAIL_ROWS,
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
    firsts,
    expert_offsets,
    num_tiles,
    num_blocks,
    L: tl.constexpr,
    BLOCK_L: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL_ROWS: tl.constexpr,
):
    """Turn counts (blocks, L) into what a slot's rank is short of its place in its sorted block.

    In place: `counts[b, e]` becomes the slots of expert e in blocks before b, less the slots of
    experts before e in block b. `firsts` (2, L) gets the first tile and tail of every expert. Two
    experts, counts (2 1) (0 3): (0 -2) (2 1); the first slot of expert 1 in the second block is the
    first in it, place 0, and of rank 1.
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
    _, first_tiles, first_tails = scanned(
        total, expert_offsets, num_tiles, L, BLOCK_L, ROWS, TAIL_ROWS
    )
    tl.store(firsts + expert, first_tiles, mask=expert < L)
    tl.store(firsts + L + expert, first_tails, mask=expert < L)


@triton.jit(do_not_specialize=["N", "max_tiles"])
def _scatter(
    ids,
    before,
    firsts,
    expert_offsets,
    sort_order,
    tiles,
    N,
    max_tiles,
    L: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL_ROWS: tl.constexpr,
):
    """Sort a block's slots and write each at its row; `before` and `firsts` are `_scan`'s."""
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
        tl.load(firsts + experts, mask=mask, other=0),
        tl.load(firsts + L + experts, mask=mask, other=0),
        sort_order,
        tiles,
        max_tiles,
        L,
        ROWS,
        TAIL_ROWS,
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
    sizes = (num_experts, tiling.rows, tiling.tail_rows)
    if torch.compiler.is_compiling():
        parts: list[Tensor] = torch.ops.mixtura.triton_order(local_ids, *sizes)
    else:
        parts = empty_order(local_ids, local_ids.numel(), *sizes)
        with on_device(local_ids):
            _order(local_ids.contiguous(), num_experts, tiling, parts)
    return named_order(local_ids, parts, tiling)


def named_order(ids: Tensor, parts: list[Tensor], tiling: Tiling) -> ExpertOrder:
    """What `empty_order` made room for, filled."""
    sort_order, expert_offsets, tiles, num_tiles = parts
    return ExpertOrder(ids, sort_order, expert_offsets, tiles, num_tiles, tiling)


def empty_order(
    like: Tensor, num_slots: int, num_experts: int, rows: int, tail_rows: int
) -> list[Tensor]:
    """Room for `sort_order`, `expert_offsets`, `tiles` and `num_tiles` of an `ExpertOrder`."""
    num_entries = sum(Tiling(rows, tail_rows).max_tiles(num_slots, num_experts))
    shapes = ((num_slots,), (num_experts + 1,), (num_entries, 4), (2,))
    return [like.new_empty(shape, dtype=torch.int32) for shape in shapes]


def _order(ids: Tensor, num_experts: int, tiling: Tiling, parts: list[Tensor]) -> None:
    num_slots = ids.numel()
    if num_slots <= ONE_LAUNCH_SLOTS:
        max_tiles, _ = tiling.max_tiles(num_slots, num_experts)
        _place[(1,)](
            ids, *parts, num_slots, max_tiles, **place_sizes(num_slots, num_experts, tiling)
        )
        return
    block = block_slots(num_slots)
    num_blocks = triton.cdiv(num_slots, block)
    counts = ids.new_empty((num_blocks, num_experts), dtype=torch.int32)
    _count[(num_blocks,)](ids, counts, num_slots, **count_sizes(block, num_experts))
    scan_and_scatter(ids, counts, block, num_experts, tiling, parts)


def scan_and_scatter(
    ids: Tensor, counts: Tensor, block: int, num_experts: int, tiling: Tiling, parts: list[Tensor]
) -> None:
    """The two launches behind the one that wrote `counts` (blocks, L) of blocks of `block` slots.

    Overwrites `counts`.
    """
    sort_order, expert_offsets, tiles, num_tiles = parts
    num_slots, num_blocks = ids.numel(), counts.shape[0]
    firsts = counts.new_empty((2, num_experts))
    max_tiles, _ = tiling.max_tiles(num_slots, num_experts)
    _scan[(1,)](
        counts,
        firsts,
        expert_offsets,
        num_tiles,
        num_blocks,
        **scan_sizes(num_experts, tiling),
    )
    _scatter[(num_blocks,)](
        ids,
        counts,
        firsts,
        expert_offsets,
        sort_order,
        tiles,
        num_slots,
        max_tiles,
        **scatter_sizes(block, num_experts, tiling),
    )


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Launches inside go to the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


# --------------------------------------------------------------------------- sizes of the programs


def block_slots(num_slots: int) -> int:
    """Slots of a block, where there are `num_slots` in all."""
    return next((size for limit, size in BLOCK_SLOTS if num_slots <= limit), MAX_BLOCK_SLOTS)


def sort_size(num_slots: int) -> int:
    """Slots that are sorted at once, for so many: one of few, as each is a kernel of its own."""
    return next(size for size in (64, 256, 1024, 2048) if num_slots <= size)


def experts_room(num_experts: int) -> int:
    """Experts that a row of counts has room for."""
    room: int = triton.next_power_of_2(num_experts)
    return max(MIN_EXPERTS, room)


def place_sizes(num_slots: int, num_experts: int, tiling: Tiling) -> dict[str, int]:
    """Constants of a program that places all slots."""
    size, room = sort_size(num_slots), experts_room(num_experts)
    return {
        "L": num_experts,
        "BLOCK_L": room,
        "SIZE": size,
        "ROWS": tiling.rows,
        "TAIL_ROWS": tiling.tail_rows,
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
        "TAIL_ROWS": tiling.tail_rows,
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
        "TAIL_ROWS": tiling.tail_rows,
        "num_warps": warps_for(size),
    }


def warps_for(elements: int) -> int:
    """Four elements to a thread, of 4 to 16 warps."""
    return min(16, max(4, elements // 128))


def shipped() -> list[CompileCase]:
    """Specialisations that stand for all: the least and the most of every size."""
    tiling = Tiling(128, 64)
    arguments: tuple[str, ...]
    cases = []
    for num_experts in (8, 128, 1024):
        for num_slots in (64, 256, 1024, ONE_LAUNCH_SLOTS):
            arguments = ("ids", "sort_order", "expert_offsets", "tiles", "num_tiles")
            name = f"place {num_slots} slots, {num_experts} experts"
            sizes = place_sizes(num_slots, num_experts, tiling)
            cases.append(_case(name, _place, arguments, ("N", "max_tiles"), sizes))
        for block in (*(size for _, size in BLOCK_SLOTS), MAX_BLOCK_SLOTS):
            name = f"count {block} slots, {num_experts} experts"
            sizes = count_sizes(block, num_experts)
            cases.append(_case(name, _count, ("ids", "counts"), ("N",), sizes))
        arguments = ("counts", "firsts", "expert_offsets", "num_tiles")
        name, sizes = f"scan {num_experts} experts", scan_sizes(num_experts, tiling)
        cases.append(_case(name, _scan, arguments, ("num_blocks",), sizes))
    for block in (*(size for _, size in BLOCK_SLOTS), MAX_BLOCK_SLOTS):
        arguments = ("ids", "before", "firsts", "expert_offsets", "sort_order", "tiles")
        name, sizes = f"scatter {block} slots", scatter_sizes(block, 128, tiling)
        cases.append(_case(name, _scatter, arguments, ("N", "max_tiles"), sizes))
    return cases


def _case(
    name: str, fn: Any, pointers: tuple[str, ...], numbers: tuple[str, ...], sizes: dict[str, int]
) -> CompileCase:
    signature = dict.fromkeys(pointers, "*i32:16") | dict.fromkeys(numbers, "i32")
    constants = {key: value for key, value in sizes.items() if key != "num_warps"}
    return CompileCase(name, fn, signature, constants, sizes["num_warps"])


# --------------------------------------------------------------------------------------- operators


@torch.library.custom_op("mixtura::triton_order", mutates_args=())
def _triton_order(ids: Tensor, num_experts: int, rows: int, tail_rows: int) -> list[Tensor]:
    parts = empty_order(ids, ids.numel(), num_experts, rows, tail_rows)
    with on_device(ids):
        _order(ids.contiguous(), num_experts, Tiling(rows, tail_rows), parts)
    return parts


@_triton_order.register_fake
def _(ids: Tensor, num_experts: int, rows: int, tail_rows: int) -> list[Tensor]:
    return empty_order(ids, ids.numel(), num_experts, rows, tail_rows)
