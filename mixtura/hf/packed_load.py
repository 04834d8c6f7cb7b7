"""Quantized checkpoints into models: experts and linear layers stay packed, all else becomes dense.

Everything is settled from headers first (`PackedLoad`): where every tensor goes, that none is left
over, which matrices stay packed. Then Transformers loads what is dense, reading a tensor when its
turn comes, and the experts follow a layer at a time. With ranks, so do dense experts, and of either
only this rank's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixtura.config import GatePrecision, RunnerConfig
from mixtura.experts import ExpertsOptions
from mixtura.hf.blocks import BlockOptions
from mixtura.hf.checkpoint import TensorHeader
from mixtura.hf.convert import plan_layers
from mixtura.hf.experts import AdoptedExperts, ExpertsPlan
from mixtura.hf.headers import Places, StoredModel, match_headers
from mixtura.hf.ledger import Kept, WeightLedger, build_ledger
from mixtura.hf.linears import adopt_linear
from mixtura.hf.loader import LoadFormats, LoadPlan, Slot, Stream, adopt_experts, plan_load
from mixtura.hf.packed_matrices import NORM, MatrixReader, PackedModule
from mixtura.hf.progress import OnBytes, read_progress
from mixtura.hf.slots import Slots, find_slots
from mixtura.hf.stored import LazyTensor, StoredCheckpoint, num_bytes
from mixtura.kernels.cpu.linear import cannot_pack
from mixtura.parallel import ExpertParallel, Spread
from mixtura.quant.matrix import dense, dequantize


class PackedLoad:
    """One load of a quantized checkpoint, or of a rank's part of any.

    Args:
        empty: the model on the meta device, as its configuration builds it.
        checkpoint: its weights.
        packs_linears: whether linear layers outside of MoE layers stay packed, where a kernel of
            this machine reads them.
        ranks: that share the experts; this one reads its own.
        formats: what dense weights are to be kept in; with ranks alone.

    Raises:
        CheckpointError: a tensor is missing, superfluous, or of another shape than config.json
            gives; the message names it.
        ConfigError: the experts cannot be spread over the ranks.
    """

    def __init__(
        self,
        empty: PreTrainedModel,
        checkpoint: StoredCheckpoint,
        *,
        packs_linears: bool = True,
        ranks: ExpertParallel | None = None,
        formats: LoadFormats | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        linears = LoadFormats(linears=formats.linears if formats is not None else None)
        self.stream = Stream(plan_load(empty, linears) if linears else LoadPlan({}, {}, linears))
        blocks, alone, _ = plan_layers(
            empty,
            BlockOptions(
                experts=ExpertsOptions(),
                runner=RunnerConfig(),
                gate=GatePrecision.FP32,
            ),
        )
        plans = {
            name if block.spec.experts is None else f"{name}.{block.spec.experts}": block.experts
            for name, block in blocks.items()
        } | alone
        places = Places(empty)
        self.stored: StoredModel = match_headers(empty, _as_dense(checkpoint, plans, places))
        format = formats.weights if formats is not None else None
        self.reader = MatrixReader(checkpoint, places, self.stored.sources, format)
        self.experts: dict[str, PackedModule] = {}
        for path, plan in plans.items():
            slots: Mapping[str, Slots] = {}
            if self._is_packed(path, plan):
                slots = find_slots(plan, path, self.stored.sources, checkpoint.headers, places)
            elif ranks is None:
                continue
            roles = slots if ranks is None else [role for role in plan.storage if role != NORM]
            sources = {
                role: slots[role].all_names() if role in slots else self._sources(path, plan, role)
                for role in roles
            }
            spread = None
            if ranks is not None:
                spread = Spread.of_experts(plan.config, ranks)
            self.experts[path] = PackedModule(path, plan, slots, sources, spread)
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
        kept = {name for module in self.experts.values() for name in _names(module)}
        idle = {
            name
            for path, module in self.experts.items()
            for role in module.slots
            for names in self.stored.sources[f"{path}.{module.plan.storage[role].path}"].values()
            for name in names
        } - kept
        self.kept = Kept(plans, kept, set(self.linears.values()), set(weights.values()), idle)
        self.ledger: WeightLedger = build_ledger(checkpoint, self.stored, self.kept)

    @property
    def open(self) -> Mapping[str, Slot]:
        """Parameters that are to be handed over whole."""
        return self.stream.open

    def _sources(self, path: str, plan: ExpertsPlan, role: str) -> list[str]:
        """The dense names of a role's tensors."""
        merged = self.stored.sources.get(f"{path}.{plan.storage[role].path}", {})
        return [name for names in merged.values() for name in names]

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
            found |= {f"{path}.{module.plan.storage[role].path}" for role in module.kept}
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
        self.stream.begin(model, files)
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
        """What to set as a parameter that has been handed over."""
        return self.stream.take(name, value)

    def finish(self, model: PreTrainedModel) -> None:
        """Give the model its packed matrices, a layer at a time.

        Raises:
            CheckpointError: the contents of a matrix are impossible.
        """
        self.checkpoint.mapped.release()
        if self.stream.plan.linears:
            self.stream.finish(model)
        total = self._num_bytes(self.linears.values())
        total += sum(self._local_bytes(module) for module in self.experts.values())
        with read_progress("weights", total) as on_bytes:
            for module in self.experts.values():
                self._adopt_experts(model, module)
                self._count(self._local_bytes(module), on_bytes)
            for path, name in self.linears.items():
                self._adopt_linear(model, path, name)
                self._count(self._num_bytes([name]), on_bytes)
        self.checkpoint.mapped.release()

    def _adopt_experts(self, model: PreTrainedModel, packed: PackedModule) -> None:
        plan = replace(packed.plan, module=model.get_submodule(packed.path))
        if packed.spread is None:
            config, matrices = self.reader.matrices(packed, model.dtype)
            inputs, activations = self.reader.inputs(packed), self.reader.activations(packed)
            plan = replace(plan, config=config)
            adopt_experts(plan, matrices, model.dtype, inputs, activations)
        else:
            weights = self.reader.local_weights(packed, plan.module, model.dtype)
            plan = plan.with_given(weights, model.dtype)
            replace(plan, spread=packed.spread.to(weights.device)).adopt(AdoptedExperts)

    def _adopt_linear(self, model: PreTrainedModel, path: str, name: str) -> None:
        linear: Any = model.get_submodule(path)
        matrix, inputs = self.reader.linear_matrix(name), self.reader.linear_inputs(name)
        is_dense = cannot_pack(matrix.scheme) is not None
        if is_dense:
            matrix = dense(dequantize(matrix, model.dtype))
        if is_dense and inputs is None:
            linear.weight = nn.Parameter(matrix.values, requires_grad=False)
        else:
            adopt_linear(linear, matrix, model.dtype, inputs)

    def _count(self, num_bytes: int, on_bytes: OnBytes) -> None:
        """Note that so many bytes of matrices have been read."""
        self.checkpoint.mapped.count(num_bytes)
        on_bytes(num_bytes)

    def _num_bytes(self, names: Iterable[str]) -> int:
        packed, headers = self.checkpoint.packed, self.checkpoint.headers
        return sum(
            packed[name].num_bytes if name in packed else num_bytes(headers[name]) for name in names
        )

    def _local_bytes(self, module: PackedModule) -> int:
        """Bytes of a module's experts, of this rank's where there are ranks."""
        whole = self._num_bytes(_names(module))
        if module.local is None:
            return whole
        return whole * len(module.local) // module.plan.config.num_experts


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


def _names(module: PackedModule) -> list[str]:
    return [name for names in module.kept.values() for name in names]
