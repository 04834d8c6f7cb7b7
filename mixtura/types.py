"""Frozen nouns that pass between rooms.

T tokens, K slots per token, E logical experts, L local experts, M rows a rank works on, H hidden
size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mixtura.config import ActivationDtype, ExpertsConfig, GateUp, WeightOn
from mixtura.errors import ConfigError, InputError
from mixtura.lora import Adapters, adapter_tensors
from mixtura.quant.activations import ActivationScheme, StaticInputs
from mixtura.quant.matrix import QuantizedMatrix
from mixtura.quant.scheme import QuantScheme

DENSE = "dense"
"""What stands for the scheme of weights that are not quantized, in words."""


RoutingObserver = Callable[[Tensor, Tensor], None]
"""Called with ids (T,K) as the router chose them, no-compute experts too, and weights (T,K)."""


@dataclass(frozen=True, slots=True)
class TokenInputs:
    """What a token brings along besides its hidden state; every runner slices it with the tokens.

    Attributes:
        input_ids: (T,) integer token ids, needed by hash routing.
        replayed_ids: (T, K) int32 expert ids that replace the router's choice.
        padding_mask: (T,) bool, True for a real token; a padding token's slots are all -1.
        adapter_ids: (T,) int32 numbers of LoRA adapters; -1 is none.
    """

    input_ids: Tensor | None = None
    replayed_ids: Tensor | None = None
    padding_mask: Tensor | None = None
    adapter_ids: Tensor | None = None

    def slice(self, start: int, stop: int) -> TokenInputs:
        """The same inputs for tokens start .. stop - 1."""
        return TokenInputs(*(None if part is None else part[start:stop] for part in self._parts()))

    def check(self, num_tokens: int) -> None:
        """Raise `InputError` unless every part speaks of `num_tokens` tokens."""
        dims = {"input_ids": 1, "replayed_ids": 2, "padding_mask": 1, "adapter_ids": 1}
        for (name, ndim), part in zip(dims.items(), self._parts(), strict=True):
            if part is not None and (part.ndim != ndim or part.shape[0] != num_tokens):
                wanted = "(tokens,)" if ndim == 1 else "(tokens, top_k)"
                raise InputError(
                    f"{name} ({tuple(part.shape)}) must be {wanted}, one row per token; got "
                    f"{num_tokens} tokens. Flatten it as the hidden states are."
                )

    def _parts(self) -> tuple[Tensor | None, ...]:
        return (self.input_ids, self.replayed_ids, self.padding_mask, self.adapter_ids)


TokenSource = Callable[[TokenInputs, int], TokenInputs]
"""Called with what tokens bring along to a layer so far, and how many there are; returns it with
more."""


@dataclass(frozen=True, slots=True)
class Bypass:
    """What no-compute experts add to a token's output, once, on the token's own rank.

    Attributes:
        identity_weight: (T,) fp32, the summed weight of identity experts.
        constant_ids: (T, K) int64 rows of `constants`; 0 where a slot is none of them.
        constant_weights: (T, K) fp32, 0 where a slot is no constant expert.
        constants: (C, H).
    """

    identity_weight: Tensor | None = None
    constant_ids: Tensor | None = None
    constant_weights: Tensor | None = None
    constants: Tensor | None = None

    def apply(self, routed: Tensor, hidden_states: Tensor) -> Tensor:
        """`routed + identity_weight * hidden_states + sum_k constant_weights[k] * constants[k]`.

        The sum is in fp32 (float64 for rows of float64), slot by slot: a token's does not depend on
        the batch.
        """
        total = routed.to(torch.promote_types(routed.dtype, torch.float32))
        if self.identity_weight is not None:
            total = total + self.identity_weight.unsqueeze(1) * hidden_states.to(total.dtype)
        if self.constants is not None:
            assert self.constant_ids is not None and self.constant_weights is not None
            constants = self.constants.to(total.dtype)
            for ids, weights in zip(
                self.constant_ids.unbind(1), self.constant_weights.unbind(1), strict=True
            ):
                total = total + weights.unsqueeze(1) * constants[ids]
        return total.to(routed.dtype)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How sorted slots are cut in tiles, each of one expert; its last one may not be full.

    Attributes:
        rows: of a full tile, a power of two.
    """

    rows: int

    def max_tiles(self, num_slots: int, num_experts: int) -> int:
        """Tiles that any choice of experts can make: known without looking at it."""
        return num_slots // self.rows + min(num_slots, num_experts)


@dataclass(frozen=True, slots=True)
class ExpertOrder:
    """The slots of a batch sorted by expert and cut in tiles, made where the ids are.

    Attributes:
        ids: (M, K) int32, the very tensor that was sorted; -1 is no expert.
        sort_order: (N,) int32, N = M * K: row r of the sorted slots is flat slot `sort_order[r]`,
            of token `sort_order[r] // K`; an expert's are in rising order. Behind the last
            expert's row nothing is said.
        expert_offsets: (L + 1,) int32, first row of every expert, and the number of rows.
        tiles: (max_tiles, 4) int32 of `Tiling.max_tiles`: expert, first row, number of rows, 0. An
            expert's are next to each other, in rising order.
        num_tiles: (1,) int32, tiles that there are.
        tiling: how they were cut.
    """

    ids: Tensor
    sort_order: Tensor
    expert_offsets: Tensor
    tiles: Tensor
    num_tiles: Tensor
    tiling: Tiling


@dataclass(frozen=True, slots=True)
class Routing:
    """Which experts a token visits and with what weight.

    Attributes:
        topk_ids: (T, K) int32 logical expert ids; -1 is a slot without an expert.
        topk_weights: (T, K) fp32; 0 where the id is -1.
        bypass: what no-compute experts add, or None.
        router_logits: (T, num_logits) that the choice was made from, where a layer made it.
        order: the slots sorted by expert, where the router has done so along with the choice.
    """

    topk_ids: Tensor
    topk_weights: Tensor
    bypass: Bypass | None = None
    router_logits: Tensor | None = None
    order: ExpertOrder | None = None

    @staticmethod
    def concatenate(parts: Sequence[Routing]) -> Routing:
        """The routing of consecutive batches of tokens as one; their bypass has been applied."""
        logits = [part.router_logits for part in parts if part.router_logits is not None]
        return Routing(
            torch.cat([part.topk_ids for part in parts]),
            torch.cat([part.topk_weights for part in parts]),
            router_logits=torch.cat(logits) if logits else None,
        )


@dataclass(frozen=True, slots=True)
class ExpertBatch:
    """Rows for the experts of this rank; closed under dispatch, so every kernel has one contract.

    Attributes:
        hidden_states: (M, H).
        local_ids: (M, K) int32 slots on this rank; -1 is not here, or no expert.
        topk_weights: (M, K) fp32.
        order: the slots sorted, where whoever chose the ids has done so; it holds only while
            `order.ids is local_ids`.
        expected_share: of the slots, that have an expert here where choices are even: other ranks
            have the others'. How fast kernels are may depend on it, and nothing else.
        adapter_ids: (M,) int32, the row's LoRA adapter by number; -1, or None for all: no adapter.
    """

    hidden_states: Tensor
    local_ids: Tensor
    topk_weights: Tensor
    order: ExpertOrder | None = None
    expected_share: float = 1.0
    adapter_ids: Tensor | None = None


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The weights of this rank's experts: tensors and their schemes, experts first, outputs next.

    A transposed storage is a transposed view here: kernels see one orientation, and its strides.

    Attributes:
        config: sizes and layout; `config.num_experts` is L here.
        gate_up_proj: (L, 2I, H) stack; (L, I, H), the gate where there is `up_proj`, else the up
            projection of ungated experts.
        down_proj: (L, H, I) stack.
        up_proj: (L, I, H) stack where gate and up are separate tensors, else None.
        gate_up_bias: (L, 2I) or None. down_bias: (L, H) or None.
        post_norm: (H,) or None.
        gate_up_inputs, down_inputs: how the rows of gate and up, and of down, are rounded with
            stored scales (L,); None: as the kernel does.
        activations: what the checkpoint means rows to be rounded to with scales found while
            running; None: nothing. In the weights that `StoredWeightsKernel.pack` returns, what is
            done. It is of the rows that quantized matrices multiply, and of those among them that
            no stored scale is for.
        lora: what adapters add beside the weights, which stay as they are.
    """

    config: ExpertsConfig
    gate_up_proj: QuantizedMatrix
    down_proj: QuantizedMatrix
    up_proj: QuantizedMatrix | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    post_norm: Tensor | None = None
    gate_up_inputs: StaticInputs | None = None
    down_inputs: StaticInputs | None = None
    activations: ActivationScheme | None = None
    lora: Adapters = ()

    def __post_init__(self) -> None:
        c = self.config
        up = (c.num_experts, c.up_size, c.hidden_size)
        expected = {
            "gate_up_proj": up,
            "down_proj": (c.num_experts, c.hidden_size, c.intermediate_size),
            "up_proj": up if c.gate_up is GateUp.SEPARATE else None,
            "gate_up_bias": up[:2] if c.has_bias else None,
            "down_bias": (c.num_experts, c.hidden_size) if c.has_bias else None,
            "post_norm": (c.hidden_size,) if c.post_norm is not None else None,
            "gate_up_inputs": (c.num_experts,) if self.gate_up_inputs is not None else None,
            "down_inputs": (c.num_experts,) if self.down_inputs is not None else None,
        }
        for name, shape in expected.items():
            part: Any = getattr(self, name)
            got = None if part is None else tuple(part.shape)
            if got != shape:
                raise ConfigError(
                    f"{name} ({got}) must have the shape that the experts' configuration gives; "
                    f"got {shape} from it. Correct the configuration or the tensor."
                )
        devices = {str(t.device) for t in self.tensors()}
        if len(devices) > 1:
            raise InputError(
                f"the experts' tensors must be on one device; got {sorted(devices)}. Move them "
                f"together."
            )

    def projections(self) -> tuple[QuantizedMatrix, ...]:
        """The weight matrices, gate first."""
        found = (self.gate_up_proj, self.up_proj, self.down_proj)
        return tuple(part for part in found if part is not None)

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor, for identity checks and byte counts."""
        parts = (self.gate_up_bias, self.down_bias, self.post_norm)
        found = [part for part in parts if part is not None]
        for matrix in self.projections():
            found += matrix.tensors.values()
        found += [inputs.scales for inputs in self.inputs]
        found += adapter_tensors(self.lora).values()
        return tuple(found)

    def slots(self) -> dict[str, Tensor]:
        """The tensors with a row for each expert, (L, ...), by role and part."""
        roles = ("gate_up_proj", "up_proj", "down_proj")
        matrices = {role: getattr(self, role) for role in roles}
        found = {
            f"{role}.{name}": tensor
            for role, matrix in matrices.items()
            if matrix is not None
            for name, tensor in matrix.tensors.items()
        }
        return found | self.slot_vectors() | adapter_tensors(self.lora)

    def slot_vectors(self) -> dict[str, Tensor]:
        """Those of `slots` that are no matrices: biases, and scales of inputs."""
        biases = {"gate_up_bias": self.gate_up_bias, "down_bias": self.down_bias}
        inputs = {"gate_up_inputs": self.gate_up_inputs, "down_inputs": self.down_inputs}
        scales = {name: one.scales for name, one in inputs.items() if one is not None}
        return {name: bias for name, bias in biases.items() if bias is not None} | scales

    @property
    def inputs(self) -> tuple[StaticInputs, ...]:
        """How rows are rounded with stored scales, those of gate and up first."""
        found = (self.gate_up_inputs, self.down_inputs)
        return tuple(inputs for inputs in found if inputs is not None)

    def rounded_for(self, activation_dtype: ActivationDtype | None) -> ExpertWeights:
        """The same weights, with the stored scales that hold with an arithmetic and no others."""
        if all(inputs.scheme.holds_with(activation_dtype) for inputs in self.inputs):
            return self

        def kept(inputs: StaticInputs | None) -> StaticInputs | None:
            holds = inputs is not None and inputs.scheme.holds_with(activation_dtype)
            return inputs if holds else None

        return replace(
            self, gate_up_inputs=kept(self.gate_up_inputs), down_inputs=kept(self.down_inputs)
        )

    def roundings(self, activation_dtype: ActivationDtype | None) -> tuple[ActivationScheme, ...]:
        """What rows are rounded to with stored scales in an arithmetic, each scheme once."""
        inputs = self.rounded_for(activation_dtype).inputs
        return tuple(dict.fromkeys(one.scheme for one in inputs))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> ExpertWeights:
        """The same weights with every tensor changed; shapes and dtypes must stay."""

        def matrix(old: QuantizedMatrix) -> QuantizedMatrix:
            changed: dict[str, Any] = {name: change(part) for name, part in old.tensors.items()}
            return replace(old, **changed)

        def tensor(old: Tensor | None) -> Tensor | None:
            return None if old is None else change(old)

        def inputs(old: StaticInputs | None) -> StaticInputs | None:
            return None if old is None else old.mapped(change)

        return replace(
            self,
            gate_up_proj=matrix(self.gate_up_proj),
            down_proj=matrix(self.down_proj),
            up_proj=None if self.up_proj is None else matrix(self.up_proj),
            gate_up_bias=tensor(self.gate_up_bias),
            down_bias=tensor(self.down_bias),
            post_norm=tensor(self.post_norm),
            gate_up_inputs=inputs(self.gate_up_inputs),
            down_inputs=inputs(self.down_inputs),
            lora=tuple(one if one is None else one.mapped(change) for one in self.lora),
        )

    @property
    def schemes(self) -> tuple[QuantScheme, ...]:
        """The schemes of the projections, each once."""
        return tuple(dict.fromkeys(matrix.scheme for matrix in self.projections()))

    @property
    def has_unlike_gate_up(self) -> bool:
        """Whether gate and up are stored apart, in two schemes."""
        return self.up_proj is not None and self.up_proj.scheme != self.gate_up_proj.scheme

    @property
    def scheme(self) -> str:
        """The projections' schemes in words, `DENSE` when unquantized."""
        return scheme_in_words(self.schemes)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.gate_up_proj.values.device

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.numel() * part.element_size() for part in self.tensors())


@dataclass(frozen=True, slots=True)
class ExpertsProblem:
    """What a kernel is asked to run; kernels say from this alone whether they can.

    Attributes:
        experts: sizes, activation and layout.
        schemes: how the projections are stored, each scheme once.
        row_dtype: dtype of the hidden states.
        device: "cpu", "cuda", ...
        weight_on: where the routing weight applies.
        needs_grad: gradients must flow.
        is_deterministic: a row's result may not depend on the batch around it.
        activation_dtype: the arithmetic with quantized weights; None leaves it to the kernel.
        roundings: what rows are to be rounded to with the scales in the weights, each scheme once.
        activations: what the checkpoint means them to be rounded to with scales found while
            running; None: nothing. Where an arithmetic is asked for, `activations_for` has the
            last word.
        has_unlike_gate_up: gate and up are stored apart, in two schemes.
        has_lora: adapters add to what some rows' experts give.
    """

    experts: ExpertsConfig
    schemes: tuple[QuantScheme, ...]
    row_dtype: torch.dtype
    device: str
    weight_on: WeightOn = WeightOn.OUTPUT
    needs_grad: bool = False
    is_deterministic: bool = False
    activation_dtype: ActivationDtype | None = None
    roundings: tuple[ActivationScheme, ...] = ()
    activations: ActivationScheme | None = None
    has_unlike_gate_up: bool = False
    has_lora: bool = False

    @property
    def is_dense(self) -> bool:
        """Whether no projection is quantized."""
        return not any(scheme.is_quantized for scheme in self.schemes)

    @property
    def scheme(self) -> str:
        """The schemes in words, `DENSE` when unquantized."""
        return scheme_in_words(self.schemes)

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of the stored values: uint8 where they are packed codes."""
        return self.schemes[0].values_dtype


def scheme_in_words(schemes: Sequence[QuantScheme]) -> str:
    """The schemes joined by "and"; unquantized ones are `DENSE`."""
    names = [str(scheme) if scheme.is_quantized else DENSE for scheme in schemes]
    return " and ".join(dict.fromkeys(names))


def even_bounds(count: int, parts: int) -> tuple[int, ...]:
    """Bounds of `parts` consecutive parts of `count` things, as even as can be: parts + 1 numbers.

    >>> even_bounds(7, 3)
    (0, 2, 4, 7)
    """
    return tuple(count * part // parts for part in range(parts + 1))


@dataclass(frozen=True, slots=True)
class StepContext:
    """What holds for a whole forward of a model on all ranks; every rank has the same.

    Attributes:
        number: forwards before this one.
        num_tokens: (R,) tokens of every rank, padding included.
        wants_overlap: (R,) whether a rank would run its tokens in two batches.
        is_done: (R,) whether a rank has no requests left, and runs along for the others.
    """

    number: int
    num_tokens: tuple[int, ...]
    wants_overlap: tuple[bool, ...]
    is_done: tuple[bool, ...]

    @classmethod
    def alone(cls, num_tokens: int, overlap_min_tokens: int | None = None) -> StepContext:
        """The context of one rank that has all experts, and votes for itself."""
        wants = overlap_min_tokens is not None and num_tokens >= overlap_min_tokens
        return cls(0, (num_tokens,), (wants,), (False,))

    @property
    def is_overlapped(self) -> bool:
        """Whether all ranks run two batches."""
        return all(self.wants_overlap)


@dataclass(frozen=True, slots=True)
class Full:
    """An output that is complete on this rank."""

    tensor: Tensor

    def __add__(self, other: Full) -> Full:
        if not isinstance(other, Full):
            raise TypeError(
                f"Full must be added to Full; got {type(other).__name__}. Reduce it first."
            )
        return Full(self.tensor + other.tensor)


@dataclass(frozen=True, slots=True)
class Partial:
    """An output that must still be summed over `group`."""

    tensor: Tensor
    group: Any

    def __add__(self, other: Partial) -> Partial:
        if not isinstance(other, Partial) or other.group is not self.group:
            raise TypeError(
                f"Partial must be added to Partial of one group; got {type(other).__name__}. "
                f"Reduce first."
            )
        return Partial(self.tensor + other.tensor, self.group)
