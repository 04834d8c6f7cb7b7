"""One case on a device: every contender is bound, checked, captured, and timed in turns.

A contender that fails is a result with its reason. What fails on the device so that nothing runs
there any more ends the run, after what is known has been told.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mixtura.bench.cases import Case
from mixtura.bench.contenders import STACKS, Contender, Layer
from mixtura.bench.gpu.arithmetic import NAMES, product_dtype
from mixtura.bench.gpu.batches import BatchSource, LayerBatch, Spread
from mixtura.bench.gpu.checks import Errors, Truths
from mixtura.bench.gpu.device import CannotCapture, Device, first_line
from mixtura.bench.gpu.limits import Bandwidth, Peak, nominal_limits, probe_bandwidth
from mixtura.bench.gpu.results import LayerResult, Place, floor_keys, time_keys
from mixtura.bench.gpu.rotation import (
    Given,
    Measure,
    Mode,
    Rotation,
    bind,
    num_steps,
    poison,
)
from mixtura.bench.measure import MIN_REPETITIONS, Timing, interleave
from mixtura.bench.results import Floor
from mixtura.bench.weights import COLD_CACHES, LayerWeights, num_cold_sets

LEAST_SETS = 3
"""Sets of weights, where memory allows it."""

NUM_BATCHES, NUM_LARGE_BATCHES = 17, 5
"""Batches that take turns: prime numbers, so that every set of weights meets every batch."""

LARGE_TOKENS = 512
"""Batches of more tokens than this hit all experts anyway; fewer of them do."""

MEMORY_SHARE = 0.9
"""Of the free memory, what weights and rows may take."""

ROW_COPIES = 8
"""Intermediate matrices of (slots, widest) that a contender may have at a time."""

WARM_UP_SHARE = 0.1
"""Of a case's seconds: calls in turn before the first that counts."""

MOST_SHARES = 6
"""A peer whose few repetitions would take so many times its share of the time is left out."""


class DeviceLost(Exception):
    """The device answers no more; `results` are what is known of the case."""

    def __init__(self, message: str, results: list[LayerResult]) -> None:
        super().__init__(message)
        self.results = results


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all cases of a run share.

    Attributes:
        peak: of dense products by the dtype that is multiplied, measured.
        seconds: for the timing of a case.
    """

    device: Device
    place: Place
    peak: dict[torch.dtype, Peak]
    spread: Spread
    seconds: float


def run_case(case: Case, contenders: Sequence[Contender], bench: Bench) -> list[LayerResult]:
    """Four results of every contender: two measures in two modes.

    Raises:
        DeviceLost: nothing runs on the device any more.
    """
    bench.device.release()
    with torch.no_grad():
        return CaseRun(case, contenders, bench).run()


def sets_that_fit(case: Case, contenders: Sequence[Contender], device: Device) -> tuple[int, int]:
    """(sets of weights to rotate through, sets that would do)."""
    cold_bytes = COLD_CACHES * device.facts().cache_bytes
    wanted = max(LEAST_SETS, num_cold_sets(case, case.expert_bytes, cold_bytes))
    kept = {contender.holds(case): contender.expert_bytes(case) for contender in contenders}
    each = sum({STACKS: case.expert_bytes, **kept}.values())
    experts = case.shape.experts
    widest = max(experts.hidden_size, experts.up_size)
    row_bytes = ROW_COPIES * case.num_slots * widest * case.dtype.itemsize
    budget = MEMORY_SHARE * device.free_bytes() - row_bytes
    fitting = int(budget // (experts.num_experts * each))
    return min(wanted, max(fitting, 0)), wanted


def floor_of(case: Case, batches: Sequence[LayerBatch], bandwidth: float, peak: float) -> Floor:
    """The floor of a case: the experts that its batches hit once, rows in and out once."""
    count = len(batches)
    rows = 2 * case.num_tokens * case.shape.experts.hidden_size * case.dtype.itemsize
    slots = sum(batch.num_slots for batch in batches)
    return Floor(
        weight_bytes=sum(batch.num_experts for batch in batches) * case.expert_bytes // count,
        flops=2 * slots * case.shape.weights_per_expert // count,
        bandwidth_before=bandwidth,
        bandwidth_after=bandwidth,
        peak=peak,
        row_bytes=rows,
    )


Call = tuple[str, Measure, Mode]
"""A contender's name, and what of it is timed."""


class CaseRun:
    """The state of one case while it runs."""

    def __init__(self, case: Case, contenders: Sequence[Contender], bench: Bench) -> None:
        self.case, self.contenders, self.bench = case, contenders, bench
        self.device = bench.device
        self.refused: dict[str, str] = {}
        self.refused_calls: dict[Call, str] = {}
        self.errors: dict[tuple[str, Measure], Errors] = {}
        self.timings: dict[Call, Timing] = {}
        self.state: dict[str, float] | None = None
        self.kernels = {contender.name: contender.name for contender in contenders}
        self.num_sets = self.wanted_sets = self.steps = 0
        self.batches: list[LayerBatch] = []
        self.before = self.after = Bandwidth(copy=0.0, read=0.0)

    def run(self) -> list[LayerResult]:
        """Measure, and let go of everything."""
        case, device = self.case, self.device
        self.before = self.after = probe_bandwidth(device)
        count = NUM_BATCHES if case.num_tokens <= LARGE_TOKENS else NUM_LARGE_BATCHES
        source = BatchSource(case, self.bench.spread)
        self.batches = [source.draw() for _ in range(count)]
        half = source.draw_half()
        running = [c for c in self.contenders if self._is_willing(c)]
        self.num_sets, self.wanted_sets = sets_that_fit(case, running, device)
        floor = self._floor()
        self.steps = num_steps(max(self.num_sets, 1), count, floor.seconds)
        if self.num_sets:
            try:
                self._measure(running, source, half)
            except torch.OutOfMemoryError as error:  # of what all are given
                self.refused.update({contender.name: first_line(error) for contender in running})
        else:
            gigabytes = case.shape.experts.num_experts * case.expert_bytes / 1e9
            reason = f"one set of weights ({gigabytes:.1f} GB) does not fit in the device's memory"
            self.refused.update({contender.name: reason for contender in running})
        device.release()
        self.after = probe_bandwidth(device)
        return self._results()

    def _measure(self, running: Sequence[Contender], source: BatchSource, half: LayerBatch) -> None:
        """Make weights and truths, check everybody, time them."""
        case = self.case
        weights = LayerWeights(case.shape, case.weights, device=case.device)
        layers = [Layer(case, weights, number) for number in range(self.num_sets)]
        truths = [Truths.of(case, weights, batch) for batch in (self.batches[0], half)]
        given = Given(case, layers, self.batches, half, source.tensors, self.steps)
        self._time(self._calls(running, given, truths))

    def _is_willing(self, contender: Contender) -> bool:
        try:
            reason = contender.refusal(self.case)
            if reason is None:
                self.kernels[contender.name] = contender.kernel(self.case)
        except Exception as error:  # of a package that is there and cannot be imported, say
            reason = first_line(error)
        if reason is not None:
            self.refused[contender.name] = " ".join(reason.split())
        return reason is None

    def _calls(
        self, running: Sequence[Contender], given: Given, truths: Sequence[Truths]
    ) -> dict[Call, Callable[[], object]]:
        """What is timed: everything of the contenders that ran, checked and captured."""
        calls: dict[Call, Callable[[], object]] = {}
        for contender in running:
            found = self._attempt(
                contender.name, functools.partial(self._bind, contender, given, truths)
            )
            calls.update(found or {})
        return calls

    def _bind(
        self, contender: Contender, given: Given, truths: Sequence[Truths]
    ) -> dict[Call, Callable[[], object]]:
        calls: dict[Call, Callable[[], object]] = {}
        for measure, rotation in bind(contender, given).items():
            errors = self._errors(rotation, measure, truths)
            calls[contender.name, measure, Mode.EAGER] = rotation.run
            try:
                graph = self.device.capture(rotation.run)
            except CannotCapture as error:
                call = (contender.name, measure, Mode.GRAPH)
                self.refused_calls[call] = f"cannot be captured: {error}"
            else:
                for _ in range(2):  # what a replay leaves behind must not hurt the next
                    graph.output.fill_(torch.nan)
                    graph.replay()
                errors.append(truths[0].errors(graph.output, measure))
                calls[contender.name, measure, Mode.GRAPH] = graph.replay
            self.errors[contender.name, measure] = Errors.worst(errors)
        return {call: run for call, run in calls.items() if self._is_worth_it(contender, call, run)}

    def _errors(
        self, rotation: Rotation, measure: Measure, truths: Sequence[Truths]
    ) -> list[Errors]:
        """Of layer 0 on a batch, and on one that leaves half of the experts alone."""
        poison(self.case)
        whole = truths[0].errors(rotation.run(), measure)
        poison(self.case)
        return [whole, truths[1].errors(rotation.run_half(), measure)]

    def _is_worth_it(self, contender: Contender, call: Call, run: Callable[[], object]) -> bool:
        """Whether its share of the time is enough for a median; ours are timed in any case."""
        num_calls = len(self.contenders) * len(Measure) * len(Mode)
        share = MOST_SHARES * self.bench.seconds / num_calls
        needed = MIN_REPETITIONS * self.device.seconds(run)
        if needed > share and not contender.is_ours and self.bench.seconds > 0:
            each = needed / MIN_REPETITIONS / self.steps
            self.refused_calls[call] = f"takes {each * 1e3:.3g} ms a layer, too long to be timed"
            return False
        return True

    def _time(self, calls: dict[Call, Callable[[], object]]) -> None:
        """Time calls in turns; whoever fails meanwhile is left out."""
        if not calls:
            return
        names = {" ".join(call): call for call in calls}

        def guarded(call: Call, number: int) -> None:
            if call[0] not in self.refused:
                self._attempt(call[0], calls[call], finishes=False)

        timings = interleave(
            {name: functools.partial(guarded, call) for name, call in names.items()},
            seconds=self.bench.seconds,
            clock=lambda call: (self.device.seconds(call), False),
            warm_up=WARM_UP_SHARE * self.bench.seconds,
        )
        self.state = self.device.state()
        self.timings = {names[name]: timing for name, timing in timings.items()}

    def _attempt(self, name: str, action: Callable[[], Any], *, finishes: bool = True) -> Any:
        """Run something of a contender; what goes wrong is its refusal."""
        try:
            result = action()
            if finishes:
                self.device.finish()
            return result
        except Exception as error:
            self.refused[name] = first_line(error)
        try:
            self.device.finish()
        except Exception as error:
            lost = self._results([c for c in self.contenders if c.name in self.refused])
            raise DeviceLost(f"{name}: {first_line(error)}", lost) from None
        return None

    def _floor(self) -> Floor:
        floor = floor_of(self.case, self.batches, self.before.best, self._peak.rate)
        return replace(floor, bandwidth_after=self.after.best)

    def _nominal_seconds(self) -> float | None:
        limits = nominal_limits(self.bench.place.device["name"])
        peak = None if limits is None else limits.peak_of(product_dtype(self.case))
        if limits is None or peak is None:
            return None
        return floor_of(self.case, self.batches, limits.bandwidth, peak).seconds

    @property
    def _peak(self) -> Peak:
        return self.bench.peak[product_dtype(self.case)]

    def _note(self) -> str | None:
        is_short = 0 < self.num_sets < self.wanted_sets
        sets = f"memory for {self.num_sets} of {self.wanted_sets} sets" if is_short else None
        return "; ".join(filter(None, (sets, self._peak.note))) or None

    def _results(self, contenders: Sequence[Contender] | None = None) -> list[LayerResult]:
        """All results of these contenders, or of everybody."""
        return [
            self._result(contender, measure, mode)
            for contender in (self.contenders if contenders is None else contenders)
            for measure in Measure
            for mode in Mode
        ]

    def _result(self, contender: Contender, measure: Measure, mode: Mode) -> LayerResult:
        case, call = self.case, (contender.name, measure, mode)
        is_refused = contender.name in self.refused
        refusal = self.refused.get(contender.name) or self.refused_calls.get(call)
        timing = None if refusal else self.timings.get(call)
        errors = None if is_refused else self.errors.get((contender.name, measure))
        floor, nominal = self._floor(), self._nominal_seconds()
        return LayerResult(
            shape=case.shape.name,
            T=case.num_tokens,
            dtype=str(case.dtype).removeprefix("torch."),
            weights=case.weights.value,
            activations=NAMES[product_dtype(case)],
            routing=self.bench.spread.value,
            contender=contender.name,
            measure=measure.value,
            mode=mode.value,
            kernel=self.kernels[contender.name],
            is_ours=contender.is_ours,
            refusal=refusal,
            relative_error=None if errors is None else errors.exact,
            rounded_error=None if errors is None else errors.rounded_of(case, contender),
            is_correct=None if errors is None else errors.are_small(case, contender),
            **floor_keys(floor, nominal, self.before, self.after),
            **({} if timing is None else time_keys(timing.per(self.steps), floor, nominal)),
            experts_hit=floor.weight_bytes / case.expert_bytes,
            slots=floor.flops / (2 * case.shape.weights_per_expert),
            layers=self.steps,
            weight_sets=self.num_sets,
            batches=len(self.batches),
            note=self._note(),
            state=self.state,
            place=self.bench.place,
        )
