"""Policies: pure functions `(loads, old placement, topology, budget) -> placement`, by name."""

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
"""Every policy by its name."""


def policy_for(name: str) -> Policy:
    """The policy of that name.

    Raises:
        ConfigError: there is none; the message lists the names.
    """
    if name not in POLICIES:
        raise ConfigError(
            f"policy ({name!r}) must be one of {', '.join(POLICIES)}; got another name. Use one of "
            f"these."
        )
    return POLICIES[name]


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
]
