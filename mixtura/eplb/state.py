"""A layer's view of the balancing: which replica a token takes, and the load that it leaves.

Loads are counted in logical ids when a token is routed, so that what was counted stays true
whatever is moved afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixtura.errors import ConfigError
from mixtura.kernels.cpu.replicas import place, takes_replicas
from mixtura.parallel import Placement

GOLDEN = 0.6180339887498949
"""The fraction of the golden ratio: multiples of it are spread evenly over [0, 1), however few."""

LAYER_SALT = 0.7548776662466927
"""Of the plastic number: shifts that are even over the layers, and apart from the tokens'."""


class ExpertLoadLedger:
    """The loads of all layers of a model, in logical experts.

    Args:
        num_layers, num_experts: L and E.
        device: where the layers count.

    Attributes:
        counts: (layers, E + 1) int64 slots that were routed; the last column is for id -1.
        is_recording: () int64, 1 or 0: a switch on the device, which a captured graph obeys.
    """

    def __init__(
        self, num_layers: int, num_experts: int, device: torch.device | str = "cpu"
    ) -> None:
        self.counts = torch.zeros((num_layers, num_experts + 1), dtype=torch.int64, device=device)
        self.is_recording = torch.ones((), dtype=torch.int64, device=device)

    def record(self, is_on: bool) -> None:
        """Count from now on, or do not."""
        self.is_recording.fill_(int(is_on))

    def loads(self) -> Tensor:
        """(layers, E) int64 on the CPU, since the last `reset`; a copy."""
        return self.counts[:, :-1].cpu().clone()

    def reset(self) -> None:
        """Begin to count anew."""
        self.counts.zero_()


@dataclass(frozen=True, eq=False)
class EplbLayerState:
    """What a layer with balanced experts holds; the tables change in place, between forwards.

    Attributes:
        counts: (E + 1,) this layer's row of the ledger. is_recording: the ledger's switch.
        slots: (P + 1,) int32 physical ids, those of an expert's replicas together, by ascending
            expert; -1 at the end.
        ends: (P,) float64 rising: a token at u in [0, 1) takes for expert e the first replica whose
            end is above e + u. The last replica of e ends at e + 1.
        shift: where this layer and rank begin. stride: what one token adds.
        is_rank_invariant: every rank makes the same choice for the same token of a batch.
    """

    counts: Tensor
    is_recording: Tensor
    slots: Tensor
    ends: Tensor
    shift: float
    stride: float
    is_rank_invariant: bool

    @classmethod
    def of(
        cls,
        ledger: ExpertLoadLedger,
        layer: int,
        placement: Placement,
        *,
        rank: int | None = None,
        num_ranks: int = 1,
    ) -> EplbLayerState:
        """The state of one layer.

        Args:
            ledger: of the model.
            layer: which of its MoE layers.
            placement: where experts are now.
            rank, num_ranks: for tokens of this rank's own, so that ranks with few tokens do not all
                take the same replica; None where ranks share a batch and must choose alike.
        """
        device, num_slots = ledger.counts.device, placement.topology.num_physical_experts
        state = cls(
            counts=ledger.counts[layer],
            is_recording=ledger.is_recording,
            slots=torch.full((num_slots + 1,), -1, dtype=torch.int32, device=device),
            ends=torch.zeros(num_slots, dtype=torch.float64, device=device),
            shift=(LAYER_SALT * (layer + 1) + GOLDEN * (rank or 0)) % 1.0,
            stride=GOLDEN if rank is None else (GOLDEN * num_ranks) % 1.0,
            is_rank_invariant=rank is None,
        )
        state.set_placement_(placement)
        return state

    @property
    def num_bytes(self) -> int:
        """Bytes of the tables of this layer."""
        return self.slots.nbytes + self.ends.nbytes + self.counts.nbytes

    def set_placement_(self, placement: Placement, fractions: Tensor | None = None) -> None:
        """Write another placement into the tables, at their addresses.

        Args:
            placement: of the same experts and slots.
            fractions: (E, W) of each expert's load by replica, as `ReplicaQuota` has them; equal
                ones by default.
        """
        table = placement.logical_to_physical
        num_experts, width = table.shape
        is_there = table >= 0
        if fractions is None:
            shares = is_there.double()
        else:
            shares = fractions[:, :width].double() * is_there
        inner = shares.cumsum(1) / shares.sum(1, keepdim=True)
        is_last = torch.arange(width) == is_there.sum(1, keepdim=True) - 1
        ends = torch.where(is_last, 1.0, inner.clamp(max=1.0))
        ends = ends + torch.arange(num_experts).unsqueeze(1)
        used = int(is_there.sum())
        self.ends.fill_(num_experts)  # beyond every expert, where a slot is empty
        self.ends[:used] = ends[is_there].to(self.ends.device)
        self.slots.fill_(-1)
        self.slots[:used] = table[is_there].to(self.slots.device)

    def to_physical(self, topk_ids: Tensor) -> Tensor:
        """Choose replicas and count the load: (T,K) int32 logical ids -> (T,K) physical ids.

        Token t is at `u = frac(shift + t * stride)`, a low-discrepancy sequence: any run of tokens
        is spread over replicas as their shares say, and so are single tokens over ranks and layers.
        Padding tokens have no ids but -1, and count for nothing.

        Raises:
            InputError: an id is outside [-1, E), on a CPU.
        """
        if takes_replicas(topk_ids):
            return place(
                topk_ids,
                self.slots,
                self.ends,
                self.counts,
                self.is_recording,
                self.shift,
                self.stride,
            )
        num_experts = self.counts.shape[0] - 1
        expert = torch.where(topk_ids < 0, num_experts, topk_ids).long()
        flat = expert.view(-1)
        self.counts.scatter_add_(0, flat, self.is_recording.expand_as(flat))
        token = torch.arange(topk_ids.shape[0], dtype=torch.float64, device=topk_ids.device)
        u = (token * self.stride + self.shift).frac_()
        nth = torch.searchsorted(self.ends, expert + u.unsqueeze(1), right=True)
        return self.slots[nth]


def check_choice(state: EplbLayerState, dispatcher: str, needs_same_replicas: bool) -> None:
    """Raise `ConfigError` where ranks could run a token's expert twice, or not at all."""
    if needs_same_replicas and not state.is_rank_invariant:
        raise ConfigError(
            f"dispatcher ({dispatcher}) must have replicas that every rank chooses alike; got a "
            f"choice by rank, with which an expert's output would be added twice. Use "
            f"tokens='shared', or all_to_all."
        )
