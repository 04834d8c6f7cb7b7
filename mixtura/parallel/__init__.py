"""Ranks and what they hold: groups, placements of experts, the exchange before a forward."""

from mixtura.parallel.consistency import agree, check_consistent
from mixtura.parallel.membership import Regrouped, regroup
from mixtura.parallel.mesh import transport_over
from mixtura.parallel.placement import ExpertMap, ModelPlacement, Move, Placement
from mixtura.parallel.ranks import ExpertParallel, Spread
from mixtura.parallel.step import StepClock
from mixtura.parallel.tables import SlotTables
from mixtura.parallel.topology import Topology
from mixtura.parallel.transport import (
    LoneTransport,
    Pending,
    Ready,
    Then,
    TorchTransport,
    Transport,
    join,
)

__all__ = [
    "ExpertMap",
    "ExpertParallel",
    "LoneTransport",
    "ModelPlacement",
    "Move",
    "Pending",
    "Placement",
    "Ready",
    "Regrouped",
    "SlotTables",
    "Spread",
    "StepClock",
    "Then",
    "Topology",
    "TorchTransport",
    "Transport",
    "agree",
    "check_consistent",
    "join",
    "regroup",
    "transport_over",
]
