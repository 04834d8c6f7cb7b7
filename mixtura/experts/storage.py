"""How the parameters of an experts module become `ExpertWeights`, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixtura.config import ExpertsConfig, GateUp
from mixtura.quant.matrix import dense
from mixtura.types import ExpertWeights

ROLES = ("gate_up_proj", "up_proj", "down_proj", "gate_up_bias", "down_bias", "post_norm")
"""The tensors of `ExpertWeights`, in the order in which they are packed and restored."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor of the experts is kept, and how.

    Attributes:
        path: attribute path from the module, such as "gate_up_proj" or "mlp.w1".
        is_transposed: stored (L, in, out); seen by kernels as (L, out, in).
        num_experts: split the leading dimension into this many experts, where it is stored flat.
        num_rows: only the first rows of the (split) leading dimension are experts with weights
            (LongCat stores rows for zero experts too).
    """

    path: str
    is_transposed: bool = False
    num_experts: int | None = None
    num_rows: int | None = None

    def read(self, module: nn.Module) -> Tensor:
        """The stored tensor; a parametrization's result where there is one."""
        value: Any = module
        for part in self.path.split("."):
            value = getattr(value, part)
        assert isinstance(value, Tensor)
        return value

    def holds(self, module: nn.Module, parameter: Tensor) -> bool:
        """Whether the parameter is at this path itself, and not what something computes from it."""
        owner, _, name = self.path.rpartition(".")
        return module.get_submodule(owner)._parameters.get(name) is parameter

    def logical(self, stored: Tensor) -> Tensor:
        """The stored tensor as kernels see it; a view."""
        rows = self._rows(stored)
        if self.num_rows is not None:
            rows = rows[: self.num_rows]
        return rows.transpose(1, 2) if self.is_transposed else rows

    def spare_rows(self, stored: Tensor) -> Tensor | None:
        """A view of the rows that are no experts, or None."""
        rows = self._rows(stored)
        if self.num_rows is None or self.num_rows >= rows.shape[0]:
            return None
        return rows[self.num_rows :]

    def _rows(self, stored: Tensor) -> Tensor:
        if self.num_experts is None:
            return stored
        return stored.view(self.num_experts, -1, *stored.shape[1:])

    def restored(self, logical: Tensor, spare_rows: Tensor | None) -> Tensor:
        """The inverse of `logical`, contiguous; `spare_rows` are those that are no experts."""
        stored = logical.transpose(1, 2) if self.is_transposed else logical
        if spare_rows is not None:
            stored = torch.cat([stored, spare_rows])
        if self.num_experts is not None:
            stored = stored.flatten(0, 1)
        return stored.contiguous()


Storage = Mapping[str, StoredTensor]
"""Role -> where it is kept; a role that the experts do not have is absent."""


def default_storage(config: ExpertsConfig) -> dict[str, StoredTensor]:
    """Storage under the names that Transformers uses."""
    first = {GateUp.UNGATED: "up_proj", GateUp.SEPARATE: "gate_proj"}
    gate_up = first.get(config.gate_up, "gate_up_proj")
    storage = {
        "gate_up_proj": StoredTensor(gate_up, config.is_transposed),
        "down_proj": StoredTensor("down_proj", config.is_transposed),
    }
    if config.gate_up is GateUp.SEPARATE:
        storage["up_proj"] = StoredTensor("up_proj", config.is_transposed)
    if config.has_bias:
        storage["gate_up_bias"] = StoredTensor(f"{gate_up}_bias")
        storage["down_bias"] = StoredTensor("down_proj_bias")
    if config.post_norm is not None:
        storage["post_norm"] = StoredTensor("post_expert_norm.weight")
    return {role: storage[role] for role in ROLES if role in storage}


def stored_shapes(config: ExpertsConfig) -> dict[str, tuple[int, ...]]:
    """Shape by role, as stored under the default storage."""
    count, hidden, up = config.num_experts, config.hidden_size, config.up_size
    up_shape, down_shape = (up, hidden), (hidden, config.intermediate_size)
    if config.is_transposed:
        up_shape, down_shape = up_shape[::-1], down_shape[::-1]
    return {
        "gate_up_proj": (count, *up_shape),
        "up_proj": (count, *up_shape),
        "down_proj": (count, *down_shape),
        "gate_up_bias": (count, up),
        "down_bias": (count, hidden),
        "post_norm": (hidden,),
    }


def read_weights(module: nn.Module, config: ExpertsConfig, storage: Storage) -> ExpertWeights:
    """The module's tensors as `ExpertWeights`; views, nothing is copied."""
    logical = {role: stored.logical(stored.read(module)) for role, stored in storage.items()}
    return ExpertWeights(
        config,
        gate_up_proj=dense(logical["gate_up_proj"]),
        down_proj=dense(logical["down_proj"]),
        up_proj=dense(logical["up_proj"]) if "up_proj" in logical else None,
        gate_up_bias=logical.get("gate_up_bias"),
        down_bias=logical.get("down_bias"),
        post_norm=logical.get("post_norm"),
    )


def tensor_of(weights: ExpertWeights, role: str) -> Tensor:
    """The dense tensor of a role."""
    value = getattr(weights, role)
    return value if isinstance(value, Tensor) else value.values
