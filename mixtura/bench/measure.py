"""How it is measured: contenders take turns; samples that others disturbed are dropped."""

from __future__ import annotations

import gc
import math
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

MIN_REPETITIONS = 5
"""Fewer samples than this have no median worth the name."""

MAX_REPETITIONS = 400
"""More samples than this do not change a median."""

PATIENCE = 2
"""A contender that is always disturbed is given up after so many times its share of the time."""


Clock = Callable[[Callable[[], object]], tuple[float, bool]]
"""Runs a function: how many seconds it took, and whether something disturbed it."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds per call.

    Attributes:
        samples: those that count, at least one.
        disturbed: samples left out because the operating system took a processor away meanwhile.
    """

    samples: tuple[float, ...]
    disturbed: int = 0

    @property
    def median(self) -> float:
        """As many samples are below as above."""
        return statistics.median(self.samples)

    @property
    def minimum(self) -> float:
        """The least."""
        return min(self.samples)

    @property
    def maximum(self) -> float:
        """The most."""
        return max(self.samples)

    @property
    def repetitions(self) -> int:
        """Samples that count."""
        return len(self.samples)

    def percentile(self, percent: int) -> float:
        """The least sample that is not below so many percent of all (nearest rank)."""
        rank = math.ceil(percent / 100 * len(self.samples))
        return sorted(self.samples)[max(rank, 1) - 1]

    def per(self, count: int) -> Timing:
        """The time of one part of a call that is made of so many alike."""
        return Timing(tuple(sample / count for sample in self.samples), self.disturbed)


@dataclass(slots=True)
class _Samples:
    """What one contender has shown so far."""

    quiet: list[float]
    disturbed: list[float]
    spent: float = 0.0

    def wants_more(self, share: float) -> bool:
        """Whether another sample is worth its time; `share` is this contender's time."""
        count = len(self.quiet)
        if count >= MAX_REPETITIONS:
            return False
        if count < MIN_REPETITIONS:
            num_samples = count + len(self.disturbed)
            return self.spent < PATIENCE * share or num_samples < MIN_REPETITIONS
        return self.spent < share

    def timing(self) -> Timing:
        kept = self.quiet if len(self.quiet) >= MIN_REPETITIONS else self.quiet + self.disturbed
        left_out = len(self.quiet) + len(self.disturbed) - len(kept)
        return Timing(tuple(kept), left_out)


def wall_clock(call: Callable[[], object]) -> tuple[float, bool]:
    """Seconds that the host waits; disturbed is whose processor was taken away meanwhile."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    start = time.perf_counter()
    call()
    elapsed = time.perf_counter() - start
    return elapsed, resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw != before


def interleave(
    calls: Mapping[str, Callable[[int], object]],
    *,
    seconds: float,
    clock: Clock = wall_clock,
    warm_up: float = 0.0,
) -> dict[str, Timing]:
    """Time functions in turn, so that a slow minute of the machine hits all of them.

    Args:
        calls: by name; given a number that grows by one from call to call, whoever is called.
        seconds: for all together; every function gets the same share, and a few calls at least.
        clock: what a call takes.
        warm_up: seconds of calls in turn before the first that counts; one round at least.
    """
    share = seconds / len(calls)
    samples = {name: _Samples([], []) for name in calls}
    names = list(calls)
    number = 0
    warmed = 0.0
    while number == 0 or warmed < warm_up:  # the first call packs weights and fills caches
        for call in calls.values():
            warmed += clock(partial(call, number))[0]
            number += 1
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        while due := [name for name in names if samples[name].wants_more(share)]:
            names = names[1:] + names[:1]
            for name in due:
                _sample(clock, partial(calls[name], number), samples[name])
                number += 1
    finally:
        if was_enabled:
            gc.enable()
    return {name: samples[name].timing() for name in calls}


def _sample(clock: Clock, call: Callable[[], object], samples: _Samples) -> None:
    elapsed, is_disturbed = clock(call)
    (samples.disturbed if is_disturbed else samples.quiet).append(elapsed)
    samples.spent += elapsed


def relative_error(found: Tensor, truth: Tensor) -> float:
    """`||found - truth|| / ||truth||`, in fp32; inf where a value is not finite."""
    error = float((found.float() - truth).norm() / truth.norm())
    return error if error == error else float("inf")
