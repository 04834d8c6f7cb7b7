"""The sweep behind `mixtura tune`: every candidate beside the table's blocks, winners once more.

Who measures is given, so that nothing here needs a GPU: see measuring.py, and child.py around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import geometric_mean
from typing import Protocol

from mixtura.kernels.triton.candidates import Case, candidates
from mixtura.kernels.triton.device import Device
from mixtura.kernels.triton.journal import Journal
from mixtura.kernels.triton.table import Blocks, Key
from mixtura.kernels.triton.trials import MeasuringLost, Timed, Trial

MARGIN = 0.03
"""Of the time, that a candidate must save: less comes and goes with the weather of a GPU."""

NOISE = 0.01
"""Of the time, that it may lose at one number of rows while it saves at another."""

MAX_CONFIRMED = 3
"""Winners of a sweep that are measured again until one wins again."""


class Measure(Protocol):
    """Measures candidates beside the table's blocks."""

    def __call__(self, case: Case, blocks: Blocks, is_final: bool) -> Trial:
        """Times of both in turns, after the results have been compared; longer if final.

        Raises:
            MeasuringLost: nothing more can be measured.
        """


class Verdict(StrEnum):
    """What became of a case."""

    KEPT = "kept"
    STAYS = "not kept"
    PARTLY = "not kept yet"
    FAILED = "failed"
    NOT_REACHED = "not reached"


@dataclass(frozen=True, slots=True)
class Outcome:
    """A case that is done, as far as the time allowed.

    Attributes:
        blocks, timed: the winner with its second measurement; without one, the best of the sweep,
            or None.
        num_measured: of num_candidates; failures are among them.
        failures: candidates that could not run, or gave wrong results, each with the reason.
        note: why nothing could be measured, or measuring ended.
    """

    case: Case
    verdict: Verdict
    blocks: Blocks | None = None
    timed: Timed | None = None
    num_measured: int = 0
    num_candidates: int = 0
    failures: tuple[tuple[Blocks, str], ...] = ()
    note: str | None = None


def wins(timed: Timed) -> bool:
    """Whether a candidate is worth an entry: faster on the whole, and nowhere slower."""
    return timed.ratio <= 1 - MARGIN and not loses(timed)


def loses(trial: Trial) -> bool:
    """Whether a candidate must not be an entry: it cannot run, or is slower somewhere."""
    return not isinstance(trial, Timed) or trial.worst > 1 + NOISE


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A sweep over the products of a model's experts.

    Attributes:
        known: entries that there are already; they are tried again, first.
        is_over: whether the time is up; asked before a candidate is measured.
        tell: called with every trial that is made, and none that was found in the journal.
    """

    device: Device
    measure: Measure
    journal: Journal
    known: Mapping[Key, Blocks]
    is_over: Callable[[], bool]
    tell: Callable[[Case, Blocks, Trial], None]

    def run(self, cases: Sequence[Case]) -> Iterator[Outcome]:
        """The outcome of every case, each as soon as it is known."""
        lost = None
        for case in cases:
            if lost is not None:
                yield Outcome(case, Verdict.NOT_REACHED, note=lost)
                continue
            try:
                yield self._outcome(case)
            except MeasuringLost as error:
                lost = str(error)
                yield Outcome(case, Verdict.FAILED, note=lost)

    def _outcome(self, case: Case) -> Outcome:
        known = [self.known[case.key]] if case.key in self.known else []
        tried = tuple(dict.fromkeys([*known, *candidates(case.key, self.device)]))
        timed: dict[Blocks, Timed] = {}
        failures = []
        for candidate in tried:
            trial = self._trial(case, candidate, is_final=False)
            if isinstance(trial, Timed):
                timed[candidate] = trial
            elif trial is not None and trial.ends_case:
                return Outcome(case, Verdict.FAILED, note=trial.reason, num_candidates=len(tried))
            elif trial is not None:
                failures.append((candidate, trial.reason))
        num_measured = len(timed) + len(failures)
        best = sorted(timed, key=lambda one: timed[one].ratio)
        verdict = Verdict.STAYS
        if num_measured < len(tried):
            verdict = Verdict.PARTLY if num_measured else Verdict.NOT_REACHED
        blocks, shown = (best[0], timed[best[0]]) if best else (None, None)
        for winner in self._winners(case, timed)[:MAX_CONFIRMED]:
            again = self._trial(case, winner, is_final=True)
            if not isinstance(again, Timed) or loses(again):
                continue
            if wins(again) or self._has_won_elsewhere(case, winner):
                verdict, blocks, shown = Verdict.KEPT, winner, again
                break
        return Outcome(
            case, verdict, blocks, shown, num_measured, len(tried), failures=tuple(failures)
        )

    def _winners(self, case: Case, timed: Mapping[Blocks, Timed]) -> list[Blocks]:
        """What won here or in another case of the same entry, and lost in none: the best first.

        Cases of one entry differ in rows or in K; of those to come nothing is known yet.
        """
        ratios = {}
        for blocks, here in timed.items():
            others = self.journal.elsewhere(case, blocks, is_final=False)
            last_looks = self.journal.elsewhere(case, blocks, is_final=True)
            if any(map(loses, (here, *others, *last_looks))):
                continue
            if wins(here) or self._has_won_elsewhere(case, blocks):
                found = [here, *(one for one in others if isinstance(one, Timed))]
                ratios[blocks] = geometric_mean(one.ratio for one in found)
        return sorted(ratios, key=lambda blocks: ratios[blocks])

    def _has_won_elsewhere(self, case: Case, blocks: Blocks) -> bool:
        trials = self.journal.elsewhere(case, blocks, is_final=True)
        return any(isinstance(trial, Timed) and wins(trial) for trial in trials)

    def _trial(self, case: Case, blocks: Blocks, *, is_final: bool) -> Trial | None:
        """From the journal, or made; None where the time is up. A last look is always taken."""
        trial = self.journal.find(case, blocks, is_final)
        if trial is None and (is_final or not self.is_over()):
            trial = self.measure(case, blocks, is_final)
            if isinstance(trial, Timed) or not trial.ends_case:
                self.journal.add(case, blocks, is_final, trial)
            self.tell(case, blocks, trial)
        return trial


def updated(entries: Mapping[Key, Blocks], outcome: Outcome) -> dict[Key, Blocks]:
    """Entries after an outcome: a winner is put in; where all were measured and none won, none is.

    An entry of an earlier sweep or case was among the candidates, and has won where it won
    elsewhere and did not lose here.
    """
    changed = dict(entries)
    if outcome.verdict is Verdict.KEPT:
        assert outcome.blocks is not None
        changed[outcome.case.key] = outcome.blocks
    elif outcome.verdict is Verdict.STAYS:
        changed.pop(outcome.case.key, None)
    return changed
