"""Quantized checkpoints into models: experts and linear layers stay packed, all else becomes dense.

Everything is settled from headers first (`PackedLoad`): where every tensor goes, that none is left
over, which matrices stay packed. Then Transformers loads what is dense, reading a tensor when its
turn comes, and the experts follow a layer at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixtura.config import GatePrecision, GateUp, RunnerConfig
from mixtura.errors import CheckpointError
from mixtura.experts import ExpertsOptions
from mixtura.hf.adopt import get_attribute
from mixtura.hf.blocks import BlockOptions
from mixtura.hf.convert import plan_layers
from mixtura.hf.experts import ExpertsPlan
from mixtura.hf.headers import Places, StoredModel, match_headers
from mixtura.hf.linears import adopt_linear
from mixtura.hf.loader import adopt_experts
from mixtura.hf.mapped import MappedFiles
from mixtura.hf.slots import Slots, find_slots
from mixtura.hf.stored import StoredCheckpoint
from mixtura.kernels.cpu.linear import cannot_pack
from mixtura.quant.rows import concat_rows, has_own_rows, take_rows
from mixtura.quant.scheme import QuantizedMatrix, dense, dequantize, stack_experts

EXPERT_NAME = "expert"
"""A tensor without a place in the model is refused where its name says it is an expert's."""


@dataclass(frozen=True, slots=True)
class PackedModule:
    """An experts module with packed matrices.

    Attributes:
        plan: of the module as configured. slots: its matrices by role.
    """

    plan: ExpertsPlan
    slots: Mapping[str, Slots]


class PackedLoad:
    """One load of a quantized checkpoint.

    Args:
        empty: the model on the meta device, as its configuration builds it.
        checkpoint: its weights.
        packs_linears: whether linear layers outside of MoE layers stay packed, where a kernel of
            this machine reads them.

    Raises:
        CheckpointError: a tensor is missing, superfluous, or of another shape than config.json
            gives; the message names it.
    """

    def __init__(
        self, empty: PreTrainedModel, checkpoint: StoredCheckpoint, *, packs_linears: bool = True
    ) -> None:
        self.checkpoint = checkpoint
        self.stored: StoredModel = match_headers(empty, checkpoint.headers)
        self._check_unused()
        blocks, alone, _ = plan_layers(
            empty,
            BlockOptions(
                experts=ExpertsOptions(),
                runner=RunnerConfig(),
                gate=GatePrecision.FP32,
                debug=False,
            ),
        )
        plans = {
            name if block.spec.experts is None else f"{name}.{block.spec.experts}": block.experts
            for name, block in blocks.items()
        } | alone
        places = Places(empty)
        self.experts: dict[str, PackedModule] = {}
        for path, plan in plans.items():
            slots = find_slots(plan, path, self.stored.sources, checkpoint.headers, places)
            if any(name in checkpoint.packed for s in slots.values() for name in s.all_names()):
                self.experts[path] = PackedModule(plan, slots)
        moe_layers = tuple(f"{name}." for name in (*blocks, *alone))
        self.linears: dict[str, str] = {}
        for path, module in empty.named_modules():
            merged = self.stored.sources.get(f"{path}.weight", {})
            name = merged[None][0] if None in merged else None
            if (
                packs_linears
                and type(module) is nn.Linear
                and name in checkpoint.packed
                and not path.startswith(moe_layers)
            ):
                assert name is not None
                self.linears[path] = name
        self.open: dict[str, Any] = {}
        self.files: MappedFiles | None = None

    def _check_unused(self) -> None:
        for name in self.stored.unused:
            if EXPERT_NAME in name:
                raise CheckpointError(
                    f"{name} must have a place in the model that config.json describes; got none. "
                    f"Fetch config.json and the weights again, both of one model."
                )

    @property
    def packed_targets(self) -> set[str]:
        """The model's tensors that are not loaded as such."""
        found = {f"{path}.weight" for path in self.linears}
        for path, module in self.experts.items():
            found |= {f"{path}.{module.plan.storage[role].path}" for role in module.slots}
        return found

    def state_dict(self) -> dict[str, LazyTensor]:
        """What Transformers is to load, by the names of the checkpoint; nothing is read yet."""
        kept = set(self.linears.values())
        for module in self.experts.values():
            kept |= {name for slots in module.slots.values() for name in slots.all_names()}
        return {
            name: LazyTensor(self.checkpoint, name)
            for name in self.checkpoint.headers
            if name not in kept and name not in self.stored.unused
        }

    def begin(self, model: PreTrainedModel, files: list[str] | None) -> None:
        """Take the memory of what stays packed from the model that is about to be filled."""
        self.files = MappedFiles(self.checkpoint.files())
        for name in self.packed_targets:
            parameter: Any = get_attribute(model, name)
            parameter.data = torch.empty(0, dtype=parameter.dtype)
            parameter._is_hf_initialized = True

    def take(self, name: str, value: Tensor) -> Tensor:
        """What to set as a parameter: its value."""
        return value

    def finish(self, model: PreTrainedModel) -> None:
        """Give the model its packed matrices, a layer at a time.

        Raises:
            CheckpointError: the contents of a matrix are impossible.
        """
        self._release()
        for path, packed in self.experts.items():
            module = model.get_submodule(path)
            plan = replace(packed.plan, module=module)
            config, matrices = self._matrices(packed, model.dtype)
            adopt_experts(replace(plan, config=config), matrices, model.dtype)
            self._release()
        for path, name in self.linears.items():
            linear: Any = model.get_submodule(path)
            matrix = self._linear_matrix(name)
            if cannot_pack(matrix.scheme) is not None:
                weight = dequantize(matrix, model.dtype)
                linear.weight = nn.Parameter(weight, requires_grad=False)
            else:
                adopt_linear(linear, matrix, model.dtype)
            self._release()

    def _release(self) -> None:
        if self.files is not None:
            self.files.release()

    def _linear_matrix(self, name: str) -> QuantizedMatrix:
        matrix, rows = self._checked(name), self.checkpoint.packed[name].rows
        if rows is None:
            return matrix
        if has_own_rows(matrix.scheme):
            return take_rows(matrix, rows)
        return dense(dequantize(matrix)[rows])

    def _matrices(
        self, packed: PackedModule, dtype: torch.dtype
    ) -> tuple[Any, dict[str, QuantizedMatrix]]:
        """The experts' configuration and matrices by role, gate and up apart where they are so."""
        config, found = packed.plan.config, {}
        for role, slots in packed.slots.items():
            if slots.is_stack:
                found[role] = self._whole(slots.names[0][0], packed, role, dtype)
                continue
            parts = [
                self._stack([names[part] for names in slots.names], dtype)
                for part in range(len(slots.names[0]))
            ]
            is_apart = (
                role == "gate_up_proj"
                and len(parts) == 2
                and config.gate_up is GateUp.STACKED
                and slots.order is None
                and not config.has_bias
            )
            if is_apart:
                config = replace(config, gate_up=GateUp.SEPARATE)
                found["gate_up_proj"], found["up_proj"] = parts
                continue
            whole = parts[0] if len(parts) == 1 else _below(parts, dtype)
            if slots.order is not None:
                if not has_own_rows(whole.scheme):
                    whole = dense(dequantize(whole, dtype))
                whole = take_rows(whole, slots.order)
            found[role] = whole
        return config, found

    def _whole(
        self, name: str, packed: PackedModule, role: str, dtype: torch.dtype
    ) -> QuantizedMatrix:
        """A stack that is stored as one."""
        if name in self.checkpoint.packed:
            return self._checked(name)
        stored = packed.plan.storage[role]
        return dense(stored.logical(self.checkpoint.plain(name)).to(dtype))

    def _stack(self, names: list[str], dtype: torch.dtype) -> QuantizedMatrix:
        """Matrices of all experts as a stack; dense where they are stored in several ways."""
        whole = self._stored_stack(names)
        if whole is not None:
            return whole
        matrices = [self._expert(name) for name in names]
        if any(matrix.scheme.has_permutation for matrix in matrices):
            matrices = [_with_permutation(matrix) for matrix in matrices]
        kinds = {(m.scheme, tuple(tensor.dtype for tensor in m.tensors.values())) for m in matrices}
        if len(kinds) == 1 and matrices[0].is_quantized:
            return stack_experts(matrices, len(matrices))
        return dense(torch.stack([dequantize(matrix, dtype) for matrix in matrices]))

    def _stored_stack(self, names: list[str]) -> QuantizedMatrix | None:
        """The stack that the experts are stored as, where it is that and no more."""
        places = [self.checkpoint.packed.get(name) for name in names]
        first = places[0]
        if first is None or first.expert is None:
            return None
        if any(
            p is None or (p.stored, p.expert) != (first.stored, n) for n, p in enumerate(places)
        ):
            return None
        stack = self.checkpoint.decoded(first.stored).matrix
        if stack.shape[0] != len(names):
            return None
        _check_contents(first.stored, stack)
        if first.rows is None:
            return stack
        return take_rows(stack, first.rows) if has_own_rows(stack.scheme) else None

    def _expert(self, name: str) -> QuantizedMatrix:
        if name not in self.checkpoint.packed:
            return dense(self.checkpoint.plain(name))
        return self._linear_matrix(name)

    def _checked(self, name: str) -> QuantizedMatrix:
        matrix = self.checkpoint.matrix(name)
        _check_contents(name, matrix)
        return matrix


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor of a checkpoint that is read when it is indexed, as Transformers' loader does."""

    checkpoint: StoredCheckpoint
    name: str

    def __getitem__(self, index: Any) -> Tensor:
        return self.checkpoint.tensor(self.name)[index]

    def get_shape(self) -> list[int]:
        """The shape, from the header."""
        return list(self.checkpoint.headers[self.name].shape)


def _below(parts: Iterable[QuantizedMatrix], dtype: torch.dtype) -> QuantizedMatrix:
    """Stacks below each other; dense where they cannot be one packed matrix."""
    parts = list(parts)
    first = parts[0].scheme
    if all(part.scheme == first for part in parts) and has_own_rows(first):
        if first.has_permutation:
            return dense(torch.cat([dequantize(part, dtype) for part in parts], -2))
        return concat_rows(parts)
    return dense(torch.cat([dequantize(part, dtype) for part in parts], -2))


def _with_permutation(matrix: QuantizedMatrix) -> QuantizedMatrix:
    """A matrix among others whose columns are permuted: its own are in order."""
    if matrix.scheme.has_permutation or not matrix.is_quantized:
        return matrix
    scheme = replace(matrix.scheme, has_permutation=True)
    order = torch.arange(matrix.shape[-1], dtype=torch.int32)
    return replace(matrix, scheme=scheme, permutation=order)


def _check_contents(name: str, matrix: QuantizedMatrix) -> None:
    """Raise `CheckpointError` for a matrix, or one of a stack, that holds no weights.

    Codes that are all alike, or scales that are all zero, are what a damaged file looks like.
    """
    experts: Iterator[QuantizedMatrix] = iter(
        [matrix.expert(n) for n in range(matrix.shape[0])] if matrix.is_stack else [matrix]
    )
    for number, one in enumerate(experts):
        place = f"expert {number} of {name}" if matrix.is_stack else name
        if one.is_quantized and one.values.numel() > 1 and one.values.min() == one.values.max():
            raise CheckpointError(
                f"{place} ({one.scheme}) must hold weights; got the same code everywhere. Fetch "
                f"the weights again."
            )
        if one.scales is not None and not one.scales.float().any():
            raise CheckpointError(
                f"{place} ({one.scheme}) must have scales that are not zero; got none. Fetch the "
                f"weights again."
            )
