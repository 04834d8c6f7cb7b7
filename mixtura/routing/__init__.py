"""Routing: router logits -> `Routing`.

`create_router(config).route(router_logits)` is the whole of it.
"""

from mixtura.routing.custom import CustomRouting
from mixtura.routing.families import NOT_COVERED
from mixtura.routing.routers import (
    CustomRoutingRouter,
    FusedSharedExpertsRouter,
    FusedTopKBiasRouter,
    FusedTopKRouter,
    GroupedTopKRouter,
    HashRouter,
    Router,
    RouterTensors,
    RoutingSimulatorRouter,
    ZeroExpertRouter,
    create_router,
    router_for,
)

__all__ = [
    "NOT_COVERED",
    "CustomRouting",
    "CustomRoutingRouter",
    "FusedSharedExpertsRouter",
    "FusedTopKBiasRouter",
    "FusedTopKRouter",
    "GroupedTopKRouter",
    "HashRouter",
    "Router",
    "RouterTensors",
    "RoutingSimulatorRouter",
    "ZeroExpertRouter",
    "create_router",
    "router_for",
]
