"""Gate and router as one call of the extension: the arithmetic of mixtura/routing/pipeline.py.

What a call depends on is asked with every call, and is little: grad mode, dtypes, devices, layout.
Where `takes_logits` or `takes_rows` is False the pipeline of torch runs.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mixtura.config import (
    DroppedGroup,
    GroupScore,
    Renormalize,
    RoutingConfig,
    ScaleOn,
    ScoreFunction,
    ScoreOrder,
    SelectionBias,
)
from mixtura.errors import InputError
from mixtura.kernels.cpu.extension import extension, missing

_LAYOUT = struct.Struct("=12i7f")
"""`Rule` of csrc/routing.h."""

_SCORES = {function: number for number, function in enumerate(ScoreFunction)}
_BIASES = {bias: number for number, bias in enumerate(SelectionBias)}
_NORMS = {norm: number for number, norm in enumerate(Renormalize)}
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_PLAIN = (Tensor, torch.nn.Parameter)
_HAS_EXTENSION = missing() is None


@dataclass(frozen=True, slots=True)
class CpuRouting:
    """A routing rule as the extension reads it.

    Attributes:
        packed: the `Rule` of csrc/routing.h. text: the same, as graphs of torch.compile name it.
        num_choices, num_logits, num_slots: as in `RoutingConfig`.
    """

    packed: bytes
    text: str
    num_choices: int
    num_logits: int
    num_slots: int

    @staticmethod
    def for_rule(config: RoutingConfig) -> CpuRouting | None:
        """The rule for the extension; None where it covers it not: a p-norm with p <= 0."""
        if config.renormalize is Renormalize.P_NORM and config.p_norm <= 0:
            return None
        groups = config.groups
        packed = _LAYOUT.pack(
            config.num_choices,
            config.top_k,
            _SCORES[config.score],
            config.score_order is ScoreOrder.AFTER_TOP_K,
            _BIASES[config.selection_bias],
            groups.num_expert_groups if groups else 0,
            groups.topk_groups if groups else 0,
            2 if groups and groups.score is GroupScore.TOP2_SUM else 1,
            groups is not None and groups.dropped is DroppedGroup.ZERO,
            _NORMS[config.renormalize],
            config.num_fused_shared_experts,
            config.fused_shared_gate,
            config.logit_multiplier,
            config.logit_softcap or 0.0,
            config.epsilon,
            config.p_norm,
            config.scale if config.scale_on is ScaleOn.WEIGHTS else 1.0,
            config.jitter,
            config.output_scale,
        )
        sizes = (config.num_choices, config.num_logits, config.num_slots)
        return CpuRouting(packed, packed.hex(), *sizes)

    def takes_logits(
        self, logits: Tensor, selection_bias: Tensor | None, expert_scale: Tensor | None
    ) -> bool:
        """Whether `route` computes what the pipeline of torch would for these tensors."""
        return (
            _HAS_EXTENSION
            and logits.dtype is torch.float32
            and _is_plain(logits)
            and logits.dim() == 2
            and logits.shape[1] == self.num_logits
            and self._takes(selection_bias, expert_scale)
            and not (torch.is_grad_enabled() and _needs_grad(logits, expert_scale))
        )

    def takes_rows(
        self,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        selection_bias: Tensor | None,
        expert_scale: Tensor | None,
    ) -> bool:
        """Whether `choose` computes what gate and pipeline of torch would, the gate in fp32."""
        return (
            _HAS_EXTENSION
            and rows.dtype in _DTYPES
            and weight.dtype in _DTYPES
            and _is_plain(rows)
            and _is_plain(weight)
            and weight.is_contiguous()
            and rows.dim() == 2
            and weight.shape == (self.num_logits, rows.shape[1])
            and (bias is None or (_is_plain(bias) and bias.shape == (self.num_logits,)))
            and self._takes(selection_bias, expert_scale)
            and not (torch.is_grad_enabled() and _needs_grad(rows, weight, bias, expert_scale))
        )

    def _takes(self, selection_bias: Tensor | None, expert_scale: Tensor | None) -> bool:
        return (
            selection_bias is None
            or (
                selection_bias.dtype in _DTYPES
                and _is_plain(selection_bias)
                and selection_bias.shape == (self.num_choices,)
            )
        ) and (
            expert_scale is None
            or (_is_plain(expert_scale) and expert_scale.shape == (self.num_choices,))
        )

    def route(
        self,
        logits: Tensor,
        selection_bias: Tensor | None,
        expert_scale: Tensor | None,
        given_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Choose experts by logits that `takes_logits` accepts.

        Args:
            logits: (T, num_logits).
            selection_bias: (num_choices,).
            expert_scale: (num_experts,).
            given_ids: (T, top_k) int64 that replace the choice.

        Returns:
            weights (T, num_slots) fp32, ids (T, num_slots) int64.

        Raises:
            InputError: a given id is outside [0, num_choices).
        """
        if torch.compiler.is_compiling():
            found: tuple[Tensor, Tensor] = torch.ops.mixtura.cpu_route(
                logits, selection_bias, expert_scale, given_ids, self.text
            )
            return found
        logits = logits.contiguous()
        weights, ids = self._empty(logits)
        self._call(logits, selection_bias, expert_scale, given_ids, weights, ids)
        return weights, ids

    def choose(
        self,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        selection_bias: Tensor | None,
        expert_scale: Tensor | None,
        given_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gate and router in one call, for what `takes_rows` accepts.

        Args:
            rows: (T,H) fp32, fp16 or bf16. weight: (num_logits, H). bias: (num_logits,).
            selection_bias, expert_scale, given_ids: as in `route`.

        Returns:
            logits (T, num_logits) fp32, weights (T, num_slots) fp32, ids (T, num_slots) int64.

        Raises:
            InputError: a given id is outside [0, num_choices).
        """
        if torch.compiler.is_compiling():
            found: tuple[Tensor, Tensor, Tensor] = torch.ops.mixtura.cpu_gate(
                rows, weight, bias, selection_bias, expert_scale, given_ids, self.text
            )
            return found
        rows = rows.contiguous()
        logits = rows.new_empty((rows.shape[0], self.num_logits), dtype=torch.float32)
        weights, ids = self._empty(rows)
        bias = _as_floats(bias)
        gate = (
            rows.data_ptr(),
            _DTYPES[rows.dtype],
            weight.data_ptr(),
            _DTYPES[weight.dtype],
            0 if bias is None else bias.data_ptr(),
            rows.shape[1],
        )
        self._call(logits, selection_bias, expert_scale, given_ids, weights, ids, gate)
        return logits, weights, ids

    def _empty(self, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (like.shape[0], self.num_slots)
        return like.new_empty(shape, dtype=torch.float32), like.new_empty(shape, dtype=torch.int64)

    def _call(
        self,
        logits: Tensor,
        selection_bias: Tensor | None,
        expert_scale: Tensor | None,
        given_ids: Tensor | None,
        weights: Tensor,
        ids: Tensor,
        gate: tuple[int, ...] = (0, 0, 0, 0, 0, 0),
    ) -> None:
        selection_bias, expert_scale = _as_floats(selection_bias), _as_floats(expert_scale)
        given_ids = None if given_ids is None else given_ids.contiguous()
        is_done = extension().route(
            self.packed,
            logits.data_ptr(),
            logits.shape[0],
            0 if selection_bias is None else selection_bias.data_ptr(),
            0 if expert_scale is None else expert_scale.data_ptr(),
            0 if given_ids is None else given_ids.data_ptr(),
            weights.data_ptr(),
            ids.data_ptr(),
            torch.get_num_threads(),
            *gate,
        )
        if not is_done:
            assert given_ids is not None
            raise InputError(
                f"expert ids that replace the choice must be in [0, {self.num_choices}); got "
                f"{int(given_ids.min())} to {int(given_ids.max())}. Correct the ids."
            )


def _is_plain(tensor: Tensor) -> bool:
    """In this process's memory, and what it seems to be."""
    return tensor.is_cpu and type(tensor) in _PLAIN


def _needs_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _as_floats(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


@lru_cache(maxsize=256)
def _rule_of(text: str) -> CpuRouting:
    """The inverse of `CpuRouting.text`."""
    packed = bytes.fromhex(text)
    fields = _LAYOUT.unpack(packed)
    num_choices, top_k, num_shared, has_shared_gate = (fields[i] for i in (0, 1, 10, 11))
    num_logits = num_choices + (num_shared if has_shared_gate else 0)
    return CpuRouting(packed, text, num_choices, num_logits, top_k + num_shared)


@torch.library.custom_op("mixtura::cpu_route", mutates_args=())
def _cpu_route(
    logits: Tensor,
    selection_bias: Tensor | None,
    expert_scale: Tensor | None,
    given_ids: Tensor | None,
    rule: str,
) -> tuple[Tensor, Tensor]:
    return _rule_of(rule).route(logits, selection_bias, expert_scale, given_ids)


@_cpu_route.register_fake
def _(
    logits: Tensor,
    selection_bias: Tensor | None,
    expert_scale: Tensor | None,
    given_ids: Tensor | None,
    rule: str,
) -> tuple[Tensor, Tensor]:
    return _rule_of(rule)._empty(logits)


@torch.library.custom_op("mixtura::cpu_gate", mutates_args=())
def _cpu_gate(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    selection_bias: Tensor | None,
    expert_scale: Tensor | None,
    given_ids: Tensor | None,
    rule: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _rule_of(rule).choose(rows, weight, bias, selection_bias, expert_scale, given_ids)


@_cpu_gate.register_fake
def _(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    selection_bias: Tensor | None,
    expert_scale: Tensor | None,
    given_ids: Tensor | None,
    rule: str,
) -> tuple[Tensor, Tensor, Tensor]:
    known = _rule_of(rule)
    logits = rows.new_empty((rows.shape[0], known.num_logits), dtype=torch.float32)
    return logits, *known._empty(rows)
