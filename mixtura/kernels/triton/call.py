"""One call of a layer's experts: what dense and quantized ones have in common.

Who calls them runs `run_direct` or `run_sorted`; what is launched on the way are values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mixtura.config import Activation, ExpertsConfig, LimitOn
from mixtura.kernels.triton.buffers import empty
from mixtura.kernels.triton.combine import combine_kernel
from mixtura.kernels.triton.device import Device
from mixtura.kernels.triton.launch import Launch, cdiv, next_power_of_2
from mixtura.kernels.triton.table import Blocks, Key, Product, blocks_for, shared_bytes
from mixtura.types import ExpertOrder

COMBINE_COLUMNS = 1024
"""Columns that one program adds."""

TILES_PER_GROUP = 8
"""Large tiles that share the weights they read; see `tile_of`."""


@dataclass(frozen=True, slots=True)
class Call(ABC):
    """One call of a layer's experts.

    Attributes:
        weights: the experts as the kernel has them.
        rows: (M, H), contiguous. ids: (M, K) int32. topk_weights: (M, K) fp32.
        tuned: blocks that come before the table's.
    """

    weights: Any
    rows: Tensor
    ids: Tensor
    topk_weights: Tensor
    weighs_input: bool
    device: Device
    tuned: Mapping[Key, Blocks] = field(default_factory=dict)

    @property
    def config(self) -> ExpertsConfig:
        """Sizes and layout."""
        config: ExpertsConfig = self.weights.config
        return config

    @property
    def num_slots(self) -> int:
        """M * K."""
        return self.ids.numel()

    @abstractmethod
    def run_direct(self) -> Tensor:
        """A few rows, slot by slot: their weighted sums (M, H)."""

    def run_sorted(self, order: Any, reduce: bool) -> Tensor:
        """Rows in tiles of their experts, then the sum of every token's slots."""
        num_rows, top_k = self.ids.shape
        width = self.config.hidden_size
        dtype = self.rows.dtype if reduce else torch.float32
        hidden = self.run_gate_up(order)
        slots = self.empty("experts' outputs", self.num_slots, width, dtype=dtype)
        self.down(order, hidden, slots).run()
        out = self.empty(
            "output", *((num_rows,) if reduce else (num_rows, top_k)), width, dtype=dtype
        )
        self.combine(slots, out).run()
        return out

    @abstractmethod
    def run_gate_up(self, order: Any) -> Any:
        """Rows -> hidden rows, as `down` wants them."""

    @abstractmethod
    def down(self, order: Any, hidden: Any, slots: Tensor) -> Launch:
        """Hidden rows -> outputs by slot (N, H)."""

    @abstractmethod
    def key(self, product: Product, tile_rows: int) -> Key:
        """What blocks are found by."""

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

    def blocks(self, product: Product, tile_rows: int) -> Blocks:
        """How a product is cut."""
        key = self.key(product, tile_rows)
        return blocks_for(key, self.device, self.tuned.get(key))

    def shared_bytes(self, product: Product, tile_rows: int) -> int:
        """Shared memory that a program is expected to take."""
        blocks, key = self.blocks(product, tile_rows), self.key(product, tile_rows)
        return shared_bytes(blocks, key, self.device)

    def grid(self, blocks: Blocks, order: ExpertOrder, num_columns: int) -> tuple[int]:
        """Programs for every tile that there may be; those of tiles that there are not end."""
        items = order.tiles.shape[0] * cdiv(num_columns, blocks.columns)
        return (min(items, self.device.num_processors) if blocks.is_persistent else items,)

    def empty(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised buffer; running out of memory names it and its size."""
        return empty(self.rows, name, shape, dtype or self.rows.dtype)


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
