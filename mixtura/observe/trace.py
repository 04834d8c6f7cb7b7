"""Which experts the routers of a model chose, token by token, and the file that keeps it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mixtura.errors import InputError, TraceError
from mixtura.observe.tokens import TokenTable

FORMAT, VERSION = "mixtura routing trace", 2
FIELDS = {"name": str, "num_experts": int, "num_no_compute": int, "top_k": int}
"""What the file's metadata says of each layer."""

IDS, SEQUENCE, POSITION = "ids.", "tokens.sequence", "tokens.position"
"""Names of the file's tensors: a layer's ids behind the first, and the two of the tokens."""


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
        tokens: which token each row of the layers is; None where only layers were watched.

    Raises:
        InputError: a layer has neither a row for every token nor none at all.

    Example:
        >>> trace = RoutingTrace({"mlp": LayerTrace(torch.tensor([[0, 2]]).byte(), 4)})
        >>> trace.layers["mlp"].counts.tolist()
        [1, 0, 1, 0]
    """

    layers: Mapping[str, LayerTrace]
    tokens: TokenTable | None = None

    def __post_init__(self) -> None:
        for name, layer in self.layers.items():
            if self.tokens is not None and layer.num_tokens not in (0, len(self.tokens)):
                raise InputError(
                    f"the layer {name!r} must have a row for each of the {len(self.tokens)} "
                    f"tokens, or none; got {layer.num_tokens}. Record the routing again."
                )

    @property
    def num_slots(self) -> int:
        """Choices in all layers: the sum of tokens times top-k."""
        return sum(layer.ids.numel() for layer in self.layers.values())

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: ids by layer name, the tokens, and the sizes as metadata.

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
        tensors = {IDS + name: layer.ids.contiguous() for name, layer in self.layers.items()}
        if self.tokens is not None:
            metadata["requests"] = json.dumps(self.tokens.requests)
            tensors |= {SEQUENCE: self.tokens.sequence, POSITION: self.tokens.position}
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
        metadata, tensors = _read_file(path)
        entries = _read_entries(metadata.get("layers", ""), path)
        expected = {IDS + entry["name"] for entry in entries}
        if "requests" in metadata:
            expected |= {SEQUENCE, POSITION}
        if set(tensors) != expected:
            raise TraceError(
                f"the routing trace ({path}) must hold one tensor for each layer it names, and the "
                f"two of its tokens; got {sorted(tensors)[:4]} ... Record it again."
            )
        layers = {entry["name"]: _read_layer(entry, tensors, path) for entry in entries}
        try:
            return cls(layers, _read_tokens(metadata, tensors, path))
        except InputError as error:
            raise TraceError(
                f"the tokens of the routing trace ({path}) must be whole; got: {error}"
            ) from None


def _read_file(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a routing trace of our version."""
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
            f"the routing trace ({path}) must be a whole safetensors file; got {error}. Record it "
            f"again."
        ) from None
    if metadata.get("format") != FORMAT:
        raise TraceError(
            f"{path} must be a routing trace; got a safetensors file of something else. Check the "
            f"path."
        )
    if metadata.get("version") != str(VERSION):
        raise TraceError(
            f"the routing trace ({path}) must be of version {VERSION}; got "
            f"{metadata.get('version')!r}. Record it again, or use the mixtura that wrote it."
        )
    return metadata, tensors


def _read_json(text: str) -> Any:
    """What a JSON text says; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _read_entries(text: str, path: str | Path) -> list[dict[str, Any]]:
    """The metadata's list of layers, with its types checked."""
    entries = _read_json(text)
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
        layer = LayerTrace(tensors[IDS + name], entry["num_experts"], entry["num_no_compute"])
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


def _read_tokens(
    metadata: Mapping[str, str], tensors: Mapping[str, Tensor], path: str | Path
) -> TokenTable | None:
    if "requests" not in metadata:
        return None
    requests = _read_json(metadata["requests"])
    if not isinstance(requests, list) or not all(type(r) in (str, type(None)) for r in requests):
        raise TraceError(
            f"the routing trace ({path}) must list the requests of its sequences, each a text or "
            f"null; got something else. Record it again."
        )
    return TokenTable(tensors[SEQUENCE], tensors[POSITION], tuple(requests))
