"""Slots sorted by expert and cut in tiles on the device, against loops over slots and experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_device import DEVICE
from torch import Tensor

from mixtura.kernels.triton import align
from mixtura.kernels.triton.align import order_slots
from mixtura.types import ExpertOrder, Tiling

TILINGS = [Tiling(16), Tiling(4), Tiling(1)]
CANARY = -77


def loop_over_slots(
    ids: list[int], num_experts: int, tiling: Tiling
) -> tuple[list[int], list[int], list[list[int]]]:
    """(sort_order, expert_offsets, tiles)."""
    order: list[int] = []
    offsets, tiles = [0], []
    for expert in range(num_experts):
        order += [slot for slot, found in enumerate(ids) if found == expert]
        for row in range(offsets[-1], len(order), tiling.rows):
            tiles.append([expert, row, min(tiling.rows, len(order) - row), 0])
        offsets.append(len(order))
    return order, offsets, tiles


def check(order: ExpertOrder, ids: Tensor, num_experts: int) -> None:
    """An order is that of the loops, and stays within what was allocated for it."""
    assert order.ids is ids
    flat, tiling = ids.flatten().tolist(), order.tiling
    slots, offsets, tiles = loop_over_slots(flat, num_experts, tiling)
    assert order.sort_order.shape == (len(flat),)
    assert order.tiles.shape == (tiling.max_tiles(len(flat), num_experts), 4)
    assert all(
        part.dtype is torch.int32 and part.device == ids.device
        for part in (order.sort_order, order.expert_offsets, order.tiles, order.num_tiles)
    )
    assert order.expert_offsets.tolist() == offsets
    assert order.num_tiles.tolist() == [len(tiles)]
    assert order.sort_order[: len(slots)].tolist() == slots
    assert order.tiles[: len(tiles)].tolist() == tiles


def random_ids(num_rows: int, top_k: int, num_experts: int) -> Tensor:
    """Some of no expert, some beyond the last one."""
    shape = (num_rows, top_k)
    return torch.randint(-2, num_experts + 1, shape, dtype=torch.int32, device=DEVICE)


def only_one(num_rows: int, top_k: int, num_experts: int) -> Tensor:
    return torch.full((num_rows, top_k), num_experts - 1, dtype=torch.int32, device=DEVICE)


def none_at_all(num_rows: int, top_k: int, num_experts: int) -> Tensor:
    return torch.full((num_rows, top_k), -1, dtype=torch.int32, device=DEVICE)


def all_experts(num_rows: int, top_k: int, num_experts: int) -> Tensor:
    """K = L, in another order for every row."""
    rows = [torch.randperm(num_experts) for _ in range(num_rows)]
    return torch.stack(rows).to(DEVICE, torch.int32)


Makers = Callable[[int, int, int], Tensor]
CASES: list[tuple[Makers, int, int, int]] = [
    (random_ids, 0, 3, 4),
    (random_ids, 1, 1, 1),
    (random_ids, 1, 8, 60),
    (random_ids, 33, 3, 5),
    (random_ids, 9, 32, 160),
    (random_ids, 21, 4, 896),
    (only_one, 23, 3, 3),
    (none_at_all, 7, 2, 4),
    (all_experts, 11, 5, 5),
]


@pytest.mark.parametrize("make, num_rows, top_k, num_experts", CASES)
def test_one_launch_places_every_slot(
    make: Makers, num_rows: int, top_k: int, num_experts: int
) -> None:
    ids = make(num_rows, top_k, num_experts)
    check(order_slots(ids, num_experts, Tiling(4)), ids, num_experts)


@pytest.fixture
def in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three launches for any number of slots, and blocks that few of them fill."""
    monkeypatch.setattr(align, "ONE_LAUNCH_SLOTS", -1)
    monkeypatch.setattr(align, "BLOCK_SLOTS", ((1 << 30, 24),))


@pytest.mark.parametrize("make, num_rows, top_k, num_experts", CASES)
def test_three_launches_place_every_slot(
    in_blocks: None, make: Makers, num_rows: int, top_k: int, num_experts: int
) -> None:
    ids = make(num_rows, top_k, num_experts)
    check(order_slots(ids, num_experts, Tiling(4)), ids, num_experts)


@pytest.mark.parametrize("tiling", TILINGS)
def test_tiles_that_are_not_full(in_blocks: None, tiling: Tiling) -> None:
    """Experts of 0 to 9 slots."""
    counts = torch.arange(10)
    ids = torch.repeat_interleave(counts, counts)[torch.randperm(45)]
    ids = ids.view(9, 5).to(DEVICE, torch.int32)
    check(order_slots(ids, 10, tiling), ids, 10)


def test_more_blocks_than_the_scan_holds(in_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(align, "SCANNED_COUNTS", 64)
    ids = random_ids(41, 3, 20)
    assert align.scan_sizes(20, Tiling(4))["STEP"] == 2
    check(order_slots(ids, 20, Tiling(4)), ids, 20)


@pytest.mark.parametrize("num_slots", [align.ONE_LAUNCH_SLOTS, align.ONE_LAUNCH_SLOTS + 1])
def test_the_sizes_that_are_shipped(num_slots: int) -> None:
    ids = random_ids(num_slots, 1, 60)
    check(order_slots(ids, 60, Tiling(16)), ids, 60)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_beyond_the_experts_are_no_expert(dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    ids = torch.tensor([[0, info.max], [info.min, 1], [2, -1], [1, 3]], dtype=dtype, device=DEVICE)
    check(order_slots(ids, 3, Tiling(4)), ids, 3)


def test_ids_need_not_be_contiguous() -> None:
    ids = random_ids(4, 9, 5).T
    check(order_slots(ids, 5, Tiling(4)), ids, 5)


@pytest.mark.parametrize("is_in_blocks", [False, True])
def test_nothing_is_written_outside(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, is_in_blocks: bool
) -> None:
    if is_in_blocks:
        request.getfixturevalue("in_blocks")
    wide: list[Tensor] = []
    empty_order = align.empty_order

    def with_canaries(*arguments: Any) -> list[Tensor]:
        parts = []
        for part in empty_order(*arguments):
            around = part.new_full((part.numel() + 128,), CANARY)
            wide.append(around)
            parts.append(around[64:-64].view(part.shape))
        return parts

    monkeypatch.setattr(align, "empty_order", with_canaries)
    for make, *sizes in CASES:
        ids = make(*sizes)
        check(order_slots(ids, sizes[2], Tiling(4)), ids, sizes[2])
    assert all((part[:64] == CANARY).all() and (part[-64:] == CANARY).all() for part in wide)


def test_a_compiled_order_is_one_graph() -> None:
    def place(ids: Tensor) -> tuple[Tensor, bool]:
        order = order_slots(ids, 5, Tiling(4))
        return order.sort_order, order.ids is ids

    ids = torch.randint(0, 5, (7, 2), dtype=torch.int32, device=DEVICE)
    found, is_same = torch.compile(place, backend="eager", fullgraph=True)(ids)
    assert is_same and found.equal(order_slots(ids, 5, Tiling(4)).sort_order)


def test_the_operator_keeps_its_promises() -> None:
    checks = ("test_schema", "test_faketensor")
    ids = all_experts(3, 4, 4)
    operator = torch.ops.mixtura.triton_order.default
    torch.library.opcheck(operator, (ids, 4, 4), test_utils=checks)
