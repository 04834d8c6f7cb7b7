"""The experts of a module as matrices: as they are stored or dense, all of them or a rank's.

Which stored matrix goes where has been settled before (`hf/slots.py`); here it is read.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mixtura.config import GateUp
from mixtura.hf.contents import check_contents
from mixtura.hf.experts import ExpertsPlan
from mixtura.hf.headers import Places
from mixtura.hf.ledger import CheckpointWarning
from mixtura.hf.shard_load import LocalSource, in_format
from mixtura.hf.slots import MATRICES, Slots
from mixtura.hf.stored import StoredCheckpoint
from mixtura.parallel import Spread
from mixtura.parallel.shard import cut_weights, local_experts
from mixtura.quant.activations import ActivationScheme, StaticInputs
from mixtura.quant.formats import WeightFormat
from mixtura.quant.matrix import QuantizedMatrix, dense, dequantize, stack_experts
from mixtura.quant.rows import concat_rows, has_own_rows, have_one_order, take_rows
from mixtura.types import ExpertWeights

_INPUT_ROLES = {
    "gate_up_inputs": ("gate_up_proj", "up_proj"),
    "down_inputs": ("down_proj",),
}
"""Fields of `ExpertWeights`, and the matrices that multiply what they speak of."""

NORM = "post_norm"
"""The one role whose tensor is not of one expert each."""


@dataclass(frozen=True, slots=True)
class PackedModule:
    """An experts module whose weights are no parameters.

    Attributes:
        path: of the module. plan: of it as configured.
        slots: its matrices by role; none where it is dense, and only a part of it is read.
        kept: the dense names of its tensors by role, of those that are not loaded as parameters.
        spread: the ranks that share the experts; None where this one has them all.
    """

    path: str
    plan: ExpertsPlan
    slots: Mapping[str, Slots]
    kept: Mapping[str, Sequence[str]]
    spread: Spread | None = None

    @property
    def local(self) -> Sequence[int] | None:
        """The experts that are read; None for all."""
        return None if self.spread is None else local_experts(self.spread)


@dataclass(frozen=True, slots=True)
class MatrixReader:
    """Reads experts' matrices.

    Attributes:
        checkpoint: the files. places: the conversions that take its tensors to the model's.
        sources: what each of the model's tensors is made of, as `match_headers` finds it.
        format: what dense experts are to be kept in, where only a rank's are read.
    """

    checkpoint: StoredCheckpoint
    places: Places
    sources: Mapping[str, Mapping[str | None, list[str]]]
    format: WeightFormat | None = None

    def local_weights(
        self, packed: PackedModule, module: nn.Module, dtype: torch.dtype
    ) -> ExpertWeights:
        """This rank's experts, each cut as the ranks cut them.

        Args:
            packed: of which experts.
            module: as Transformers has filled it: it holds the norm behind the experts.
            dtype: of the model.
        """
        spread = packed.spread
        assert spread is not None
        experts = local_experts(spread)
        config, matrices = packed.plan.config, dict[str, QuantizedMatrix]()
        inputs, activations = self.inputs(packed), self.activations(packed)
        if packed.slots:
            config, matrices = self.matrices(packed, dtype)
        elif self.format is not None:
            activations = self.format.activations
        source = LocalSource(self.checkpoint, self.places, self.sources)
        parts = {}
        for role, stored in packed.plan.storage.items():
            if role == NORM:
                parts[role] = stored.logical(stored.read(module)).detach()
            elif role not in matrices:
                target = f"{packed.path}.{stored.path}"
                tensor = source.read(target, stored, experts)
                if role in MATRICES:
                    matrices[role] = in_format(target, tensor.to(dtype), self.format)
                else:
                    parts[role] = tensor.to(dtype)
        config = replace(config, num_experts=len(experts))
        fields: dict[str, Any] = {**matrices, **parts, **inputs}
        weights = ExpertWeights(config, **fields, activations=activations)
        return cut_weights(weights, spread.ranks.tp_rank, spread.ranks.config.tp_size)

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
            names = [name for one in slots for name in one.all_names()]
            scheme = self._rounding(names)
            if scheme is not None:
                num_experts = packed.plan.config.num_experts
                scales = [self._scales(one, scheme, num_experts) for one in slots]
                whole = torch.stack(scales).amax(0)
                local = packed.local
                found[field] = StaticInputs(scheme, whole if local is None else whole[[*local]])
        return found

    def activations(self, packed: PackedModule) -> ActivationScheme | None:
        """What the experts' inputs are to be rounded to with scales found while running.

        None unless the files ask the same of every matrix, each of them packed.
        """
        names = [name for slots in packed.slots.values() for name in slots.all_names()]
        stored = [self.checkpoint.packed.get(name) for name in names]
        asked = {None if one is None else one.format.activations for one in stored}
        scheme = asked.pop() if len(asked) == 1 else None
        return scheme if scheme is not None and scheme.is_found_running else None

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
                self._stack(packed, [names[part] for names in slots.names], dtype)
                for part in range(len(slots.names[0]))
            ]
            is_apart = (
                role == "gate_up_proj"
                and len(parts) == 2
                and config.gate_up is GateUp.STACKED
                and slots.order is None
                and not config.has_bias
                # Kernels gather permuted columns once, for gate and up together.
                and not (parts[0].scheme.has_permutation and have_one_order(parts))
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
        local = packed.local
        if name in self.checkpoint.packed:
            if local is None:
                return self.checkpoint.matrix(name)
            stack = self.checkpoint.experts(self.checkpoint.packed[name].stored, local)
            check_contents(name, stack)
            return stack
        stored = packed.plan.storage[role]
        if local is None:
            return dense(stored.logical(self._plain(name).values).to(dtype))
        target = f"{packed.path}.{stored.path}"
        source = LocalSource(self.checkpoint, self.places, self.sources)
        return dense(source.read(target, stored, local).to(dtype))

    def _stack(self, packed: PackedModule, names: list[str], dtype: torch.dtype) -> QuantizedMatrix:
        """Matrices of experts as a stack; dense where they are stored in several ways.

        A rank decides for its own as it would for all: of the others it looks at one of each way.

        Args:
            packed: whose they are. names: of all experts.

        Warns:
            CheckpointWarning: they are; the message names the layer and the experts.
        """
        numbers = range(len(names)) if packed.local is None else packed.local
        whole = self._stored_stack(names, numbers)
        if whole is not None:
            return whole
        shown = sorted({*numbers, *self._one_of_each(names)}) if packed.spread else list(numbers)
        found = {number: self._expert(names[number]) for number in shown}
        if any(matrix.scheme.has_permutation for matrix in found.values()):
            found = {number: _with_permutation(matrix) for number, matrix in found.items()}
        kinds = {
            (m.scheme, tuple(tensor.dtype for tensor in m.tensors.values())) for m in found.values()
        }
        matrices = [found[number] for number in numbers]
        if len(kinds) == 1 and matrices[0].is_quantized:
            return stack_experts(matrices, len(matrices))
        if any(matrix.is_quantized for matrix in found.values()):
            like = {self._way(names[number]): str(m.scheme) for number, m in found.items()}
            ways = {
                number: str(found[number].scheme) if number in found else like[self._way(name)]
                for number, name in enumerate(names)
            }
            _warn_mixed(packed.path, names[0], ways)
        return dense(torch.stack([dequantize(matrix, dtype) for matrix in matrices]))

    def _one_of_each(self, names: list[str]) -> list[int]:
        """An expert of each way that they are stored in, by the headers."""
        ways: dict[object, int] = {}
        for number, name in enumerate(names):
            ways.setdefault(self._way(name), number)
        return list(ways.values()) if len(ways) > 1 else []

    def _way(self, name: str) -> object:
        """How a matrix is stored, by its headers."""
        packed = self.checkpoint.packed.get(name)
        return None if packed is None else (packed.format, packed.parts)

    def _stored_stack(self, names: list[str], numbers: Sequence[int]) -> QuantizedMatrix | None:
        """The stack that the experts are stored as, or some of it, where it is that and no more."""
        places = [self.checkpoint.packed.get(name) for name in names]
        first = places[0]
        if first is None or first.expert is None:
            return None
        if any(
            p is None or (p.stored, p.expert) != (first.stored, n) for n, p in enumerate(places)
        ):
            return None
        if list(numbers) == list(range(len(names))):
            stack = self.checkpoint.decoded(first.stored).matrix
            if stack.shape[0] != len(names):
                return None
        else:
            stack = self.checkpoint.experts(first.stored, numbers)
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


def _below(parts: Iterable[QuantizedMatrix], dtype: torch.dtype) -> QuantizedMatrix:
    """Stacks below each other; dense where they cannot be one packed matrix."""
    parts = list(parts)
    first = parts[0].scheme
    is_one = all(part.scheme == first for part in parts) and have_one_order(parts)
    if is_one and has_own_rows(first):
        return concat_rows(parts)
    return dense(torch.cat([dequantize(part, dtype) for part in parts], -2))


def _with_permutation(matrix: QuantizedMatrix) -> QuantizedMatrix:
    """A matrix among others whose columns are permuted: its own are in order."""
    if matrix.scheme.has_permutation or not matrix.is_quantized:
        return matrix
    scheme = replace(matrix.scheme, has_permutation=True)
    order = torch.arange(matrix.shape[-1], dtype=torch.int32)
    return replace(matrix, scheme=scheme, permutation=order)


def _warn_mixed(path: str, first: str, schemes: Mapping[int, str]) -> None:
    """Say which experts, by their numbers, are stored in another way than most."""
    usual = Counter(schemes.values()).most_common(1)[0][0]
    odd = [number for number, scheme in schemes.items() if scheme != usual]
    ways = " or ".join(f"'{way}'" for way in dict.fromkeys(schemes[number] for number in odd))
    shown = ", ".join(map(str, odd[:8])) + (", ..." if len(odd) > 8 else "")
    warnings.warn(
        f"experts {shown} of {path} ({first.removesuffix('.weight').rpartition('.')[2]}) are "
        f"stored as {ways} and the others as '{usual}': all of them are made dense",
        CheckpointWarning,
        stacklevel=2,
    )
