"""mixtura runs Mixture-of-Experts language models.

One MoE layer - gate, router, shared experts, dispatch, expert kernels, combine - that computes the
same thing on a laptop CPU, on one GPU and across the ranks of a cluster, under Hugging Face
Transformers models.

Importing the package is quick: it loads neither torch nor Transformers. What needs them is
imported when its name is first asked for, and the experts function is offered to Transformers all
the same.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mixtura.config import (
    SWIGLU_OAI,
    Activation,
    ActivationFunction,
    ExpertsConfig,
    GatePrecision,
    GateUp,
    MoEConfig,
    ParallelConfig,
    RoutingConfig,
    RunnerConfig,
    SharedExpertsConfig,
    SharedExpertsOrder,
    TokensHeld,
)
from mixtura.errors import MixturaError
from mixtura.plugin import offer

if TYPE_CHECKING:
    from mixtura.hf import (
        adapter_names,
        capture_routing,
        convert,
        from_pretrained,
        load_adapter,
        packed_config,
        replay_routing,
        select_adapters,
        unload_adapter,
    )
    from mixtura.layer import FusedMoE, is_moe_layer
    from mixtura.routing import create_router
    from mixtura.types import Routing, TokenInputs

__version__ = "0.1.0"

__all__ = [
    "SWIGLU_OAI",
    "Activation",
    "ActivationFunction",
    "ExpertsConfig",
    "FusedMoE",
    "GatePrecision",
    "GateUp",
    "MixturaError",
    "MoEConfig",
    "ParallelConfig",
    "Routing",
    "RoutingConfig",
    "RunnerConfig",
    "SharedExpertsConfig",
    "SharedExpertsOrder",
    "TokenInputs",
    "TokensHeld",
    "adapter_names",
    "capture_routing",
    "convert",
    "create_router",
    "from_pretrained",
    "is_moe_layer",
    "load_adapter",
    "packed_config",
    "replay_routing",
    "select_adapters",
    "unload_adapter",
]

_LATE = {
    "FusedMoE": "mixtura.layer",
    "Routing": "mixtura.types",
    "TokenInputs": "mixtura.types",
    "capture_routing": "mixtura.hf",
    "adapter_names": "mixtura.hf",
    "convert": "mixtura.hf",
    "create_router": "mixtura.routing",
    "from_pretrained": "mixtura.hf",
    "is_moe_layer": "mixtura.layer",
    "load_adapter": "mixtura.hf",
    "packed_config": "mixtura.hf",
    "replay_routing": "mixtura.hf",
    "select_adapters": "mixtura.hf",
    "unload_adapter": "mixtura.hf",
}
"""Names whose modules need torch, imported when first asked for."""

offer()


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module 'mixtura' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LATE[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE})
