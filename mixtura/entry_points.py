"""Plug-ins: what installed packages offer under the entry-point groups `mixtura.*`.

A group's entry points are read when a name of the group is first looked up, and a plug-in is
imported when it is first compared or asked for; `import mixtura` does neither. One that cannot be
used is a `PlugIn` with a problem, and an error only where it was asked for by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, NamedTuple, TypeVar

from mixtura.config.choice import Choice
from mixtura.errors import ConfigError, MixturaError, PlugInError

API_VERSIONS = (1,)
"""Versions of the contracts of plug-ins that this mixtura keeps."""

STATED_AS = "MIXTURA_API"
"""What a plug-in's module calls the version that it was written for; without it, that is 1."""

T = TypeVar("T")


class Group(Choice):
    """What can be plugged in; the entry-point group is `mixtura.` and the value."""

    KERNELS = "kernels"
    CODECS = "codecs"
    ROUTERS = "routers"
    POLICIES = "policies"
    FAMILIES = "families"

    @property
    def entry_points(self) -> str:
        """The group's name in the metadata of packages."""
        return f"mixtura.{self.value}"


@dataclass(frozen=True, slots=True)
class PlugIn:
    """A plug-in that is installed.

    Attributes:
        group, name: what it is, and what it is called there.
        package, version: the distribution that brings it.
        problem: why it cannot be used, in one line; None where it can.
    """

    group: Group
    name: str
    package: str
    version: str
    problem: str | None = None

    @property
    def origin(self) -> str:
        """Package and version in words."""
        return f"{self.package} {self.version}".strip()


class Offer(NamedTuple):
    """Who offers a name, and how what it stands for is got."""

    package: str
    version: str
    load: Callable[[], object]


class PlugIns(Generic[T]):
    """The plug-ins of one group.

    Args:
        group: whose.
        accept: what a name gives, checked: `accept(name, loaded)`; raises where it breaks the
            group's contract.
        built_in: names that are taken; a plug-in of such a name is reported, and never used.
    """

    def __init__(
        self,
        group: Group,
        accept: Callable[[str, object], T],
        built_in: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self.group = group
        self._accept = accept
        self._built_in = built_in
        self._loaded: dict[str, T] = {}
        self._faults: dict[str, str] = {}

    @cached_property
    def _offers(self) -> dict[str, tuple[Offer, ...]]:
        found: dict[str, tuple[Offer, ...]] = {}
        for point in entry_points(group=self.group.entry_points):
            assert point.dist is not None  # as it was found in a distribution
            offer = Offer(point.dist.name, point.dist.version, partial(_import, point))
            found[point.name] = (*found.get(point.name, ()), offer)
        return dict(sorted(found.items()))

    def add(self, name: str, offered: object) -> None:
        """Plug something in for this process alone, as if a package offered it.

        Raises:
            ConfigError: the name is taken, or what it gives breaks the group's contract.
        """
        if name in self._built_in() or name in self._offers:
            raise ConfigError(
                f"the name ({name!r}) must be new in {self.group.value}; got one that exists. "
                f"Choose another."
            )
        self._loaded[name] = self._accept(name, offered)
        self._offers[name] = (Offer("this process", "", lambda: offered),)

    def remove(self, name: str) -> None:
        """Take a plug-in out, for this process; who holds what it gave keeps it."""
        for held in (self._offers, self._loaded, self._faults):
            held.pop(name, None)

    def names(self) -> tuple[str, ...]:
        """Names that are no built-in's, sorted; nothing is imported, so some may be broken."""
        return tuple(name for name in self._offers if name not in self._built_in())

    def load(self, name: str) -> T:
        """What the plug-in of one of `names` gives, imported once.

        Raises:
            PlugInError: it cannot be used; the message says why.
        """
        fault = self._fault(name)
        if fault is not None:
            origins = " and ".join(plug_in.origin for plug_in in self._reports(name))
            raise PlugInError(
                f"plug-in {name!r} of {self.group.entry_points} ({origins}) must load and keep the "
                f"group's contract; got {fault} Mend or uninstall the package; 'mixtura doctor' "
                f"lists all plug-ins."
            )
        return self._loaded[name]

    def usable(self) -> dict[str, T]:
        """Every plug-in that can be used, by name."""
        return {name: self._loaded[name] for name in self._offers if self._fault(name) is None}

    def reports(self) -> tuple[PlugIn, ...]:
        """Every plug-in, sound or not; all are imported."""
        return tuple(report for name in self._offers for report in self._reports(name))

    def _reports(self, name: str) -> list[PlugIn]:
        fault = self._fault(name)
        return [PlugIn(self.group, name, *offer[:2], fault) for offer in self._offers[name]]

    def _fault(self, name: str) -> str | None:
        """Why a name cannot be used, found out once; None where it is in `_loaded`."""
        if name in self._built_in():
            return "a name that mixtura has itself."
        if name not in self._loaded and name not in self._faults:
            try:
                self._loaded[name] = self._take(name)
            except (Exception, SystemExit) as error:  # a stranger's code may raise anything
                self._faults[name] = one_line(error)
        return self._faults.get(name)

    def _take(self, name: str) -> T:
        first, *others = self._offers[name]
        if others:
            raise PlugInError("two packages that offer the name.")
        return self._accept(name, first.load())


def _import(point: EntryPoint) -> Any:
    """What an entry point names, of a module that keeps a version which we have."""
    loaded = point.load()
    stated = getattr(sys.modules[point.module], STATED_AS, 1)
    if stated not in API_VERSIONS:
        known = ", ".join(map(str, API_VERSIONS))
        raise PlugInError(f"{STATED_AS} {stated!r}, and this mixtura has {known}.")
    return loaded


def one_line(error: BaseException) -> str:
    """An error in one line that ends in a full stop; our own without its type."""
    text = " ".join(str(error).split())
    if not isinstance(error, MixturaError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."


def wrong_offer(name: str, rule: str, got: object) -> ConfigError:
    """The error that what an entry point gives is not what its group wants."""
    return ConfigError(f"what {name!r} names must {rule}; got {got}.")
