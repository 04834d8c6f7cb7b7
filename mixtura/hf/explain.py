"""`explain`: what would run where, from configuration and headers, before a weight is read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixtura.config import (
    ExpertsConfig,
    GatePrecision,
    RoutingConfig,
    RunnerConfig,
    SharedExpertsConfig,
)
from mixtura.errors import ConfigError, UnsupportedModel
from mixtura.experts import ExpertsOptions
from mixtura.experts.words import activation_in_words
from mixtura.hf.adopt import get_attribute, layer_index
from mixtura.hf.blocks import BlockOptions, BlockPlan, read_top_k
from mixtura.hf.convert import check_left, config_owners, not_whole, plan_layers, survey
from mixtura.hf.determinism import check_deterministic
from mixtura.hf.experts import ExpertsPlan
from mixtura.hf.explanation import (
    LAYER_NUMBER,
    ExpertsExplanation,
    LayerExplanation,
    ModelExplanation,
    numbered,
)
from mixtura.hf.gguf_checkpoint import is_gguf
from mixtura.hf.headers import (
    StoredModel,
    local_directory,
    local_headers,
    match_headers,
    stored_dtype,
)
from mixtura.hf.load import configured_dtype, empty_model, find_packed, load_config
from mixtura.hf.load_checks import check_no_formats
from mixtura.hf.loader import MATRICES, LoadFormats
from mixtura.hf.outline import Outline, formats_in_words
from mixtura.hf.packed_load import PackedLoad
from mixtura.hf.stored import StoredCheckpoint
from mixtura.kernels import get_kernel
from mixtura.kernels.cpu.linear import cannot_pack
from mixtura.quant.activations import StaticInputs
from mixtura.quant.formats import WeightFormat
from mixtura.quant.matrix import QuantizedMatrix
from mixtura.routing.words import in_words
from mixtura.types import ExpertWeights


def explain(
    model: str | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    weights: WeightFormat | str | None = None,
    kernel: str | None = None,
    strict: bool = False,
    gate: GatePrecision | str = GatePrecision.FP32,
    deterministic: bool = False,
) -> ModelExplanation:
    """Say how a model's MoE layers would run, from its configuration alone or, with files, headers.

    The model is built without memory for its weights. Where its files are on this machine, every
    tensor's header is compared with the configuration. Nothing but the configuration is downloaded.

    Args:
        model: a directory with config.json, or a hub id.
        device: "cpu", "cuda", ...; it need not be here.
        dtype: of the weights; the checkpoint's own unless given.
        weights: the experts' weight format, as for `from_pretrained`.
        kernel, strict, gate, deterministic: as for `convert`.

    Raises:
        ConfigError: the weight format, or another argument, is none of its choices.
        CheckpointError: the configuration or a file is broken, or the two contradict each other.
        UnsupportedModel: there is no MoE layer; with `strict`, one that is not ours.
        NoKernelFits: no kernel, or not the one asked for, can run the experts.
    """
    if kernel is not None:
        get_kernel(kernel)
    where = device_type(device)
    format = LoadFormats.parse(weights, None).weights
    config, checkpoint = quantized_here(model)
    if checkpoint is None:
        config, headers = load_config(model), local_headers(model)
        if dtype is None and config.dtype is None and headers:
            dtype = stored_dtype(headers)
    else:
        check_no_formats(checkpoint, format)
        headers, dtype = (
            dict(checkpoint.headers),
            dtype or configured_dtype(config) or torch.bfloat16,
        )
    empty = empty_model(config, dtype)
    _keep_in_fp32(empty)
    load = None if checkpoint is None else PackedLoad(empty, Outline(checkpoint))
    stored = _stored(empty, headers, load)
    options = BlockOptions(
        experts=ExpertsOptions(kernel=kernel, strict=strict, deterministic=deterministic),
        runner=RunnerConfig(),
        gate=GatePrecision.parse(gate),
    )
    blocks, experts, reasons = plan_layers(empty, options)
    kinds = dict.fromkeys(blocks, "block") | dict.fromkeys(experts, "experts")
    found = survey(empty, kinds, reasons)
    check_left(empty, found, strict=strict)
    if deterministic:
        check_deterministic(blocks, not_whole(found))
    reader = _Reader(empty, where, stored, format, load)
    layers = []
    for layer in found:
        part = None
        if layer.kind == "block":
            part = reader.block(layer.name, blocks[layer.name])
        elif layer.kind == "experts":
            part = reader.experts_alone(layer.name, experts[layer.name])
        layers.append(
            LayerExplanation(name=layer.name, kind=layer.kind, reason=layer.reason, experts=part)
        )
    return ModelExplanation(
        model_type=config.model_type,
        architecture=type(empty).__name__,
        device=device,
        dtype=_name(empty.dtype),
        gate=options.gate.value,
        layers=tuple(layers),
        dense=_dense(empty, [layer.name for layer in layers]),
        num_bytes=_num_bytes(empty) - reader.saved_bytes,
        bytes_per_token=_bytes_per_token(empty, layers, reader.saved_bytes),
        num_stored=len(headers) if checkpoint is None else len(checkpoint.tensors),
        unused=stored.unused,
        checkpoint=None if checkpoint is None else checkpoint.family,
        num_packed_linears=reader.num_packed_linears,
    )


def quantized_here(model: str | Path) -> tuple[Any, StoredCheckpoint | None]:
    """Configuration and weights of a quantized checkpoint that is here, else nothing."""
    where = model if is_gguf(model) else local_directory(model)
    found = None if where is None else find_packed(where)
    return (None, None) if found is None else found


def _stored(
    empty: PreTrainedModel, headers: dict[str, Any], load: PackedLoad | None
) -> StoredModel:
    if load is not None:
        return load.stored
    return match_headers(empty, headers) if headers else StoredModel({}, ())


def device_type(name: str) -> str:
    """ "cuda" of "cuda:1"; the device need not be here.

    Raises:
        ConfigError: the name means nothing.
    """
    try:
        return torch.device(name).type
    except RuntimeError:
        raise ConfigError(
            f"device ({name!r}) must be cpu, cuda or cuda:N; got an unknown name. Use one of these."
        ) from None


def _keep_in_fp32(model: PreTrainedModel) -> None:
    """Give the weights that a family keeps in fp32 that dtype, as loading does."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(model.dtype)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        for pattern, dtype in plan.items():
            if re.search(pattern.replace("*", ".*"), name):
                tensor.data = tensor.data.to(dtype)


class _Reader:
    """Reads layers of a model on the meta device, for one device.

    Attributes:
        saved_bytes: by how much the formats make the experts read so far, and packed linear
            layers, smaller.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: str,
        stored: StoredModel,
        format: WeightFormat | None,
        load: PackedLoad | None = None,
    ) -> None:
        self.model = model
        self.device = device
        self.stored = stored
        self.format = format
        self.load = load
        self.owners = config_owners(model)
        self.saved_bytes = self.num_packed_linears = 0
        if load is not None:
            self._linears(load)

    def _linears(self, load: PackedLoad) -> None:
        for path, name in load.linears.items():
            matrix = load.reader.linear_matrix(name)
            if cannot_pack(matrix.scheme) is None:
                weight: Tensor = get_attribute(self.model, f"{path}.weight")
                self.saved_bytes += weight.nbytes - matrix.num_bytes
                self.num_packed_linears += 1

    def block(self, name: str, plan: BlockPlan) -> ExpertsExplanation:
        """A block that is taken over whole."""
        config = plan.layer.config
        part = self._experts(
            name if plan.spec.experts is None else f"{name}.{plan.spec.experts}",
            plan.experts,
            routing=config.routing,
            shared=config.shared,
            words=in_words(config.routing),
        )
        beside = _num_bytes(plan.block) - _stored_bytes(plan.experts)
        assert part.bytes_per_token is not None
        return replace(part, is_router_ours=True, bytes_per_token=part.bytes_per_token + beside)

    def experts_alone(self, name: str, plan: ExpertsPlan) -> ExpertsExplanation:
        """Experts behind a router that stays the family's own."""
        try:
            routing = RoutingConfig.from_hf(self.owners[name], layer_index=layer_index(name))
        except (UnsupportedModel, ConfigError) as error:
            reason = RoutingConfig.HF_NOT_COVERED.get(self.owners[name].model_type, str(error))
            return self._experts(name, plan, routing=None, shared=None, words=reason)
        return self._experts(name, plan, routing=routing, shared=None, words=in_words(routing))

    def _experts(
        self,
        name: str,
        plan: ExpertsPlan,
        *,
        routing: RoutingConfig | None,
        shared: SharedExpertsConfig | None,
        words: str,
    ) -> ExpertsExplanation:
        num_bytes = stored_bytes = _stored_bytes(plan)
        words_of_format = self.format.value if self.format else None
        packed = None if self.load is None else self.load.experts.get(name)
        if self.load is not None and packed is not None:
            config, matrices = self.load.reader.matrices(packed, self.model.dtype)
            weights = replace(
                with_matrices(plan, config, matrices, self.load.reader.inputs(packed)),
                activations=self.load.reader.activations(packed),
            )
            num_bytes, words_of_format = weights.num_bytes, formats_in_words(matrices)
            plan = replace(plan, config=config, given=weights, row_dtype=self.model.dtype)
        elif self.format is not None:
            weights = in_format(plan.weights(), self.format)
            # A dense format is the parameters' dtype, rows that are no experts included.
            is_packed = self.format.scheme.is_quantized
            num_bytes = weights.num_bytes if is_packed else _stored_bytes(plan, self.format)
            plan = replace(plan, given=weights, row_dtype=self.model.dtype)
        self.saved_bytes += stored_bytes - num_bytes
        config = plan.config
        decision = plan.decide(self.device)
        weights = plan.weights()
        norm = weights.post_norm.nbytes if weights.post_norm is not None else 0
        per_expert = (weights.num_bytes - norm) // config.num_experts
        top_k = routing.top_k if routing is not None else read_top_k(self.owners[name])
        kept = self.stored.dtypes.get(f"{name}.{plan.storage['gate_up_proj'].path}")
        return ExpertsExplanation(
            num_experts=config.num_experts,
            num_no_compute=routing.num_choices - routing.num_experts if routing else 0,
            top_k=top_k,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            shared_size=shared.intermediate_size if shared is not None else None,
            activation=activation_in_words(config.activation, config),
            layout=config.gate_up.value,
            dtype=words_of_format or _name(decision.problem.weight_dtype),
            stored_dtype=_name(kept) if kept is not None and packed is None else None,
            routing=words,
            is_router_ours=False,
            kernel=decision.kernel.name,
            kernel_path=decision.kernel.how(decision.problem),
            rejections=decision.rejections,
            is_fallback=decision.is_fallback,
            asked=None if self.load is None else self.load.ledger.asked(name),
            rounds_as_asked=decision.kernel.rounds_as_meant(decision.problem),
            num_bytes=num_bytes,
            bytes_per_token=(
                norm + per_expert * min(top_k, config.num_experts) if top_k is not None else None
            ),
        )


def with_matrices(
    plan: ExpertsPlan,
    config: ExpertsConfig,
    matrices: dict[str, QuantizedMatrix],
    inputs: dict[str, StaticInputs],
) -> ExpertWeights:
    """The experts with packed matrices, their biases and norm as the module has them."""
    parts = {
        role: stored.logical(stored.read(plan.module))
        for role, stored in plan.storage.items()
        if role not in MATRICES
    }
    return ExpertWeights(config, **matrices, **parts, **inputs)  # type: ignore[arg-type]


def _stored_bytes(plan: ExpertsPlan, format: WeightFormat | None = None) -> int:
    """Bytes of the experts' parameters; of the matrices in a dense format, where one is given."""
    total = 0
    for role, stored in plan.storage.items():
        tensor = stored.read(plan.module)
        if format is not None and role in MATRICES:
            total += tensor.numel() * format.scheme.bits // 8
        else:
            total += tensor.nbytes
    return total


def in_format(weights: ExpertWeights, format: WeightFormat) -> ExpertWeights:
    """The same experts in a weight format; all without memory."""

    def convert(matrix: QuantizedMatrix) -> QuantizedMatrix:
        parts = {
            name: torch.empty(spec.shape, dtype=spec.dtypes[0], device="meta")
            for name, spec in format.scheme.tensors_for(matrix.shape).items()
        }
        return QuantizedMatrix(format.scheme, matrix.shape, **parts)

    return replace(
        weights,
        gate_up_proj=convert(weights.gate_up_proj),
        down_proj=convert(weights.down_proj),
        up_proj=None if weights.up_proj is None else convert(weights.up_proj),
        activations=format.activations,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _weights(module: nn.Module) -> dict[int, Tensor]:
    """Parameters and stored buffers, each once."""
    kept = set(module.state_dict(keep_vars=True))
    named = [*module.named_parameters(), *module.named_buffers()]
    return {id(tensor): tensor for name, tensor in named if name in kept}


def _num_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in _weights(module).values())


def _bytes_per_token(
    model: PreTrainedModel, layers: Iterable[LayerExplanation], saved_bytes: int
) -> int | None:
    """All weights but unchosen experts and an input embedding that is nothing else."""
    total = _num_bytes(model) - saved_bytes
    for layer in layers:
        part = layer.experts
        if part is None:
            continue
        if part.top_k is None:
            return None
        experts = min(part.top_k, part.num_experts)
        total -= part.num_bytes * (part.num_experts - experts) // part.num_experts
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if embedding is not None and (head is None or head.weight is not embedding.weight):
        total -= embedding.weight.nbytes
    return total


def _dense(model: nn.Module, names: list[str]) -> str | None:
    """Label of the layers in the same list as the MoE layers that have none."""
    numbers: dict[str, set[int]] = {}
    for name in names:
        found = LAYER_NUMBER.search(name)
        if found is not None:
            numbers.setdefault(name[: found.start() - 1], set()).add(int(found.group()))
    for path, present in numbers.items():
        missing = set(range(len(list(model.get_submodule(path).children())))) - present
        if missing:
            return numbered(missing)
    return None
