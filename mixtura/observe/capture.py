"""Recording which experts routers choose, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mixtura.config import ExpertsConfig, MoEConfig
from mixtura.cuda import is_capturing
from mixtura.errors import CaptureUnsupported, InputError
from mixtura.observe.trace import LayerTrace, RoutingTrace, check_range, ids_dtype

FOLD_TOKENS = 4096
"""Tokens of a layer whose ids wait to be checked and copied to the host."""


class LayerRecorder:
    """The observer of one layer: keeps the ids that it is shown, and looks at them later.

    Args:
        module: an MoE layer, or its experts.

    Raises:
        InputError: the module is neither.
    """

    def __init__(self, module: Any) -> None:
        self.num_experts, self.num_no_compute, self.top_k = layer_sizes(module)
        self.num_tokens = 0
        self._num_waiting = 0
        self._held: tuple[Tensor | None, list[Tensor]] = (None, [])

    def __call__(self, ids: Tensor, weights: Tensor) -> None:
        """Take the ids (T,K) of a call.

        Raises:
            CaptureUnsupported: the call is a part of a graph, which runs again without it.
        """
        refuse_graphs(ids)
        if is_in_backward():
            return  # activations that are computed again (gradient checkpointing)
        self._held[1].append(ids)
        num_tokens = len(ids)
        self.num_tokens += num_tokens
        self._num_waiting += num_tokens
        if self._num_waiting >= FOLD_TOKENS:
            self._fold()

    def keep(self, num_tokens: int) -> None:
        """Forget all but the first tokens."""
        if num_tokens < self.num_tokens:
            self._held = (self._fold()[:num_tokens], [])
            self.num_tokens = num_tokens

    def trace(self) -> LayerTrace:
        """What has been chosen until now.

        Raises:
            InputError: an id is none that a router chooses.
        """
        return LayerTrace(self._folded(), self.num_experts, self.num_no_compute)

    def _fold(self) -> Tensor:
        folded = self._folded()
        self._held, self._num_waiting = (folded, []), 0
        return folded

    def _folded(self) -> Tensor:
        """(N,K) on the host, checked, in the smallest dtype."""
        done, waiting = self._held
        num_choices = self.num_experts + self.num_no_compute
        dtype = ids_dtype(num_choices)
        if not waiting:
            return torch.empty(0, self.top_k or 0, dtype=dtype) if done is None else done
        ids = torch.cat(waiting)[:, : self.top_k].cpu()  # fused shared experts follow the chosen
        check_range(ids, num_choices)
        return torch.cat([*(() if done is None else (done,)), ids.to(dtype)])


def refuse_graphs(tensor: Tensor) -> None:
    """Raise where what the host does between launches would be left out of a graph.

    Raises:
        CaptureUnsupported: a graph is compiled, or captured on the tensor's device.
    """
    if torch.compiler.is_compiling() or is_capturing(tensor.device):
        raise CaptureUnsupported(
            "routing must be recorded and replayed without torch.compile and CUDA graphs, which "
            "run again without the host's part; got one that is being made. Turn them off for the "
            "block."
        )


def is_in_backward() -> bool:
    """Whether a backward pass is under way in this thread: what it runs is run once more."""
    return torch._C._current_graph_task_id() != -1


def layer_sizes(module: Any) -> tuple[int, int, int | None]:
    """Experts, no-compute choices and top-k of a layer; experts alone do not know top-k.

    Raises:
        InputError: the module is neither.
    """
    config = getattr(module, "moe_config", None) or getattr(module, "experts_config", None)
    if isinstance(config, MoEConfig):
        routing = config.routing
        return routing.num_experts, routing.num_choices - routing.num_experts, routing.top_k
    if isinstance(config, ExpertsConfig):
        return config.num_experts, 0, None
    raise InputError(
        f"a layer to capture ({type(module).__name__}) must be an MoE layer or its experts; got "
        f"neither. Take them from mixtura.hf.moe_layers, or convert the model first."
    )


class LayersCapture:
    """The routing of layers seen so far."""

    def __init__(self, recorders: Mapping[str, LayerRecorder]) -> None:
        self.recorders = recorders

    def trace(self) -> RoutingTrace:
        """What has been chosen until now, during the block or after it.

        Raises:
            InputError: an id is none that a router chooses.
        """
        return RoutingTrace({name: r.trace() for name, r in self.recorders.items()})


@contextmanager
def capture_layers(layers: Mapping[str, Any]) -> Iterator[LayersCapture]:
    """Record what the routers of `layers` choose inside the `with` block, call by call.

    Captures may be nested; each takes away its own observers and no others, also when the block
    raises. `mixtura.capture_routing` also knows which token each row is.

    Args:
        layers: MoE layers, or experts modules, by name.

    Raises:
        InputError: a module is neither.

    Example:
        >>> from mixtura import ExpertsConfig, FusedMoE, MoEConfig, RoutingConfig
        >>> experts = ExpertsConfig(num_experts=4, hidden_size=8, intermediate_size=16)
        >>> routing = RoutingConfig(num_experts=4, top_k=2)
        >>> layer = FusedMoE(MoEConfig(hidden_size=8, routing=routing, experts=experts))
        >>> _ = [torch.nn.init.normal_(p) for p in layer.parameters()]
        >>> with capture_layers({"mlp": layer}) as capture:
        ...     _ = layer(torch.randn(3, 8))
        >>> int(capture.trace().layers["mlp"].counts.sum())
        6
    """
    recorders = {name: LayerRecorder(module) for name, module in layers.items()}
    try:
        for name, recorder in recorders.items():
            layers[name].observers = (*layers[name].observers, recorder)
        yield LayersCapture(recorders)
    finally:
        for name, recorder in recorders.items():
            kept = tuple(o for o in layers[name].observers if o is not recorder)
            layers[name].observers = kept
