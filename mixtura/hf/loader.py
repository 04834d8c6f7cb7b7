"""Experts and linear layers of a dense checkpoint become quantized while it streams in.

Transformers reads a checkpoint parameter by parameter: it finds a parameter's stored tensors,
merges them (a tensor per expert becomes a stack), and sets it. Here it is told of a quantizer, and
so hands over each experts parameter as soon as it is whole, and frees it when the quantizer has
taken what it needs. One dense parameter is in memory at a time, and few pages of the files.

`Slot` is a parameter that is kept in another form. `adopt_experts` makes an experts module of
matrices, wherever they came from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mixtura.config import GatePrecision, RunnerConfig
from mixtura.errors import CheckpointError, InputError, MixturaError, UnsupportedModel
from mixtura.experts import ExpertsOptions, StoredTensor
from mixtura.hf.adopt import get_attribute, offloads
from mixtura.hf.blocks import BlockOptions
from mixtura.hf.convert import plan_layers, survey
from mixtura.hf.experts import AdoptedExperts, ExpertsPlan
from mixtura.hf.linears import adopt_linear, find_linears
from mixtura.hf.mapped import MappedFiles
from mixtura.plugin import NAME
from mixtura.quant.activations import ActivationScheme, StaticInputs
from mixtura.quant.formats import WeightFormat
from mixtura.quant.matrix import QuantizedMatrix
from mixtura.quant.quantize import quantize
from mixtura.types import ExpertWeights

MATRICES = ("gate_up_proj", "up_proj", "down_proj")
"""Roles of the experts' tensors that a weight format speaks of."""

WEIGHT = StoredTensor("weight")
"""Where a linear layer keeps its matrix."""


@dataclass(frozen=True, slots=True)
class LoadFormats:
    """What weights are to be stored in; None leaves them in the model's dtype.

    Attributes:
        weights: of the routed experts. linears: of attention projections and the output head.
    """

    weights: WeightFormat | None = None
    linears: WeightFormat | None = None

    @classmethod
    def parse(
        cls, weights: WeightFormat | str | None, linears: WeightFormat | str | None
    ) -> LoadFormats:
        """Formats by their names.

        Raises:
            ConfigError: a name is unknown; the message lists the names.
        """
        found = (
            WeightFormat.parse(name) if isinstance(name, str) else name
            for name in (weights, linears)
        )
        return cls(*found)

    def __bool__(self) -> bool:
        return self.weights is not None or self.linears is not None


@dataclass(slots=True)
class Slot:
    """A parameter that is kept in another form, and that form once it is there.

    Attributes:
        name: its path in the model. stored: how it is stored there. shape: of what is stored.
        format: what to keep it in.
    """

    name: str
    stored: StoredTensor
    shape: tuple[int, ...]
    format: WeightFormat
    matrix: QuantizedMatrix | None = None

    def fill(self, value: Tensor) -> None:
        """Quantize the parameter's dense value.

        Raises:
            CheckpointError: it has another shape than config.json gives.
            InputError: it has an element that is not finite.
        """
        if tuple(value.shape) != self.shape:
            raise CheckpointError(
                f"{self.name} ({tuple(value.shape)}) must have the shape that config.json gives; "
                f"got {self.shape} from it. Fetch config.json and the weights again, both of one "
                f"model."
            )
        self.matrix = quantize_named(self.name, self.stored.logical(value.detach()), self.format)


def quantize_named(name: str, weight: Tensor, format: WeightFormat) -> QuantizedMatrix:
    """Quantize a matrix or a stack; an error calls it by its name.

    Raises:
        InputError: it has an element that is not finite.
    """
    try:
        return quantize(weight, format)
    except InputError as error:
        raise InputError(str(error).replace("weight", name, 1)) from None


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """Which parts of a model are kept in which format, found on a model without weights.

    Attributes:
        experts: plans of experts modules by path; their modules are those of that model.
        linears: shapes of linear layers' weights by path.
        formats: what to keep them in.
    """

    experts: Mapping[str, ExpertsPlan]
    linears: Mapping[str, tuple[int, ...]]
    formats: LoadFormats

    @property
    def packs_experts(self) -> bool:
        """Whether the experts' matrices stop being parameters."""
        return self.formats.weights is not None and self.formats.weights.scheme.is_quantized

    def expert_slots(self, path: str) -> dict[str, Slot]:
        """The matrices of one experts module, by role."""
        assert self.formats.weights is not None
        plan = self.experts[path]
        return {
            role: Slot(
                f"{path}.{stored.path}",
                stored,
                tuple(stored.read(plan.module).shape),
                self.formats.weights,
            )
            for role, stored in plan.storage.items()
            if role in MATRICES
        }

    def linear_slots(self) -> Iterator[tuple[str, Slot]]:
        """The weights of linear layers, by path of the layer."""
        for path, shape in self.linears.items():
            assert self.formats.linears is not None
            yield path, Slot(f"{path}.weight", WEIGHT, shape, self.formats.linears)


def plan_load(empty: PreTrainedModel, formats: LoadFormats) -> LoadPlan:
    """Find the experts and linear layers whose weights are to be kept in another format.

    Args:
        empty: the model on the meta device, as its configuration builds it.
        formats: what is asked for.

    Raises:
        UnsupportedModel: no experts, or no linear layers, that could be.
        ConfigError: config.json asks for the impossible.
    """
    options = BlockOptions(
        experts=ExpertsOptions(),
        runner=RunnerConfig(),
        gate=GatePrecision.FP32,
    )
    blocks, alone, reasons = plan_layers(empty, options)
    experts = {}
    for name, block in blocks.items():
        path = name if block.spec.experts is None else f"{name}.{block.spec.experts}"
        experts[path] = block.experts
    experts |= alone
    if formats.weights is not None and not experts:
        raise UnsupportedModel(
            f"the model ({type(empty).__name__}) must have experts that mixtura runs to keep them "
            f"in {formats.weights.value}; got none. Load it without weights=."
        )
    linears = {}
    if formats.linears is not None:
        kinds = dict.fromkeys(blocks, "block") | dict.fromkeys(alone, "experts")
        names = [layer.name for layer in survey(empty, kinds, reasons)]
        found = find_linears(empty, names)
        linears = {name: tuple(module.weight.shape) for name, module in found.items()}
    return LoadPlan(experts if formats.weights is not None else {}, linears, formats)


def adopt_experts(
    plan: ExpertsPlan,
    matrices: Mapping[str, QuantizedMatrix],
    row_dtype: torch.dtype,
    inputs: Mapping[str, StaticInputs] | None = None,
    activations: ActivationScheme | None = None,
) -> None:
    """Make an experts module ours, with matrices instead of its parameters, which go.

    Args:
        plan: of the module, whose biases and norm have been loaded.
        matrices: (L, N, K) stacks by role, as `ExpertWeights` has them.
        row_dtype: the dtype of the model.
        inputs: what rows are rounded to, by the field of `ExpertWeights`.
        activations: what they are to be rounded to with scales found while running.

    Raises:
        ConfigError: a matrix is missing, or does not fit the experts' configuration.
    """
    parts = {
        role: stored.logical(stored.read(plan.module)).detach()
        for role, stored in plan.storage.items()
        if role not in MATRICES
    }
    fields: dict[str, Any] = {**matrices, **parts, **(inputs or {})}
    given = ExpertWeights(plan.config, **fields, activations=activations)
    plan.with_given(given, row_dtype).adopt(AdoptedExperts)


class Stream:
    """One load: takes parameters as Transformers makes them, and gives them to the model after.

    Args:
        plan: what to take.
    """

    def __init__(self, plan: LoadPlan) -> None:
        self.plan = plan
        self.experts: dict[str, dict[str, Slot]] = {
            path: plan.expert_slots(path) for path in plan.experts
        }
        self.linears: dict[str, Slot] = dict(plan.linear_slots())
        self.open: dict[str, Slot] = {}
        self.files: MappedFiles | None = None

    def begin(self, model: PreTrainedModel, files: list[str] | None) -> None:
        """Look at the model that is about to be filled; it is on the meta device."""
        self.files = MappedFiles(files or ())
        tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
        shared = {*tied, *tied.values()}
        slots = list(self.linears.values())
        for experts in self.experts.values():
            if self.plan.packs_experts:
                slots += experts.values()
            else:
                _set_dtype(model, experts.values())
        # The weight of a tied head comes in with the embedding, which needs it dense.
        self.open = {slot.name: slot for slot in slots if slot.name not in shared}

    def take(self, name: str, value: Tensor) -> Tensor:
        """What to set as the parameter `name`: its value, or nothing where it has been taken."""
        slot = self.open.get(name)
        if slot is None:
            return value
        slot.fill(value)
        if self.files is not None:
            self.files.count(value.nbytes)
        return value.new_empty(0)

    def finish(self, model: PreTrainedModel) -> None:
        """Give the model what was taken, and take what Transformers did not hand over by itself.

        Raises:
            CheckpointError, InputError: see `Slot.fill`.
            UnsupportedModel: weights are offloaded.
        """
        for path, slots in self.experts.items():
            module = model.get_submodule(path)
            _check_in_memory(module, path)
            plan = replace(self.plan.experts[path], module=module)
            for slot in slots.values():
                self._fill_late(model, slot, frees=self.plan.packs_experts)
            if self.plan.packs_experts:
                matrices = {r: s.matrix for r, s in slots.items() if s.matrix is not None}
                assert self.plan.formats.weights is not None
                activations = self.plan.formats.weights.activations
                adopt_experts(plan, matrices, model.dtype, activations=activations)
            else:
                replace(plan, row_dtype=model.dtype).adopt(AdoptedExperts)
        head = model.get_output_embeddings()
        for path, slot in self.linears.items():
            module = model.get_submodule(path)
            self._fill_late(model, slot, frees=False)
            assert slot.matrix is not None
            adopt_linear(module, slot.matrix, model.dtype)
            if module is head:
                getattr(model, "all_tied_weights_keys", {}).pop(slot.name, None)
        if self.files is not None:
            self.files.release()

    def _fill_late(self, model: nn.Module, slot: Slot, *, frees: bool) -> None:
        if slot.matrix is not None:
            return
        parameter: Tensor = get_attribute(model, slot.name)
        slot.fill(parameter)
        if frees:
            parameter.data = parameter.data.new_empty(0)


def _set_dtype(model: nn.Module, slots: Any) -> None:
    """Let parameters on the meta device be loaded in their formats' dtype."""
    for slot in slots:
        parameter: Tensor = get_attribute(model, slot.name)
        parameter.data = parameter.data.to(slot.format.scheme.values_dtype)


def _check_in_memory(module: nn.Module, path: str) -> None:
    if any(offloads(part) for part in module.modules()):
        raise UnsupportedModel(
            f"{path} ({type(module).__name__}) must be in memory to be kept in another format; got "
            f"offloaded weights. Load the model without offload, or without weights=."
        )


class ModelLoad(Protocol):
    """One load, as the quantizer below serves it."""

    @property
    def open(self) -> Mapping[str, Slot]:
        """Parameters, by name, that are to be handed over whole."""

    def begin(self, model: PreTrainedModel, files: list[str] | None) -> None:
        """Look at the model that is about to be filled; it is on the meta device."""

    def take(self, name: str, value: Tensor) -> Tensor:
        """What to set as a parameter that has been handed over."""


class LoadStopped(BaseException):
    """Leaves Transformers' loader, which keeps ordinary exceptions to itself until the end."""

    def __init__(self, error: MixturaError) -> None:
        super().__init__(error)
        self.error = error


class TakeParameters(ConversionOps):  # type: ignore[misc]
    """The last step of every conversion that makes a parameter which is kept in another form."""

    def __init__(self, stream: ModelLoad) -> None:
        self.stream = stream

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Take each parameter by its path in the model.

        Raises:
            LoadStopped: it cannot be taken.
        """
        try:
            return {
                name: self.stream.take(name, value[0] if isinstance(value, list) else value)
                for name, value in input_dict.items()
            }
        except MixturaError as error:
            raise LoadStopped(error) from None


@register_quantization_config(NAME)
@dataclass
class StreamConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How a stream gets through Transformers' `from_pretrained`; the model does not keep it."""

    stream: ModelLoad | None = None
    quant_method: str = field(default=NAME, init=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamConfig:
        return self

    def to_dict(self) -> dict[str, Any]:
        """What can be written as JSON."""
        return {"quant_method": self.quant_method}


@register_quantizer(NAME)
class StreamQuantizer(HfQuantizer):  # type: ignore[misc]
    """Transformers' end of a `Stream`; a quantizer makes it load a parameter at a time."""

    is_trainable = False

    def is_serializable(self) -> bool:
        """Whether the model could be saved with this quantizer; it does not keep it."""
        return False

    @property
    def stream(self) -> ModelLoad:
        """The load that this one serves."""
        stream: ModelLoad | None = self.quantization_config.stream
        assert stream is not None
        return stream

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self.stream.begin(model, kwargs.get("checkpoint_files"))

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.stream.open

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        slot = self.stream.open.get(param_name)
        return slot.format.scheme.bits / 8 if slot is not None else param.element_size()

    def get_quantize_ops(self) -> TakeParameters:
        return TakeParameters(self.stream)

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Leave no trace: what is quantized is ours, and Transformers needs not know of it."""
        self.remove_quantization_config(model)
