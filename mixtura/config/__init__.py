"""What an MoE layer is, as frozen values; every cross-field check happens here, at construction.

Enumerations are the edge where strings stop: `ActivationFunction.parse("silu")` and its siblings
turn a configuration string into a value, or say which values there are.
"""

from mixtura.config.choice import (
    MAX_ELEMENTS,
    Choice,
    require_finite,
    require_positive,
)
from mixtura.config.experts import (
    SWIGLU_OAI,
    Activation,
    ActivationDtype,
    ActivationFunction,
    ExpertsConfig,
    GateUp,
    LimitOn,
    PostNorm,
)
from mixtura.config.layer import (
    GatePrecision,
    MoEConfig,
    RunnerConfig,
    SharedExpertsConfig,
    SharedExpertsOrder,
)
from mixtura.config.parallel import (
    DispatcherName,
    EplbConfig,
    ParallelConfig,
    PlacementStrategy,
    TokensHeld,
    WireFormat,
)
from mixtura.config.routing import (
    DroppedGroup,
    GroupLimit,
    GroupScore,
    NativeGate,
    NoComputeExperts,
    NoComputeKind,
    Renormalize,
    RoutingConfig,
    ScaleOn,
    ScoreFunction,
    ScoreOrder,
    SelectionBias,
    Simulation,
    SimulationConfig,
    WeightOn,
)

__all__ = [
    "MAX_ELEMENTS",
    "SWIGLU_OAI",
    "Activation",
    "ActivationDtype",
    "ActivationFunction",
    "Choice",
    "DispatcherName",
    "DroppedGroup",
    "EplbConfig",
    "ExpertsConfig",
    "GatePrecision",
    "GateUp",
    "GroupLimit",
    "GroupScore",
    "LimitOn",
    "MoEConfig",
    "NativeGate",
    "NoComputeExperts",
    "NoComputeKind",
    "ParallelConfig",
    "PlacementStrategy",
    "PostNorm",
    "Renormalize",
    "RoutingConfig",
    "RunnerConfig",
    "ScaleOn",
    "ScoreFunction",
    "ScoreOrder",
    "SelectionBias",
    "SharedExpertsConfig",
    "SharedExpertsOrder",
    "Simulation",
    "SimulationConfig",
    "TokensHeld",
    "WeightOn",
    "WireFormat",
    "require_finite",
    "require_positive",
]
