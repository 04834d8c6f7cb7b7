"""How it is measured: contenders take turns; samples that others disturbed are dropped."""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

MIN_REPETITIONS = 5
"""Fewer samples than this have no median worth the name."""

MAX_REPETITIONS = 400
"""More samples than this do not change a median."""

PATIENCE = 2
"""A contender that is always disturbed is given up after so many times its share of the time."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds per call.

    Attributes:
        repetitions: samples that count.
        disturbed: samples left out because the operating system took a processor away meanwhile.
    """

    median: float
    minimum: float
    maximum: float
    repetitions: int
    disturbed: int


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
        return Timing(statistics.median(kept), min(kept), max(kept), len(kept), left_out)


def interleave(
    calls: Mapping[str, Callable[[int], object]], *, seconds: float
) -> dict[str, Timing]:
    """Time functions in turn, so that a slow minute of the machine hits all of them.

    Args:
        calls: by name; given a number that grows by one from call to call, whoever is called.
        seconds: for all together; every function gets the same share, and a few calls at least.
    """
    share = seconds / len(calls)
    samples = {name: _Samples([], []) for name in calls}
    names = list(calls)
    number = 0
    for call in calls.values():  # the first call packs weights and fills caches
        call(number)
        number += 1
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        while due := [name for name in names if samples[name].wants_more(share)]:
            names = names[1:] + names[:1]
            for name in due:
                _sample(calls[name], number, samples[name])
                number += 1
    finally:
        if was_enabled:
            gc.enable()
    return {name: samples[name].timing() for name in calls}


def _sample(call: Callable[[int], object], number: int, samples: _Samples) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    start = time.perf_counter()
    call(number)
    elapsed = time.perf_counter() - start
    preempted = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw != before
    (samples.disturbed if preempted else samples.quiet).append(elapsed)
    samples.spent += elapsed


def relative_error(found: Tensor, truth: Tensor) -> float:
    """`||found - truth|| / ||truth||`, in fp32; inf where a value is not finite."""
    error = float((found.float() - truth).norm() / truth.norm())
    return error if error == error else float("inf")
