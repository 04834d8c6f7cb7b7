"""One call of quantized experts: rows rounded where they are to be, products, grids."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mixtura.kernels.triton.call import TILES_PER_GROUP, Call, activation_constants
from mixtura.kernels.triton.device import Device
from mixtura.kernels.triton.launch import Launch, cdiv, next_power_of_2
from mixtura.kernels.triton.packed.decode import Format, Matrix, format_of
from mixtura.kernels.triton.packed.down import packed_down_kernel
from mixtura.kernels.triton.packed.gate_up import packed_gate_up_kernel
from mixtura.kernels.triton.packed.layout import ROW_GROUP, Layout
from mixtura.kernels.triton.packed.pack import PackedMatrix
from mixtura.kernels.triton.packed.quantization import packing_of, rounds_blocks
from mixtura.kernels.triton.packed.rounding import Rows, round_groups_kernel, round_rows_kernel
from mixtura.kernels.triton.regimes import SMALL_TILES
from mixtura.kernels.triton.table import (
    DIRECT_TILE,
    LARGE_TILE,
    PACKED_DIRECT_ROWS,
    Blocks,
    Key,
    Product,
)
from mixtura.quant.activations import StaticInputs
from mixtura.types import ExpertOrder

ROW_ALIGNMENT = 16
"""Bytes; rows of codes begin at a multiple of it."""

BUSY_PROGRAMS = 4
"""Of a processor, that keep it busy."""

FEW_WARPS, FEW_WARPS_REGISTERS = 2, 168
"""Programs of so many warps, of whose registers a processor has enough for six such programs. Left
alone the compiler stops at 128, and spills."""

ROUNDED_COLUMNS = 4096
"""Columns of a row that a program has at once, when it looks for the row's scale."""


@dataclass(frozen=True, slots=True)
class PackedCall(Call):
    """One call of quantized experts: `weights` are `PackedWeights`, hidden rows `Rows` by slot."""

    def run_direct(self) -> Tensor:
        return self.run_sorted(None, reduce=True)

    def run_gate_up(self, order: ExpertOrder | None) -> Rows:
        x, launch = self.rounded_rows()
        if launch is not None:
            launch.run()
        hidden = self.hidden_rows()
        self.gate_up(order, x, hidden).run()
        hidden, launch = self.rounded_hidden(hidden)
        if launch is not None:
            launch.run()
        return hidden

    # --------------------------------------------------------------------------------------- rows

    def rounded_rows(self) -> tuple[Rows, Launch | None]:
        """What gate and up multiply: rows as they come, or what a launch will fill with codes.

        With stored scales, or weights on the input, a row has codes for each of its slots.
        """
        layout, inputs = self.layout(Product.GATE_UP), self.inputs(Product.GATE_UP)
        if not layout.is_rounded:
            return Rows(self.rows, None), None
        slot_weights = self.topk_weights if self.weighs_codes else None
        is_by_slot = inputs is not None or slot_weights is not None
        count = self.num_slots if is_by_slot else self.rows.shape[0]
        return self.rounded(
            "rows' codes", self.rows, count, layout, inputs, slot_weights=slot_weights
        )

    @property
    def weighs_codes(self) -> bool:
        """Whether rows are weighed before they are rounded, and so have codes for each slot."""
        return self.weighs_input and self.layout(Product.GATE_UP).is_rounded

    def hidden_rows(self) -> Rows:
        """What gate and up write: codes where a block of columns is rounded by itself.

        Those that are rounded later stay in fp32: rounding twice would be another rounding.
        """
        size, layout = self.config.intermediate_size, self.layout(Product.DOWN)
        if rounds_blocks(self.config, layout):
            return self.codes("hidden rows", self.num_slots, size, layout)
        dtype = torch.float32 if layout.is_rounded else self.rows.dtype
        return Rows(self.empty("hidden rows", self.num_slots, size, dtype=dtype), None)

    def rounded_hidden(self, hidden: Rows) -> tuple[Rows, Launch | None]:
        """What the down projection multiplies, once gate and up have written `hidden`."""
        layout, inputs = self.layout(Product.DOWN), self.inputs(Product.DOWN)
        if not layout.is_rounded or hidden.scales is not None:
            return hidden, None
        return self.rounded("hidden codes", hidden.data, self.num_slots, layout, inputs, self.ids)

    def rounded(
        self,
        name: str,
        x: Tensor,
        count: int,
        layout: Layout,
        inputs: StaticInputs | None,
        ids: Tensor | None = None,
        slot_weights: Tensor | None = None,
    ) -> tuple[Rows, Launch]:
        """Buffers of `count` rows of codes, and what fills them from x (n, columns)."""
        num_columns = x.shape[1]
        rows = self.codes(name, count, num_columns, layout)
        constants = {
            "DIVISOR": count // x.shape[0],
            "NUM_COLUMNS": num_columns,
            "STRIDE": rows.data.shape[1],
            "IS_INT": layout.operand is torch.int8,
            "INTERPRET": self.device.is_interpreter,
        }
        if layout.has_row_groups:
            block = min(1024, ROW_GROUP * next_power_of_2(cdiv(num_columns, ROW_GROUP)))
            grid = (count, cdiv(num_columns, block))
            sizes = {"GROUP": ROW_GROUP, "BLOCK": block, "num_warps": max(1, block // 256)}
            launch = Launch(round_groups_kernel, grid, (x, rows, slot_weights), constants | sizes)
            return rows, launch
        block = min(ROUNDED_COLUMNS, next_power_of_2(num_columns))
        scales = None if inputs is None else inputs.scales
        if scales is not None:
            ids = self.ids
        sizes = {
            "NUM_EXPERTS": self.config.num_experts,
            "BLOCK": block,
            "num_warps": min(8, max(1, block // 512)),
        }
        arguments = (x, rows, ids, scales, slot_weights)
        return rows, Launch(round_rows_kernel, (count,), arguments, constants | sizes)

    def codes(self, name: str, count: int, num_columns: int, layout: Layout) -> Rows:
        """Room for codes of rows and their scales."""
        stride = cdiv(num_columns, ROW_ALIGNMENT) * ROW_ALIGNMENT
        data = self.empty(name, count, stride, dtype=layout.operand)
        groups = (cdiv(num_columns, ROW_GROUP),) if layout.has_row_groups else ()
        return Rows(data, self.empty(name, count, *groups, dtype=torch.float32))

    # ----------------------------------------------------------------------------------- products

    def gate_up(self, order: ExpertOrder | None, x: Rows, hidden: Rows) -> Launch:
        """Rows -> hidden rows by slot; without an order every slot by itself."""
        config = self.config
        tile_rows, blocks = self.cut(Product.GATE_UP, order)
        arguments = (
            x,
            self.matrix(Product.GATE_UP),
            self.weights.gate_up_bias,
            self.topk_weights if self.weighs_input and not self.weighs_codes else None,
            hidden,
            self.ids if order is None else None,
            *order_arguments(order),
        )
        constants = {
            "DIVISOR": self.num_slots // x.data.shape[0],
            "SIZES": (config.hidden_size, config.intermediate_size, config.up_size),
            "ROW_STRIDES": (x.data.shape[1], hidden.data.shape[1]),
            "GATE_UP": config.gate_up.value,
            "ACTIVATION": activation_constants(config.activation),
            "ROUNDS_OUT": hidden.scales is not None,
            **self.product_constants(Product.GATE_UP, blocks, tile_rows),
        }
        grid = self.product_grid(blocks, order, config.intermediate_size)
        return Launch(packed_gate_up_kernel, grid, arguments, constants)

    def down(self, order: ExpertOrder | None, hidden: Rows, slots: Tensor) -> Launch:
        config = self.config
        tile_rows, blocks = self.cut(Product.DOWN, order)
        arguments = (
            hidden,
            self.matrix(Product.DOWN),
            self.weights.down_bias,
            slots,
            self.ids if order is None else None,
            *order_arguments(order),
        )
        constants = {
            "SIZES": (config.hidden_size, config.intermediate_size),
            "STRIDE": hidden.data.shape[1],
            **self.product_constants(Product.DOWN, blocks, tile_rows),
        }
        grid = self.product_grid(blocks, order, config.hidden_size)
        return Launch(packed_down_kernel, grid, arguments, constants)

    def cut(self, product: Product, order: ExpertOrder | None) -> tuple[int, Blocks]:
        """(rows of a tile, blocks) of a product.

        Where slots are not sorted blocks are small, so that a row keeps all processors busy; of
        slots that do so anyway, they are those of the smallest tiles, which cost less a weight.
        """
        if order is not None:
            return order.tiling.rows, self.blocks(product, order.tiling.rows)
        key, small = self.key(product, DIRECT_TILE), self.blocks(product, SMALL_TILES[0])
        programs = self.num_slots * cdiv(key.num_columns, small.columns)
        if key not in self.tuned and programs >= BUSY_PROGRAMS * self.device.num_processors:
            return DIRECT_TILE, small
        return DIRECT_TILE, self.blocks(product, DIRECT_TILE)

    def product_constants(self, product: Product, blocks: Blocks, tile_rows: int) -> dict[str, Any]:
        """Constants that the products have in common."""
        matrix = self.packed(product)
        return {
            "NUM_EXPERTS": self.config.num_experts,
            "BLOCK_T": max(tile_rows, PACKED_DIRECT_ROWS),
            "TAIL_T": blocks.tail_rows,
            "BLOCK_N": blocks.columns,
            "GROUP": TILES_PER_GROUP if tile_rows >= LARGE_TILE else 1,
            "FORMAT": kernel_format(self.layout(product), matrix.shape[1], self.device),
            "SWAP_AB": self.layout(product).fields > 1 or tile_rows < LARGE_TILE,
            "INTERPRET": self.device.is_interpreter,
            "num_warps": blocks.num_warps,
            "num_stages": blocks.num_stages,
            **self.registers(blocks),
        }

    def registers(self, blocks: Blocks) -> dict[str, int]:
        """The most registers of a thread, where the compiler is not to choose."""
        if blocks.num_warps == FEW_WARPS and self.device.capability is not None:
            return {"maxnreg": FEW_WARPS_REGISTERS}
        return {}

    def product_grid(
        self, blocks: Blocks, order: ExpertOrder | None, num_columns: int
    ) -> tuple[int]:
        """Programs for every tile that there may be, or, without an order, for every slot."""
        if order is not None:
            return self.grid(blocks, order, num_columns)
        return (self.num_slots * cdiv(num_columns, blocks.columns),)

    def packed(self, product: Product) -> PackedMatrix:
        """The matrix of a product."""
        matrix: PackedMatrix = (
            self.weights.gate_up if product is Product.GATE_UP else self.weights.down
        )
        return matrix

    def layout(self, product: Product) -> Layout:
        """Its layout, for these rows."""
        return self.packed(product).layout.for_rows(self.rows.dtype)

    def inputs(self, product: Product) -> StaticInputs | None:
        """The stored scales that rows are rounded with; some may be there that are not."""
        weights, rounding = self.weights, self.layout(product).rounding
        if rounding is None or not rounding.is_static:
            return None
        found: StaticInputs = (
            weights.gate_up_inputs if product is Product.GATE_UP else weights.down_inputs
        )
        return found

    def matrix(self, product: Product) -> Matrix:
        """Its tensors."""
        packed = self.packed(product)
        return Matrix(packed.codes, packed.scales, packed.zeros, packed.factors)

    def key(self, product: Product, tile_rows: int) -> Key:
        config = self.config
        layouts = (self.weights.gate_up.layout, self.weights.down.layout)
        return Key(
            self.rows.dtype,
            product,
            tile_rows,
            config.num_experts,
            config.hidden_size,
            config.intermediate_size,
            config.gate_up,
            packing=packing_of(config, layouts, product, self.rows.dtype),
        )


@lru_cache
def kernel_format(layout: Layout, num_rows: int, device: Device) -> Format:
    """What kernels are compiled for on a GPU."""
    has_assembly = device.capability is not None and not device.is_interpreter
    return format_of(layout, num_rows, has_assembly=has_assembly)


def order_arguments(order: ExpertOrder | None) -> tuple[Tensor | None, ...]:
    """The sorted slots and their tiles, or None for each."""
    if order is None:
        return None, None, None
    return order.sort_order, order.tiles, order.num_tiles
