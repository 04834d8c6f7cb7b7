"""Routing on the device: fp32 logits (T, num_logits) -> weights, ids, bypass and `ExpertOrder`.

T tokens, K slots of a token (top-k and fused shared experts), N = T * K. The kernels are in
choice.py and align.py.

    not sorted       one launch: `route_blocks`, a token to a program
    few slots        one launch: `route_and_place`, one program for all
    more             three: `route_blocks`, a block of tokens to a program | `_scan` | `_scatter`

A token's weights are bitwise the same in all three and in any batch: sums along a row are taken in
pairs of neighbours, whatever threads hold them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mixtura.config import (
    DroppedGroup,
    GroupScore,
    NoComputeKind,
    Renormalize,
    RoutingConfig,
    ScaleOn,
    ScoreFunction,
    ScoreOrder,
    SelectionBias,
)
from mixtura.cuda import on_device
from mixtura.kernels.triton.align import (
    ONE_LAUNCH_SLOTS,
    empty_order,
    experts_room,
    named_order,
    scan_and_scatter,
    sort_size,
    warps_for,
)
from mixtura.kernels.triton.buffers import empty
from mixtura.kernels.triton.choice import (
    LOGIT,
    NORM_CLAMPED,
    NORM_P,
    NORM_SUM,
    SIGMOID,
    SOFTMAX,
    SQRT_SOFTPLUS,
    TO_CONSTANT,
    TO_NOTHING,
    TO_SELF,
    Rule,
    route_and_place,
    route_blocks,
)
from mixtura.kernels.triton.launch import Launch, cdiv, next_power_of_2
from mixtura.kernels.triton.regimes import tiling_for
from mixtura.types import Bypass, Routing, Tiling

MAX_CHOICES = 1024
"""Choices and experts that a row has room for."""

MAX_SLOTS = 64
"""Slots of a token."""

ROWS_OF_ONE = (4, 16, 64, 256)
"""Tokens that one program routes at once, where it routes all: the first that all fit in."""

SCORES_OF_ONE = 4096
"""Scores that it holds at most: 8 for each of 512 threads; with 16 some rules spill."""

SCORES_OF_BLOCK = 2048
"""Scores that a program holds which routes a block: 8 for each of 256 threads, 4 of 512."""

BLOCK_TOKENS = ((2048, 16), (8192, 64))
"""Tokens up to which a block has so many: some 128 blocks for as many processors."""

MAX_BLOCK_TOKENS = 128
MAX_BLOCK_SLOTS = 2048

_SCORES = {
    ScoreFunction.SOFTMAX: SOFTMAX.value,
    ScoreFunction.SIGMOID: SIGMOID.value,
    ScoreFunction.SQRT_SOFTPLUS: SQRT_SOFTPLUS.value,
    ScoreFunction.LOGIT: LOGIT.value,
}
_NORMS = {
    Renormalize.NONE: 0,
    Renormalize.SUM: NORM_SUM.value,
    Renormalize.CLAMPED_SUM: NORM_CLAMPED.value,
    Renormalize.P_NORM: NORM_P.value,
}
_BYPASSES = {
    NoComputeKind.ZERO: TO_NOTHING.value,
    NoComputeKind.IDENTITY: TO_SELF.value,
    NoComputeKind.CONSTANT: TO_CONSTANT.value,
}
_PLAIN = (Tensor, torch.nn.Parameter)


IS_INTERPRETED = not isinstance(route_blocks, triton.JITFunction)
"""Kernels run in Triton's interpreter, on tensors of any device."""

# ------------------------------------------------------------------------------------------ launch


class Made(NamedTuple):
    """What the launches write; `raw` is what observers see where `finish` changes it.

    Attributes:
        bypass: (weights,), or (weights, ids) of constants. order: as `empty_order` has it.
    """

    weights: Tensor
    ids: Tensor
    raw: list[Tensor]
    bypass: list[Tensor]
    order: list[Tensor]


@dataclass(frozen=True, slots=True)
class TritonRouting:
    """A routing rule on a GPU: the counterpart of `CpuRouting`, from the logits on.

    Attributes:
        rule: what the kernels are compiled for. text: the same, as graphs of torch.compile name it.
        num_logits, num_slots, num_placed: as in `Rule`, where a graph asks for them.
    """

    rule: Rule
    text: str
    num_logits: int
    num_slots: int
    num_placed: int

    @staticmethod
    def for_rule(config: RoutingConfig) -> TritonRouting | None:
        """The kernels' form of a rule.

        None where they do not cover it: sparsemixer, a p-norm with p <= 0, more than `MAX_CHOICES`
        choices or `MAX_SLOTS` slots.
        """
        if (
            config.score not in _SCORES
            or (config.renormalize is Renormalize.P_NORM and config.p_norm <= 0)
            or config.num_choices + config.num_fused_shared_experts > MAX_CHOICES
            or config.num_slots > MAX_SLOTS
        ):
            return None
        groups = config.groups
        scores_chosen = config.score_order is ScoreOrder.AFTER_TOP_K
        rule = Rule(
            num_experts=config.num_experts,
            num_choices=config.num_choices,
            top_k=config.top_k,
            num_shared=config.num_fused_shared_experts,
            has_shared_gate=config.fused_shared_gate,
            score=_SCORES[config.score],
            scores_chosen=scores_chosen,
            # Every score rises with its logit: without bias or groups the logits choose.
            selects_score=not scores_chosen
            and config.selection_bias is not SelectionBias.ON_LOGIT
            and (config.selection_bias is not SelectionBias.NONE or groups is not None),
            num_groups=groups.num_expert_groups if groups else 1,
            topk_groups=groups.topk_groups if groups else 1,
            adds_two_best=groups is not None and groups.score is GroupScore.TOP2_SUM,
            drops_to_zero=groups is not None and groups.dropped is DroppedGroup.ZERO,
            norm=_NORMS[config.renormalize],
            epsilon=config.epsilon,
            p_norm=config.p_norm,
            multiplier=config.logit_multiplier,
            softcap=config.logit_softcap or 0.0,
            scale=config.scale if config.scale_on is ScaleOn.WEIGHTS else 1.0,
            output_scale=config.output_scale,
            bypass=_BYPASSES[config.no_compute.kind] if config.no_compute else 0,
        )
        return _routing_of(json.dumps(asdict(rule)))

    def takes_logits(
        self, logits: Tensor, selection_bias: Tensor | None, expert_scale: Tensor | None
    ) -> bool:
        """Whether `route` computes what the pipeline of torch would for these tensors."""
        return (
            (logits.is_cuda or IS_INTERPRETED)
            and logits.dtype is torch.float32
            and type(logits) in _PLAIN
            and logits.dim() == 2
            and logits.shape[1] == self.num_logits
            and _takes(selection_bias, logits, self.rule.num_choices)
            and _takes(expert_scale, logits, self.rule.num_experts)
            and not (
                torch.is_grad_enabled()
                and (
                    logits.requires_grad
                    or (expert_scale is not None and expert_scale.requires_grad)
                )
            )
        )

    def route(
        self,
        logits: Tensor,
        selection_bias: Tensor | None = None,
        expert_scale: Tensor | None = None,
        given_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        constants: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Routing]:
        """Choose experts by logits that `takes_logits` accepts, and sort the slots by expert.

        Args:
            logits: (T, num_logits).
            selection_bias: (num_choices,).
            expert_scale: (num_experts,).
            given_ids: (T, top_k) integers that replace the choice; one outside [0, num_choices) is
                no expert.
            padding_mask: (T,) bool, True for a real token.
            constants: (C, H), the outputs of constant experts.

        Returns:
            weights (T, num_slots) fp32 and ids (T, num_slots) int32 as observers see them, and the
            routing that `Router.finish` makes of them, with its order where `tiling_for` sorts.
        """
        tiling = tiling_for(logits.shape[0], self.num_slots, self.num_placed)
        learned = (selection_bias, expert_scale, given_ids, padding_mask)
        if torch.compiler.is_compiling():
            rows = tiling.rows if tiling else 0
            parts = torch.ops.mixtura.triton_route(logits, *learned, rows, self.text)
            made = self._named(parts, padding_mask is not None, tiling is not None)
        else:
            made = self.empty(logits, padding_mask is not None, tiling)
            self._run(logits, *learned, tiling, made)
        bypass = None
        if made.bypass and len(made.bypass) == 1:
            bypass = Bypass(identity_weight=made.bypass[0])
        elif made.bypass:
            bypass = Bypass(
                constant_ids=made.bypass[1], constant_weights=made.bypass[0], constants=constants
            )
        order = named_order(made.ids, made.order, tiling) if tiling is not None else None
        routing = Routing(made.ids, made.weights, bypass, order=order)
        weights, ids = made.raw or (made.weights, made.ids)
        return weights, ids, routing

    def empty(self, like: Tensor, has_padding: bool, tiling: Tiling | None) -> Made:
        """Room for what the launches write."""
        rule, num_tokens = self.rule, like.shape[0]
        slots = (num_tokens, rule.num_slots)

        def pair() -> list[Tensor]:
            dtypes = (torch.float32, torch.int32)
            return [empty(like, "chosen experts", slots, dtype) for dtype in dtypes]

        bypass: list[Tensor] = []
        if rule.bypass == TO_CONSTANT.value:
            dtypes = (torch.float32, torch.int64)
            bypass = [empty(like, "constant experts", slots, dtype) for dtype in dtypes]
        elif rule.bypass:
            bypass = [empty(like, "identity experts", (num_tokens,), torch.float32)]
        order: list[Tensor] = []
        if tiling is not None:
            num_slots = num_tokens * rule.num_slots
            order = empty_order(like, num_slots, rule.num_placed, tiling)
        differs = has_padding or rule.bypass != 0
        weights, ids = pair()
        return Made(weights, ids, pair() if differs else [], bypass, order)

    def _named(self, parts: list[Tensor], has_padding: bool, is_sorted: bool) -> Made:
        """`Made` of what an operator returns, its parts one behind the other."""
        num_raw = 2 if has_padding or self.rule.bypass else 0
        num_order = 4 if is_sorted else 0
        behind = len(parts) - num_order
        raw, bypass = parts[2 : 2 + num_raw], parts[2 + num_raw : behind]
        return Made(parts[0], parts[1], raw, bypass, parts[behind:])

    def _run(self, logits: Tensor, *given: Any) -> None:
        with on_device(logits.device):
            for launch in self.launches(logits, *given):
                launch.run()

    def launches(
        self,
        logits: Tensor,
        selection_bias: Tensor | None,
        expert_scale: Tensor | None,
        given_ids: Tensor | None,
        padding_mask: Tensor | None,
        tiling: Tiling | None,
        made: Made,
    ) -> list[Launch]:
        """What fills `made`; see `route`."""
        rule, num_tokens = self.rule, logits.shape[0]
        if logits.stride(1) != 1:
            logits = logits.contiguous()
        tensors = (
            logits,
            None if selection_bias is None else selection_bias.contiguous(),
            None if expert_scale is None else expert_scale.contiguous(),
            None if given_ids is None else given_ids.contiguous(),
            None if padding_mask is None else padding_mask.bool().contiguous(),
            made.weights,
            made.ids,
            *(made.raw or (None, None)),
            *(*made.bypass, None, None)[:2],
        )
        sizes = (num_tokens, logits.stride(0))
        if tiling is None:
            constants = block_sizes(rule, 1, counts=False)
            one = Launch(route_blocks, (num_tokens,), (*tensors, None, *sizes), constants)
            return [one] if num_tokens else []
        if num_tokens * rule.num_slots <= ONE_LAUNCH_SLOTS:
            constants = one_sizes(rule, num_tokens, tiling)
            return [Launch(route_and_place, (1,), (*tensors, *made.order, *sizes), constants)]
        block = block_tokens(num_tokens, rule.num_slots)
        num_blocks = cdiv(num_tokens, block)
        shape = (num_blocks, rule.num_placed)
        counts = empty(logits, "slots per block and expert", shape, torch.int32)
        constants = block_sizes(rule, block, counts=True)
        return [
            Launch(route_blocks, (num_blocks,), (*tensors, counts, *sizes), constants),
            *scan_and_scatter(
                made.ids, counts, block * rule.num_slots, rule.num_placed, tiling, made.order
            ),
        ]


def _takes(learned: Tensor | None, logits: Tensor, size: int) -> bool:
    return learned is None or (
        type(learned) in _PLAIN
        and learned.device == logits.device
        and learned.is_floating_point()
        and learned.dtype is not torch.float64
        and learned.shape == (size,)
    )


# --------------------------------------------------------------------------- sizes of the programs


def _row_sizes(rule: Rule) -> dict[str, int]:
    group = next_power_of_2(rule.num_choices // rule.num_groups)
    groups = next_power_of_2(rule.num_groups)
    return {
        "BLOCK_G": groups,
        "BLOCK_S": max(group, 16 // groups),
        "BLOCK_K": next_power_of_2(rule.num_slots),
        "BLOCK_L": experts_room(rule.num_placed),
    }


def one_sizes(rule: Rule, num_tokens: int, tiling: Tiling) -> dict[str, Any]:
    """Constants of the program that routes and places all."""
    sizes = _row_sizes(rule)
    room = sizes["BLOCK_G"] * sizes["BLOCK_S"]
    wanted = next((rows for rows in ROWS_OF_ONE if num_tokens <= rows), ROWS_OF_ONE[-1])
    rows = max(1, min(wanted, SCORES_OF_ONE // room))
    size = sort_size(num_tokens * rule.num_slots)
    num_warps = warps_for(max(size, sizes["BLOCK_L"], rows * room // 2))
    return {
        "RULE": rule,
        "ROWS": rows,
        "SIZE": size,
        "TILE_ROWS": tiling.rows,
        **sizes,
        **_options(num_warps),
    }


def block_sizes(rule: Rule, block: int, *, counts: bool) -> dict[str, Any]:
    """Constants of a program that routes `block` tokens."""
    sizes = _row_sizes(rule)
    room = sizes["BLOCK_G"] * sizes["BLOCK_S"]
    rows = max(1, min(block, SCORES_OF_BLOCK // room))
    size = sort_size(block * rule.num_slots)
    # A token by itself is best held by as few threads as can be: its sums need no barrier then.
    num_warps = min(16, max(8, room // 64)) if counts else max(1, room // 256)
    return {
        "RULE": rule,
        "ROWS": rows,
        "BLOCK_T": block,
        "SIZE": size,
        **sizes,
        **_options(num_warps),
    }


def block_tokens(num_tokens: int, num_slots: int) -> int:
    """Tokens of a block, a power of two, where there are `num_tokens` in all."""
    wanted = next((size for limit, size in BLOCK_TOKENS if num_tokens <= limit), MAX_BLOCK_TOKENS)
    fits: int = next_power_of_2(MAX_BLOCK_SLOTS // num_slots + 1) // 2
    return min(wanted, fits)


def _options(num_warps: int) -> dict[str, Any]:
    """How kernels are compiled: products and sums round apart, as torch's do."""
    return {"num_warps": num_warps, "enable_fp_fusion": False}


# --------------------------------------------------------------------------------------- operators


@lru_cache(maxsize=256)
def _routing_of(text: str) -> TritonRouting:
    """The inverse of `TritonRouting.text`."""
    rule = Rule(**json.loads(text))
    return TritonRouting(rule, text, rule.num_logits, rule.num_slots, rule.num_placed)


def _parts(made: Made) -> list[Tensor]:
    return [made.weights, made.ids, *made.raw, *made.bypass, *made.order]


@torch.library.custom_op("mixtura::triton_route", mutates_args=())
def _triton_route(
    logits: Tensor,
    selection_bias: Tensor | None,
    expert_scale: Tensor | None,
    given_ids: Tensor | None,
    padding_mask: Tensor | None,
    rows: int,
    rule: str,
) -> list[Tensor]:
    routing = _routing_of(rule)
    tiling = Tiling(rows) if rows else None
    made = routing.empty(logits, padding_mask is not None, tiling)
    learned = (selection_bias, expert_scale, given_ids, padding_mask)
    routing._run(logits, *learned, tiling, made)
    return _parts(made)


@_triton_route.register_fake
def _(
    logits: Tensor,
    selection_bias: Tensor | None,
    expert_scale: Tensor | None,
    given_ids: Tensor | None,
    padding_mask: Tensor | None,
    rows: int,
    rule: str,
) -> list[Tensor]:
    tiling = Tiling(rows) if rows else None
    return _parts(_routing_of(rule).empty(logits, padding_mask is not None, tiling))
