"""The reference suites: what each kind of plug-in promises, tried on one of them.

`run_suite(name, group)` examines a plug-in, or what mixtura has under that name. A group's suite is
a module of its name here, imported when it is used: the `names()` that it can examine beside
plug-ins, `find(name)`, and `promises(found, device)`: checks by name.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mixtura.conformance.report import Check, Outcome, Report, run_check
from mixtura.entry_points import Group, PlugIns
from mixtura.errors import ConfigError

_PLUG_INS = {
    Group.KERNELS: "mixtura.kernels.registry",
    Group.CODECS: "mixtura.quant.codecs.registry",
    Group.ROUTERS: "mixtura.routing.custom",
    Group.POLICIES: "mixtura.eplb.policies",
    Group.FAMILIES: "mixtura.hf.family_plug_ins",
}
"""The module that holds `PLUG_INS` of a group."""


def plug_ins_of(group: Group | str) -> PlugIns[Any]:
    """The plug-ins of a group; those of families need Transformers."""
    found: PlugIns[Any] = import_module(_PLUG_INS[Group.parse(group)]).PLUG_INS
    return found


def suite_of(group: Group) -> Any:
    """The module that examines a group."""
    return import_module(f"mixtura.conformance.{group.value}")


def group_of(name: str) -> Group:
    """The one group that has something of that name.

    Raises:
        ConfigError: none has, or several have.
    """
    found = [
        group for group in Group if name in (*plug_ins_of(group).names(), *suite_of(group).names())
    ]
    if len(found) != 1:
        got = f"{', '.join(found)} have it" if found else "no group has it"
        remedy = "Say which with --group" if found else "Give its --group, which tells names"
        raise ConfigError(f"{name!r} must be a name of one group; got {got}. {remedy}.")
    return found[0]


def run_suite(name: str, group: Group | str, *, device: str = "cpu") -> Report:
    """Examine a plug-in, or what is built in under that name.

    Args:
        name: of it. group: whose suite.
        device: where kernels and routers get their tensors.

    Raises:
        ConfigError: the group has nothing of that name that can be examined.
        PlugInError: it is a plug-in that cannot be used.
    """
    group = Group.parse(group)
    suite, offered = suite_of(group), plug_ins_of(group)
    if name not in (*offered.names(), *suite.names()):
        known = ", ".join(dict.fromkeys((*suite.names(), *offered.names()))) or "none"
        raise ConfigError(
            f"the name ({name!r}) must be one of {group.value} that can be examined: {known}; got "
            f"another. Use one of these."
        )
    found = suite.find(name)
    origins = [report.origin for report in offered.reports() if report.name == name]
    promises = suite.promises(found, device)
    checks = tuple(run_check(check, promise) for check, promise in promises.items())
    return Report(group, name, origins[0] if name in offered.names() else "built in", checks)


__all__ = ["Check", "Group", "Outcome", "Report", "group_of", "plug_ins_of", "run_suite"]
