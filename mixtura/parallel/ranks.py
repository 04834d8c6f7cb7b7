"""`ExpertParallel`: this rank's place among those that share a model's experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from mixtura.config import (
    ExpertsConfig,
    MoEConfig,
    ParallelConfig,
    PlacementStrategy,
    WireFormat,
)
from mixtura.errors import ConfigError, ParallelError
from mixtura.parallel.placement import Placement
from mixtura.parallel.step import StepClock
from mixtura.parallel.tables import SlotTables
from mixtura.parallel.topology import Topology
from mixtura.parallel.transport import LoneTransport, Transport


@dataclass(frozen=True, slots=True)
class ExpertParallel:
    """The ranks of a model, for all of its layers.

    Rank `g * tp_size + c` holds cut c of the experts of group g.

    Attributes:
        config: how the model is spread.
        transport: the ranks.
        clock: makes the context of each forward.
        num_nodes: machines that the ranks are on, consecutive ranks together.
    """

    config: ParallelConfig
    transport: Transport
    clock: StepClock
    num_nodes: int = 1

    @classmethod
    def over(
        cls,
        config: ParallelConfig,
        transport: Transport | None = None,
        *,
        overlap_min_tokens: int | None = None,
        num_nodes: int = 1,
    ) -> Self:
        """Spread over a group of ranks; without a transport, over this one alone.

        Raises:
            ParallelError: the group has another number of ranks than the configuration.
        """
        transport = transport if transport is not None else LoneTransport()
        if transport.size != config.num_ranks:
            raise ParallelError(
                f"ep_size x tp_size ({config.ep_size} x {config.tp_size}) must equal the number of "
                f"ranks in the group; got {transport.size}. Start as many processes, or change "
                f"ep_size."
            )
        clock = StepClock(transport, config.tokens, overlap_min_tokens)
        return cls(config, transport, clock, num_nodes)

    @property
    def ep_rank(self) -> int:
        """Which group of ranks this one is in."""
        return self.transport.rank // self.config.tp_size

    @property
    def tp_rank(self) -> int:
        """Which cut of its experts this rank has."""
        return self.transport.rank % self.config.tp_size

    def placement(self, num_experts: int) -> Placement:
        """Where the experts of a layer are at the start.

        Raises:
            ConfigError: some ranks would have none.
        """
        num_slots = num_experts + self.config.num_redundant_experts
        if num_slots < self.config.ep_size:
            raise ConfigError(
                f"ep_size ({self.config.ep_size}) must be at most the number of experts; got "
                f"{num_slots}. Use fewer ranks."
            )
        topology = Topology.even(
            num_slots, self.config.ep_size, min(self.num_nodes, self.config.ep_size)
        )
        if self.config.placement is PlacementStrategy.ROUND_ROBIN:
            return Placement.round_robin(num_experts, topology)
        return Placement.linear(num_experts, topology)


@dataclass(frozen=True, slots=True)
class Spread:
    """One layer's experts over ranks.

    Attributes:
        ranks: this rank's place among the others.
        placement: which slot holds which expert.
        slots: which rank holds which slot.
        first_replica: (E + 1,) int32 the lowest physical expert of a logical one, -1 for id -1;
            None where the two are the same.
    """

    ranks: ExpertParallel
    placement: Placement
    slots: SlotTables
    first_replica: Tensor | None

    @classmethod
    def of(
        cls, config: MoEConfig, ranks: ExpertParallel, placement: Placement | None = None
    ) -> Self:
        """A layer's experts where `placement` has them, or where `ranks` puts them.

        Raises:
            ConfigError: the layer cannot be spread so.
        """
        if config.routing.num_fused_shared_experts:
            raise ConfigError(
                "shared experts must not be fused into experts that are spread over ranks; got "
                f"{config.routing.num_fused_shared_experts} fused. Run the shared experts apart."
            )
        if config.deterministic:
            check_deterministic_ranks(ranks.config)
        return cls.of_experts(config.experts, ranks, placement)

    @classmethod
    def of_experts(
        cls,
        experts: ExpertsConfig,
        ranks: ExpertParallel,
        placement: Placement | None = None,
    ) -> Self:
        """Experts behind a router that is not ours. As `of`."""
        num_experts, cuts = experts.num_experts, ranks.config.tp_size
        if cuts > 1 and experts.post_norm is not None:
            raise ConfigError(
                f"tp_size ({cuts}) must be 1 where experts have a norm behind them, as a norm of "
                f"parts is no part of the norm. Use expert parallelism alone."
            )
        placement = placement if placement is not None else ranks.placement(num_experts)
        if (placement.num_experts, placement.topology.num_ranks) != (
            num_experts,
            ranks.config.ep_size,
        ):
            raise ConfigError(
                f"a placement of {placement.num_experts} experts over "
                f"{placement.topology.num_ranks} ranks must be of the layer's {num_experts} over "
                f"{ranks.config.ep_size}. Plan it for this layer."
            )
        first = placement.logical_to_physical[:, 0]
        is_same = torch.equal(first, torch.arange(num_experts, dtype=first.dtype))
        table = None if is_same else torch.cat([first, first.new_full((1,), -1)])
        return cls(ranks, placement, SlotTables.of(placement.topology, ranks.ep_rank), table)

    @property
    def num_local_experts(self) -> int:
        """Slots of this rank."""
        return self.placement.topology.slots_per_rank[self.ranks.ep_rank]

    def local_experts(self, experts: ExpertsConfig) -> ExpertsConfig:
        """What this rank's experts are: so many, each of a cut of the intermediate size.

        Raises:
            ConfigError: the size cannot be cut evenly.
        """
        width, cuts = experts.intermediate_size, self.ranks.config.tp_size
        if width % cuts:
            raise ConfigError(
                f"intermediate_size ({width}) must be divisible by tp_size; got {cuts}. Use fewer "
                f"ranks to an expert."
            )
        return replace(experts, num_experts=self.num_local_experts, intermediate_size=width // cuts)

    def whole_experts(self, local: ExpertsConfig) -> ExpertsConfig:
        """The inverse of `local_experts`: what the experts of all ranks are."""
        width = local.intermediate_size * self.ranks.config.tp_size
        return replace(local, num_experts=self.placement.num_experts, intermediate_size=width)

    def to(self, device: torch.device | str) -> Self:
        """The same with its tables on another device."""
        first = None if self.first_replica is None else self.first_replica.to(device)
        return replace(self, slots=self.slots.to(device), first_replica=first)

    def to_physical(self, topk_ids: Tensor) -> Tensor:
        """Logical ids (T,K) -> physical ids (T,K): every expert's first replica."""
        return topk_ids if self.first_replica is None else self.first_replica[topk_ids.long()]


def check_deterministic_ranks(config: ParallelConfig) -> None:
    """Refuse ranks whose results are not bitwise those of one.

    Raises:
        ConfigError: experts are cut, or rows travel in 8 bits.
    """
    if config.tp_size > 1:
        raise ConfigError(
            f"tp_size ({config.tp_size}) must be 1 with deterministic=True, as cut sums round "
            f"differently. Use expert parallelism alone."
        )
    if config.wire is not WireFormat.MODEL:
        raise ConfigError(
            f"wire ({config.wire.value}) must be 'model' with deterministic=True, as rows of 8 "
            f"bits are not what one rank multiplies. Drop one."
        )
