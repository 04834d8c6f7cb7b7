"""Quantized checkpoints into models: experts and linear layers stay packed, all else becomes dense.

Everything is settled from headers first (`PackedLoad`): where every tensor goes, that none is left
over, which matrices stay packed. Then Transformers loads what is dense, reading a tensor when its
turn comes, and the experts follow a layer at a time.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixtura.config import GatePrecision, GateUp, RunnerConfig
from mixtura.experts import ExpertsOptions
from mixtura.hf.blocks import BlockOptions
from mixtura.hf.checkpoint import TensorHeader
from mixtura.hf.contents import check_contents
from mixtura.hf.convert import plan_layers
from mixtura.hf.experts import ExpertsPlan
from mixtura.hf.headers import Places, StoredModel, match_headers
from mixtura.hf.ledger import CheckpointWarning, Kept, Use, WeightLedger, build_ledger
from mixtura.hf.linears import adopt_linear
from mixtura.hf.loader import adopt_experts
from mixtura.hf.progress import OnBytes, read_progress
from mixtura.hf.slots import Slots, find_slots
from mixtura.hf.stored import LazyTensor, StoredCheckpoint
from mixtura.kernels.cpu.linear import cannot_pack
from mixtura.quant.activations import ActivationScheme, StaticInputs
from mixtura.quant.matrix import QuantizedMatrix, dense, dequantize, stack_experts
from mixtura.quant.rows import concat_rows, has_own_rows, take_rows

_INPUT_ROLES = {
    "gate_up_inputs": ("gate_up_proj", "up_proj"),
    "down_inputs": ("down_proj",),
}
"""Fields of `ExpertWeights`, and the matrices that multiply what they speak of."""


@dataclass(frozen=True, slots=True)
class PackedModule:
    """An experts module with packed matrices.

    Attributes:
        path: of the module. plan: of it as configured. slots: its matrices by role.
    """

    path: str
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
        self.stored: StoredModel = match_headers(empty, _as_dense(checkpoint, plans, places))
        self.experts: dict[str, PackedModule] = {}
        for path, plan in plans.items():
            if not self._is_packed(path, plan):
                continue
            slots = find_slots(plan, path, self.stored.sources, checkpoint.headers, places)
            self.experts[path] = PackedModule(path, plan, slots)
        moe_layers = tuple(f"{name}." for name in (*blocks, *alone))
        weights: dict[str, str] = {}
        for path, module in empty.named_modules():
            merged = self.stored.sources.get(f"{path}.weight", {})
            if type(module) is nn.Linear and None in merged:
                weights[path] = merged[None][0]
        self.linears: dict[str, str] = {
            path: name
            for path, name in weights.items()
            if packs_linears and name in checkpoint.packed and not path.startswith(moe_layers)
        }
        kept = {name for module in self.experts.values() for name in _names(module.slots.values())}
        idle = {
            name
            for path, module in self.experts.items()
            for role in module.slots
            for names in self.stored.sources[f"{path}.{module.plan.storage[role].path}"].values()
            for name in names
        } - kept
        self.kept = Kept(plans, kept, set(self.linears.values()), set(weights.values()), idle)
        self.ledger: WeightLedger = build_ledger(checkpoint, self.stored, self.kept)
        self.open: dict[str, Any] = {}

    def _is_packed(self, path: str, plan: ExpertsPlan) -> bool:
        targets = (f"{path}.{stored.path}" for stored in plan.storage.values())
        return any(
            name in self.checkpoint.packed
            for target in targets
            for names in self.stored.sources.get(target, {}).values()
            for name in names
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
        kept = self.kept
        left = {*kept.experts, *kept.idle, *kept.linears}
        left |= {*self.stored.unused, *self.stored.excluded}
        return {
            name: LazyTensor(self.checkpoint.tensor, name, header)
            for name, header in self.checkpoint.headers.items()
            if name not in left
        }

    def begin(self, model: PreTrainedModel, files: list[str] | None) -> None:
        """Take what stays packed from the model that is about to be filled."""
        tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
        for name in self.packed_targets:
            path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            # No parameter, so that Transformers neither fills nor misses it.
            empty: Any = torch.empty(0, dtype=getattr(owner, leaf).dtype)
            empty._is_hf_initialized = True
            delattr(owner, leaf)
            setattr(owner, leaf, empty)
            tied.pop(name, None)

    def take(self, name: str, value: Tensor) -> Tensor:
        """What to set as a parameter: its value."""
        return value

    def finish(self, model: PreTrainedModel) -> None:
        """Give the model its packed matrices, a layer at a time.

        Raises:
            CheckpointError: the contents of a matrix are impossible.
        """
        self.checkpoint.mapped.release()
        packed = (Use.PACKED_EXPERT, Use.PACKED_LINEAR)
        with read_progress("packed weights", self.ledger.num_bytes(*packed)) as on_bytes:
            for module in self.experts.values():
                self._adopt_experts(model, module)
                self._count(_names(module.slots.values()), on_bytes)
            for path, name in self.linears.items():
                self._adopt_linear(model, path, name)
                self._count([name], on_bytes)
        self.checkpoint.mapped.release()

    def _adopt_experts(self, model: PreTrainedModel, packed: PackedModule) -> None:
        plan = replace(packed.plan, module=model.get_submodule(packed.path))
        config, matrices = self.matrices(packed, model.dtype)
        inputs = self.inputs(packed)
        adopt_experts(replace(plan, config=config), matrices, model.dtype, inputs)

    def _adopt_linear(self, model: PreTrainedModel, path: str, name: str) -> None:
        linear: Any = model.get_submodule(path)
        matrix, inputs = self.linear_matrix(name), self.linear_inputs(name)
        is_dense = cannot_pack(matrix.scheme) is not None
        if is_dense:
            matrix = dense(dequantize(matrix, model.dtype))
        if is_dense and inputs is None:
            linear.weight = nn.Parameter(matrix.values, requires_grad=False)
        else:
            adopt_linear(linear, matrix, model.dtype, inputs)

    def _count(self, names: Iterable[str], on_bytes: OnBytes) -> None:
        """Note that packed matrices have been read."""
        packed = self.checkpoint.packed
        num_bytes = sum(packed[name].num_bytes for name in names if name in packed)
        self.checkpoint.mapped.count(num_bytes)
        on_bytes(num_bytes)

    def linear_matrix(self, name: str) -> QuantizedMatrix:
        """A packed matrix by its dense name, its rows in the order of the model."""
        matrix, rows = self.checkpoint.matrix(name), self.checkpoint.packed[name].rows
        if rows is None:
            return matrix
        if has_own_rows(matrix.scheme):
            return take_rows(matrix, rows)
        return dense(dequantize(matrix)[rows])

    def linear_inputs(self, name: str) -> StaticInputs | None:
        """What the input of a linear layer is rounded to, by its matrix's dense name."""
        scheme = self._rounding([name])
        return None if scheme is None else StaticInputs(scheme, self.checkpoint.input_scale(name))

    def inputs(self, packed: PackedModule) -> dict[str, StaticInputs]:
        """What the experts' inputs are rounded to, by the field of `ExpertWeights`.

        Gate and up of an expert multiply one input: where their scales differ the larger one holds,
        as in other engines, so that neither saturates more than its own would.

        Warns:
            CheckpointWarning: the files ask for several roundings of one input.
        """
        found = {}
        for field, roles in _INPUT_ROLES.items():
            slots = [packed.slots[role] for role in roles if role in packed.slots]
            names = _names(slots)
            scheme = self._rounding(names)
            if scheme is not None:
                num_experts = packed.plan.config.num_experts
                scales = [self._scales(one, scheme, num_experts) for one in slots]
                found[field] = StaticInputs(scheme, torch.stack(scales).amax(0))
        return found

    def _rounding(self, names: list[str]) -> ActivationScheme | None:
        """What the input of matrices is rounded to; None where no scale of it is stored."""
        packed = [name for name in names if name in self.checkpoint.packed]
        scaled = [name for name in packed if self.checkpoint.has_input_scale(name)]
        asked = [self.checkpoint.packed[name].format.activations for name in scaled]
        schemes = list(dict.fromkeys(s for s in asked if s is not None and s.has_one_scale))
        if len(schemes) > 1:
            warnings.warn(
                f"the inputs of {scaled[0]} and {len(scaled) - 1} others are to be rounded to "
                f"{' and to '.join(map(str, schemes))}: they are not rounded",
                CheckpointWarning,
                stacklevel=2,
            )
        return schemes[0] if len(schemes) == 1 else None

    def _scales(self, slots: Slots, scheme: ActivationScheme, num_experts: int) -> Tensor:
        """The scale of each expert's input, 0 where the scheme has none. -> (L,) fp32."""

        def scale(name: str) -> Tensor:
            packed = self.checkpoint.packed.get(name)
            is_meant = packed is not None and packed.format.activations == scheme
            if is_meant and self.checkpoint.has_input_scale(name):
                return self.checkpoint.input_scale(name)
            return torch.zeros(num_experts if slots.is_stack else ())

        if slots.is_stack:
            return scale(slots.names[0][0])
        return torch.stack([torch.stack([scale(n) for n in names]).amax() for names in slots.names])

    def matrices(
        self, packed: PackedModule, dtype: torch.dtype
    ) -> tuple[Any, dict[str, QuantizedMatrix]]:
        """The experts' configuration and matrices by role, gate and up apart where they are so."""
        config, found = packed.plan.config, {}
        for role, slots in packed.slots.items():
            if slots.is_stack:
                found[role] = self._whole(slots.names[0][0], packed, role, dtype)
                continue
            parts = [
                self._stack(packed.path, [names[part] for names in slots.names], dtype)
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
            return self.checkpoint.matrix(name)
        stored = packed.plan.storage[role]
        return dense(stored.logical(self._plain(name).values).to(dtype))

    def _stack(self, path: str, names: list[str], dtype: torch.dtype) -> QuantizedMatrix:
        """Matrices of all experts as a stack; dense where they are stored in several ways.

        Warns:
            CheckpointWarning: they are; the message names the layer and the experts.
        """
        whole = self._stored_stack(names)
        if whole is not None:
            return whole
        matrices = [self._expert(name) for name in names]
        if any(matrix.scheme.has_permutation for matrix in matrices):
            matrices = [_with_permutation(matrix) for matrix in matrices]
        kinds = {(m.scheme, tuple(tensor.dtype for tensor in m.tensors.values())) for m in matrices}
        if len(kinds) == 1 and matrices[0].is_quantized:
            return stack_experts(matrices, len(matrices))
        if any(matrix.is_quantized for matrix in matrices):
            _warn_mixed(path, names[0], [str(matrix.scheme) for matrix in matrices])
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
        check_contents(first.stored, stack)
        if first.rows is None:
            return stack
        return take_rows(stack, first.rows) if has_own_rows(stack.scheme) else None

    def _expert(self, name: str) -> QuantizedMatrix:
        return self.linear_matrix(name) if name in self.checkpoint.packed else self._plain(name)

    def _plain(self, name: str) -> QuantizedMatrix:
        """An expert's matrix, or a stack, that is dense in the file among packed ones."""
        matrix = dense(self.checkpoint.plain(name))
        check_contents(name, matrix)
        return matrix


def _as_dense(
    checkpoint: StoredCheckpoint, plans: Mapping[str, ExpertsPlan], places: Places
) -> Mapping[str, TensorHeader]:
    """Headers as an unquantized checkpoint would have them.

    A packed stack is (E, N, K) in every format. Where a model keeps its dense one as (E, K, N), as
    gpt-oss does, that is its header.
    """
    transposed = {
        f"{path}.{stored.path}"
        for path, plan in plans.items()
        for stored in plan.storage.values()
        if stored.is_transposed
    }
    headers = dict(checkpoint.headers)
    for name in checkpoint.packed:
        shape = headers[name].shape
        if len(shape) == 3 and places.find(name)[0] in transposed:
            headers[name] = replace(headers[name], shape=(shape[0], shape[2], shape[1]))
    return headers


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


def _names(slots: Iterable[Slots]) -> list[str]:
    return [name for one in slots for name in one.all_names()]


def _warn_mixed(path: str, first: str, schemes: list[str]) -> None:
    """Say which experts are stored in another way than most."""
    usual = Counter(schemes).most_common(1)[0][0]
    odd = [number for number, scheme in enumerate(schemes) if scheme != usual]
    ways = " or ".join(f"'{way}'" for way in dict.fromkeys(schemes[number] for number in odd))
    shown = ", ".join(map(str, odd[:8])) + (", ..." if len(odd) > 8 else "")
    warnings.warn(
        f"experts {shown} of {path} ({first.removesuffix('.weight').rpartition('.')[2]}) are "
        f"stored as {ways} and the others as '{usual}': all of them are made dense",
        CheckpointWarning,
        stacklevel=2,
    )
