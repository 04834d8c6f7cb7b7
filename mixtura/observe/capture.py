"""Which experts the routers of a model chose, token by token, and the file that keeps it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mixtura.config import ExpertsConfig, MoEConfig
from mixtura.cuda import cannot_capture, is_capturing
from mixtura.errors import InputError, TraceError

FORMAT, VERSION = "mixtura routing trace", 1
FIELDS = {"name": str, "num_experts": int, "num_no_compute": int, "top_k": int}
"""What the file's metadata says of each layer."""


def ids_dtype(num_choices: int) -> torch.dtype:
    """The smallest dtype that holds ids below `num_choices`."""
    if num_choices <= 2**8:
        return torch.uint8
    return torch.uint16 if num_choices <= 2**16 else torch.int32


@dataclass(frozen=True, slots=True, eq=False)
class LayerTrace:
    """What one layer's router chose.

    Attributes:
        ids: (N, K) as the router chose them, in the smallest dtype that holds them. Ids from
            `num_experts` on are experts without arithmetic.
        num_experts: E. num_no_compute: Z choices without arithmetic beside them.

    Raises:
        InputError: the ids have another shape or dtype, or are not in [0, E + Z).
    """

    ids: Tensor
    num_experts: int
    num_no_compute: int = 0

    def __post_init__(self) -> None:
        if self.num_experts < 1 or self.num_no_compute < 0:
            raise InputError(
                f"num_experts ({self.num_experts}) must be at least 1 and num_no_compute "
                f"({self.num_no_compute}) at least 0. Correct them."
            )
        expected = ids_dtype(self.num_choices)
        if self.ids.ndim != 2 or self.ids.dtype != expected:
            raise InputError(
                f"ids must be (tokens, top_k) of {expected} for {self.num_choices} choices; got "
                f"{tuple(self.ids.shape)} of {self.ids.dtype}. Record the routing again."
            )
        check_range(self.topk_ids, self.num_choices)

    @property
    def num_choices(self) -> int:
        """What the router chose from: E + Z."""
        return self.num_experts + self.num_no_compute

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.ids.shape[0]

    @property
    def top_k(self) -> int:
        """K."""
        return self.ids.shape[1]

    @property
    def topk_ids(self) -> Tensor:
        """(N, K) int32: what `create_router(replayed_ids=...)` and `TokenInputs` take."""
        return self.ids.to(torch.int32)

    @property
    def counts(self) -> Tensor:
        """(E + Z,) int64, the slots that went to each choice; they sum to N * K."""
        return torch.bincount(self.ids.flatten().long(), minlength=self.num_choices)


def check_range(ids: Tensor, num_choices: int) -> None:
    """Raise `InputError` where an id is outside [0, num_choices)."""
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= num_choices):
        raise InputError(
            f"chosen ids must be in [0, {num_choices}); got {int(ids.min())} to {int(ids.max())}. "
            f"Capture where the router chooses, not behind expert parallelism."
        )


@dataclass(frozen=True, slots=True, eq=False)
class RoutingTrace:
    """What the routers of a model chose.

    Attributes:
        layers: by module name, in the order in which they were given.

    Example:
        >>> trace = RoutingTrace({"mlp": LayerTrace(torch.tensor([[0, 2]]).byte(), 4)})
        >>> trace.layers["mlp"].counts.tolist()
        [1, 0, 1, 0]
    """

    layers: Mapping[str, LayerTrace]

    @property
    def num_slots(self) -> int:
        """Choices in all layers: the sum of tokens times top-k."""
        return sum(layer.ids.numel() for layer in self.layers.values())

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: a tensor of ids by layer name, and the sizes as metadata.

        Raises:
            TraceError: the file cannot be written.
        """
        entries = [
            {
                "name": name,
                "num_experts": layer.num_experts,
                "num_no_compute": layer.num_no_compute,
                "top_k": layer.top_k,
            }
            for name, layer in self.layers.items()
        ]
        metadata = {"format": FORMAT, "version": str(VERSION), "layers": json.dumps(entries)}
        tensors = {name: layer.ids.contiguous() for name, layer in self.layers.items()}
        try:
            save_file(tensors, path, metadata=metadata)
        except (SafetensorError, OSError) as error:
            raise TraceError(
                f"the routing trace ({path}) must be writable; got {error}. Choose another path."
            ) from None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` has written; everything in it is checked.

        Raises:
            TraceError: the file is missing, truncated, no routing trace, of another version, or
                its tensors do not agree with its metadata.
        """
        try:
            with safe_open(path, framework="pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise TraceError(
                f"the routing trace ({path}) must exist; got no such file. Check the path."
            ) from None
        except (SafetensorError, OSError, ValueError) as error:
            raise TraceError(
                f"the routing trace ({path}) must be a whole safetensors file; got {error}. Record "
                f"it again."
            ) from None
        if metadata.get("format") != FORMAT:
            raise TraceError(
                f"{path} must be a routing trace; got a safetensors file of something else. Check "
                f"the path."
            )
        if metadata.get("version") != str(VERSION):
            raise TraceError(
                f"the routing trace ({path}) must be of version {VERSION}; got "
                f"{metadata.get('version')!r}. Record it again, or use the mixtura that wrote it."
            )
        entries = _read_entries(metadata.get("layers", ""), path)
        if set(tensors) != {entry["name"] for entry in entries}:
            raise TraceError(
                f"the routing trace ({path}) must hold one tensor for each layer it names; got "
                f"{sorted(tensors)[:4]} ... Record it again."
            )
        return cls({entry["name"]: _read_layer(entry, tensors, path) for entry in entries})


def _read_entries(text: str, path: str | Path) -> list[dict[str, Any]]:
    """The metadata's list of layers, with its types checked."""
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        entries = None
    if (
        not isinstance(entries, list)
        or not all(isinstance(e, dict) and e.keys() == FIELDS.keys() for e in entries)
        or not all(type(e[field]) is kind for e in entries for field, kind in FIELDS.items())
        or len({e["name"] for e in entries}) != len(entries)
    ):
        raise TraceError(
            f"the routing trace ({path}) must list its layers with {', '.join(FIELDS)}; got "
            f"something else. Record it again."
        )
    return entries


def _read_layer(
    entry: dict[str, Any], tensors: Mapping[str, Tensor], path: str | Path
) -> LayerTrace:
    name = entry["name"]
    try:
        layer = LayerTrace(tensors[name], entry["num_experts"], entry["num_no_compute"])
    except InputError as error:
        raise TraceError(
            f"the layer {name!r} of the routing trace ({path}) must be whole; got: {error}"
        ) from None
    if layer.top_k != entry["top_k"]:
        raise TraceError(
            f"the layer {name!r} of the routing trace ({path}) must have top_k columns; got "
            f"{layer.top_k} for top_k {entry['top_k']}. Record it again."
        )
    return layer


class _LayerRecorder:
    """The observer of one layer; keeps what it is shown on the CPU."""

    def __init__(self, module: Any) -> None:
        self.num_experts, self.num_no_compute, self.top_k = _sizes(module)
        self.parts: list[Tensor] = []

    def __call__(self, ids: Tensor, weights: Tensor) -> None:
        if is_capturing(ids.device):
            raise cannot_capture(
                "capture_routing", "ids that it copies to the host", "Record without the graph"
            )
        ids = ids.detach()[:, : self.top_k].cpu()  # fused shared experts follow the chosen ones
        check_range(ids, self.num_choices)
        self.parts.append(ids.to(ids_dtype(self.num_choices)))

    @property
    def num_choices(self) -> int:
        return self.num_experts + self.num_no_compute

    def trace(self) -> LayerTrace:
        if self.parts:
            ids = torch.cat(self.parts)
        else:
            ids = torch.empty(0, self.top_k or 0, dtype=ids_dtype(self.num_choices))
        return LayerTrace(ids, self.num_experts, self.num_no_compute)


def _sizes(module: Any) -> tuple[int, int, int | None]:
    """Experts, no-compute choices and top-k of a layer; experts alone do not know top-k."""
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


class RoutingCapture:
    """The routing seen so far; `trace` takes it as a value, during the capture or after it."""

    def __init__(self, recorders: Mapping[str, _LayerRecorder]) -> None:
        self._recorders = recorders

    def trace(self) -> RoutingTrace:
        """What has been chosen until now."""
        return RoutingTrace({name: r.trace() for name, r in self._recorders.items()})


@contextmanager
def capture_routing(layers: Mapping[str, Any]) -> Iterator[RoutingCapture]:
    """Record what the routers of `layers` choose inside the `with` block.

    Captures may be nested; each takes away its own observers and no others, also when the block
    raises.

    Args:
        layers: MoE layers, or experts modules, by name.

    Raises:
        InputError: a module is neither; in the block, ids that no router chooses.

    Example:
        >>> from mixtura import ExpertsConfig, FusedMoE, MoEConfig, RoutingConfig
        >>> experts = ExpertsConfig(num_experts=4, hidden_size=8, intermediate_size=16)
        >>> routing = RoutingConfig(num_experts=4, top_k=2)
        >>> layer = FusedMoE(MoEConfig(hidden_size=8, routing=routing, experts=experts))
        >>> _ = [torch.nn.init.normal_(p) for p in layer.parameters()]
        >>> with capture_routing({"mlp": layer}) as capture:
        ...     _ = layer(torch.randn(3, 8))
        >>> int(capture.trace().layers["mlp"].counts.sum())
        6
    """
    recorders = {name: _LayerRecorder(module) for name, module in layers.items()}
    try:
        for name, recorder in recorders.items():
            layers[name].observers = (*layers[name].observers, recorder)
        yield RoutingCapture(recorders)
    finally:
        for name, recorder in recorders.items():
            kept = tuple(o for o in layers[name].observers if o is not recorder)
            layers[name].observers = kept
