"""What an examination finds: a check is cases, and each passes, fails or is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mixtura.config.choice import Choice
from mixtura.entry_points import Group, one_line
from mixtura.errors import MixturaError


class Outcome(Choice):
    """What became of a check."""

    PASSED = "passed"
    FAILED = "failed"
    REFUSED = "refused"
    NOT_CLAIMED = "not claimed"


class Fault(MixturaError):
    """What is examined breaks its contract; the message says how."""


class Refused(MixturaError):
    """What is examined says that it does not do this; the message is its reason."""


Cases = Iterable[tuple[object, Callable[[], None]]]
"""What is tried, in words that make it again, and the trial: it returns, or raises."""

Promises = dict[str, Callable[[], Cases]]
"""What a contract promises, by the name of the check, and what tries it."""


@dataclass(frozen=True, slots=True)
class Check:
    """One check.

    Attributes:
        name: what is promised. outcome: whether it is kept.
        num_cases: tried, those that were refused included. num_refused: of them.
        detail: the case that failed, and how; the reason of the first that was refused; or why
            nothing was tried.
    """

    name: str
    outcome: Outcome
    num_cases: int = 0
    num_refused: int = 0
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """An examination.

    Attributes:
        group, name: of what was examined. origin: the package and version that bring it.
        checks: in the order in which they were made.
    """

    group: Group
    name: str
    origin: str
    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed; none, and the contract is kept."""
        return tuple(check for check in self.checks if check.outcome is Outcome.FAILED)


def run_check(name: str, promise: Callable[[], Cases]) -> Check:
    """Try cases until one fails; one that raises anything but `Refused` has failed.

    `Refused` while cases are made refuses the rest of them.
    """
    num_cases = num_refused = 0
    detail: str | None = None
    case: object = "its cases"
    try:
        for words, trial in promise():
            case, num_cases = words, num_cases + 1
            try:
                trial()
            except Refused as reason:
                num_refused += 1
                detail = detail or str(reason)
    except Refused as reason:
        return Check(name, Outcome.REFUSED, num_cases, num_refused, str(reason))
    except Exception as error:  # a stranger's code may raise anything
        return Check(name, Outcome.FAILED, num_cases, num_refused, f"{case}: {one_line(error)}")
    if num_cases == 0:
        return Check(name, Outcome.NOT_CLAIMED)
    is_refused = num_refused == num_cases
    outcome = Outcome.REFUSED if is_refused else Outcome.PASSED
    return Check(name, outcome, num_cases, num_refused, detail)


def require(is_kept: bool, fault: str) -> None:
    """Raise `Fault` where a promise is not kept."""
    if not is_kept:
        raise Fault(fault)
