"""Policies: pure functions `(loads, old placement, topology, budget) -> placement`, by name."""

from mixtura.entry_points import Group, PlugIns, wrong_offer
from mixtura.eplb.policies.contract import Budget, Plan, Policy
from mixtura.eplb.policies.deepseek import DEEPSEEK
from mixtura.eplb.policies.distinct import GLOBAL, HIERARCHICAL
from mixtura.eplb.policies.local_search import LOCAL_SEARCH
from mixtura.eplb.policies.quota import ModelQuota, ReplicaQuota, equal_quota, plan_quota
from mixtura.eplb.policies.random import RANDOM
from mixtura.eplb.policies.static import STATIC
from mixtura.errors import ConfigError

POLICIES: dict[str, Policy] = {
    policy.name: policy for policy in (DEEPSEEK, HIERARCHICAL, GLOBAL, LOCAL_SEARCH, RANDOM, STATIC)
}
"""Every policy of mixtura's own by its name."""


def _accept(name: str, offered: object) -> Policy:
    """A policy from what a package offers."""
    if not isinstance(offered, Policy) or offered.name != name:
        raise wrong_offer(name, f"be a Policy of the name {name!r}", repr(offered))
    if not callable(offered.plan):
        raise wrong_offer(name, "have a function as its plan", repr(offered.plan))
    return offered


PLUG_INS: PlugIns[Policy] = PlugIns(Group.POLICIES, _accept, lambda: POLICIES)
"""Policies of other packages."""


def policy_names() -> tuple[str, ...]:
    """Names of all policies, those of other packages behind ours."""
    return (*POLICIES, *PLUG_INS.names())


def policy_for(name: str) -> Policy:
    """The policy of that name.

    Raises:
        ConfigError: there is none; the message lists the names.
        PlugInError: it is that of a plug-in that cannot be used.
    """
    if name in POLICIES:
        return POLICIES[name]
    if name in PLUG_INS.names():
        return PLUG_INS.load(name)
    raise ConfigError(
        f"policy ({name!r}) must be one of {', '.join(policy_names())}; got another name. Use one "
        f"of these."
    )


__all__ = [
    "POLICIES",
    "Budget",
    "ModelQuota",
    "Plan",
    "Policy",
    "ReplicaQuota",
    "equal_quota",
    "plan_quota",
    "policy_for",
    "policy_names",
]
