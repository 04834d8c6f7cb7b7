"""Tables of slots: how they are made, turned round, checked and named."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixtura.config.choice import require_positive
from mixtura.errors import InputError
from mixtura.parallel.topology import Topology

EMPTY = -1
"""What a slot without an expert holds, and what pads lists of replicas."""

IntArray = NDArray[np.int32]


def deal(num_experts: int, topology: Topology) -> IntArray:
    """(E,) the rank of each expert, dealt in turn to those that still have room."""
    require_positive("num_experts", num_experts)
    slots = np.array(topology.slots_per_rank)
    if num_experts > slots.sum():
        raise InputError(
            f"num_physical_experts ({slots.sum()}) must be at least num_experts; got "
            f"{num_experts} experts, {num_experts - slots.sum()} slots short. Give the ranks more "
            f"slots, or use more ranks."
        )
    rounds, ranks = np.nonzero(np.arange(slots.max())[:, None] < slots)
    return ranks[np.lexsort((ranks, rounds))][:num_experts].astype(np.int32)


def replica_table(physical_to_logical: IntArray, num_experts: int) -> tuple[IntArray, IntArray]:
    """Where each expert is, from (layers, P): (layers, E, max_replicas) and counts (layers, E).

    Slots ascend and are padded with -1 to the width of the expert that has most, in any layer.
    """
    num_layers, num_slots = physical_to_logical.shape
    layer = np.repeat(np.arange(num_layers), num_slots)
    slot = np.tile(np.arange(num_slots), num_layers)
    key = layer * num_experts + physical_to_logical.reshape(-1)
    is_held = physical_to_logical.reshape(-1) != EMPTY
    key, slot = key[is_held], slot[is_held]
    order = np.argsort(key, kind="stable")
    key, slot = key[order], slot[order]
    count = np.bincount(key, minlength=num_layers * num_experts)
    replica = np.arange(len(key)) - np.repeat(np.cumsum(count) - count, count)
    table = np.full((num_layers * num_experts, int(count.max())), EMPTY, np.int32)
    table[key, replica] = slot
    return table.reshape(num_layers, num_experts, -1), count.reshape(num_layers, -1).astype(
        np.int32
    )


def check_table(table: Tensor, shape: Sequence[int]) -> None:
    """Raise `InputError` unless the table is int32 of this shape, on the CPU."""
    expected = (tuple(shape), torch.int32, "cpu")
    found = (tuple(table.shape), table.dtype, table.device.type)
    if found != expected:
        raise InputError(
            f"physical_to_logical {found[0]} must be one int32 id for each of the topology's "
            f"slots, {expected[0]}, on the CPU; got {found[1]} on {found[2]}. Convert it, or use "
            f"the topology that it was made for."
        )


def check_experts(physical_to_logical: IntArray, num_experts: int) -> None:
    """Raise `InputError` where an id is out of range or an expert has no slot; (layers, P)."""
    require_positive("num_experts", num_experts)
    lowest, highest = physical_to_logical.min(), physical_to_logical.max()
    if lowest < EMPTY or highest >= num_experts:
        raise InputError(
            f"ids of physical_to_logical must be in [0, {num_experts}), or -1 for an empty slot; "
            f"got {lowest} to {highest}. Use logical ids."
        )
    is_held = np.zeros((len(physical_to_logical), num_experts + 1), bool)
    np.put_along_axis(is_held, physical_to_logical.astype(np.int64), True, axis=1)
    is_held = is_held[:, :num_experts]  # empty slots wrote the last column
    if not is_held.all():
        layer = int(np.argmin(is_held.all(1)))
        missing = np.nonzero(~is_held[layer])[0].tolist()
        shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        where = f" of layer {layer}" if len(is_held) > 1 else ""
        raise InputError(
            f"each expert of num_experts ({num_experts}) must have a slot; got none for expert "
            f"{shown}{where} ({len(missing)} in all). Place them, or give the ranks more slots."
        )


def digest_of(physical_to_logical: Tensor, num_experts: int, topology: Topology) -> str:
    """16 hexadecimal digits of the contents, the same on every machine."""
    sizes = (num_experts, topology.slots_per_rank, topology.node_of_rank)
    contents = physical_to_logical.numpy().astype("<i4").tobytes()
    shape = tuple(physical_to_logical.shape)
    return hashlib.blake2b(repr((sizes, shape)).encode() + contents, digest_size=8).hexdigest()
