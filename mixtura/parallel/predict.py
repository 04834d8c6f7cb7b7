"""Whether ranks pay: a decode step's time with the experts over ranks, and in one process.

A step reads weights and, with ranks, exchanges a row in every MoE layer. With `B` the bytes per
second of one memory, `g` ranks that share a memory, `N` ranks and `M = N / g` memories:

    t_alone = (beside + sum_layers K * e) / B
    t_ranks = (g * beside + sum_layers k * e) / B + sum_layers (c * latency + 2 * row / W)

`beside` are the bytes of all weights that are no routed experts: every rank reads its own copy of
them. `e` are the bytes of one expert and `K` of them are chosen; `k` is how many of these the
busiest memory holds, on average over even, independent choices. `c` collectives go over a link of
`W` bytes per second. Nothing is overlapped, and loads are even: both make ranks look as they are
without tuning. The numbers of `MACHINES` are shown with every prediction.

Source: the planning model of DeepSeek-V3's deployments (bytes over bandwidth, plus exchange), for
one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

from mixtura.config import DispatcherName, ParallelConfig, TokensHeld, require_positive

WORTH_IT = 1.05
"""By what factor ranks must be faster to be recommended: less is within the model's error."""


@dataclass(frozen=True, slots=True)
class MachineSpeed:
    """What a prediction takes for granted.

    Attributes:
        bandwidth: bytes per second read from one memory.
        latency: seconds of a collective of a few rows.
        link: bytes per second between ranks.
        shares_memory: ranks of a machine read one memory; else each has its own.
    """

    bandwidth: float
    latency: float
    link: float
    shares_memory: bool


MACHINES: dict[str, MachineSpeed] = {
    "cpu": MachineSpeed(200e9, 180e-6, 5e9, shares_memory=True),
    "cuda": MachineSpeed(0.8 * 3.35e12, 20e-6, 150e9, shares_memory=False),
}
"""A server's processor with gloo (0.18 ms were measured for 8 KiB between processes of a machine),
and an H100 at 80% of its bandwidth with NCCL over NVLink (DeepEP's 153 GB/s)."""

COLLECTIVES = {
    DispatcherName.ALL_REDUCE: 1,
    DispatcherName.ALL_GATHER: 2,
    DispatcherName.ALL_TO_ALL: 3,
    DispatcherName.DEEP_EP: 2,
}
"""Of a layer: gather and scatter; counts, rows out, rows home."""


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """One MoE layer.

    Attributes:
        num_experts: E. top_k: K. expert_bytes: of one expert.
        row_bytes: of a token's hidden state.
    """

    num_experts: int
    top_k: int
    expert_bytes: float
    row_bytes: int


@dataclass(frozen=True, slots=True)
class Prediction:
    """One token's decode step.

    Attributes:
        alone_seconds: in one process.
        read_seconds, exchange_seconds: with ranks; their sum is the step.
        alone_bytes: weights in one process.
        memory_bytes: weights in the fullest memory with ranks, all copies that lie there.
    """

    alone_seconds: float
    read_seconds: float
    exchange_seconds: float
    alone_bytes: float
    memory_bytes: float

    @property
    def alone_rate(self) -> float:
        """Tokens per second in one process."""
        return 1 / self.alone_seconds

    @property
    def ranks_rate(self) -> float:
        """Tokens per second with ranks."""
        return 1 / (self.read_seconds + self.exchange_seconds)

    def advice(self, capacity: float | None = None) -> str:
        """What follows from it, in a sentence; `capacity` are the bytes of one memory."""
        if capacity is not None and self.alone_bytes > capacity:
            if self.memory_bytes <= capacity:
                return "use ranks: one memory does not hold the weights, and theirs do"
            return "use more memories: neither one nor those of these ranks hold the weights"
        gain = self.ranks_rate / self.alone_rate
        if gain >= WORTH_IT:
            return f"use ranks: {gain:.1f} times as fast"
        return (
            f"do not use ranks: {gain:.2f} times as fast, a step takes {_ms(self.read_seconds)} to "
            f"read weights and {_ms(self.exchange_seconds)} to exchange rows, in one process "
            f"{_ms(self.alone_seconds)}"
        )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def predict(
    beside_bytes: float,
    layers: Sequence[LayerBytes],
    parallel: ParallelConfig,
    machine: MachineSpeed,
    *,
    dispatcher: DispatcherName | None,
    num_nodes: int = 1,
) -> Prediction:
    """Compare ranks with one process; see the module for the formulas.

    Args:
        beside_bytes: of the weights that are no routed experts.
        layers: the MoE layers.
        parallel: the ranks. num_nodes: machines that they are on.
        machine: each of them.
        dispatcher: how rows meet their experts; None where there is one rank.

    Raises:
        ConfigError: there are fewer ranks than machines.
    """
    num_ranks = parallel.num_ranks
    require_positive("ranks of a machine", num_ranks // num_nodes)
    sharing = num_ranks // num_nodes if machine.shares_memory else 1
    # A memory holds whole experts of several groups of ranks, or some cuts of one group's.
    num_sets = max(1, num_ranks // max(sharing, parallel.tp_size))
    cut = min(1.0, sharing / parallel.tp_size)
    alone = busiest = exchange = held = total = 0.0
    for layer in layers:
        alone += layer.top_k * layer.expert_bytes
        most = expected_most(layer.num_experts, min(layer.top_k, layer.num_experts), num_sets)
        busiest += most * cut * layer.expert_bytes
        total += layer.num_experts * layer.expert_bytes
        held += -(-layer.num_experts // num_sets) * cut * layer.expert_bytes
        if dispatcher is not None:
            count = COLLECTIVES[dispatcher]
            if dispatcher is not DispatcherName.ALL_REDUCE:
                count += parallel.tokens is TokensHeld.SHARED
            exchange += count * machine.latency + 2 * layer.row_bytes / machine.link
    return Prediction(
        alone_seconds=(beside_bytes + alone) / machine.bandwidth,
        read_seconds=(sharing * beside_bytes + busiest) / machine.bandwidth,
        exchange_seconds=exchange,
        alone_bytes=beside_bytes + total,
        memory_bytes=sharing * beside_bytes + held,
    )


def expected_most(num_experts: int, top_k: int, num_sets: int) -> float:
    """The most of K chosen experts that one of several equal sets holds, on average.

    Exact: choices with at most m in every set are counted by the coefficient of x^K in
    `(sum_{j <= m} C(E / S, j) x^j) ^ S`. Sets differ by one where S does not divide E.

    >>> expected_most(8, 1, 4), round(expected_most(256, 8, 8), 2)
    (1.0, 2.56)
    """
    sizes = [
        num_experts * (n + 1) // num_sets - num_experts * n // num_sets for n in range(num_sets)
    ]
    expected, total = 0.0, comb(num_experts, top_k)
    for most in range(top_k):
        ways = [1] + [0] * top_k
        for size in sizes:
            terms = [comb(size, j) for j in range(most + 1)]
            ways = [
                sum(terms[j] * ways[k - j] for j in range(min(most, k) + 1))
                for k in range(top_k + 1)
            ]
        expected += 1 - ways[top_k] / total  # E[max] = sum over m of P(max > m)
    return expected
