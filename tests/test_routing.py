"""The routing pipeline and the routers: against double loops, fixtures and plain formulas."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_rules import RULES, V3_GROUPS, bias_for, random_logits, router_of, whole_logits
from torch import Tensor

from mixtura.config import (
    DroppedGroup,
    GroupLimit,
    GroupScore,
    NoComputeExperts,
    NoComputeKind,
    Renormalize,
    RoutingConfig,
    ScaleOn,
    ScoreFunction,
    ScoreOrder,
    SelectionBias,
    Simulation,
    SimulationConfig,
    WeightOn,
)
from mixtura.errors import ConfigError, InputError
from mixtura.routing import (
    FusedSharedExpertsRouter,
    FusedTopKBiasRouter,
    FusedTopKRouter,
    GroupedTopKRouter,
    HashRouter,
    RoutingSimulatorRouter,
    ZeroExpertRouter,
    create_router,
    pipeline,
)
from mixtura.types import Routing, TokenInputs

# ------------------------------------------------------------------------------------- the oracle

NEAR = 1e-5  # fp32 may order values that are closer than this differently from float64
RELATIVE, ABSOLUTE = 2e-5, 1e-6


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A value to choose by. Equal origins give equal values in any arithmetic."""

    value: float
    origin: Any


class Oracle:
    """The rule for one token in float64, with loops over experts and slots.

    `is_clear` turns False where rounding in fp32 may decide: a near tie of values that come from
    different logits, a logit at the edge of a window, a sum that cancels.
    """

    def __init__(self, config: RoutingConfig, bias: list[float] | None) -> None:
        self.config = config
        self.bias = bias
        self.is_clear = True

    def route(
        self, logits: list[float], ids: list[int] | None = None
    ) -> tuple[list[int], list[float]]:
        config = self.config
        logits = [self.transform(x) for x in logits]
        if config.score is ScoreFunction.SPARSEMIXER:
            ids, weights = self.sparsemixer(logits)
        else:
            ids = self.choose(logits) if ids is None else ids
            weights = self.weigh(logits, ids)
        weights = self.renormalize(weights)
        if config.scale_on is ScaleOn.WEIGHTS:
            weights = [w * config.scale for w in weights]
        return ids, weights

    def transform(self, logit: float) -> float:
        logit *= self.config.logit_multiplier
        cap = self.config.logit_softcap
        return logit if cap is None else cap * math.tanh(logit / cap)

    def scores(self, logits: list[float]) -> list[float]:
        match self.config.score:
            case ScoreFunction.SOFTMAX:
                highest = max(logits)
                total = sum(math.exp(x - highest) for x in logits)
                return [math.exp(x - highest) / total for x in logits]
            case ScoreFunction.SIGMOID:
                return [1 / (1 + math.exp(-x)) for x in logits]
            case ScoreFunction.SQRT_SOFTPLUS:
                return [math.sqrt(math.log1p(math.exp(x))) for x in logits]
            case _:
                return logits

    def choose(self, logits: list[float]) -> list[int]:
        config = self.config
        on_logit = (
            config.score_order is ScoreOrder.AFTER_TOP_K
            or config.selection_bias is SelectionBias.ON_LOGIT
        )
        values = logits if on_logit else self.scores(logits)
        bias = self.bias if self.bias is not None else [0.0] * len(values)
        ranked = [Ranked(v + b, (x, b)) for v, x, b in zip(values, logits, bias, strict=True)]
        if config.groups is not None:
            ranked = self.drop_groups(ranked, config.groups)
        return self.largest(ranked, config.top_k)

    def drop_groups(self, ranked: list[Ranked], groups: GroupLimit) -> list[Ranked]:
        size = len(ranked) // groups.num_expert_groups
        best_of = 1 if groups.score is GroupScore.MAX else 2
        group_scores = []
        for group in range(groups.num_expert_groups):
            members = sorted(
                ranked[group * size : (group + 1) * size], key=lambda r: r.value, reverse=True
            )[:best_of]
            origin = sorted(str(member.origin) for member in members)
            group_scores.append(Ranked(sum(member.value for member in members), origin))
        kept = self.largest(group_scores, groups.topk_groups)
        dropped = -math.inf if groups.dropped is DroppedGroup.NEGATIVE_INFINITY else 0.0
        return [
            entry if expert // size in kept else Ranked(dropped, "dropped")
            for expert, entry in enumerate(ranked)
        ]

    def largest(self, ranked: list[Ranked], count: int) -> list[int]:
        order = sorted(range(len(ranked)), key=lambda i: (-ranked[i].value, i))
        for one, other in itertools.pairwise(order[: count + 1]):
            a, b = ranked[one], ranked[other]
            if a.origin != b.origin and a.value - b.value <= NEAR * max(1.0, abs(a.value)):
                self.is_clear = False
        return order[:count]

    def weigh(self, logits: list[float], ids: list[int]) -> list[float]:
        if self.config.score_order is ScoreOrder.AFTER_TOP_K:
            return self.scores([logits[i] for i in ids])
        scores = self.scores(logits)
        return [scores[i] for i in ids]

    def sparsemixer(self, logits: list[float]) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        weights = []
        for _ in range(2):
            left = [i for i in range(len(logits)) if i not in ids]
            origins = [Ranked(logits[i], logits[i]) for i in left]
            best = left[self.largest(origins, 1)[0]]
            total = 0.0
            for i in left:
                near_enough = self.in_window(logits[best], logits[i])
                total += math.exp(logits[i] - logits[best]) if near_enough else 0.0
            ids.append(best)
            weights.append(1 / total)
        return ids, weights

    def in_window(self, highest: float, logit: float) -> bool:
        width = max(abs(logit), highest)
        if width == 0:
            return True
        distance = (highest - logit) / width - 2 * self.config.jitter
        if abs(distance) < NEAR and highest != logit:
            self.is_clear = False
        return distance <= 0

    def renormalize(self, weights: list[float]) -> list[float]:
        config = self.config
        total = sum(weights)
        match config.renormalize:
            case Renormalize.NONE:
                return weights
            case Renormalize.SUM:
                divisor = total + config.epsilon
            case Renormalize.CLAMPED_SUM:
                divisor = max(total, config.epsilon)
            case Renormalize.P_NORM:
                divisor = sum(abs(w) ** config.p_norm for w in weights) ** (1 / config.p_norm)
        if abs(divisor) <= 0.01 * sum(abs(w) for w in weights) + 1e-9:
            self.is_clear = False
            return weights
        return [w / divisor for w in weights]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A configuration with logits (T,E) and what it has learned."""

    config: RoutingConfig
    logits: list[list[float]]
    bias: list[float] | None
    scale: list[float] | None


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    score = draw(st.sampled_from(ScoreFunction))
    is_sparsemixer = score is ScoreFunction.SPARSEMIXER
    num_experts = draw(st.integers(2 if is_sparsemixer else 1, 13))
    order, kind, groups, top_k = ScoreOrder.BEFORE_TOP_K, SelectionBias.NONE, None, 2
    if not is_sparsemixer:
        order = draw(st.sampled_from(ScoreOrder))
        kinds = [k for k in SelectionBias if k is not SelectionBias.ON_SCORE or not is_after(order)]
        kind = draw(st.sampled_from(kinds))
        groups = draw(st.none() | group_limits(num_experts))
        size = num_experts // groups.num_expert_groups if groups else num_experts
        top_k = draw(st.integers(1, size * (groups.topk_groups if groups else 1)))
    config = RoutingConfig(
        num_experts=num_experts,
        top_k=top_k,
        score=score,
        score_order=order,
        selection_bias=kind,
        groups=groups,
        renormalize=draw(st.sampled_from(Renormalize)),
        epsilon=draw(st.sampled_from([0.0, 1e-20, 1e-6, 0.25])),
        p_norm=draw(st.sampled_from([1.0, 2.0, 3.0])),
        scale=draw(st.sampled_from([1.0, 2.5, 0.5])),
        scale_on=draw(st.sampled_from(ScaleOn)),
        logit_multiplier=draw(st.sampled_from([1.0, 0.5, 3.0])),
        logit_softcap=draw(st.sampled_from([None, 3.0, 30.0])),
        jitter=draw(st.sampled_from([0.01, 0.3])),
        per_expert_scale=draw(st.booleans()),
    )
    logit = draw(st.sampled_from([whole_numbers(), st.floats(-8, 8, width=32)]))
    num_tokens = draw(st.sampled_from([1, 2, 6]))
    row = st.lists(logit, min_size=num_experts, max_size=num_experts)
    eighths = st.lists(
        st.integers(-8, 8).map(lambda i: i / 8), min_size=num_experts, max_size=num_experts
    )
    return Problem(
        config,
        draw(st.lists(row, min_size=num_tokens, max_size=num_tokens)),
        draw(eighths) if kind is not SelectionBias.NONE else None,
        draw(eighths) if config.per_expert_scale else None,
    )


def is_after(order: ScoreOrder) -> bool:
    return order is ScoreOrder.AFTER_TOP_K


def whole_numbers() -> st.SearchStrategy[float]:
    """Few values, so that rows are full of exact ties."""
    return st.integers(-3, 4).map(float)


@st.composite
def group_limits(draw: st.DrawFn, num_experts: int) -> GroupLimit:
    num_groups = draw(
        st.sampled_from([g for g in range(1, num_experts + 1) if num_experts % g == 0])
    )
    scores = list(GroupScore) if num_experts // num_groups >= 2 else [GroupScore.MAX]
    return GroupLimit(
        num_expert_groups=num_groups,
        topk_groups=draw(st.integers(1, num_groups)),
        score=draw(st.sampled_from(scores)),
        dropped=draw(st.sampled_from(DroppedGroup)),
    )


def compare(problem: Problem) -> int:
    """Compare all tokens whose choice is clear, ids in order; returns how many there were."""
    config = problem.config
    router = create_router(
        config,
        selection_bias=None if problem.bias is None else torch.tensor(problem.bias),
        per_expert_scale=None if problem.scale is None else torch.tensor(problem.scale),
    )
    routing = router.route(torch.tensor(problem.logits, dtype=torch.float32))
    assert routing.topk_ids.dtype == torch.int32
    assert routing.topk_weights.dtype == torch.float32
    num_clear = 0
    for token, logits in enumerate(problem.logits):
        oracle = Oracle(config, problem.bias)
        ids, weights = oracle.route(logits)
        if not oracle.is_clear:
            continue
        num_clear += 1
        if problem.scale is not None:
            weights = [w * problem.scale[i] for w, i in zip(weights, ids, strict=True)]
        assert routing.topk_ids[token].tolist() == ids
        assert routing.topk_weights[token].tolist() == pytest.approx(
            weights, rel=RELATIVE, abs=ABSOLUTE
        )
    return num_clear


@settings(max_examples=400, deadline=None, derandomize=True)
@given(problems())
def test_pipeline_equals_the_double_loop(problem: Problem):
    compare(problem)


@pytest.mark.parametrize("name", RULES)
def test_the_oracle_judges_nearly_all_tokens(name: str):
    """Else the comparison above would be hollow."""
    rule = RULES[name]
    bias = bias_for(rule)
    problem = Problem(
        rule, random_logits(200, rule).tolist(), None if bias is None else bias.tolist(), None
    )
    assert compare(problem) > 190


@pytest.mark.parametrize("num_tokens", [1, 4, 5, 33])
@pytest.mark.parametrize("score", [s for s in ScoreFunction if s is not ScoreFunction.SPARSEMIXER])
def test_ties_go_to_the_lower_id(score: ScoreFunction, num_tokens: int):
    """Wherever the equal scores stand in memory, vector loop or remainder."""
    rule = RoutingConfig(
        num_experts=13, top_k=5, score=score, selection_bias=SelectionBias.ON_SCORE
    )
    router = create_router(rule, selection_bias=torch.zeros(13))
    for value in torch.linspace(-4, 4, 41):
        ids = router.route(torch.full((num_tokens, 13), float(value))).topk_ids
        assert ids.tolist() == [[0, 1, 2, 3, 4]] * num_tokens


def test_ties_of_groups_go_to_the_lower_group():
    rule = RoutingConfig(num_experts=8, top_k=4, groups=V3_GROUPS)
    ids = create_router(rule).route(torch.zeros(6, 8)).topk_ids
    assert ids.tolist() == [[0, 1, 2, 3]] * 6


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.integers(1, 12).flatmap(
        lambda e: st.tuples(
            st.lists(
                st.lists(
                    whole_numbers() | st.just(math.nan) | st.just(-math.inf), min_size=e, max_size=e
                ),
                min_size=1,
                max_size=8,
            ),
            st.integers(1, e),
        )
    )
)
def test_top_k_ids_is_a_stable_sort(case: tuple[list[list[float]], int]):
    rows, top_k = case
    scores = torch.tensor(rows)
    expected = scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    assert pipeline.top_k_ids(scores, top_k).equal(expected)


# ------------------------------------------------------------------------------- numeric fixtures

LOGITS = [2, 1, 0, -1, 1, 0.5, -2, 3]
BIAS = [0, 0.3, 0.5, 0, -0.2, 0.1, 0.9, -0.6]


def rule(**steps: Any) -> RoutingConfig:
    return RoutingConfig(**({"num_experts": 8, "top_k": 3} | steps))


BIASED_SIGMOID = {
    "score": ScoreFunction.SIGMOID,
    "selection_bias": SelectionBias.ON_SCORE,
    "renormalize": Renormalize.SUM,
    "scale": 2.5,
}
FIXTURES: list[tuple[str, RoutingConfig, list[int], list[float]]] = [
    ("softmax", rule(), [7, 0, 1], [0.5570, 0.2049, 0.0754]),
    ("renormalized", rule(renormalize=Renormalize.SUM), [7, 0, 1], [0.6652, 0.2447, 0.0900]),
    ("sigmoid", rule(score=ScoreFunction.SIGMOID), [7, 0, 1], [0.9526, 0.8808, 0.7311]),
    ("biased sigmoid", rule(**BIASED_SIGMOID), [1, 6, 2], [1.3535, 0.2207, 0.9257]),
    (
        "groups",
        rule(**BIASED_SIGMOID, groups=V3_GROUPS),
        [1, 6, 0],
        [1.0558, 0.1722, 1.2720],
    ),
    (
        "groups by maximum",
        rule(
            score=ScoreFunction.SIGMOID,
            groups=GroupLimit(num_expert_groups=4, topk_groups=2, score=GroupScore.MAX),
        ),
        [7, 0, 1],
        [0.9526, 0.8808, 0.7311],
    ),
    (
        "biased square root of softplus",
        rule(
            score=ScoreFunction.SQRT_SOFTPLUS,
            selection_bias=SelectionBias.ON_SCORE,
            renormalize=Renormalize.SUM,
            scale=1.5,
        ),
        [0, 1, 2],
        [0.6365, 0.5001, 0.3634],
    ),
]


@pytest.mark.parametrize(
    ("config", "ids", "weights"), [f[1:] for f in FIXTURES], ids=[f[0] for f in FIXTURES]
)
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_fixture(config: RoutingConfig, ids: list[int], weights: list[float], num_tokens: int):
    bias = torch.tensor(BIAS) if config.selection_bias is not SelectionBias.NONE else None
    logits = torch.tensor([LOGITS] * num_tokens)
    routing = create_router(config, selection_bias=bias).route(logits)
    assert routing.topk_ids.tolist() == [ids] * num_tokens
    torch.testing.assert_close(
        routing.topk_weights, torch.tensor([weights] * num_tokens), atol=6e-5, rtol=0
    )


def test_fixture_of_hash_routing():
    config = rule(
        score=ScoreFunction.SQRT_SOFTPLUS,
        hash_routing=True,
        renormalize=Renormalize.SUM,
        scale=1.5,
    )
    table = torch.tensor([[0, 1, 2], [6, 0, 3]], dtype=torch.int32)
    router = create_router(config, hash_table=table)
    assert isinstance(router, HashRouter)
    routing = router.route(torch.tensor([LOGITS]), torch.tensor([1]))
    assert routing.topk_ids.tolist() == [[6, 0, 3]]
    torch.testing.assert_close(
        routing.topk_weights, torch.tensor([[0.2251, 0.9213, 0.3536]]), atol=6e-5, rtol=0
    )


def test_fixture_of_zero_experts():
    config = rule(
        num_experts=6,
        no_compute=NoComputeExperts(kind=NoComputeKind.IDENTITY, count=2),
        selection_bias=SelectionBias.ON_SCORE,
        scale=6.0,
    )
    router = create_router(config, selection_bias=torch.tensor(BIAS))
    assert isinstance(router, ZeroExpertRouter)
    routing = router.route(torch.tensor([LOGITS]))
    assert routing.topk_ids.tolist() == [[-1, 2, 1]]
    torch.testing.assert_close(
        routing.topk_weights, torch.tensor([[0.0, 0.1664, 0.4523]]), atol=6e-5, rtol=0
    )
    assert routing.bypass is not None
    torch.testing.assert_close(
        routing.bypass.identity_weight, torch.tensor([0.0225]), atol=6e-5, rtol=0
    )


# ------------------------------------------------------------------------------------------ edges


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_no_token_and_one_token(name: str, num_tokens: int):
    rule = RULES[name]
    routing = router_of(rule).route(random_logits(5, rule)[:num_tokens])
    assert routing.topk_ids.shape == routing.topk_weights.shape == (num_tokens, rule.top_k)
    assert routing.topk_ids.dtype == torch.int32
    assert routing.topk_weights.dtype == torch.float32
    assert routing.topk_weights.isfinite().all()


@pytest.mark.parametrize("num_tokens", [2, 9])
def test_all_experts_are_chosen_where_k_is_e(num_tokens: int):
    config = RoutingConfig(num_experts=5, top_k=5)
    logits = random_logits(num_tokens, config)
    routing = create_router(config).route(logits)
    assert routing.topk_ids.long().equal(logits.argsort(dim=-1, descending=True))
    torch.testing.assert_close(routing.topk_weights.sum(-1), torch.ones(num_tokens))


@pytest.mark.parametrize(
    ("score", "weight"), [(ScoreFunction.SOFTMAX, 1.0), (ScoreFunction.SIGMOID, 0.8807970)]
)
def test_a_single_expert_takes_every_token(score: ScoreFunction, weight: float):
    config = RoutingConfig(num_experts=1, top_k=1, score=score)
    routing = create_router(config).route(torch.full((7, 1), 2.0))
    assert routing.topk_ids.tolist() == [[0]] * 7
    torch.testing.assert_close(routing.topk_weights, torch.full((7, 1), weight))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("num_tokens", [3, 8])
@pytest.mark.parametrize("column", [0, 11])
def test_a_nan_logit_makes_its_token_nan_and_no_other(name: str, num_tokens: int, column: int):
    """Wherever it stands, chosen or not; ids stay usable."""
    rule = RULES[name]
    router = router_of(rule)
    logits = random_logits(num_tokens, rule)
    clean = router.route(logits)
    logits[1, column] = math.nan
    routing = router.route(logits)
    assert routing.topk_weights[1].isnan().all()
    assert ((routing.topk_ids >= 0) & (routing.topk_ids < rule.num_experts)).all()
    others = [token for token in range(num_tokens) if token != 1]
    assert routing.topk_ids[others].equal(clean.topk_ids[others])
    assert routing.topk_weights[others].equal(clean.topk_weights[others])


def test_a_row_of_nan_has_distinct_ids_in_range():
    for rule in RULES.values():
        ids = router_of(rule).route(torch.full((6, rule.num_logits), math.nan)).topk_ids
        assert ((ids >= 0) & (ids < rule.num_experts)).all()
        assert all(len(set(row)) == rule.top_k for row in ids.tolist())


@pytest.mark.parametrize("score", [ScoreFunction.SOFTMAX, ScoreFunction.SIGMOID])
def test_an_expert_at_minus_infinity_comes_last_and_weighs_nothing(score: ScoreFunction):
    config = RoutingConfig(num_experts=6, top_k=3, score=score, renormalize=Renormalize.SUM)
    logits = torch.full((6, 6), -math.inf)
    logits[:, 4], logits[:, 5] = 1.0, 2.0
    routing = create_router(config).route(logits)
    assert routing.topk_ids.tolist() == [[5, 4, 0]] * 6
    assert (routing.topk_weights[:, 2] == 0).all()
    torch.testing.assert_close(routing.topk_weights.sum(-1), torch.ones(6))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_widened_once(name: str, dtype: torch.dtype):
    rule = RULES[name]
    logits = random_logits(9, rule).to(dtype)
    routing, widened = (router_of(rule).route(x) for x in (logits, logits.float()))
    assert routing.topk_weights.dtype == torch.float32
    assert routing.topk_weights.equal(widened.topk_weights)
    assert routing.topk_ids.equal(widened.topk_ids)


@pytest.mark.parametrize(
    ("logit", "score", "expected"),
    [
        (-40.0, ScoreFunction.SIGMOID, 4.248354e-18),
        (30.0, ScoreFunction.SIGMOID, 1.0),
        (-40.0, ScoreFunction.SQRT_SOFTPLUS, 2.0611536e-09),
        (50.0, ScoreFunction.SQRT_SOFTPLUS, 7.0710678),
    ],
)
def test_scores_keep_their_precision_far_from_zero(
    logit: float, score: ScoreFunction, expected: float
):
    value = pipeline.score(torch.tensor([[logit]]), score)
    assert value.item() == pytest.approx(expected, rel=5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_scores_have_the_dtype_of_their_logits(dtype: torch.dtype):
    logits = torch.linspace(-6, 6, 33, dtype=dtype).unsqueeze(0)
    for score in ScoreFunction:
        assert pipeline.score(logits, score).dtype == dtype
    sigmoid = pipeline.score(logits, ScoreFunction.SIGMOID)
    torch.testing.assert_close(sigmoid, logits.sigmoid())


# --------------------------------------------------------------------------- experts without work


def no_compute(kind: NoComputeKind, **steps: Any) -> RoutingConfig:
    """Five experts and three without arithmetic."""
    experts = NoComputeExperts(kind=kind, count=3)
    return RoutingConfig(**({"num_experts": 5, "top_k": 4, "no_compute": experts} | steps))


@pytest.mark.parametrize("kind", NoComputeKind)
@pytest.mark.parametrize("num_tokens", [0, 1, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_without_work_equal_the_dense_formula(
    kind: NoComputeKind, num_tokens: int, dtype: torch.dtype
):
    """Their slots are -1 with weight 0, and the bypass adds what the experts would have given."""
    config = no_compute(kind, scale=2.0)
    generator = torch.Generator().manual_seed(3)
    constants = torch.randn(3, 6, generator=generator)
    router = create_router(config, constants=constants if kind is NoComputeKind.CONSTANT else None)
    logits = random_logits(num_tokens, config)
    hidden = torch.randn(num_tokens, 6, generator=generator).to(dtype)
    routed = torch.randn(num_tokens, 6, generator=generator).to(dtype)
    routing = router.route(logits)
    weights, ids = router.select(logits, TokenInputs(), router.tensors)

    is_none = ids >= 5
    assert routing.topk_ids.equal(ids.masked_fill(is_none, -1).int())
    assert routing.topk_weights.equal(weights.masked_fill(is_none, 0.0))
    if num_tokens == 20:
        assert is_none.any() and not is_none.all()
    expected = routed.double()
    for token in range(num_tokens):
        for slot in range(4):
            expert = int(ids[token, slot])
            if expert < 5 or kind is NoComputeKind.ZERO:
                continue
            value = hidden[token] if kind is NoComputeKind.IDENTITY else constants[expert - 5]
            expected[token] += float(weights[token, slot]) * value.double()
    assert routing.bypass is not None
    output = routing.bypass.apply(routed, hidden)
    assert output.dtype == dtype
    torch.testing.assert_close(output, expected.to(dtype))


def test_a_nan_token_is_nan_though_all_its_experts_are_zero():
    router = create_router(no_compute(NoComputeKind.ZERO))
    logits = torch.tensor([[float("nan"), 0, 0, 0, 0, 9, 8, 7]] * 2)
    logits[1, 0] = 0.0
    replayed = TokenInputs(replayed_ids=torch.tensor([[5, 6, 7, 5]] * 2))
    routing = router.route(logits, tokens=replayed)
    assert routing.topk_ids.eq(-1).all() and routing.topk_weights.eq(0).all()
    assert routing.bypass is not None
    output = routing.bypass.apply(torch.zeros(2, 6), torch.ones(2, 6))
    assert output[0].isnan().all()
    assert output[1].eq(0).all()


def test_a_padding_token_bypasses_nothing():
    config = no_compute(NoComputeKind.IDENTITY)
    logits = torch.tensor([[0.0, 0, 0, 0, 0, 9, 8, 7]] * 2)
    mask = torch.tensor([True, False])
    routing = create_router(config).route(logits, tokens=TokenInputs(padding_mask=mask))
    assert routing.topk_ids[0].tolist() == [-1, -1, -1, 0]
    assert routing.topk_ids[1].tolist() == [-1] * 4
    assert routing.bypass is not None and routing.bypass.identity_weight is not None
    assert routing.bypass.identity_weight[0] > 0.9
    assert routing.bypass.identity_weight[1] == 0


# -------------------------------------------------------------------------- fused shared experts


@pytest.mark.parametrize("scale_on", ScaleOn)
def test_shared_experts_follow_with_weight_one(scale_on: ScaleOn):
    """Divided by a scale that the whole output gets afterwards."""
    plain = RoutingConfig(
        num_experts=6, top_k=2, renormalize=Renormalize.SUM, scale=4.0, scale_on=scale_on
    )
    fused = dataclasses.replace(plain, num_fused_shared_experts=2)
    logits = random_logits(9, plain)
    router = create_router(fused)
    assert isinstance(router, FusedSharedExpertsRouter)
    routing, routed = router.route(logits), create_router(plain).route(logits)
    assert routing.topk_ids[:, :2].equal(routed.topk_ids)
    assert routing.topk_weights[:, :2].equal(routed.topk_weights)
    assert routing.topk_ids[:, 2:].tolist() == [[6, 7]] * 9
    share = 0.25 if scale_on is ScaleOn.OUTPUT else 1.0
    assert routing.topk_weights[:, 2:].equal(torch.full((9, 2), share))
    assert routing.topk_weights[0, :2].sum().item() == pytest.approx(
        1.0 if scale_on is ScaleOn.OUTPUT else 4.0
    )


def test_shared_experts_with_a_gate_weigh_by_its_sigmoid():
    fused = RoutingConfig(
        num_experts=6,
        top_k=2,
        num_fused_shared_experts=2,
        fused_shared_gate=True,
        scale=2.0,
        scale_on=ScaleOn.OUTPUT,
    )
    assert (fused.num_logits, fused.num_slots) == (8, 4)
    logits = random_logits(9, fused)
    routing = create_router(fused).route(logits)
    plain = create_router(RoutingConfig(num_experts=6, top_k=2)).route(logits[:, :6])
    assert routing.topk_weights[:, :2].equal(plain.topk_weights)
    torch.testing.assert_close(routing.topk_weights[:, 2:], logits[:, 6:].sigmoid() / 2)


def test_shared_slots_of_padding_are_empty_too():
    fused = RoutingConfig(num_experts=6, top_k=2, num_fused_shared_experts=1)
    tokens = TokenInputs(padding_mask=torch.tensor([True, False, True]))
    routing = create_router(fused).route(random_logits(3, fused), tokens=tokens)
    assert routing.topk_ids[1].tolist() == [-1, -1, -1]
    assert routing.topk_weights[1].tolist() == [0, 0, 0]
    assert (routing.topk_ids[[0, 2]] >= 0).all()


# ------------------------------------------------------------------------------------ hash routing

HASHED = RoutingConfig(num_experts=6, top_k=2, score=ScoreFunction.SIGMOID, hash_routing=True)
TABLE = torch.tensor([[0, 5], [3, 1], [2, 4], [5, 3]])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_table_chooses_and_the_logits_weigh(dtype: torch.dtype):
    logits = random_logits(5, HASHED)
    input_ids = torch.tensor([3, 0, 0, 2, 1])
    routing = create_router(HASHED, hash_table=TABLE.to(dtype)).route(logits, input_ids.to(dtype))
    assert routing.topk_ids.long().equal(TABLE[input_ids])
    torch.testing.assert_close(routing.topk_weights, logits.sigmoid().gather(1, TABLE[input_ids]))


def test_hash_routing_of_no_token():
    routing = create_router(HASHED, hash_table=TABLE).route(
        torch.zeros(0, 6), torch.zeros(0, dtype=torch.long)
    )
    assert routing.topk_ids.shape == (0, 2)


def test_hash_routing_needs_token_ids():
    router = create_router(HASHED, hash_table=TABLE)
    with pytest.raises(
        InputError, match=r"input_ids \(None\) must be given to a hash router; got "
    ):
        router.route(torch.zeros(2, 6))


@pytest.mark.parametrize("bad", [-1, 4])
def test_hash_routing_refuses_token_ids_outside_its_table(bad: int):
    router = create_router(HASHED, hash_table=TABLE)
    with pytest.raises(InputError, match=rf"input_ids must be in \[0, 4\); got .*{bad}.*Correct"):
        router.route(torch.zeros(2, 6), torch.tensor([bad, 2]))


# ---------------------------------------------------------------------- custom, replay and padding


def modulo(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """A custom function: token t goes to experts t, t + 1, ... with weight 1/2."""
    num_tokens, num_experts = logits.shape
    ids = torch.arange(num_tokens).unsqueeze(1) + torch.arange(top_k)
    return torch.full((num_tokens, top_k), 0.5, dtype=torch.float64), ids.int() % num_experts


@pytest.mark.parametrize(("scale_on", "weight"), [(ScaleOn.WEIGHTS, 1.5), (ScaleOn.OUTPUT, 0.5)])
def test_a_custom_function_chooses_and_weighs(scale_on: ScaleOn, weight: float):
    config = RoutingConfig(num_experts=4, top_k=2, scale=3.0, scale_on=scale_on)
    routing = create_router(config, custom=modulo).route(torch.zeros(5, 4))
    assert routing.topk_ids.tolist() == [[0, 1], [1, 2], [2, 3], [3, 0], [0, 1]]
    assert routing.topk_ids.dtype == torch.int32
    assert routing.topk_weights.equal(torch.full((5, 2), weight))


def test_a_custom_function_may_name_experts_without_work():
    config = no_compute(NoComputeKind.IDENTITY, top_k=2)
    routing = create_router(config, custom=modulo).route(torch.zeros(6, 8))
    assert routing.topk_ids.tolist() == [[0, 1], [1, 2], [2, 3], [3, 4], [4, -1], [-1, -1]]
    assert routing.bypass is not None and routing.bypass.identity_weight is not None
    assert routing.bypass.identity_weight.tolist() == [0, 0, 0, 0, 0.5, 1.0]


@pytest.mark.parametrize(
    "steps",
    [
        {"score_order": ScoreOrder.AFTER_TOP_K},
        {"selection_bias": SelectionBias.ON_SCORE},
        {"groups": V3_GROUPS},
        {"renormalize": Renormalize.SUM},
        {"num_fused_shared_experts": 1},
        {"per_expert_scale": True},
        {"logit_softcap": 3.0},
        {"hash_routing": True},
    ],
    ids=lambda steps: next(iter(steps)),
)
def test_a_custom_function_refuses_steps_that_it_would_skip(steps: dict[str, Any]):
    config = rule(**steps)
    tensors = {
        "selection_bias": torch.zeros(8) if "selection_bias" in steps else None,
        "per_expert_scale": torch.ones(8) if "per_expert_scale" in steps else None,
        "hash_table": torch.zeros(4, 3, dtype=torch.long) if "hash_routing" in steps else None,
    }
    with pytest.raises(
        ConfigError, match=r"custom routing function must come without .*; got some\. Do these in"
    ):
        create_router(config, custom=modulo, **tensors)


def test_a_custom_function_must_return_the_shapes_of_weights_and_ids():
    config = RoutingConfig(num_experts=4, top_k=2)
    router = create_router(config, custom=lambda logits, top_k: modulo(logits, top_k + 1))
    with pytest.raises(
        InputError,
        match=r"must return weights and ids of shape \(5, 2\); got \(5, 3\) and \(5, 3\)",
    ):
        router.route(torch.zeros(5, 4))


@pytest.mark.parametrize("name", [n for n in RULES if n != "sparsemixer"])
def test_replayed_ids_replace_the_choice_and_are_weighed_by_the_rule(name: str):
    rule = RULES[name]
    logits = random_logits(7, rule)
    ids = torch.stack([torch.arange(rule.top_k) + token % 4 for token in range(7)]).int()
    routing = router_of(rule).route(logits, tokens=TokenInputs(replayed_ids=ids))
    assert routing.topk_ids.equal(ids)
    oracle = Oracle(rule, None)
    for token in range(7):
        _, weights = oracle.route(logits[token].tolist(), ids[token].tolist())
        assert routing.topk_weights[token].tolist() == pytest.approx(weights, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_replaying_a_router_s_own_ids_changes_nothing(name: str):
    rule = RULES[name]
    logits = random_logits(7, rule)
    router = router_of(rule)
    first = router.route(logits)
    again = router.route(logits, tokens=TokenInputs(replayed_ids=first.topk_ids))
    assert again.topk_ids.equal(first.topk_ids)
    assert again.topk_weights.equal(first.topk_weights)


def test_sparsemixer_weighs_the_replayed_picks():
    """By the windows around what is largest; a pick outside its window weighs nothing."""
    config = RoutingConfig(num_experts=4, top_k=2, score=ScoreFunction.SPARSEMIXER, jitter=0.1)
    logits = torch.tensor([[2.0, 1.8, 0.5, 1.9]] * 2)
    ids = torch.tensor([[1, 3], [2, 0]])
    routing = create_router(config).route(logits, tokens=TokenInputs(replayed_ids=ids))
    near = torch.tensor([2.0, 1.8, 1.9]).softmax(0)  # within 0.2 of 2.0, relatively
    second = torch.tensor([2.0, 1.9]).softmax(0)  # without expert 1
    third = torch.tensor([2.0, 1.8, 1.9]).softmax(0)  # without expert 2
    expected = torch.stack(
        [torch.stack([near[1], second[1]]), torch.stack([near[0] * 0, third[0]])]
    )
    torch.testing.assert_close(routing.topk_weights, expected)


@pytest.mark.parametrize("name", RULES)
def test_padding_tokens_visit_no_expert(name: str):
    rule = RULES[name]
    logits = random_logits(6, rule)
    logits[4] = math.nan  # a padding row may hold anything
    mask = torch.tensor([True, False, True, True, False, True])
    routing = router_of(rule).route(logits, tokens=TokenInputs(padding_mask=mask))
    plain = router_of(rule).route(logits)
    assert (routing.topk_ids[~mask] == -1).all()
    assert (routing.topk_weights[~mask] == 0).all()
    assert routing.topk_ids[mask].equal(plain.topk_ids[mask])
    assert routing.topk_weights[mask].equal(plain.topk_weights[mask])


# ------------------------------------------------------------------------------------- simulation


def simulated(
    kind: Simulation, num_experts: int = 10, top_k: int = 3, **rest: Any
) -> RoutingConfig:
    return RoutingConfig(
        num_experts=num_experts, top_k=top_k, simulation=SimulationConfig(kind=kind, **rest)
    )


def simulate(config: RoutingConfig, num_tokens: int) -> Routing:
    router = create_router(config)
    assert isinstance(router, RoutingSimulatorRouter)
    return router.route(torch.zeros(num_tokens, config.num_experts))


DRAWN = [kind for kind in Simulation if kind is not Simulation.REPLAY]


@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.parametrize("top_k", [1, 3, 10])
def test_simulated_ids_are_distinct_and_share_the_weight(kind: Simulation, top_k: int):
    routing = simulate(simulated(kind, top_k=top_k), 200)
    assert all(len(set(row)) == top_k for row in routing.topk_ids.tolist())
    assert ((routing.topk_ids >= 0) & (routing.topk_ids < 10)).all()
    assert routing.topk_weights.equal(torch.full((200, top_k), 1 / top_k))


@pytest.mark.parametrize("kind", DRAWN)
def test_the_seed_fixes_the_draw(kind: Simulation):
    first, again, other = (simulate(simulated(kind, seed=seed), 50).topk_ids for seed in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)


def test_the_hot_expert_is_in_every_row():
    ids = simulate(simulated(Simulation.HOT_EXPERT), 5000).topk_ids
    assert (ids[:, 0] == 0).all()
    others = ids[:, 1:].flatten().bincount(minlength=10)[1:]
    assert others.min() > 0.8 * others.max()


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_zipf_draws_as_the_power_of_the_rank(exponent: float):
    config = simulated(Simulation.ZIPF, num_experts=5, top_k=1, exponent=exponent)
    counts = simulate(config, 20_000).topk_ids.flatten().bincount(minlength=5)
    expected = torch.tensor([(rank + 1.0) ** -exponent for rank in range(5)])
    torch.testing.assert_close(counts / 20_000, expected / expected.sum(), atol=0.015, rtol=0)


def test_uniform_draws_all_experts_alike():
    counts = simulate(simulated(Simulation.UNIFORM), 10_000).topk_ids.flatten().bincount()
    torch.testing.assert_close(counts / 10_000, torch.full((10,), 0.3), atol=0.02, rtol=0)


def test_normal_prefers_the_middle():
    config = simulated(Simulation.NORMAL, num_experts=9, top_k=1)
    counts = simulate(config, 10_000).topk_ids.flatten().bincount(minlength=9)
    assert counts.argmax() == 4
    assert counts[4] > 3 * counts[0]
    assert abs(int(counts[:4].sum() - counts[5:].sum())) < 500


def test_replay_plays_captured_rows_round_and_round():
    captured = torch.tensor([[1, 4], [0, 2], [3, 1]])
    config = RoutingConfig(
        num_experts=5, top_k=2, simulation=SimulationConfig(kind=Simulation.REPLAY)
    )
    routing = create_router(config, replayed_ids=captured).route(torch.zeros(7, 5))
    assert routing.topk_ids.long().equal(captured[[0, 1, 2, 0, 1, 2, 0]])
    assert routing.topk_weights.equal(torch.full((7, 2), 0.5))


def test_simulation_visits_experts_without_work():
    config = no_compute(
        NoComputeKind.IDENTITY, simulation=SimulationConfig(kind=Simulation.UNIFORM)
    )
    routing = create_router(config).route(torch.zeros(200, 8))
    assert routing.bypass is not None and routing.bypass.identity_weight is not None
    total = routing.topk_weights.sum(-1) + routing.bypass.identity_weight
    torch.testing.assert_close(total, torch.ones(200))
    assert (routing.topk_ids == -1).any()


# ------------------------------------------------------------------- invariance, gradients, parity


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("make", [random_logits, whole_logits])
def test_permuting_tokens_permutes_the_result(
    name: str, make: Callable[[int, RoutingConfig], Tensor]
):
    rule = RULES[name]
    logits = make(37, rule)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    routing, permuted = (router_of(rule).route(x) for x in (logits, logits[order]))
    assert permuted.topk_ids.equal(routing.topk_ids[order])
    assert permuted.topk_weights.equal(routing.topk_weights[order])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("make", [random_logits, whole_logits])
def test_a_token_s_routing_does_not_depend_on_its_batch(
    name: str, make: Callable[[int, RoutingConfig], Tensor]
):
    rule = RULES[name]
    logits = make(37, rule)
    router = router_of(rule)
    together = router.route(logits)
    for size in (1, 3, 8):
        parts = [router.route(part) for part in logits.split(size)]
        assert torch.cat([part.topk_ids for part in parts]).equal(together.topk_ids)
        assert torch.cat([part.topk_weights for part in parts]).equal(together.topk_weights)


def plain_weights(rule: RoutingConfig, logits: Tensor, ids: Tensor) -> Tensor:
    """The weights of given ids, as one reads them in a model's source."""
    x = logits * rule.logit_multiplier
    if rule.logit_softcap is not None:
        x = rule.logit_softcap * torch.tanh(x / rule.logit_softcap)
    if rule.score_order is ScoreOrder.AFTER_TOP_K:
        x = x.gather(1, ids)
    w = {
        ScoreFunction.SOFTMAX: lambda x: x.softmax(-1),
        ScoreFunction.SIGMOID: torch.sigmoid,
        ScoreFunction.SQRT_SOFTPLUS: lambda x: F.softplus(x).sqrt(),
        ScoreFunction.LOGIT: lambda x: x,
    }[rule.score](x)
    w = w if rule.score_order is ScoreOrder.AFTER_TOP_K else w.gather(1, ids)
    if rule.renormalize is Renormalize.SUM:
        w = w / (w.sum(-1, keepdim=True) + rule.epsilon)
    if rule.renormalize is Renormalize.P_NORM:
        w = w / w.pow(rule.p_norm).sum(-1, keepdim=True) ** (1 / rule.p_norm)
    return w * rule.scale


@pytest.mark.parametrize("name", [n for n in RULES if n != "sparsemixer"])
def test_gradients_flow_through_the_weights(name: str):
    """And equal those of the plain formula, at zero and far from it too."""
    rule = RULES[name]
    logits = random_logits(8, rule)
    logits[:3] = whole_logits(3, rule)
    logits[3] *= 12
    ours, plain = (logits.clone().requires_grad_() for _ in range(2))
    routing = router_of(rule).route(ours)
    slots = torch.linspace(0.5, 2.0, rule.top_k)
    (routing.topk_weights * slots).sum().backward()
    (plain_weights(rule, plain, routing.topk_ids.long()) * slots).sum().backward()
    assert ours.grad is not None and plain.grad is not None
    assert ours.grad.abs().sum() > 0
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-4, atol=1e-6)


def test_gradients_reach_the_scale_of_each_expert():
    config = RoutingConfig(
        num_experts=5, top_k=2, renormalize=Renormalize.SUM, per_expert_scale=True
    )
    scale = torch.linspace(0.5, 1.5, 5).requires_grad_()
    logits = random_logits(6, config)
    routing = create_router(config, per_expert_scale=scale).route(logits)
    routing.topk_weights.sum().backward()
    plain = create_router(dataclasses.replace(config, per_expert_scale=False)).route(logits)
    ids = plain.topk_ids.long()
    torch.testing.assert_close(routing.topk_weights, plain.topk_weights * scale[ids])
    expected = torch.zeros(5).scatter_add(0, ids.flatten(), plain.topk_weights.flatten())
    torch.testing.assert_close(scale.grad, expected)


def test_gradients_reach_the_gate_of_shared_experts():
    config = RoutingConfig(
        num_experts=4, top_k=2, num_fused_shared_experts=1, fused_shared_gate=True
    )
    logits = random_logits(6, config).requires_grad_()
    create_router(config).route(logits).topk_weights[:, -1].sum().backward()
    assert logits.grad is not None
    gate = logits.detach()[:, 4].sigmoid()
    torch.testing.assert_close(logits.grad[:, 4], gate * (1 - gate))
    assert (logits.grad[:, :4] == 0).all()


@pytest.mark.parametrize("jitter", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("num_experts", [2, 7, 16])
def test_sparsemixer_equals_that_of_transformers(jitter: float, num_experts: int):
    """Choice, weights and gradients, in evaluation mode."""
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    config = RoutingConfig(
        num_experts=num_experts, top_k=2, score=ScoreFunction.SPARSEMIXER, jitter=jitter
    )
    logits = random_logits(100, config, seed=num_experts)
    logits[:50] = logits[:50].abs()  # both signs, and windows with several experts
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    routing = create_router(config).route(ours)
    weights, ids = sparsemixer(theirs, jitter_eps=jitter, training=False)
    assert routing.topk_ids.long().equal(ids)
    torch.testing.assert_close(routing.topk_weights, weights)
    slots = torch.tensor([1.0, 3.0])
    (routing.topk_weights * slots).sum().backward()
    (weights * slots).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["softmax", "v3", "sqrtsoftplus", "sparsemixer"])
def test_a_compiled_router_is_one_graph_with_the_same_result(name: str):
    rule = RULES[name]
    router = router_of(rule)

    def route(logits: Tensor) -> tuple[Tensor, Tensor]:
        routing = router.route(logits)
        return routing.topk_ids, routing.topk_weights

    compiled = torch.compile(route, backend="eager", fullgraph=True)
    for logits in (random_logits(9, rule), whole_logits(9, rule)):
        for got, expected in zip(compiled(logits), route(logits), strict=True):
            assert got.equal(expected)


# ----------------------------------------------------------------------------------------- errors

FORM = re.compile(r"^\S.* must .+\. \S.+\.$", re.DOTALL)
"""What (value) must rule. Do this."""


def assert_refused(kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message) as caught:
        call()
    assert FORM.match(str(caught.value)), str(caught.value)


IDENTITY = NoComputeExperts(kind=NoComputeKind.IDENTITY, count=2)
AFTER = ScoreOrder.AFTER_TOP_K
ON_SCORE = SelectionBias.ON_SCORE
MIXER = ScoreFunction.SPARSEMIXER
CONFIG_ERRORS: list[tuple[str, dict[str, Any]]] = [
    (r"num_experts \(0\) must be an integer >= 1; got int 0", {"num_experts": 0}),
    (r"num_experts \(True\) must be an integer >= 1; got bool", {"num_experts": True}),
    (r"num_experts \(8\.0\) must be an integer >= 1; got float", {"num_experts": 8.0}),
    (r"num_experts \(\d+\) must be an integer", {"num_experts": 2**62}),
    (r"top_k \(-1\) must be an integer >= 1; got int -1", {"top_k": -1}),
    (r"top_k \(None\) must be an integer >= 1; got NoneType", {"top_k": None}),
    (r"num_fused_shared_experts \(-1\) must be an integer >= 0", {"num_fused_shared_experts": -1}),
    (r"epsilon \(nan\) must be a finite number", {"epsilon": math.nan}),
    (r"p_norm \(inf\) must be a finite number", {"p_norm": math.inf}),
    (r"scale \('2'\) must be a finite number", {"scale": "2"}),
    (r"logit_multiplier \(None\) must be a finite number", {"logit_multiplier": None}),
    (r"jitter \(True\) must be a finite number", {"jitter": True}),
    (r"top_k \(9\) must be at most the number of experts; got 8 experts\. Lower", {"top_k": 9}),
    (
        r"top_k \(9\) must be at most the number of experts; got 8",
        {"num_experts": 6, "no_compute": IDENTITY, "top_k": 9},
    ),
    (r"epsilon \(-0\.5\) must be >= 0\. Use 0", {"epsilon": -0.5}),
    (r"logit_softcap \(0\.0\) must be > 0\. Use None", {"logit_softcap": 0.0}),
    (r"logit_softcap \(nan\) must be > 0", {"logit_softcap": math.nan}),
    (
        r"num_experts \(8\) must be divisible by num_expert_groups; got 3\. "
        r"Use one of \[1, 2, 4, 8\]",
        {"groups": GroupLimit(num_expert_groups=3, topk_groups=1)},
    ),
    (
        r"num_expert_groups \(8\) must leave two experts to a group .*; got 1\. Use GroupScore",
        {"groups": GroupLimit(num_expert_groups=8, topk_groups=4)},
    ),
    (
        r"top_k \(3\) must be at most the experts of the kept groups; got 1 groups of 2\. Keep",
        {"groups": GroupLimit(num_expert_groups=4, topk_groups=1)},
    ),
    (
        r"must not combine score_order 'after' with a selection bias on the score",
        {"score_order": AFTER, "selection_bias": ON_SCORE},
    ),
    (
        r"must not combine hash routing with groups or a selection bias",
        {"hash_routing": True, "groups": V3_GROUPS},
    ),
    (
        r"must not combine hash routing with groups or a selection bias",
        {"hash_routing": True, "selection_bias": ON_SCORE},
    ),
    (
        r"must not combine hash routing with scores after top-k",
        {"hash_routing": True, "score": ScoreFunction.SIGMOID, "score_order": AFTER},
    ),
    (r"must not combine the sparsemixer score with top_k other than 2", {"score": MIXER}),
    (
        r"must not combine the sparsemixer score with",
        {"score": MIXER, "top_k": 2, "score_order": AFTER},
    ),
    (
        r"must not combine the sparsemixer score with",
        {"score": MIXER, "top_k": 2, "groups": V3_GROUPS},
    ),
    (
        r"must not combine the sparsemixer score with",
        {"score": MIXER, "top_k": 2, "hash_routing": True},
    ),
    (
        r"must not combine the sparsemixer score with",
        {"score": MIXER, "top_k": 2, "selection_bias": ON_SCORE},
    ),
    (
        r"must not combine no-compute experts with a scale on the output",
        {"no_compute": IDENTITY, "scale": 2.0, "scale_on": ScaleOn.OUTPUT},
    ),
    (
        r"must not combine fused_shared_gate with no fused shared experts",
        {"fused_shared_gate": True},
    ),
    (
        r"must not combine no-compute experts with fused shared experts",
        {"no_compute": IDENTITY, "num_fused_shared_experts": 1},
    ),
    (
        r"must not combine no-compute experts with a scale per expert",
        {"no_compute": IDENTITY, "per_expert_scale": True},
    ),
    (
        r"must not combine no-compute experts with the weight on the input",
        {"no_compute": IDENTITY, "weight_on": WeightOn.INPUT},
    ),
]


@pytest.mark.parametrize(("message", "steps"), CONFIG_ERRORS)
def test_a_configuration_that_no_router_honours_is_refused(message: str, steps: dict[str, Any]):
    assert_refused(ConfigError, message, lambda: rule(**steps))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            r"num_expert_groups \(0\) must be an integer >= 1",
            lambda: GroupLimit(num_expert_groups=0, topk_groups=1),
        ),
        (
            r"topk_groups \(0\) must be an integer >= 1",
            lambda: GroupLimit(num_expert_groups=2, topk_groups=0),
        ),
        (
            r"topk_groups \(3\) must be at most num_expert_groups; got 2\. Lower topk_groups",
            lambda: GroupLimit(num_expert_groups=2, topk_groups=3),
        ),
        (
            r"no_compute\.count \(0\) must be an integer >= 1",
            lambda: NoComputeExperts(kind=NoComputeKind.ZERO, count=0),
        ),
        (
            r"simulation\.exponent \(nan\) must be a finite number",
            lambda: SimulationConfig(kind=Simulation.ZIPF, exponent=math.nan),
        ),
        (
            r"ScoreFunction \('relu'\) must be one of softmax, sigmoid, sqrtsoftplus, logit",
            lambda: ScoreFunction.parse("relu"),
        ),
    ],
)
def test_a_part_of_a_configuration_is_refused_by_itself(message: str, call: Callable[[], Any]):
    assert_refused(ConfigError, message, call)


WHOLE = torch.zeros(1, 3, dtype=torch.long)
REPLAY = {"simulation": SimulationConfig(kind=Simulation.REPLAY)}
CONSTANT = {"no_compute": NoComputeExperts(kind=NoComputeKind.CONSTANT, count=2)}
NEEDED: dict[str, dict[str, Any]] = {
    "selection_bias": {"selection_bias": ON_SCORE},
    "per_expert_scale": {"per_expert_scale": True},
    "hash_table": {"hash_routing": True},
    "constants": CONSTANT,
    "replayed_ids": REPLAY,
}


@pytest.mark.parametrize("name", NEEDED)
def test_a_tensor_that_the_rule_asks_for_must_be_given(name: str):
    assert_refused(
        ConfigError,
        rf"{name} must be given where the routing configuration asks for it; got none\. Make",
        lambda: create_router(rule(**NEEDED[name])),
    )


@pytest.mark.parametrize("name", NEEDED)
def test_a_tensor_that_the_rule_does_not_ask_for_is_refused(name: str):
    assert_refused(
        ConfigError,
        rf"{name} must be None unless the routing configuration asks for it; got \(1, 3\)\. Make",
        lambda: create_router(rule(), **{name: WHOLE}),
    )


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("selection_bias", (7,), r"\(8\)"),
        ("selection_bias", (1, 8), r"\(8\)"),
        ("selection_bias", (8, 1), r"\(8\)"),
        ("per_expert_scale", (9,), r"\(8\)"),
        ("hash_table", (4, 2), r"\(vocabulary, 3\)"),
        ("hash_table", (3,), r"\(vocabulary, 3\)"),
        ("hash_table", (0, 3), r"\(vocabulary, 3\)"),
        ("constants", (3, 5), r"\(2, hidden_size\)"),
        ("replayed_ids", (4, 4), r"\(rows, 3\)"),
        ("replayed_ids", (0, 3), r"\(rows, 3\)"),
    ],
)
def test_a_tensor_of_another_shape_is_refused(name: str, shape: tuple[int, ...], wanted: str):
    got = re.escape(str(shape))
    assert_refused(
        ConfigError,
        rf"{name} must have the shape {wanted} and some rows; got {got}\. Give",
        lambda: create_router(rule(**NEEDED[name]), **{name: torch.zeros(shape).long()}),
    )


@pytest.mark.parametrize("name", ["hash_table", "replayed_ids"])
@pytest.mark.parametrize(("bad", "fact"), [(-1, "got -1 to 2"), (8, "got 1 to 8")])
def test_a_table_of_ids_outside_the_experts_is_refused(name: str, bad: int, fact: str):
    assert_refused(
        ConfigError,
        rf"{name} must hold ids in \[0, 8\); {fact}\. Correct",
        lambda: create_router(rule(**NEEDED[name]), **{name: torch.tensor([[1, 2, bad]])}),
    )


DRAW = {"simulation": SimulationConfig(kind=Simulation.UNIFORM)}


@pytest.mark.parametrize(
    ("message", "steps", "rest"),
    [
        (r"a simulation must not be combined with .*; got both\. Drop", DRAW, {"custom": modulo}),
        (
            r"a simulation must not be combined with .*; got both\. Drop",
            DRAW | {"num_fused_shared_experts": 1},
            {},
        ),
        (
            r"hash routing must not be combined with fused shared experts; got both\. Run",
            {"hash_routing": True, "num_fused_shared_experts": 1},
            {"hash_table": WHOLE},
        ),
    ],
)
def test_routers_that_exclude_each_other_are_refused(
    message: str, steps: dict[str, Any], rest: dict[str, Any]
):
    assert_refused(ConfigError, message, lambda: create_router(rule(**steps), **rest))


@pytest.mark.parametrize("shape", [(2, 7), (2, 9), (8,), (1, 2, 8)])
def test_logits_of_another_shape_are_refused(shape: tuple[int, ...]):
    got = re.escape(str(shape))
    assert_refused(
        InputError,
        rf"router_logits must be \(tokens, 8\); got the shape {got}\. Check the gate",
        lambda: create_router(rule()).route(torch.zeros(shape)),
    )


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("input_ids", (3,)),
        ("input_ids", (2, 1)),
        ("replayed_ids", (3, 3)),
        ("replayed_ids", (2,)),
        ("padding_mask", (1,)),
        ("padding_mask", (1, 2)),
    ],
)
def test_inputs_must_have_one_row_per_token(name: str, shape: tuple[int, ...]):
    tokens = TokenInputs(**{name: torch.zeros(shape, dtype=torch.long)})
    assert_refused(
        InputError,
        rf"{name} \({re.escape(str(shape))}\) must be \(tokens, ?(top_k)?\), one row per token; "
        r"got 2 tokens\. Flatten",
        lambda: create_router(rule()).route(torch.zeros(2, 8), tokens=tokens),
    )


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0, 1]], r"replayed_ids must be \(tokens, 3\); got the shape \(1, 2\)\. Record"),
        ([[0, 1, 8]], r"replayed_ids must be in \[0, 8\); got 0 to 8\. Correct"),
        ([[0, 1, -1]], r"replayed_ids must be in \[0, 8\); got -1 to 1\. Correct"),
    ],
)
def test_replayed_ids_that_do_not_fit_are_refused(ids: Any, message: str):
    tokens = TokenInputs(replayed_ids=torch.tensor(ids))
    assert_refused(
        InputError, message, lambda: create_router(rule()).route(torch.zeros(1, 8), tokens=tokens)
    )


@pytest.mark.parametrize(
    ("what", "steps", "rest"),
    [("a custom routing function", {}, {"custom": modulo}), ("a simulation", DRAW, {})],
)
def test_replayed_ids_are_refused_where_they_would_be_ignored(
    what: str, steps: dict[str, Any], rest: dict[str, Any]
):
    router = create_router(rule(**steps), **rest)
    assert_refused(
        InputError,
        rf"replayed_ids must be None for {what}, which chooses by itself; got \(1, 3\)\. Drop",
        lambda: router.route(torch.zeros(1, 8), tokens=TokenInputs(replayed_ids=WHOLE)),
    )


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ({}, FusedTopKRouter),
        ({"selection_bias": ON_SCORE}, FusedTopKBiasRouter),
        ({"groups": V3_GROUPS}, GroupedTopKRouter),
        ({"groups": V3_GROUPS, "selection_bias": ON_SCORE}, GroupedTopKRouter),
        ({"hash_routing": True}, HashRouter),
        ({"no_compute": IDENTITY, "num_experts": 6}, ZeroExpertRouter),
        ({"num_fused_shared_experts": 1}, FusedSharedExpertsRouter),
        (DRAW, RoutingSimulatorRouter),
    ],
)
def test_each_configuration_has_its_router(steps: dict[str, Any], expected: type):
    bias = torch.zeros(8) if "selection_bias" in steps else None
    table = WHOLE if "hash_routing" in steps else None
    assert type(create_router(rule(**steps), selection_bias=bias, hash_table=table)) is expected
