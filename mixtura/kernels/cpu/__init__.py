"""The C++ kernel for CPUs: one fused call per layer, weights in panels."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from mixtura.config import (
    ActivationDtype,
    ActivationFunction,
    ExpertsConfig,
    GateUp,
    LimitOn,
    PostNorm,
    WeightOn,
)
from mixtura.errors import InputError
from mixtura.kernels.contract import STATIC_CODES, ExpertsKernel, in_words
from mixtura.kernels.cpu.arithmetic import Arithmetic, current_arithmetic, no_arithmetic
from mixtura.kernels.cpu.conversions import conversion_of
from mixtura.kernels.cpu.extension import current_path, extension, missing
from mixtura.kernels.cpu.lora import CpuLora
from mixtura.kernels.cpu.panels import (
    ROW_DTYPES,
    Panels,
    Part,
    pack_panels,
    unpack_part,
    unreadable,
)
from mixtura.kernels.keys import Keys
from mixtura.kernels.lora import check_adapter_ids
from mixtura.lora import Adapters
from mixtura.quant.activations import StaticInputs
from mixtura.quant.matrix import QuantizedMatrix
from mixtura.quant.scheme import Code
from mixtura.types import ExpertBatch, ExpertsProblem, ExpertWeights

_FUNCTIONS = {function: number for number, function in enumerate(ActivationFunction)}
_LIMITS = {limit: number for number, limit in enumerate(LimitOn)}
_NORMS = {None: 0, PostNorm.RMS: 1, PostNorm.RMS_SCALE_FIRST: 2}

_KEYS: Keys[PackedLayer] = Keys("the packed experts")
"""Layers that compiled graphs call by key."""


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """The experts of a layer as the extension reads them.

    Attributes:
        gate_up, down: the projections in panels.
        post_norm: (H,) fp32 or None.
        template: the weights as they came, each matrix an expanded single element.
        handle: the `Layer` of csrc/types.h; it points into the tensors above.
        key: what compiled graphs call it.
        lora: what adapters add.
    """

    gate_up: Panels
    down: Panels
    post_norm: Tensor | None
    template: ExpertWeights
    handle: Any
    key: Tensor
    lora: CpuLora

    @property
    def num_bytes(self) -> int:
        """Bytes of everything the kernels read."""
        tensors = [*self.gate_up.tensors.values(), *self.down.tensors.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class CpuKernel(ExpertsKernel):
    """AVX2, AVX-512 and portable C++, whatever the processor has; see docs/cpu.md."""

    name: ClassVar[str] = "cpu"
    devices: ClassVar[tuple[str, ...] | None] = ("cpu",)
    is_row_invariant: ClassVar[bool] = True
    activation_dtypes: ClassVar[tuple[ActivationDtype, ...]] = (
        ActivationDtype.INT8,
        ActivationDtype.BF16,
    )
    rounding_codes: ClassVar[tuple[Code, ...]] = STATIC_CODES
    has_lora: ClassVar[bool] = True

    def packs_in_graphs(self, is_quantized: bool) -> bool:
        return False

    def cannot_run(self, problem: ExpertsProblem) -> str | None:
        reason = missing()
        if reason is not None:
            return reason
        if problem.row_dtype not in ROW_DTYPES:
            return f"computes rows of fp32, fp16 and bf16, not {problem.row_dtype}"
        is_apart = problem.experts.gate_up is GateUp.SEPARATE
        if problem.has_unlike_gate_up:
            return "reads gate and up of one scheme, and they have two"
        if is_apart and any(scheme.has_permutation for scheme in problem.schemes):
            return "reads gate and up of one order of columns, and the projections have their own"
        for scheme in problem.schemes:
            reason = unreadable(scheme) or no_arithmetic(scheme, problem.activation_dtype)
            if reason is not None:
                return reason
        return None

    def how(self, problem: ExpertsProblem) -> str:
        """The instruction set, what the products multiply, and codes that become others."""
        activations = dict.fromkeys(
            current_arithmetic(scheme, problem.activation_dtype, rounding).words
            for scheme in problem.schemes
            for rounding in problem.roundings or (None,)
        )
        found = [conversion_of(scheme) for scheme in problem.schemes]
        converted = dict.fromkeys(str(conversion) for conversion in found if conversion is not None)
        rounded = in_words(problem.roundings)
        products = " and ".join(activations)
        multiplied = [f"{products} products", rounded] if rounded else [f"{products} activations"]
        return ", ".join([current_path(), *multiplied, *converted])

    def pack(
        self, weights: ExpertWeights, activation_dtype: ActivationDtype | None = None
    ) -> PackedLayer:
        """Lay the weights out in panels.

        Raises:
            InputError: a scale, zero point or code is not finite, or a permutation is none.
        """
        return pack_layer(weights, activation_dtype)

    def unpack(self, packed: Any, config: ExpertsConfig) -> ExpertWeights:
        assert isinstance(packed, PackedLayer)
        return unpack_layer(packed)

    def slots(self, packed: Any) -> dict[str, Tensor] | None:
        """None with stored scales of inputs: whether rows are rounded once is packed too."""
        assert isinstance(packed, PackedLayer)
        template = packed.template
        if template.inputs:
            return None
        projections = {"gate_up": packed.gate_up, "down": packed.down}
        found = {
            f"{role}.{name}": tensor
            for role, panels in projections.items()
            for name, tensor in panels.tensors.items()
        }
        if packed.gate_up.order is not None:
            found["gate_up.order"] = packed.gate_up.order
        for role, matrix in (("gate_up", template.gate_up_proj), ("down", template.down_proj)):
            if matrix.permutation is not None:
                found[f"{role}.stored_permutation"] = matrix.permutation
        return found | template.slot_vectors() | packed.lora.slots()

    def with_lora(self, packed: Any, adapters: Adapters) -> PackedLayer:
        assert isinstance(packed, PackedLayer)
        lora = CpuLora.of(adapters, packed.gate_up.order)
        return _named(dataclasses.replace(packed, lora=lora, key=_KEYS.new()))

    def run(
        self,
        packed: Any,
        batch: ExpertBatch,
        *,
        weight_on: WeightOn = WeightOn.OUTPUT,
        reduce: bool = True,
    ) -> Tensor:
        on_input = weight_on is WeightOn.INPUT
        if torch.compiler.is_compiling():
            out: Tensor = torch.ops.mixtura.cpu_experts(
                batch.hidden_states,
                batch.local_ids,
                batch.topk_weights,
                batch.adapter_ids,
                packed.key,
                on_input,
                reduce,
            )
            return out
        return run_packed(packed, batch, on_input, reduce)


def run_packed(packed: PackedLayer, batch: ExpertBatch, on_input: bool, reduce: bool) -> Tensor:
    """One call of the extension.

    Raises:
        InputError: rows, ids or weights of a dtype, device, shape or alignment that the kernels do
            not take, an id outside [-1, L), or an adapter's that is none's.
    """
    rows, ids, weights = batch.hidden_states, batch.local_ids, batch.topk_weights
    if not (
        rows.dtype in ROW_DTYPES
        and ids.dtype is torch.int32
        and weights.dtype in ROW_DTYPES
        and rows.is_cpu
        and ids.is_cpu
        and weights.is_cpu
        and ids.ndim == 2
        and rows.shape == (ids.shape[0], packed.template.config.hidden_size)
        and weights.shape == ids.shape
    ):
        _refuse(packed, batch)
    if weights.dtype is not torch.float32:
        weights = weights.float()
    rows, ids, weights = rows.contiguous(), ids.contiguous(), weights.contiguous()
    row_address, id_address, weight_address = rows.data_ptr(), ids.data_ptr(), weights.data_ptr()
    if row_address % rows.itemsize or (id_address | weight_address) % 4:
        _refuse(packed, ExpertBatch(rows, ids, weights))
    adapter_ids = batch.adapter_ids
    if adapter_ids is not None:
        fits = adapter_ids.shape == rows.shape[:1] and adapter_ids.is_cpu
        if not fits or adapter_ids.dtype is not torch.int32:
            check_adapter_ids(adapter_ids, rows, packed.lora.adapters)
        adapter_ids = adapter_ids.contiguous()
    num_tokens, top_k = ids.shape
    if reduce:
        out = torch.empty_like(rows)
    else:
        out = rows.new_empty((num_tokens, top_k, rows.shape[1]), dtype=torch.float32)
    is_done = extension().run_experts(
        packed.handle,
        row_address,
        ROW_DTYPES[rows.dtype],
        id_address,
        weight_address,
        out.data_ptr(),
        num_tokens,
        top_k,
        on_input,
        reduce,
        0 if adapter_ids is None else adapter_ids.data_ptr(),
        packed.lora.handle,
        torch.get_num_threads(),
    )
    if not is_done:
        if adapter_ids is not None:
            check_adapter_ids(adapter_ids, rows, packed.lora.adapters)
        raise InputError(
            f"local_ids ({int(ids.min())} to {int(ids.max())}) must be in [-1, "
            f"{packed.template.config.num_experts}); got another. Check the router or the ids."
        )
    return out


def _refuse(packed: PackedLayer, batch: ExpertBatch) -> NoReturn:
    """Say which tensor of a batch is wrong, and how."""
    ids, width = batch.local_ids, packed.template.config.hidden_size
    floats = tuple(ROW_DTYPES)
    wanted: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...], str]] = {
        "local_ids": ((torch.int32,), tuple(ids.shape[:2]), "(rows, top_k)"),
        "hidden_states": (floats, (*ids.shape[:1], width), f"(rows, {width})"),
        "topk_weights": (floats, tuple(ids.shape), "(rows, top_k), as local_ids"),
    }
    for name, (dtypes, shape, words) in wanted.items():
        tensor: Tensor = getattr(batch, name)
        is_shaped = tuple(tensor.shape) == shape and len(shape) == 2
        if tensor.dtype not in dtypes or not tensor.is_cpu or not is_shaped:
            choices = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise InputError(
                f"{name} {tuple(tensor.shape)} must be {words} of {choices} on the CPU; got "
                f"{tensor.dtype} on {tensor.device}, with local_ids {tuple(ids.shape)}. Convert it."
            )
        if tensor.data_ptr() % tensor.itemsize:
            raise InputError(
                f"{name} {shape} must be aligned to its elements; got the address "
                f"{tensor.data_ptr():#x} for {tensor.dtype}. Clone it."
            )
    raise AssertionError("nothing is wrong")


@torch.library.custom_op("mixtura::cpu_experts", mutates_args=())
def _cpu_experts(
    rows: Tensor,
    ids: Tensor,
    weights: Tensor,
    adapter_ids: Tensor | None,
    key: Tensor,
    on_input: bool,
    reduce: bool,
) -> Tensor:
    batch = ExpertBatch(rows, ids, weights, adapter_ids=adapter_ids)
    return run_packed(_KEYS.find(key), batch, on_input, reduce)


@_cpu_experts.register_fake
def _(
    rows: Tensor,
    ids: Tensor,
    weights: Tensor,
    adapter_ids: Tensor | None,
    key: Tensor,
    on_input: bool,
    reduce: bool,
) -> Tensor:
    if reduce:
        return torch.empty_like(rows, memory_format=torch.contiguous_format)
    return rows.new_empty((ids.shape[0], ids.shape[1], rows.shape[1]), dtype=torch.float32)


def _parts(weights: ExpertWeights) -> list[Part]:
    """The rows of gate and up, whatever holds them."""
    stack, size = weights.gate_up_proj, weights.config.intermediate_size
    match weights.config.gate_up:
        case GateUp.STACKED:
            return [Part(stack, 0, size), Part(stack, size, 2 * size)]
        case GateUp.INTERLEAVED:
            return [Part(stack, 0, None, 2), Part(stack, 1, None, 2)]
        case GateUp.SEPARATE:
            assert weights.up_proj is not None
            return [Part(stack), Part(weights.up_proj)]
        case GateUp.UNGATED:
            return [Part(stack)]


@torch.no_grad()
def pack_layer(
    weights: ExpertWeights, activation_dtype: ActivationDtype | None = None
) -> PackedLayer:
    """Lay the weights of a layer out; see `CpuKernel.pack`."""
    config = weights.config
    rounded = weights.rounded_for(activation_dtype)

    def arithmetic(matrix: QuantizedMatrix, inputs: StaticInputs | None) -> Arithmetic:
        rounding = None if inputs is None else inputs.scheme
        return current_arithmetic(matrix.scheme, activation_dtype, rounding)

    bias = weights.gate_up_bias
    if bias is not None and config.gate_up is GateUp.INTERLEAVED:
        bias = bias.view(len(bias), -1, 2).mT.flatten(1)
    down = pack_panels(
        [Part(weights.down_proj)],
        arithmetic(weights.down_proj, rounded.down_inputs),
        weights.down_bias,
        rounded.down_inputs,
    )
    # The down projection's order of columns is that in which the first one makes them.
    order = weights.down_proj.permutation
    gate_up = pack_panels(
        _parts(weights),
        arithmetic(weights.gate_up_proj, rounded.gate_up_inputs),
        bias,
        rounded.gate_up_inputs,
        permutation=weights.gate_up_proj.permutation,
        order=None if order is None else order.long(),
    )
    # A copy always: what it is packed from may be freed.
    post_norm = None if weights.post_norm is None else weights.post_norm.detach().clone().float()
    activation = config.activation
    handle = extension().layer(
        gate_up.handle,
        down.handle,
        config.is_gated,
        _FUNCTIONS[activation.function],
        _LIMITS[activation.limit_on],
        activation.alpha,
        activation.limit or 0.0,
        activation.up_offset,
        activation.gate_softcap or 0.0,
        activation.up_softcap or 0.0,
        _NORMS[config.post_norm],
        config.post_norm_epsilon,
        0 if post_norm is None else post_norm.data_ptr(),
        config.num_experts,
    )
    template = weights.mapped(_kept_whole_if_small)
    lora = CpuLora.of(())
    return _named(PackedLayer(gate_up, down, post_norm, template, handle, _KEYS.new(), lora))


def _named(packed: PackedLayer) -> PackedLayer:
    _KEYS.name(packed.key, packed)
    return packed


def _kept_whole_if_small(tensor: Tensor) -> Tensor:
    """Biases, norms and permutations stay as they came; of matrices only the shape is kept."""
    if tensor.dim() < 3:
        return tensor.detach().clone()
    return tensor.new_empty(()).expand(tensor.shape)


def unpack_layer(packed: PackedLayer) -> ExpertWeights:
    """The inverse of `pack_layer`, bit for bit."""
    template = packed.template
    parts = _parts(template)
    stacks: dict[int, dict[str, Tensor]] = {}

    def restored(panels: Panels, parts: list[Part]) -> None:
        for index, part in enumerate(parts):
            into = stacks.setdefault(id(part.matrix), _empty_tensors(part.matrix))
            unpack_part(panels, part, index, into)

    restored(packed.gate_up, parts)
    restored(packed.down, [Part(template.down_proj)])

    def matrix(old: QuantizedMatrix) -> QuantizedMatrix:
        tensors = stacks[id(old)]
        return QuantizedMatrix(old.scheme, old.shape, **tensors)

    return dataclasses.replace(
        template,
        gate_up_proj=matrix(template.gate_up_proj),
        down_proj=matrix(template.down_proj),
        up_proj=None if template.up_proj is None else matrix(template.up_proj),
    )


def _empty_tensors(matrix: QuantizedMatrix) -> dict[str, Tensor]:
    return {
        name: torch.empty(tensor.shape, dtype=tensor.dtype)
        for name, tensor in matrix.tensors.items()
    }
