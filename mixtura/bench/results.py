"""What a case has shown: times beside the floor that the machine sets, and the line of JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from mixtura.bench.cases import Case
from mixtura.bench.machine import Machine
from mixtura.bench.measure import Timing


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """The least time that the machine allows: `max(bytes / bandwidth, flops / peak)`.

    Attributes:
        weight_bytes: stored bytes of the experts that are visited, the mean over the routings.
        bandwidth_before, bandwidth_after: bytes per second, probed beside the case.
        peak: operations per second of the arithmetic that the format allows.
        row_bytes: of hidden states read and written once, where memory holds them and no cache.
    """

    weight_bytes: int
    flops: int
    bandwidth_before: float
    bandwidth_after: float
    peak: float
    row_bytes: int = 0

    @property
    def bandwidth(self) -> float:
        """The mean of the two probes.

        The case ran between them. Their maximum would be a limit that the machine may have given
        for a moment only, the minimum would flatter.
        """
        return (self.bandwidth_before + self.bandwidth_after) / 2

    @property
    def seconds(self) -> float:
        """The floor itself."""
        return max(self.memory_seconds, self.flops / self.peak)

    @property
    def memory_seconds(self) -> float:
        """What reading and writing take."""
        return (self.weight_bytes + self.row_bytes) / self.bandwidth

    @property
    def limited_by(self) -> str:
        """ "memory" or "compute", whichever of the two takes longer."""
        is_memory = self.memory_seconds >= self.flops / self.peak
        return "memory" if is_memory else "compute"


@dataclass(frozen=True, slots=True, kw_only=True)
class ContenderResult:
    """One contender on one case.

    Attributes:
        kernel: what ran it; the name of one of our kernels for ours.
        weights: the format that it read.
        timing, relative_error, is_correct: None where it was not run; `refusal` says why.
    """

    name: str
    kernel: str
    weights: str
    is_ours: bool
    timing: Timing | None = None
    relative_error: float | None = None
    is_correct: bool | None = None
    refusal: str | None = None

    def times(self) -> dict[str, Any]:
        """The part of a line that says how long it took, and whether it was right."""
        timing = self.timing
        return {
            "ms": None if timing is None else timing.median * 1e3,
            "ms_min": None if timing is None else timing.minimum * 1e3,
            "ms_max": None if timing is None else timing.maximum * 1e3,
            "repetitions": None if timing is None else timing.repetitions,
            "disturbed": None if timing is None else timing.disturbed,
            "relative_error": self.relative_error,
            "is_correct": self.is_correct,
            "refusal": self.refusal,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """Everything about one case.

    Attributes:
        slow_calls: calls of the C++ kernels that got fewer threads than they asked for.
    """

    case: Case
    machine: Machine
    floor: Floor
    contenders: tuple[ContenderResult, ...]
    slow_calls: int = 0

    @property
    def subjects(self) -> tuple[ContenderResult, ...]:
        """Those that the case is about: ours, or everybody where none is ours."""
        return tuple(c for c in self.contenders if c.is_ours) or self.contenders

    @property
    def best_peer(self) -> ContenderResult | None:
        """The fastest of the correct ones that are not ours."""
        peers = [c for c in self.contenders if not c.is_ours and c.timing and c.is_correct]
        return min(peers, key=lambda c: c.timing.median if c.timing else 0.0, default=None)

    @property
    def is_correct(self) -> bool:
        """Whether no result is wrong."""
        return all(c.is_correct is not False for c in self.contenders)

    def fraction_of_floor(self, of: ContenderResult) -> float | None:
        """Floor / median time; 1.0 is the limit itself."""
        return None if of.timing is None else self.floor.seconds / of.timing.median

    def ratio_to_best_peer(self, of: ContenderResult) -> float | None:
        """Median time / the best peer's; below 1.0 is faster."""
        best = self.best_peer
        if of.timing is None or best is None or best.timing is None or best is of:
            return None
        return of.timing.median / best.timing.median

    def lines(self) -> list[str]:
        """One line of JSON for each of `subjects`; the keys are those of docs/benchmarks/cpu.md."""
        return [json.dumps(self._record(subject)) for subject in self.subjects]

    def _record(self, of: ContenderResult) -> dict[str, Any]:
        floor, best = self.floor, self.best_peer
        seconds = None if of.timing is None else of.timing.median
        return {
            "kernel": of.kernel,
            "weights": of.weights,
            "shape": self.case.shape.name,
            "T": self.case.num_tokens,
            **of.times(),
            "GBps": None if seconds is None else floor.weight_bytes / seconds / 1e9,
            "GFLOPs": None if seconds is None else floor.flops / seconds / 1e9,
            "fraction_of_floor": self.fraction_of_floor(of),
            "floor_ms": floor.seconds * 1e3,
            "limited_by": floor.limited_by,
            "arithmetic": self.case.arithmetic.value,
            "weight_bytes": floor.weight_bytes,
            "flops": floor.flops,
            "bandwidth_before_GBps": floor.bandwidth_before / 1e9,
            "bandwidth_after_GBps": floor.bandwidth_after / 1e9,
            "peak_GFLOPs": floor.peak / 1e9,
            "slow_calls": self.slow_calls,
            "best_peer": None if best is None else best.name,
            "ratio_to_best_peer": self.ratio_to_best_peer(of),
            "peers": {
                peer.name: {"weights": peer.weights, **peer.times()}
                for peer in self.contenders
                if not peer.is_ours and peer is not of
            },
            "machine": dataclasses.asdict(self.machine),
        }
