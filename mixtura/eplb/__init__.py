"""Expert load balancing: which experts get replicas, and which rank holds what.

Pure functions of loads: `rebalance` plans a placement, `plan_quota` splits loads over the replicas
there are, `decide` says whether a move pays, `balancedness` how even ranks are; `simulate` replays
routing through every policy. While a model runs, `ExpertBalancer` counts, plans and moves.
"""

from mixtura.eplb.balancer import Activity, BalancedLayer, BalancerReport, ExpertBalancer
from mixtura.eplb.decision import Candidate, Decision, Economy, decide
from mixtura.eplb.metrics import (
    balancedness,
    balancedness_of_sums,
    imbalance_ratio,
    moved_bytes,
    moved_slots,
    predicted_gain,
    rank_loads,
)
from mixtura.eplb.migration import Migration
from mixtura.eplb.policies import (
    POLICIES,
    Budget,
    ModelQuota,
    Policy,
    ReplicaQuota,
    equal_quota,
    plan_quota,
    policy_for,
    policy_names,
)
from mixtura.eplb.rebalancing import rebalance
from mixtura.eplb.simulation import (
    Recommendation,
    Replay,
    Simulation,
    SimulationConfig,
    StepCosts,
    loads_of_choices,
    recommend,
    simulate,
)
from mixtura.eplb.state import EplbLayerState, ExpertLoadLedger
from mixtura.eplb.traces import SyntheticTrace, TraceSizes, synthetic_choices

__all__ = [
    "POLICIES",
    "Activity",
    "BalancedLayer",
    "BalancerReport",
    "Budget",
    "Candidate",
    "Decision",
    "Economy",
    "EplbLayerState",
    "ExpertBalancer",
    "ExpertLoadLedger",
    "Migration",
    "ModelQuota",
    "Policy",
    "Recommendation",
    "Replay",
    "ReplicaQuota",
    "Simulation",
    "SimulationConfig",
    "StepCosts",
    "SyntheticTrace",
    "TraceSizes",
    "balancedness",
    "balancedness_of_sums",
    "decide",
    "equal_quota",
    "imbalance_ratio",
    "loads_of_choices",
    "moved_bytes",
    "moved_slots",
    "plan_quota",
    "policy_for",
    "policy_names",
    "predicted_gain",
    "rank_loads",
    "rebalance",
    "recommend",
    "simulate",
    "synthetic_choices",
]
