"""What adapters add to rows sorted by expert: low-rank products, grouped by adapter and expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtura.kernels.torch.grouped_linear import grouped_linear, linear_in_slices
from mixtura.lora import Adapters, LoraWeights, LowRank
from mixtura.quant.matrix import dense
from mixtura.types import ExpertBatch, ExpertWeights

Linear = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`rows[r] @ W[e].T` for the rows r of expert e: (N, in), (L, out, in), (L + 1,) -> (N, out)."""


@dataclass(frozen=True, slots=True)
class AdaptedRows:
    """Rows sorted once more: by adapter, and an adapter's by expert.

    Attributes:
        adapters: what they add, by number.
        order: (N,) int64, the row that each sorted one is; rows without an adapter are the last.
        places: (N,) int64, where each row is among the sorted ones.
        offsets: (A * L + 1,) int64, the first sorted row of every adapter and expert, and their
            number.
        linear: what multiplies them by a factor.
    """

    adapters: Adapters
    order: Tensor
    places: Tensor
    offsets: Tensor
    linear: Linear

    @classmethod
    def of(
        cls, weights: ExpertWeights, adapter_of_row: Tensor, expert_of_row: Tensor, linear: Linear
    ) -> AdaptedRows:
        """Sort (N,) rows by their adapter, -1 for none, and their expert; nothing waits for it."""
        num_experts = weights.config.num_experts
        num_groups = len(weights.lora) * num_experts
        group = adapter_of_row.long() * num_experts + expert_of_row
        group = torch.where(adapter_of_row < 0, num_groups, group)
        order = group.argsort(stable=True)
        counts = group.new_zeros(num_groups + 1).scatter_add(0, group, torch.ones_like(group))
        offsets = F.pad(counts[:-1].cumsum(0), (1, 0))
        return cls(weights.lora, order, order.argsort(), offsets, linear)

    def add_gate_up(
        self, gate: Tensor, up: Tensor | None, rows: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """(N, I), (N, I) or None for ungated experts, and the rows (N, H) that made them."""
        sorted_rows = rows[self.order]
        gates, ups = [], []
        for adapter, offsets in self._adapters():
            shrunk = None
            if adapter.gate is not None:
                shrunk = self._shrink(adapter.gate, sorted_rows, offsets)
                gates.append(self._expand(adapter.gate, shrunk, offsets))
            if adapter.up is not None:
                if shrunk is None or adapter.gate is None or adapter.gate.a is not adapter.up.a:
                    shrunk = self._shrink(adapter.up, sorted_rows, offsets)
                ups.append(self._expand(adapter.up, shrunk, offsets))
        if up is None:
            return self._added(gate, ups), None
        return self._added(gate, gates), self._added(up, ups)

    def add_down(self, out: Tensor, hidden: Tensor) -> Tensor:
        """(N, H), and the rows (N, I) that made it, before they were rounded."""
        sorted_rows = hidden[self.order]
        found = []
        for adapter, offsets in self._adapters():
            if adapter.down is not None:
                shrunk = self._shrink(adapter.down, sorted_rows, offsets)
                found.append(self._expand(adapter.down, shrunk, offsets))
        return self._added(out, found)

    def _adapters(self) -> Iterator[tuple[LoraWeights, Tensor]]:
        """Each adapter with the offsets of its experts, (L + 1,)."""
        num_experts = (self.offsets.shape[0] - 1) // len(self.adapters)
        for number, adapter in enumerate(self.adapters):
            if adapter is not None:
                start = number * num_experts
                yield adapter, self.offsets[start : start + num_experts + 1]

    def _shrink(self, part: LowRank, rows: Tensor, offsets: Tensor) -> Tensor:
        return self.linear(rows, part.a, offsets)

    def _expand(self, part: LowRank, shrunk: Tensor, offsets: Tensor) -> Tensor:
        return self.linear(shrunk, part.b, offsets)

    def _added(self, y: Tensor, found: list[Tensor]) -> Tensor:
        """Sorted rows, 0 where they are other adapters', added to those that they are."""
        return y + reduce(torch.add, found)[self.places] if found else y


def linear_in_graphs(rows: Tensor, factor: Tensor, offsets: Tensor) -> Tensor:
    """A node of a graph, and what autograd records."""
    return grouped_linear(rows, dense(factor), offsets)


def eager_rows(
    weights: ExpertWeights, batch: ExpertBatch, token_of_row: Tensor, expert_of_row: Tensor
) -> AdaptedRows:
    """Those of rows that are computed now, some of which have an adapter. (N,), (N,)."""
    assert batch.adapter_ids is not None
    adapter_of_row = batch.adapter_ids[token_of_row]
    return AdaptedRows.of(weights, adapter_of_row, expert_of_row, linear_in_slices)


def is_adapted(weights: ExpertWeights, batch: ExpertBatch) -> bool:
    """Whether a row has an adapter that may add something; reads the ids."""
    ids = batch.adapter_ids
    has_any = any(adapter is not None for adapter in weights.lora)
    return has_any and ids is not None and bool((ids >= 0).any())
