"""The host's side of dense experts: how their weights are read, and what is launched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mixtura.config import GateUp
from mixtura.kernels.triton.call import TILES_PER_GROUP, Call, activation_constants
from mixtura.kernels.triton.direct import direct_down_kernel, direct_gate_up_kernel
from mixtura.kernels.triton.down import down_kernel
from mixtura.kernels.triton.gate_up import gate_up_kernel
from mixtura.kernels.triton.launch import Launch, cdiv
from mixtura.kernels.triton.table import DIRECT_TILE, LARGE_TILE, Blocks, Key, Product
from mixtura.types import ExpertOrder

DESCRIPTOR_ALIGNMENT = 16
"""Bytes; of a descriptor's address and strides."""


@dataclass(frozen=True, slots=True)
class DenseCall(Call):
    """One call of dense experts: `weights` are `ExpertWeights`, hidden rows (N, I) a tensor."""

    def run_direct(self) -> Tensor:
        hidden = self.hidden_rows()
        self.direct_gate_up(hidden).run()
        out = self.empty("output", *self.rows.shape)
        self.direct_down(hidden, out).run()
        return out

    def run_gate_up(self, order: ExpertOrder) -> Tensor:
        hidden = self.hidden_rows()
        self.gate_up(order, hidden).run()
        return hidden

    def hidden_rows(self) -> Tensor:
        """Room for what gate and up write."""
        return self.empty("hidden rows", self.num_slots, self.config.intermediate_size)

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


def direct_constants(blocks: Blocks) -> dict[str, Any]:
    """Constants that the two kernels without tiles have in common."""
    return {
        "BLOCK_N": blocks.columns,
        "BLOCK_K": blocks.depth,
        "NUM_STAGES": blocks.num_stages,
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
    }


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
