"""The host's side of the experts on a GPU: sizes, buffers, grids. It never waits for the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mixtura.config import Activation, ExpertsConfig, GateUp, LimitOn, WeightOn
from mixtura.cuda import on_device
from mixtura.errors import InputError
from mixtura.kernels.triton.align import order_slots
from mixtura.kernels.triton.buffers import empty
from mixtura.kernels.triton.combine import combine_kernel
from mixtura.kernels.triton.device import Device, device_of
from mixtura.kernels.triton.direct import direct_down_kernel, direct_gate_up_kernel
from mixtura.kernels.triton.down import down_kernel
from mixtura.kernels.triton.gate_up import gate_up_kernel
from mixtura.kernels.triton.launch import Launch, cdiv, next_power_of_2
from mixtura.kernels.triton.regimes import SMALL_TILES, Regime, regime_for, tiling_for
from mixtura.kernels.triton.table import (
    DIRECT_TILE,
    LARGE_TILE,
    Blocks,
    Key,
    Product,
    blocks_for,
    shared_bytes,
)
from mixtura.kernels.triton.tuned import tuned_for
from mixtura.types import ExpertBatch, ExpertOrder, ExpertWeights, Tiling

TILES_PER_GROUP = 8
"""Large tiles that share the weights they read; see `tile_of`."""

COMBINE_COLUMNS = 1024
"""Columns that one program adds."""

DESCRIPTOR_ALIGNMENT = 16
"""Bytes; of a descriptor's address and strides."""


def run_experts(
    weights: ExpertWeights, batch: ExpertBatch, weight_on: WeightOn, reduce: bool
) -> Tensor:
    """See `ExpertsKernel.run`; the rows' order is made where the batch does not bring it."""
    config = weights.config
    rows, ids = batch.hidden_states, batch.local_ids
    num_rows, top_k = ids.shape
    there = weights.device
    if not rows.device == ids.device == batch.topk_weights.device == there:
        raise InputError(
            f"rows, ids and routing weights ({rows.device}, {ids.device}, "
            f"{batch.topk_weights.device}) must be on the device of the experts; got {there} "
            f"there. Move them together."
        )
    if num_rows == 0 or top_k == 0:
        shape = (num_rows, config.hidden_size) if reduce else (num_rows, top_k, config.hidden_size)
        return rows.new_zeros(shape, dtype=rows.dtype if reduce else torch.float32)
    device = device_of(rows.device)
    call = Call(
        weights,
        rows.contiguous(),
        ids.to(torch.int32).contiguous(),
        batch.topk_weights.to(torch.float32).contiguous(),
        weighs_input=weight_on is WeightOn.INPUT,
        device=device,
        tuned=tuned_for(device),
    )
    with on_device(rows.device):
        sizes = (num_rows, top_k, config.num_experts, batch.expected_share)
        regime = regime_for(*sizes)
        if regime is Regime.DIRECT and reduce and config.post_norm is None:
            return call.run_direct()
        tiling = tiling_for(*sizes) or Tiling(SMALL_TILES[0])
        order = batch.order
        if order is None or order.ids is not ids or order.tiling != tiling:
            order = order_slots(call.ids, config.num_experts, tiling)
        return call.run_sorted(order, reduce)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a layer's experts.

    Attributes:
        rows: (M, H), contiguous. ids: (M, K) int32. topk_weights: (M, K) fp32.
        tuned: blocks that come before the table's.
    """

    weights: ExpertWeights
    rows: Tensor
    ids: Tensor
    topk_weights: Tensor
    weighs_input: bool
    device: Device
    tuned: Mapping[Key, Blocks] = field(default_factory=dict)

    @property
    def config(self) -> ExpertsConfig:
        """Sizes and layout."""
        return self.weights.config

    @property
    def num_slots(self) -> int:
        """M * K."""
        return self.ids.numel()

    def run_direct(self) -> Tensor:
        """A few rows: two launches, slot by slot."""
        hidden = self.empty("hidden rows", self.num_slots, self.config.intermediate_size)
        out = self.empty("output", *self.rows.shape)
        self.direct_gate_up(hidden).run()
        self.direct_down(hidden, out).run()
        return out

    def run_sorted(self, order: ExpertOrder, reduce: bool) -> Tensor:
        """Rows in tiles of their experts, then the sum of every token's slots."""
        config = self.config
        num_rows, top_k = self.ids.shape
        width = config.hidden_size
        dtype = self.rows.dtype if reduce else torch.float32
        hidden = self.empty("hidden rows", self.num_slots, config.intermediate_size)
        slots = self.empty("experts' outputs", self.num_slots, width, dtype=dtype)
        self.gate_up(order, hidden).run()
        self.down(order, hidden, slots).run()
        out = self.empty(
            "output", *((num_rows,) if reduce else (num_rows, top_k)), width, dtype=dtype
        )
        self.combine(slots, out).run()
        return out

    def direct_gate_up(self, hidden: Tensor) -> Launch:
        """x -> hidden rows (N, I), slot by slot."""
        config = self.config
        gate_up, up = self.first_weights()
        blocks = self.blocks(Product.GATE_UP, DIRECT_TILE)
        arguments = (
            self.rows,
            gate_up,
            gate_up if up is None else up,
            self.weights.gate_up_bias,
            self.topk_weights if self.weighs_input else None,
            self.ids,
            hidden,
            self.num_slots,
        )
        constants = {
            "NUM_EXPERTS": config.num_experts,
            **self.gate_up_constants(gate_up, up),
            **direct_constants(blocks),
        }
        grid = (self.num_slots * cdiv(config.intermediate_size, blocks.columns),)
        return Launch(direct_gate_up_kernel, grid, arguments, constants)

    def direct_down(self, hidden: Tensor, out: Tensor) -> Launch:
        """Hidden rows -> the weighted sum of a row's slots (M, H)."""
        config, down = self.config, self.weights.down_proj.values
        num_rows, top_k = self.ids.shape
        blocks = self.blocks(Product.DOWN, DIRECT_TILE)
        arguments = (
            hidden,
            down,
            self.weights.down_bias,
            None if self.weighs_input else self.topk_weights,
            self.ids,
            out,
            num_rows,
        )
        constants = {
            "NUM_EXPERTS": config.num_experts,
            "TOP_K": top_k,
            **self.down_constants(),
            **direct_constants(blocks),
        }
        grid = (num_rows * cdiv(config.hidden_size, blocks.columns),)
        return Launch(direct_down_kernel, grid, arguments, constants)

    def gate_up(self, order: ExpertOrder, hidden: Tensor) -> Launch:
        """x -> hidden rows, sorted."""
        config = self.config
        gate_up, up = self.first_weights()
        blocks = self.blocks(Product.GATE_UP, order.tiling.rows)
        width = blocks.columns * (2 if config.gate_up is GateUp.INTERLEAVED else 1)
        read = way_to_read(gate_up, blocks)
        up_read = read if up is None else way_to_read(up, blocks)
        arguments = (
            self.rows,
            source(gate_up, read, width, blocks.depth),
            None if up is None else source(up, up_read, width, blocks.depth),
            self.weights.gate_up_bias,
            self.topk_weights if self.weighs_input else None,
            hidden,
            order.sort_order,
            order.tiles,
            order.num_tiles,
        )
        constants = {
            **self.gate_up_constants(gate_up, up),
            **self.tile_constants(blocks, order.tiling.rows, read),
            "UP_READ": up_read,
        }
        grid = self.grid(blocks, order, config.intermediate_size)
        return Launch(gate_up_kernel, grid, arguments, constants)

    def down(self, order: ExpertOrder, hidden: Tensor, slots: Tensor) -> Launch:
        """Sorted hidden rows -> outputs by slot (N, H)."""
        config, down = self.config, self.weights.down_proj.values
        blocks = self.blocks(Product.DOWN, order.tiling.rows)
        read = way_to_read(down, blocks)
        arguments = (
            hidden,
            source(down, read, blocks.columns, blocks.depth),
            self.weights.down_bias,
            slots,
            order.sort_order,
            order.tiles,
            order.num_tiles,
        )
        constants = {
            **self.down_constants(),
            **self.tile_constants(blocks, order.tiling.rows, read),
        }
        grid = self.grid(blocks, order, config.hidden_size)
        return Launch(down_kernel, grid, arguments, constants)

    def combine(self, slots: Tensor, out: Tensor) -> Launch:
        """Outputs by slot -> their weighted sum (M, H), or their weighted terms (M, K, H)."""
        config = self.config
        num_rows, top_k = self.ids.shape
        columns = next_power_of_2(config.hidden_size)
        if config.post_norm is None:
            columns = min(columns, COMBINE_COLUMNS)
        arguments = (
            slots,
            self.ids,
            self.topk_weights,
            self.weights.post_norm,
            out,
            config.post_norm_epsilon,
        )
        constants = {
            "NUM_EXPERTS": config.num_experts,
            "TOP_K": top_k,
            "HIDDEN_SIZE": config.hidden_size,
            "NORM": "none" if config.post_norm is None else config.post_norm.value,
            "REDUCE": out.dim() == 2,
            "WEIGHS": not self.weighs_input,
            "BLOCK_H": columns,
            "INTERPRET": self.device.is_interpreter,
            "num_warps": min(16, max(4, columns // 256)),
        }
        grid = (num_rows, cdiv(config.hidden_size, columns))
        return Launch(combine_kernel, grid, arguments, constants)

    def first_weights(self) -> tuple[Tensor, Tensor | None]:
        """Weights of gate and of up; one tensor twice where it holds both apart, None for no up."""
        weights = self.weights
        gate_up = weights.gate_up_proj.values
        match self.config.gate_up.value:
            case "stacked":
                return gate_up, gate_up
            case "separate":
                assert weights.up_proj is not None
                return gate_up, weights.up_proj.values
            case _:
                return gate_up, None

    def blocks(self, product: Product, tile_rows: int) -> Blocks:
        """How a product is cut."""
        key = self.key(product, tile_rows)
        return blocks_for(key, self.device, self.tuned.get(key))

    def key(self, product: Product, tile_rows: int) -> Key:
        """What blocks are found by."""
        config, weights = self.config, self.weights
        is_first = product is Product.GATE_UP
        matrix = weights.gate_up_proj if is_first else weights.down_proj
        return Key(
            self.rows.dtype,
            product,
            tile_rows,
            config.num_experts,
            config.hidden_size,
            config.intermediate_size,
            config.gate_up,
            matrix.values.stride(2) != 1,
        )

    def shared_bytes(self, product: Product, tile_rows: int) -> int:
        """Shared memory that a program is expected to take."""
        return shared_bytes(self.blocks(product, tile_rows), self.key(product, tile_rows))

    def grid(self, blocks: Blocks, order: ExpertOrder, num_columns: int) -> tuple[int]:
        """Programs for every tile that there may be; those of tiles that there are not end."""
        items = order.tiles.shape[0] * cdiv(num_columns, blocks.columns)
        return (min(items, self.device.num_processors) if blocks.is_persistent else items,)

    def gate_up_constants(self, weight: Tensor, up: Tensor | None) -> dict[str, Any]:
        """Sizes, strides and activation of the first product."""
        config = self.config
        return {
            "TOP_K": self.ids.shape[1],
            "SIZES": (config.hidden_size, config.intermediate_size, config.up_size),
            "STRIDES": weight.stride(),
            "UP_STRIDES": weight.stride() if up is None else up.stride(),
            "GATE_UP": config.gate_up.value,
            "ACTIVATION": activation_constants(config.activation),
        }

    def down_constants(self) -> dict[str, Any]:
        """Sizes and strides of the second product."""
        return {
            "SIZES": (self.config.hidden_size, self.config.intermediate_size),
            "STRIDES": self.weights.down_proj.values.stride(),
        }

    def tile_constants(self, blocks: Blocks, tile_rows: int, read: str) -> dict[str, Any]:
        """Constants that the products of tiles have in common."""
        is_large = tile_rows >= LARGE_TILE
        return {
            "BLOCK_T": tile_rows,
            "TAIL_T": blocks.tail_rows,
            "BLOCK_N": blocks.columns,
            "BLOCK_K": blocks.depth,
            "GROUP": TILES_PER_GROUP if is_large else 1,
            "SWAP_AB": not is_large,
            "READ": read,
            "INTERPRET": self.device.is_interpreter,
            "num_warps": blocks.num_warps,
            "num_stages": blocks.num_stages,
        }

    def empty(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised buffer; running out of memory names it and its size."""
        return empty(self.rows, name, shape, dtype or self.rows.dtype)


def direct_constants(blocks: Blocks) -> dict[str, Any]:
    """Constants that the two kernels without tiles have in common."""
    return {
        "BLOCK_N": blocks.columns,
        "BLOCK_K": blocks.depth,
        "NUM_STAGES": blocks.num_stages,
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
    }


@lru_cache
def activation_constants(activation: Activation) -> tuple[Any, ...]:
    """What `activate` is compiled for; 0 stands for None, which Triton 3.6 has not in tuples."""
    return (
        activation.function.value,
        activation.alpha,
        activation.limit or 0.0,
        activation.limit_on is LimitOn.GATE,
        activation.up_offset,
        activation.gate_softcap or 0.0,
        activation.up_softcap or 0.0,
    )


def way_to_read(weight: Tensor, blocks: Blocks) -> str:
    """How `read_tile` gets at a stack of matrices (L, rows, columns)."""
    _, rows, depth = weight.shape
    is_aligned = weight.data_ptr() % DESCRIPTOR_ALIGNMENT == 0
    if not blocks.uses_descriptors or depth % blocks.depth or not is_aligned:
        return "pointer"
    if weight.is_contiguous() and depth * weight.itemsize % DESCRIPTOR_ALIGNMENT == 0:
        return "rows"
    is_transposed = weight.transpose(1, 2).is_contiguous()
    if is_transposed and rows * weight.itemsize % DESCRIPTOR_ALIGNMENT == 0:
        return "columns"
    return "pointer"


def source(weight: Tensor, read: str, rows: int, columns: int) -> Tensor | TensorDescriptor:
    """What `read_tile` is given: the tensor, or a descriptor of tiles of it."""
    if read == "pointer":
        return weight
    if read == "columns":
        weight, rows, columns = weight.transpose(1, 2), columns, rows
    return TensorDescriptor.from_tensor(weight.flatten(0, 1), [rows, columns])
